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

"""
Both branches of classifier-free guidance, with the prompt and without it, from one step of a pipeline.

A pipeline hands its scheduler the guided velocity only: `v(w) = v_u + w (v_c - v_u)` for the scale `w`. What it makes of
its network's outputs is therefore asked twice: the network runs once, and the same outputs are given again to a step
with another scale. Two points of a line are the line. This needs no more of a network, and no knowledge of how a
pipeline arranges its branches (in one batch, in two calls, in which order).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..acceleration.quantization import base_weight
from .calls import PipelineCalls
from .prediction import Prediction
from .view import PipelineView, StandIn, exchanged_forward


# How far the second scale is from the first. A large distance keeps rounding out of the difference.
_FAR = 64.0


class GuidanceBranches(PipelineCalls):
    """[`VelocityField`]'s methods for the branches of guidance. They use the attributes declared here."""

    levels: Tensor
    _prediction: Prediction

    def __call__(
        self,
        x: Tensor,
        t: float | Sequence[float],
        prompts: list[str],
        guidance_scale: float,
        transformer: Callable[..., tuple] | None = None,
        adapters: list[str] | None = None,
    ) -> Tensor:
        """The velocity. See [`VelocityField`]."""
        raise NotImplementedError

    def initial_latents(self, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """Noise to start from. See [`VelocityField`]."""
        raise NotImplementedError

    def _taken(self, view: PipelineView, x: Tensor, levels: float | Sequence[float]) -> Tensor:
        raise NotImplementedError

    def branches(
        self,
        x: Tensor,
        t: float,
        prompts: list[str],
        guidance_scale: float,
        transformer: Callable[..., tuple] | None = None,
        adapters: list[str] | None = None,
    ) -> Tensor:
        """
        Computes the velocity at `x` with guidance and its two branches, in the forwards of the guided velocity alone.
        [`check_branches`] says whether a pipeline has them.

        Args:
            x, t, prompts, guidance_scale, transformer, adapters:
                As for the velocity itself, with one level `t` for all samples and a scale above 1.

        Returns:
            `torch.Tensor` of shape `(3, B, ...)`: the guided velocity, to the bit; the velocity with the prompt,
                `v_c`; and the direction of guidance, `v_c - v_u`.
        """
        if self._is_apart(prompts):
            rows = (slice(i, i + 1) for i in range(len(prompts)))
            of_rows = [
                self.branches(
                    x[i], t, prompts[i], guidance_scale, transformer, None if adapters is None else adapters[i]
                )
                for i in rows
            ]
            return torch.cat(of_rows, dim=1)
        stand_in = StandIn(transformer or self._base, self._base, None, adapters)
        state = self._prediction.network_state(x, t)
        parts, outputs = [*stand_in.components(self._base_name).values()], list[object]()
        hooks = [part.register_forward_hook(lambda _part, _inputs, output: outputs.append(output)) for part in parts]
        guided = self._taken(self._step(state, t, prompts, guidance_scale, stand_in), x, t)
        for hook in hooks:
            hook.remove()
        again = iter(outputs)
        with ExitStack() as replaying:
            for part in parts:
                replaying.enter_context(exchanged_forward(part, lambda *_, **__: next(again)))
            view = self._step(state, t, prompts, guidance_scale + _FAR, stand_in)
        direction = (self._taken(view, x, t) - guided) / _FAR
        return torch.stack([guided, guided - (guidance_scale - 1) * direction, direction])

    @torch.no_grad()
    def check_branches(self, guidance_scale: float) -> None:
        """
        Tries [`branches`] at the first and at the last level: the velocity with the prompt must be that at scale 1.

        Raises:
            [`ValueError`]: if it is not, since the guided velocity is no line in the scale.
        """
        x = self.initial_latents([_TRIED], [torch.Generator().manual_seed(0)])
        rounding = 4 * torch.finfo(base_weight(self._base).dtype).eps
        for t in (float(self.levels[0]), float(self.levels[-2])):
            _, conditional, direction = self.branches(x, t, [_TRIED], guidance_scale)
            alone = self(x, t, [_TRIED], 1.0)
            limit = 0.05 * direction.norm() + rounding * guidance_scale * alone.norm()
            if not bool((conditional - alone).norm() <= limit):
                raise ValueError(
                    f"guidance_branch_weight: {type(self.pipeline).__name__} does not compute guidance as v_u + "
                    "scale (v_c - v_u), so its two branches can't be told (it may rescale the guided velocity, or "
                    "guide its low-noise expert at a scale of its own). Set guidance_branch_weight=0."
                )


# Not empty: guidance would have no direction.
_TRIED = "a red circle"
