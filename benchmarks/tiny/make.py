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

"""Trains the tiny world's base from scratch: `python benchmarks/tiny/make.py --output_dir weights`.

It runs the stages `vae`, `base` and `check` in this order, or those that `--stages` names. A stage reads the results
of earlier stages from the output folder.

The teachers are trained from the packaged base by reinforcement learning, in the first three stages of
`accelerate launch examples/two_stage_tiny.py` with the settings in `examples/stages/tiny_two_stage.yaml`. A teacher
consists of `adapter_config.json` and `adapter_model.safetensors` in its stage's folder. The stage `check` measures the
teachers in `teachers/<task>` of the output folder. For the packaged ones use
`--output_dir trl_diffusion_opd/tiny/weights`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import make_training
import modules
import numpy as np
import torch
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from make_data import base_pictures, styled_pictures
from measure import task_scores
from peft import PeftModel
from PIL import Image

from trl_diffusion_opd.tiny import TASKS
from trl_diffusion_opd.tiny.prompts import specs, to_scene
from trl_diffusion_opd.tiny.scenes import draw
from trl_diffusion_opd.tiny.verifiers import rewards


STAGES = ("vae", "base", "check")
VAE_STEPS = 1200


def _latents(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    return (make_training.encode(vae, images) - vae.config["shift_factor"]) * vae.config["scaling_factor"]


def make_vae(folder: Path) -> None:
    torch.manual_seed(0)
    vae = modules.vae()
    # The base is mostly styled slightly. Fully styled pictures, as the style teacher draws them, are added.
    images = [base_pictures(6000, seed=1).images, styled_pictures(1000, seed=2).images]
    make_training.train_vae(vae, np.concatenate(images), VAE_STEPS)
    vae.save_pretrained(folder / "vae")


def round_trip(vae: AutoencoderKL, task: str, seed: int = 5) -> float:
    """The mean verdict on correct images of the held-out prompts after the VAE has encoded and decoded them."""
    chosen = [spec for spec in specs("test") if spec["task"] == task]
    rng = np.random.default_rng(seed)
    images = np.stack([np.asarray(draw(to_scene(spec, rng), rng)) for spec in chosen])
    with torch.no_grad():
        decoded = vae.decode(make_training.encode(vae, images)).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    columns = {"spec": [json.dumps(spec) for spec in chosen]}
    verdicts = rewards[task](images=[Image.fromarray(image) for image in pixels], **columns)
    return float(np.mean([v for v in verdicts if v is not None]))


def forget_paths(folder: Path) -> None:
    """Removes from all configs the local path from which their models were loaded."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def make_base(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    torch.manual_seed(0)
    pipeline = modules.pipeline(vae)

    def on_progress(step: int) -> None:
        pipeline.save_pretrained(folder / "base")
        print(f"base at {step}: {task_scores(pipeline, 'validation', num_images=192)}", flush=True)

    # Letters and style are learned in the first phase. Compose takes longer and gets most of the second phase.
    pictures = base_pictures(24000, seed=3, wrong_compose=0.45)
    latents = _latents(vae, pictures.images)
    make_training.train_base(pipeline, pictures.prompts, latents, 4500, stop_at=3000, on_progress=on_progress)
    pictures = base_pictures(24000, seed=4, shares=(0.66, 0.17, 0.17))
    latents = _latents(vae, pictures.images)
    make_training.train_base(pipeline, pictures.prompts, latents, 2400, seed=1, on_progress=on_progress)
    pipeline.save_pretrained(folder / "base")
    forget_paths(folder / "base")
    shutil.rmtree(folder / "vae")


def check(folder: Path, num_images: int = 512) -> dict[str, dict[str, float]]:
    """Measures the base and the folder's teachers on held-out prompts. Prints the mean verdicts and returns them as
    {"base" or a teacher: {task: mean}}."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "base")
    for task in TASKS:
        print(f"{task}: ground truths through the VAE score {round_trip(pipeline.vae, task):.3f}")
    matrix = {"base": task_scores(pipeline, num_images=num_images)}
    for task in TASKS:
        teacher = folder / "teachers" / task
        if not teacher.exists():
            print(f"{task}: no teacher in {teacher}. examples/two_stage_tiny.py makes it.")
            continue
        model = PeftModel.from_pretrained(pipeline.transformer, teacher)
        matrix[task] = task_scores(pipeline, num_images=num_images)
        model.unload()
    print("| | " + " | ".join(TASKS) + " |\n" + "|---" * (len(TASKS) + 1) + "|")
    for name, row in matrix.items():
        print(f"| {name} | " + " | ".join(f"{row[task]:.3f}" for task in TASKS) + " |", flush=True)
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder in which base/ is written")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--num_images", type=int, default=512, help="images drawn for each task in the stage check")
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    for stage in [name for name in STAGES if name in arguments.stages]:
        start = time.perf_counter()
        if stage == "vae":
            make_vae(folder)
        elif stage == "base":
            make_base(folder)
        else:
            check(folder, arguments.num_images)
        print(f"stage {stage}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
