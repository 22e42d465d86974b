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
import runpy
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tiny_sd3 import forward, make_lora, make_pipeline

from trl_diffusion_opd import cli


SCRIPT = Path(__file__).parent.parent / "examples" / "opd_sd3.py"
PROMPTS = ["one cat", "two dogs", "a sign"]


def brightness(images, **kwargs):
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]


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


def run(monkeypatch, base, *arguments, **options):
    """Runs the script as `python examples/opd_sd3.py …` does."""
    settings = {
        "output_dir": "out",
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "num_inference_steps": 2,
        "eval_num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_r": 2,
        "gradient_checkpointing": "false",
        "ema_update_interval": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "dataloader_pin_memory": "false",
        **options,
    }
    given = []
    for name, value in settings.items():
        given += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model_name_or_path", str(base), *given, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.slow
def test_the_whole_story(monkeypatch, capsys, base):
    run(
        monkeypatch,
        base,
        *("--teachers", f"text={base.parent}/peft", f"lines={base.parent}/diffusers", "table=base"),
        *("--prompts", "text=text.txt", "lines=lines.jsonl", "table=table.csv", "table=table.parquet"),
        *("--eval_prompts", "text=text.txt", "table=table.parquet"),
        *("--test_prompts", "text=text.txt", "lines=lines.jsonl", "table=table.csv"),
        *("--reward_funcs", *(f"{task}=test_example_script:brightness" for task in ("text", "lines", "table"))),
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
    assert "eval_text/brightness" in shown
    table = shown.rstrip().splitlines()[-8:]  # the console ends with the report
    assert all(any(task in line for line in table) for task in report["tasks"])

    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    before = forward(pipeline.transformer)
    pipeline.load_lora_weights("out")
    assert not torch.equal(forward(pipeline.transformer), before)


@pytest.mark.slow
def test_full_finetuning(monkeypatch, base):
    run(
        monkeypatch,
        base,
        *("--teachers", f"text={base.parent}/peft", "--prompts", "text=text.txt", "--full_finetuning", "true"),
        *("--test_prompts", "text=text.txt", "--reward_funcs", "text=test_example_script:brightness"),
        *("--num_test_images", 1),
    )
    assert Path("out", "config.json").exists() and Path("out", "retention.json").exists()
    assert not Path("out", "adapter_config.json").exists()


REFUSED = {
    "no equals sign": (
        {"teachers": "base"},
        "--teachers: 'base' is not of the form task=value.",
    ),
    "no task": ({"prompts": "=text.txt"}, "--prompts: '=text.txt' is not of the form task=value."),
    "no value": ({"reward_funcs": "text="}, "--reward_funcs: 'text=' is not of the form task=value."),
    "file type": (
        {"prompts": "text=prompts.xlsx"},
        "--prompts: 'prompts.xlsx' is none of .txt, .json, .jsonl, .csv, .parquet.",
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
    "reward": (
        {"reward_funcs": "text=clip"},
        "There is no reward 'clip'. There are aesthetic, clipscore, geneval, hpsv2,",
    ),
    "options of no reward": (
        {"reward_kwargs": '{"ocr": {"batch_size": 2}}'},
        "--reward_kwargs has options for ['ocr'], which no --reward_funcs names",
    ),
    "nothing to report": (
        {"test_prompts": "text=text.txt"},
        "--test_prompts: tasks ['text'] have no reward to report. Name one in --reward_funcs.",
    ),
    "an empty prompt to report": (
        {"test_prompts": "text=gap.txt", "reward_funcs": "text=test_example_script:brightness"},
        "--test_prompts has 1 empty prompt(s), the first in row 1. Remove them.",
    ),
    "unknown task": (
        {"prompts": "ocr=text.txt"},
        "no teacher for task 'ocr'; teachers are given for ['text']",
    ),
}


@pytest.mark.parametrize("label", REFUSED)
def test_mistakes_are_named(monkeypatch, base, label):
    options, message = REFUSED[label]
    Path("prompts.xlsx").touch()
    Path("gap.txt").write_text("a\n\nb\n")
    Path("words.jsonl").write_text('{"prompt": "a", "answer": "one"}\n')
    with pytest.raises(ValueError) as error:
        run(monkeypatch, base, **{"teachers": "text=base", "prompts": "text=text.txt", **options})
    assert message in str(error.value)
    assert not Path("out").exists()


def test_prompts_of_all_sources():
    sources = ["b=lines.jsonl", "a=text.txt", "a=table.csv", "c=table.parquet"]
    dataset = cli.load_prompts("prompts", sources, "skill")
    assert dataset["prompt"][:] == PROMPTS * 4
    # A column of that name in a file means nothing: the command line says which task it is.
    assert dataset["skill"][:] == ["b"] * 3 + ["a"] * 6 + ["c"] * 3
    assert dataset["answer"][:] == [1] * 3 + [None] * 9
    assert cli.load_prompts("prompts", None, "skill") is None


def test_prompts_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["a hub"], "task": ["x"]})

    monkeypatch.setattr(cli, "load_dataset", load_dataset)
    dataset = cli.load_prompts("prompts", ["a=owner/name", "b=owner/name:test[:10]"], "task")
    assert asked == [("owner/name", "train"), ("owner/name", "test[:10]")]
    assert dataset.to_dict() == {"prompt": ["a hub"] * 2, "task": ["a", "b"]}


def test_a_task_named_twice_has_two_teachers():
    assert cli.by_task("teachers", ["a=x", "b=y=1", "a=z"]) == {"a": ["x", "z"], "b": ["y=1"]}
