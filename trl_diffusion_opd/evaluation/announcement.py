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

from ..reporting.console import duration
from ..reporting.report import Setting
from .plan import Batch, Model, Plan


def announcement(
    plan: Plan,
    settings: Mapping[str, Setting],
    scales: Mapping[str, Setting],
    size: tuple[int, int],
    num_processes: int,
    output_dir: str | None,
) -> str:
    """
    Says how many images are drawn, how, and how many of them are there already.

    Args:
        plan ([`Plan`])
        settings (`dict`): how all images are drawn, by name, and `scales` (`dict`): each model's guidance scale.
        size (`tuple[int, int]`): width and height of the images in pixels.
        num_processes (`int`): number of processes that share the work.
        output_dir (`str`, *optional*): where images, scores and the report are kept.
    """
    steps, text = settings["num_inference_steps"], settings["max_sequence_length"]
    length = "text as long as the pipeline takes" if text["value"] is None else f"text up to {text['value']} tokens"
    how = f"{size[0]} x {size[1]} px, {steps['value']} steps of the deterministic sampler, {length}"
    named = {
        f"{name}={settings[name]['value']}": settings[name]["source"]
        for name in ("num_inference_steps", "height", "width", "max_sequence_length", "generation_kwargs")
        if settings[name]["value"] is not None
    }
    lines = [
        _counted(plan),
        f"  images: {how}",
        f"  settings: {_by_source(named)}",
        f"  guidance: {_by_source({f'{name} {_number(one)}': one['source'] for name, one in scales.items()})}",
    ]
    lines += [f"  {model.names[0]} is also {', '.join(model.names[1:])}: drawn once" for model in _shared(plan)]
    lines += [
        f"  task {task!r}: its {len(part.prompts)} prompts are repeated with other noise, for {part.num_images} images"
        for task, part in plan.tasks.items()
        if part.num_images > len(part.prompts)
    ]
    there = plan.num_images - plan.num_drawn
    if there:
        scored = f", {plan.num_rescored:,} of them lack a score" if plan.num_rescored else ""
        lines.append(f"  {there:,} of the images are there from an earlier run and are reused{scored}")
    if num_processes > 1:
        lines.append(f"  {num_processes} processes share the work")
    lines.append("  nothing is kept on disk (no output_dir)" if output_dir is None else f"  output: {output_dir}")
    return "\n".join(lines)


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


def _shared(plan: Plan) -> list[Model]:
    return [model for model in plan.models if len(model.names) > 1]


def _by_source(sources: Mapping[str, str]) -> str:
    """Lists texts, those of one source together."""
    grouped: dict[str, list[str]] = {}
    for text, source in sources.items():
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
        plan ([`Plan`]), num_processes (`int`): as in [`announcement`].
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
