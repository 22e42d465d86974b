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

"""What is tried with a tiny pipeline: its velocity, its whole walk, and one update of a student that diffusers then loads."""

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from helpers.families import Family, save_teacher
from helpers.family_fixtures import family_trainer
from helpers.pipeline_recorder import recorder
from peft import PeftModel
from torch import Tensor

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.pipelines.denoiser import denoiser, loads_lora
from trl_diffusion_opd.pipelines.velocity import VelocityField


STEPS = 4  # DDIM's own walk skips between its timesteps if their number does not divide 1000
VELOCITY, IMAGE = 1e-5, 1e-5  # the largest differences with which a pipeline counts as one that works
WALK = 1e-4


@dataclass
class Trial:
    """
    What a pipeline showed.

    Attributes:
        outcome (`str`): `"works"`, `"velocity only"`, `"refused"`, `"fails"` or `"not built"`.
        velocity (`float`, *optional*): largest difference from what the pipeline hands to its scheduler, over the
            largest of its values, with and without guidance, at all steps.
        walk (`float`, *optional*): largest difference from the pipeline's own image after an ODE walk.
        image (`float`, *optional*): largest difference between the image of a trained student and the one that a
            fresh pipeline draws which has loaded it.
        moved (`float`, *optional*): how far the student's image is from the base's.
        reason (`str`): why it is refused, or in what it fails.
    """

    outcome: str = "works"
    velocity: float | None = None
    walk: float | None = None
    image: float | None = None
    moved: float | None = None
    reason: str = ""

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


class RefusedError(ValueError):
    """A pipeline was refused, by this package or by its own check of its arguments, before its first step."""


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def own_images(
    family: Family,
    pipeline: Callable[..., Any],
    scale: float,
    prompts: tuple[str, ...] | None = None,
    output_type: str = "np",
) -> Any:
    """What a pipeline's own call returns."""
    prompts = family.prompts if prompts is None else prompts
    return pipeline(
        **family.call_kwargs(scale, prompts),
        num_inference_steps=STEPS,
        generator=generators(len(prompts)),
        output_type=output_type,
        return_dict=False,
    )[0]


def velocity_and_walk(family: Family, trial: Trial) -> None:
    """Compares the field with the pipeline's own loop, step by step, and its walk with the pipeline's image."""
    pipeline = family.build()
    try:
        field = VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs)
        field(field.initial_latents([""], generators(1)), float(field.levels[0]), [""], 1.0)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    prompts, gaps = list(family.prompts), []
    scales = (1.0,) if family.guidance_scale == 1.0 else (1.0, family.guidance_scale)
    for scale in scales:
        field.check_guidance(scale)
        own = with_recorder(family, field, scale)
        # One prompt at a time: encoders round a batch differently.
        own_images(family, own, scale, family.prompts[-1:], output_type="latent")
        for step in own.scheduler.trace:
            level, x, v = in_flow_coordinates(own.scheduler, step)
            ours = field(x, level, prompts[-1:], scale)
            gaps.append((ours - v).abs().max() / v.abs().max())
    trial.velocity = float(torch.stack(gaps).max())  # not a number if one of them is none
    table = sampler_table("ode", field.levels)
    x = field.initial_latents(prompts, generators(len(prompts)))
    with torch.no_grad():
        x = walk(lambda j, x, _: field(x, field.levels[j].item(), prompts, scales[-1]), x, table)
    own = with_recorder(family, field, scales[-1])
    trial.walk = difference(
        field.decode(field.clean(x), prompts, output_type="np"), own_images(family, own, scales[-1])
    )


def with_recorder(family: Family, field: VelocityField, scale: float) -> DiffusionPipeline:
    """A pipeline whose scheduler records its steps. In place of a flow-matching solver it takes Euler's."""
    pipeline = family.guided(scale)
    if "alphas_cumprod" in vars(pipeline.scheduler) and not flow_matching(pipeline.scheduler):
        pipeline.scheduler = noise_recorder(pipeline.scheduler)
        return pipeline
    pipeline.scheduler = recorder(pipeline.scheduler)
    if pipeline.scheduler.solver_levels is not None:
        pipeline.scheduler.solver_levels = field.levels.float()
    return pipeline


def flow_matching(scheduler: SchedulerMixin) -> bool:
    return bool(scheduler.config.get("use_flow_sigmas"))


def noise_recorder(scheduler: SchedulerMixin) -> Any:
    """A scheduler of the same class that keeps the timestep, the state and the network's output of every step."""
    kind = type(scheduler)

    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        self.trace.append((int(timestep), sample.clone(), model_output.clone()))
        return kind.step(self, model_output, timestep, sample, *args, **options)

    recording = type(kind.__name__, (kind,), {"step": wraps(kind.step)(step)}).from_config(scheduler.config)
    recording.trace = []
    return recording


def in_flow_coordinates(scheduler: Any, step: tuple[Any, Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
    """
    Level, state and velocity `eps - x0` of a recorded step. Of noise models they follow from the definitions:
    `x = alpha x0 + sigma eps`, `v = alpha eps - sigma x0`.
    """
    level, x, output = step
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return (1 - level, x, -output) if scheduler.config.invert_sigmas else step
    square = scheduler.alphas_cumprod[level].double()
    alpha, sigma, x, output = square.sqrt(), (1 - square).sqrt(), x.double(), output.double()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        x0, eps = (x - sigma * output) / alpha, output
    else:
        x0, eps = alpha * x - sigma * output, sigma * x + alpha * output
    return float(sigma / (alpha + sigma)), (x / (alpha + sigma)).float(), eps - x0


def difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.abs(a.reshape(b.shape) - b).max())


def update(family: Family, trial: Trial) -> None:
    """One update with a random LoRA as the teacher; then diffusers loads the student."""
    scale = family.guidance_scale
    update_drawing(family, trial, lambda pipeline: own_images(family, pipeline, scale), len(family.prompts))


def update_drawing(
    family: Family, trial: Trial, drawn: Callable[[DiffusionPipeline], Any], rows: int, **options: Any
) -> None:
    """An update of so many rows, judged by what is `drawn` with a pipeline. `options` are of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_teacher(family, root / "teacher", seed=1)
        trainer = family_trainer(
            family,
            root / "student",
            str(root / "teacher"),
            family.guided(family.guidance_scale),
            num_inference_steps=STEPS,
            per_device_train_batch_size=rows,
            learning_rate=1e-1,
            **options,
        )
        trainer.train()
        trainer.save_model(root / "saved")
        ours = drawn(trainer.pipeline)
        fresh = family.guided(family.guidance_scale)
        base = drawn(fresh)
        if loads_lora(fresh):
            fresh.load_lora_weights(str(root / "saved"))
        else:
            PeftModel.from_pretrained(denoiser(fresh), str(root / "saved"))
            trial.reason = "diffusers has no loader of LoRAs for it: PEFT loads the student"
        trial.image = difference(drawn(fresh), ours)
        trial.moved = difference(base, ours)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines of libraries: a sweep has hundreds of them, and none belongs to its result."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(level)


def verdict(trial: Trial) -> None:
    """Says whether the differences are small enough."""
    bounds = {"velocity": VELOCITY, "walk": WALK, "image": IMAGE}
    measured = {name: getattr(trial, name) for name in bounds}
    beyond = [
        f"{name} {value:.1e}" for name, value in measured.items() if value is not None and not value <= bounds[name]
    ]
    if trial.moved is not None and trial.moved < 10 * IMAGE:
        beyond.append(f"the update moves the image by no more than {trial.moved:.1e}")
    if beyond:
        trial.outcome, trial.reason = "fails", "differs from the pipeline's own: " + ", ".join(beyond)
