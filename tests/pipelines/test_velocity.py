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

"""What `VelocityField` promises besides the velocity itself: precision, devices, one encoding a prompt, refusals."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.families import FAMILIES, PROMPTS, denoiser
from helpers.noise_families import NOISE_FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from trl_diffusion_opd.pipelines.velocity import VelocityField


SD3 = FAMILIES["sd3"]
SCALE = SD3.guidance_scale
BOTH = list(PROMPTS)


def make_field(pipeline: DiffusionPipeline | None = None, **options: Any) -> VelocityField:
    return VelocityField(pipeline or SD3.build(), **{"num_inference_steps": 4, **SD3.kwargs, **options})


def noise(velocity: VelocityField, prompts: list[str]) -> Tensor:
    return velocity.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])


class Spy:
    """Calls a transformer and keeps what it was called with."""

    def __init__(self, transformer: nn.Module):
        self.transformer, self.calls = transformer, []

    def __call__(self, **inputs: Any) -> Any:
        self.calls.append(inputs)
        return self.transformer(**inputs)


def count_encodings(pipeline: DiffusionPipeline) -> list[int]:
    """A list that grows by one at each forward of the first text encoder."""
    rows: list[int] = []
    pipeline.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


# The grid


def test_levels_are_the_schedulers_and_can_be_set_anew() -> None:
    velocity = make_field()
    # SD3's grid is 1000 … 1 in equal steps of the timestep, of levels that are shifted once already, shifted again.
    lowest = 3 * 0.001 / (1 + 2 * 0.001)
    u = torch.linspace(1, lowest, 4, dtype=torch.float64)
    expected = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])
    assert velocity.levels.dtype == torch.float64
    torch.testing.assert_close(velocity.levels, expected, rtol=0, atol=1e-7)
    velocity.set_grid(9)
    assert velocity.num_inference_steps == 9 and len(velocity.levels) == 10
    assert velocity.levels[0] == 1.0 and velocity.levels[-1] == 0.0 and (velocity.levels.diff() < 0).all()


def test_a_batch_of_another_size_than_the_prompts_is_refused() -> None:
    velocity = make_field()
    with pytest.raises(ValueError, match="2 latents, but 1 prompts"):
        velocity(noise(velocity, BOTH), 1.0, BOTH[:1], SCALE)


# Prompts


def test_a_prompt_is_encoded_once() -> None:
    pipeline = SD3.build()
    velocity, rows = make_field(pipeline), count_encodings(pipeline)
    x = noise(velocity, BOTH)
    with torch.no_grad():
        first = velocity(x, 0.7, BOTH, SCALE)
        assert rows, "the count counts nothing"
        rows.clear()
        again = velocity(x, 0.7, BOTH, SCALE)
        velocity(x.flip(0), 0.3, BOTH[::-1], SCALE)
        velocity.decode(x, BOTH)
    assert rows == []
    assert torch.equal(first, again)


def test_a_prompts_embedding_does_not_depend_on_its_batch() -> None:
    pipeline = SD3.build()
    velocity, spy = make_field(pipeline), Spy(pipeline.transformer)
    x = noise(velocity, BOTH)
    with torch.no_grad():
        for i, prompts in enumerate([BOTH, BOTH[:1], BOTH[1:], ["another one", BOTH[1]]]):
            velocity(x[: len(prompts)], 0.7, prompts, SCALE, spy)
            assert len(spy.calls) == i + 1
    both, first, second, last = ({k: v for k, v in call.items() if isinstance(v, Tensor)} for call in spy.calls)
    for name in ("encoder_hidden_states", "pooled_projections"):
        # Rows without the prompts come first, then rows with them.
        assert torch.equal(both[name][2], first[name][1])
        assert torch.equal(both[name][3], second[name][1])
        assert torch.equal(last[name][3], second[name][1])
        assert not torch.equal(first[name][1], second[name][1])


@pytest.mark.parametrize("name", ["cogview4", "qwen_image", "z_image"])
def test_short_and_long_prompts_share_a_batch(name: str) -> None:
    # CogView4 pads to the longest, in steps of 16 tokens; Qwen-Image to the longest; Z-Image keeps lists.
    family, long = FAMILIES[name], "a cat " * 12
    pipeline, prompts = family.build(), ["a red cat", long]
    kwargs = {**family.kwargs, "max_sequence_length": 64}
    velocity, spy = VelocityField(pipeline, num_inference_steps=2, **kwargs), Spy(pipeline.transformer)
    x = noise(velocity, prompts)
    encoded = "cap_feats" if name == "z_image" else "encoder_hidden_states"
    with torch.no_grad():
        velocity(x, 0.7, [BOTH[0], "a red dog"], 1.0, spy)
        velocity(x, 0.7, prompts, 1.0, spy)
        expected = pipeline.encode_prompt(list(prompts), max_sequence_length=64)[0]
    ours = spy.calls[-1][encoded]
    assert len(ours) == 2 and ours[1].shape[0] > 16
    for row, own in zip(ours, expected, strict=True):
        torch.testing.assert_close(row, own)


# Devices


def test_encoders_that_left_the_device_do_not_take_the_work_along() -> None:
    pipeline = SD3.build()
    velocity, spy = make_field(pipeline), Spy(pipeline.transformer)
    x = noise(velocity, BOTH)
    with torch.no_grad():
        before = velocity(x, 0.7, BOTH, SCALE, spy)
        pipeline.text_encoder.to("meta")
        pipeline.text_encoder_2.to("meta")
        pipeline.text_encoder_3.to("meta")
        assert pipeline._execution_device == torch.device("meta"), "diffusers follows the first encoder: the trap"
        assert torch.equal(velocity(x, 0.7, BOTH, SCALE, spy), before)
        assert torch.equal(noise(velocity, BOTH), x)
        assert len(velocity.decode(x, BOTH)) == 2
    assert all(v.device.type == "cpu" for call in spy.calls for v in call.values() if isinstance(v, Tensor))


# Precision


def test_a_half_precision_transformer_meets_float32_at_its_border() -> None:
    pipeline = SD3.build()
    exact = make_field()
    pipeline.transformer.to(torch.bfloat16)
    velocity, spy = make_field(pipeline), Spy(pipeline.transformer)
    x = noise(velocity, BOTH)
    kept = x.clone()
    level = velocity.levels[2].item()
    with torch.no_grad():
        v = velocity(x, level, BOTH, SCALE, spy)
        reference = exact(x, level, BOTH, SCALE)
    assert x.dtype == torch.float32 and torch.equal(x, kept)
    assert v.dtype == torch.float32
    (call,) = spy.calls
    assert call["hidden_states"].dtype == torch.bfloat16
    assert call["encoder_hidden_states"].dtype == torch.bfloat16
    assert call["timestep"].dtype == torch.float32
    # In bfloat16 this timestep would be off by up to 2.
    assert abs(torch.tensor(level * 1000).bfloat16().item() - level * 1000) > 1
    assert (call["timestep"] == torch.tensor(level * 1000, dtype=torch.float32)).all()
    error = (v - reference).norm() / reference.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", [name for name in [*FAMILIES, *NOISE_FAMILIES] if name != "qwen_image_edit"])
def test_every_family_takes_a_half_precision_denoiser(name: str) -> None:
    family, velocities = (FAMILIES | NOISE_FAMILIES)[name], []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = family.build()
        denoiser(pipeline).to(dtype)
        velocity = VelocityField(pipeline, num_inference_steps=2, **family.kwargs)
        x = noise(velocity, BOTH)
        with torch.no_grad():
            velocities.append(velocity(x, velocity.levels[1].item(), BOTH, 1.0))
        assert x.dtype == velocities[-1].dtype == torch.float32
    # Flux, Chroma and Qwen-Image round the timestep inside their forward, as they do in their own pipelines.
    assert 0 < (velocities[1] - velocities[0]).norm() / velocities[0].norm() < 0.2


def test_guidance_is_applied_in_float32() -> None:
    pipeline = SD3.build()
    pipeline.transformer.to(torch.bfloat16)
    velocity = make_field(pipeline)
    x = noise(velocity, BOTH)
    outputs = []
    handle = pipeline.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        v = velocity(x, 0.7, BOTH, SCALE)
    handle.remove()
    empty, text = outputs[0].float().chunk(2)
    assert torch.equal(v, empty + SCALE * (text - empty))


def test_a_float32_lora_learns_on_a_half_precision_base() -> None:
    pipeline = SD3.build()
    pipeline.transformer.to(torch.bfloat16)
    velocity = make_field(pipeline)
    config = LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False)
    model = get_peft_model(pipeline.transformer, config).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    v = velocity(noise(velocity, BOTH), 0.7, BOTH, SCALE, model)
    assert v.dtype == torch.float32
    v.square().mean().backward()
    for name, p in trained.items():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


# Refusals


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd3", {"skip_guidance_layers": [0]}),
        ("sd3", {"skip_layer_guidance_scale": 2.0}),
        ("lumina2", {"cfg_trunc_ratio": 0.5}),
        ("z_image", {"cfg_truncation": 0.5}),
    ],
)
def test_options_of_the_loops_index_are_refused(family: str, options: dict[str, Any]) -> None:
    kwargs = FAMILIES[family].kwargs
    kwargs["generation_kwargs"].update(options)
    with pytest.raises(ValueError, match=f"'{next(iter(options))}' depends on the step's index"):
        VelocityField(FAMILIES[family].build(), num_inference_steps=2, **kwargs)


def test_one_message_lists_everything_that_is_wrong() -> None:
    options = {"guidance_scale": 3.0, "latents": None, "no_such_option": 1}
    with pytest.raises(ValueError) as error:
        make_field(height=17, generation_kwargs=options)
    message = str(error.value)
    assert "'guidance_scale' is set by the trainer's own arguments" in message
    assert "'latents' is set by the trainer's own arguments" in message
    assert "StableDiffusion3Pipeline takes no 'no_such_option'" in message
    assert "height=17 is not a multiple of 2" in message and "Use 16" in message


def test_a_size_that_splits_a_patch_is_refused() -> None:
    # 18 pixels are 9 latents, which patches of 2 do not cover: here the pipeline itself objects.
    with pytest.raises(ValueError, match="divisible by 4"):
        make_field(height=18)


def test_a_pipeline_without_a_denoiser_or_of_another_schedule_is_refused() -> None:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer"))
    pipeline = diffusers.PixArtSigmaPipeline(scheduler=diffusers.ScoreSdeVeScheduler(), **parts)
    with pytest.raises(ValueError) as error:
        VelocityField(pipeline, num_inference_steps=2)
    message = str(error.value)
    assert "PixArtSigmaPipeline has no transformer or unet" in message
    assert "the scheduler ScoreSdeVeScheduler with prediction_type=None, which is neither of flow matching" in message
