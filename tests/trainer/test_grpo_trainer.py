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

"""GRPO through the tiny pipeline: groups, gradients of an update, rewards, resume, and what is refused."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.grpo_fixtures import brightness, make_config, make_trainer
from helpers.noise_grids import sd3_levels
from helpers.opd_fixtures import (
    Recorder,
    StopAt,
    first_pixel,
    logged,
    make_dataset,
    relative_difference,
    snapshot,
    student_lora,
)
from helpers.three_pass import MicroBatch, ThreePass
from helpers.tiny_sd3 import make_pipeline, make_transformer
from torch.distributions import Normal

from trl_diffusion_opd import DiffusionGRPOConfig, DiffusionOPDConfig, DiffusionOPDTrainer
from trl_diffusion_opd.rewards import Reward


def record_rounds(trainer):
    """What is rolled out, and what every optimizer step trains on."""
    rounds, steps, roll_out, step = [], [], trainer.roll_out, trainer.training_step

    def keep(drawn):
        rounds.append(drawn.rollouts)
        return drawn

    trainer.roll_out = lambda batches: keep(roll_out(batches))
    trainer.training_step = lambda model, inputs, n: steps.append(inputs) or step(model, inputs, n)
    return rounds, steps


# The gradient of a whole update


LEVELS = sd3_levels(4)


def flow_sde_step(v, x, j, eta=0.7):
    """Mean and standard deviation of a step of Flow-GRPO."""
    t, dt = LEVELS[j], LEVELS[j + 1] - LEVELS[j]
    sigma = eta * math.sqrt(t / (1 - min(t, LEVELS[1])))
    return x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt, sigma * math.sqrt(-dt)


def expected_gradients(trainer, rounds, window, loss_type, beta, task_weights):
    """From the equations and the transformer's own forward. The rewards are those of `first_pixel`."""
    pipeline, base = make_pipeline(), make_transformer()
    reference = ThreePass(pipeline, [], [], [], {}, seed=trainer.args.seed)
    student, tasks = trainer.model, ["count", "draw"]
    groups: dict[str, list] = {task: [] for task in tasks}
    for batch in rounds:
        generators = []
        for position in batch.positions:
            entropy = np.random.SeedSequence([trainer.args.seed, 0, tasks.index(batch.task), position])
            generators.append(torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0])))
        x = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        steps = []
        for j in range(4):
            with torch.no_grad():
                v = reference.velocity(student, x, LEVELS[j], batch.prompts, 1.0)
            if j in window:
                mean, s = flow_sde_step(v, x, j)
                noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
                steps.append((j, x, mean + s * noise))
                x = steps[-1][2]
            else:
                x = x + (LEVELS[j + 1] - LEVELS[j]) * v
        vae = pipeline.vae
        with torch.no_grad():
            images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        images = pipeline.image_processor.postprocess(images)
        target = [int(prompt[-1]) for prompt in batch.prompts]
        groups[batch.task].append((batch, steps, first_pixel(None, images, None, target, None)))
    loss = 0.0
    for task in tasks:
        rewards = torch.tensor([reward for *_, of_batch in groups[task] for reward in of_batch], dtype=torch.float64)
        per_prompt = rewards.view(-1, 4)
        assert per_prompt.std(1).min() > 0
        advantages = (per_prompt - per_prompt.mean(1, keepdim=True)) / (per_prompt.std(1, keepdim=True) + 1e-4)
        for i, (batch, steps, _) in enumerate(groups[task]):
            share = task_weights[task] / sum(task_weights.values()) / len(groups[task]) / len(steps)
            own = advantages.flatten()[4 * i : 4 * i + 4]
            for j, x, x_next in steps:
                mean, s = flow_sde_step(reference.velocity(student, x, LEVELS[j], batch.prompts, 1.0), x, j)
                log_r = Normal(mean, s).log_prob(x_next).double()
                log_r = (log_r - log_r.detach()).flatten(1).mean(1)
                factor = 1.0
                if loss_type == "grpo_guard":
                    log_r, factor = s * log_r, 1 / (LEVELS[j] - LEVELS[j + 1])
                with torch.no_grad():
                    v_base = reference.velocity(base, x, LEVELS[j], batch.prompts, 1.0)
                    mean_base, _ = flow_sde_step(v_base, x, j)
                kl = ((mean - mean_base) ** 2).flatten(1).mean(1) / (2 * s**2)
                loss = loss + share * (beta * kl - factor * log_r.exp() * own).mean()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "loss_type", "beta", "weights"),
    [
        (range(3), "flow_grpo", 0.0, {"count": 1.0, "draw": 1.0}),
        (range(3), "grpo_guard", 0.0, {"count": 1.0, "draw": 1.0}),
        (range(1, 3), "flow_grpo", 0.5, {"count": 1.0, "draw": 3.0}),
    ],
)
def test_gradients_of_an_update(window, loss_type, beta, weights, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        first_pixel,
        callbacks=[recorder],
        learning_rate=0.0,
        max_grad_norm=0.0,
        gradient_accumulation_steps=4,
        sde_window_range=[window.start, window.stop],
        loss_type=loss_type,
        beta=beta,
        task_weights=weights,
    )
    assert trainer.table.levels.tolist() == pytest.approx(LEVELS, abs=1e-6)
    rounds, _ = record_rounds(trainer)
    trainer.train()
    batches = [MicroBatch(rollout.task, rollout.prompts, rollout.positions) for rollout in rounds[0]]
    assert [(batch.task, batch.positions[0]) for batch in batches] == [
        ("count", 0),
        ("draw", 0),
        ("count", 4),
        ("draw", 4),
    ]
    expected = expected_gradients(trainer, batches, window, loss_type, beta, weights)
    assert relative_difference(recorder.gradients[0], expected) < 1e-5
    assert logged(trainer.state.log_history, "ratio/max_deviation") == [0]


# Groups and rounds


@pytest.mark.slow
def test_every_prompt_has_its_group(tmp_path):
    """6 and 4 prompts; 3 prompts of each task a round of 12 completions, in micro-batches that cut groups."""
    trainer = make_trainer(
        tmp_path, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=2, gradient_accumulation_steps=12
    )
    rounds, _ = record_rounds(trainer)
    trainer.train()
    assert trainer.state.global_step == len(rounds) == 4
    epochs = []
    for rollouts in rounds:
        assert [rollout.task for rollout in rollouts] == ["count", "draw"] * 6
        prompts = [prompt for rollout in rollouts[::2] for prompt in rollout.prompts]
        assert [position for rollout in rollouts[::2] for position in rollout.positions] == list(range(12))
        assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)]
        epochs.append(prompts[::4])
        advantages = torch.cat([rollout.advantages for rollout in rollouts[::2]]).view(3, 4)
        assert torch.allclose(advantages.mean(1), torch.zeros(3), atol=1e-5)
        assert torch.allclose(advantages.std(1), torch.ones(3), atol=0.1)
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == [f"count{i}" for i in range(6)]
    latents = torch.cat([rollout.latents for rollouts in rounds for rollout in rollouts]).flatten(1)
    assert len({tuple(row.tolist()) for row in latents}) == len(latents)


@pytest.mark.slow
def test_micro_batches_of_another_size_give_the_same(tmp_path):
    trainers = []
    for size, accumulation in ((4, 4), (2, 8)):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-3)
        trainers.append(make_trainer(tmp_path / str(size), max_steps=2, **options))
        trainers[-1].train()
    assert logged(trainers[0].state.log_history, "rewards/brightness/mean") == pytest.approx(
        logged(trainers[1].state.log_history, "rewards/brightness/mean"), rel=1e-4
    )
    assert relative_difference(snapshot(trainers[0]), snapshot(trainers[1])) < 1e-3


@pytest.mark.slow
def test_several_updates_on_a_round(tmp_path):
    """The ratio is 1 at the first update and not after it, and the completions are drawn once."""
    calls = []

    def counted(images, **columns):
        calls.append(len(images))
        return brightness(images)

    trainer = make_trainer(tmp_path, counted, max_steps=4, num_iterations=2, learning_rate=1e-3, epsilon=1e-6)
    rounds, steps = record_rounds(trainer)
    trainer.train()
    assert len(rounds) == 2 and calls == [2] * 2 + [4] * 4  # first the reward is tried, once a task
    assert [id(rollout) for rollout in steps] == [id(r) for rollouts in rounds for _ in range(2) for r in rollouts]
    deviations, clipped = (
        logged(trainer.state.log_history, "ratio/max_deviation"),
        logged(trainer.state.log_history, "clip_ratio/region_mean"),
    )
    assert deviations[0] <= 1e-6 and deviations[2] <= 1e-6
    assert deviations[1] > 1e-6 and deviations[3] > 1e-6
    assert clipped[0] == clipped[2] == 0 and min(clipped[1], clipped[3]) > 0
    assert rounds[0][0].prompts != rounds[1][0].prompts


@pytest.mark.slow
def test_ratio_is_one_with_checkpointing_and_guidance(tmp_path):
    trainer = make_trainer(tmp_path, guidance_scale=3.0, gradient_checkpointing=True, learning_rate=1e-3, max_steps=2)
    trainer.train()
    assert max(logged(trainer.state.log_history, "ratio/max_deviation")) <= 1e-6


@pytest.mark.slow
def test_window_is_drawn_for_every_round(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=12, num_iterations=2, num_inference_steps=6, sde_window_size=2, sde_window_range=[1, 5]
    )
    rounds, _ = record_rounds(trainer)
    trainer.train()
    windows = [tuple(rollout.record) for rollouts in rounds for rollout in rollouts]
    assert set(windows) <= {(1, 2), (2, 3), (3, 4)} and len(set(windows)) > 1
    assert all(windows[i] == windows[i + 1] for i in range(0, len(windows), 2))  # both tasks alike


@pytest.mark.parametrize(("sampler", "steps"), [("flow_sde", 3), ("dance_sde", 3), ("cps", 2)])
def test_steps_without_enough_noise_are_left_out(sampler, steps, tmp_path):
    trainer = make_trainer(tmp_path, sampler=sampler, learning_rate=1e-3)
    rounds, _ = record_rounds(trainer)
    before = snapshot(trainer)
    trainer.train()
    assert list(rounds[0][0].record) == list(range(steps))
    assert 0 < relative_difference(snapshot(trainer), before) < 1


# Rewards


def darkness(images, **columns):
    return [255 - value for value in brightness(images)]


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "loss_type"), [(brightness, "flow_grpo"), (darkness, "grpo_guard")])
def test_a_toy_reward_rises(reward, loss_type, tmp_path):
    """All weights are trained: a LoRA on the attention of this tiny model hardly reaches the brightness."""
    trainer = make_trainer(
        tmp_path,
        reward,
        loss_type=loss_type,
        per_device_train_batch_size=32,
        num_generations=16,
        max_steps=10,
        learning_rate=1e-2,
        train_dataset=make_dataset(draw=2),
        peft_config=None,
    )
    trainer.train()
    rewards = logged(trainer.state.log_history, f"rewards/{reward.__name__}/mean")
    assert np.mean(rewards[-2:]) > rewards[0] + 2 * np.mean(logged(trainer.state.log_history, "reward_std"))
    assert logged(trainer.state.log_history, "reward") == rewards
    assert logged(trainer.state.log_history, "frac_reward_zero_std") == [0] * 10


@pytest.mark.parametrize(("clip", "share"), [(5.0, 0.0), (0.5, 0.5), (0.01, 1.0)])
def test_advantages_are_clipped(clip, share, tmp_path):
    """Groups of 4 whose rewards are 0, 1, 2 and 3: advantages of about ±1.16 and ±.39."""

    def rank(images, **columns):
        return list(range(len(images)))

    trainer = make_trainer(tmp_path, rank, advantage_clip=clip)
    rounds, _ = record_rounds(trainer)
    trainer.train()
    advantages = torch.cat([rollout.advantages for rollout in rounds[0]])
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5] * 2) / (math.sqrt(5 / 3) + 1e-4)
    assert torch.allclose(advantages, expected.clamp(-clip, clip), atol=1e-6)
    assert logged(trainer.state.log_history, "clip_ratio/advantages") == [share]


class Half(Reward):
    """Applies to every second completion."""

    name = "half"
    bounds = (0.0, 1.0)

    def __call__(self, prompts, images, completions=None, trainer_state=None, **columns):
        return [value if i % 2 else None for i, value in enumerate(brightness(images))]


def nothing(images, **columns):
    return [None] * len(images)


def test_rewards_that_do_not_apply_are_left_out(tmp_path):
    trainer = make_trainer(tmp_path, {"count": Half(), "draw": [nothing, brightness]}, reward_weights=[1.0, 5.0, 2.0])
    assert trainer.reward_weights == {"half": 1.0, "nothing": 5.0, "brightness": 2.0}
    rounds, _ = record_rounds(trainer)
    trainer.train()
    count, draw = (rollout.advantages for rollout in rounds[0])
    assert count[::2].tolist() == [0, 0] and (count[1::2] != 0).all()
    assert (draw != 0).all()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "rewards/nothing/mean" not in entry
    assert entry["reward/draw"] == pytest.approx(2 * entry["rewards/brightness/mean"])


@pytest.mark.slow
def test_several_rewards_are_weighted_or_normalised_first(tmp_path):
    def scaled_darkness(images, **columns):
        return [1000 * value for value in darkness(images)]

    seen = {}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        trainer = make_trainer(
            tmp_path / aggregation,
            [brightness, scaled_darkness],
            reward_weights=[2.0, 1.0],
            multi_objective_aggregation=aggregation,
            train_dataset=make_dataset(draw=2),
        )
        rounds, _ = record_rounds(trainer)
        trainer.train()
        images = [trainer.velocity_field.decode(r.latents, r.prompts) for r in rounds[0]]
        bright = torch.tensor(brightness(images[0]))
        seen[aggregation] = torch.corrcoef(torch.stack([bright, rounds[0][0].advantages]))[0, 1]
    assert seen["sum_then_normalize"] < -0.99  # a thousand times as large
    assert seen["normalize_then_sum"] > 0.99  # twice the weight


@pytest.mark.slow
def test_a_constant_reward_is_named_once(tmp_path, caplog):
    def always_one(images, **columns):
        return [1.0] * len(images)

    def watched(images, **columns):
        return [0.0] * len(images)

    rewards = {"count": [always_one], "draw": [always_one, brightness, watched]}
    trainer = make_trainer(tmp_path, rewards, max_steps=3, reward_weights=[1.0, 1.0, 0.0])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [record.message for record in caplog.records if "got the same reward from" in record.message]
    assert "In update 1 every image of each prompt got the same reward from 'always_one'" in message
    assert logged(trainer.state.log_history, "frac_reward_zero_std") == [0.5] * 3


def test_columns_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, first_pixel, eval_dataset=make_dataset(count=2, draw=1))
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_count/first_pixel", "eval_draw/first_pixel", "eval_reward"} <= metrics.keys()


# The base


@pytest.mark.slow
def test_kl_to_the_base(tmp_path):
    options = dict(max_steps=3, learning_rate=1e-2, beta=0.1)
    trainer = make_trainer(tmp_path, peft_config=student_lora(init_lora_weights="gaussian"), **options)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    kl = logged(trainer.state.log_history, "kl")
    assert kl[0] == 0 and kl[2] > 0
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[name]) for name, p in base.items())


def test_full_fine_tuning_with_a_frozen_base(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=None, max_steps=2, learning_rate=1e-3, beta=0.1)
    trainer.train()
    kl = logged(trainer.state.log_history, "kl")
    assert kl[0] == 0 and kl[1] > 0
    assert logged(trainer.state.log_history, "ratio/max_deviation") == [0, 0]


# Resume and files


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_run(tmp_path):
    options = dict(
        max_steps=6, num_iterations=2, learning_rate=1e-3, sde_window_size=2, ema_decay=0.9, lr_scheduler_type="cosine"
    )
    through = make_trainer(tmp_path / "through", **options)
    through.train()
    make_trainer(tmp_path / "cut", callbacks=[StopAt(4)], **options).train()
    resumed = make_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    ours, theirs = snapshot(resumed), snapshot(through)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(resumed.state.log_history, "reward") == logged(through.state.log_history, "reward")


@pytest.mark.slow
def test_the_middle_of_a_round_is_not_resumed_from(tmp_path):
    options = dict(max_steps=6, num_iterations=2)
    make_trainer(tmp_path, callbacks=[StopAt(3)], **options).train()
    with pytest.raises(ValueError, match="middle of a round: update 3 with num_iterations=2.* multiple of 2"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)


def test_card(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, num_generations=4)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "GRPO" in card and "https://huggingface.co/papers/2505.05470" in card
    assert "count: brightness x 1; draw: brightness x 1" in card
    assert "4 completions a prompt" in card and "flow_grpo, epsilon 0.0001, beta 0.1" in card
    make_pipeline().load_lora_weights(str(tmp_path))


# What is refused


CONFIG_PROBLEMS = [
    ({"num_generations": 1}, "num_generations=1: .* it must be at least 2"),
    ({"sampler": "ode"}, "the steps of sampler='ode' have none: choose flow_sde, dance_sde, cps"),
    ({"sampler": "dpm2m"}, "the steps of sampler='dpm2m' have none"),
    ({"sampler": "ddim"}, "the steps of sampler='ddim' have none"),
    ({"noise_level": 0}, "noise_level=0: without noise"),
    ({"epsilon": 0.0}, "epsilon=0.0: it must be between 0 and 1"),
    ({"beta": -1.0}, "beta=-1.0 is negative"),
    ({"loss_type": "ppo"}, "loss_type='ppo': it must be one of flow_grpo, grpo_guard"),
    ({"scale_rewards": "std"}, "scale_rewards='std': it must be one of group, batch, none"),
    ({"num_iterations": 0}, "num_iterations=0: it must be at least 1"),
    ({"num_iterations": 2, "max_steps": 5}, "max_steps=5 with num_iterations=2 ends in the middle of a round"),
    (
        {"num_iterations": 3, "max_steps": 6, "save_strategy": "steps", "save_steps": 100},
        "save_steps=100 with num_iterations=3 .* such as 99",
    ),
    ({"sde_window_range": [2, 9]}, r"sde_window_range=\[2, 9\]: .* of the 4 steps"),
    ({"sde_window_size": 4}, "sde_window_size=4: the range of windows has 3 steps"),
    ({"num_inference_steps": 1}, "num_inference_steps=1 leaves no step to train"),
]


@pytest.mark.parametrize(("options", "message"), CONFIG_PROBLEMS)
def test_config_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def with_target(prompts, images, target, **columns):
    return [0.0] * len(images)


class Known(Reward):
    name = "known"
    bounds = (0.0, 1.0)
    columns = ("answer",)

    def _score(self, prompts, images, rows):
        return [0.0] * len(images)


WITHOUT_TARGET = Dataset.from_dict({"prompt": ["a", "b"], "task": ["count", "draw"]})
TRAINER_PROBLEMS = [
    ({"reward_funcs": None}, "reward_funcs is missing"),
    ({"reward_funcs": {"count": brightness}}, r"tasks \['draw'\] have no reward"),
    ({"reward_funcs": {"count": brightness, "ocr": brightness, "draw": brightness}}, "no prompts for task 'ocr'"),
    ({"reward_funcs": "no_such"}, "There is no reward 'no_such'"),
    (
        {"reward_funcs": with_target, "train_dataset": WITHOUT_TARGET},
        r"train_dataset: reward 'with_target' needs the column\(s\) 'target', but the data has \['prompt', 'task'\]",
    ),
    ({"reward_funcs": Known()}, r"reward 'known' can't score (\d) of the \1 prompts of its task '(count|draw)'"),
    (
        {"reward_funcs": Known(), "eval_dataset": make_dataset().add_column("answer", ["x"] * 10)},
        "train_dataset: reward 'known' can't score",
    ),
    ({"reward_weights": [1.0, 2.0]}, "2 values for 1 reward functions. Give one for each, in this order: brightness"),
    (
        {"num_generations": 6},
        r"4 completions a round \(per_device_train_batch_size=4 x 1 process\(es\) x 1 .* num_generations=6. Use "
        "per_device_train_batch_size=6",
    ),
    ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3 is not a multiple of the 2 tasks"),
    ({"sampler": "cps", "sde_window_range": [2, 4]}, r"Steps \[3\] of the sampler 'cps' .* add no noise"),
]


@pytest.mark.parametrize(("options", "message"), TRAINER_PROBLEMS)
def test_trainer_refuses(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tmp_path, **options)
    assert str(error.value).startswith("DiffusionGRPOTrainer cannot start:")
    # One bullet, or one of the same for each task.
    assert all(re.search(message, line) for line in str(error.value).splitlines()[1:])


def test_config_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DiffusionOPDTrainer takes a DiffusionOPDConfig"):
        DiffusionOPDTrainer(make_pipeline(), "base", args=make_config(tmp_path, num_iterations=2, max_steps=2))
    with pytest.raises(TypeError, match="num_iterations"):
        DiffusionOPDConfig(str(tmp_path), num_iterations=2)


def test_everything_wrong_is_in_one_message(tmp_path):
    with pytest.raises(ValueError) as error:
        DiffusionGRPOConfig(str(tmp_path), num_generations=1, epsilon=2.0, beta=-1.0, use_cpu=True)
    assert len(str(error.value).splitlines()) == 4
