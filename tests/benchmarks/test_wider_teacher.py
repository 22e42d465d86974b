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

"""The wider teacher of the tiny world: it starts as the base, and the page has the figures of the JSON."""

import json
import sys
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from trl_diffusion_opd import tiny


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from wider_teacher import widened  # noqa: E402


@torch.no_grad()
def test_it_computes_what_the_base_does():
    base = SD3Transformer2DModel.from_pretrained(tiny.BASE, subfolder="transformer").eval()
    torch.manual_seed(0)
    wide = widened(base)
    inputs = dict(
        hidden_states=torch.randn(2, 8, 8, 8),
        timestep=torch.tensor([300.0, 900.0]),
        encoder_hidden_states=torch.randn(2, 24, 128),
        pooled_projections=torch.randn(2, 128),
        return_dict=False,
    )
    torch.testing.assert_close(wide(**inputs)[0], base(**inputs)[0], rtol=0, atol=1e-4)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (wide, base)]
    assert wide.config.num_layers == base.config.num_layers + 1 and sizes[0] > 4 * sizes[1]


def test_the_page_has_its_figures():
    found = json.loads((ROOT / "docs" / "source" / "results" / "wider_teacher.json").read_text())
    numbers = [f"{found[key]:.3f}" for key in ("base", "teacher", "student", "retention")]
    low, high = found["ci95"]
    row = f"| letters | {' | '.join(numbers)} | {low:.3f} to {high:.3f} |"
    assert row in (ROOT / "docs" / "source" / "tiny_world.md").read_text()
    assert found["retention"] >= 0.9
