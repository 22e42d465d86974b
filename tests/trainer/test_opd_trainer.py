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

"""What training does to the student and leaves alone, what is measured, and what stops it."""

import copy
import json
import math
from functools import wraps

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers.opd_fixtures import (
    AVERAGED,
    EVALUATED_AND_SAVED,
    Recorder,
    first_pixel,
    make_dataset,
    make_trainer,
    relative_difference,
    snapshot,
    train_losses,
)
from helpers.tiny_sd3 import SIZE, forward, make_lora, make_pipeline, make_transformer
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.algorithms.rollout import sample_generators


DECAY, INTERVAL, UPDATES = 0.4, 2, 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teachers):
    """Twenty updates with an average, and what there was before them."""
    folder, recorder, decodes = tmp_path_factory.mktemp("trained"), Recorder(), []
    pipeline = make_pipeline()
    pipeline.vae.register_forward_hook(lambda *_: decodes.append(1))
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda *args, **options: decodes.append(1) or decode(*args, **options)
    full = make_transformer(seed=5)
    full.save_pretrained(folder / "full")
    trainer = make_trainer(
        folder / "student",
        {"count": teachers["count"], "draw": [TeacherConfig(teachers["draw"], weight=4.0), str(folder / "full")]},
        pipeline=pipeline,
        callbacks=[recorder],
        peft_config="default",
        reward_funcs=first_pixel,
        max_steps=UPDATES,
        learning_rate=1e-2,
        ema_decay=DECAY,
        ema_update_interval=INTERVAL,
    )
    start = snapshot(trainer)
    frozen = {name: p.detach().clone() for name, p in everything(trainer).items() if not p.requires_grad}
    trainer.train()
    return dict(trainer=trainer, recorder=recorder, start=start, frozen=frozen, decodes=len(decodes), folder=folder)


def everything(trainer):
    return dict(trainer.model.named_parameters()) | {
        f"bank.{i}": p for i, p in enumerate(trainer.bank.backbone.parameters())
    }


# The student


def test_student_moves_toward_its_teachers(trained):
    losses = train_losses(trained["trainer"])
    assert len(losses) == UPDATES
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])


def test_nothing_but_the_student_changes(trained):
    trainer, frozen = trained["trainer"], trained["frozen"]
    assert sum("teacher_" in name for name in frozen) > 0 and sum("bank." in name for name in frozen) > 0
    now = everything(trainer)
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    assert relative_difference(snapshot(trainer), trained["start"]) > 0.1
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.student.parameters()}
    assert not optimized & {id(p) for p in trainer.bank.backbone.parameters()}
    # The LoRA of the paper, on this base.
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, len(config.target_modules)) == (32, 64, 8)


def test_no_image_is_decoded_and_no_reward_called_in_training(trained):
    assert trained["decodes"] == 0


def test_average_is_its_recurrence(trained):
    average = {name: p.double() for name, p in trained["start"].items()}
    for update, weights in enumerate(trained["recorder"].weights, start=1):
        if update % INTERVAL == 0:
            n = update - 1  # updates before this one
            decay = min(DECAY, (1 + n) / (10 + n))
            average = {name: decay * average[name] + (1 - decay) * p for name, p in weights.items()}
    trainer = trained["trainer"]
    shadow = dict(zip(trainer.student.named_parameters(), trainer.student.ema.shadow_params, strict=True))
    assert relative_difference(shadow, average) < 1e-6
    assert relative_difference(snapshot(trainer), average) > 1e-3


def test_average_is_saved_and_the_weights_survive(trained, tmp_path):
    trainer = trained["trainer"]
    raw = snapshot(trainer)
    trainer.save_model(tmp_path)
    assert relative_difference(snapshot(trainer), raw) == 0
    saved = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.replace(".default.", "."): name for name in raw}
    shadow = dict(zip(named, trainer.student.ema.shadow_params, strict=True))
    assert relative_difference(saved, shadow) == 0
    assert not any("teacher" in name for name in saved)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "pytorch_lora_weights.safetensors", "training_args.json"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}


def test_logged_metrics(trained):
    logs = [entry for entry in trained["trainer"].state.log_history if "loss" in entry]
    names = {"loss", "kl", "kl/count", "kl/draw", "velocity_gap/count", "velocity_gap/draw", "noise_floor"}
    assert all(names | {"grad_norm", "learning_rate", "step_time"} <= entry.keys() for entry in logs)
    for entry in logs:
        # One micro-batch a task, equal weights, and the weighting is the KL itself.
        assert entry["kl"] == pytest.approx((entry["kl/count"] + entry["kl/draw"]) / 2)
        assert entry["loss"] == pytest.approx(entry["kl"], rel=1e-5)
        assert 0 <= entry["noise_floor"] < 1e-6 * entry["kl"]


# The saved student is the one that was evaluated


def test_loaded_lora_draws_the_trainers_image(trained, tmp_path, monkeypatch):
    trainer = trained["trainer"]
    trainer.save_model(tmp_path)
    options = dict(prompt=["count1", "draw2"], guidance_scale=1.0, **SIZE, output_type="np")

    def draw(pipeline):
        generators = sample_generators([7], [0, 1])
        return pipeline(**options, num_inference_steps=3, generator=generators)[0]

    ours = draw(trainer.pipeline)
    fresh = make_pipeline()
    base = draw(fresh)
    fresh.load_lora_weights(str(tmp_path))
    assert np.abs(draw(fresh) - ours).max() <= 1e-5
    assert np.abs(base - ours).max() > 1e-2

    with_peft = make_pipeline()
    with_peft.transformer = PeftModel.from_pretrained(with_peft.transformer, tmp_path).base_model.model
    assert np.abs(draw(with_peft) - ours).max() <= 1e-5

    # The evaluation's own walk, before its pixels are rounded to bytes.
    evaluation, latents = trainer.evaluator.field, []
    field = copy.copy(evaluation)
    field.initial_latents = lambda *inputs: latents.append(evaluation.initial_latents(*inputs)) or latents[-1]
    field.decode = lambda x, prompts: evaluation.decode(x, prompts, "np")
    monkeypatch.setattr(trainer.evaluator, "field", field)
    with trainer.student.ema_weights():
        evaluated = trainer.evaluator.draw(make_dataset(count=2), "count", [0, 1])
    monkeypatch.undo()
    options["prompt"] = ["count0", "count1"]
    expected = fresh(**options, num_inference_steps=3, latents=latents[0])[0]
    assert np.abs(np.stack([image for _, image in evaluated]) - expected).max() <= 1e-5


# Kinds of students


def test_full_fine_tuning(tmp_path, teachers):
    pipeline = make_pipeline()
    rate = 0.5
    optimizer = torch.optim.SGD(pipeline.transformer.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.25)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path / "student",
        {"count": teachers["count"], "draw": "base"},
        pipeline=pipeline,
        peft_config=None,
        optimizers=(optimizer, schedule),
        callbacks=[recorder],
        beta=0.1,
        max_grad_norm=0.0,
        max_steps=2,
        **AVERAGED,
    )
    start = snapshot(trainer)
    frozen = [p.detach().clone() for p in trainer.bank.backbone.parameters()]
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert all(torch.equal(p, before) for p, before in zip(trainer.bank.backbone.parameters(), frozen, strict=True))
    expected = {name: start[name] - rate * gradient for name, gradient in recorder.gradients[0].items()}
    assert relative_difference(recorder.weights[0], expected) < 1e-7
    expected = {name: p - 0.25 * rate * recorder.gradients[1][name] for name, p in recorder.weights[0].items()}
    assert relative_difference(recorder.weights[1], expected) < 1e-7
    # At the start the student is the base, so nothing pulls on the task whose teacher is the base.
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["kl/draw"] < 1e-12 < first["kl/count"]

    trainer.save_model(tmp_path / "saved")
    saved = type(pipeline.transformer).from_pretrained(tmp_path / "saved")
    shadow = dict(zip(trainer.student.named_parameters(), trainer.student.ema.shadow_params, strict=True))
    assert relative_difference(dict(saved.named_parameters()), shadow) == 0


def test_base_in_half_precision(tmp_path, teachers):
    pipeline = make_pipeline().to(torch.bfloat16)
    trainer = make_trainer(tmp_path, teachers, pipeline=pipeline, max_steps=2, sampler="flow_sde")
    dtypes = set()

    def look(module, args, inputs):
        dtypes.update((name, value.dtype) for name, value in inputs.items() if isinstance(value, torch.Tensor))

    trainer.model.base_model.model.register_forward_pre_hook(look, with_kwargs=True)
    start = snapshot(trainer)
    trainer.train()
    assert ("timestep", torch.float32) in dtypes and ("timestep", torch.bfloat16) not in dtypes
    assert ("hidden_states", torch.bfloat16) in dtypes
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert {p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert all(math.isfinite(loss) for loss in train_losses(trainer))
    assert relative_difference(snapshot(trainer), start) > 0


def test_student_starts_from_a_lora(tmp_path, teachers):
    expected = make_lora(make_pipeline(), tmp_path / "init", seed=8, rank=3)
    trainer = make_trainer(tmp_path / "out", teachers, student_init=str(tmp_path / "init"), ema_decay=0.9)
    assert torch.allclose(forward(trainer.model), forward(expected), rtol=0, atol=1e-6)
    start = snapshot(trainer)
    trainer.train()
    assert 0 < relative_difference(snapshot(trainer), start) < 0.1


def test_a_config_beside_a_lora_to_start_from_is_said_to_have_no_effect(tmp_path, teachers, caplog):
    make_lora(make_pipeline(), tmp_path / "init", seed=8, rank=3)
    options = dict(student_init=str(tmp_path / "init"), max_steps=1)
    make_trainer(tmp_path / "out", teachers, peft_config=LoraConfig(r=3, lora_alpha=6), **options)
    assert "has no effect" not in caplog.text
    trainer = make_trainer(tmp_path / "out", teachers, peft_config=LoraConfig(r=5, lora_alpha=6), **options)
    assert "a LoRA of rank 3 and alpha 6. The peft_config of rank 5 and alpha 6 has no effect" in caplog.text
    assert trainer.model.peft_config["default"].r == 3


def test_the_start_says_how_old_the_saved_weights_are(tmp_path, teachers, capsys, caplog):
    make_trainer(tmp_path / "follows", teachers, ema_decay="auto", max_steps=2).train()
    said = " ".join(capsys.readouterr().out.split())
    assert "a moving average of the weights, 0.0 updates old in the mean at the end of these 2 updates" in said
    assert "lags behind" not in caplog.text
    make_trainer(tmp_path / "lags", teachers, ema_decay=0.9, ema_update_interval=2, max_steps=3).train()
    assert "ema_decay=0.9 every 2 updates gives an average that is 1 updates old after 3" in caplog.text


def test_own_lora_config(tmp_path, teachers):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["ff.net.2", "attn.to_q"], lora_dropout=0.5)
    trainer = make_trainer(tmp_path, teachers, peft_config=config)
    trainer.train()
    layers = {
        name.removeprefix("base_model.model.")
        for name, module in trainer.model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }
    assert layers == {f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn.to_q", "ff.net.2")}
    assert trainer.model.peft_config["default"].lora_dropout == 0.0
    assert sum(p.numel() for p in trainer.student.parameters()) == 2 * 3 * (16 + 16 + 64 + 16)


# Evaluation


def make_rewards(calls):
    async def later(prompts, images, **_):
        return [float(len(prompt)) for prompt in prompts]

    def sometimes(prompts, images, completions, target, task, trainer_state):
        calls.append(dict(prompts=prompts, images=images, target=target, task=task, step=trainer_state.global_step))
        assert all(image is completion for image, completion in zip(images, completions, strict=True))
        return [None if value % 2 else float(value) for value in target]

    def never(images, **_):
        return [None] * len(images)

    return {"count": [later, sometimes], "draw": [sometimes, never]}


def test_evaluation(tmp_path, teachers):
    calls = []
    evaluation = {"val": make_dataset(count=3, draw=2), "held": make_dataset(draw=3)}
    trainer = make_trainer(
        tmp_path,
        teachers,
        reward_funcs=make_rewards(calls),
        eval_dataset=evaluation,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        **AVERAGED,
        per_device_eval_batch_size=5,
    )
    averages = []
    trainer.evaluator.draw, draw = (
        lambda *args: averages.append(same_as_average(trainer)) or draw(*args),
        trainer.evaluator.draw,
    )
    trainer.train()
    assert averages and all(averages)
    logs = {
        split: [entry for entry in trainer.state.log_history if f"eval_{split}_reward" in entry]
        for split in evaluation
    }
    assert [len(entries) for entries in logs.values()] == [2, 2]
    val, held = logs["val"][0], logs["held"][0]
    assert val["eval_val_count/later"] == 6.0
    assert val["eval_val_count/sometimes"] == 1.0  # targets 0, 1, 2, of which 1 does not apply
    assert val["eval_val_draw/sometimes"] == 0.0
    assert val["eval_val_reward"] == pytest.approx(((6.0 + 1.0) / 2 + 0.0) / 2)
    assert held["eval_held_draw/sometimes"] == 1.0
    assert math.isnan(val["eval_val_draw/never"])
    assert {"eval_val_loss", "eval_val_kl/count", "eval_val_kl/draw"} <= val.keys()
    assert val["eval_val_generation_time"] > 0 and val["eval_val_reward_time/later"] > 0
    assert not any("count" in name for name in held)
    first = next(call for call in calls if call["step"])  # before it, two images a task are tried
    assert (first["prompts"], first["task"], first["step"]) == (["count0", "count1", "count2"], ["count"] * 3, 1)
    assert all(image.size == (16, 16) for image in first["images"])

    # The same images whoever asks, and as many of them as asked for.
    calls.clear()
    trainer.args.num_eval_images = 5
    metrics = trainer.evaluate(evaluation["val"])
    assert metrics["eval_count/later"] == 6.0
    assert calls[0]["prompts"] == ["count0", "count1", "count2", "count0", "count1"]
    pixels = [np.asarray(image) for image in calls[0]["images"]]
    assert np.array_equal(pixels[0], np.asarray(calls[0]["images"][0]))
    assert not np.array_equal(pixels[0], pixels[3])  # one prompt, two noises

    # Smaller batches are scored one after the other, each while the next one is drawn.
    calls.clear()
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate(evaluation["val"])["eval_count/later"] == 6.0
    assert [call["prompts"] for call in calls[:3]] == [["count0", "count1"], ["count2", "count0"], ["count1"]]


def same_as_average(trainer):
    pairs = zip(trainer.student.parameters(), trainer.student.ema.shadow_params, strict=True)
    return all(torch.equal(p, average) for p, average in pairs)


def test_best_model_is_loaded_at_the_end(tmp_path, teachers):
    def peak(images, trainer_state, **_):
        return [-abs(trainer_state.global_step - 2.0)] * len(images)

    trainer = make_trainer(
        tmp_path,
        teachers,
        reward_funcs=peak,
        eval_dataset=make_dataset(count=1, draw=1),
        max_steps=4,
        **AVERAGED,
        **EVALUATED_AND_SAVED,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    trainer.train()
    # The best one is kept beside the newest.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_metric == 0.0
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    trainer.save_model(tmp_path / "saved")
    assert relative_difference(load_file(tmp_path / "saved" / "adapter_model.safetensors"), best) == 0
    other = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert relative_difference(other, best) > 0


def test_grid_of_images_from_the_start(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, log_completions=True, num_completions_to_print=2)
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert names[:2] == ["completions_00000.parquet", "completions_00001.parquet"]  # and at the end
    assert names[-2:] == ["step_000000.png", "step_000001.png"]


# What stops it


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_stops_before_the_optimizer(who, tmp_path, teachers):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, teachers, callbacks=[recorder], max_steps=3, save_strategy="steps", save_steps=1)
    transformer = trainer.model.base_model.model
    layer = next(module for module in transformer.modules() if isinstance(module, LoraLayer))
    broken, adapter = float(trainer.plan.table.levels[1]) * 1000, "teacher_1" if who == "teacher" else "default"

    def break_output(module, args, inputs, output):
        ours = layer.active_adapters == [adapter] and trainer.state.global_step == 1
        if ours and abs(float(inputs["timestep"][0]) - broken) < 1e-3:
            return (output[0] * math.nan,)

    transformer.register_forward_hook(break_output, with_kwargs=True)
    task = "draw" if who == "teacher" else "count"
    with pytest.raises(
        FloatingPointError, match=rf"task '{task}' is not finite at step 1 .* of update 2\. Training stops"
    ):
        trainer.train()
    assert len(recorder.weights) == 1
    assert relative_difference(snapshot(trainer), recorder.weights[0]) == 0
    assert trainer.student.parameters() and [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "complete").exists()
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


def test_a_gradient_that_is_not_finite_stops_it_too(tmp_path, teachers):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, teachers, callbacks=[recorder], max_steps=3)
    parameter = trainer.student.parameters()[0]
    # The loss is fine, its backward pass overflows: as in half precision.
    parameter.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == 1 else grad)
    with pytest.raises(FloatingPointError, match="The gradient of update 2 is not finite"):
        trainer.train()
    assert len(recorder.weights) == 1
    assert relative_difference(snapshot(trainer), recorder.weights[0]) == 0


def test_logs_by_epoch(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, logging_strategy="epoch", logging_steps=0, max_steps=3)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["epoch"] == 1.0
    assert log["kl"] == pytest.approx(log["loss"], rel=1e-5)


def test_an_updates_new_prompts_are_encoded_together_and_the_empty_one_never_again(tmp_path, teachers, monkeypatch):
    calls, own = [], StableDiffusion3Pipeline.encode_prompt

    @wraps(own)
    def encode(*args, **kwargs):
        calls.append((kwargs["prompt"], kwargs["do_classifier_free_guidance"]))
        return own(*args, **kwargs)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", encode)
    data = make_dataset(count=10, draw=10)
    scales = {"guidance_scale": 3.0, "teacher_guidance_scale": 1.0}
    options = {"train_dataset": data, "max_steps": 5, "eval_dataset": data, "per_device_eval_batch_size": 10}
    trainer = make_trainer(tmp_path, teachers, **options, **scales)
    updates = []

    class Notes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            updates.append(calls.copy())
            calls.clear()

    trainer.add_callback(Notes())
    calls.clear()
    trainer.train()
    first, *others = [[call for call in update if not set(call[0]) & {"a", "a b c"}] for update in updates]
    # 2 of 10 prompts an update: the first 8 come in one go, and the other 2 in the last one.
    assert [guided for _, guided in first] == [False, False] and [len(prompts) for prompts, _ in first] == [8, 8]
    assert [[len(prompts) for prompts, _ in update] for update in others] == [[], [], [], [2, 2]]
    assert sorted(prompt for prompts, _ in first + others[-1] for prompt in prompts) == sorted(data["prompt"])
    trainer.evaluate()  # which does not depend on the updates before
    alone = [prompts[0] for prompts, _ in calls if len(prompts) == 1]
    assert len(alone) == len(calls) and set(data["prompt"]) <= set(alone)
