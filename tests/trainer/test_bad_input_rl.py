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

"""What the trainers by reward refuse or warn of, and with which words: mistakes beyond those of one config's fields."""

import logging
import math
import re

import pytest
from helpers import grpo_fixtures, nft_fixtures
from helpers.grpo_fixtures import brightness

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionNFTConfig, DiffusionOPDConfig, DiffusionSFTConfig
from trl_diffusion_opd.scripts.arguments import TeacherScriptArguments, configs
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.trainer.option_checks import unknown_option


def test_options_of_another_trainer_and_of_none(tmp_path):
    with pytest.raises(TypeError) as error:
        DiffusionNFTConfig(str(tmp_path), sde_window_size=2, learning_rte=1.0)
    assert str(error.value).splitlines() == [
        "DiffusionNFTConfig has no 'learning_rte'. Did you mean 'learning_rate'?",
        "DiffusionNFTConfig has no 'sde_window_size'.",
    ]
    assert unknown_option(DiffusionNFTConfig, "sde_window_size", configs()) == (
        "DiffusionNFTConfig has no 'sde_window_size'. It is an option of DiffusionGRPOConfig."
    )
    assert unknown_option(DiffusionOPDConfig, "num_iterations", configs()) == (
        "DiffusionOPDConfig has no 'num_iterations'. It is an option of DiffusionGRPOConfig and DiffusionNFTConfig."
    )


@pytest.mark.parametrize("config_class", [DiffusionGRPOConfig, DiffusionNFTConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": math.nan}, "beta=nan: it must be a finite number."),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: it must be a finite number, not negative."),
        ({"noise_level": math.nan, "sampler": "flow_sde"}, "noise_level=nan: it must be a finite number."),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights: nan is not a finite number."),
        *(
            (
                {"advantage_clip": clip},
                f"advantage_clip={clip!r}: it must be a positive number. A large one, such as 1000, clips nothing.",
            )
            for clip in (0.0, -5.0, math.nan, math.inf, None, "5")
        ),
    ],
)
def test_numbers_that_are_none(config_class, options, message, tmp_path):
    with pytest.raises(ValueError) as error:
        config_class(str(tmp_path), use_cpu=True, **options)
    assert str(error.value).splitlines()[1:] == [f"- {message}"]


@pytest.mark.parametrize("make_trainer", [grpo_fixtures.make_trainer, nft_fixtures.make_trainer])
def test_rewards_that_all_weigh_nothing(make_trainer, tmp_path):
    message = "reward_weights=[0.0]: all are 0, so there is nothing to learn. Give one of brightness a weight."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(tmp_path, reward_funcs=brightness, reward_weights=[0.0])


def test_a_reward_that_is_none_everywhere_is_named_once(tmp_path, caplog):
    def nothing(images, **columns):
        return [None] * len(images)

    trainer = grpo_fixtures.make_trainer(tmp_path, [nothing, brightness], max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert (
        caplog.text.count(
            "In update 1 reward 'nothing' was None for every image, so there is nothing to learn from it."
        )
        == 1
    )
    assert "got the same reward from" not in caplog.text


@pytest.mark.parametrize("text", ["url=x", "[1]"])
def test_options_of_rewards_that_are_no_json(text):
    with pytest.raises(ValueError, match=re.escape(f"--reward_kwargs: {text!r} is not a JSON object such as")):
        TeacherScriptArguments(
            model_name_or_path="base", prompts=["a=a.txt"], reward_funcs=["a=ocr"], reward_kwargs=text
        )


def test_an_option_of_another_trainer_on_the_command_line(tmp_path):
    given = ["--model_name_or_path", "base", "--prompts", "a=a.txt", "--reward_funcs", "a=ocr"]
    given += ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    assert parse((TeacherScriptArguments, DiffusionNFTConfig), given)[1].use_cpu
    with pytest.raises(ValueError, match="DiffusionSFTConfig has no 'num_iterations'. It is an option of Diffusion"):
        parse((TeacherScriptArguments, DiffusionSFTConfig), [*given, "--num_iterations", "2"])
