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

"""What OPD teaches besides its teachers' guided velocity: refusals, warnings, the card, and the loss on fixed states."""

import pytest
import torch
from datasets import Dataset
from helpers.families import FAMILIES
from helpers.family_fixtures import family_trainer
from helpers.opd_fixtures import make_dataset, make_trainer

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.algorithms.rollout import FIXED_DRAW, sample_generators


GUIDED = dict(guidance_scale=3.0, guidance_branch_weight=1.0)


def refusal(make, *arguments, **options):
    with pytest.raises(ValueError, match="cannot start") as caught:
        make(*arguments, **options)
    return str(caught.value)


def test_branches_are_refused_where_there_are_none(teachers, tmp_path):
    alone = refusal(make_trainer, tmp_path, teachers, guidance_branch_weight=1.0, guidance_scale=1.0)
    assert "guidance_branch_weight=1.0 with guidance_scale=1.0: without guidance the student" in alone
    other = {"count": TeacherConfig(teachers["count"], guidance_scale=1.0), "draw": teachers["draw"]}
    message = refusal(make_trainer, tmp_path, other, **GUIDED)
    assert "The student's is 3.0, but count of task 'count' has 1.0." in message and "draw of" not in message
    # Qwen-Image gives the guided velocity the norm of the one with the prompt.
    message = refusal(family_trainer, FAMILIES["qwen_image"], tmp_path, "base", guidance_branch_weight=1.0)
    assert "QwenImagePipeline does not compute guidance as v_u + scale (v_c - v_u)" in message


def test_far_beyond_the_teachers_is_warned_of_and_on_the_card(teachers, tmp_path, caplog):
    trainer = make_trainer(tmp_path, teachers, teacher_extrapolation=2.0, **GUIDED)
    assert "teacher_extrapolation=2.0 is far beyond the teachers" in caplog.text
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2 times as far from the base as the teachers" in card and "matched, weight 1" in card
    caplog.clear()
    make_trainer(tmp_path, teachers, teacher_extrapolation=1.5)
    assert "beyond" not in caplog.text


def test_loss_on_fixed_states(teachers, tmp_path):
    """Against the walk of a teacher, written out; the teachers are asked in the first evaluation only."""
    dataset = make_dataset(count=3, draw=1)
    trainer = make_trainer(
        tmp_path,
        teachers,
        student_init=teachers["count"],
        peft_config="default",
        eval_dataset=dataset,
        teacher_extrapolation=1.25,
    )
    by_adapter = []
    trainer.model.register_forward_pre_hook(lambda *_: by_adapter.append(trainer.bank.backbone.active))
    first = trainer.evaluate()
    asked = list(by_adapter)
    by_adapter.clear()
    second = trainer.evaluate()
    # Twice a task: 4 steps of the teacher's walk and 3 noised levels, of teacher and base.
    assert len(asked) - len(by_adapter) == 2 * 2 * (4 + 3)
    field, plan = trainer.velocity_field, trainer.plan
    levels = plan.table.levels.tolist()
    for index, task in enumerate(("count", "draw")):
        name = f"eval_fixed_kl/{task}"
        assert first[name] == second[name] > 0
        prompts = ["count0", "count1"] if task == "count" else ["draw0", "draw0"]
        generators = sample_generators([trainer.args.seed, FIXED_DRAW, index], range(2))
        x = field.initial_latents(prompts, generators)
        (role,) = trainer.bank.teachers[task]

        @torch.no_grad()
        def velocities(x, t, role=role, prompts=prompts):
            with trainer.bank.use(role) as network:
                teacher = field(x, t, prompts, 1.0, network)
            with trainer.bank.use(None) as network:
                base = field(x, t, prompts, 1.0, network)
            return base + 1.25 * (teacher - base), field(x, t, prompts, 1.0, trainer.student.model)

        total, start = 0.0, x
        for j, t in enumerate(levels[:-1]):
            target, student = velocities(x, t)
            if j < 3:
                total += float(plan.kl_weights[j]) * float((target - student).square().mean())
            x = x + (levels[j + 1] - t) * target
        noise = torch.cat([torch.randn(1, *start.shape[1:], generator=generator) for generator in generators])
        for j, t in enumerate(levels[:3]):
            target, student = velocities((1 - t) * x + t * noise, t)
            total += float(plan.kl_weights[j]) * float((target - student).square().mean())
        assert first[name] == pytest.approx(total / 6, rel=1e-4)


def test_fixed_states_of_a_student_that_teaches_itself_are_its_bases(teachers, tmp_path):
    """Its own would move with it. They are on what the teacher reads."""
    rows = [{"prompt": f"{task}0", "task": task, "teacher_prompt": f"{task} blue"} for task in ("count", "draw")] * 2
    data = Dataset.from_list(rows)
    specs = {"count": "student", "draw": teachers["draw"]}
    trainer = make_trainer(tmp_path, specs, train_dataset=data, eval_dataset=data)
    trainer.evaluate()
    states = trainer._fixed_states["count", "count blue", "count blue"]
    field, roles = trainer.velocity_field, trainer.bank.teachers["draw"]
    with torch.no_grad(), trainer.bank.use(None) as network:
        base = field(states.start, float(field.levels[0]), ["count blue"] * 2, 1.0, network)
    torch.testing.assert_close(states.on_trajectories[0], base)
    states = trainer._fixed_states["draw", "draw blue", "draw blue"]
    with torch.no_grad():
        teacher = trainer.bank.velocity(field, roles[0], states.start, float(field.levels[0]), ["draw blue"] * 2)
    torch.testing.assert_close(states.on_trajectories[0], teacher)
