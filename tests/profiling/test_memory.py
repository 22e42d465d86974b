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

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import grpo_fixtures, nft_fixtures
from helpers.edit_families import EDIT_FAMILIES, picture
from helpers.family_fixtures import family_trainer
from helpers.opd_fixtures import make_trainer, measured
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_pipeline, make_transformer
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from trl_diffusion_opd import estimate_memory
from trl_diffusion_opd.data.pictured_prompt import with_pictures
from trl_diffusion_opd.models.student import default_lora_config
from trl_diffusion_opd.profiling.memory import step_bytes
from trl_diffusion_opd.trainer.memory_estimate import activation_bytes, optimizer_bytes


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("full", [False, True])
def test_weights_are_counted(full, tmp_path, teachers):
    options = {"peft_config": None} if full else {}
    trainer = make_trainer(tmp_path, {"count": teachers["count"], "draw": teachers["count"]}, ema_decay=0.9, **options)
    memory = estimate_memory(trainer)
    pipeline = make_pipeline()

    def count(module, buffers=True):
        return sum(p.nbytes for p in [*module.parameters(), *(module.buffers() if buffers else ())])

    base = count(pipeline.transformer, buffers=False)
    buffers = count(pipeline.transformer) - base
    lora = sum(w.nbytes for w in load_file(Path(teachers["count"]) / "adapter_model.safetensors").values())
    trained = base if full else lora  # the student's LoRA has the teacher's rank
    expected = {
        "vae": count(pipeline.vae),
        "text_encoder": count(pipeline.text_encoder),
        "transformer": buffers if full else base + buffers,
        "student": trained,
        "teachers": None if full else lora,  # one, though it has two tasks
        "teachers and frozen base": base + lora if full else None,
        "moving average": trained,
        "gradients": trained,
    }
    for name, size in expected.items():
        assert (memory[name]["bytes"] if name in memory else None) == size, name
    assert memory["optimizer"]["bytes"] == pytest.approx(2 * trained, rel=1e-4)  # Adam's two moments
    parts = [row["bytes"] for name, row in memory.items() if name != "peak"]
    assert memory["peak"]["bytes"] == sum(parts) and memory["activations"]["bytes"] > 0


def test_activations_of_two_linear_layers():
    """Against counting on paper: n rows of a float32 MLP with two layers of width d and a ReLU."""

    class Network(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.first, self.second = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, hidden_states):
            return (self.second(self.first(hidden_states).relu()),)

    n, d = 64, 256
    network = Network(d)
    size = step_bytes(network, network, [{"hidden_states": torch.empty(n, d)}])
    # At its most: ReLU's output is kept and the first layer's is gone; in the backward the gradient of the weights of a
    # layer is made beside gradients of its input and output.
    kept, gradient = 4 * n * d, 4 * d * d
    assert kept + gradient <= size <= 4 * kept + gradient + 4096


def in_dtype(dtype):
    """The tiny pipeline with its base in `dtype`, wider than its latents, which the pipeline works on itself."""
    pipeline = make_pipeline()
    pipeline.transformer = make_transformer(attention_head_dim=32, caption_projection_dim=64)
    pipeline.transformer.to(getattr(torch, dtype))
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "scale"), [(1, 1.0), (4, 1.0), (4, 4.5)])
def test_activations_are_those_of_a_real_pass(batch, scale, checkpointing, dtype, tmp_path):
    options = {
        "per_device_train_batch_size": batch,
        "guidance_scale": scale,
        "height": 32,
        "width": 32,
    }
    trainer = make_trainer(tmp_path, "base", in_dtype(dtype), gradient_checkpointing=checkpointing, **options)
    estimate = activation_bytes(trainer, "cpu")
    assert not trainer.base_pipeline.transformer.is_gradient_checkpointing  # as it was
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    # The pipeline's own small tensors come on top.
    assert estimate == pytest.approx(measured(trainer, ["count0"] * batch), rel=0.05)


def edit_trainer(folder, name, *rows):
    """A trainer of two rows at a time, each a prompt with its pictures."""
    dataset = Dataset.from_list([{"prompt": prompt, "source_images": pictures} for prompt, pictures in rows])
    options = dict(train_dataset=dataset, per_device_train_batch_size=2)
    return family_trainer(EDIT_FAMILIES[name].family, folder, "base", **options)


# The pictures of a batch are asked together, and one by one.
@pytest.mark.parametrize("name", ["flux_kontext", "flux2_klein"])
def test_pictures_are_counted(name, tmp_path):
    words, one = "a red cat left of two dogs", picture(1)
    trainer = edit_trainer(tmp_path, name, (words, []), ("a dog", [one]), ("a cat", [picture(2, 64, 32)]))
    estimate = activation_bytes(trainer, "cpu")
    # The longest prompt with the largest picture, though it has none itself.
    assert estimate == pytest.approx(measured(trainer, [with_pictures(words, [one])] * 2), rel=0.05)
    assert estimate > 2 * activation_bytes(edit_trainer(tmp_path, name, (words, [])), "cpu")


def test_more_pictures_take_more(tmp_path):
    one, two = (edit_trainer(tmp_path, "flux2_klein", ("a", [picture(i) for i in range(n)])) for n in (1, 2))
    estimates = [estimate_memory(trainer)["activations"]["bytes"] for trainer in (one, two)]
    assert estimates[1] > 1.5 * estimates[0]


@pytest.mark.slow
def test_more_of_everything_takes_more(tmp_path, teachers):
    def activations(**options):
        return activation_bytes(make_trainer(tmp_path, teachers, **options))

    one = activations(per_device_train_batch_size=1)
    assert 3.5 * one < activations(per_device_train_batch_size=4) < 4.5 * one
    assert 1.5 * one < activations(per_device_train_batch_size=1, guidance_scale=4.5) < 2.5 * one
    # A teacher's guided rows don't count where the student's own pass takes more.
    assert activations(per_device_train_batch_size=1, teacher_guidance_scale=4.5) == pytest.approx(one, rel=0.3)


def test_float32_layer_norms_of_cuda_take_more(tmp_path):
    trainer = make_trainer(tmp_path, "base", in_dtype("bfloat16"), height=32, width=32, per_device_train_batch_size=4)
    cuda, cpu = (activation_bytes(trainer, device_type) for device_type in ("cuda", "cpu"))
    assert cuda > 1.05 * cpu


def on_meta(dtype):
    """A network of shapes alone, with a LoRA, and inputs of 8 rows."""
    with torch.device("meta"):
        base = make_transformer(num_layers=3).to(dtype).requires_grad_(False)
        model = get_peft_model(base, default_lora_config(base))
    inputs = {
        "hidden_states": torch.empty(8, 4, 32, 32, device="meta"),
        "encoder_hidden_states": torch.empty(8, 10, 16, device="meta"),
        "pooled_projections": torch.empty(8, 16, device="meta"),
        "timestep": torch.empty(8, device="meta"),
    }
    return model, base, inputs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_without_weights_in_memory(dtype):
    model, base, inputs = on_meta(dtype)
    precision = torch.bfloat16 if dtype == torch.bfloat16 else None
    plain = step_bytes(model, base, [inputs], precision=precision)
    base.enable_gradient_checkpointing()
    assert 0 < step_bytes(model, base, [inputs], precision=precision) < 0.7 * plain
    assert step_bytes(model, base, [inputs], precision=precision, backward=False) < 0.7 * plain


@pytest.mark.parametrize(("optim", "kept"), [("adamw_torch", 2), ("sgd", 0), ("adafactor", 0)])
def test_what_an_optimizer_keeps(optim, kept, tmp_path, teachers):
    state, temporary = optimizer_bytes(make_trainer(tmp_path, teachers, optim=optim))
    assert state == pytest.approx(kept, abs=0.01) and 0 <= temporary < 6


def test_what_an_optimizer_keeps_after_training(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, max_steps=1)
    before = optimizer_bytes(trainer)
    trainer.train()
    state, moment = trainer.optimizer.state_dict(), trainer.optimizer.state[trainer.student.parameters()[0]]["exp_avg"]
    kept = moment.clone()
    assert optimizer_bytes(trainer) == before
    assert torch.equal(moment, kept) and len(trainer.optimizer.state_dict()["state"]) == len(state["state"])


def test_shards(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers)
    whole, half = estimate_memory(trainer), estimate_memory(trainer, shards=2)
    for name in ("transformer", "student", "optimizer"):
        assert half[name]["bytes"] == whole[name]["bytes"] // 2
    assert half["gradients"]["bytes"] == whole["gradients"]["bytes"]
    transformer = trainer.base_pipeline.transformer
    blocks = [sum(p.nbytes for p in block.parameters()) for block in transformer.transformer_blocks]
    assert len(blocks) == 2  # both of which are whole at a time, as is what is outside
    outside = sum(p.nbytes for p in transformer.parameters()) - sum(blocks)
    assert half["gathered"]["bytes"] == sum(blocks) + outside
    assert half["teachers"] == whole["teachers"]


def test_offloaded_encoders_count_when_they_are_used(tmp_path, teachers):
    plain, offloaded = (estimate_memory(make_trainer(tmp_path, teachers, offload_encoders=on)) for on in (False, True))
    away = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    assert all("while it is used" in offloaded[name]["how"] for name in away)
    assert offloaded["peak"]["bytes"] == plain["peak"]["bytes"] - sum(plain[name]["bytes"] for name in away)


@pytest.mark.parametrize("source", ["pictures", "teachers"])
def test_pictures_are_trained_on_without_guidance(tmp_path, teachers, source):
    given = teachers if source == "teachers" else None
    plain, guided = (
        estimate_memory(sft_trainer(tmp_path / str(scale), given, guidance_scale=scale, teacher_guidance_scale=1.0))
        for scale in (1.0, 4.5)
    )
    assert guided["activations"] == plain["activations"] and plain["activations"]["bytes"] > 0


@pytest.mark.parametrize(("fixtures", "kept"), [(grpo_fixtures, []), (nft_fixtures, ["old policy"])])
def test_training_by_reward(fixtures, kept, tmp_path):
    memory = estimate_memory(fixtures.make_trainer(tmp_path))
    assert memory["activations"]["bytes"] > 0 and memory["peak"]["bytes"] > memory["activations"]["bytes"]
    assert [name for name in ("old policy", "teachers", "frozen base") if name in memory] == kept
    assert all(memory[name]["bytes"] == memory["student"]["bytes"] for name in kept)


def test_nothing_changes(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    state = torch.random.get_rng_state()
    estimate_memory(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trainer.model.named_parameters())
