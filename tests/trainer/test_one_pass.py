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

"""What an update accumulates is the gradient of the whole loss, and it costs the forwards that it should."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers.opd_fixtures import Recorder, make_trainer, relative_difference, snapshot
from helpers.three_pass import MicroBatch, Role, ThreePass, load_teacher, three_pass
from helpers.tiny_sd3 import make_transformer
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from trl_diffusion_opd import TeacherConfig


def record_micro_batches(trainer):
    """What `training_step` is given, with positions counted by the test itself."""
    batches, step = [], trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        (task,) = {row["task"] for row in inputs}
        before = sum(len(batch.prompts) for batch in batches if batch.task == task)
        positions = list(range(before, before + len(inputs)))
        batches.append(MicroBatch(task, [row["prompt"] for row in inputs], positions))
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    return batches


def one_update(tmp_path, teachers, **options):
    """Gradients that a whole update of the trainer accumulates (nothing moves at learning rate 0), and its prompts."""
    recorder = Recorder()
    options = {"learning_rate": 0.0, "max_grad_norm": 0.0, **options}
    trainer = make_trainer(tmp_path, teachers, callbacks=[recorder], **options)
    batches = record_micro_batches(trainer)
    trainer.train()
    (gradients,) = recorder.gradients
    return trainer, gradients, batches


CASES = {
    "ode": ({"gradient_accumulation_steps": 4}, {}),
    "flow_sde": ({"sampler": "flow_sde"}, {"sampler": "flow_sde"}),
    # The second-order steps need a few steps before them.
    "dpm2m": ({"sampler": "dpm2m", "num_inference_steps": 7}, {"sampler": "dpm2m", "steps": 7}),
    "task_weights": ({"task_weights": {"draw": 3.0}}, {"task_weights": {"draw": 3.0}}),
    "all_steps": ({"skip_last_steps": 0}, {"skip": 0}),
    "policy_gradient": (
        {"sampler": "flow_sde", "loss_type": "policy_gradient"},
        {"sampler": "flow_sde", "policy_gradient": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_three_passes(case, tmp_path, teachers):
    ours, theirs = CASES[case]
    trainer, gradients, batches = one_update(tmp_path, teachers, **ours)
    assert [batch.task for batch in batches] == ["count", "draw"] * (trainer.args.gradient_accumulation_steps // 2)
    expected = three_pass(trainer, teachers, **theirs).gradients(trainer.model, batches)
    # In the last block the prompt's queries reach nothing, every other factor has a gradient.
    assert all(bool(gradient.any()) != ("blocks.1.attn.add_q_proj" in name) for name, gradient in gradients.items())
    assert relative_difference(gradients, expected) < 1e-5


def test_gradients_with_weighted_teachers_and_base(tmp_path, teachers):
    count, draw = teachers["count"], teachers["draw"]
    specs = {
        "count": [TeacherConfig(count, weight=3.0), TeacherConfig(draw, weight=0.5, guidance_scale=2.0)],
        "draw": [draw, "base"],
    }
    base = make_transformer()
    roles = {
        "count": [Role(load_teacher(count), 3.0), Role(load_teacher(draw), 0.5, 2.0)],
        "draw": [Role(load_teacher(draw)), Role(base)],
    }
    trainer, gradients, batches = one_update(tmp_path, specs, beta=0.5)
    reference = three_pass(trainer, teachers, roles=roles, beta=0.5, base=base)
    assert relative_difference(gradients, reference.gradients(trainer.model, batches)) < 1e-5


class BeyondTheTeachers(ThreePass):
    """The target is 1.5 times as far from the base as the teachers, each seen from the base at its own scale."""

    def _mean_teacher(self, x, t, batch):
        teacher, roles = super()._mean_teacher(x, t, batch), self.teachers[batch.task]
        ofs = [role.weight * self.velocity(self.base, x, t, batch.prompts, role.guidance_scale) for role in roles]
        base = sum(ofs) / sum(role.weight for role in roles)
        return base + 1.5 * (teacher - base)


def test_gradients_beyond_the_teachers(tmp_path, teachers):
    count, draw = teachers["count"], teachers["draw"]
    specs = {
        "count": [TeacherConfig(count, weight=3.0), TeacherConfig(draw, weight=1.0, guidance_scale=2.0)],
        "draw": "base",
    }
    base, recorder = make_transformer(), Recorder()
    roles = {
        "count": [Role(load_teacher(count), 3.0), Role(load_teacher(draw), 1.0, 2.0)],
        "draw": [Role(base)],
    }
    options = dict(teacher_extrapolation=1.5, beta=0.5, learning_rate=0.0, max_grad_norm=0.0)
    trainer = make_trainer(tmp_path, specs, callbacks=[recorder], **options)
    batches, counts = record_micro_batches(trainer), count_forwards(trainer)
    trainer.train()
    # Of each of 3 steps: two teachers, the base at both scales (at one of which `beta` has it too) and the student; then
    # the base as teacher, which is not extrapolated, the base of `beta` and the student. And 2 for the noise floor.
    assert counts["block"] == 3 * (2 + 2 + 1) + 3 * (1 + 1 + 1) + 2
    reference = three_pass(trainer, teachers, roles=roles, beta=0.5, base=base)
    expected = BeyondTheTeachers(**vars(reference)).gradients(trainer.model, batches)
    assert relative_difference(recorder.gradients[0], expected) < 1e-5
    assert relative_difference(recorder.gradients[0], reference.gradients(trainer.model, batches)) > 1e-2


class BothBranches(BeyondTheTeachers):
    """Velocities are (guided, conditional, conditional - unconditional), and the last two are compared."""

    def velocity(self, model, x, t, prompts, scale):
        one, two = (super(BothBranches, self).velocity(model, x, t, prompts, of) for of in (1.0, 2.0))
        return torch.stack([one + (scale - 1) * (two - one), one, two - one])

    def roll_out(self, student, batch, task_index):
        return ThreePass.roll_out(Guided(**vars(self)), student, batch, task_index)

    def _gap(self, j, v, target, x, x_next):
        conditional, direction = (v[1:] - target[1:]).square().flatten(1).mean(1)
        return self.weights[j] * (conditional + 0.25 * direction)


class Guided(BothBranches):
    def velocity(self, *inputs):
        return super().velocity(*inputs)[0]


def test_gradients_of_both_branches(tmp_path, teachers):
    recorder = Recorder()
    options = dict(guidance_branch_weight=0.25, guidance_scale=3.0, teacher_extrapolation=1.5)
    quiet = dict(learning_rate=0.0, max_grad_norm=0.0)
    trainer = make_trainer(tmp_path, teachers, callbacks=[recorder], **options, **quiet)
    batches, counts = record_micro_batches(trainer), count_forwards(trainer)
    trainer.train()
    assert counts["block"] == 2 * 3 * 3 + 2  # no more than of guided velocities: teacher, base, student; noise floor
    reference = three_pass(trainer, teachers, guidance_scale=3.0, base=make_transformer())
    ours, theirs = recorder.gradients[0], BothBranches(**vars(reference))
    assert relative_difference(ours, theirs.gradients(trainer.model, batches)) < 1e-5
    guided = BeyondTheTeachers(**vars(reference)).gradients(trainer.model, batches)
    assert relative_difference(ours, guided) > 1e-2


class AlongTheTeacher(ThreePass):
    """The states are those of the teacher's own trajectory."""

    def roll_out(self, student, batch, task_index):
        (role,) = self.teachers[batch.task]
        return super().roll_out(role.model, batch, task_index)


@pytest.mark.parametrize("sampler", ["ode", "flow_sde"])
def test_gradients_off_policy(sampler, tmp_path, teachers):
    options = {"sampler": sampler, "gradient_accumulation_steps": 4}
    trainer, gradients, batches = one_update(tmp_path, teachers, on_policy=False, **options)
    reference = three_pass(trainer, teachers, sampler=sampler)
    expected = AlongTheTeacher(**vars(reference)).gradients(trainer.model, batches)
    assert relative_difference(gradients, expected) < 1e-5
    # Their states differ from those of the student's trajectory by more than rounding.
    assert relative_difference(gradients, reference.gradients(trainer.model, batches)) > 1e-2


def test_forwards_off_policy(tmp_path, teachers):
    trainer = make_trainer(
        tmp_path,
        teachers,
        on_policy=False,
        num_inference_steps=7,
        num_trained_timesteps=2,
        logging_steps=10,
        max_steps=3,
    )
    counts, per_update = count_forwards(trainer), []
    trainer.add_callback(CountPerUpdate(counts, per_update))
    drawn, draw = [], trainer._drawn_steps
    trainer._drawn_steps = lambda: drawn.append(draw()) or drawn[-1]
    trainer.train()
    for update, steps in enumerate(drawn[::2]):
        # The teacher walks, and the student is asked where it is trained.
        floor, walked = (2 if update == 0 else 0), max(steps) + 1
        assert per_update[update] == {"default": 2 * 2 + floor, "teacher_0": walked, "teacher_1": walked}


def count_forwards(trainer):
    """Counts what runs from now on: the transformer's forwards by adapter, and those of its first block."""
    transformer = trainer.model.base_model.model
    layer = next(module for module in transformer.modules() if isinstance(module, LoraLayer))
    counts = Counter()
    transformer.register_forward_hook(lambda *_: counts.update(layer.active_adapters))
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: counts.update(["block"]))
    return counts


def test_gradients_with_checkpointing_and_guidance(tmp_path, teachers):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        teachers,
        callbacks=[recorder],
        learning_rate=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=True,
        guidance_scale=3.0,
        teacher_guidance_scale=1.5,
    )
    batches, counts = record_micro_batches(trainer), count_forwards(trainer)
    trainer.train()
    # 2 micro-batches of 3 steps: teacher, student, and the student again in the backward pass, when the teachers'
    # adapters must be off again; and 2 for the noise floor.
    assert counts["block"] == 2 * 3 * 3 + 2
    roles = {task: [Role(load_teacher(folder), guidance_scale=1.5)] for task, folder in teachers.items()}
    expected = three_pass(trainer, teachers, roles=roles, guidance_scale=3.0).gradients(trainer.model, batches)
    assert relative_difference(recorder.gradients[0], expected) < 1e-5


def test_forwards_of_an_update(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, num_inference_steps=6, skip_last_steps=2, logging_steps=10, max_steps=2)
    counts, per_update = count_forwards(trainer), []
    trainer.add_callback(CountPerUpdate(counts, per_update))
    trainer.train()
    # Six steps of which four are trained: the walk stops after the fourth. Two tasks, each with its own teacher. The
    # noise floor is measured in the first of ten updates.
    assert per_update[0] == {"default": 2 * 4 + 2, "teacher_0": 4, "teacher_1": 4}
    assert per_update[1] == {"default": 2 * 4, "teacher_0": 4, "teacher_1": 4}


def test_forwards_with_few_trained_steps(tmp_path, teachers):
    updates = 5
    trainer = make_trainer(
        tmp_path, teachers, num_inference_steps=7, num_trained_timesteps=2, logging_steps=10, max_steps=updates
    )
    counts, per_update = count_forwards(trainer), []
    trainer.add_callback(CountPerUpdate(counts, per_update))
    drawn, draw = [], trainer._drawn_steps
    trainer._drawn_steps = lambda: drawn.append(draw()) or drawn[-1]
    trainer.train()
    first_of_update = drawn[::2]
    assert first_of_update == drawn[1::2]  # all tasks train the same steps
    assert len({tuple(steps) for steps in first_of_update}) > 1
    for update, steps in enumerate(first_of_update):
        assert len(steps) == 2
        # No teacher on a step that is not trained, and nothing after the last one that is.
        floor = 2 if update == 0 else 0
        assert per_update[update] == {"default": 2 * (max(steps) + 1) + floor, "teacher_0": 2, "teacher_1": 2}


class CountPerUpdate(TrainerCallback):
    def __init__(self, counts, per_update):
        self.counts, self.per_update = counts, per_update

    def on_step_end(self, args, state, control, **kwargs):
        self.per_update.append({name: n for name, n in self.counts.items() if name != "block"})
        self.counts.clear()


def test_gradients_are_synced_once_an_update(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, gradient_accumulation_steps=4, max_steps=2)
    accelerator, backward, no_sync = trainer.accelerator, trainer.accelerator.backward, trainer.accelerator.no_sync
    depth, synced = 0, []

    @contextmanager
    def counting_no_sync(model):
        nonlocal depth
        depth += 1
        with no_sync(model):
            yield
        depth -= 1

    def counting_backward(loss, **options):
        # DeepSpeed goes by the flag, DDP and FSDP by the context.
        flag = accelerator.gradient_state.sync_gradients
        assert flag == (depth == 0)
        synced.append(flag)
        backward(loss, **options)

    accelerator.no_sync, accelerator.backward = counting_no_sync, counting_backward
    trainer.train()
    of_update = [False] * (4 * 3 - 1) + [True]
    assert synced == of_update * 2
    assert accelerator.gradient_state.sync_gradients


def test_learning_rate_zero_moves_nothing(tmp_path, teachers):
    # The comparisons above rest on it.
    trainer = make_trainer(tmp_path, teachers, learning_rate=0.0)
    before = snapshot(trainer)
    trainer.train()
    assert relative_difference(snapshot(trainer), before) == 0
