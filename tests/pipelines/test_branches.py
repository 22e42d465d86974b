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

"""Both branches of guidance, from one guided step: against steps of their own."""

import pytest
import torch
from helpers.families import FAMILIES, Family, denoiser
from helpers.noise_families import NOISE_FAMILIES

from trl_diffusion_opd.pipelines.velocity import VelocityField


# In one batch; in two calls, embedded guidance beside; a scale that counts from 0; a list of rows; noise predicted.
CASES = {**{name: FAMILIES[name] for name in ("sd3", "flux", "wan", "z_image")}, "sdxl": NOISE_FAMILIES["sdxl"]}


@pytest.mark.parametrize("family", CASES.values(), ids=CASES)
def test_branches_are_those_of_steps_of_their_own(family: Family) -> None:
    pipeline, scale = family.build(), family.guidance_scale
    field = VelocityField(pipeline, num_inference_steps=4, **family.kwargs)
    prompts, t, rows = list(family.prompts), float(field.levels[1]), []
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    denoiser(pipeline).register_forward_hook(lambda _, inputs, output: rows.append(len(output[0])))
    with torch.no_grad():
        guided, conditional, direction = field.branches(x, t, prompts, scale)
        assert sum(rows) == 2 * len(prompts)  # those of guidance, and no more
        alone, twice = (field(x, t, prompts, of) for of in (1.0, 2.0))
        assert torch.equal(guided, field(x, t, prompts, scale))
    size = direction.norm()
    assert size > 1e-4 * guided.norm()
    assert (conditional - alone).norm() < 1e-3 * size and (direction - (twice - alone)).norm() < 1e-3 * size
    field.check_branches(scale)

    # The gradient of a sum of branches is that of the same sum of steps.
    weight = next(p for p in denoiser(pipeline).parameters() if p.ndim == 2).requires_grad_()
    (ours,) = torch.autograd.grad((field.branches(x, t, prompts, scale)[1:] * x).sum(), weight)
    alone, twice = (field(x, t, prompts, of) for of in (1.0, 2.0))
    (theirs,) = torch.autograd.grad((twice * x).sum(), weight)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_guidance_that_is_no_line_in_its_scale_is_refused() -> None:
    for name in ("lumina2", "qwen_image"):
        family = FAMILIES[name]
        field = VelocityField(family.build(), num_inference_steps=4, **family.kwargs)
        with pytest.raises(ValueError, match=r"does not compute guidance as v_u \+ scale \(v_c - v_u\)"):
            field.check_branches(family.guidance_scale)
