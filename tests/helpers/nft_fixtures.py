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

"""Makes a tiny NFT trainer in one call, and computes its update as the paper writes it, with the transformer's own
forward."""

import copy
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.grpo_fixtures import brightness
from helpers.noise_grids import sd3_levels
from helpers.opd_fixtures import TINY_SETTINGS, TRAINER_ARGUMENTS, make_dataset, student_lora
from helpers.three_pass import ThreePass
from helpers.tiny_sd3 import make_pipeline
from torch import Tensor, nn

from trl_diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer, sampler_table


class Judge:
    """
    A reward that does not look at the images, so that rounding of pixels is no difference, and remembers its calls. It
    depends on the prompt and on how many images of it came before.
    """

    __name__ = "judge"

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.calls: list[tuple[str, list[str], list[float]]] = []

    def __call__(self, prompts, images, task, **_) -> list[float]:
        rewards = []
        for prompt in prompts:
            seed = [*prompt.encode(), self.seen[prompt] + 1]
            rewards.append(float(np.random.default_rng(seed).standard_normal()))
            self.seen[prompt] += 1
        self.calls.append((task[0], prompts, rewards))
        return rewards


def make_trainer(output_dir: str | Path, pipeline: Any = None, **options: Any) -> DiffusionNFTTrainer:
    """
    A trainer of the tiny pipeline with groups of 2. `options` are arguments of the trainer or fields of its config.
    """
    arguments = {"train_dataset": make_dataset(), "peft_config": student_lora(), "reward_funcs": brightness}
    arguments |= {name: options.pop(name) for name in TRAINER_ARGUMENTS if name in options}
    settings = {**TINY_SETTINGS, "sampler": "ode", "num_generations": 2}
    args = DiffusionNFTConfig(str(output_dir), **{**settings, **options})
    return DiffusionNFTTrainer(pipeline or make_pipeline(), args=args, **arguments)


@torch.no_grad()
def move_old_policy(trainer: DiffusionNFTTrainer) -> None:
    """Moves it away from the student, so that the two cannot be mistaken for each other."""
    generator = torch.Generator().manual_seed(11)
    for parameter in trainer.old_policy.named_parameters().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def copy_of_old_policy(trainer: DiffusionNFTTrainer) -> nn.Module:
    """The student's network with the old policy's weights in the student's place."""
    model = copy.deepcopy(trainer.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in trainer.old_policy.named_parameters().items():
            parameters[name].copy_(weight)
    return model.requires_grad_(False)


class PaperUpdate:
    """
    The gradient of one update, written from Algorithm 1.

    Args:
        trainer: whose settings are read; its student is differentiated.
        old, base: networks of the old policy and the base.
        calls: what the judge was asked, one micro-batch after another.
    """

    def __init__(self, trainer: DiffusionNFTTrainer, old: nn.Module, base: nn.Module, calls: list[Any]):
        self.args, self.student, self.old, self.base = trainer.args, trainer.model, old, base
        self.prompts, self.rewards = defaultdict(list), defaultdict(list)
        for task, prompts, rewards in calls:
            self.prompts[task] += prompts
            self.rewards[task] += rewards
        table = sampler_table(self.args.sampler, sd3_levels(self.args.num_inference_steps), self.args.noise_level)
        columns = (table.a, table.c, table.b, table.s)
        self.walker = ThreePass(
            pipeline=make_pipeline(),
            coefficients=list(zip(*(column.tolist() for column in columns), strict=True)),
            levels=table.levels[:-1].tolist(),
            weights=[],
            teachers={},
            seed=self.args.seed,
            guidance_scale=self.args.guidance_scale,
        )

    def noise(self, *entropy: int) -> Tensor:
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    def velocity(self, model: nn.Module, x: Tensor, t: float, prompt: str) -> Tensor:
        return self.walker.velocity(model, x[None].float(), t, [prompt], self.args.guidance_scale)[0].double()

    @torch.no_grad()
    def image(self, k: int, position: int, prompt: str) -> Tensor:
        generator = self.noise(self.args.seed, 0, k, position)
        x, previous = torch.randn(4, 8, 8, generator=generator).double(), None
        for t, (a, c, b, s) in zip(self.walker.levels, self.walker.coefficients, strict=True):
            v = self.velocity(self.old, x, t, prompt)
            x0 = x - t * v
            x = a * x + c * v + (b * previous if b else 0)
            x = x + (s * torch.randn(4, 8, 8, generator=generator) if s else 0)
            previous = x0
        return x

    def levels(self) -> list[float]:
        """The levels that an update trains, drawn as the trainer says it draws them."""
        args, grid = self.args, self.walker.levels
        generator = np.random.default_rng(np.random.SeedSequence([args.seed, 0, 2**32 - 2]))
        k = args.num_trained_timesteps or len(grid)
        if args.timestep_sampling == "uniform":
            return [(k - j - u) / k for j, u in enumerate(generator.random(k))]
        return [grid[j] for j in sorted(generator.choice(len(grid), size=k, replace=False))]

    def optimality(self, task: str) -> Tensor:
        rewards = torch.tensor(self.rewards[task], dtype=torch.float64)
        groups = rewards.view(-1, self.args.num_generations)
        z = self.args.advantage_clip * (rewards.std() + 1e-4)
        return 0.5 + 0.5 * ((groups - groups.mean(1, keepdim=True)) / z).clamp(-1, 1).flatten()

    def gradients(self) -> dict[str, Tensor]:
        args, levels = self.args, self.levels()
        beta, loss = args.nft_beta, torch.zeros((), dtype=torch.float64)
        tasks = sorted(self.prompts)
        weights = {task: (args.task_weights or {}).get(task, 1.0) for task in tasks}
        for k, task in enumerate(tasks):
            share = weights[task] / sum(weights.values()) / len(self.prompts[task]) / len(levels)
            for i, (prompt, r) in enumerate(zip(self.prompts[task], self.optimality(task), strict=True)):
                x0 = self.image(k, i, prompt)
                generator = self.noise(args.seed, 0, k, 2**32 - 1, i)
                for t in levels:
                    eps = torch.randn(4, 8, 8, generator=generator).double()
                    x_t = (1 - t) * x0 + t * eps
                    v = self.velocity(self.student, x_t, t, prompt)
                    with torch.no_grad():
                        old = self.velocity(self.old, x_t, t, prompt)
                        base = self.velocity(self.base, x_t, t, prompt)
                    for weight, policy in ((r, (1 - beta) * old + beta * v), (1 - r, (1 + beta) * old - beta * v)):
                        if args.loss_weighting == "adaptive":
                            error = x_t - t * policy - x0
                            term = error.square().mean() / error.detach().abs().mean()
                        else:
                            term = (policy - (eps - x0)).square().mean()
                        loss = loss + share * args.advantage_clip / beta * weight * term
                    loss = loss + share * args.beta * (v - base).square().mean()
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
