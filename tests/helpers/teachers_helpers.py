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

"""Shared code for the tests of teachers."""

import json

import torch
from helpers.tiny_sd3 import forward, make_transformer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.teachers import TeacherBank, normalize_teachers


PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def make_student(pipeline, **config):
    options = {"r": 3, "target_modules": ["attn.to_q", "attn.to_v"], "init_lora_weights": False, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        return get_peft_model(pipeline.transformer, LoraConfig(**options)).eval()


def make_bank(pipeline, teachers, network=None, student_adapter="default", **options):
    tasks = [*teachers] if isinstance(teachers, dict) else ["task"]
    backbone = Backbone(make_student(pipeline) if network is None else network, student_adapter)
    return TeacherBank(backbone, pipeline, normalize_teachers(teachers, tasks), 4.5, **options)


def velocity(bank, teacher):
    with bank.use(teacher) as module:
        return forward(module)


def rewrite(path, change, metadata=None):
    """Rewrites a safetensors file with `change(tensors) -> tensors`."""
    tensors = change(load_file(path))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def save_full(pipeline, folder, seed):
    model = make_transformer(seed=seed)
    model.save_pretrained(folder)
    return model
