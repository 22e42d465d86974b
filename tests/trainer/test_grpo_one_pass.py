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

"""GRPO in one pass: the gradients of two passes with fewer forwards, and what it keeps. And windows that slide."""

import gc
from types import SimpleNamespace

import pytest
import torch
from helpers.grpo_fixtures import brightness, make_config, make_trainer
from helpers.opd_fixtures import Recorder, StopAt, first_pixel, logged, make_dataset, relative_difference, snapshot

from trl_diffusion_opd.profiling.memory import Live
from trl_diffusion_opd.trainer.dry_run_shared import counted
from trl_diffusion_opd.trainer.memory_estimate import activation_bytes


# Two micro-batches of each task, two updates that move the weights.
COMMON = dict(gradient_accumulation_steps=4, sde_window_size=2, learning_rate=1e-3, max_steps=2)


def updates(folder, one_pass, **options):
    """Gradients of two updates, the trainer, and the samples computed by it."""
    recorder = Recorder()
    options = {**COMMON, **options}
    trainer = make_trainer(folder, first_pixel, callbacks=[recorder], one_pass=one_pass, **options)
    with counted([trainer.model, *trainer.frozen_networks()]) as count:
        trainer.train()
    return recorder.gradients, trainer, count


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(peft_config=None, sampler="dance_sde", beta=0.5, task_weights={"count": 1.0, "draw": 3.0}),
        dict(loss_type="grpo_guard", guidance_scale=3.0, gradient_checkpointing=True, beta=0.1),
        dict(loss_type="dppo", bf16=True, sampler="cps", sde_window_size=None, gradient_checkpointing=True),
    ],
)
def test_gradients_are_those_of_two_passes(options, tmp_path):
    two, plain, of_two = updates(tmp_path / "two", False, **options)
    one, trainer, of_one = updates(tmp_path / "one", True, **options)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert sum(float(g.norm()) for g in theirs.values()) > 0
        assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(snapshot(trainer), snapshot(plain)) < 1e-6
    for name in ("loss", "kl", "reward", "ratio/max_deviation", "grad_norm"):
        of_log = [logged(run.state.log_history, name) for run in (trainer, plain)]
        assert of_log[0] == pytest.approx(of_log[1], rel=1e-4, abs=1e-7), name
    # Each trained step is computed once, with gradient.
    assert of_one.backwards == of_two.backwards
    assert of_two.forwards - of_one.forwards == of_two.backwards


def test_what_it_keeps_is_estimated(tmp_path):
    """The graphs of an update wait for its images, and none is left after its backward."""
    options = dict(sde_window_size=2, gradient_accumulation_steps=4, height=32, width=32)
    trainer = make_trainer(tmp_path, brightness, one_pass=True, **options)
    assert trainer.graphs_alive == 8
    graph = (activation_bytes(trainer, "cpu") - activation_bytes(make_trainer(tmp_path, **options), "cpu")) / 7
    batches = [[{"prompt": f"{task}0", "target": 0, "task": task}] * 4 for task in ("count", "draw") * 2]
    kept = []
    for one_pass in (True, False):
        trainer.args.one_pass = one_pass
        gc.collect()
        live = Live()
        live.ignore([*trainer.model.parameters(), *trainer.model.buffers()])
        with live:
            rollouts = trainer.roll_out(batches).rollouts
            gc.collect()
            kept.append(live.now)
            if one_pass:
                for rollout in rollouts:
                    trainer.training_step(trainer.model, rollout)
                del rollout
                for parameter in trainer.student.parameters():
                    parameter.grad = None
                gc.collect()
                freed = live.now
    assert kept[0] - kept[1] == pytest.approx(8 * graph, rel=0.05)
    assert freed == pytest.approx(kept[1], rel=0.1)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_run(tmp_path):
    options = dict(max_steps=4, sde_window_size=2, learning_rate=1e-3, one_pass=True, gradient_checkpointing=True)
    options |= dict(sde_window_schedule="sliding", sde_window_shift_every=2, beta=0.1)
    through = make_trainer(tmp_path / "through", **options)
    through.train()
    make_trainer(tmp_path / "cut", callbacks=[StopAt(3)], **options).train()
    resumed = make_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(ours, snapshot(through)[name]) for name, ours in snapshot(resumed).items())


def test_a_window_slides_to_the_end_and_stays(tmp_path):
    options = dict(num_inference_steps=7, sde_window_size=3, sde_window_range=[1, 6], max_steps=20)
    options |= dict(sde_window_schedule="sliding", sde_window_shift_every=5)
    trainer = make_trainer(tmp_path, num_iterations=4, save_strategy="no", **options)
    seen = []
    for update in range(20):
        trainer.state.global_step = update
        seen.append(list(trainer._window()))
    # The four updates of a round share the window of its first: those of update 4 begin before the fifth is over.
    expected = [min(update // 4 * 4 // 5, 2) for update in range(20)]
    assert seen == [[1 + offset, 2 + offset, 3 + offset] for offset in expected]
    assert expected[0] == 0 and expected[8] == 1 and expected[19] == 2


def test_the_window_in_use_is_the_sliding_one(tmp_path, capsys):
    options = dict(num_inference_steps=6, sde_window_size=2, sde_window_schedule="sliding", sde_window_shift_every=1)
    trainer = make_trainer(tmp_path, max_steps=3, train_dataset=make_dataset(draw=2), **options)
    windows, roll_out = [], trainer.roll_out

    def kept(batches):
        drawn = roll_out(batches)
        windows.extend(list(rollout.record) for rollout in drawn.rollouts)
        return drawn

    trainer.roll_out = kept
    trainer.train()
    assert windows == [[0, 1], [1, 2], [2, 3]]
    assert "one further every 1" in " ".join(capsys.readouterr().out.split())
    trainer.create_model_card()
    assert "2 of 6, moved on by one every 1 updates" in (tmp_path / "README.md").read_text()


CONFIG_PROBLEMS = [
    (
        {"one_pass": True, "num_iterations": 2, "max_steps": 2},
        "one_pass=True with num_iterations=2: .* Set num_iterat",
    ),
    ({"sde_window_schedule": "sliding"}, "sde_window_size=None: the window is the whole range of 3 steps"),
    ({"sde_window_schedule": "sliding", "sde_window_size": 3}, "sde_window_size=3: the window is the whole range"),
    ({"sde_window_schedule": "fixed"}, "sde_window_schedule='fixed': it must be one of random, sliding"),
    (
        {"sde_window_schedule": "sliding", "sde_window_size": 2, "sde_window_shift_every": 0},
        "sde_window_shift_every=0: it must be at least 1",
    ),
    ({"sde_window_shift_every": 10}, "shift_every=10 has no effect with sde_window_schedule='random'"),
    ({"loss_type": "dppo", "divergence_threshold": 0.0}, "divergence_threshold=0.0: it must be positive"),
    ({"divergence_threshold": 1e-4}, "divergence_threshold=0.0001 has no effect with loss_type='flow_grpo'"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_PROBLEMS)
def test_config_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_one_pass_is_refused_under_deepspeed(tmp_path):
    config = make_config(tmp_path, one_pass=True)
    assert config._problems() == []
    config.deepspeed_plugin = SimpleNamespace()
    (problem,) = config._problems()
    assert problem.startswith("one_pass=True is not supported with DeepSpeed")


@pytest.mark.slow
def test_dppo_leaves_out_what_would_go_further(tmp_path):
    """At the first update of a round nothing, at the second what is beyond the threshold, and all with none."""
    options = dict(loss_type="dppo", max_steps=2, num_iterations=2, learning_rate=1e-2)
    shares, weights = [], []
    for threshold in (1e-12, 1e3):
        trainer = make_trainer(tmp_path / str(threshold), divergence_threshold=threshold, **options)
        trainer.train()
        shares.append(logged(trainer.state.log_history, "clip_ratio/region_mean"))
        weights.append(snapshot(trainer))
    assert shares[0][0] == shares[1][0] == shares[1][1] == 0 and 0 < shares[0][1] < 1
    assert relative_difference(*weights) > 1e-4
    trainer.create_model_card()
    assert "dppo, divergence threshold 1000, beta 0" in (tmp_path / "1000.0" / "README.md").read_text()
