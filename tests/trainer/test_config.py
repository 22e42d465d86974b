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

import math
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers.refusals import only_problem
from transformers import TrainingArguments

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionSFTConfig
from trl_diffusion_opd.problems import Refusal
from trl_diffusion_opd.scripts import arguments as cli
from trl_diffusion_opd.scripts import dmd, grpo, nft, opd, sft
from trl_diffusion_opd.scripts.parser import parse as read
from trl_diffusion_opd.trainer import option_checks
from trl_diffusion_opd.trainer.option_checks import REPLACED as TAKEN_PLACES


ROOT = Path(__file__).parents[2]


def parse(*arguments):
    return read(opd.ARGUMENTS, list(map(str, arguments)))


def test_defaults():
    args = DiffusionOPDConfig("out")
    expected = {
        # the model
        "model_init_kwargs": None,
        "dtype": "float32",
        # the rollout
        "num_inference_steps": 10,
        "sampler": "ode",
        "noise_level": None,
        "guidance_scale": None,
        "height": 512,
        "width": 512,
        "max_sequence_length": None,
        "generation_kwargs": None,
        # teachers and objective
        "teacher_guidance_scale": None,
        "loss_type": "kl",
        "loss_weighting": "kl",
        "skip_last_steps": None,
        "num_trained_timesteps": None,
        "timestep_density": None,
        "unbiased_timesteps": True,
        "beta": 0.0,
        "teacher_extrapolation": 1.0,
        "guidance_branch_weight": 0.0,
        "on_policy": True,
        # tasks
        "task_column": "task",
        "task_weights": None,
        "gradient_accumulation_steps": None,
        # the student
        "student_init": None,
        "ema_decay": "auto",
        "ema_update_interval": 1,
        # evaluation and logging
        "eval_num_inference_steps": 40,
        "eval_guidance_scale": None,
        "num_eval_images": None,
        "log_completions": False,
        # what Trainer knows with other defaults
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "remove_unused_columns": False,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.lr_scheduler_type == "constant"
    assert isinstance(args, TrainingArguments)


def test_tests_take_the_cpu():
    """And so do the processes that they start; tests marked `gpu` have a process of their own."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_it_works_on_a_machine_without_a_gpu():
    # TRL's default of bf16=True is refused there by TrainingArguments unless one says use_cpu.
    args = DiffusionOPDConfig("out")
    assert args.bf16 is False and args.use_cpu is False


@pytest.mark.parametrize(
    ("supported", "options", "bf16"),
    [
        (True, {}, True),
        (True, {"fp16": True}, False),
        (True, {"use_cpu": True}, False),
        (True, {"bf16": False}, False),
    ],
)
def test_bf16_is_on_where_it_can_be(monkeypatch, supported, options, bf16):
    from trl_diffusion_opd.trainer import base_config

    monkeypatch.setattr(base_config, "is_torch_bf16_gpu_available", lambda: supported)
    # What TrainingArguments then says of this machine is not what is asked here.
    monkeypatch.setattr(base_config._BaseConfig, "__post_init__", lambda self: None)
    assert DiffusionOPDConfig("out", **options).bf16 is bf16


def test_yaml(tmp_path):
    settings = {
        "model_name_or_path": "owner/repo",
        "teachers": ["ocr=owner/teacher", "ocr=base"],
        "prompts": ["ocr=ocr.txt"],
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 1.0e-3,
        "sampler": "cps",
        "noise_level": 0.5,
        "task_weights": {"ocr": 2.0},
        "generation_kwargs": {"clip_skip": 1},
        "model_init_kwargs": {"variant": "fp16"},
        "lora_target_modules": ["to_q", "to_v"],
        "report_to": "none",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    script_args, args = parse("--config", path, "--noise_level", 0.25)
    assert args.noise_level == 0.25  # the command line wins
    for name in ("learning_rate", "sampler", "task_weights", "generation_kwargs", "model_init_kwargs"):
        assert getattr(args, name) == settings[name]
    for name in ("model_name_or_path", "teachers", "prompts", "lora_target_modules"):
        assert getattr(script_args, name) == settings[name]


def test_command_line():
    script_args, args = parse(
        *("--model_name_or_path", "owner/repo", "--teachers", "ocr=owner/teacher", "style=base"),
        *("--prompts", "ocr=ocr.txt", "style=style.jsonl", "--output_dir", "out"),
        *("--task_weights", '{"ocr": 2.0}', "--generation_kwargs", '{"clip_skip": 1}'),
        *("--model_init_kwargs", '{"variant": "fp16"}', "--gradient_accumulation_steps", 4),
        *("--ema_decay", 0, "--on_policy", "false", "--loss_type", "kl", "--dtype", "bfloat16"),
    )
    assert script_args.teachers == ["ocr=owner/teacher", "style=base"]
    assert script_args.prompts == ["ocr=ocr.txt", "style=style.jsonl"]
    assert (args.task_weights, args.generation_kwargs) == ({"ocr": 2.0}, {"clip_skip": 1})
    assert (args.model_init_kwargs, args.gradient_accumulation_steps) == ({"variant": "fp16"}, 4)
    assert (args.ema_decay, args.on_policy, args.dtype) == (0.0, False, "bfloat16")
    assert args.bf16 is False


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")))
def test_the_examples_configs_are_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = {"tiny_grpo": grpo, "tiny_edit_grpo": grpo, "tiny_nft": nft, "tiny_sft": sft, "tiny_dmd": dmd}.get(
        name, opd
    )
    script_args, args = read(command.ARGUMENTS, ["--config", str(ROOT / "examples" / "configs" / f"{name}.yaml")])
    assert script_args.prompts and args.output_dir
    assert script_args.reward_funcs or not name.startswith("tiny")  # those of the tiny world come with the package


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--teachers",
        "--prompts",
        "--teacher_guidance_scale",
        "--sampler {ode,flow_sde,",
        "--num_eval_images",
    ):
        assert option in shown
    assert "How much noise the sampler adds (eta)" in " ".join(shown.split())


@pytest.mark.parametrize("arguments", [("--sampler", "euler"), ("--loss_weighting", "snr"), ("--dtype", "int8")])
def test_unknown_choices_are_refused_with_the_known_ones(arguments):
    needed = ("--model_name_or_path", "a/b", "--teachers", "a=base", "--prompts", "a=b.txt")
    with pytest.raises(Refusal, match=f"invalid choice: '{arguments[1]}' \\(choose from"):
        parse(*needed, *arguments)


REFUSED = {
    "noise with ode": (
        {"noise_level": 0.7},
        "noise_level=0.7 with sampler='ode', which has no noise: leave it unset or choose flow_sde, dance_sde, cps or ddim.",
    ),
    "noise with dpm2m": ({"noise_level": 0.0, "sampler": "dpm2m"}, "noise_level=0.0 with sampler='dpm2m'"),
    "eta of cps": ({"noise_level": 1.1, "sampler": "cps"}, "noise_level=1.1: cps takes 0 to 1."),
    "eta of ddim": ({"noise_level": 1.5, "sampler": "ddim"}, "noise_level=1.5: ddim takes 0 to 1."),
    "negative eta": ({"noise_level": -0.1, "sampler": "flow_sde"}, "noise_level=-0.1 is negative."),
    "policy gradient with ode": (
        {"loss_type": "policy_gradient"},
        "loss_type='policy_gradient' needs a sampler with noise, but sampler='ode' with noise_level=None has none: choose",
    ),
    "policy gradient with eta 0": (
        {"loss_type": "policy_gradient", "sampler": "flow_sde", "noise_level": 0.0},
        "sampler='flow_sde' with noise_level=0.0 has none",
    ),
    "policy gradient off policy": (
        {"loss_type": "policy_gradient", "sampler": "flow_sde", "on_policy": False},
        "is an estimate on the student's own trajectories: set on_policy=True.",
    ),
    "sampler": (
        {"sampler": "euler"},
        "sampler='euler': it must be one of ode, flow_sde, dance_sde, cps, ddim, dpm2m.",
    ),
    "loss type": ({"loss_type": "mse"}, "loss_type='mse': it must be one of kl, policy_gradient."),
    "weighting": ({"loss_weighting": "snr"}, "loss_weighting='snr': it must be one of kl, released, velocity, x0."),
    "dtype": ({"dtype": "int8"}, "dtype='int8': it must be one of float32, bfloat16, float16."),
    "trust": (
        {"model_init_kwargs": {"trust_remote_code": True}},
        "model_init_kwargs: trust_remote_code would run code from the Hub and is refused.",
    ),
    "custom pipeline": (
        {"model_init_kwargs": {"custom_pipeline": "owner/repo"}},
        "model_init_kwargs: custom_pipeline would run code from the Hub and is refused.",
    ),
    "pickles": (
        {"model_init_kwargs": {"use_safetensors": False}},
        "model_init_kwargs: use_safetensors is always on; pickled weights are not read.",
    ),
    "not JSON": ({"generation_kwargs": "clip_skip=1"}, "generation_kwargs='clip_skip=1' is not a JSON object such as"),
    "not quoted": (
        {"generation_kwargs": "{clip_skip: 1}"},
        "generation_kwargs='{clip_skip: 1}' is not JSON (Expecting property name enclosed in double quotes",
    ),
    "transformers' own": ({"lr_scheduler_kwargs": "{'a': 1}"}, "lr_scheduler_kwargs=\"{'a': 1}\" is not JSON ("),
    "dtype of the base": (
        {"model_init_kwargs": {"dtype": "half"}},
        "model_init_kwargs: dtype='half' is none of float32, bfloat16, float16.",
    ),
    "dtype of a part": (
        {"model_init_kwargs": {"torch_dtype": {"vae": "half"}}},
        "model_init_kwargs: torch_dtype='half' is none of float32, bfloat16, float16.",
    ),
    "two dtypes": (
        {"dtype": "float16", "model_init_kwargs": {"dtype": "bfloat16"}},
        "dtype='float16', but model_init_kwargs has bfloat16: give only one.",
    ),
    "not an object": ({"task_weights": "[1, 2]"}, "task_weights='[1, 2]' is not a JSON object"),
    "weight": ({"task_weights": {"ocr": 0}}, "task_weights: ocr=0 is not a positive number."),
    "guidance": ({"guidance_scale": 0.0}, "guidance_scale=0.0: it must be at least 1.0, which is no guidance."),
    "eval guidance": ({"eval_guidance_scale": 0.5}, "eval_guidance_scale=0.5: it must be at least 1.0"),
    "teacher guidance": ({"teacher_guidance_scale": 0.5}, "teacher_guidance_scale=0.5: it must be at least 1.0."),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps=0: it must be at least 1."),
    "accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: it must be at least 1."),
    "batch size": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: it must be at least 1."),
    "eval batch size": ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0: it must be at least 1."),
    "no update": ({"max_steps": 0}, "max_steps=0: it must be at least 1, or -1 for as many updates as"),
    "no epoch": ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0: there would be no update."),
    "saves": ({"save_steps": 0}, "save_steps=0: it must be positive: a number of updates, or a fraction below 1."),
    "logs": ({"logging_steps": -1}, "logging_steps=-1: it must be positive"),
    "evaluations": ({"eval_strategy": "steps", "eval_steps": -2}, "eval_steps=-2: it must be positive"),
    "seed": ({"seed": -1}, "seed=-1: it must be from 0 to 4294967295."),
    "data seed": ({"data_seed": 2**32}, "data_seed=4294967296: it must be from 0"),
    "workers": ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1: it must not be negative."),
    "tracker": ({"report_to": "tensorbord"}, "report_to names 'tensorbord'; it must be one of "),
    "eval images": ({"num_eval_images": 0}, "num_eval_images=0: it must be at least 1."),
    "batch size that is looked for": (
        {"auto_find_batch_size": True},
        "auto_find_batch_size=True has no effect here. The batch size must not change during a run.",
    ),
    "order of prompts": (
        {"train_sampling_strategy": "sequential"},
        "train_sampling_strategy='sequential' has no effect here. Prompts come in rounds of tasks",
    ),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect here."),
    "lomo": ({"optim": "lomo"}, "optim='lomo' is not supported: it steps inside of a backward of its own."),
    "ema": ({"ema_decay": 1.0}, "ema_decay=1.0: it must be in [0, 1)."),
    "ema as text": ({"ema_decay": "always"}, "ema_decay='always': it must be a number in [0, 1), or 'auto'."),
    "ema as a text that is no share": ({"ema_decay": "nan"}, "ema_decay=nan: it must be in [0, 1)."),
    "ema interval": ({"ema_update_interval": 0}, "ema_update_interval=0: it must be at least 1."),
    "beta": ({"beta": -1.0}, "beta=-1.0 is negative."),
    "extrapolation": ({"teacher_extrapolation": -0.1}, "teacher_extrapolation=-0.1: it must be at least 0."),
    "no extrapolation": ({"teacher_extrapolation": math.nan}, "teacher_extrapolation=nan: it must be at least 0."),
    "branches": (
        {"guidance_branch_weight": -1.0},
        "guidance_branch_weight=-1.0: it must be at least 0, which is off.",
    ),
    "branches by policy gradient": (
        {"guidance_branch_weight": 1.0, "loss_type": "policy_gradient", "sampler": "flow_sde"},
        "guidance_branch_weight compares velocities in closed form",
    ),
    "skip": ({"skip_last_steps": 10}, "skip_last_steps=10: it must leave at least one of the 10 steps."),
    "density": (
        {"timestep_density": [5.0, 0.0], "num_trained_timesteps": 1},
        "timestep_density=[5.0, 0.0]: it must be the two positive numbers of a Beta distribution, such as 5 2.",
    ),
    "density of all steps": ({"timestep_density": [5.0, 2.0]}, "has no effect while all steps are trained."),
    "bias": ({"unbiased_timesteps": False}, "unbiased_timesteps=False has no effect without timestep_density."),
    "trained steps": ({"num_trained_timesteps": 0}, "num_trained_timesteps=0: it must be at least 1."),
}


SFT_REFUSED = {
    "density": ({"timestep_density": "mode"}, "timestep_density='mode': it must be one of uniform, logit_normal."),
    "std": ({"logit_std": 0.0}, "logit_std=0.0: it must be positive."),
    "mean of uniform": (
        {"timestep_density": "uniform", "logit_mean": 1.0},
        "have no effect with timestep_density='uniform'",
    ),
    "guidance": ({"teacher_guidance_scale": 0.5}, "teacher_guidance_scale=0.5: it must be at least 1.0."),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0: it must be at least 1."),
    "fresh ones": ({"num_images_per_prompt": 2}, "num_images_per_prompt=2 without teacher_cache_dir"),
}


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        pytest.param(config, *of_label, id=f"{config.__name__}: {label}")
        for config, refused in ((DiffusionOPDConfig, REFUSED), (DiffusionSFTConfig, SFT_REFUSED))
        for label, of_label in refused.items()
    ],
)
def test_refuses(config, given, message):
    assert message in only_problem(config, **given)


def test_a_tracker_that_is_not_installed(monkeypatch):
    listed = ["wandb"]
    monkeypatch.setattr(option_checks, "get_available_reporting_integrations", lambda: listed)
    problem = only_problem(DiffusionOPDConfig, report_to=["wandb", "tensorboard"])
    assert problem == "- report_to names tensorboard, which is not installed: pip install tensorboard"
    listed.append("tensorboard")
    assert DiffusionOPDConfig("out", report_to=["wandb", "tensorboard"]).report_to == ["wandb", "tensorboard"]


def test_one_message_lists_everything():
    with pytest.raises(ValueError) as error:
        DiffusionOPDConfig("out", noise_level=0.7, loss_type="policy_gradient", beta=-1, task_weights={"a": "x"})
    starts = ("- noise_level=0.7", "- task_weights: a='x'", "- loss_type='policy_gradient'", "- beta=-1")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


@pytest.mark.parametrize("sampler", ["cps", "ddim"])
def test_eta_of_one_is_fine(sampler):
    assert DiffusionOPDConfig("out", sampler=sampler, noise_level=1.0).noise_level == 1.0


def test_eta_above_one_is_fine_for_the_sdes():
    assert DiffusionOPDConfig("out", sampler="flow_sde", noise_level=1.2).noise_level == 1.2


REPLACED = {
    "evaluation_strategy": "Use eval_strategy.",
    "overwrite_output_dir": "A run writes into an existing folder;",
    "no_cuda": "Use use_cpu.",
    "learning_rte": "Did you mean 'learning_rate'?",
    "zzz": "",
}


@pytest.mark.parametrize("name", REPLACED)
def test_options_of_old(name):
    said = f"DiffusionOPDConfig has no '{name}'. {REPLACED[name]}".rstrip()
    with pytest.raises(TypeError, match=re.escape(said)):
        DiffusionOPDConfig("out", **{name: 1})
    if name in ("learning_rte", "zzz"):  # a command knows the configs of all trainers
        said = said.replace("'.", "'. No config of this package has it.", 1)
    with pytest.raises(ValueError, match=re.escape(said)):
        required = ("--model_name_or_path", "x", "--teachers", "a=base", "--prompts", "a=a.txt", "--output_dir", "out")
        read(opd.ARGUMENTS, [*required, f"--{name}", "1"])


def test_what_took_a_place_is_there():
    known = {one.name for one in fields(DiffusionOPDConfig)} | {one.name for one in fields(cli.TeacherScriptArguments)}
    for name, advice in TAKEN_PLACES.items():
        assert name not in {one.name for one in fields(DiffusionOPDConfig)}, name
        for new in re.findall(r"(?:^Use |and |or )(\w+)(?=[ .,=;]|$)", advice):
            assert new in known, (name, new)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(("given", "is_on"), [({}, True), ({"gradient_checkpointing": False}, False)])
def test_either_name_of_checkpointing_without_a_warning(given, is_on):
    args = DiffusionOPDConfig("out", **given)
    assert args.activation_checkpointing is args.gradient_checkpointing is is_on
    assert DiffusionOPDConfig("out", activation_checkpointing=False).gradient_checkpointing is False
