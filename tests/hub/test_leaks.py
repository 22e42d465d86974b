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

"""Nothing that is pushed or logged names a token, a local path, the machine or its user: they are planted, and looked for."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.loopback_hub import TOKEN
from helpers.opd_fixtures import EVALUATED_AND_SAVED, make_dataset, make_teachers, make_trainer
from helpers.tiny_sd3 import make_pipeline
from transformers import TrainerState

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.checkpointing import checkpoint
from trl_diffusion_opd.guards.redaction import public_arguments, public_value
from trl_diffusion_opd.reporting.teacher_card import write_teacher_card


SECRET = "s3cr3tvalue"
URL = f"https://anna:{SECRET}@scores.example/v1?api_key={SECRET}&size=3"
HOST, PERSON = "planted-host", "planted-anna"


class TestPublicValue:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (URL, "https://scores.example/v1?api_key=<secret>&size=3"),
            (f"see {URL}", "see https://scores.example/v1?api_key=<secret>&size=3"),
            ("hf_" + "A1b2" * 8, "<secret>"),
            (f"Bearer {SECRET}", "Bearer <secret>"),
            ("/home/anna/data/prompts.txt", "prompts.txt"),
            ("file:///home/anna/model", "model"),
            ("~/model", "model"),
            (f"--data {Path.home()}/prompts.txt", "--data ~/prompts.txt"),
            ("me/student@main", "me/student@main"),
            ({"Authorization": "Bearer x", "n": [1, None, True]}, {"n": [1, None, True]}),
            ({"headers": {"my_api_key": "x"}, "dtype": torch.bfloat16}, {"headers": {}, "dtype": "torch.bfloat16"}),
            (print, "builtin_function_or_method"),
        ],
    )
    def test_it(self, value, shown):
        assert public_value(value, [SECRET]) == shown


class TestArguments:
    def test_no_secrets_and_no_paths(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "me" / "lora").mkdir(parents=True)
        args = DiffusionOPDConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            hub_token="hf_first",
            hub_model_id="me/student",
            student_init="me/lora",
            resume_from_checkpoint="out/checkpoint-5",
            learning_rate=1.25e-4,
            run_name="with hf_first in it",
            model_init_kwargs={
                "token": "hf_second",
                "cache_dir": str(tmp_path / "cache"),
                "parts": [{"api_key": "hf_third", "folder": "~/weights", "dtype": torch.bfloat16}],
                "callable": print,
            },
        )
        text = json.dumps(public_arguments(args))
        for planted in ("hf_", 'token"', "api_key", str(tmp_path), "~", os.sep + "checkpoint"):
            assert planted not in text, planted
        written = json.loads(text)
        assert (written["output_dir"], written["resume_from_checkpoint"]) == ("out", "checkpoint-5")
        assert (written["hub_model_id"], written["student_init"]) == ("me/student", "lora")
        assert (written["learning_rate"], written["lr_scheduler_type"]) == (1.25e-4, "constant")
        assert written["model_init_kwargs"]["cache_dir"] == "cache"
        assert written["model_init_kwargs"]["parts"] == [{"folder": "weights", "dtype": "torch.bfloat16"}]

    def test_a_hub_id_keeps_its_owner(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        written = public_arguments(DiffusionOPDConfig("outputs/run", use_cpu=True, student_init="me/lora@main"))
        assert (written["output_dir"], written["student_init"]) == ("run", "me/lora@main")


def test_the_best_checkpoint_is_found_again_without_a_path(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for step, best in ((3, str(tmp_path / "checkpoint-3")), (4, None), (None, None)):
        state = TrainerState(best_global_step=step)
        checkpoint.restore_best(tmp_path, state)
        assert state.best_model_checkpoint == best


class _Judge:
    """A reward that is given a URL with credentials."""

    def __init__(self, url: str):
        self.url = url
        self.__name__ = "judge"

    def __call__(self, prompts, images, **columns):
        return [float(image.getpixel((0, 0))[0]) for image in images]


def test_nothing_leaks(hub, tmp_path, monkeypatch, capfd):
    """A run with everything that writes: TensorBoard, tables of images, checkpoints, the best one, pushes, a resume."""
    home = tmp_path / "home" / PERSON
    home.mkdir(parents=True)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, PERSON)
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    monkeypatch.setattr("platform.node", lambda: HOST)
    pipeline = make_pipeline()
    pipeline.save_pretrained(home / "base")
    teachers = make_teachers(home / "teachers")
    dataset = make_dataset(count=2, draw=2)

    def trainer(**options):
        return make_trainer(
            home / "out",
            teachers,
            pipeline=str(home / "base"),
            train_dataset=dataset,
            eval_dataset=dataset,
            reward_funcs=_Judge(URL),
            model_init_kwargs={"token": SECRET, "cache_dir": str(home / "cache")},
            generation_kwargs={"negative_prompt": URL},
            guidance_scale=2.0,
            report_to="tensorboard",
            **EVALUATED_AND_SAVED,
            metric_for_best_model="eval_reward",
            load_best_model_at_end=True,
            log_completions=True,
            push_to_hub=True,
            hub_model_id="tester/student",
            hub_base_model="tester/base",
            hub_strategy="all_checkpoints",
            hub_always_push=True,
            hub_token=TOKEN,
            **options,
        )

    first = trainer(max_steps=1)
    first.train()
    second = trainer(max_steps=2)
    second.train(resume_from_checkpoint=str(home / "out" / "checkpoint-1"))
    assert second.state.best_model_checkpoint.startswith(str(home / "out" / "checkpoint-"))
    second.push_to_hub(dataset_name=str(home / "prompts"))
    write_teacher_card(
        teachers["draw"],
        str(home / "base"),
        "draw",
        2.0,
        {"prompt": "draw1", "negative_prompt": URL, "num_inference_steps": 3},
        datasets=str(home / "prompts"),
    )

    console = capfd.readouterr()
    contents = {"standard output": console.out.encode(), "standard error": console.err.encode()}
    for path in sorted((home / "out").rglob("*")):
        contents[f"name of {path.name}"] = path.relative_to(home).as_posix().encode()
        if path.is_file():
            contents[f"out/{path.relative_to(home / 'out')}"] = path.read_bytes()
    for commit, entry in hub.repositories["tester/student"].commits.items():
        contents |= {f"{commit[:7]}/{name}": content for name, content in entry.tree.items()}
    contents["teacher card"] = (home / "teachers" / "draw" / "README.md").read_bytes()
    # Where it could have leaked is there
    names = " ".join(contents)
    for written in ("events.out.tfevents", ".parquet", "trainer_state.json", "adapter_config.json", "README.md"):
        assert written in names, written
    assert "checkpoint-2/optimizer.pt" in hub.files("tester/student")
    planted = [TOKEN, SECRET, HOST, PERSON, str(tmp_path), tmp_path.name]
    leaks = [(name, word) for name, content in contents.items() for word in planted if word.encode() in content]
    assert leaks == []
    # The credentials go, the rest of what was configured stays
    written = json.loads((home / "out" / "training_args.json").read_text())
    assert written["generation_kwargs"] == {"negative_prompt": "https://scores.example/v1?api_key=<secret>&size=3"}
    assert written["model_init_kwargs"] == {"cache_dir": "cache"} and written["output_dir"] == "out"
