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

"""Every file that a run writes has the mode that the umask leaves, safetensors' own among them."""

import os
from pathlib import Path

import pytest
from helpers.nft_fixtures import make_trainer as nft_trainer
from helpers.opd_fixtures import make_dataset, make_teachers
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_pipeline
from peft import LoraConfig

from trl_diffusion_opd.models.student import Student


@pytest.fixture
def mask():
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def modes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_of_a_checkpoint_and_a_student(mask, tmp_path):
    options = dict(eval_dataset=make_dataset(count=1, draw=1), log_completions=True, num_completions_to_print=1)
    trainer = nft_trainer(tmp_path, save_strategy="steps", save_steps=1, report_to="tensorboard", **options)
    trainer.train()
    trainer.save_model()
    found = modes(tmp_path)
    for name in ("student_raw", "old_policy", "adapter_model", "pytorch_lora_weights"):
        assert f"checkpoint-1/{name}.safetensors" in found
    assert {"adapter_model.safetensors", "README.md", "completions/step_000000.png"} <= found.keys()
    assert set(found.values()) == {0o666 & ~mask}, found


def test_of_whole_weights_and_of_a_cache(mask, tmp_path):
    pipeline = make_pipeline()
    Student(pipeline.transformer, pipeline).save(tmp_path / "full")
    assert modes(tmp_path / "full") == dict.fromkeys(
        ("config.json", "diffusion_pytorch_model.safetensors"), 438 & ~mask
    )
    teachers = make_teachers(tmp_path / "teachers")
    lora = LoraConfig(r=2, target_modules=["to_q"])
    trainer = sft_trainer(
        tmp_path / "out",
        teachers,
        teacher_cache_dir=str(tmp_path / "images"),
        num_images_per_prompt=1,
        peft_config=lora,
    )
    trainer.train()
    found = modes(tmp_path / "images")
    assert len(found) > 2 and set(found.values()) == {0o666 & ~mask}
