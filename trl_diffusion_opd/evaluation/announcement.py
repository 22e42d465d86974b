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

"""Says what an evaluation will do before it does it, and how long that will take."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.readers import TEACHER_PROMPT
from ..guards.files import read_json
from ..hub.files import REPORT_FILE
from ..reporting.console import print_facts
from ..reporting.progress import duration
from ..reporting.report import Setting
from .fixed_states import NUM_SAMPLES
from .plan import Batch, Plan


def announce(
    plan: Plan,
    settings: Mapping[str, Setting],
    scales: Mapping[str, Setting],
    size: tuple[int, int],
    num_processes: int,
    output_dir: str | None,
) -> None:
    """
    Prints how many images are drawn, how, and how many of them are there already.

    Args:
        plan ([`Plan`])
        settings (`dict`): how all images are drawn, by name, and `scales` (`dict`): each model's guidance scale.
        size (`tuple[int, int]`): width and height of the images in pixels.
        num_processes (`int`): number of processes that share the work.
        output_dir (`str`, *optional*): where images, scores and the report are kept.
    """
    facts = [
        ("images", _how(settings, size)),
        ("guidance", _by_source([(f"{name} {_number(one)}", one["source"]) for name, one in scales.items()])),
    ]
    templates = settings["prompt_templates"]
    if templates["value"]:
        told = [(f"{task} '{text}'", templates["source"]) for task, text in templates["value"].items()]
        facts.append(("students read", _by_source(told)))
    if reading := [task for task, part in plan.tasks.items() if part.has_teacher_prompts]:
        facts.append(("teachers read", f"{TEACHER_PROMPT} in {', '.join(reading)}"))
    facts += [
        ("drawn once", f"{' = '.join(model.names)}: the same model") for model in plan.models if len(model.names) > 1
    ]
    facts += [
        ("repeated", f"task {task!r} has {_plural(len(part.prompts), 'prompt')} for its images: other noise each time")
        for task, part in plan.tasks.items()
        if part.num_images > len(part.prompts)
    ]
    there = plan.num_images - plan.num_drawn
    if there:
        rest = f"{plan.num_drawn:,} are drawn now" if plan.num_drawn else "nothing is drawn"
        scored = f", and {plan.num_rescored:,} of them are scored anew" if plan.num_rescored else ""
        facts.append(("reused", f"{_plural(there, 'image')} of an earlier run{scored}; {rest}"))
    facts.append(
        ("fixed states", f"KL of base and students from each teacher, on {_plural(NUM_SAMPLES, 'sample')} a task")
    )
    if num_processes > 1:
        facts.append(("processes", f"{num_processes}, which share the work"))
    facts.append(("output", "nothing is kept on disk (no output_dir)" if output_dir is None else output_dir))
    print_facts(_counted(plan), facts)


def replaced(folder: Path, plan: Plan) -> str | None:
    """Says that the evaluation takes the place of a report of more images, if there is one in its folder."""
    earlier = read_json(folder / REPORT_FILE)
    now = min(part.num_images for part in plan.tasks.values())
    if earlier is None or earlier["num_images"] <= now:
        return None
    return (
        f"The report in {folder} is of {_plural(earlier['num_images'], 'image')} a task. This one, of {now:,}, takes its "
        "place. Name another --output_dir to keep it."
    )


def _how(settings: Mapping[str, Setting], size: tuple[int, int]) -> str:
    sources = dict.fromkeys(settings[side]["source"] for side in ("height", "width"))
    steps, length = settings["num_inference_steps"], settings["max_sequence_length"]
    text = "text as long as the pipeline takes" if length["value"] is None else f"text up to {length['value']} tokens"
    parts = [
        (f"{size[0]} x {size[1]} px", " and ".join(sources)),
        (f"{steps['value']} steps of the deterministic sampler", steps["source"]),
        (text, length["source"]),
    ]
    options = settings["generation_kwargs"]
    if options["value"] is not None:
        parts.append((f"generation_kwargs {options['value']}", options["source"]))
    return _by_source(parts)


def _counted(plan: Plan) -> str:
    names = [name for model in plan.models for name in model.names]
    teachers = sum(name.startswith("teacher/") for name in names)
    students = len(names) - teachers - 1
    roles = f"base, {_plural(teachers, 'teacher')}, {_plural(students, 'student')}"
    models = f"{_plural(len(plan.models), 'model')} ({roles})"
    counts = {task: part.num_images for task, part in plan.tasks.items()}
    if len(set(counts.values())) == 1:
        each = f"{_plural(len(counts), 'task')} x {_plural(next(iter(counts.values())), 'image')}"
    else:
        each = f"{_plural(sum(counts.values()), 'image')} ({', '.join(f'{n:,} {task}' for task, n in counts.items())})"
    return f"Evaluation: {models} x {each} = {plan.num_images:,}"


def _by_source(parts: Sequence[tuple[str, str]]) -> str:
    """Lists texts, each given with its source, those of one source together."""
    grouped: dict[str, list[str]] = {}
    for text, source in parts:
        grouped.setdefault(source, []).append(text)
    return "; ".join(f"{', '.join(texts)} ({source})" for source, texts in grouped.items())


def _number(setting: Setting) -> str:
    values = setting["value"] if isinstance(setting["value"], list) else [setting["value"]]
    return " and ".join(f"{value:g}" for value in values)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_batch(batches: Sequence[Batch], seconds: float) -> str:
    """
    Says how long drawing will take, from the time of the first batch.

    Args:
        batches (`list[Batch]`): those of this process. The first one is drawn.
        seconds (`float`): the time that it took.
    """
    first, *others = [batch for batch in batches if batch.is_drawn]
    took = f"The first batch of {_plural(len(first.numbers), 'image')} took {seconds:.1f} s"
    if not others:
        return f"{took}; it is the only one."
    left = seconds * sum(batch.forwards for batch in others) / first.forwards
    verb = "batch is" if len(others) == 1 else "batches are"
    return f"{took}; {len(others):,} {verb} left, about {duration(left)}."


def timed(plan: Plan, num_processes: int, seconds: float | None) -> str:
    """
    The last line of a dry run: how long all would take.

    Args:
        plan ([`Plan`]), num_processes (`int`): as in [`announce`].
        seconds (`float`, *optional*): the time that the first batch took; `None` if there is nothing to draw.
    """
    if seconds is None:
        return "Dry run: nothing has to be drawn. Nothing was written."
    batches = [batch for batch in plan.of_process(0, num_processes) if batch.is_drawn]
    whole = seconds * sum(batch.forwards for batch in batches) / batches[0].forwards
    return (
        f"Dry run: {_plural(len(batches[0].numbers), 'image')} took {seconds:.1f} s, so drawing would take about "
        f"{duration(whole)}. Rewards score meanwhile; slow ones take longer. Nothing was written."
    )
