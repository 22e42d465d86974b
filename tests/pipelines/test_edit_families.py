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

"""Prompts with pictures of their own, held against what each pipeline does by itself with one row."""

from collections.abc import Iterator

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.edit_families import EditFamily, picture, small_pictures
from helpers.families import FAMILIES, denoiser
from helpers.gradients import derivative_error
from helpers.picture_families import PICTURE_FAMILIES, PICTURES, WAN_2_2
from helpers.pipeline_recorder import Recorder, recorder
from PIL import Image
from torch import Tensor, nn

from trl_diffusion_opd.algorithms.rollout import walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.data.pictured_prompt import PicturedPrompt, with_pictures
from trl_diffusion_opd.pipelines.velocity import VelocityField


STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures():
        yield


@pytest.fixture(scope="module", params=PICTURE_FAMILIES)
def edit(request: pytest.FixtureRequest) -> Iterator[EditFamily]:
    family = PICTURE_FAMILIES[request.param]
    with family.context():
        yield family


def field_of(edit: EditFamily) -> VelocityField:
    return VelocityField(edit.family.build(), num_inference_steps=STEPS, **edit.family.kwargs)


def own_trace(
    pipeline: DiffusionPipeline, edit: EditFamily, scale: float, prompt: str, pictures: list[Image.Image], seed: int
) -> tuple[Recorder, np.ndarray]:
    pipeline.scheduler = recorder(pipeline.scheduler)
    images = pipeline(
        **edit.call_kwargs(scale, prompt, pictures),
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed)],
        output_type="np",
        return_dict=False,
    )[0]
    return pipeline.scheduler, images


def test_each_row_of_a_batch_is_the_pipelines_own(edit: EditFamily) -> None:
    field, rows, scale = field_of(edit), edit.rows(), edit.family.guidance_scale
    own_pipeline = edit.family.build()
    runs = [own_trace(own_pipeline, edit, scale, *row, seed) for seed, row in enumerate(rows)]
    prompts = [with_pictures(*row) for row in rows]
    for step in range(STEPS):
        traces = [own.trace[step] for own, _ in runs]
        x, v = (torch.cat([trace[i] for trace in traces]) for i in (1, 2))
        assert torch.equal(field(x, traces[0][0], prompts, scale), v)
    start = field.initial_latents(prompts, [torch.Generator().manual_seed(seed) for seed in range(len(rows))])
    assert torch.equal(start, torch.cat([own.trace[0][1].float() for own, _ in runs]))
    with torch.no_grad():
        table = sampler_table("ode", field.levels)
        levels = table.levels.tolist()
        x = walk(lambda j, x, _: field(x, levels[j], prompts, scale), start, table)
        images = field.decode(field.clean(x), prompts, "np")
    for image, (_, own) in zip(images, runs, strict=True):
        torch.testing.assert_close(torch.tensor(image), torch.tensor(own[0]), rtol=0, atol=1e-4)
    # Each row by itself sees its own picture: with that of another one the velocity is another.
    i, j = len(rows) - 2, len(rows) - 1
    exchanged = [*prompts[:i], with_pictures(str(prompts[i]), rows[j][1]), *prompts[j:]]
    differs = (field(start, float(levels[0]), exchanged, scale) - field(start, float(levels[0]), prompts, scale)).abs()
    assert differs[i].max() > 1e-4 and not differs[:i].any() and not differs[j:].any()


def test_each_row_of_a_pipeline_with_two_experts_is_its_own() -> None:
    test_each_row_of_a_batch_is_the_pipelines_own(WAN_2_2["wan_2_2_i2v"])


def counted(field: VelocityField, prompts: list[str]) -> tuple[Tensor, int]:
    """A velocity, and how often the network ran for it."""
    runs: list[int] = []
    hook = denoiser(field.pipeline).register_forward_hook(lambda *_: runs.append(1))
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    v = field(x, 0.5, prompts, 1.0)
    hook.remove()
    return v, len(runs)


def test_pictures_of_one_size_are_asked_together_where_the_pipeline_can(edit: EditFamily) -> None:
    field = field_of(edit)
    alike: list[str] = [PicturedPrompt(f"{i} cats", [picture(i)]) for i in range(3)]
    together, runs = counted(field, alike)
    assert runs == (1 if edit.in_batches else 3)
    field.one_by_one = True
    apart, runs = counted(field, alike)
    assert runs == 3
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)
    field.one_by_one = False
    if len(edit.sizes) == 1:
        return
    _, runs = counted(field, [*alike[:2], PicturedPrompt("a cat", [picture(3, 128, 64)])])
    assert runs == 3


def test_pictures_are_encoded_once(edit: EditFamily) -> None:
    field = field_of(edit)
    vae: nn.Module = field.pipeline.vae
    encoded: list[int] = []
    encode = type(vae).encode
    vae.encode = lambda *args, **kwargs: encoded.append(1) or encode(vae, *args, **kwargs)  # type: ignore[method-assign]
    prompts: list[str] = [PicturedPrompt("a cat", [picture(i)]) for i in range(2)]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])
    first = field(x, 0.5, prompts, 1.0)
    seen = len(encoded)
    # Other objects with the same content are the same pictures.
    again: list[str] = [PicturedPrompt("a cat", [picture(i)]) for i in range(2)]
    assert torch.equal(field(x, 0.5, again, 1.0), first)
    field(x, 0.7, prompts, edit.family.guidance_scale)
    assert 0 < seen == len(encoded)
    field(x, 0.5, [PicturedPrompt("a cat", [picture(5)]), PicturedPrompt("a cat", [picture(6)])], 1.0)
    assert len(encoded) > seen


@pytest.mark.parametrize(("name", "needs"), [("BriaFibo2Pipeline", False), ("JoyImageEditPipeline", False)])
def test_a_pipeline_that_diffusers_does_not_list_is_asked_whether_it_draws_from_a_text(name: str, needs: bool) -> None:
    with PICTURES[name].context():
        assert field_of(PICTURES[name]).needs_pictures is needs


def test_a_size_is_refused_where_the_call_takes_none_and_no_picture() -> None:
    class Unsized(diffusers.StableDiffusion3Pipeline):
        def __call__(
            self, prompt: list[str], num_inference_steps: int, guidance_scale: float, latents: Tensor
        ) -> None:
            raise AssertionError("it is refused before")

    pipeline = Unsized(**FAMILIES["sd3"].build().components)
    with pytest.raises(ValueError, match="height=16: Unsized takes none"):
        VelocityField(pipeline, num_inference_steps=STEPS, height=16)


def test_gradient_in_the_lora(edit: EditFamily) -> None:
    if isinstance(edit.family.make(), diffusers.Kandinsky5I2IPipeline):
        pytest.skip("its network rounds to bfloat16, which finite differences do not see through")
    field, number = field_of(edit), edit.numbers[-1]
    prompts: list[str] = [PicturedPrompt("a cat", [picture(i)] * number) for i in range(2)]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])
    scale, targets = edit.family.guidance_scale, list(edit.family.lora_targets)
    assert derivative_error(field, x, prompts, scale, targets) < 1e-2
