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

"""Fixed states against a walk written out, in float64."""

import pytest
import torch

from trl_diffusion_opd.algorithms.fixed_states import FixedStates
from trl_diffusion_opd.algorithms.opd import StepPlan
from trl_diffusion_opd.algorithms.samplers import sampler_table


@pytest.mark.parametrize("end", [0.0, 0.03])  # some grids end above 0
@pytest.mark.parametrize("sampler", ["ode", "flow_sde"])
def test_states_are_the_teachers_and_never_the_students(sampler, end):
    levels = torch.tensor([1.0, 0.8, 0.5, end], dtype=torch.float64)
    table = sampler_table(sampler, levels, None)
    plan = StepPlan.of(table, "velocity", 1)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = []

    def teacher(x, t):
        calls.append(t)
        return (1 + t) * x.tanh()

    def generators():
        return [torch.Generator().manual_seed(10 + i) for i in range(3)]

    states = FixedStates.of(teacher, x, generators(), plan)
    assert calls == [1.0, 0.8, 0.5, 1.0, 0.8]

    # The walk by hand, Euler and without noise whatever the sampler, and the loss of a model that is off by .1 x.
    eps = torch.stack([torch.randn(2, 4, 4, generator=generator) for generator in generators()]).double()
    own, image = [], x
    for t, t_next in zip(levels.tolist(), levels.tolist()[1:], strict=False):
        own.append(image)
        v = (1 + t) * image.tanh()
        image, predicted = image + (t_next - t) * v, image - t * v
    weights = table.c[:2] ** 2 / (2 * table.s[:2] ** 2) if sampler == "flow_sde" else table.c[:2] ** 2 / 2
    noised = [(1 - t) * predicted + t * eps for t in (1.0, 0.8)]
    expected = [
        sum(float(w) * 0.01 * float(s.square().mean()) / 2 for w, s in zip(weights, kind, strict=True))
        for kind in (own[:2], noised)
    ]
    asked = []

    def student(x, t):
        asked.append(x)
        return (1 + t) * x.tanh() + 0.1 * x

    assert states.kl(student).tolist() == pytest.approx(expected, rel=1e-6)
    assert states.kl(teacher).tolist() == [0.0, 0.0]
    first = list(asked)
    states.kl(lambda x, t: student(x, t) - 7)  # another student is asked at the same states
    assert all(torch.equal(a, b) for a, b in zip(first, asked[2:], strict=True)) and len(asked) == 4
