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

"""The console script `trl-diffusion-opd`."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.launching import LAUNCH, free_port, surroundings
from transformers import TrainingArguments

import trl_diffusion_opd
from trl_diffusion_opd.scripts import env, launching, main, opd
from trl_diffusion_opd.scripts.arguments import config_path
from trl_diffusion_opd.scripts.launching import split
from trl_diffusion_opd.scripts.parser import CommandParser, parse
from trl_diffusion_opd.scripts.prompt_sources import load_prompts
from trl_diffusion_opd.scripts.refusals import REFUSED
from trl_diffusion_opd.scripts.stages import read_stages
from trl_diffusion_opd.scripts.values import PACKAGE, packaged
from trl_diffusion_opd.trainer.option_checks import UNUSED, WITHOUT_EFFECT


SHORT = "--max_steps 2 --eval_strategy no --eval_on_start false --log_completions false".split()
SHORT += "--save_strategy no --per_device_train_batch_size 1 --use_cpu true".split()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "argv", ["somewhere/trl-diffusion-opd"])
    monkeypatch.setattr(launching, "default_config_file", str(tmp_path / "no accelerate config"))
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 0)


@pytest.fixture
def launches(monkeypatch):
    """What would be launched: options by name."""
    found = []
    monkeypatch.setattr(launching, "launch_command", found.append)
    return found


@pytest.fixture
def refused(capsys):
    """Runs a command that refuses its words, and returns what it prints."""

    def message(*words):
        with pytest.raises(SystemExit) as done:
            main.main(words)
        printed = capsys.readouterr().err.rstrip()
        assert done.value.code == REFUSED and "usage" not in printed and "Traceback" not in printed
        return printed

    return message


# Help


def test_help_is_there_at_once(processes):
    code = (
        "import sys; from trl_diffusion_opd.scripts.main import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=surroundings(), capture_output=True, text=True)
    *shown, imported = done.stdout.splitlines()
    assert imported == "False"
    assert all(any(line.split()[:1] == [name] for line in shown) for name in main.COMMANDS)


def test_every_command_is_a_module_with_a_main():
    for name in main.COMMANDS:
        module = __import__(f"trl_diffusion_opd.scripts.{name}", fromlist=[name]).main
        assert callable(module), name


def test_help_of_a_command_has_its_own_options_first(capsys):
    with pytest.raises(SystemExit):
        main.main(["opd", "--help"])
    shown = capsys.readouterr().out
    order = [
        "--config ",
        "--accelerate_config",
        "--teachers",
        "--test_prompts",
        "DiffusionOPDConfig:",
        "--loss_weighting",
    ]
    order += ["DiffusionConfig:", "--guidance_scale", "quantization of the base:", "--load_in_4bit"]
    order += ["transformers.TrainingArguments:", "--max_steps"]
    places = [shown.index(f"\n{name}" if name.endswith(":") else f"\n  {name}") for name in order]
    assert places == sorted(places)
    assert "(required)" in shown and "--test-prompts" not in shown
    own = shown[: shown.index("\nDiffusionOPDConfig:")]
    assert "--adam_beta1" not in own and "--max_steps" not in own


def test_only_options_without_effect_are_not_in_help():
    parser = CommandParser(opd.ARGUMENTS)
    shown = parser.format_help()
    for name in parser.parse_known_args("--model_name_or_path a --teachers a=b --prompts a=b --output_dir o".split())[
        0
    ].__dict__:
        assert (f"--{name} " in shown) != (name in [*WITHOUT_EFFECT, *UNUSED]), name
    assert {*WITHOUT_EFFECT, *UNUSED} <= {one.name for one in fields(TrainingArguments)}
    assert "Not listed: options of transformers.TrainingArguments" in shown


def test_unknown_commands_are_told_with_what_there_is(capsys):
    assert main.main(["evalute"]) == 2
    message = capsys.readouterr().err
    assert "there is no command 'evalute'" in message and "Did you mean 'evaluate'?" in message and "grpo" in message
    assert main.main([]) == 0 and "commands:" in capsys.readouterr().out
    assert main.main(["--version"]) == 0 and capsys.readouterr().out.strip() == trl_diffusion_opd.__version__


# Configs and options


@pytest.mark.parametrize("words", [["--config", "tiny"], ["--config=tiny"]])
def test_a_config_by_its_name(words):
    script, args = parse(opd.ARGUMENTS, [*words, "--use_cpu", "true"])
    assert args.max_steps == 300 and script.prompts[0] == "compose=trl_diffusion_opd/tiny/data/compose_train.jsonl"
    assert set(script.teachers_by_task()) == {"compose", "letters", "style"}
    assert len(load_prompts("prompts", script.prompts, "task")) > 700


def test_a_file_wins_over_a_config_of_its_name():
    Path("tiny").write_text(yaml.safe_dump({"max_steps": 7}))
    given = "--config tiny --model_name_or_path a --teachers a=b --prompts a=b --output_dir o --use_cpu true".split()
    assert parse(opd.ARGUMENTS, given)[1].max_steps == 7


def test_what_there_is_is_told(refused):
    message = refused("opd", "--config", "tinny")
    assert (
        "--config: there is no file 'tinny'" in message
        and "sdxl_24gb, sdxl_preference_and_pixels, tiny, tiny_dmd, tiny_edit, tiny_edit_grpo, tiny_grpo" in message
        and "flux1_dev_24gb" in message
    )
    message = refused("opd", "--config", "tiny", "--accelerate_config", "fsdp9")
    assert "--accelerate_config: there is no file 'fsdp9'" in message and "cpu, deepspeed_zero2" in message
    message = refused("stages", "--accelerate_config", "cpu")
    assert message == "trl-diffusion-opd stages: the following arguments are required: --stages"
    assert refused("opd", "--config", "tiny", "--accelerate_config").startswith("--accelerate_config takes one name")
    assert "--config needs the name" in refused("opd", "--config")


def test_unknown_options_are_told_with_whose_they_are(launches, refused):
    message = refused("opd", "--config", "tiny", "--num_iterations", "2", "--num_processes", "2", "--zzz", "1")
    assert "DiffusionOPDConfig has no 'num_iterations'. It is an option of DiffusionGRPOConfig and" in message
    assert "has no 'zzz'. No config of this package has it." in message and "num_processes" not in message
    message = refused("opd", "--config", "tiny", "--num_test_imags", "2")
    assert "has no 'num_test_imags'. No config of this package has it. Did you mean 'num_test_images'?" in message
    assert "['stray'] belong to no option" in refused("opd", "--config", "tiny", "stray")
    assert launches == []


def test_every_config_names_what_the_package_has():
    for path in sorted(PACKAGE.glob("configs/tiny*.yaml")):
        content = yaml.safe_load(path.read_text())
        named = [content["model_name_or_path"]]
        named += [
            one.partition("=")[2]
            for key in ("teachers", "prompts", "eval_prompts", "test_prompts")
            for one in content.get(key, [])
        ]
        for name in named:
            assert os.path.exists(packaged(name)) and not os.path.exists(name), (path.name, name)
    assert packaged("trl_diffusion_opd/nothing") == "trl_diffusion_opd/nothing"
    assert packaged("tiny/data/compose_train.jsonl") == "tiny/data/compose_train.jsonl"
    Path("trl_diffusion_opd/tiny").mkdir(parents=True)
    assert packaged("trl_diffusion_opd/tiny") == "trl_diffusion_opd/tiny"  # what is here wins


def test_the_packages_stages_from_an_empty_folder():
    for path in sorted(PACKAGE.glob("stage_configs/*.yaml")):
        found, output_dir = read_stages(path.stem)  # refuses what a stage would miss
        assert found and output_dir.startswith("outputs/"), path.stem
    with pytest.raises(ValueError, match="It has tiny_baselines, tiny_cascade, tiny_edit_two_stage, tiny_two_stage"):
        read_stages("tiny")


def test_the_examples_have_the_packages_files():
    examples = PACKAGE.parent / "examples"
    for folder, inside in {
        "accelerate_configs": "accelerate_configs",
        "configs": "configs",
        "recipes": "recipes",
        "stages": "stage_configs",
        "data/tiny": "tiny/data",
    }.items():
        theirs = {path.name: path.read_bytes() for path in (examples / folder).iterdir() if path.is_file()}
        ours = {path.name: path.read_bytes() for path in (PACKAGE / inside).iterdir() if path.is_file()}
        assert theirs == ours and ours, folder


# Launching


def test_a_launch_config_by_its_name(launches):
    words = ["opd", "--config", "tiny", "--accelerate_config", "multi_gpu", "--num-processes", "3", "--max_steps=2"]
    assert main.main(words) == 0
    (given,) = launches
    assert given.config_file == config_path("x", "multi_gpu", "accelerate_configs") and given.num_processes == 3
    assert given.module and given.training_script == "trl_diffusion_opd.scripts.main"
    assert given.training_script_args == words


def test_launch_options_in_a_config(launches, tmp_path):
    Path("launch.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 1\n")
    content = yaml.safe_load(Path(config_path("config", "tiny")).read_text())
    Path("run.yaml").write_text(yaml.safe_dump({**content, "accelerate_config": "launch.yaml", "num_processes": 2}))
    assert main.main(["opd", "--config", "run.yaml"]) == 0
    assert (launches[0].config_file, launches[0].num_processes) == ("launch.yaml", 2)


@pytest.mark.parametrize("reason", ["several devices", "accelerate config"])
def test_what_else_is_launched(monkeypatch, launches, reason):
    if reason == "several devices":
        monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: 2)
    else:
        shutil.copy(config_path("x", "cpu", "accelerate_configs"), launching.default_config_file)
    ran = []
    monkeypatch.setattr(opd, "main", lambda *parsed: ran.append(parsed))
    given = ["opd", "--config", "tiny", "--use_cpu", "true"]
    main.main(given)
    assert len(launches) == 1 and not ran
    main.main(given, may_launch=False)  # on each process that the launcher has started
    assert len(launches) == len(ran) == 1 and ran[0][1].max_steps == 300


@pytest.mark.parametrize(
    ("words", "devices", "reason"),
    [
        (["--accelerate_config", "cpu", "--num_processes", "2"], 0, "cpu.yaml is for one process"),
        (["--accelerate_config", "multi_gpu", "--cpu"], 0, "--cpu is for one process"),
        (["--num_processes", "2"], 0, "this machine has fewer than two devices"),
        (["--num_processes", "2"], 1, "this machine has fewer than two devices"),
        (["--accelerate_config", "single_gpu", "--num_processes", "2"], 2, "single_gpu.yaml is for one process"),
    ],
)
def test_one_process_is_not_started_for_several(monkeypatch, launches, refused, words, devices, reason):
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: devices)
    message = refused("opd", "--config", "tiny", *words)
    number = 8 if "--cpu" in words else 2
    advice = f"--accelerate_config multi_gpu --num_processes {number}" + ("" if devices == 2 else " --use_cpu true")
    assert reason in message and message.endswith(advice) and not launches
    main.main(["opd", "--config", "tiny", *advice.split()])  # the advice itself is launched
    assert launches[0].num_processes == number


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (["--accelerate_config", "cpu"], 0),
        (["--accelerate_config", "cpu", "--num_processes", "2", "--multi_gpu"], 0),
        (["--num_processes", "1"], 0),
        (["--num_processes", "2"], 2),
        (["--accelerate_config", "fsdp2", "--num_processes", "2"], 0),
    ],
)
def test_what_starts_as_many_processes_as_asked_for(monkeypatch, launches, words, devices):
    monkeypatch.setattr(launching.torch.accelerator, "device_count", lambda: devices)
    assert main.main(["opd", "--config", "tiny", *words]) == 0 and len(launches) == 1


def test_the_launched_leave_the_launchers_options_to_it(monkeypatch, launches):
    ran = []
    monkeypatch.setattr(opd, "main", lambda *parsed: ran.append(parsed))
    words = ["opd", "--config", "tiny", "--use_cpu", "true", "--accelerate_config=cpu", "--num_processes", "2"]
    main.main(words, may_launch=False)
    assert len(ran) == 1 and not launches
    with pytest.raises(ValueError, match="has no 'num_processes'"):  # `accelerate launch examples/opd_sd3.py`
        parse(opd.ARGUMENTS, words[1:])


def test_words_of_the_launcher():
    ours, theirs = split(["--multi_gpu", "--foo", "3", "--gpu_ids", "0,1", "--bar=1", "--quiet", "stray"])
    assert ours == ["--multi_gpu", "--gpu_ids", "0,1"] and theirs == ["--foo", "3", "--bar=1", "--quiet", "stray"]


@pytest.mark.parametrize(("status", "expected"), [(3, 3), (-15, 143)])
def test_the_status_of_what_was_launched(monkeypatch, status, expected):
    def fails(given):
        raise subprocess.CalledProcessError(status, "python")

    monkeypatch.setattr(launching, "launch_command", fails)
    with pytest.raises(SystemExit) as done:
        launching.launch([], "opd", [])
    assert done.value.code == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_the_demo_from_an_empty_folder(tmp_path, processes):
    """On two processes of the launcher."""
    Path("launch.yaml").write_text(LAUNCH)
    code = "import sys; from trl_diffusion_opd.scripts.main import main; sys.exit(main())"
    words = ["opd", "--config", "tiny", *SHORT, "--num_test_images", "2", "--accelerate_config", "launch.yaml"]
    words += ["--main_process_port", str(free_port())]
    done = subprocess.run([sys.executable, "-c", code, *words], env=surroundings(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(Path("outputs/demo/retention.json").read_text())
    assert set(report["tasks"]) == {"compose", "letters", "style"}
    assert done.stdout.count("| **mean** |") == 1
    texts = [path.read_text() for path in Path("outputs").rglob("*") if path.suffix in (".json", ".md")]
    assert texts and not any(str(PACKAGE.parent) in text or str(tmp_path) in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dmd"])
def test_other_commands_with_teachers(command):
    assert main.main([command, "--config", f"tiny_{command}", *SHORT]) == 0
    folder = Path("outputs", command)
    assert (folder / "pytorch_lora_weights.safetensors").exists() and (folder / "README.md").exists()


# Bug reports


def test_env_says_what_is_installed_and_not_whose_it_is(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main.main(["env"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "trl-diffusion-opd",
        "trl",
        "transformers",
        "diffusers",
        "accelerate",
        "peft",
        "datasets",
        "torch",
        "python",
    ):
        assert f"- {name}: " in shown
    assert f"- trl-diffusion-opd: {trl_diffusion_opd.__version__}\n" in shown
    assert "- GPUs: " in shown and "- platform: " in shown and "[ocr]: " in shown and "[dev]" not in shown
    for private in (os.path.expanduser("~"), platform.node(), "hf_secret", str(Path.cwd()), sys.prefix):
        assert private not in shown

    def lacks_one(name):
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(env, "version", lacks_one)
    assert "[ocr]: lacks onnxruntime" in env.report() and "- torch: 1.0" in env.report()
