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

"""What a pipeline carries beside its weights: what would be silently wrong is refused with what undoes it, the rest changes nothing."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from datasets import Dataset
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_processor import JointAttnProcessor2_0
from helpers.families import FAMILIES
from helpers.opd_fixtures import make_dataset, make_teachers, make_trainer, relative_difference, snapshot, train_losses
from helpers.tiny_sd3 import ATTENTION, make_pipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from trl_diffusion_opd import evaluate_retention, merge_teachers
from trl_diffusion_opd.pipelines.base_state import denoiser_problems, placement_problems


pytestmark = pytest.mark.slow


FLOAT8 = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
ON_CPU = dict(onload_device=torch.device("cpu"), offload_type="leaf_level")


def networks(pipeline: Any) -> list[nn.Module]:
    return [component for component in pipeline.components.values() if isinstance(component, nn.Module)]


# What is refused


def fuse(pipeline: Any) -> None:
    pipeline.transformer.fuse_qkv_projections()


def fuse_and_unfuse(pipeline: Any) -> None:
    fuse(pipeline)
    pipeline.transformer.unfuse_qkv_projections()


def wrap(pipeline: Any) -> None:
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


def wrap_for_data(pipeline: Any) -> None:
    pipeline.transformer = nn.DataParallel(pipeline.transformer)


def replace_forward(pipeline: Any) -> None:
    # As recipes that skip steps do.
    network = pipeline.transformer
    network.forward = types.MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), network
    )


def replace_processors(pipeline: Any) -> None:
    class Own(JointAttnProcessor2_0):
        pass

    pipeline.transformer.set_attn_processor(Own())


def give_processors_weights(pipeline: Any) -> None:
    # As an IP-adapter does.
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k_ip = nn.Linear(2, 2)

    for block in pipeline.transformer.transformer_blocks:
        del block.attn.processor
        block.attn.processor = Weighted()


def leave_a_block_out(pipeline: Any) -> None:
    pipeline.transformer.transformer_blocks = pipeline.transformer.transformer_blocks[:1]


def leave_weights_unloaded(pipeline: Any) -> None:
    pipeline.text_encoder.text_projection.to("meta")


def wrap_for_adapters(pipeline: Any) -> None:
    pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(r=2, target_modules=["to_q"]))


def adapt_an_encoder(pipeline: Any) -> None:
    # What the encoder's own add_adapter does, for which transformers 5.24 wants a PEFT that is not released.
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder)


LOAD_AGAIN = "Load the pipeline again without it."
REFUSED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "fused": (fuse, "The transformer's projections are fused (fuse_qkv_projections)", LOAD_AGAIN),
    # In this class the fused layers stay, and would be trained with full weights.
    "unfused": (fuse_and_unfuse, "Unfusing leaves the fused layers in a SD3Transformer2DModel", LOAD_AGAIN),
    "compiled": (wrap, "wrapped by torch.compile", "pipe.transformer = pipe.transformer._orig_mod"),
    "parallel": (wrap_for_data, "wrapped by DataParallel", "pipe.transformer = pipe.transformer.module"),
    "cache": (
        lambda pipeline: apply_first_block_cache(pipeline.transformer, FirstBlockCacheConfig(threshold=0.2)),
        "has a cache or another hook of diffusers (fbc_block_hook, fbc_leader_block_hook)",
        "pipe.transformer.disable_cache()",
    ),
    "casting": (lambda p: p.transformer.enable_layerwise_casting(**FLOAT8), "cast layer by layer", LOAD_AGAIN),
    "groups": (lambda p: p.transformer.enable_group_offload(**ON_CPU), "offloaded in groups", LOAD_AGAIN),
    "groups of the VAE": (lambda p: p.vae.enable_group_offload(**ON_CPU), "offloaded in groups", LOAD_AGAIN),
    # As sequential offloading and a device_map do: on the parts alone.
    "offload": (
        lambda pipeline: add_hook_to_module(pipeline.transformer.proj_out, AlignDevicesHook()),
        "The pipeline is offloaded to the CPU",
        "without enable_model_cpu_offload(), enable_sequential_cpu_offload()",
    ),
    "unloaded": (leave_weights_unloaded, "weights that are not loaded (on the device 'meta')", "Load all of them"),
    "forward": (replace_forward, "The transformer's forward was replaced (of itself)", LOAD_AGAIN),
    "processors": (
        replace_processors,
        "attention processors were replaced (transformer_blocks.0.attn and 1 more: Own in place of JointAttnProcessor2_0)",
        "set_attn_processor(JointAttnProcessor2_0())",
    ),
    "weights in processors": (give_processors_weights, "carries an IP-adapter", "pipe.unload_ip_adapter()"),
    "blocks": (
        leave_a_block_out,
        "does not match its config: it lacks transformer_blocks.1",
        "Load the pipeline again",
    ),
    "PeftModel": (wrap_for_adapters, "already carries a LoRA: its transformer is a PeftModel", ".unload()"),
    "lora of an encoder": (adapt_an_encoder, "already carries a LoRA", "pipe.unload_lora_weights()"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_is_refused_with_what_undoes_it(tmp_path: Path, label: str) -> None:
    put_on, message, undo = REFUSED[label]
    pipeline = make_pipeline()
    put_on(pipeline)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, {"count": "base", "draw": "base"}, pipeline)
    line = next(line for line in str(error.value).splitlines() if message in line)
    assert undo in line
    # One thing is wrong, and one is said.
    assert str(error.value).count("\n- ") == 1


def test_full_weights_are_looked_at_too(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    fuse(pipeline)
    with pytest.raises(ValueError, match="projections are fused"):
        make_trainer(tmp_path, {"count": "base", "draw": "base"}, pipeline, peft_config=None)


@pytest.mark.parametrize("label", ["fused", "compiled", "cache", "casting"])
def test_evaluations_and_merges_refuse_it_too(tmp_path: Path, label: str) -> None:
    put_on, message, _ = REFUSED[label]
    pipeline = make_pipeline()
    put_on(pipeline)
    teachers = make_teachers(tmp_path / "teachers")
    with pytest.raises(ValueError, match="The pipeline cannot be used as a base:") as error:
        merge_teachers(pipeline, teachers, tmp_path / "merged")
    assert message in str(error.value)
    rows = Dataset.from_dict({"prompt": ["a"], "task": ["count"]})
    with pytest.raises(ValueError) as error:
        evaluate_retention(pipeline, teachers["count"], "base", lambda images, **_: [0.0] * len(images), rows)
    assert message in str(error.value)


# What undoes it does


def test_what_undoes_it() -> None:
    pipeline = make_pipeline()
    network = pipeline.transformer
    wrap(pipeline)
    pipeline.transformer = pipeline.transformer._orig_mod
    wrap_for_adapters(pipeline)
    pipeline.transformer = pipeline.transformer.unload()
    replace_processors(pipeline)
    network.set_attn_processor(JointAttnProcessor2_0())
    # accelerate leaves the class's own forward on the module.
    add_hook_to_module(network, ModelHook())
    remove_hook_from_module(network)
    assert "forward" in vars(network)
    assert denoiser_problems(pipeline.transformer) == placement_problems(pipeline) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_plain_and_are_so_again(name: str) -> None:
    pipeline = FAMILIES[name].build()
    network: Any = pipeline.transformer
    assert denoiser_problems(network) == placement_problems(pipeline) == []
    if name in ("flux", "chroma", "wan"):
        network.fuse_qkv_projections()
        [problem] = denoiser_problems(network)
        assert problem.endswith("Undo it with pipe.transformer.unfuse_qkv_projections().")
        network.unfuse_qkv_projections()
    if name in ("flux", "wan", "qwen_image"):
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        network.enable_cache(config)
        [problem] = denoiser_problems(network)
        assert "(pyramid_attention_broadcast)" in problem
        network.disable_cache()
        with network.cache_context("cond"):  # as pipelines do at every step: it leaves an empty registry behind
            pass
    assert denoiser_problems(network) == []


# What is let through


def compile_in_place(pipeline: Any) -> None:
    pipeline.transformer.compile(backend="eager")


def compile_the_others(pipeline: Any) -> None:
    pipeline.text_encoder = torch.compile(pipeline.text_encoder, backend="eager")
    pipeline.vae = torch.compile(pipeline.vae, backend="eager")


def prepare_the_vae(pipeline: Any) -> None:
    pipeline.vae.fuse_qkv_projections()
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_layerwise_casting(**FLOAT8)


def save_memory(pipeline: Any) -> None:
    pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.enable_forward_chunking(1, 1)
    pipeline.enable_attention_slicing()


def freeze_in_train_mode(pipeline: Any) -> None:
    for network in networks(pipeline):
        network.train().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5


def set_a_backend(pipeline: Any) -> None:
    pipeline.transformer.set_attention_backend("native")
    pipeline.enable_lora_hotswap(target_rank=8)


HARMLESS: dict[str, Callable[[Any], None]] = {
    "compiled in place": compile_in_place,
    "compiled VAE and encoder": compile_the_others,
    "VAE": prepare_the_vae,
    "memory": save_memory,
    "train mode": freeze_in_train_mode,
    "backend": set_a_backend,
}


def trained(folder: Path, teachers: dict[str, str], pipeline: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = make_trainer(folder, teachers, pipeline, max_steps=2, learning_rate=1e-2, guidance_scale=2.0)
    trainer.train()
    trainer.evaluate(make_dataset(count=1, draw=1))
    return train_losses(trainer), snapshot(trainer)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Any]:
    folder = tmp_path_factory.mktemp("plain")
    teachers = make_teachers(folder / "teachers")
    return teachers, trained(folder / "out", teachers, make_pipeline())


# Every LoRA, with and without a gradient, is traced anew, which takes seconds: the first two are enough to compare. Of what
# has no LoRA and no gradient, the first one is.
LIMITS = {"compiled in place": 2}


@pytest.mark.parametrize("label", HARMLESS)
def test_what_is_let_through_changes_nothing(tmp_path: Path, plain: Any, label: str) -> None:
    teachers, (losses, weights) = plain
    pipeline = make_pipeline()
    HARMLESS[label](pipeline)
    with torch._dynamo.config.patch(recompile_limit=LIMITS.get(label, 1)):
        ours, moved = trained(tmp_path, teachers, pipeline)
    assert ours == pytest.approx(losses, rel=1e-5)
    assert relative_difference(moved, weights) < 1e-6


def test_hooks_of_the_user_are_let_through_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    network = make_pipeline().transformer
    handles = [
        network.proj_out.register_forward_hook(lambda *_: None),
        network.register_full_backward_hook(lambda *_: None),
    ]
    assert denoiser_problems(network) == []
    assert "The transformer has forward or backward hooks (on itself and 1 more)" in caplog.text
    caplog.clear()
    for handle in handles:
        handle.remove()
    assert denoiser_problems(network) == [] and caplog.text == ""


# And what none of this knows of


def test_weights_without_a_gradient_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(r=2, target_modules=[*ATTENTION, "proj_out"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, {"count": "base", "draw": "base"}, peft_config=lora, max_steps=2)
    trainer.train()
    assert "got no gradient" not in caplog.text
    trainer = make_trainer(tmp_path, {"count": "base", "draw": "base"}, peft_config=lora, max_steps=2)
    # An attention without a gradient, as some kernels are.
    monkeypatch.setattr(JointAttnProcessor2_0, "__call__", torch.no_grad()(JointAttnProcessor2_0.__call__))
    trainer.train()
    assert caplog.text.count("got no gradient in the first update") == 1
    assert "30 of the 32 trained tensors got no gradient in the first update, such as base_model" in caplog.text
