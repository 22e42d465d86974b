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

"""Pipelines that draw videos of more than one frame, held against what each of them does by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers.families import Family
from helpers.families_experts import save_pair
from helpers.family_fixtures import family_trainer
from helpers.gradients import derivative_error
from helpers.video_families import SPECIMENS, VIDEOS, of_frames
from PIL import Image
from sweep_parts.picture_trial import own_row
from sweep_parts.picture_videos import WAN_2_2 as WAN_2_2_PICTURES
from sweep_parts.trial import STEPS, Trial, difference, generators, own_images, update, velocity_and_walk

from trl_diffusion_opd.pipelines.velocity import VelocityField


def field_of(family: Family, pipeline: DiffusionPipeline | None = None, **options: Any) -> VelocityField:
    return VelocityField(pipeline or family.build(), num_inference_steps=STEPS, **{**family.kwargs, **options})


@pytest.mark.parametrize("name", VIDEOS)
def test_velocity_walk_and_gradient(name: str) -> None:
    family, found = VIDEOS[name], Trial()
    velocity_and_walk(family, found)
    assert found.velocity is not None and found.velocity <= 1e-5
    assert found.walk is not None and found.walk <= 1e-4
    field = field_of(family)
    x = field.initial_latents(list(family.prompts), generators(len(family.prompts)))
    # Of two experts, the one at this noise level.
    targets = r"transformer_2\..*attn\d\.to_[qv]" if name == "wan_2_2" else list(family.lora_targets)
    assert derivative_error(field, x, list(family.prompts), family.guidance_scale, targets) < 1e-2


def test_update_of_a_student_that_films_and_its_video_in_diffusers() -> None:
    found = Trial()
    update(VIDEOS["wan"], found)
    assert found.image is not None and found.image <= 1e-5
    assert found.moved is not None and found.moved > 1e-2


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_video_is_a_list_of_its_frames_and_one_frame_is_an_image(name: str) -> None:
    family = VIDEOS[name]
    field, prompts = field_of(family), list(family.prompts)
    x = field.initial_latents(prompts, generators(len(prompts)))
    videos, pixels = field.decode(x, prompts), field.decode(x, prompts, output_type="np")
    assert field.num_frames == 9 and pixels.shape == (2, 9, 32, 32, 3)
    assert all(isinstance(video, list) and isinstance(video[0], Image.Image) for video in videos)
    np.testing.assert_allclose([[np.asarray(frame) for frame in video] for video in videos], pixels * 255, atol=1.0)
    assert np.abs(pixels[:, 0] - pixels[:, -1]).max() > 0.02, "a still video would prove nothing"
    one = field_of(of_frames(family, 1))
    images = one.decode(one.initial_latents(prompts, generators(2)), prompts)
    assert one.num_frames == 1 and all(isinstance(image, Image.Image) for image in images)


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        ("wan", 10, "num_frames=10 .* multiple of 4. Use 9 or 13."),
        ("wan", 4, "num_frames=4 .* Use 1 or 5."),
        ("ltx", 5, "num_frames=5 .* multiple of 8. Use 1 or 9."),
        ("cogvideox", 8, "num_frames=8 .* multiple of 4. Use 5 or 9."),
        ("hunyuan", 0, "num_frames=0 is not a number of frames"),
        ("wan", True, "num_frames=True is not a number of frames"),
    ],
)
def test_frames_that_the_stride_does_not_divide_are_refused_with_all_else(name: str, number: int, told: str) -> None:
    family = of_frames(VIDEOS[name], number)
    with pytest.raises(ValueError, match=told) as refusal:
        field_of(family, height=family.size + 1)
    assert f"height={family.size + 1} is not a multiple" in str(refusal.value)


def test_a_pipeline_that_cuts_its_video_takes_any_number() -> None:
    family = of_frames(SPECIMENS["AllegroPipeline"], 6)
    field = field_of(family)
    (video,) = field.decode(field.initial_latents([""], generators(1)), [""])
    assert len(video) == 6


def test_images_are_not_encoded_as_videos() -> None:
    with pytest.raises(ValueError, match="WanPipeline draws videos of 9 frames.* Set num_frames=1"):
        field_of(VIDEOS["wan"]).check_encode()
    field_of(of_frames(VIDEOS["wan"], 1)).check_encode()


def test_experts_of_a_video_load_in_diffusers(tmp_path: Path) -> None:
    family = VIDEOS["wan_2_2"]
    model = save_pair(tmp_path, seed=3)
    field, loaded = field_of(family), family.build()
    for number, expert in enumerate(("high", "low")):
        loaded.load_lora_weights(
            str(tmp_path), weight_name=f"x_{expert}_noise.safetensors", load_into_transformer_2=bool(number)
        )
    prompts = list(family.prompts[:1])
    x = field.initial_latents(prompts, generators(1))
    with torch.no_grad():
        for level in field.levels[[0, -2]].tolist():  # one level of each expert
            own = field_of(family, loaded)(x, level, prompts, 5.0)
            assert torch.equal(field(x, level, prompts, 5.0, model), own)
            assert (own - field(x, level, prompts, 5.0)).abs().max() > 1e-3


@pytest.mark.parametrize("begins", ["with noise", "with a picture"])
def test_update_of_two_experts_that_film(begins: str, tmp_path: Path) -> None:
    """Both halves of the student move, and diffusers loads them; with noise the video has 9 frames, else 5."""
    edit = WAN_2_2_PICTURES["wan_2_2_i2v"] if begins == "with a picture" else None
    family = VIDEOS["wan_2_2"] if edit is None else edit.family
    rows = [(prompt, []) for prompt in family.prompts[:2]] if edit is None else edit.rows()

    def filmed(pipeline: DiffusionPipeline) -> Any:
        if edit is None:
            return own_images(family, pipeline, 1.0, family.prompts[:1])
        return own_row(edit, pipeline, 1.0, 0)

    save_pair(tmp_path / "teacher", seed=3, pipeline=family.build())
    trainer = family_trainer(
        family,
        tmp_path / "out",
        str(tmp_path / "teacher"),
        train_dataset=Dataset.from_list(
            [{"prompt": prompt, **({"source_images": pictures} if pictures else {})} for prompt, pictures in rows]
        ),
        num_inference_steps=STEPS,
        learning_rate=1e-1,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    fresh = family.build()
    ours = filmed(trainer.pipeline)
    gaps = [difference(filmed(fresh), ours)]
    for number, noise in enumerate(("high", "low")):
        fresh.load_lora_weights(
            str(tmp_path / "saved"),
            weight_name=f"pytorch_lora_weights_{noise}_noise.safetensors",
            load_into_transformer_2=bool(number),
        )
        gaps.append(difference(filmed(fresh), ours))
    base, half, both = gaps
    assert base > 1e-3 and half > 1e-4 and both <= 1e-5
