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
A teacher of another size in the tiny world: `python benchmarks/wider_teacher.py --output_dir outputs/wider_teacher`.

Stage `teacher` makes it: a pipeline of twice the base's width and one block more. It starts as the base itself, widened
without a change of its function, and is trained as the base was (`benchmarks/tiny`), on rightly spelled pictures of the
`letters` prompts for training. Its text encoders are trained with it, so they are its own too. Stage `student` teaches
the packaged base by it. Stage `report` measures on held-out prompts what the student kept, and writes `result.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers.models import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, tiny
from trl_diffusion_opd.evaluation import evaluate_retention


sys.path.insert(0, str(Path(__file__).resolve().parent / "tiny"))
import make_training  # noqa: E402
from make_data import letters_pictures  # noqa: E402


STAGES = ("teacher", "student", "report")
TASK = "letters"
LAYERS = 5


def widened(old: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """
    A transformer of twice the width and with one block more that computes the same.

    Every channel is there twice. A layer's weights for the two copies of an input sum to the old weight, and are split
    at random, so that training makes the copies differ. The new block's gates are zero, so it adds nothing at first.
    """
    width = old.config.num_attention_heads * old.config.attention_head_dim
    config = {**old.config, "num_attention_heads": 2 * old.config.num_attention_heads, "num_layers": LAYERS}
    new = SD3Transformer2DModel.from_config({**config, "caption_projection_dim": 2 * width})
    last = old.config.num_layers - 1
    state = new.state_dict()
    for name in state:
        source = name.replace(f"transformer_blocks.{LAYERS - 1}.", f"transformer_blocks.{last}.")
        if source == name and name.startswith(f"transformer_blocks.{last}."):  # the new block
            if ".norm1" in name:
                state[name] = torch.zeros_like(state[name])
        else:
            # The modulations' layers make several outputs (shifts, scales and gates), each of the old width.
            outputs = state[name].shape[0] // (2 * width) if "norm" in name and ".linear." in name else 1
            state[name] = _doubled(old.state_dict()[source], state[name].shape, outputs)
    new.load_state_dict(state)
    return new.eval()


def _doubled(weight: Tensor, shape: torch.Size, outputs: int) -> Tensor:
    """Repeats the channels of a weight, bias or table where the new shape asks for it, those of each output apart."""
    if weight.ndim == 3:  # the table of positions
        return torch.cat([weight, weight], dim=2)
    if weight.ndim > 1 and shape[1] == 2 * weight.shape[1]:
        share = 0.25 + 0.5 * torch.rand(weight.shape)
        weight = torch.cat([share * weight, (1 - share) * weight], dim=1)
    if shape[0] == 2 * weight.shape[0]:
        weight = torch.cat([half for part in weight.chunk(outputs) for half in (part, part)])
    return weight


def make_teacher(folder: Path, steps: int, batch_size: int) -> None:
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny.BASE)
    pipeline.register_modules(transformer=widened(pipeline.transformer))
    pictures, vae = letters_pictures(100 * steps, seed=5), pipeline.vae
    latents = (make_training.encode(vae, pictures.images) - vae.config.shift_factor) * vae.config.scaling_factor
    make_training.train_base(pipeline, pictures.prompts, latents, steps, batch_size, seed=2, rate=5e-4)
    pipeline.save_pretrained(folder)


def make_student(folder: Path, teacher: Path, steps: int) -> None:
    args = DiffusionOPDConfig(
        str(folder),
        height=32,
        width=32,
        max_sequence_length=12,
        guidance_scale=1.0,
        num_inference_steps=5,
        num_trained_timesteps=1,
        loss_weighting="velocity",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
    )
    prompts = tiny.dataset("train").filter(lambda row: row["task"] == TASK)
    lora = LoraConfig(
        r=64,
        lora_alpha=128,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    )
    trainer = DiffusionOPDTrainer(tiny.BASE, {TASK: str(teacher)}, args=args, train_dataset=prompts, peft_config=lora)
    trainer.train()
    trainer.save_model(str(folder))


def report(folder: Path, num_images: int, notes: dict[str, object]) -> None:
    prompts = tiny.dataset("test").filter(lambda row: row["task"] == TASK)
    found = evaluate_retention(
        tiny.BASE,
        {TASK: str(folder / "teacher")},
        str(folder / "student"),
        {TASK: tiny.rewards[TASK]},
        prompts,
        num_images=num_images,
        num_inference_steps=10,
        batch_size=64,
        output_dir=folder / "report",
        keep_images=False,
    )
    assert found is not None
    content = {"task": TASK, **found["tasks"][TASK], **notes}
    (folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--teacher_steps", type=int, default=160)
    parser.add_argument("--teacher_batch_size", type=int, default=32)
    parser.add_argument("--student_steps", type=int, default=120)
    parser.add_argument("--num_images", type=int, default=512)
    args = parser.parse_args()
    folder: Path = args.output_dir
    times = folder / "seconds.json"
    seconds = json.loads(times.read_text()) if times.exists() else {}
    for stage in [name for name in STAGES if name in args.stages]:
        start = time.perf_counter()
        if stage == "teacher":
            make_teacher(folder / "teacher", args.teacher_steps, args.teacher_batch_size)
        elif stage == "student":
            make_student(folder / "student", folder / "teacher", args.student_steps)
        else:
            notes = {"teacher_steps": args.teacher_steps, "teacher_batch_size": args.teacher_batch_size}
            report(folder, args.num_images, {**notes, "student_steps": args.student_steps, "seconds": seconds})
        seconds[stage] = round(time.perf_counter() - start)
        times.write_text(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
