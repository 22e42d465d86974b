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

"""Makes a tiny trainer of distribution matching in one call, and computes its losses by another way in float64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.opd_fixtures import TINY_SETTINGS, TRAINER_ARGUMENTS, make_dataset, student_lora
from helpers.tiny_sd3 import make_pipeline
from peft import PeftModel
from torch import Tensor, nn

from trl_diffusion_opd import DiffusionDMDConfig, DiffusionDMDTrainer
from trl_diffusion_opd.algorithms.rollout import FAKE_DRAW, RENOISE_DRAW


SEED, STEPS = 42, 4
Weights = dict[str, Tensor]


def dmd_config(output_dir: str | Path, **options: Any) -> DiffusionDMDConfig:
    return DiffusionDMDConfig(str(output_dir), **{**TINY_SETTINGS, "fake_updates": 2, **options})


def make_trainer(output_dir: str | Path, teachers: Any = "base", **options: Any) -> DiffusionDMDTrainer:
    """A trainer of the tiny pipeline. `options` are arguments of the trainer or fields of its config."""
    arguments = {"train_dataset": make_dataset(), "peft_config": student_lora()}
    arguments |= {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    pipeline = options.pop("pipeline", None) or make_pipeline()
    return DiffusionDMDTrainer(pipeline, teachers, args=dmd_config(output_dir, **options), **arguments)


def move_fake(trainer: DiffusionDMDTrainer) -> None:
    """Makes the fake another model than the student, which it starts as."""
    generator = torch.Generator().manual_seed(7)
    for parameter in trainer.fake.named_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def fake_weights(trainer: DiffusionDMDTrainer) -> Weights:
    return {name: p.detach().clone() for name, p in trainer.fake.named_parameters().items()}


def state_of(trainer: DiffusionDMDTrainer) -> Weights:
    """Weights of student and fake, and both optimizers, by name."""
    tensors = {f"weight {name}": p.detach().clone() for name, p in trainer.student.named_parameters().items()}
    tensors |= {f"fake {name}": p for name, p in fake_weights(trainer).items()}
    for kind, optimizer in (("student", trainer.optimizer), ("fake", trainer.fake.optimizer)):
        for i, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind} {i} {name}": torch.as_tensor(value) for name, value in entries.items()}
    return tensors


class FromTheFormulas:
    """
    The losses of an update with one micro-batch of two samples a task, sample by sample and in float64, by the
    transformer's own forward. Teachers are LoRA folders, or a `(folder, scale)` with guidance.
    """

    def __init__(self, trainer: DiffusionDMDTrainer, student: Weights, fake: Weights, teachers: dict[str, Any]):
        self.args, self.tasks = trainer.args, trainer.tasks
        self.pipeline = make_pipeline()
        self.student, self.fake = self._network(trainer, student), self._network(trainer, fake)
        self.teachers = {task: self._teacher(spec) for task, spec in teachers.items()}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(STEPS)
        self.levels = scheduler.sigmas.double().numpy()
        scheduler.set_timesteps(1000)
        self.fine = scheduler.sigmas.double().numpy()

    def _network(self, trainer: DiffusionDMDTrainer, weights: Weights) -> nn.Module:
        model = copy.deepcopy(trainer.student.model).double()
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
            parameter.grad = None
            parameter.requires_grad_(name in weights)
        return model

    def _teacher(self, spec: Any) -> tuple[nn.Module, float]:
        folder, scale = spec if isinstance(spec, tuple) else (spec, 1.0)
        transformer = make_pipeline().transformer
        return PeftModel.from_pretrained(transformer, folder).merge_and_unload().double(), scale

    def velocity(self, network: nn.Module, x: Tensor, t: float, prompt: str, scale: float = 1.0) -> Tensor:
        def branch(text: str) -> Tensor:
            embeds, _, pooled, _ = self.pipeline.encode_prompt(text, None, None, max_sequence_length=16)
            return network(
                hidden_states=x,
                timestep=torch.tensor([1000 * t], dtype=torch.float64),
                encoder_hidden_states=embeds.double(),
                pooled_projections=pooled.double(),
                return_dict=False,
            )[0]

        v = branch(prompt)
        return v if scale == 1 else branch("") + scale * (v - branch(""))

    def _generator(self, *words: int) -> torch.Generator:
        seed = np.random.SeedSequence([SEED, 0, *words]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    def _noised(self, generator: torch.Generator, x0: Tensor, eps: Tensor, i: int) -> tuple[Tensor, float, Tensor]:
        """A drawn level, the image there, and its noise."""
        q = float(torch.rand(1, generator=generator, dtype=torch.float64))
        z = torch.randn(x0.shape, generator=generator).double()
        rising = self.fine[::-1]
        low, high = 0.02, 0.98
        if self.args.loss_type == "tdm":
            mid, top = (np.interp(self.levels[j], rising, np.linspace(0, 1, len(rising))) for j in (i + 1, i))
            low, high = max(low, mid), min(high, top)
        t = float(np.interp(high - (high - low) * q, np.linspace(0, 1, len(rising)), rising))
        if self.args.loss_type == "dmd2":
            return (1 - t) * x0 + t * z, t, z
        t_mid = self.levels[i + 1]
        r = (1 - t) / (1 - t_mid)
        mixed = (r * t_mid * eps + np.sqrt(t**2 - (r * t_mid) ** 2) * z) / t
        return (1 - t) * x0 + t * mixed, t, z

    def losses(self, rows: dict[str, list[dict[str, Any]]]) -> tuple[Tensor, Tensor]:
        """The student's loss with gradient, and the fake's in its first update."""
        of_student, of_fake = [], []
        for k, task in enumerate(self.tasks):
            for position, row in enumerate(rows[task]):
                prompt, student = row["prompt"], self.student
                judged = self._generator(k, RENOISE_DRAW, position)
                i = int(torch.randint(STEPS, (1,), generator=judged))
                x = torch.randn(1, 4, 8, 8, generator=self._generator(k, position)).double()
                with torch.no_grad():
                    for j in range(i):
                        step = self.levels[j + 1] - self.levels[j]
                        x = x + step * self.velocity(student, x, self.levels[j], prompt, self.args.guidance_scale)
                v = self.velocity(student, x, self.levels[i], prompt, self.args.guidance_scale)
                x0, eps = x - self.levels[i] * v, x + (1 - self.levels[i]) * v
                with torch.no_grad():
                    x_t, t, _ = self._noised(judged, x0, eps, i)
                    teacher, scale = self.teachers[task]
                    x_r = x_t - t * self.velocity(teacher, x_t, t, prompt, scale)
                    x_f = x_t - t * self.velocity(self.fake, x_t, t, prompt)
                    w = (x0 - x_r).abs().mean()
                if self.args.loss_type == "dmd2":
                    of_student.append(0.5 * (x0 - (x0 - (x_f - x_r) / w).detach()).square().mean())
                else:
                    e = x0 - (x0 + x_r - x_f).detach()
                    of_student.append(((e**2 + 1e-6).sqrt() - 1e-3).mean() / w)
                x_t, t, z = self._noised(self._generator(k, FAKE_DRAW, position), x0.detach(), eps.detach(), i)
                v = self.velocity(self.fake, x_t, t, prompt)
                if self.args.loss_type == "dmd2":
                    of_fake.append((v - (z - x0.detach())).square().mean())
                else:
                    snr = ((1 - t) / t) ** 2
                    of_fake.append(min(snr, 5.0) * (x_t - t * v - x0.detach()).square().mean())
        return torch.stack(of_student).mean(), torch.stack(of_fake).mean()
