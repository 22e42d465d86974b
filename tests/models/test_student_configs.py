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

"""What a student's LoRA may be: whatever its config says is in the saved file, and base and teachers stay where they are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.opd_fixtures import make_trainer, snapshot, student_lora
from helpers.tiny_sd3 import forward, make_pipeline
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import EvaConfig
from torch import nn

from trl_diffusion_opd.models.lora_config import config_problems, layer_problems


pytestmark = pytest.mark.slow


BLOCK = "transformer_blocks.1.attn.to_q"

SURVIVING: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"attn.to_k": 6, f"^{BLOCK}": 2}, "alpha_pattern": {BLOCK: 5, "attn.to_k": 3}},
    "a regular expression": {"target_modules": r".*transformer_blocks\.\d+\.attn\.to_(q|k)", "lora_alpha": 2.5},
    "all linear layers": {"target_modules": "all-linear"},
    "excluded layers": {"exclude_modules": ["transformer_blocks.0.attn.to_q"]},
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
    "a convolution": {"target_modules": ["pos_embed.proj", "ff.net.0.proj", "proj_out"]},
    # The trainer sets these itself.
    "others": {"lora_dropout": 0.5, "inference_mode": True, "task_type": "CAUSAL_LM", "fan_in_fan_out": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("label", SURVIVING)
def test_what_survives(tmp_path: Path, teachers: dict[str, str], label: str) -> None:
    config = student_lora(**SURVIVING[label])
    trainer = make_trainer(tmp_path, teachers, peft_config=config, learning_rate=1e-2, max_steps=2)
    before = snapshot(trainer)
    trainer.train()
    trainer.save_model()
    assert all(not torch.equal(weight, before[name]) for name, weight in snapshot(trainer).items())
    mine = forward(trainer.student.model)
    base, teacher = make_pipeline(), make_pipeline()
    teacher.transformer = PeftModel.from_pretrained(teacher.transformer, teachers["count"]).eval()
    # What is trained leaves the base and the teachers to the bit what they were.
    with trainer.bank.use(None) as network:
        assert torch.equal(forward(network), forward(base.transformer))
    with trainer.bank.use(trainer.bank.teachers["count"][0]) as network:
        torch.testing.assert_close(forward(network), forward(teacher.transformer), rtol=0, atol=1e-5)
    assert (mine - forward(base.transformer)).abs().max() > 1e-3
    # And its files say the same in diffusers and in PEFT.
    peft = PeftModel.from_pretrained(make_pipeline().transformer, str(tmp_path)).eval()
    base.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(forward(base.transformer.eval()), mine, rtol=0, atol=1e-5)
    torch.testing.assert_close(forward(peft), mine, rtol=0, atol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["proj_out"]},
    "bias='all'": {"bias": "all"},
    "bias='lora_only'": {"bias": "lora_only"},
    "use_dora=True": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [0, 1]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "target_parameters": {"target_parameters": ["attn.to_q.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "eva_config": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='OLoRA'": {"init_lora_weights": "OLoRA"},
    "init_lora_weights='mica'": {"init_lora_weights": "mica"},
    "init_lora_weights='lora_ga'": {"init_lora_weights": "lora_ga"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_does_not_is_refused_before_it_touches_the_base(tmp_path: Path, named: str) -> None:
    pipeline = make_pipeline()
    weights = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["to_q"], **REFUSED[named])
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, {"count": "base", "draw": "base"}, pipeline, peft_config=config)
    assert f"- peft_config: {named}" in str(error.value)
    after = pipeline.transformer.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in after)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_whose_order_counts(tmp_path: Path, field: str) -> None:
    # In a file "attn.to_q" comes first, and would count for this block too.
    config = student_lora(**{field: {BLOCK: 2, "attn.to_q": 6}})
    pipeline = make_pipeline()
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, {"count": "base", "draw": "base"}, pipeline, peft_config=config)
    assert f"{field} has two patterns for {BLOCK}, '{BLOCK}' and 'attn.to_q'. The first one counts" in str(error.value)
    # What was put on the layers to see this is gone again.
    assert "peft_config" not in vars(pipeline.transformer)
    assert torch.equal(forward(pipeline.transformer), forward(make_pipeline().transformer))
    same = student_lora(**{field: {BLOCK: 6, "attn.to_q": 6}})
    make_trainer(tmp_path, {"count": "base", "draw": "base"}, pipeline, peft_config=same)


def test_all_of_it_in_one_message() -> None:
    problems = config_problems(LoraConfig(bias="all", use_dora=True, modules_to_save=["a"], init_lora_weights="olora"))
    assert [problem.split("=")[0] for problem in problems] == [
        "peft_config: bias",
        "peft_config: modules_to_save",
        "peft_config: use_dora",
        "peft_config: init_lora_weights",
    ]


def test_other_methods_are_refused_by_name() -> None:
    # It is a LoraConfig to Python.
    [problem] = config_problems(AdaLoraConfig(total_step=10))
    assert problem == "peft_config is a AdaLoraConfig; the student can be a LoRA or full weights."


def test_a_field_that_nobody_has_heard_of_is_refused() -> None:
    @dataclass
    class NewerConfig(LoraConfig):
        use_magic: bool = field(default=False)

    assert config_problems(NewerConfig()) == []
    [problem] = config_problems(NewerConfig(use_magic=True))
    assert problem.startswith("peft_config: use_magic=True goes beyond lora_A and lora_B")


def test_layers_whose_lora_is_not_saved_as_two_matrices() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedder, self.linear = nn.Embedding(4, 8), nn.Linear(8, 8)

    def adapted(*targets: str) -> PeftModel:
        return get_peft_model(Network(), LoraConfig(r=2, target_modules=list(targets)), adapter_name="default")

    assert layer_problems(adapted("linear")) == []
    [problem] = layer_problems(adapted("linear", "embedder"))
    assert "base_model.model.embedder.lora_embedding_A.default" in problem
    assert "Name only layers in target_modules" in problem
