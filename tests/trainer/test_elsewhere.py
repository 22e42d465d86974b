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
Nothing that is not on the accelerator reaches what is, no float64 reaches it, and no step waits for it: for every family
and every trainer, on an accelerator without values.
"""

from functools import partial

import pytest
import torch
from helpers import grpo_fixtures, nft_fixtures
from helpers.elsewhere import DEVICE, Accelerator, place_parts, trained_elsewhere
from helpers.families import FAMILIES, TRAINED
from helpers.family_fixtures import family_trainer, prompts_of
from helpers.opd_fixtures import make_dataset, make_teachers, make_trainer
from helpers.sft_fixtures import image_dataset, sft_trainer
from peft import LoraConfig

from trl_diffusion_opd.pipelines.velocity import VelocityField


pytestmark = pytest.mark.slow


# HiDream's experts are chosen by values, which there are none of.
VELOCITIES = sorted(FAMILIES.keys() - {*TRAINED, "hidream"})
COUNT = make_dataset(count=4)
# As few forwards as there can be: an operation takes a hundred times as long there.
FEW = dict(ema_decay=0.9, max_steps=1, per_device_train_batch_size=2, sampler="flow_sde")


def _opd(folder, **options):
    teacher = make_teachers(folder)["count"]
    teachers = [teacher, "base"] if "batch_teachers" in options else teacher
    return make_trainer(folder, teachers, train_dataset=COUNT, **{**FEW, **options})


def _sft(folder, **options):
    del options["num_inference_steps"]  # it has no walk
    data = image_dataset().filter(lambda row: row["task"] == "count")
    return sft_trainer(folder, train_dataset=data, **{**FEW, **options})


def _sft_of_teachers(folder, **options):
    return sft_trainer(folder, make_teachers(folder)["count"], train_dataset=COUNT, **{**FEW, **options})


def _grpo(folder, **options):
    return grpo_fixtures.make_trainer(folder, train_dataset=COUNT, num_generations=2, **{**FEW, **options})


def _nft(folder, **options):
    return nft_fixtures.make_trainer(folder, train_dataset=COUNT, **{**FEW, **options})


TRAINERS = {
    "guided": partial(_opd, guidance_scale=4.5),
    "ode": partial(_opd, sampler="ode"),
    "dpm": partial(_opd, sampler="dpm2m"),
    "policy gradient": partial(_opd, loss_type="policy_gradient", beta=0.1),
    "two teachers": partial(_opd, batch_teachers=True),
    "off policy": partial(_opd, on_policy=False, num_trained_timesteps=1, beta=0.1),
    "sft": _sft,
    "sft of teachers": _sft_of_teachers,
    "grpo": partial(_grpo, beta=0.1),
    "nft": partial(_nft, beta=0.1, sampler="ode"),
}


def assert_at_home(accelerator: Accelerator) -> None:
    assert accelerator.mixed == []
    assert accelerator.wide == []


@pytest.mark.parametrize("name", TRAINED)
def test_an_update_of_every_family(name, tmp_path, monkeypatch):
    family = FAMILIES[name]
    trainer = family_trainer(
        family,
        tmp_path,
        "base",
        train_dataset=prompts_of(family, 1),
        peft_config=LoraConfig(r=2, target_modules=list(family.lora_targets), init_lora_weights=False),
        num_inference_steps=2,
        per_device_train_batch_size=1,
        logging_steps=2,
    )
    assert_at_home(trained_elsewhere(trainer, monkeypatch.setattr))
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("name", VELOCITIES)
def test_the_velocity_of_the_others(name):
    family = FAMILIES[name]
    field = VelocityField(family.build(), num_inference_steps=2, **family.kwargs)
    prompts = [family.prompts[0]]
    field.encode_prompts(prompts, [family.guidance_scale])
    place_parts(field)
    with Accelerator() as accelerator:
        x = field.initial_latents(prompts, [torch.Generator().manual_seed(0)])
        velocity = field(x, 0.5, prompts, family.guidance_scale)
    assert velocity.shape == x.shape and velocity.device == DEVICE
    assert_at_home(accelerator)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_update_of_every_trainer(name, tmp_path, monkeypatch):
    waits = []
    for steps in (3, 4):
        with monkeypatch.context() as context:
            trainer = TRAINERS[name](tmp_path / str(steps), num_inference_steps=steps)
            accelerator = trained_elsewhere(trainer, context.setattr)
        assert_at_home(accelerator)
        assert trainer.state.global_step == 1
        waits.append(accelerator.waits)
    assert waits[0] == waits[1], "a longer walk waits more often"


def test_the_accelerator_sees_what_a_gpu_would():
    there, here = torch.zeros(3, device=DEVICE), torch.zeros(3)
    with Accelerator() as accelerator:
        there + 1.0 + torch.tensor(1.0)
        there.copy_(here)
        assert accelerator.mixed == accelerator.wide == accelerator.waits == []
        float(there.sum())
        there.cpu()
        bool((there > 0).any())
        assert len(accelerator.waits) == 3
        there.double()
        here.to(DEVICE, torch.float64)
        assert len(accelerator.wide) == 2
        with pytest.raises(RuntimeError):
            there + here
        assert len(accelerator.mixed) == 1
