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

"""Prints the tables of a run to the console."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm import tqdm

from ..algorithms.opd import StepPlan, dominant_step
from ..algorithms.samplers import SamplerTable
from ..algorithms.separability import Pair
from ..guards.files import JSON
from ..guards.redaction import shown, visible
from ..profiling.memory import MemoryRow
from .progress import duration


if TYPE_CHECKING:
    from ..models.teachers import TeacherRow


logger = logging.getLogger(__name__)

# Warn if one step has more than this share of the weight: little else is then trained.
_DOMINANT_SHARE = 0.9
# Rows of the table of task pairs: twenty tasks would make 190.
_SHOWN_PAIRS = 10
# The longest text shown, in characters: longer than any prompt that an encoder takes.
_LONGEST_TEXT = 4000


def print_teachers(rows: Sequence["TeacherRow"], prompts: Mapping[str, int], lost: float | None) -> None:
    """
    Prints tasks and teachers.

    Args:
        rows (`list[dict]`): one for each teacher, as [`TeacherBank.summary`] returns them.
        prompts (`dict[str, int]`): number of prompts of each task.
        lost (`float`, *optional*): for a student that starts from the mean of its teachers' LoRAs, the relative error
            of that start, which its rank causes.
    """
    console = _console()
    teachers = Table(title="Tasks and teachers")
    for column in ("task", "prompts", "teacher", "kind", "guidance"):
        teachers.add_column(column, overflow="fold")
    for column in ("revision", "sha256"):  # useless if a narrow console cuts them
        teachers.add_column(column, no_wrap=True, min_width=8)
    for row in rows:
        differs = [f"weight {row['weight']:.2f}"] if row["weight"] != 1 else []
        differs += [f"lora_scale {row['lora_scale']:g}"] if row["lora_scale"] != 1 else []
        name = f"{row['teacher']} ({', '.join(differs)})" if differs else row["teacher"]
        kind = row["kind"] if row["rank"] is None else f"{row['kind']} {row['rank']}"
        cells = [prompts[row["task"]], name, kind, row["guidance_scale"], row["revision"], row["sha256"]]
        teachers.add_row(row["task"], *("-" if cell is None else str(cell) for cell in cells))
    console.print(teachers)
    if lost is not None:
        console.print(f"The student starts from the mean of its teachers' LoRAs. Its rank loses {lost:.1%} of it.")


def print_steps(plan: StepPlan, weighting: str) -> None:
    """Prints the denoising steps with their weights, and warns if one of them has nearly all of the weight."""
    weights = plan.weights
    steps = Table(title=f"Steps of {plan.table.name}, weighting {weighting}")
    for column in ("step", "level", "weight", "share"):
        steps.add_column(column, justify="right")
    for j, level in enumerate(plan.table.levels[:-1].tolist()):
        trained = j in plan.steps
        shown = (f"{weights[j]:.3g}", f"{weights[j] / weights.sum():.1%}") if trained else ("not trained", "-")
        steps.add_row(str(j), f"{level:.4f}", *shown)
    _console().print(steps)
    step, share = dominant_step(weights)
    if share > _DOMINANT_SHARE:
        logger.warning(
            f"Step {step} has {share:.1%} of the weight, so the others are hardly trained. Consider "
            "loss_weighting='velocity', the sampler 'ode', or a larger skip_last_steps."
        )


def print_trained(parameters: Iterable[nn.Parameter]) -> None:
    """Prints the number of trained parameters."""
    print_line(f"Trained parameters: {sum(parameter.numel() for parameter in parameters):,}")


def update_line(
    processes: int, samples: int, tasks: int, micro_batches: int, num_generations: int | None = None
) -> str:
    """
    The samples of an update as a product.

    Args:
        processes (`int`), samples (`int`): number of processes, and samples of a micro-batch on each.
        tasks (`int`), micro_batches (`int`): number of tasks, and micro-batches of each on a process.
        num_generations (`int`, *optional*): images drawn for each prompt; `None` if an image is a prompt's only one.
    """
    names = "process", "prompt" if num_generations is None else "image", "task", "micro-batch"
    counts = processes, samples, tasks, micro_batches
    product = " x ".join(
        _counted(n, name) for n, name in zip(counts, names, strict=True) if n > 1 or name != "micro-batch"
    )
    total = processes * samples * tasks * micro_batches
    line = f"{product} = {_counted(total, 'sample')} an update"
    if num_generations is None:
        return f"{line}."
    of_task = processes * samples * micro_batches // num_generations
    return f"{line}: {_counted(of_task, 'prompt')} x {_counted(num_generations, 'generation')} x {_counted(tasks, 'task')}."


def _counted(number: int, name: str) -> str:
    plural = name if number == 1 else f"{name}es" if name.endswith(("s", "ch")) else f"{name}s"
    return f"{number:,} {plural}"


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Prints a line, and below it facts, each as (what, text)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, text in facts:
        table.add_row(f"  {what}", text)
    console = _console()
    console.print(title)
    console.print(table)


def print_line(text: str) -> None:
    _console().print(text)


def print_table(table: Table) -> None:
    _console().print(table)


def print_unwrapped(text: str) -> None:
    """Prints a text whose lines stay as long as they are."""
    _console().print(text, soft_wrap=True)


def print_resume(checkpoint: str, update: int, changes: Sequence[tuple[str, str, str]]) -> None:
    """Prints where a run resumes, and the changed settings, each as (name, value then, value now)."""
    console = _console()
    console.print(f"Resuming after update {update} from {checkpoint}.")
    if changes:
        table = Table(title=f"Changed since update {update}, with effect from update {update + 1} on")
        for column in ("setting", "then", "now"):
            table.add_column(column, overflow="fold")
        for change in changes:
            table.add_row(*change)
        console.print(table)


def print_rewards(
    prompts: Mapping[str, int], rewards: Mapping[str, Mapping[str, float]], of_a_round: int, num_generations: int
) -> None:
    """
    Prints tasks and rewards.

    Args:
        prompts (`dict[str, int]`): number of prompts of each task.
        rewards (`dict[str, dict[str, float]]`): for each task the weights of its rewards, by name.
        of_a_round (`int`): prompts of a task in one round.
        num_generations (`int`): images drawn for each prompt.
    """
    table = Table(title=f"Tasks and rewards, {num_generations} completions a prompt")
    for column in ("task", "prompts", "prompts a round", "reward", "weight"):
        table.add_column(column, overflow="fold")
    for task, weights in rewards.items():
        shown = [task, str(prompts[task]), str(of_a_round)]
        for name, weight in weights.items():
            table.add_row(*shown, name, f"{weight:g}")
            shown = [""] * len(shown)
    _console().print(table)


def print_sde_steps(table: SamplerTable, steps: range, window_size: int, shift_every: int | None = None) -> None:
    """
    Prints the denoising steps, and which of them may have noise and be trained.

    Args:
        table ([`SamplerTable`]): the sampler's table if every step had noise.
        steps (`range`), window_size (`int`): steps that may have noise, and the number of consecutive ones that have
            it.
        shift_every (`int`, *optional*): updates after which the window moves on by one step. By default it is drawn.
    """
    slides = "" if shift_every is None else f", from the first on, one further every {shift_every} updates"
    shown = Table(title=f"Steps of {table.name}, {window_size} of {len(steps)} with noise and loss{slides}")
    for column in ("step", "level", "noise"):
        shown.add_column(column, justify="right")
    for j, level in enumerate(table.levels[:-1].tolist()):
        shown.add_row(str(j), f"{level:.4f}", f"{float(table.s[j]):.3g}" if j in steps else "none, not trained")
    _console().print(shown)


def print_tasks(images: Mapping[str, int]) -> None:
    """Prints the number of training images of each task."""
    tasks = Table(title="Tasks")
    for column in ("task", "images"):
        tasks.add_column(column)
    for task, count in images.items():
        tasks.add_row(task, str(count))
    _console().print(tasks)


def print_pairs(pairs: Sequence[Pair]) -> None:
    """
    Prints how well tasks with different teachers can be told apart by their prompts.

    Args:
        pairs (`list[Pair]`): pairs of tasks, the most alike first. Of many pairs, only the first are printed.
    """
    if not pairs:
        return
    more = f", the worst {_SHOWN_PAIRS} of {len(pairs)} pairs" if len(pairs) > _SHOWN_PAIRS else ""
    table = Table(title=f"Tasks by their prompts{more}")
    for column in ("tasks", "identical prompts", "told apart", "teachers apart"):
        table.add_column(column, overflow="fold")
    for pair in pairs[:_SHOWN_PAIRS]:
        accuracy = "-" if pair.accuracy is None else f"{pair.accuracy:.0%}"
        apart = "-" if pair.disagreement is None else f"{pair.disagreement:.2f}"
        table.add_row(", ".join(pair.tasks), f"{pair.identical} ({pair.identical_share:.0%})", accuracy, apart)
    _console().print(table)


def print_completions(
    prompts: Sequence[tuple[str, str]], rewards: Mapping[str, Sequence[float | None]], step: int
) -> None:
    """
    Prints prompts and rewards of the student's images.

    Args:
        prompts (`list[tuple[str, str]]`): prompt and task of each image.
        rewards (`dict[str, list[float | None]]`): for each reward, by name, a value for each image.
        step (`int`): the current update.
    """
    table = Table(title=f"Images at update {step}")
    for column in ("prompt", "task"):
        table.add_column(column)
    for name in rewards:
        table.add_column(name, justify="right")
    for prompt, *values in zip(prompts, *rewards.values(), strict=True):
        table.add_row(*prompt, *map(reward_cell, values))
    _console().print(table)


def reward_cell(value: float | None) -> str:
    """A reward as text; `-` if it does not apply."""
    return "-" if value is None else f"{value:.3f}"


def print_dry_run(report: Mapping[str, JSON], device: str) -> None:
    """
    Prints the report of [`~dry_run.dry_run`].

    Args:
        report (`dict`): the report.
        device (`str`): kind of the device that it ran on.
    """
    shown = {
        task: {
            "kl": f"{figures['kl']:.2e}",
            "noise floor": f"{figures['noise_floor']:.2e}",
            "velocity gap": f"{figures['velocity_gap']:.1%}",
        }
        for task, figures in report["tasks"].items()
    }
    _print_taught(report, device, shown)
    _console().print(
        f"Time: {report['seconds_per_update']:.3g} s an update, {duration(report['seconds'])} for "
        f"{report['updates']} "
        "updates. This is the time of single forwards and one backward on a micro-batch of each task, times the "
        "number of steps. It leaves out the optimizer, encoding of prompts, evaluations and checkpoints."
    )


def print_dmd_dry_run(report: Mapping[str, JSON], device: str) -> None:
    """
    Prints the report of [`~dry_run_dmd.dry_run`].

    Args:
        report (`dict`): the report.
        device (`str`): kind of the device that it ran on.
    """
    shown = {task: {"score gap": f"{figures['score_gap']:.1%}"} for task, figures in report["tasks"].items()}
    _print_taught(report, device, shown)
    _console().print(
        f"Time: {report['seconds_per_update']:.3g} s an update, {duration(report['seconds'])} for "
        f"{report['updates']} "
        "updates. This is the time of a walk, of single forwards and of a backward of student and fake on a micro-batch "
        "of each task, times their number. It leaves out the optimizers, encoding of prompts, evaluations and "
        "checkpoints."
    )


def _print_taught(report: Mapping[str, JSON], device: str, shown_figures: Mapping[str, Mapping[str, str]]) -> None:
    """Prints each task's figures beside its teachers, then memory and the scores of the images."""
    console = _console()
    tasks = Table(title="What the first update sees")
    names = list(dict.fromkeys(name for of_task in shown_figures.values() for name in of_task))
    for column in ("task", *names, "teacher", "gap to base", "rounding"):
        tasks.add_column(column, overflow="fold")
    for task, figures in report["tasks"].items():
        shown = [task, *shown_figures[task].values()]
        for teacher in figures["teachers"]:
            gap, rounding = f"{teacher['gap_to_base']:.1%}", f"{teacher['rounding']:.1e}"
            tasks.add_row(*shown, teacher["teacher"], gap, rounding)
            shown = [""] * len(shown)
    console.print(tasks)

    _print_memory(console, report["memory"], device)
    scored = {task: figures.get("rewards", {}) for task, figures in report["tasks"].items()}
    _print_scores(console, "One image of each model", "model", scored)


def print_rl_dry_run(report: Mapping[str, JSON], device: str) -> None:
    """
    Prints the report of [`~dry_run_rl.dry_run`].

    Args:
        report (`dict`): the report.
        device (`str`): kind of the device that it ran on.
    """
    console = _console()
    tasks = Table(title="What the first round gives")
    for column in ("task", "prompts", "images", "groups without signal", "reward", "mean", "spread"):
        tasks.add_column(column, overflow="fold")
    for task, figures in report["tasks"].items():
        counts = [str(figures[name]) for name in ("prompts", "completions")]
        shown = [task, *counts, f"{figures['frac_reward_zero_std']:.0%}"]
        for name, reward in figures["rewards"].items():
            cells = ["-" if math.isnan(reward[figure]) else f"{reward[figure]:.3g}" for figure in ("mean", "std")]
            tasks.add_row(*shown, name, *cells)
            shown = [""] * len(shown)
    console.print(tasks)

    seconds = Table(title="Seconds of the round")
    for column in ("", "seconds"):
        seconds.add_column(column, justify="right" if column else "left")
    seconds.add_row("drawing", f"{report['generation_time']:.3g}")
    for name, taken in report["reward_time"].items():
        seconds.add_row(f"{name}, meanwhile", f"{taken:.3g}")
    console.print(seconds)

    _print_memory(console, report["memory"], device)
    scored = {task: figures["images"] for task, figures in report["tasks"].items()}
    _print_scores(console, "Images of the first prompts", "image", scored)
    console.print(
        f"Network: an update takes {report['forwards_per_update']:,.0f} samples forward and "
        f"{report['backwards_per_update']:,} of them backward; {report['updates']} updates take "
        f"{report['forwards']:,} and {report['backwards']:,}. This is over "
        "all processes. With guidance the network computes each sample twice."
    )
    console.print(
        f"Time: {report['seconds_per_update']:.3g} s an update, {duration(report['seconds'])} for "
        f"{report['updates']} "
        "updates. This is the time of one round and of the loss on a micro-batch of each task. It leaves out the "
        "optimizer, evaluations and checkpoints."
    )


def _print_memory(console: Console, rows: Mapping[str, MemoryRow], device: str) -> None:
    memory = Table(title=f"Memory of one process ({device}), estimated, without sharding")
    for column in ("", "dtype", "GiB", "how"):
        memory.add_column(column, justify="right" if column == "GiB" else "left")
    for name, row in rows.items():
        memory.add_row(name, row["dtype"], f"{row['bytes'] / 2**30:.3f}", row["how"])
    console.print(memory)


def _print_scores(
    console: Console, title: str, column: str, scored: Mapping[str, Mapping[str, Mapping[str, float | None]]]
) -> None:
    """Prints `scored[task][caption][reward]`, one row for each score."""
    images = Table(title=title)
    for name in ("task", column, "reward", "score"):
        images.add_column(name, overflow="fold")
    for task, of_task in scored.items():
        for caption, scores in of_task.items():
            for name, value in scores.items():
                images.add_row(task, caption, name, reward_cell(value))
    if images.row_count:
        console.print(images)


class _Console(Console):
    """
    A console that replaces invisible characters: prompts and names may hold some that a terminal would act on. Rich
    passes every string through `render_str`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        text = visible(text, keep="\n\t") if len(text) <= _LONGEST_TEXT else shown(text, _LONGEST_TEXT)
        return super().render_str(text, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        with tqdm.external_write_mode():  # takes the bars off a terminal, and draws them again below the text
            super().print(*objects, **options)


def _console() -> Console:
    # No markup: brackets in prompts and names of tasks are plain text.
    return _Console(markup=False, highlight=False, emoji=False)
