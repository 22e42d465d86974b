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

"""Draws images/weights.png: how much of the loss each step holds on the noise grid of Stable Diffusion 3.

python docs/source/make_weights_plot.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.axes import Axes

from trl_diffusion_opd.algorithms.opd import step_weights, trained_steps
from trl_diffusion_opd.algorithms.samplers import default_skip_last_steps, sampler_table


# Colours that people with colour-blindness can tell apart (Okabe and Ito); markers say the same once more.
# sampler, weighting, label, format, colour
Line = tuple[str, str, str, str, str]
SAMPLER_LINES: list[Line] = [
    ("ode", "kl", '"ode"', "o-", "#0072B2"),
    ("dpm2m", "kl", '"dpm2m"', "s-", "#D55E00"),
    ("flow_sde", "kl", '"flow_sde"', "^-", "#009E73"),
    ("dance_sde", "kl", '"dance_sde"', "D-", "#CC79A7"),
    ("cps", "kl", '"cps"', "v-", "#E69F00"),
    ("ddim", "kl", '"ddim"', "x-", "#555555"),
]
WEIGHTING_LINES: list[Line] = [
    ("ode", "kl", '"kl", sampler "ode"', "o-", "#0072B2"),
    ("flow_sde", "kl", '"kl", sampler "flow_sde"', "^-", "#009E73"),
    ("flow_sde", "released", '"released", sampler "flow_sde"', "^--", "#009E73"),
    ("ode", "velocity", '"velocity"', "P-", "#000000"),
    ("ode", "x0", '"x0"', "*-", "#56B4E9"),
]


def draw(axes: Axes, levels: list[float], lines: list[Line], title: str) -> None:
    for sampler, weighting, label, line_format, colour in lines:
        weights = step_weights(sampler_table(sampler, levels), levels, weighting)
        steps = trained_steps(weights, default_skip_last_steps(sampler))
        shares = 100 * weights[: len(steps)] / weights[: len(steps)].sum()
        axes.plot(steps, shares.tolist(), line_format, color=colour, markersize=6, linewidth=1.5, label=label)
    axes.set_title(title, fontsize=11)
    axes.set_xticks(range(len(levels) - 1), [f"{j}\n{level:.2f}" for j, level in enumerate(levels[:-1])], fontsize=8)
    axes.set_xlabel("step, and noise level at which it starts")
    axes.set_ylim(0, 80)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def main() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas.tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    draw(left, levels, SAMPLER_LINES, 'Samplers, with the weighting "kl"')
    draw(right, levels, WEIGHTING_LINES, "Weightings")
    left.set_ylabel("share of the weights (%)")
    path = Path(__file__).parent / "images" / "weights.png"
    figure.savefig(path, dpi=130)
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
