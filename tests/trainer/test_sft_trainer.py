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

"""Supervised fine-tuning: its loss and gradient against another implementation, its images, and what it refuses."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from helpers.families import FAMILIES
from helpers.opd_fixtures import (
    Recorder,
    StopAt,
    make_dataset,
    relative_difference,
    snapshot,
)
from helpers.sft_fixtures import image_dataset, picture, sft_trainer
from helpers.tiny_sd3 import SIZE, make_pipeline
from peft import PeftModel
from scipy.stats import norm

from trl_diffusion_opd import TeacherConfig, VelocityField
from trl_diffusion_opd.algorithms.sft import density_quantile, shifted


SEED = 42
TASKS = ("count", "draw")


def one_update(tmp_path, teachers=None, **options):
    """The gradient of an update, and the rows of its micro-batches with their positions, counted here."""
    recorder, batches = Recorder(), []
    trainer = sft_trainer(tmp_path, teachers, callbacks=[recorder], learning_rate=0.0, max_grad_norm=0.0, **options)
    step = trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        (task,) = {row["task"] for row in inputs}
        before = sum(len(rows) for name, rows, _ in batches if name == task)
        batches.append((task, inputs, list(range(before, before + len(inputs)))))
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    trainer.train()
    (gradient,) = recorder.gradients
    return trainer, gradient, batches


def sample_generator(task, position):
    entropy = np.random.SeedSequence([SEED, 0, TASKS.index(task), position])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def own_level(q, density="logit_normal", mean=0.0, std=1.0):
    """A timestep of the density on the scheduler's own grid."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    u = q if density == "uniform" else 1 / (1 + np.exp(-(mean + std * norm.ppf(q))))
    return float(np.interp(1000 * (1 - u), np.arange(1001), scheduler.sigmas.double().numpy()))


def own_latents(pipeline, image):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 127.5 - 1
    with torch.no_grad():
        encoded = copy.deepcopy(pipeline.vae).double().encode(pixels[None]).latent_dist.mean
    return (encoded - 0.06) * 1.5


def expected_gradient(trainer, batches, latents, task_weights=None, **density):
    """The loss and its gradient in float64, sample by sample, by the transformer's own forward."""
    pipeline = make_pipeline()
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shares = {task: (task_weights or {}).get(task, 1.0) for task in TASKS}
    total, losses = 0.0, {task: [] for task in TASKS}
    for task, rows, positions in batches:
        for row, position in zip(rows, positions, strict=True):
            generator = sample_generator(task, position)
            x0 = latents(row, generator)
            t = own_level(float(torch.rand(1, generator=generator, dtype=torch.float64)), **density)
            eps = torch.randn(1, 4, 8, 8, generator=generator).double()
            embeds, _, pooled, _ = pipeline.encode_prompt(row["prompt"], None, None, max_sequence_length=16)
            v = model(
                hidden_states=(1 - t) * x0 + t * eps,
                timestep=torch.tensor([1000 * t], dtype=torch.float64),
                encoder_hidden_states=embeds.double(),
                pooled_projections=pooled.double(),
                return_dict=False,
            )[0]
            losses[task].append((v - (eps - x0)).square().mean())
    for task, values in losses.items():
        total = total + shares[task] / sum(shares.values()) * torch.stack(values).mean()
    return total.item(), dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


CASES = {
    "logit-normal": ({}, {}),
    "guidance, which is not trained": ({"guidance_scale": 3.0}, {}),
    "uniform": ({"timestep_density": "uniform"}, {"density": "uniform"}),
    "shifted density, weights, two micro-batches a task": (
        {"logit_mean": 0.5, "logit_std": 2.0, "task_weights": {"draw": 3.0}, "gradient_accumulation_steps": 4},
        {"mean": 0.5, "std": 2.0, "task_weights": {"draw": 3.0}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("label", CASES)
def test_loss_and_gradient_on_images(label, tmp_path):
    ours, theirs = CASES[label]
    trainer, gradient, batches = one_update(tmp_path, **ours)
    pipeline = make_pipeline()
    loss, expected = expected_gradient(
        trainer, batches, lambda row, generator: own_latents(pipeline, row["image"]), **theirs
    )
    (logged,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss, rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-5
    assert sum(len(rows) for _, rows, _ in batches) == 4 * (2 if "two" in label else 1)


def teacher_latents(folder, scale):
    """What the teacher's own pipeline draws from a generator."""
    pipeline = make_pipeline()
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder).merge_and_unload()

    def draw(row, generator):
        latents = StableDiffusion3Pipeline.__call__(
            pipeline,
            row["prompt"],
            num_inference_steps=4,
            guidance_scale=scale,
            **SIZE,
            generator=[generator],
            output_type="latent",
        ).images
        return latents.double()

    return draw


@pytest.mark.slow
def test_loss_and_gradient_on_images_of_teachers(tmp_path, teachers):
    specs = {"count": teachers["count"], "draw": TeacherConfig(teachers["draw"], guidance_scale=3.0)}
    trainer, gradient, batches = one_update(tmp_path, specs)
    draw = {"count": teacher_latents(teachers["count"], 1.0), "draw": teacher_latents(teachers["draw"], 3.0)}
    loss, expected = expected_gradient(trainer, batches, lambda row, generator: draw[row["task"]](row, generator))
    (logged,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss, rel=1e-4)
    assert relative_difference(gradient, expected) < 1e-4


def test_density_of_timesteps():
    q = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    expected = 1 / (1 + np.exp(-(-0.3 + 0.8 * norm.ppf(q.numpy()))))
    assert np.abs(density_quantile(q, "logit_normal", -0.3, 0.8).numpy() - expected).max() < 1e-12
    assert torch.equal(density_quantile(q, "uniform"), q)
    assert float(density_quantile(torch.zeros(1), "logit_normal")) == 0
    with pytest.raises(ValueError, match="Unknown density of timesteps 'mode'"):
        density_quantile(q, "mode")


def test_timesteps_are_shifted_as_the_pipeline_shifts():
    levels = VelocityField(make_pipeline(), num_inference_steps=1000, height=16, width=16).levels
    u = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    # 3 u / (1 + 2 u), but for the grid's own end, which is not at 0 before the shift.
    assert torch.allclose(shifted(u, levels), 3 * u / (1 + 2 * u), atol=5e-3)
    assert shifted(u, levels)[[0, -1]].tolist() == [0, 1]


# Images and levels of other families


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen_image_edit"])
def test_images_of_every_family(name):
    family = FAMILIES[name]
    pipeline = family.build()
    field = VelocityField(pipeline, num_inference_steps=3, **family.kwargs)
    x = field.encode([picture(0, family.size, family.size), picture(1, family.size, family.size)])
    seen = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, *args, **kwargs: seen.append(z) or decode(z, *args, **kwargs)
    field.decode(x, list(family.prompts[:2]))
    # What the pipeline would decode is what the VAE has encoded.
    pixels = torch.stack([torch.from_numpy(np.array(picture(i, family.size, family.size))) for i in (0, 1)])
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    encoded = pipeline.vae.encode(pixels.unsqueeze(2) if seen[0].ndim == 5 else pixels, return_dict=False)[0]
    expected = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    assert seen[0].shape == expected.shape and float(expected.std()) > 0
    assert torch.allclose(seen[0], expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen_image_edit"])
def test_a_level_a_sample_in_every_family(name):
    family = FAMILIES[name]
    field = VelocityField(family.build(), num_inference_steps=3, **family.kwargs)
    prompts, levels = list(family.prompts[:2]), [0.7, 0.3]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in (0, 1)])
    with torch.no_grad():
        for scale in (1.0, family.guidance_scale):
            both = field(x, levels, prompts, scale)
            alone = [field(x, t, prompts, scale)[i] for i, t in enumerate(levels)]
            assert torch.equal(both, torch.stack(alone))
            assert not torch.allclose(both, field(x, 0.7, prompts, scale))


def test_images_are_cut_around_their_centre():
    field = VelocityField(make_pipeline(), num_inference_steps=3, height=16, width=16)
    wide = picture(3, width=24, height=16)
    assert torch.allclose(field.encode([wide]), field.encode([wide.crop((4, 0, 20, 16))]), atol=1e-5)
    assert torch.equal(field.encode([wide.convert("L")]), field.encode([wide.convert("L").convert("RGB")]))


# A cache of the teachers' images


def cached(tmp_path, teachers, **options):
    options = {"teacher_cache_dir": str(tmp_path / "images"), "num_images_per_prompt": 2, **options}
    return sft_trainer(tmp_path / "out", teachers, **options)


def count_draws(trainer):
    draws, draw = [], trainer._teacher_latents
    trainer._teacher_latents = lambda task, prompts, generators: (
        draws.append((task, len(prompts))) or draw(task, prompts, generators)
    )
    return draws


@pytest.mark.slow
def test_cache_is_made_once_and_completed(tmp_path, teachers, monkeypatch):
    monkeypatch.setattr("trl_diffusion_opd.data.latent_cache._SHARD_SIZE", 6)
    first = cached(tmp_path, teachers, max_steps=2, learning_rate=1e-2)
    draws = count_draws(first)
    first.train()
    folder = tmp_path / "images"
    # 6 and 4 prompts, two images each, two at a time.
    assert sum(n for _, n in draws) == 2 * (6 + 4)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["index.json", *(f"latents-{i:05d}.safetensors" for i in range(4))]
    index = json.loads((folder / "index.json").read_text())
    assert index["prompts"]["draw"] == [f"draw{i}" for i in range(4)] and index["settings"]["sampler"] == "ode"
    contents = {name: (folder / name).read_bytes() for name in files}

    (folder / files[2]).unlink()  # as if it had been killed there
    second = cached(tmp_path, teachers, max_steps=2, learning_rate=1e-2, per_device_eval_batch_size=2)
    draws = count_draws(second)
    second.train()
    assert sum(n for _, n in draws) == 6
    assert {name: (folder / name).read_bytes() for name in files} == contents
    assert relative_difference(snapshot(second), snapshot(first)) == 0

    third = cached(tmp_path, teachers, max_steps=2, learning_rate=1e-2)
    draws = count_draws(third)
    third.train()
    assert draws == []


@pytest.mark.slow
def test_cached_images_are_the_teachers(tmp_path, teachers):
    trainer = cached(tmp_path, teachers)
    trainer.train()
    draw = teacher_latents(teachers["draw"], 1.0)
    entropy = np.random.SeedSequence([SEED, 2**32 - 2, TASKS.index("draw"), 2 * 3 + 1])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
    expected = draw({"prompt": "draw3"}, generator)[0]
    assert torch.allclose(trainer.cache.read("draw", "draw3", 1).double(), expected, atol=1e-5)
    assert not torch.allclose(trainer.cache.read("draw", "draw3", 0).double(), expected, atol=1e-1)


@pytest.mark.slow
def test_cache_of_other_settings_is_refused(tmp_path, teachers):
    cached(tmp_path, teachers).train()
    with pytest.raises(ValueError) as error:
        cached(tmp_path, {**teachers, "draw": "base"}, num_inference_steps=5)
    assert (
        "teacher_cache_dir: the images in 'images' were made with other settings (levels, teachers). Use those again, or name "
        "another folder." in str(error.value)
    )
    with pytest.raises(ValueError, match=r"other settings \(prompts\)"):
        cached(tmp_path, teachers, train_dataset=make_dataset(count=7, draw=4))
    (tmp_path / "images" / "index.json").unlink()
    with pytest.raises(ValueError, match="holds other files and no index.json. Name an empty one."):
        cached(tmp_path, teachers)


@pytest.mark.slow
def test_images_of_an_update_are_drawn_from_all_of_a_prompt(tmp_path, teachers):
    trainer = cached(tmp_path, teachers, max_steps=6)
    read, seen = trainer.cache.read, []
    trainer.cache.read = lambda task, prompt, which: seen.append(which) or read(task, prompt, which)
    trainer.train()
    assert len(seen) == 6 * 2 * 2 and set(seen) == {0, 1}


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("source", ["images", "teachers", "cache"])
def test_resumed_run_is_the_uninterrupted_run(source, tmp_path, teachers):
    options = dict(max_steps=4, learning_rate=1e-2, ema_decay=0.9, ema_update_interval=1, lr_scheduler_type="cosine")
    if source == "cache":
        options |= {"teacher_cache_dir": str(tmp_path / "images"), "num_images_per_prompt": 2}
    taught = None if source == "images" else teachers
    through = sft_trainer(tmp_path / "through", taught, **options)
    through.train()
    sft_trainer(tmp_path / "halves", taught, callbacks=[StopAt(2)], **options).train()
    resumed = sft_trainer(tmp_path / "halves", taught, **options)
    resumed.train(resume_from_checkpoint=True)
    assert relative_difference(snapshot(resumed), snapshot(through)) == 0
    assert torch.equal(resumed.student.ema.shadow_params[0], through.student.ema.shadow_params[0])


@pytest.mark.slow
def test_it_learns_its_images(tmp_path):
    trainer = sft_trainer(
        tmp_path,
        eval_dataset=image_dataset(),
        peft_config=None,
        max_steps=30,
        learning_rate=5e-3,
        per_device_eval_batch_size=4,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_loss"] == pytest.approx((after["eval_loss/count"] + after["eval_loss/draw"]) / 2)


def test_what_is_saved_loads_into_the_pipeline(tmp_path, teachers):
    trainer = sft_trainer(tmp_path, teachers, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "the frozen teacher of each prompt's task drew" in card and "fresh for every update" in card
    assert "| training (sampler" not in card and "| evaluation;" in card
    assert json.loads((tmp_path / "teacher_manifest.json").read_text()).keys() == set(TASKS)
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path)
    options = dict(num_inference_steps=2, guidance_scale=1.0, **SIZE)
    images = [
        draw("count1", output_type="np", generator=torch.Generator().manual_seed(0), **options).images
        for draw in (pipeline, trainer.pipeline, make_pipeline())
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4 < np.abs(images[0] - images[2]).max()


# What is refused


def refusal(tmp_path, teachers=None, **options):
    with pytest.raises(ValueError) as error:
        sft_trainer(tmp_path, teachers, **options)
    return str(error.value)


def test_data_without_images_is_refused(tmp_path, teachers):
    message = refusal(tmp_path, train_dataset=make_dataset(), student_init="merge")
    assert "train_dataset has no images in the column 'image'; the columns are ['prompt', 'task', 'target']" in message
    assert "student_init='merge' starts from the mean of the teachers' LoRAs, but there are no teachers." in message
    message = refusal(tmp_path, train_dataset=make_dataset().rename_column("target", "image"))
    assert "its type is Value('int64')" in message and "cast_column('image', datasets.Image())" in message
    message = refusal(tmp_path, teachers, train_dataset=image_dataset())
    assert "train_dataset has a column 'image', but with teachers its images would be ignored." in message


def test_options_of_teachers_without_teachers_are_refused(tmp_path):
    message = refusal(tmp_path, teacher_cache_dir=str(tmp_path / "images"))
    assert "is for images of teachers, but there are none. Leave it unset." in message


def test_a_pipeline_without_vae_is_refused(tmp_path):
    pipeline = make_pipeline()
    del pipeline.__dict__["image_processor"]
    message = refusal(tmp_path, pipeline=pipeline)
    assert "StableDiffusion3Pipeline has no VAE with an image processor to encode images with." in message


def test_latents_that_cannot_be_inverted_are_refused(tmp_path):
    pipeline = make_pipeline()
    pipeline.vae.register_to_config(scaling_factor=float("inf"))
    assert "in a way that can't be inverted" in refusal(tmp_path, pipeline=pipeline)
