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

"""Encoders and VAE off the device, embeddings on disk: the same training to the bit, and nothing there that isn't used."""

import json

import pytest
import torch
from accelerate.hooks import CpuOffload
from helpers.nft_fixtures import make_trainer as make_nft_trainer
from helpers.opd_fixtures import first_pixel, make_dataset, make_teachers, make_trainer, snapshot, train_losses
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_pipeline

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.acceleration.offload import Offload, offloaded


pytestmark = pytest.mark.slow


SETTINGS = {"max_steps": 3, "guidance_scale": 3.0, "teacher_guidance_scale": 2.0}


@pytest.fixture
def teachers(tmp_path):
    return make_teachers(tmp_path / "teachers")


class Device:
    """What is on the device by accelerate's hooks, and what was there while the transformer ran."""

    def __init__(self, monkeypatch, pipeline):
        self.names = {id(c): name for name, c in pipeline.components.items() if isinstance(c, torch.nn.Module)}
        self.present, self.beside, self.moves = set(), [], 0
        arrive, leave = CpuOffload.pre_forward, CpuOffload.init_hook

        def pre_forward(hook, module, *args, **kwargs):
            self.moves += self.names[id(module)] not in self.present
            self.present.add(self.names[id(module)])
            return arrive(hook, module, *args, **kwargs)

        def init_hook(hook, module):
            self.present.discard(self.names[id(module)])
            return leave(hook, module)

        monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
        monkeypatch.setattr(CpuOffload, "init_hook", init_hook)
        pipeline.transformer.register_forward_pre_hook(lambda *_: self.beside.append(frozenset(self.present)))


ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}


def test_the_same_training_to_the_bit(tmp_path, teachers):
    plain = make_trainer(tmp_path / "plain", teachers, **SETTINGS)
    plain.train()
    for run in range(2):  # the first fills the folder
        trainer = make_trainer(
            tmp_path / str(run),
            teachers,
            offload_encoders=True,
            prompt_cache_dir=str(tmp_path / "prompts"),
            **SETTINGS,
        )
        trainer.train()
        assert train_losses(trainer) == train_losses(plain)
        for name, weight in snapshot(plain).items():
            assert torch.equal(snapshot(trainer)[name], weight)


@pytest.mark.parametrize(("scale", "teacher_scale"), [(3.0, 2.0), (3.0, 1.0), (1.0, 2.0)])
def test_encoders_are_there_for_the_prompts_of_a_round_and_not_beside_the_transformer(
    tmp_path, teachers, monkeypatch, scale, teacher_scale
):
    pipeline = make_pipeline()
    device = Device(monkeypatch, pipeline)
    scales = {"guidance_scale": scale, "teacher_guidance_scale": teacher_scale}
    trainer = make_trainer(tmp_path, teachers, pipeline, offload_encoders=True, **{**SETTINGS, **scales})
    assert not device.present
    device.beside.clear()
    device.moves = 0
    trainer.train()
    assert len(device.beside) > 3 * 2 * 3 and set(device.beside) == {frozenset()}
    assert 3 <= device.moves <= 3 * 3  # each encoder at most once a round, whatever the number of prompts
    assert not device.present


def test_nothing_arrives_where_all_prompts_are_on_disk(tmp_path, teachers, monkeypatch):
    options = {"offload_encoders": True, "prompt_cache_dir": str(tmp_path / "prompts"), **SETTINGS}
    make_trainer(tmp_path / "first", teachers, **options).train()
    pipeline = make_pipeline()
    device = Device(monkeypatch, pipeline)
    make_trainer(tmp_path / "second", teachers, pipeline, **options).train()
    assert device.moves == 0 and device.beside


def test_the_vae_is_there_for_evaluations_alone(tmp_path, teachers, monkeypatch):
    pipeline = make_pipeline()
    device = Device(monkeypatch, pipeline)
    options = {"eval_dataset": make_dataset(), "reward_funcs": first_pixel, "num_eval_images": 3, **SETTINGS}
    plain = make_trainer(tmp_path / "plain", teachers, **options)
    trainer = make_trainer(tmp_path / "offloaded", teachers, pipeline, offload_encoders=True, **options)
    trainer.train()
    assert not any("vae" in present for present in device.beside[-18:])
    device.beside.clear()
    metrics = trainer.evaluate()
    assert any("vae" in present for present in device.beside)
    assert not device.present
    plain.train()
    expected = plain.evaluate()
    scores = ["eval_count/first_pixel", "eval_draw/first_pixel", "eval_reward"]
    assert all(metrics[name] == expected[name] for name in scores)
    device.beside.clear()
    trainer.pipeline("a cat", height=16, width=16, num_inference_steps=1)
    assert set(device.beside) == {frozenset(ENCODERS)} and not device.present


@pytest.mark.parametrize("make", [make_nft_trainer, sft_trainer])
def test_other_trainers(tmp_path, make):
    losses = []
    for name, options in (
        ("plain", {}),
        ("first", {"offload_encoders": True, "prompt_cache_dir": str(tmp_path / "prompts")}),
        ("second", {"offload_encoders": True, "prompt_cache_dir": str(tmp_path / "prompts")}),
    ):
        trainer = make(tmp_path / name, max_steps=2, **options)
        trainer.train()
        losses.append(train_losses(trainer))
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 2


def test_a_refused_pipeline_is_given_back_without_hooks(tmp_path, teachers):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="task_weights"):
        make_trainer(tmp_path, teachers, pipeline, offload_encoders=True, task_weights={"other": 1.0})
    assert not any("_hf_hook" in c.__dict__ for c in pipeline.components.values() if isinstance(c, torch.nn.Module))
    make_trainer(tmp_path, teachers, pipeline)


def test_what_is_offloaded():
    pipeline = make_pipeline()
    offload = Offload(offloaded(pipeline), torch.device("cpu"))
    assert {n for n, c in pipeline.components.items() if any(c is m for m in offload.modules)} == {*ENCODERS, "vae"}
    offload.remove()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path, teachers):
    (tmp_path / "prompts").touch()
    with pytest.raises(ValueError, match="prompt_cache_dir='.*prompts' can't be created"):
        make_trainer(tmp_path, teachers, prompt_cache_dir=str(tmp_path / "prompts"))


@pytest.mark.parametrize("size", ["50", "a lot", "GB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"prompt_cache_max_size='{size}': it must be a number with a unit"):
        DiffusionOPDConfig(str(tmp_path), prompt_cache_max_size=size, use_cpu=True)


def test_the_folder_is_not_published(tmp_path, teachers):
    trainer = make_trainer(tmp_path / "out", teachers, prompt_cache_dir=str(tmp_path / "some" / "prompts"))
    trainer.save_model(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["prompt_cache_dir"] == "prompts"
