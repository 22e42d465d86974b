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

"""How commands end that refuse what they were given, alone and under a launcher, and other names of options."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.launching import free_port, surroundings
from helpers.refusals import command_refuses
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trl_diffusion_opd import DiffusionOPDConfig, tiny
from trl_diffusion_opd.acceleration import processes as acceleration_processes
from trl_diffusion_opd.acceleration.processes import world_problems
from trl_diffusion_opd.models.teacher_config import TeacherError
from trl_diffusion_opd.pipelines.images import decoded
from trl_diffusion_opd.problems import Problems, Refusal
from trl_diffusion_opd.rewards import Scorer, load_reward, score
from trl_diffusion_opd.scripts import grpo, launching, merge, opd, refusals
from trl_diffusion_opd.scripts.evaluate import ARGUMENTS as EVALUATION
from trl_diffusion_opd.scripts.main import main
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told


NEEDED = "--model_name_or_path a --teachers a=base --prompts a=b.txt --output_dir o --use_cpu true".split()


def test_a_refusal_is_told_and_an_error_is_not_hidden(capsys):
    for refusal in (Refusal("no cat"), TeacherError("no cat")):
        with command_refuses(capsys, "no cat"), refusals_told():
            raise refusal
    with command_refuses(capsys, "It cannot start:\n- no cat"), refusals_told():
        Problems(["no cat"]).raise_under("It cannot start")
    with pytest.raises(ValueError, match="a bug"), refusals_told():
        raise ValueError("a bug")


def ends_with(capsys, function, *arguments):
    """Calls a function as a command would; returns what is printed when it ends with the status 1."""
    with pytest.raises(SystemExit) as done, refusals_told():
        function(*arguments)
    printed = capsys.readouterr().err
    assert done.value.code == refusals.FAILED and "Traceback" not in printed
    return printed


def test_a_rewards_error_is_told_with_its_own_lines(capsys):
    def helper():
        raise KeyError("label")

    def mine(images, **columns):
        helper()

    def short(images, **columns):
        return [1.0]

    async def later(images, **columns):
        helper()

    rows, images = [{"prompt": "a"}, {"prompt": "b"}], [Image.new("RGB", (4, 4))] * 2

    def threaded(function, timeout=None):
        with Scorer([function], timeout=timeout) as scorer:
            scorer.submit(rows, images)
            scorer.results()

    for function in (mine, later):
        for call in (threaded, lambda one: score([one], rows, images)):
            printed = ends_with(capsys, call, function)
            assert printed.startswith("A reward function has failed:\n") and printed.endswith("KeyError: 'label'\n")
            assert printed.count("test_refusals.py") == 2 and "trl_diffusion_opd" not in printed
    assert ends_with(capsys, threaded, short).startswith("Reward function 'short' returned 1 values")
    hanging = lambda images: time.sleep(1)  # noqa: E731
    assert "given no scores for 2 images in 0.05 seconds" in ends_with(capsys, threaded, hanging, 0.05)


def test_an_error_inside_of_the_packages_own_reward_is_not_hidden(capsys, monkeypatch):
    def fault(*arguments, **options):
        raise KeyError("a bug")

    monkeypatch.setattr(Image.Image, "save", fault)
    reward = load_reward("jpeg_compressibility")
    with pytest.raises(KeyError), refusals_told():
        score([reward], [{"prompt": "a"}], [Image.new("RGB", (4, 4))])


def test_figures_that_are_not_finite_end_a_command_with_their_message(capsys):
    printed = ends_with(capsys, decoded, torch.full((1, 3), math.nan), lambda: [])
    assert printed == "1 of 1 images have latents with NaN or infinity: the model computes NaN.\n"
    with pytest.raises(FloatingPointError), refusals_told(), np.errstate(all="raise"):
        np.float64(1) / np.float64(0)  # not found by this package


def test_the_first_process_says_it_first(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(refusals.time, "sleep", slept.append)
    for rank, expected in (("0", []), ("1", [30.0])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with command_refuses(capsys, "no cat"), refusals_told():
            raise Refusal("no cat")
        assert slept == expected


@pytest.mark.parametrize(("code", "status", "told"), [(refusals.REFUSED, 2, False), (1, 1, True), (-15, 143, True)])
def test_the_status_of_several_processes(monkeypatch, capsys, tmp_path, code, status, told):
    def fails(given):
        failure = ProcessFailure(0, 1, code, str(tmp_path / "none.json"))
        raise ChildFailedError("a command", {0: failure})

    monkeypatch.setattr(launching, "launch_command", fails)
    with pytest.raises(SystemExit) as done:
        launching.launch([], "opd", [])
    assert done.value.code == status
    assert ("Root Cause" in capsys.readouterr().err) == told


# Processes that do not know of each other


def test_processes_that_would_train_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_problems() == []  # set by something else than a launcher
    monkeypatch.setenv("RANK", "0")
    (problem,) = world_problems()
    assert problem.startswith("2 processes were launched, but they do not know of each other") and "use_cpu" in problem

    class Both:
        num_processes = 2

    monkeypatch.setattr(acceleration_processes, "PartialState", Both)
    assert world_problems() == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_problems() == []


def test_a_trainers_config_refuses_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Refusal, match="2 processes were launched, but they do not know of each other"):
        DiffusionOPDConfig("out")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_refusal_on_two_processes(tmp_path, processes, monkeypatch):
    """Of the launcher, without `use_cpu` they would train alone. Those that know of each other refuse a size."""
    (tmp_path / "a.txt").write_text("a cat\n")
    code = "import sys; from trl_diffusion_opd.scripts.main import main; sys.exit(main())"
    words = ["opd", "--model_name_or_path", tiny.BASE, "--teachers", "a=base", "--prompts", "a=a.txt"]
    words += ["--output_dir", "out", "--height", "33", "--bf16", "false", "--report_to", "none"]
    launcher = ["--accelerate_config", "multi_gpu", "--mixed_precision", "no", "--num_processes", "2"]
    command = [sys.executable, "-c", code, *words, *launcher, "--main_process_port", str(free_port())]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == refusals.REFUSED, done.stderr[-3000:]
    assert done.stderr.count("2 processes were launched, but they do not know of each other") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("- ")  # the launcher adds nothing

    monkeypatch.chdir(tmp_path)
    ended = processes.run(as_command, *words)
    assert [one.code for one in ended] == [refusals.REFUSED] * 2
    assert [one.error.count("height=33 is not a multiple of 4") for one in ended] == [1, 1]
    assert not any("Traceback" in one.error for one in ended)
    assert not (tmp_path / "out").exists()


def as_command(*words):
    """What each of the processes that the launcher starts does. Here nobody ends the second when the first has spoken."""
    refusals._HEAD_START = 0.0
    sys.exit(main(words, may_launch=False))


# Names


MEANT = {
    "lr": "'learning_rate'",
    "lora_rank": "'lora_r'",
    "rank": "'lora_r'",
    "batch_size": "'per_device_train_batch_size'",
    "steps": "'num_inference_steps' or 'max_steps'",
    "cfg": "'guidance_scale'",
    "epochs": "'num_train_epochs'",
    "base": "'model_name_or_path'",
    "model": "'model_name_or_path'",
}


@pytest.mark.parametrize("name", MEANT)
def test_names_that_people_type(name, tmp_path):
    message = f"DiffusionOPDConfig has no '{name}'. Did you mean {MEANT[name]}\\?"
    with pytest.raises(Refusal, match=message):
        parse(opd.ARGUMENTS, [f"--{name}", "1"])  # told before what is missing
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(Refusal, match=message):
        parse(opd.ARGUMENTS, [*NEEDED, "--config", str(tmp_path / "run.yaml")])


def test_names_are_those_of_the_command():
    with pytest.raises(Refusal, match="EvaluationArguments has no 'model'. Did you mean 'base'"):
        parse(EVALUATION, ["--model", "x"])
    with pytest.raises(TypeError, match="has no 'rank'.$"):  # in Python it is peft_config's
        DiffusionOPDConfig("out", rank=4)
    with pytest.raises(TypeError, match=r"has no 'lora_r'. Set it in peft_config=LoraConfig\(r=...\)"):
        DiffusionOPDConfig("out", lora_r=4)


def test_several_trackers_and_short_dtypes(tmp_path):
    arguments = [*NEEDED, "--report_to", "tensorboard", "trackio"]
    for short, full in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("float16", "float16")):
        _, args = parse(opd.ARGUMENTS, [*arguments, "--dtype", short])
        assert args.report_to == ["tensorboard", "trackio"] and args.dtype == full
        (tmp_path / "run.yaml").write_text(f"dtype: {short}\nreport_to: none\n")
        _, args = parse(opd.ARGUMENTS, [*NEEDED, "--config", str(tmp_path / "run.yaml")])
        assert args.report_to == [] and args.dtype == full
        assert DiffusionOPDConfig("out", dtype=short, use_cpu=True).dtype == full
    given = "--base a --teachers a=base --output_dir o --dtype bf16".split()
    assert parse(merge.ARGUMENTS, given)[0].dtype == "bfloat16"
    evaluated = [*given, "--student", "s", "--reward_funcs", "a=ocr", "--dataset", "a=b.txt"]
    assert parse(EVALUATION, evaluated)[0].dtype == "bfloat16"


def test_no_option_is_short_for_another():
    with pytest.raises(Refusal, match="has no 'max_step'.*Did you mean 'max_steps'"):
        parse(grpo.ARGUMENTS, [*NEEDED, "--max_step", "4"])


@pytest.mark.parametrize("content", ["a: [1\n", "- a\n", "just words\n"])
def test_broken_configs(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(Refusal, match="--config: '.*run.yaml' is not"):
        parse(opd.ARGUMENTS, ["--config", str(tmp_path / "run.yaml")])
