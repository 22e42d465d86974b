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

"""Training from a teacher of another size: what is trained, shown, scored, estimated and resumed."""

import pytest
import torch
from helpers.opd_fixtures import StopAt, first_pixel, make_dataset, make_trainer, relative_difference, snapshot
from helpers.own_pipelines import large_pipeline, save_large
from helpers.tiny_sd3 import SIZE, make_lora

from trl_diffusion_opd import TeacherConfig, estimate_memory
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.pipelines.drawing import DRAWING
from trl_diffusion_opd.pipelines.velocity import VelocityField


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A LoRA on a larger base for one task, that base itself for the other."""
    root = tmp_path_factory.mktemp("own")
    large = save_large(root / "large")
    make_lora(large_pipeline(), root / "lora", seed=1)
    return {"count": TeacherConfig(str(root / "lora"), base=large, guidance_scale=2.0), "draw": large}


@pytest.fixture(scope="module")
def reference():
    """The velocity of the large pipeline, with no part of the package's teachers."""
    return VelocityField(large_pipeline(), num_inference_steps=4, **SIZE)


def test_the_student_is_trained_towards_it(tmp_path, teachers, reference, capsys):
    trainer = make_trainer(tmp_path, teachers, learning_rate=1e-2, max_steps=12, offload_encoders=True)
    assert "The teacher large runs through its own pipeline" in " ".join(capsys.readouterr().out.split())
    field, prompts = trainer.velocity_field, ["draw0", "draw1"]
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])

    @torch.no_grad()
    def gap():
        expected = reference(x, 0.5, prompts, 1.0)
        torch.testing.assert_close(
            trainer.bank.mean_velocity(field, trainer.bank.teachers["draw"], x, 0.5, prompts),
            expected,
            rtol=0,
            atol=1e-5,
        )
        student = field(x, 0.5, prompts, 1.0, trainer.student.model)
        return float(velocity_gap_sq(student, expected).mean())

    before, frozen = gap(), [p.detach().clone() for p in trainer.bank.parameters()]
    trainer.train()
    assert gap() < 0.9 * before
    assert all(torch.equal(p, q) for p, q in zip(frozen, trainer.bank.parameters(), strict=True))


def test_what_is_shown_and_scored_is_its_own_pipelines(tmp_path, teachers, reference):
    trainer = make_trainer(
        tmp_path / "out",
        teachers,
        reward_funcs=first_pixel,
        train_dataset=make_dataset(count=2, draw=2),
        eval_dataset=make_dataset(count=1, draw=1),
        eval_base_and_teachers=True,
    )
    report = trainer.dry_run()
    references = trainer.base_and_teachers.of(trainer.eval_dataset, trainer.state, None)
    lora = make_lora(large_pipeline(), tmp_path / "again", seed=1)
    for task, transformer, scale in (("count", lora, 2.0), ("draw", None, 1.0)):
        (frozen,) = (one for one in trainer.frozen_models(task) if one.name == "teacher")
        generators = sample_generators([DRAWING, trainer.args.seed, trainer.tasks.index(task)], [0])
        grid = trainer.evaluator.field
        velocity = frozen.velocity(grid)
        x = grid.initial_latents([f"{task}0"], generators)
        with torch.no_grad():
            expected = reference(x, 0.7, [f"{task}0"], scale, transformer)
            torch.testing.assert_close(velocity(x, 0.7, [f"{task}0"]), expected, rtol=0, atol=1e-5)
        (score,) = references[task].values()
        shown = next(iter(report["tasks"][task]["rewards"][frozen.caption].values()))
        assert score.teacher == pytest.approx(shown) and score.teacher != score.base
        assert report["tasks"][task]["teachers"][0]["gap_to_base"] > 0.1
    rows = estimate_memory(trainer)
    (own,) = trainer.bank.own_pipelines()
    networks = sum(p.nbytes for p in own.backbone.parameters())
    assert rows["teacher large"]["bytes"] == networks
    encoder = sum(p.nbytes for p in own.pipeline.text_encoder.parameters())
    assert rows["teacher large: text_encoder"]["bytes"] >= encoder
    assert rows["peak"]["bytes"] > networks + encoder


def test_resuming(tmp_path, teachers):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    whole = make_trainer(tmp_path / "whole", teachers, **options)
    whole.train()
    assert "| lora on large |" in (tmp_path / "whole" / "README.md").read_text()  # the model card
    make_trainer(tmp_path / "split", teachers, callbacks=[StopAt(1)], **options).train()
    resumed = make_trainer(tmp_path / "split", teachers, resume_from_checkpoint=True, **options)
    resumed.train(True)
    assert relative_difference(snapshot(resumed), snapshot(whole)) == 0
    other = save_large(tmp_path / "other", seed=6)
    changed = {"count": TeacherConfig(teachers["count"].model_name_or_path, base=other), "draw": teachers["draw"]}
    with pytest.raises(ValueError, match="lora: its base is not the one that the checkpoint was trained with"):
        make_trainer(tmp_path / "split", changed, resume_from_checkpoint=True, **options)
    with pytest.raises(ValueError, match="the teacher of task 'count' has changed"):
        make_trainer(tmp_path / "split", changed, **options).train(str(tmp_path / "split" / "checkpoint-2"))


def test_a_merge_refuses_it(tmp_path, teachers):
    with pytest.raises(ValueError, match="lora on large, runs through a pipeline of its own. Only LoRAs on the"):
        make_trainer(tmp_path, teachers["count"], student_init="merge")
