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

"""Stages one after another: each from the LoRA before, gone on with after a kill, and refused where they don't fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.opd_fixtures import TINY_SETTINGS, make_dataset, make_trainer
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_pipeline
from safetensors.torch import load_file, save_file

from trl_diffusion_opd import DiffusionOPDTrainer, DiffusionSFTTrainer
from trl_diffusion_opd.models.student import Student
from trl_diffusion_opd.scripts.stages import Stage, StagesArguments, main, read_stages, run_stages
from trl_diffusion_opd.trainer.base_trainer import DiffusionTrainer


pytestmark = pytest.mark.slow


OPTIONS = dict(
    max_steps=3,
    learning_rate=1e-2,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=1,
    ema_decay=0.9,
    ema_update_interval=1,
)


def two_stages(teachers, seen=None):
    """On-policy distillation of one task, then fine-tuning on the other's images."""

    def first(output_dir, student_init):
        if seen is not None:
            seen.append(("first", student_init))
        data = make_dataset(count=4)
        return make_trainer(output_dir, teachers["count"], train_dataset=data, student_init=student_init, **OPTIONS)

    def second(output_dir, student_init):
        if seen is not None:
            seen.append(("second", student_init))
        data = make_dataset(draw=4)
        return sft_trainer(output_dir, teachers["draw"], train_dataset=data, student_init=student_init, **OPTIONS)

    return [Stage("first", first, {"trainer": "opd"}), Stage("second", second, {"trainer": "sft"})]


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def through(tmp_path_factory, teachers):
    folder = tmp_path_factory.mktemp("through")
    seen = []
    assert run_stages(two_stages(teachers, seen), folder) == folder / "second"
    assert seen == [("first", None), ("second", str(folder / "first"))]
    return folder


def test_each_stage_starts_from_the_one_before(through, teachers, tmp_path):
    # At learning rate 0 the second stage is the first one's LoRA, to the rounding of its average.
    shutil.copytree(through / "first", tmp_path / "first")
    still = dict(OPTIONS, learning_rate=0.0)
    stages = two_stages(teachers)[:1] + [
        Stage(
            "second",
            lambda folder, init: sft_trainer(
                folder, teachers["draw"], train_dataset=make_dataset(draw=4), student_init=init, **still
            ),
        )
    ]
    run_stages(stages, tmp_path)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert not same(weights(through / "first"), weights(through / "second"))


def test_finished_stages_are_skipped(through, teachers):
    seen = []
    before = weights(through / "second")
    assert run_stages(two_stages(teachers, seen), through) == through / "second"
    assert seen == [] and same(weights(through / "second"), before)


class Killed(BaseException):
    """Not an error: nothing handles it."""


# Each stage has three updates, each with a checkpoint, and saves once more at its end.
KILLS = {
    "within the first stage": ("training_step", 2),
    "at the end of the first stage": ("save_model", 4),
    "at the beginning of the second stage": ("training_step", 4),
    "within a checkpoint of the second stage": ("save_state", 5),
    "at the end of the second stage": ("create_model_card", 2),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_anywhere_gives_the_same(where, tmp_path, teachers, through, monkeypatch):
    (method, call), calls = KILLS[where], []
    owners = {"training_step": (DiffusionOPDTrainer, DiffusionSFTTrainer), "save_state": (Student,)}
    for cls in owners.get(method, (DiffusionTrainer,)):
        original = getattr(cls, method)

        def killed(self, *args, original=original, **kwargs):
            calls.append(method)
            if len(calls) == call:
                raise Killed
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, killed)
    with pytest.raises(Killed):
        run_stages(two_stages(teachers), tmp_path)
    last = run_stages(two_stages(teachers), tmp_path)
    assert same(weights(last), weights(through / "second"))
    assert same(weights(tmp_path / "first"), weights(through / "first"))


# What is refused


def refusal(stages, folder):
    with pytest.raises(ValueError) as error:
        run_stages(stages, folder)
    return str(error.value)


def never(output_dir, student_init):
    raise AssertionError("a stage was run")


def test_names_are_checked(tmp_path):
    names = ["ocr", "a/b", "ocr", "..", "style"]
    message = refusal([Stage(name, never) for name in names], tmp_path)
    assert "the name 'ocr' is given to 2 stages" in message
    assert "the name 'a/b' can't be a folder's name" in message and "the name '..'" in message
    assert message.count("\n- ") == 3
    assert "there are none" in refusal([], tmp_path)


def copy_of(through, tmp_path):
    shutil.copytree(through, tmp_path / "copy")
    return tmp_path / "copy"


def test_other_settings_are_refused(through, tmp_path):
    folder = copy_of(through, tmp_path)
    stages = [Stage("first", never, {"trainer": "opd"}), Stage("second", never, {"trainer": "sft", "seed": 1})]
    message = refusal(stages, folder)
    assert "stage 'second' was begun with other settings (seed). Remove the folder 'second' to run it anew" in message


def test_another_beginning_is_refused(through, teachers, tmp_path):
    folder = copy_of(through, tmp_path)
    (
        folder / "first" / "finished"
    ).unlink()  # it would be run again, and the second stage has gone on from the old one
    expected = "stage 'second' was begun from another LoRA than 'first' has now. Remove the folder 'second'"
    assert expected in refusal(two_stages(teachers), folder)


def test_a_stage_can_start_from_the_base(through, teachers, tmp_path):
    folder = copy_of(through, tmp_path)
    first, second = two_stages(teachers)
    assert "stage 'second' was begun from another LoRA than the base has now" in refusal(
        [first, replace(second, from_base=True)], folder
    )
    shutil.rmtree(folder / "second")
    seen = []
    first, second = two_stages(teachers, seen)
    run_stages([first, replace(second, from_base=True)], folder)
    assert seen == [("second", None)]


def test_another_teacher_is_refused(through, teachers, tmp_path):
    folder = copy_of(through, tmp_path)
    shutil.rmtree(folder / "second")
    stages = [two_stages(teachers)[0], replace(two_stages(teachers)[1], from_base=True, teachers=["first"])]
    run_stages(stages, folder)
    run_stages(stages, folder)  # the teacher is the same
    changed = {name: value + 1 for name, value in weights(folder / "first").items()}
    save_file(changed, folder / "first" / "adapter_model.safetensors")
    assert "stage 'second' was begun from another LoRA than 'first' has now" in refusal(stages, folder)
    assert "stage 'second' is taught by stage 'first', which does not come before it" in refusal(stages[::-1], folder)


def test_a_teacher_that_changes_within_a_stage_is_refused(through, teachers, tmp_path):
    folder = copy_of(through, tmp_path)
    (folder / "second" / "finished").unlink()  # interrupted after its last checkpoint
    before = weights(folder / "second")
    moved = {task: str(shutil.copytree(teachers[task], tmp_path / task)) for task in teachers}
    run_stages(two_stages(moved), folder)  # the same files elsewhere
    assert same(weights(folder / "second"), before)
    (folder / "second" / "finished").unlink()
    file = tmp_path / "draw" / "adapter_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file)
    message = refusal(two_stages(moved), folder)
    assert "Can't resume from checkpoint-3:\n- the teacher of task 'draw' has changed" in message
    assert not (folder / "second" / "finished").exists()


# From a file


@pytest.fixture
def prompt_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("one\n")


def write_file(path, **changes):
    content = {
        "output_dir": str(path.parent / "out"),
        "shared": {"model_name_or_path": "base", "config": {"report_to": "none", "seed": 3}},
        "stages": [
            {"name": "one", "trainer": "opd", "prompts": ["a=a.txt"], "teachers": ["a=base"]},
            {
                "name": "two",
                "trainer": "sft",
                "prompts": ["a=a.txt"],
                "config": {"seed": 4, "teacher_guidance_scale": 2.0},
            },
        ],
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.mark.usefixtures("prompt_files")
def test_a_file_is_read(tmp_path):
    stages, output_dir = read_stages(write_file(tmp_path / "stages.yaml"))
    assert output_dir == str(tmp_path / "out")
    assert [stage.name for stage in stages] == ["one", "two"]
    assert [stage.settings["config"]["seed"] for stage in stages] == [3, 4]
    assert [stage.settings["model_name_or_path"] for stage in stages] == ["base", "base"]


@pytest.mark.usefixtures("prompt_files")
def test_a_teacher_of_a_file_that_changes_is_refused(teachers, tmp_path):
    base, teacher = tmp_path / "base", Path(shutil.copytree(teachers["draw"], tmp_path / "draw"))
    make_pipeline().save_pretrained(base)
    tiny = {name: value for name, value in TINY_SETTINGS.items() if name != "disable_tqdm"}
    stage = {
        "name": "one",
        "trainer": "opd",
        "model_name_or_path": str(base),
        "prompts": ["draw=a.txt"],
        "teachers": [f"draw={teacher}"],
        "config": {**tiny, **OPTIONS, "max_steps": 1, "per_device_train_batch_size": 1},
        "lora_r": 2,
    }
    path = write_file(tmp_path / "stages.yaml", shared={}, stages=[stage])
    main(StagesArguments(str(path)))
    (tmp_path / "out" / "one" / "finished").unlink()
    main(StagesArguments(str(path)))  # nothing is left of it to train
    (tmp_path / "out" / "one" / "finished").unlink()
    file = teacher / "adapter_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, file)
    # By the arguments of its trainer, before a student is made.
    with pytest.raises(ValueError, match="task 'draw': draw: not the teacher that the checkpoint was trained with"):
        main(StagesArguments(str(path)))


@pytest.mark.usefixtures("prompt_files")
def test_a_stage_takes_what_it_lacks_from_a_scripts_file(tmp_path):
    (tmp_path / "script.yaml").write_text(
        yaml.safe_dump(
            {
                "prompts": ["a=b.txt"],
                "lora_r": 2,
                "seed": 5,
                "max_steps": 7,
                "output_dir": "x",
                "test_prompts": ["a=c"],
            }
        )
    )
    out = tmp_path / "out"
    stages = [
        {"name": "one", "trainer": "sft", "config_file": str(tmp_path / "script.yaml"), "config": {"max_steps": 8}},
        {"name": "two", "trainer": "opd", "prompts": ["a=a.txt"], "teachers": [f"a={out / 'one'}"], "from_base": True},
    ]
    (one, two), _ = read_stages(write_file(tmp_path / "stages.yaml", stages=stages))
    assert one.settings["config"] == {"report_to": "none", "seed": 3, "max_steps": 8}
    assert (one.settings["lora_r"], one.settings["prompts"]) == (2, ["a=b.txt"])
    assert (list(two.teachers), two.from_base) == (["one"], True)


@pytest.mark.usefixtures("prompt_files")
def test_tasks_as_mappings(tmp_path):
    stages = [
        {"name": "one", "trainer": "grpo", "prompts": {"a": "a.txt"}, "reward_funcs": {"a": ["json:dumps"]}},
        {
            "name": "two",
            "trainer": "opd",
            "prompts": {"a": ["a.txt", "b.txt"]},
            "teachers": {"a": str(tmp_path / "out" / "one")},
            "from_base": True,
        },
    ]
    (one, two), _ = read_stages(write_file(tmp_path / "stages.yaml", stages=stages))
    assert one.settings["reward_funcs"] == ["a=json:dumps"] and one.settings["prompts"] == ["a=a.txt"]
    assert two.settings["prompts"] == ["a=a.txt", "a=b.txt"] and list(two.teachers) == ["one"]
    stages[0]["prompts"] = {"a": None}
    with pytest.raises(ValueError, match="stage 'one': --prompts: task 'a' has no value."):
        read_stages(write_file(tmp_path / "stages.yaml", stages=stages))


def test_a_file_runs(tmp_path, teachers):
    make_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("".join(f"draw{i}\n" for i in range(4)))
    config = {
        "height": 16, "width": 16, "max_sequence_length": 16, "num_inference_steps": 3, "eval_num_inference_steps": 2,
        "guidance_scale": 1.0, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1.0e-2,
        "gradient_checkpointing": False, "report_to": "none", "use_cpu": True, "ema_decay": 0.0,
    }  # fmt: skip
    prompts = {"prompts": [f"draw={tmp_path / 'prompts.txt'}"], "teachers": [f"draw={teachers['draw']}"]}
    content = {
        "output_dir": str(tmp_path / "out"),
        "shared": {
            "model_name_or_path": str(tmp_path / "base"),
            "lora_r": 4,
            "lora_alpha": 8,
            "config": config,
            **prompts,
        },
        "stages": [
            {"name": "one", "trainer": "opd"},
            {"name": "two", "trainer": "sft", "config": {"learning_rate": 0.0}},
        ],
    }
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(content))
    main(StagesArguments(str(tmp_path / "stages.yaml")))
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path / "out" / "two")
    assert json.loads((tmp_path / "out" / "two" / "adapter_config.json").read_text())["r"] == 4
    one, two = weights(tmp_path / "out" / "one"), weights(tmp_path / "out" / "two")
    assert same(one, two) and any(bool(p.any()) for name, p in one.items() if "lora_B" in name)


@pytest.mark.usefixtures("prompt_files")
def test_everything_wrong_in_a_file_is_told_at_once(tmp_path):
    stages = [
        {"name": "one", "trainer": "ppo", "prompts": ["a=a.txt"], "reward": "x"},
        {"name": "two", "trainer": "opd", "prompts": ["a=a.txt"], "config": {"student_init": "x", "output_dir": "y"}},
        {"trainer": "grpo", "prompts": ["a=a.txt"], "teachers": ["a=base"]},
        {"name": "four", "trainer": "sft", "prompts": ["a=a.txt"], "config": {"logit_std": -1.0, "sampler": "euler"}},
        {
            "name": "five",
            "trainer": "sft",
            "prompts": ["a=a.txt"],
            "config": {"learning_rte": 1.0, "num_iterations": 2},
        },
    ]
    path = write_file(tmp_path / "stages.yaml", stages=stages, defaults={})
    with pytest.raises(ValueError) as error:
        read_stages(path)
    message = str(error.value)
    for expected in (
        "'defaults' is none of output_dir, shared, stages.",
        "stage 'one': 'reward' is none of bnb_4bit_quant_type, config,",
        "stage 'one': trainer='ppo': it must be one of opd, grpo, nft, sft, dmd.",
        "stage 'two': trainer='opd' needs teachers.",
        "stage 'two': config: output_dir is the stage's own folder.",
        "stage 'two': config: student_init is the LoRA of the stage before.",
        "stage 3: name must be given.",
        "stage 3: trainer='grpo' takes no teachers.",
        "stage 'four': DiffusionSFTConfig: sampler='euler'",
        "logit_std=-1.0: it must be positive.",
        "stage 'five': DiffusionSFTConfig has no 'learning_rte'. No config of this package has it.",
        "stage 'five': DiffusionSFTConfig has no 'num_iterations'. It is an option of DiffusionGRPOConfig and",
    ):
        assert expected in message, expected


@pytest.mark.usefixtures("prompt_files")
def test_what_a_later_stage_would_miss_is_told_before_the_first(tmp_path):
    Path("empty").mkdir()
    Path("a.xlsx").touch()
    rewards = ["a=json:dumps", "a=clip", "a=nowhere:reward", "a=ocr+jpeg", "a=remote"]
    stages = [
        {"name": "one", "trainer": "sft", "prompts": ["a=a.txt"]},
        {
            "name": "two",
            "trainer": "grpo",
            "prompts": ["a=gone.txt", "a=owner/name", "a"],
            "eval_prompts": ["a=a.xlsx"],
            "reward_funcs": rewards,
        },
        {"name": "three", "trainer": "grpo", "prompts": ["a=b.txt"], "reward_kwargs": {"ocr": {}}},
        {"name": "four", "trainer": "opd", "prompts": ["a=a.txt"], "teachers": ["a=./gone", "a=empty", "a=base"]},
        {
            "name": "five",
            "trainer": "opd",
            "prompts": ["a=a.txt"],
            "teachers": [f"a={tmp_path / 'out' / 'one'}", "a=owner/name"],
            "teacher_guidance_scales": ["a=high"],
        },
        {
            "name": "six",
            "trainer": "sft",
            "prompts": ["a=a.txt"],
            "config": {"max_steps": 7, "ema_update_interval": 8},
        },
    ]
    with pytest.raises(ValueError) as error:
        read_stages(write_file(tmp_path / "stages.yaml", stages=stages))
    lines = str(error.value).splitlines()[1:]
    expected = (
        "stage 'two': --prompts: 'a' is not of the form task=value.",
        "stage 'two': --eval_prompts: 'a.xlsx' has none of the endings .txt,",
        "stage 'two': There is no reward 'clip'.",
        "stage 'two': Reward 'nowhere:reward' cannot be imported",
        "stage 'two': There is no reward 'jpeg'.",
        "stage 'two': Reward 'remote' needs url",
        "stage 'three': --reward_kwargs has options for ['ocr'], but --reward_funcs does not name them",
        "stage 'four': Teacher './gone' is neither an existing folder nor",
        "stage 'four': empty: has no pytorch_lora_weights.safetensors.",
        "stage 'five': --teacher_guidance_scales: 'high' for task 'a' is not a number.",
        "stage 'six': config: max_steps=7 is less than ema_update_interval=8",
    )
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"- {start}"), line
    stages[1]["prompts"].remove("a")
    with pytest.raises(ValueError, match=r"stage 'two': --prompts: there is no file 'gone.txt'\."):
        read_stages(write_file(tmp_path / "stages.yaml", stages=stages))


@pytest.mark.usefixtures("prompt_files")
def test_another_output_folder_takes_the_teachers_along(tmp_path):
    out = tmp_path / "out"
    teachers = [f"a={out / 'one'}", "a=base"]
    stages = [
        {"name": "one", "trainer": "sft", "prompts": ["a=a.txt"]},
        {"name": "two", "trainer": "opd", "prompts": ["a=a.txt"], "teachers": teachers},
    ]
    path = write_file(tmp_path / "stages.yaml", stages=stages)
    (_, two), output_dir = read_stages(path, str(tmp_path / "new"))
    assert output_dir == str(tmp_path / "new")
    assert two.settings["teachers"] == [f"a={tmp_path / 'new' / 'one'}", "a=base"] and list(two.teachers) == ["one"]
    (_, two), _ = read_stages(path)
    assert two.settings["teachers"] == teachers and list(two.teachers) == ["one"]


@pytest.mark.usefixtures("prompt_files")
def test_names_in_a_file_are_checked(tmp_path):
    stages = [{"name": name, "trainer": "sft", "prompts": ["a=a.txt"]} for name in ("a", "a")]
    stages.append({**stages[0], "name": "b", "trainer": "opd", "teachers": [f"a={tmp_path / 'out' / 'c'}"]})
    with pytest.raises(ValueError) as error:
        read_stages(write_file(tmp_path / "stages.yaml", stages=stages))
    assert "the name 'a' is given to 2 stages" in str(error.value)
    assert "stage 'b' is taught by stage 'c', which does not come before it" in str(error.value)


def test_a_file_without_stages_is_refused(tmp_path):
    (tmp_path / "stages.yaml").write_text("stages: one\n")
    with pytest.raises(ValueError, match="it needs an output_dir and a list of stages"):
        read_stages(tmp_path / "stages.yaml")
