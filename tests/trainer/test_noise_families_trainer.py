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

"""
Training of models that predict noise, v or the sample: a whole update of every family, all trainers, and the files that
diffusers loads again.
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LoraBaseMixin
from helpers import dmd_fixtures, grpo_fixtures, nft_fixtures
from helpers.families import Family, denoiser, save_teacher
from helpers.family_fixtures import family_trainer, prompts_of
from helpers.noise_families import NOISE_FAMILIES
from helpers.opd_fixtures import AVERAGED, EVALUATED_AND_SAVED, relative_difference, snapshot
from helpers.sft_fixtures import picture, sft_trainer
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from trl_diffusion_opd import DiffusionOPDTrainer, evaluate_retention
from trl_diffusion_opd.algorithms.rollout import sample_generators, walk
from trl_diffusion_opd.algorithms.samplers import sampler_table
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.trainer.preparation import default_lora_config


# A number that divides 1000: else DDIM's own steps miss the timesteps after them by one.
STEPS, SEED, PROMPT = 4, 5, "a red cat"
SD15 = NOISE_FAMILIES["sd15"]


def save_strong_teacher(family: Family, folder: Path) -> PeftModel:
    return save_teacher(family, folder, seed=1)


def own_states(family: Family, pipeline: DiffusionPipeline) -> list[tuple[Tensor, float]]:
    """States, in flow coordinates, and levels of the pipeline's own loop from the trainer's noise."""
    states, step, squares = [], pipeline.scheduler.step, pipeline.scheduler.alphas_cumprod.double()

    def recorded(output: Tensor, t: Any, sample: Tensor, **kwargs: Any) -> Any:
        alpha, sigma = squares[int(t)].sqrt().item(), (1 - squares[int(t)]).sqrt().item()
        states.append((sample / (alpha + sigma), sigma / (alpha + sigma)))
        return step(output, t, sample, return_dict=False)

    pipeline.scheduler.step = recorded
    pipeline(
        **family.call_kwargs(family.guidance_scale, (PROMPT,)),
        num_inference_steps=STEPS,
        generator=sample_generators([SEED, 0, 0], [0]),
        output_type="latent",
    )
    pipeline.scheduler.step = step
    return states


def expected_loss(family: Family, teacher: nn.Module) -> float:
    """
    Eq. 12 in flow coordinates along the base's own walk: half the squared step times the squared gap, a mean over latents
    and over all steps but the last.
    """
    pipeline = family.build()
    velocity = VelocityField(family.build(), num_inference_steps=STEPS, **family.kwargs)
    states, losses = own_states(family, pipeline), []
    with torch.no_grad():
        for (x, level), (_, after) in zip(states, states[1:], strict=False):
            student, target = (
                velocity(x, level, [PROMPT], family.guidance_scale, network).double()
                for network in (denoiser(pipeline), teacher)
            )
            losses.append(0.5 * (after - level) ** 2 * (student - target).square().mean())
    return float(sum(losses) / len(losses))


def own_image(family: Family, pipeline: DiffusionPipeline) -> np.ndarray:
    return pipeline(
        **family.call_kwargs(family.guidance_scale, (PROMPT,)),
        num_inference_steps=STEPS,
        generator=sample_generators([SEED], [1]),
        output_type="np",
        return_dict=False,
    )[0]


def our_image(trainer: DiffusionOPDTrainer, family: Family) -> np.ndarray:
    field, model = trainer.velocity_field, trainer.student.model
    table = sampler_table("ode", field.levels)
    x = field.initial_latents([PROMPT], sample_generators([SEED], [1]))
    with torch.no_grad():
        x = walk(lambda j, x, _: field(x, field.levels[j].item(), [PROMPT], family.guidance_scale, model), x, table)
    return field.decode(field.clean(x), [PROMPT], "np")


def loaded(family: Family, folder: Path) -> DiffusionPipeline:
    """The base with a saved LoRA, as its users load it."""
    pipeline = family.build()
    if isinstance(pipeline, LoraBaseMixin):
        pipeline.load_lora_weights(str(folder))
    else:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder).merge_and_unload()
    return pipeline


@pytest.mark.parametrize("name", NOISE_FAMILIES)
def test_one_update(name: str, tmp_path: Path) -> None:
    family = NOISE_FAMILIES[name]
    teacher = save_strong_teacher(family, tmp_path / "teacher")
    trainer = family_trainer(
        family,
        tmp_path / "student",
        str(tmp_path / "teacher"),
        train_dataset=Dataset.from_list([{"prompt": PROMPT, "task": "one"}]),
        num_inference_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        weight_decay=0.0,
        seed=SEED,
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(expected_loss(family, teacher), rel=1e-3)

    trainer.save_model()
    image = our_image(trainer, family)
    np.testing.assert_allclose(own_image(family, loaded(family, tmp_path / "student")), image, atol=1e-5)
    assert np.abs(own_image(family, family.build()) - image).max() > 1e-3, "the student is the base"


def test_the_default_lora_of_a_unet_is_on_its_attention() -> None:
    config = default_lora_config(SD15.build().unet)
    assert set(config.target_modules) == {"to_q", "to_k", "to_v", "to_out.0"}


def test_average_checkpoint_and_merged_start(tmp_path: Path) -> None:
    folders = [str(tmp_path / str(seed)) for seed in (1, 2)]
    for seed, folder in enumerate(folders, start=1):
        save_teacher(SD15, Path(folder), seed)
    options = dict(**AVERAGED, **EVALUATED_AND_SAVED, student_init="merge", num_inference_steps=STEPS, max_steps=2)
    data = Dataset.from_list([{"prompt": p, "task": t} for t, p in zip("ab", SD15.prompts, strict=True)])

    def trainer(name: str) -> DiffusionOPDTrainer:
        teachers = dict(zip("ab", folders, strict=True))
        return family_trainer(
            SD15, tmp_path / name, teachers, train_dataset=data, eval_dataset=data, learning_rate=1e-2, **options
        )

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert relative_difference(snapshot(resumed), snapshot(whole)) == 0
    assert any("eval_loss" in entry or "eval_kl" in entry for entry in whole.state.log_history)


def test_all_weights_and_a_pipeline_as_teacher(tmp_path: Path) -> None:
    family = NOISE_FAMILIES["sd2_v"]
    teacher = family.build()
    with torch.no_grad():
        for parameter in teacher.unet.parameters():
            parameter *= 1.01
    teacher.save_pretrained(tmp_path / "teacher")
    trainer = family_trainer(
        family,
        tmp_path / "student",
        str(tmp_path / "teacher"),
        peft_config=None,
        num_inference_steps=STEPS,
        gradient_checkpointing=True,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "student" / "README.md").read_text()
    assert "unet = UNet2DConditionModel.from_pretrained(" in card and "unet=unet" in card
    assert "pipe.unet = UNet2DConditionModel" in trainer.student.load_line("folder")
    pipeline = family.build()
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "student")
    np.testing.assert_allclose(own_image(family, pipeline), our_image(trainer, family), atol=1e-5)


SDXL = NOISE_FAMILIES["sdxl"]
_OPTIONS: dict[str, Any] = dict(
    **SDXL.kwargs, num_inference_steps=STEPS, guidance_scale=2.0, learning_rate=1e-2, seed=SEED
)


def moved(trainer: Any) -> bool:
    before = {name: weight.clone() for name, weight in snapshot(trainer).items()}
    trainer.train()
    assert all(np.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)
    return relative_difference(snapshot(trainer), before) > 0


@pytest.mark.parametrize("method", ["grpo", "nft", "dmd2", "tdm", "sft of pictures", "sft of a teacher"])
def test_the_other_trainers(method: str, tmp_path: Path) -> None:
    options = {**_OPTIONS, "peft_config": LoraConfig(r=2, target_modules=list(SDXL.lora_targets))}
    options["train_dataset"] = prompts_of(SDXL)
    if method == "grpo":
        trainer = grpo_fixtures.make_trainer(tmp_path, pipeline=SDXL.build(), sampler="flow_sde", **options)
    elif method == "nft":
        options |= {"sampler": "dpm2m", "timestep_sampling": "uniform"}
        trainer = nft_fixtures.make_trainer(tmp_path, SDXL.build(), **options)
    elif method in ("dmd2", "tdm"):
        save_strong_teacher(SDXL, tmp_path / "teacher")
        options |= {"loss_type": method, "pipeline": SDXL.build()}
        trainer = dmd_fixtures.make_trainer(tmp_path / "out", str(tmp_path / "teacher"), **options)
    elif method == "sft of a teacher":
        save_strong_teacher(SDXL, tmp_path / "teacher")
        trainer = sft_trainer(tmp_path / "out", str(tmp_path / "teacher"), SDXL.build(), **options)
    else:
        features = Features({"prompt": Value("string"), "task": Value("string"), "image": Image()})
        rows = {"prompt": list(SDXL.prompts), "task": ["one"] * 2, "image": [picture(0), picture(1)]}
        options["train_dataset"] = Dataset.from_dict(rows, features=features)
        trainer = sft_trainer(tmp_path, pipeline=SDXL.build(), **options)
    assert moved(trainer)


def test_fine_tuning_minimises_the_error_that_the_model_was_trained_with(tmp_path: Path) -> None:
    """The loss of noise prediction, `|eps_hat - eps|²`, from the UNet's own output at a timestep of its schedule."""
    features = Features({"prompt": Value("string"), "task": Value("string"), "image": Image()})
    rows = {"prompt": [PROMPT], "task": ["one"], "image": [picture(0)]}
    options = dict(SD15.kwargs, train_dataset=Dataset.from_dict(rows, features=features), num_inference_steps=STEPS)
    pipeline = SD15.build()
    trainer = sft_trainer(tmp_path, pipeline=pipeline, peft_config=LoraConfig(r=2, target_modules=["to_q"]), **options)
    generator, timestep = torch.Generator().manual_seed(0), 741
    x0 = trainer.velocity_field.encode([picture(0)])
    # Pictures are encoded to level 0, although the grid ends above it.
    pixels = pipeline.image_processor.preprocess([picture(0)], 16, 16)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(x0, latents, rtol=1e-4, atol=1e-4)
    assert trainer.velocity_field.levels[-1] > 0.02

    eps = torch.randn(x0.shape, generator=generator)
    square = pipeline.scheduler.alphas_cumprod[timestep]
    q = torch.tensor([(timestep + 1) / 1000], dtype=torch.float64)
    with torch.no_grad():
        embeds = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
        output = SD15.build().unet(square.sqrt() * x0 + (1 - square).sqrt() * eps, timestep, embeds).sample
        trainer.args.timestep_density = "uniform"
        loss = trainer._flow_loss(trainer.model, x0, eps, q, [PROMPT])
    assert loss.item() == pytest.approx((output - eps).square().mean().item(), rel=1e-3)


def test_the_fake_minimises_the_error_that_the_model_was_trained_with(tmp_path: Path) -> None:
    options = dict(SD15.kwargs, num_inference_steps=STEPS, guidance_scale=1.0, per_device_train_batch_size=1)
    options |= {"pipeline": SD15.build(), "peft_config": LoraConfig(r=2, target_modules=["to_q"])}
    rows = [{"prompt": PROMPT, "task": "one"}]
    trainer = dmd_fixtures.make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), **options)
    trainer.make_sampler()
    drawn, timestep, pipeline = trainer.draw(0, rows), 741, SD15.build()
    square = pipeline.scheduler.alphas_cumprod[timestep].double()
    alpha, sigma = square.sqrt(), (1 - square).sqrt()
    t, eps = (sigma / (alpha + sigma)).reshape(1), torch.randn(drawn.image.shape)
    noisy = ((1 - t) * drawn.image + t * eps).float(), t, eps
    trainer._renoised = lambda *_: noisy
    with torch.no_grad():
        embeds = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
        output = pipeline.unet((alpha * drawn.image + sigma * eps).float(), timestep, embeds).sample
        loss = trainer._fake_loss(trainer.student.model, drawn, [])
    assert loss.item() == pytest.approx((output - eps).square().mean().item(), rel=1e-3)


def test_dry_run_and_retention(tmp_path: Path) -> None:
    save_strong_teacher(SD15, tmp_path / "teacher")
    data = prompts_of(SD15)
    trainer = family_trainer(
        SD15, tmp_path / "student", str(tmp_path / "teacher"), num_inference_steps=STEPS, learning_rate=0.1
    )
    report = trainer.dry_run()
    assert report["memory"]["peak"]["bytes"] > 0 and report["memory"]["unet"]["bytes"] > 0
    trainer.train()
    trainer.save_model()
    scores = evaluate_retention(
        SD15.build(),
        str(tmp_path / "teacher"),
        str(tmp_path / "student"),
        grpo_fixtures.brightness,
        data,
        num_images=2,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        **SD15.kwargs,
    )
    row = scores["tasks"]["one"]
    assert len({round(row[name], 4) for name in ("base", "student", "teacher")}) == 3


def test_a_unet_is_checked_as_a_transformer_is(tmp_path: Path) -> None:
    pipeline = SD15.build()
    pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match=r"The unet's skip connections are scaled .* pipe.disable_freeu"):
        family_trainer(SD15, tmp_path, "base", pipeline)
    pipeline.disable_freeu()
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="adds noise by itself"):
        family_trainer(SD15, tmp_path, "base", pipeline)
