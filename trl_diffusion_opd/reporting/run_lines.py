# Copyright 2026 The trl-diffusion-opd Authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The console of a run: a bar on a terminal, a line an interval, what an update takes, and a summary at the end."""

import math
import shutil
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import TrainingArguments

from ..guards.redaction import shown
from . import console as tables
from .progress import WIDTH, Log, duration, measure_of, number, of_tasks, progress_line, timing_line, worst_first


# What an update takes is said after this many updates: the first ones are slow.
_TIMED_AFTER = 10
# It is said again if it has changed by this share.
_TIME_CHANGE = 0.5
# The most tasks that the summary names.
_SUMMED_UP = 12
# Without tqdm's own estimate of the rest, which knows nothing of evaluations.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"


def use_lines(callbacks: list[TrainerCallback]) -> None:
    """Replaces, in the list, the callbacks that Trainer made to show a run on the console by [`RunLines`]."""
    # Only the exact classes: a subclass is the user's own and stays.
    kept = [callback for callback in callbacks if type(callback) not in (ProgressCallback, PrinterCallback)]
    if len(kept) < len(callbacks):
        callbacks[:] = [*kept, RunLines()]


class RunClock:
    """Measures updates, evaluations and checkpoints by the wall clock, and estimates how long the rest takes."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._mark = now()
        self._updates: list[float] = []
        self._saves: list[float] = []
        # By update, since a dict of evaluation sets makes several evaluations at once.
        self._evaluations: dict[int, float] = defaultdict(float)

    def _since_mark(self) -> float:
        now = self._now()
        passed, self._mark = now - self._mark, now
        return passed

    def skip(self) -> None:
        """Call it after work that belongs to no update."""
        self._since_mark()

    def end_update(self) -> None:
        self._updates.append(self._since_mark())

    def end_evaluation(self, update: int, seconds: float) -> None:
        """Call it after an evaluation of so many seconds. What was done once beside it is not in them."""
        self._evaluations[update] += seconds
        self.skip()

    def end_save(self) -> None:
        self._saves.append(self._since_mark())

    def left(self, updates: int, evaluations: int, saves: int) -> str:
        """
        Says how long the rest of the run takes.

        Args:
            updates (`int`), evaluations (`int`), saves (`int`): how many of each are to come.
        """
        if not self._updates:
            return ""
        later = self._updates[1:] or self._updates  # the first one sets things up
        seconds = updates * _mean(later) + saves * _mean(self._saves) + evaluations * _mean(self._evaluations.values())
        unknown = evaluations if not self._evaluations else 0
        more = f" + {unknown} eval{'s' if unknown > 1 else ''}" if unknown else ""
        return f"ETA {duration(seconds)}{more}" if updates or evaluations else ""


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def times_left(every: int, done: int, steps: int, delay: float = 0) -> int:
    """
    Returns how often something that is done `every` so many updates is still to come, with update `done` itself.

    Args:
        every (`int`), delay (`float`): it is due at multiples of `every`, from update `delay` on.
        done (`int`), steps (`int`): updates done, and updates of the run.
    """
    due = steps // every - max(done - 1, math.ceil(delay) - 1, 0) // every
    at_end = steps % every != 0 and steps >= delay  # it is also done after the last update
    return max(0, due) + at_end


class RunLines(ProgressCallback):
    """
    Shows a run on the console. It takes the place of Transformers' callback, which prints every metric of a log.

    An interval has one line ([`progress.progress_line`]). On a terminal there is a bar below it, unless `disable_tqdm`
    is set. After ten updates a line says what an update takes, and again if that changes by half. At the end there is
    a summary. Only the main process prints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = RunClock()
        self._start = self._started_at = 0.0
        self._said_time: float | None = None
        self._last: Log = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._clock, self._said_time, self._last = RunClock(), None, {}
        self._start, self._started_at = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            # disable=None: none where the output is a file.
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                bar_format=_BAR,
                disable=True if args.disable_tqdm else None,
            )
        self.current_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._clock.end_update()
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        self._last = logs
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        line = progress_line(
            state.global_step,
            state.max_steps,
            logs,
            first_of(state.log_history),
            self._clock.left(state.max_steps - state.global_step, *_to_come(args, state)),
            min(WIDTH, columns),
        )
        tables.print_unwrapped(line)
        if state.global_step - self._started_at >= _TIMED_AFTER:
            self._say_time()

    def _say_time(self) -> None:
        seconds = self._last.get("step_time")
        if seconds is None:
            return
        if self._said_time is None or abs(seconds - self._said_time) >= _TIME_CHANGE * self._said_time:
            self._said_time = seconds
            tables.print_unwrapped(timing_line(self._last))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        seconds = sum(value for name, value in (metrics or {}).items() if name.endswith("_runtime"))
        self._clock.end_evaluation(state.global_step, seconds)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._clock.end_save()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._clock.skip()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
        if state.global_step == self._started_at:
            return
        if self._said_time is None:
            self._say_time()
        updates = state.global_step - int(self._started_at)
        tables.print_unwrapped(
            f"\n{updates} update{'s' if updates > 1 else ''} in {duration(time.monotonic() - self._start)}."
        )
        for line in summary(state.log_history):
            tables.print_unwrapped(line)
        if (best := best_line(args, state)) is not None:
            tables.print_unwrapped(best)


def _to_come(args: TrainingArguments, state: TrainerState) -> tuple[int, int]:
    """How many evaluations and saves are still to come. Those of this update come after its line."""
    done, steps = state.global_step, state.max_steps
    epochs = max(0, math.ceil(state.num_train_epochs) - math.floor(state.epoch or 0))
    evaluations = saves = 0
    if args.eval_strategy == IntervalStrategy.STEPS:
        evaluations = times_left(state.eval_steps, done, steps, args.eval_delay)
    elif args.eval_strategy == IntervalStrategy.EPOCH:
        evaluations = epochs
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps > 0:
        saves = times_left(state.save_steps, done, steps)
    elif args.save_strategy == SaveStrategy.EPOCH:
        saves = epochs
    return evaluations, saves


def first_of(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the first value of every metric of the training logs."""
    first: dict[str, float] = {}
    for entry in log_history:
        if "loss" in entry:
            first = {**entry, **first}
    return first


def summary(log_history: Sequence[Mapping[str, float]]) -> list[str]:
    """Says how far each task has come: the first and the last value of its gap, reward or loss."""
    first, last = first_of(log_history), first_of([*reversed(log_history)])
    measure = measure_of(last)
    if measure is None:
        return []
    before, now = of_tasks(first, measure.prefix), of_tasks(last, measure.prefix)
    named = worst_first(now, before, measure.rises)[:_SUMMED_UP] if len(now) > _SUMMED_UP else list(now)
    title = {"gap": "Velocity gap"}.get(measure.title, measure.title.capitalize())
    if before == now:  # a run with one line
        return [f"{title}: {', '.join(f'{shown(task)} {number(now[task])}' for task in named)}."]
    changes = [f"{shown(task)} {number(before[task])} -> {number(now[task])}" for task in named]
    more = f", and {len(now) - len(named)} more" if len(now) > len(named) else ""
    line = f"{title} from the first to the last line: {', '.join(changes)}{more}."
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def best_line(args: TrainingArguments, state: TrainerState) -> str | None:
    """Says which checkpoint was the best by `metric_for_best_model`, and which weights the trainer has now."""
    name = args.metric_for_best_model
    if name is None or state.best_metric is None or not state.best_global_step:
        return None
    name = name if name.startswith("eval_") else f"eval_{name}"
    has = "its weights are loaded" if args.load_best_model_at_end else "the weights are the last update's"
    return f"Best: update {state.best_global_step}, {name} {number(state.best_metric)}; {has}."
