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

"""The example script, run as a user runs it, on a random pipeline of a few thousand weights."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from helpers.example_script import run_opd
from helpers.refusals import command_refuses
from helpers.tiny_sd3 import forward, make_lora, make_pipeline
from PIL import Image

from trl_diffusion_opd.data import prompt_files
from trl_diffusion_opd.scripts import arguments as cli
from trl_diffusion_opd.scripts import opd
from trl_diffusion_opd.scripts import prompt_sources as prompts
from trl_diffusion_opd.scripts.parser import parse


PROMPTS = ["one cat", "two dogs", "a sign"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_pipeline().save_pretrained(folder)
    for seed, name in enumerate(("peft", "diffusers")):
        make_lora(make_pipeline(), folder.parent / name, seed=seed, format=name)
    return folder


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("text.txt").write_text("\n".join(PROMPTS) + "\n")
    Path("lines.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": 1}) + "\n" for p in PROMPTS))
    frame = pd.DataFrame({"prompt": PROMPTS, "task": ["another"] * 3})
    frame.to_csv("table.csv", index=False)
    frame.to_parquet("table.parquet")


@pytest.mark.slow
def test_the_whole_story(monkeypatch, capsys, base):
    run_opd(
        monkeypatch,
        base,
        *("--teachers", f"text={base.parent}/peft", f"lines={base.parent}/diffusers", "table=base"),
        *("--prompts", "text=text.txt", "lines=lines.jsonl", "table=table.csv", "table=table.parquet"),
        *("--eval_prompts", "text=text.txt", "table=table.parquet"),
        *("--test_prompts", "text=text.txt", "lines=lines.jsonl", "table=table.csv"),
        *("--reward_funcs", *(f"{task}=helpers.stub_reward:brightness" for task in ("text", "lines", "table"))),
        *("--teacher_guidance_scales", "text=4.5", "--num_test_images", 2),
        eval_strategy="steps",
        eval_steps=2,
        log_completions="true",
    )
    out = Path("out")
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "training_args.json",
        "teacher_manifest.json",
        "retention.json",
        "retention_scores.json",
        "retention.png",
        "samples.png",
        "curves.png",
        "README.md",
    }
    assert "training_args.bin" not in names
    report = json.loads((out / "retention.json").read_text())
    assert set(report["tasks"]) == {"text", "lines", "table"} and report["num_images"] == 2
    assert {entry["reward"] for entry in report["tasks"].values()} == {"brightness"}
    manifest = json.loads((out / "teacher_manifest.json").read_text())
    assert {task: (entry["kind"], entry["guidance_scale"]) for task, (entry,) in manifest.items()} == {
        "text": ("lora", 4.5),
        "lines": ("lora", 1.0),
        "table": ("base", 1.0),
    }
    for name in ("retention.png", "samples.png", "curves.png"):
        Image.open(out / name).verify()
    assert len(list((out / "completions").glob("step_*.png"))) >= 1
    shown = capsys.readouterr().out
    assert "Evaluation of the average" in shown and "{'loss'" not in shown
    assert shown.count("The student is in out") == 1
    assert 'The student is in out: pipe.load_lora_weights("out")' in shown
    table = shown.rstrip().splitlines()[-8:]  # the console ends with the report
    assert all(any(task in line for line in table) for task in report["tasks"])

    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    before = forward(pipeline.transformer)
    pipeline.load_lora_weights("out")
    assert not torch.equal(forward(pipeline.transformer), before)


@pytest.mark.slow
def test_full_finetuning(monkeypatch, base):
    run_opd(
        monkeypatch,
        base,
        *("--teachers", f"text={base.parent}/peft", "--prompts", "text=text.txt", "--full_finetuning", "true"),
        *("--test_prompts", "text=text.txt", "--reward_funcs", "text=helpers.stub_reward:brightness"),
        *("--num_test_images", 1),
    )
    assert Path("out", "config.json").exists() and Path("out", "retention.json").exists()
    assert not Path("out", "adapter_config.json").exists()


def test_fewer_updates_than_are_logged_and_a_report_that_fails(monkeypatch, caplog, base):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("trl_diffusion_opd.evaluation.evaluate_retention", fail)
    run_opd(
        monkeypatch,
        base,
        # A report need not have every task.
        *("--teachers", f"text={base.parent}/peft", "table=base", "--prompts", "text=text.txt", "table=table.csv"),
        *("--test_prompts", "text=text.txt", "--reward_funcs", "text=helpers.stub_reward:brightness"),
        logging_steps=10,
    )
    names = {path.name for path in Path("out").iterdir()}
    assert {"README.md", "adapter_model.safetensors"} <= names and "curves.png" not in names
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any(message.startswith("No curves are drawn") for message in messages)
    (failed,) = [message for message in messages if message.startswith("The retention report could not be made")]
    assert "RuntimeError: out of memory" in failed and "trl-diffusion-opd evaluate" in failed


REFUSED = {
    "no equals sign": (
        {"teachers": "base"},
        "--teachers: 'base' is not of the form task=value.",
    ),
    "a file alone": (
        {"prompts": "text.txt"},
        "--prompts: 'text.txt' is not of the form task=value. Name its task, such as text=text.txt.",
    ),
    "no task": ({"prompts": "=text.txt"}, "--prompts: '=text.txt' is not of the form task=value."),
    "no value": ({"reward_funcs": "text="}, "--reward_funcs: 'text=' is not of the form task=value."),
    "file type": (
        {"prompts": "text=prompts.xlsx"},
        "--prompts: 'prompts.xlsx' has none of the endings .txt, .json, .jsonl, .csv, .tsv, .parquet.",
    ),
    "other types": (
        {"prompts": ["text=lines.jsonl", "text=words.jsonl"]},
        "--prompts: a column has different types in different sources. The features can't be aligned because the key answer",
    ),
    "no file": ({"prompts": "text=missing.txt"}, "--prompts: there is no file 'missing.txt'."),
    "not a number": (
        {"teacher_guidance_scales": "text=high"},
        "--teacher_guidance_scales: 'high' for task 'text' is not a number.",
    ),
    "scale of an unknown task": (
        {"teacher_guidance_scales": "txet=1.0"},
        "--teacher_guidance_scales: no teacher for task 'txet'; teachers are given for ['text'].",
    ),
    "base of an unknown task": (
        {"teacher_bases": "txet=owner/large"},
        "--teacher_bases: no teacher for task 'txet'; teachers are given for ['text'].",
    ),
    "bases and teachers": (
        {"teacher_bases": ["text=owner/one", "text=owner/two"]},
        "--teacher_bases: task 'text' has 1 teachers and 2 bases. Give one for all of them, or one for each",
    ),
    "reward": (
        {"reward_funcs": "text=clip"},
        "There is no reward 'clip'. There are aesthetic, clip_image_similarity, clipscore,",
    ),
    "options of no reward": (
        {"reward_kwargs": '{"ocr": {"batch_size": 2}}'},
        "--reward_kwargs has options for ['ocr'], but --reward_funcs does not name them",
    ),
    "nothing to report": (
        {"test_prompts": "text=text.txt"},
        "--test_prompts: tasks ['text'] have no reward. Name one in --reward_funcs.",
    ),
    "not JSON": ({"reward_kwargs": "{ocr: 1}"}, "--reward_kwargs: '{ocr: 1}' is not a JSON object such as"),
    "an empty prompt to report": (
        {"test_prompts": "text=gap.jsonl", "reward_funcs": "text=helpers.stub_reward:brightness"},
        "--test_prompts: gap.jsonl has 1 empty prompt(s), the first in line 3. Remove them.",
    ),
    "unknown task": (
        {"prompts": "ocr=text.txt"},
        "no teacher for task 'ocr'; teachers are given for ['text']",
    ),
}


def test_a_reward_that_the_report_would_fail_at(monkeypatch, capsys, base):
    given = ("--test_prompts", "text=text.txt", "--reward_funcs", "text=helpers.stub_reward:fails")
    message = (
        "reward 'fails' can't score an image of task 'text', for the prompt 'one cat': KeyError: 'label' (stub_rewar"
    )
    with command_refuses(capsys, message):
        run_opd(monkeypatch, base, *given, teachers="text=base", prompts="text=text.txt")
    assert not any(Path("out").iterdir())  # before training


EARLY = {
    "a teacher for no task": (
        ["--teachers", "text=base", "oc=base"],
        ["no prompts for task 'oc'; the data has ['text']"],
    ),
    "all at once": (
        [
            *("--teachers", "oc=base", "--reward_funcs", "texts=helpers.stub_reward:width"),
            *("--prompts", "text=text.txt", "other=text.txt", "--gradient_accumulation_steps", "3"),
            *("--task_weights", '{"txt": 2}', "--resume_from_checkpoint", "nowhere"),
        ],
        [
            "no teacher for task 'other', 'text'; teachers are given for ['oc']",
            "no prompts for task 'oc'",
            "reward_funcs: no prompts for task 'texts'",
            "gradient_accumulation_steps=3 is not a multiple of the 2 tasks",
            "task_weights has a weight for task 'txt'",
            "resume_from_checkpoint: there is no folder 'nowhere'.",
        ],
    ),
}


@pytest.mark.parametrize("label", EARLY)
def test_what_names_alone_show_is_refused_before_a_model_is_loaded(monkeypatch, capsys, label):
    words, messages = EARLY[label]
    with command_refuses(capsys, "The run cannot start:", *messages):
        run_opd(monkeypatch, "owner/not-there", *words, teachers="text=base", prompts="text=text.txt")


@pytest.mark.parametrize("label", REFUSED)
def test_mistakes_are_named(monkeypatch, capsys, base, label):
    options, message = REFUSED[label]
    Path("prompts.xlsx").touch()
    Path("gap.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": " "}\n')
    Path("words.jsonl").write_text('{"prompt": "a", "answer": "one"}\n')
    with command_refuses(capsys, message):
        run_opd(monkeypatch, base, **{"teachers": "text=base", "prompts": "text=text.txt", **options})
    assert not Path("out").exists()


def test_prompts_of_all_sources():
    sources = ["b=lines.jsonl", "a=text.txt", "a=table.csv", "c=table.parquet"]
    dataset = prompts.load_prompts("prompts", sources, "skill")
    assert dataset["prompt"][:] == PROMPTS * 4
    # A column of that name in a file means nothing: the command line says which task it is.
    assert dataset["skill"][:] == ["b"] * 3 + ["a"] * 6 + ["c"] * 3
    assert dataset["answer"][:] == [1] * 3 + [None] * 9
    assert prompts.load_prompts("prompts", None, "skill") is None


def test_prompts_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a hub"], "task": ["x"]})

    monkeypatch.setattr(prompt_files, "load_dataset", load_dataset)
    dataset = prompts.load_prompts("prompts", ["a=owner/name", "b=owner/name:test[:10]"], "task")
    assert asked == [("owner/name", "train"), ("owner/name", "test[:10]")]
    assert dataset.to_dict() == {"prompt": ["a hub"] * 2, "task": ["a", "b"]}


def test_tasks_as_a_mapping():
    """What a YAML file may have in place of `task=value`."""
    mapping = {"a": ["x", "z"], "b": 1.5}
    assert cli.by_task("teachers", mapping) == {"a": ["x", "z"], "b": ["1.5"]}
    assert cli.by_task("teachers", [{"a": "x"}, "b=y", {"a": "z"}]) == {"a": ["x", "z"], "b": ["y"]}
    assert cli.by_task("teachers", "a=x") == {"a": ["x"]}  # without a list
    with pytest.raises(ValueError, match="--teachers: task 'a' has no value."):
        cli.by_task("teachers", {"a": None})
    teachers = cli.load_teachers({"a": "x", "b": ["y", "z"]}, {"b": 1})
    assert {
        task: [(t.model_name_or_path, t.guidance_scale) for t in of_task] for task, of_task in teachers.items()
    } == {
        "a": [("x", None)],
        "b": [("y", 1.0), ("z", 1.0)],
    }
    assert (
        prompts.load_prompts("prompts", {"a": "text.txt", "b": ["lines.jsonl"]}, "task")["task"][:]
        == ["a"] * 3 + ["b"] * 3
    )
    assert cli.load_students("student", {"one": "x"}) == {"one": "x"}
    assert cli.load_students("student", "x") == {"student": "x"}
    assert prompts.load_tasks("dataset", "table.csv", "task")["task"][:] == ["another"] * 3


def test_a_mapping_in_a_config_file(base):
    settings = {"teachers": {"text": "base"}, "prompts": {"text": "text.txt"}, "output_dir": "out", "max_steps": 1}
    Path("run.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(base), **settings}))
    arguments, _ = parse(opd.ARGUMENTS, ["--config", "run.yaml"])
    assert cli.by_task("teachers", arguments.teachers) == {"text": ["base"]}
    assert cli.by_task("prompts", arguments.prompts) == {"text": ["text.txt"]}


FILES = {
    "mark.txt": ("\ufeffa cat\nü\n".encode(), ["a cat", "ü"]),
    "mark.jsonl": ('\ufeff{"prompt": "a cat"}\n'.encode(), ["a cat"]),
    "mark.csv": ("\ufeffprompt,x\na cat,1\n".encode(), ["a cat"]),
    "tabs.tsv": (b'prompt\tx\n"a, b"\t1\nc\t2\n', ["a, b", "c"]),
    "CAPITALS.TXT": (b"a cat\n", ["a cat"]),
    "talk.jsonl": (b'{"prompt": [{"role": "user", "content": "a cat"}]}\n', ["a cat"]),
    "latin.txt": (
        "a\nü\n".encode("latin-1"),
        "'latin.txt' is not in UTF-8: byte 2, in line 2, is 0xfc. Save it as UTF-8; if it",
    ),
    "latin.csv": ("prompt\nü\n".encode("latin-1"), "'latin.csv' is not in UTF-8: byte 7, in line 2, is 0xfc."),
    "latin.jsonl": (
        '{"prompt": "ü"}\n'.encode("latin-1"),
        "'latin.jsonl' is not in UTF-8: byte 12, in line 1, is 0xfc.",
    ),
    "wide.txt": (
        "a\n".encode("utf-16"),
        "'wide.txt' is not in UTF-8: byte 0, in line 1, is 0xff. Save it as UTF-8; if it is in UTF-16",
    ),
    "cut.txt": ("ü".encode()[:1], "'cut.txt' is not in UTF-8: byte 0, in line 1, is 0xc3."),
    "none.txt": (b"", "the file 'none.txt' is empty."),
    "broken.jsonl": (
        b'{"prompt": "a"}\n{"prompt": \n',
        "the file 'broken.jsonl' cannot be read as json: line 2, column ",
    ),
    "broken.csv": (b"prompt\na\nb,c,d\n", "the file 'broken.csv' cannot be read as csv: Error tokenizing data."),
    "broken.parquet": (b"nothing", "the file 'broken.parquet' cannot be read as parquet: Parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_prompts(name):
    content, expected = FILES[name]
    Path(name).write_bytes(content)
    if isinstance(expected, list):
        assert prompts.load_prompts("prompts", [f"a={name}"], "task")["prompt"][:] == expected
    else:
        with pytest.raises(ValueError) as error:
            prompts.load_prompts("prompts", [f"a={name}"], "task")
        assert str(error.value).startswith("--prompts: ") and expected in str(error.value)


@pytest.mark.parametrize("at", [1, 7])
def test_a_letter_between_two_blocks(monkeypatch, at):
    monkeypatch.setattr(prompt_files, "_BLOCK", at)
    Path("a.txt").write_bytes("ü\nüü\n".encode())
    assert prompts.load_prompts("prompts", ["a=a.txt"], "task")["prompt"][:] == ["ü", "üü"]
    Path("a.txt").write_bytes("ü\nüü\nä".encode() + b"\xfc")
    with pytest.raises(ValueError, match="byte 10, in line 3, is 0xfc"):
        prompts.load_prompts("prompts", ["a=a.txt"], "task")


def test_a_task_named_twice_has_two_teachers():
    assert cli.by_task("teachers", ["a=x", "b=y=1", "a=z"]) == {"a": ["x", "z"], "b": ["y=1"]}
