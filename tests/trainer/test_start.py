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

"""What a trainer settles and says before its first update: guidance, and the samples of an update."""

import json

import pytest
from helpers import grpo_fixtures, nft_fixtures, opd_fixtures
from helpers.families import FAMILIES
from helpers.family_fixtures import family_trainer
from helpers.opd_fixtures import make_config, make_dataset
from helpers.sft_fixtures import sft_trainer

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.reporting.console import update_line
from trl_diffusion_opd.trainer.memory_estimate import estimate_memory


SD3_DEFAULT = 7.0  # of `StableDiffusion3Pipeline.__call__`
FROM_PIPELINE = f"guidance_scale {SD3_DEFAULT}, the pipeline's own default."


def words(capsys) -> str:
    """What was printed, without its line breaks."""
    return " ".join(capsys.readouterr().out.split())


def test_everything_has_the_pipelines_own_guidance(tmp_path, capsys):
    args = make_config(tmp_path, guidance_scale=None)
    assert args.guidance_scale is None
    teachers = {"count": "base", "draw": TeacherConfig("base", guidance_scale=2.0)}
    trainer = opd_fixtures.make_trainer(tmp_path, teachers, guidance_scale=None)
    assert FROM_PIPELINE in words(capsys)
    assert trainer.args.guidance_scale == trainer.args.evaluation_guidance == trainer.trained_scale == SD3_DEFAULT
    assert [trainer.guidance_scales(task) for task in ("count", "draw")] == [{7.0}, {7.0, 2.0}]
    assert trainer.args.retention_options()["guidance_scale"] == SD3_DEFAULT
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert json.loads((tmp_path / "training_args.json").read_text())["guidance_scale"] == SD3_DEFAULT
    assert "guidance_scale=7.0," in (tmp_path / "README.md").read_text()


def test_a_run_with_the_default_is_one_with_its_number(tmp_path):
    losses, sizes = [], []
    for scale in (None, SD3_DEFAULT, 1.0):
        trainer = opd_fixtures.make_trainer(tmp_path / str(scale), "base", guidance_scale=scale, report_to="none")
        sizes.append(estimate_memory(trainer)["activations"]["bytes"])
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1] != losses[2] and sizes[0] == sizes[1] > sizes[2]


def test_a_resumed_run_compares_numbers(tmp_path, capsys):
    options = dict(save_strategy="steps", save_steps=1)
    opd_fixtures.make_trainer(tmp_path, "base", guidance_scale=None, max_steps=1, **options).train()
    for scale, shown in ((SD3_DEFAULT, False), (None, False), (3.0, True)):
        trainer = opd_fixtures.make_trainer(tmp_path, "base", guidance_scale=scale, max_steps=2, **options)
        capsys.readouterr()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert ("│ guidance_scale │ 7.0" in capsys.readouterr().out) == shown


@pytest.mark.parametrize("rl, scale", [(grpo_fixtures, SD3_DEFAULT), (nft_fixtures, 1.0)])
def test_trainers_with_rewards(rl, scale, tmp_path, capsys):
    options = {} if rl is nft_fixtures else {"guidance_scale": None}
    if rl is nft_fixtures:  # the fixtures' settings name a scale
        assert rl.DiffusionNFTConfig(str(tmp_path)).guidance_scale == 1.0
    trainer = rl.make_trainer(tmp_path, **options)
    assert trainer.args.guidance_scale == scale
    shown = words(capsys)
    assert (FROM_PIPELINE in shown) == (scale != 1.0)
    generations = trainer.args.num_generations
    samples = trainer.args.per_device_train_batch_size
    product = f"1 process x {samples} images x 2 tasks = {2 * samples} samples an update"
    groups = samples // generations
    assert f"{product}: {groups} prompt{'s' * (groups > 1)} x {generations} generations x 2 tasks." in shown


def test_supervised_fine_tuning_is_without_guidance(tmp_path, capsys):
    trainer = sft_trainer(tmp_path, guidance_scale=None)
    assert (trainer.args.guidance_scale, trainer.trained_scale) == (SD3_DEFAULT, 1.0)
    shown = words(capsys)
    assert FROM_PIPELINE in shown and "Training is without guidance" in shown


def test_a_transformer_with_a_guidance_embedding(tmp_path, capsys):
    family = FAMILIES["flux"]
    trainer = family_trainer(family, tmp_path / "a", "base", guidance_scale=4.5, generation_kwargs={})
    shown = words(capsys)
    assert "guidance_scale 4.5: classifier-free guidance (true_cfg_scale), two forwards a step." in shown
    assert "The guidance embedding is 3.5, the pipeline's own default; set it with generation_kwargs=" in shown
    trainer = family_trainer(
        family, tmp_path / "b", "base", guidance_scale=None, generation_kwargs={"guidance_scale": 2}
    )
    shown = words(capsys)
    assert trainer.args.guidance_scale == 1.0
    assert "1.0, the pipeline's own default: no classifier-free guidance (true_cfg_scale), one forward" in shown
    assert "The guidance embedding is 2.0, as given." in shown


def test_samples_of_an_update(tmp_path, capsys):
    trainer = opd_fixtures.make_trainer(
        tmp_path, "base", gradient_accumulation_steps=6, train_dataset=make_dataset(count=6, draw=4)
    )
    assert "1 process x 2 prompts x 2 tasks x 3 micro-batches = 12 samples an update." in words(capsys)
    assert trainer.samples_of_task * 2 == 12


def test_product():
    assert update_line(2, 2, 3, 1) == "2 processes x 2 prompts x 3 tasks = 12 samples an update."
    assert update_line(1, 1, 1, 4) == "1 process x 1 prompt x 1 task x 4 micro-batches = 4 samples an update."
    line = "2 processes x 4 images x 3 tasks x 2 micro-batches = 48 samples an update: 2 prompts x 8 generations x 3 tasks."
    assert update_line(2, 4, 3, 2, num_generations=8) == line
