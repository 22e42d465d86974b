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

"""A trainer that does not start gives the caller's pipeline back as it was, whatever was raised and wherever."""

import pytest
import torch
from helpers.opd_fixtures import make_config, make_dataset
from helpers.teachers_helpers import PEFT_FILE, edit_json, rewrite
from helpers.tiny_sd3 import ATTENTION, forward, make_lora, make_pipeline
from peft import LoraConfig
from torch import nn
from transformers import Trainer

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.teachers import TeacherBank
from trl_diffusion_opd.trainer.diffusion_opd_trainer import tables


def state_of(pipeline):
    """Everything of a pipeline that a trainer could leave changed."""
    state = {}
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules():
                own = {key for key in vars(module) if not key.startswith(("_parameters", "_modules", "_buffers"))}
                state[name, path] = (type(module), module.training, own - {"_compiled_call_impl", "forward"})
                state[name, path, "forward"] = module.forward.__func__
                state[name, path, "compiled"] = module._compiled_call_impl
                state[name, path, "hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
            for path, parameter in component.named_parameters():
                state[name, path, "weight"] = (parameter.requires_grad, parameter.device, parameter.sum().item())
    return state


def used_pipeline():
    """One whose encoders have run: transformers then leaves hooks on them, whoever uses them."""
    pipeline = make_pipeline()
    pipeline.encode_prompt("a", "a", "a")
    return pipeline


class Broken(Exception):
    """What nobody expects."""


def breaks(*args, **kwargs):
    raise Broken


def interrupts(*args, **kwargs):
    raise KeyboardInterrupt


# What fails, and what is raised.
FAILURES = {
    "a teacher's reading": (TeacherBank, "_load", breaks, Broken),
    "the checks, interrupted": (DiffusionOPDTrainer, "prepare_method", interrupts, KeyboardInterrupt),
    "Trainer": (Trainer, "__init__", breaks, Broken),
    "placing the teachers": (Backbone, "to", breaks, Broken),
    "the table at the start": (tables, "print_teachers", breaks, Broken),
    "nothing but the arguments": (None, None, None, ValueError),
}


@pytest.mark.parametrize("label", FAILURES)
def test_gives_the_pipeline_back(label, tmp_path, monkeypatch):
    place, name, does, raised = FAILURES[label]
    make_lora(make_pipeline(), tmp_path / "teacher", seed=1)
    pipeline = used_pipeline()
    pipeline.transformer.train()
    pipeline.transformer.proj_out.weight.requires_grad_(False)
    before, output = state_of(pipeline), forward(pipeline.transformer)
    if place is not None:
        monkeypatch.setattr(place, name, does)
    options = {"task_weights": {"unknown": 1.0}} if place is None else {}
    args = make_config(
        tmp_path / "out", offload_encoders=True, torch_compile=True,
        torch_compile_backend="eager", **options
    )  # fmt: skip
    with pytest.raises(raised):
        DiffusionOPDTrainer(
            model=pipeline, teachers=str(tmp_path / "teacher"), args=args, train_dataset=make_dataset(red=2)
        )
    assert state_of(pipeline) == before
    assert torch.equal(forward(pipeline.transformer), output)
    assert not [key for key in vars(pipeline.transformer) if "peft" in key]


def test_gives_the_full_weights_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "__init__", breaks)
    pipeline = used_pipeline()
    before = state_of(pipeline)
    args = make_config(tmp_path, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(Broken):
        DiffusionOPDTrainer(
            model=pipeline, teachers="base", args=args, train_dataset=make_dataset(red=2), peft_config=None
        )
    assert state_of(pipeline) == before


def test_a_student_that_fails_halfway_leaves_no_layers(tmp_path):
    pipeline = used_pipeline()
    before = state_of(pipeline)
    config = LoraConfig(
        target_modules=["attn.to_q", "attn.to_v"], rank_pattern={"transformer_blocks.1.attn.to_q": "8"}
    )
    with pytest.raises(TypeError):
        DiffusionOPDTrainer(
            model=pipeline, teachers="base", args=make_config(tmp_path), train_dataset=make_dataset(red=2), peft_config=config
        )  # fmt: skip
    assert state_of(pipeline) == before


@pytest.mark.parametrize("teachers", [True, False])
def test_a_teachers_config_that_fails_halfway_is_a_teachers_error(teachers, tmp_path):
    """As a teacher, and as what the student starts from."""
    make_lora(make_pipeline(), tmp_path / "odd", seed=1)
    # PEFT has changed the layers before it when it comes to one that it can't adapt.
    layer = "transformer_blocks.1.norm1"
    pair = {
        f"base_model.model.{layer}.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (4, 16)), ("B", (16, 4)))
    }
    edit_json(tmp_path / "odd" / "adapter_config.json", target_modules=[*ATTENTION, layer])
    rewrite(tmp_path / "odd" / PEFT_FILE, lambda tensors: tensors | pair)
    pipeline = used_pipeline()
    before = state_of(pipeline)
    folder = str(tmp_path / "odd")
    args = make_config(tmp_path / "out", student_init=None if teachers else folder)
    with pytest.raises(
        ValueError, match=r"cannot start:\n(.*\n)*.*odd: made for another base: Target module AdaLayerNormZero"
    ):
        DiffusionOPDTrainer(
            model=pipeline, teachers=folder if teachers else "base", args=args, train_dataset=make_dataset(red=2)
        )
    assert state_of(pipeline) == before
    make_lora(make_pipeline(), tmp_path / "good", seed=1)
    DiffusionOPDTrainer(
        model=pipeline, teachers=str(tmp_path / "good"), args=make_config(tmp_path / "out"), train_dataset=make_dataset(red=2)
    )  # fmt: skip
