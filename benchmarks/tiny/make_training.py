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

"""Trains the two parts of the tiny world's base: the VAE, and the transformer together with the text encoders."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from modules import MAX_TOKENS

from trl_diffusion_opd.tiny.scenes import SIZE


EMPTY_CAPTIONS = 0.1  # share of empty captions, which classifier-free guidance needs


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Converts uint8 (N, 32, 32, 3) to float (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Progress:
    """Prints the mean loss of every `every` steps."""

    def __init__(self, name: str, steps: int, every: int = 100) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.losses: list[float] = []
        self.start = time.perf_counter()

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            mean = sum(self.losses) / len(self.losses)
            self.losses.clear()
            print(
                f"{self.name} {step + 1}/{self.steps} loss {mean:.5f} {time.perf_counter() - self.start:.0f} s",
                flush=True,
            )


def optimizer_of(
    parameters: Iterable[torch.nn.Parameter], rate: float, steps: int, weight_decay: float = 0.0
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))


def train_vae(vae: AutoencoderKL, images: np.ndarray, steps: int, batch_size: int = 32, seed: int = 0) -> None:
    """Trains a VAE in place. Then sets its config's shift and scale so that latents have mean 0 and deviation 1."""
    data, generator = to_tensor(images), torch.Generator().manual_seed(seed)
    optimizer, schedule = optimizer_of(vae.parameters(), 2e-3, steps)
    progress = Progress("vae", steps)
    vae.train()
    for step in range(steps):
        batch = data[torch.randint(len(data), (batch_size,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / (SIZE * SIZE)
        loss = F.mse_loss(output, batch) + 0.2 * F.l1_loss(output, batch) + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, F.mse_loss(output.detach(), batch).item())
    vae.eval()
    latents = encode(vae, images[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """The posterior's mean as latents (N, 8, 8, 8), before shift and scale."""
    data = to_tensor(images)
    return torch.cat([vae.encode(part).latent_dist.mean for part in data.split(256)])


def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's prompt embeddings (N, 24, 128) and pooled embeddings (N, 128). They have gradients."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=prompts,
        prompt_3=prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=MAX_TOKENS,
    )
    return embeds, pooled


def noise_levels(number: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draws noise levels in (0, 1), shifted like the scheduler's grid. Half are logit-normal and half uniform, since
    the first step of a walk, at level 1, needs training too."""
    level = torch.sigmoid(torch.randn(number, generator=generator))
    uniform = torch.rand(number, generator=generator)
    level = torch.where(torch.rand(number, generator=generator) < 0.5, level, uniform)
    return shift * level / (1 + (shift - 1) * level)


def _flow_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    embeds: torch.Tensor,
    pooled: torch.Tensor,
    shift: float,
    generator: torch.Generator,
) -> torch.Tensor:
    noise = torch.randn(latents.shape, generator=generator)
    level = noise_levels(len(latents), shift, generator)
    weight = level[:, None, None, None]
    velocity = transformer(
        hidden_states=(1 - weight) * latents + weight * noise,
        timestep=1000 * level,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents)


def train_base(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    latents: torch.Tensor,
    steps: int,
    batch_size: int = 48,
    seed: int = 0,
    stop_at: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    rate: float = 1e-3,
) -> None:
    """Trains transformer and text encoders together by flow matching, in place. At the end they have averaged weights.

    Args:
        latents (`torch.Tensor` of shape `(N, 8, 8, 8)`): the latents of each prompt's picture, shifted and scaled.
        stop_at (`int`, *optional*): stop after this number of steps, before the end of the schedule of `steps`.
        on_progress (`Callable`, *optional*): called every 1000 steps, while the weights are the averaged ones.
        rate (`float`, *optional*): learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    # The third encoder has one embedding table under two names.
    parameters = list({id(parameter): parameter for parameter in parameters}.values())
    optimizer, schedule = optimizer_of(parameters, rate, steps, weight_decay=1e-3)
    average = EMAModel(parameters, decay=0.998, use_ema_warmup=True, power=0.75)
    progress, shift = Progress("base", steps), pipeline.scheduler.config.shift
    for step in range(stop_at or steps):
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        empty = torch.rand(batch_size, generator=generator) < EMPTY_CAPTIONS
        batch = ["" if gone else prompts[i] for i, gone in zip(index.tolist(), empty.tolist(), strict=True)]
        embeds, pooled = encode_prompts(pipeline, batch)
        loss = _flow_loss(pipeline.transformer, latents[index], embeds, pooled, shift, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        progress(step, loss.item())
        if on_progress is not None and (step + 1) % 1000 == 0:
            average.store(parameters)
            average.copy_to(parameters)
            on_progress(step + 1)
            average.restore(parameters)
    average.copy_to(parameters)
