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

"""Nothing that is not finite is saved, pushed or scored, and no option is."""

import math

import pytest
import torch
from helpers.opd_fixtures import make_dataset, make_trainer
from helpers.tiny_sd3 import make_pipeline
from transformers import TrainerCallback

from trl_diffusion_opd import (
    DiffusionDMDConfig,
    DiffusionGRPOConfig,
    DiffusionNFTConfig,
    DiffusionOPDConfig,
    DiffusionSFTConfig,
    evaluate_retention,
)
from trl_diffusion_opd.checkpointing.checkpoint import checkpoints


CONFIGS = [DiffusionDMDConfig, DiffusionGRPOConfig, DiffusionNFTConfig, DiffusionOPDConfig, DiffusionSFTConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_that_is_a_number(config, tmp_path):
    floats = [name for name, value in vars(config(str(tmp_path))).items() if isinstance(value, float)]
    assert {"learning_rate", "weight_decay", "max_grad_norm"} <= set(floats)
    for name in {*floats, "guidance_scale", "beta", "noise_level"} & config.__dataclass_fields__.keys():
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"{name}="):
                config(str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"weight_decay": -0.1},
        {"max_grad_norm": -1.0},
        {"adam_beta2": 1.0},
        {"adam_epsilon": -1e-8},
    ],
)
def test_what_means_nothing_below_zero(given, tmp_path):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"- {name}={value}"):
        DiffusionOPDConfig(str(tmp_path), **given)


class Overflow(TrainerCallback):
    """After an update's step a number is not finite, as where the optimizer's step overflows."""

    def __init__(self, update, of):
        self.update, self.of = update, of

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.update - 1:
            parameter = optimizer.param_groups[0]["params"][0]
            with torch.no_grad():
                if self.of == "weights":
                    parameter.view(-1)[0] = math.inf
                else:
                    optimizer.state[parameter]["exp_avg_sq"].view(-1)[0] = math.inf


@pytest.mark.parametrize("of", ["weights", "moments"])
def test_nothing_that_is_not_finite_is_saved(tmp_path, teachers, of):
    options = dict(max_steps=3, save_strategy="steps", save_steps=1)
    trainer = make_trainer(tmp_path, teachers, callbacks=[Overflow(2, of)], **options)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert "not finite after update 2, such as " in str(error.value)
    assert "checkpoint-1 is complete: start again with resume_from_checkpoint=True" in str(error.value)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    if of == "weights":
        with pytest.raises(FloatingPointError):
            trainer.save_model(str(tmp_path / "saved"))
        assert not (tmp_path / "saved").exists()


def test_pictures_of_nan_are_not_scored(tmp_path, teachers):
    def score(prompts, images, **columns):
        raise AssertionError("black pictures are scored")

    def constant(prompts, images, **columns):  # the report tries its rewards on noise first
        return [0.0] * len(images)

    trainer = make_trainer(tmp_path, teachers, reward_funcs=score, eval_dataset=make_dataset(count=1, draw=1))
    with torch.no_grad():
        trainer.student.parameters()[0].fill_(math.nan)
    with pytest.raises(FloatingPointError) as error:
        trainer.evaluate()
    assert "The student after update 0, task 'count': 1 of 1 images have latents with NaN or infinity" in str(
        error.value
    )
    with pytest.raises(FloatingPointError, match="base, task 'count': "):
        pipeline = make_pipeline()
        with torch.no_grad():
            pipeline.transformer.proj_out.weight.fill_(math.nan)
        options = dict(num_images=1, num_inference_steps=2, guidance_scale=1.0, height=16, width=16)
        options |= dict(max_sequence_length=16, output_dir=str(tmp_path / "report"))
        dataset = make_dataset(count=1)
        evaluate_retention(pipeline, {"count": teachers["count"]}, "base", constant, dataset, **options)


def test_a_vae_that_overflows_is_named(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers)
    with torch.no_grad():
        trainer.base_pipeline.vae.decoder.conv_out.weight.fill_(math.nan)
    field = trainer.evaluator.field
    x = field.initial_latents(["a"], [torch.Generator().manual_seed(0)])
    with pytest.raises(FloatingPointError, match="The VAE computed NaN or infinity"):
        field.decode(x, ["a"])
