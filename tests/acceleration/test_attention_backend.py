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

"""attention_backend: the same velocities and gradients by another kernel, and no choice that does nothing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from helpers import nft_fixtures
from helpers.families import FAMILIES
from helpers.family_fixtures import family_trainer, prompts_of
from helpers.opd_fixtures import make_trainer, train_losses
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from trl_diffusion_opd.acceleration.attention import use_attention_backend
from trl_diffusion_opd.pipelines.velocity import VelocityField


FLUX = FAMILIES["flux"]
# What docs/source/any_pipeline.md says of each family: its processors, and whether they go through diffusers' dispatcher.
HONOUR_IT = {
    "flux": True,
    "flux2_klein": True,
    "qwen_image": True,
    "z_image": True,
    "chroma": True,
    "wan": True,
    "flux_kontext": True,
    "qwen_image_edit": True,
    "sd3": "JointAttnProcessor2_0",
    "sana": "SanaAttnProcessor2_0, SanaLinearAttnProcessor2_0",
    "lumina2": "Lumina2AttnProcessor2_0",
    "hidream": "HiDreamAttnProcessor",
    "cogview4": "CogView4AttnProcessor",
}


def make_field(name: str) -> tuple[DiffusionPipeline, VelocityField]:
    pipeline = FAMILIES[name].build()
    return pipeline, VelocityField(pipeline, num_inference_steps=2, **FAMILIES[name].kwargs)


def use_backend(field: VelocityField, backend: str, batch_size: int) -> Callable[[], None]:
    network = field.pipeline.transformer
    return use_attention_backend(network, backend, lambda: field.one_forward(network, batch_size))


def chosen(network: nn.Module) -> set[Any]:
    """The backends that a transformer's processors have."""
    processors = [m.processor for m in network.modules() if "processor" in m.__dict__]
    return {processor._attention_backend for processor in processors if "_attention_backend" in dir(processor)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that are called, in order."""
    seen: list[str] = []

    def counted(name: AttentionBackendName, run: Any) -> Any:
        return lambda **inputs: seen.append(name.value) or run(**inputs)

    for name, run in list(_AttentionBackendRegistry._backends.items()):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted(name, run))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_honour_it_and_those_that_would_not(name: str) -> None:
    pipeline, field = make_field(name)
    batch_size = len(FAMILIES[name].prompts)
    if HONOUR_IT[name] is True:
        put_back = use_backend(field, "_native_math", batch_size)
        assert chosen(pipeline.transformer) == {AttentionBackendName._NATIVE_MATH}
        put_back()
    else:
        with pytest.raises(ValueError) as error:
            use_backend(field, "_native_math", batch_size)
        assert str(error.value) == (
            f"attention_backend='_native_math' would do nothing: the attention of {type(pipeline.transformer).__name__} "
            f"({HONOUR_IT[name]}) does not use diffusers' dispatcher. Leave it unset."
        )
    assert chosen(pipeline.transformer) <= {None}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def velocity_and_gradients(name: str, backend: str | None) -> tuple[Tensor, list[Tensor]]:
    pipeline, field = make_field(name)
    family = FAMILIES[name]
    if backend is not None:
        use_backend(field, backend, 2)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=list(family.lora_targets), init_lora_weights=False)
    model = get_peft_model(pipeline.transformer, lora).eval()
    prompts = list(family.prompts)
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])
    velocity = field(x, field.levels[1].item(), prompts, family.guidance_scale, model)
    gradients = torch.autograd.grad(velocity.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return velocity.detach(), list(gradients)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(
            (name, backend)
            for name in ("flux", "qwen_image", "wan", "z_image")
            for backend in ("native", "_native_math")
        ),
        *((name, "_native_flash") for name in ("flux", "wan")),
    ],
)
def test_velocities_and_gradients_are_the_same(name: str, backend: str, calls: list[str]) -> None:
    velocity, gradients = velocity_and_gradients(name, None)
    assert set(calls) == {"native"}
    calls.clear()
    other, others = velocity_and_gradients(name, backend)
    assert set(calls) == {backend}, "another kernel ran, or none"
    assert (other - velocity).norm() / velocity.norm() < 1e-6
    size = torch.stack([g.norm() for g in gradients]).norm()
    assert (
        size > 0 and torch.stack([(a - b).norm() for a, b in zip(others, gradients, strict=True)]).norm() / size < 1e-5
    )


class TestRefusals:
    def test_a_mask_that_the_kernel_does_not_take(self) -> None:
        # Only prompts of different length make Qwen-Image pad, and mask what it padded.
        pipeline, field = make_field("qwen_image")
        with pytest.raises(
            ValueError, match="'_native_flash' does not work for QwenImage.* on cpu in float32: .*attn_mask"
        ):
            use_backend(field, "_native_flash", 2)
        assert chosen(pipeline.transformer) == {None}
        use_backend(field, "_native_flash", 1)

    @pytest.mark.parametrize(
        ("backend", "message"),
        [
            ("flsh", "attention_backend='flsh': it must be one of .*_native_math, .*flash, .*xformers"),
            pytest.param(
                "flex",
                "'flex' does not work for FluxTransformer2DModel on cpu in float32: .*not support backward on CPU",
                marks=pytest.mark.skipif(
                    torch.__version__ < "2.11", reason="PyTorch 2.10's has a gradient on the CPU"
                ),
            ),
            ("flash", "attention_backend='flash': .*install `flash-attn"),
            (
                "_native_efficient",
                "'_native_efficient' does not work for FluxTransformer2DModel on cpu in float32: No viable",
            ),
        ],
    )
    def test_in_one_message_with_all_else(self, tmp_path: Path, backend: str, message: str) -> None:
        pipeline = FLUX.build()
        with pytest.raises(ValueError, match=message) as error:
            family_trainer(FLUX, tmp_path, "nobody/here", pipeline, attention_backend=backend, task_weights={"x": 1.0})
        assert "task_weights has a weight for task 'x'" in str(error.value) and "nobody/here" in str(error.value)
        assert chosen(pipeline.transformer) == {None}

    def test_nothing_is_left_behind_where_something_else_is_wrong(self, tmp_path: Path) -> None:
        pipeline = FLUX.build()
        pipeline.transformer.set_attention_backend("flex")
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
        with pytest.raises(ValueError, match="task_weights"):
            family_trainer(FLUX, tmp_path, "base", pipeline, attention_backend="_native_math", task_weights={"x": 1.0})
        assert chosen(pipeline.transformer) == {AttentionBackendName.FLEX}

    def test_a_kernel_without_a_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Such as SageAttention's, which is for inference.
        name = AttentionBackendName._NATIVE_MATH
        run = torch.no_grad()(_AttentionBackendRegistry._backends[name])
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, run)
        pipeline, field = make_field("flux")
        with pytest.raises(ValueError, match="attention_backend='_native_math' passes no gradient"):
            use_backend(field, "_native_math", 2)
        assert chosen(pipeline.transformer) == {None}

    def test_sd3_through_the_trainer(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"SD3Transformer2DModel \(JointAttnProcessor2_0\) does not use"):
            make_trainer(tmp_path, "base", attention_backend="native")


def test_processors_that_pass_it_by_beside_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, field = make_field("flux")

    class OwnKernel:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any) -> Any:
            return hidden_states, encoder_hidden_states

    pipeline.transformer.transformer_blocks[0].attn.processor = OwnKernel()
    with caplog.at_level(logging.WARNING, "trl_diffusion_opd.acceleration.attention"):
        use_backend(field, "_native_math", 2)
    assert "is used by FluxAttnProcessor of FluxTransformer2DModel, and not by OwnKernel." in caplog.text


# Training


def save_other_base(name: str, folder: Path) -> str:
    pipeline = FAMILIES[name].build()
    for parameter in pipeline.transformer.parameters():
        parameter.data *= 1.05
    pipeline.transformer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("full_weights", [False, True])
def test_training_is_the_same_and_every_network_has_it(tmp_path: Path, calls: list[str], full_weights: bool) -> None:
    teachers = [save_other_base("flux", tmp_path / "full"), "base"]
    options = {"peft_config": None} if full_weights else {}
    losses = []
    for backend in (None, "_native_math"):
        calls.clear()
        trainer = family_trainer(
            FLUX, tmp_path / str(backend), teachers, num_inference_steps=2, attention_backend=backend, **options
        )
        networks = [trainer.model, *trainer.bank.backbone.networks()]
        assert len(networks) == 2 + full_weights
        assert [chosen(network) for network in networks] == [
            {AttentionBackendName(backend) if backend else None}
        ] * len(networks)
        calls.clear()
        trainer.train()
        assert set(calls) == {backend or "native"}
        losses.append(train_losses(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_full_weights_trained_by_nft(tmp_path: Path) -> None:
    trainer = nft_fixtures.make_trainer(
        tmp_path,
        FLUX.build(),
        train_dataset=prompts_of(FLUX),
        peft_config=None,
        **FLUX.kwargs,
        num_inference_steps=2,
        beta=0.1,
        attention_backend="_native_math",
    )
    networks = [trainer.model, *trainer.backbone.networks()]
    assert len(networks) == 3
    assert all(chosen(network) == {AttentionBackendName._NATIVE_MATH} for network in networks)
