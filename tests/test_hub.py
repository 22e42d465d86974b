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
"""The model card, the arguments and what is pushed; run as a script, the round trip through a loopback Hub."""

import copy
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard, snapshot_download
from loopback_hub import TOKEN, LoopbackHub
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_sd3 import ATTENTION, make_lora, make_pipeline

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, hub
from trl_diffusion_opd.student import Student
from trl_diffusion_opd.teachers import TeacherError, parse_teacher, read_lora
from trl_diffusion_opd.velocity import VelocityField


ROWS = {"prompt": ["a cat", "a dog", "two cats", "two dogs"], "task": ["ocr", "style", "ocr", "style"]}
FIELDS = {
    "method": "It learned from two teachers.",
    "teachers": {
        "ocr": [
            {
                "source": "someone/teachers",
                "subfolder": "ocr/lora",
                "revision": "0123456789abcdef0123456789abcdef01234567",
                "sha256": "feed" * 16,
                "kind": "lora",
                "rank": 16,
                "guidance_scale": 4.5,
                "weight": 1.0,
            }
        ],
        "style|x": [
            {
                "source": "local-teacher",
                "subfolder": None,
                "revision": None,
                "sha256": "beef" * 16,
                "kind": "lora",
                "rank": 4,
                "guidance_scale": 1.0,
                "weight": 1.0,
            }
        ],
    },
    "settings": {"loss": "kl"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    folder = str(tmp_path_factory.mktemp("model") / "base")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder)
    pipeline.register_to_config(_name_or_path=folder)
    return pipeline


@pytest.fixture
def trainer(base: StableDiffusion3Pipeline, tmp_path: Path) -> SimpleNamespace:
    """As much of a trainer as cards and grids need, with a LoRA that shows, its base in `base` and its output in `out`."""
    (tmp_path / "base").symlink_to(base.config["_name_or_path"])
    pipeline = copy.deepcopy(base)
    return _stand_in(pipeline, tmp_path, get_peft_model(pipeline.transformer, _shown_lora()))


def _shown_lora() -> LoraConfig:
    torch.manual_seed(0)
    return LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights=False)


def _stand_in(pipeline: StableDiffusion3Pipeline, folder: Path, model: torch.nn.Module) -> SimpleNamespace:
    args = DiffusionOPDConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_inference_steps=3,
        eval_num_inference_steps=4,
        guidance_scale=2.5,
        eval_guidance_scale=2.0,
        height=16,
        width=16,
        report_to="none",
        gradient_accumulation_steps=2,
    )
    student = Student(model, pipeline)
    student.save(args.output_dir)
    return SimpleNamespace(
        _pipeline=pipeline,
        _tag_names=["trl", "diffusion-opd"],
        _name=DiffusionOPDTrainer._name,
        _paper=DiffusionOPDTrainer._paper,
        _card_fields=lambda: FIELDS,
        student=student,
        args=args,
        tasks=["ocr", "style"],
        hub_model_id=None,
        state=SimpleNamespace(global_step=12, epoch=1.0),
        control=None,
        callback_handler=SimpleNamespace(callbacks=[], on_push_begin=lambda *_: None),
        is_world_process_zero=lambda: True,
        push_in_progress=None,
        train_dataset=Dataset.from_dict(ROWS),
        eval_dataset=None,
        eval_field=VelocityField(pipeline, num_inference_steps=4, height=16, width=16),
    )


def _card(trainer: SimpleNamespace) -> ModelCard:
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def _run_card(text: str) -> Image.Image:
    """Runs the card's Python and returns the image it makes."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("image = pipe(", "torch.manual_seed(3)\nimage = pipe(")
    names: dict = {}
    exec(compile(code, "card", "exec"), names)
    return names["image"]


def _own_image(pipeline: StableDiffusion3Pipeline) -> Image.Image:
    torch.manual_seed(3)
    return pipeline(prompt="a cat", height=16, width=16, guidance_scale=2.0, num_inference_steps=4).images[0]


def _difference(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(two, dtype=int)).max())


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
            model_init_kwargs={
                "token": "hf_second",
                "cache_dir": str(tmp_path / "cache"),
                "parts": [{"api_key": "hf_third", "folder": "~/weights", "dtype": torch.bfloat16}],
                "callable": print,
            },
        )
        hub.write_arguments(args, tmp_path)
        text = (tmp_path / "training_args.json").read_text()
        for planted in ("hf_", 'token"', "api_key", str(tmp_path), "~", os.sep + "checkpoint"):
            assert planted not in text, planted
        written = json.loads(text)
        assert (written["output_dir"], written["resume_from_checkpoint"]) == ("out", "checkpoint-5")
        assert (written["hub_model_id"], written["student_init"]) == ("me/student", "lora")
        assert (written["learning_rate"], written["lr_scheduler_type"]) == (1.25e-4, "constant")
        assert written["model_init_kwargs"]["cache_dir"] == "cache"
        assert written["model_init_kwargs"]["parts"] == [{"folder": "weights", "dtype": "torch.bfloat16"}]
        assert list(written) == sorted(written)

    def test_a_hub_id_keeps_its_owner(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        hub.write_arguments(DiffusionOPDConfig("outputs/run", use_cpu=True, student_init="me/lora@main"), tmp_path)
        written = json.loads((tmp_path / "training_args.json").read_text())
        assert (written["output_dir"], written["student_init"]) == ("run", "me/lora@main")


class TestModelCard:
    def test_metadata(self, trainer, tmp_path):
        trainer._pipeline.register_to_config(_name_or_path="someone/base")
        trainer.hub_model_id = "me/student"
        hub.write_model_card(trainer, dataset_name=["me/prompts", str(tmp_path)], tags="mine")
        data = _card(trainer).data.to_dict()
        assert data == {
            "base_model": "someone/base",
            "base_model_relation": "adapter",
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["trl", "diffusion-opd", "lora", "mine"],
            "datasets": ["me/prompts"],
        }
        text = _card(trainer).text
        assert text.startswith("\n# student\n")
        assert 'pipe.load_lora_weights("me/student")\n' in text
        assert 'from_pretrained("someone/base", dtype=torch.float32)\n' in text

    def test_a_local_base_is_a_name(self, trainer, tmp_path):
        hub.write_model_card(trainer)
        data = _card(trainer).data.to_dict()
        assert "base_model" not in data and "base_model_relation" not in data and "datasets" not in data
        assert str(tmp_path) not in _card(trainer).content
        assert "the local model `base`" in _card(trainer).text

    def test_teachers_and_sampling(self, trainer):
        hub.write_model_card(trainer)
        text = _card(trainer).text
        link = "https://huggingface.co/someone/teachers/tree/0123456789abcdef0123456789abcdef01234567/ocr/lora"
        assert f"| ocr | [someone/teachers/ocr/lora]({link}) | 4.5 | 1 | 16 | commit 0123456789ab |" in text
        assert "| style\\|x | local-teacher | 1.0 | 1 | 4 | sha256 beefbeefbeef |" in text
        assert "| trained with (sampler `ode`) | 2.5 | 3 |" in text
        assert "| evaluated with, and to be sampled with | **2.0** | **4** |" in text
        assert FIELDS["method"] in text and "| loss | kl |" in text
        assert "| updates | 12 |" in text and "| LoRA | rank 4, alpha 8, on attn.add_k_proj," in text
        assert "2605.15055" in text and "vonwerra2020trl" in text and "Results" not in text
        assert "{{" not in text.replace("{{TRL: Transformers", "").replace("{{DiffusionOPD}}", "")

    def test_results(self, trainer):
        folder = Path(trainer.args.output_dir)
        row = {"reward": "ocr", "base": 0.25, "teacher": 0.75, "student": 0.7, "retention": 0.9, "ci95": [0.8, 1.01]}
        empty = {"reward": "look", "base": 0.5, "teacher": 0.52, "student": 0.5, "retention": None, "ci95": None}
        report = {"tasks": {"ocr": row, "style": empty}, "mean_retention": 0.9, "num_images": 64, "seed": 7}
        (folder / "retention.json").write_text(json.dumps(report))
        (folder / "samples.png").touch()
        hub.write_model_card(trainer)
        text = _card(trainer).text
        assert "| ocr | ocr | 0.250 | 0.750 | 0.700 | 0.900 | 0.800 to 1.010 |" in text
        assert "| style | look | 0.500 | 0.520 | 0.500 | – | – |" in text
        assert "| **mean** | | | | | **0.900** | |" in text and "64 images a task, seed 7" in text
        assert "](samples.png)" in text and "](retention.png)" not in text

    @pytest.mark.parametrize("kind", ["lora", "peft", "full"])
    def test_its_code_makes_the_students_image(self, kind, trainer, base, tmp_path, monkeypatch):
        pipeline = trainer._pipeline
        if kind == "peft":
            monkeypatch.setattr(hub, "LoraBaseMixin", type("NoLoader", (), {}))
        if kind == "full":
            merged = trainer.student.model.merge_and_unload()
            pipeline.transformer = merged
            trainer = _stand_in(pipeline, tmp_path / "full", merged)
            (tmp_path / "full" / "base").symlink_to(tmp_path / "base")
        hub.write_model_card(trainer)
        monkeypatch.chdir(Path(trainer.args.output_dir).parent)
        text = _card(trainer).text
        assert ("load_lora_weights" in text, "PeftModel" in text) == (kind == "lora", kind == "peft")
        assert ("lora" in _card(trainer).data.tags) == (kind != "full")
        image = _run_card(text)
        assert _difference(image, _own_image(pipeline)) <= 1  # rounding of a merge
        assert _difference(image, _own_image(base)) > 10

    def test_classifier_free_guidance_by_its_own_name(self, trainer):
        # Qwen-Image and Flux: guidance_scale would be an embedding, and without a negative prompt nothing happens.
        calls = []
        trainer.eval_field = SimpleNamespace(
            _call_options=lambda prompts, scale: (
                calls.append((prompts, scale))
                or {"prompt": prompts, "negative_prompt": [""], "true_cfg_scale": scale, "image": object()}
            )
        )
        hub.write_model_card(trainer)
        text = _card(trainer).text
        assert calls == [(["a cat"], 2.0)]
        assert '    negative_prompt="",\n    true_cfg_scale=2.0,\n    num_inference_steps=4,\n' in text


class TestCheckpointPush:
    @pytest.fixture
    def uploads(self, trainer, tmp_path, monkeypatch) -> list[dict]:
        calls: list[dict] = []

        def upload_folder(**options):
            calls.append(options)
            return Future()

        monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
        trainer.hub_model_id = "me/student"
        trainer.checkpoint = tmp_path / "out" / "checkpoint-12"
        trainer.checkpoint.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "noise_grid.json", "student_raw.safetensors", "optimizer.pt"):
            (trainer.checkpoint / name).write_text(name)
        return calls

    @pytest.mark.parametrize(
        ("strategy", "paths"),
        [("end", []), ("every_save", [None]), ("checkpoint", [None, "last-checkpoint"])]
        + [("all_checkpoints", [None, "checkpoint-12"])],
    )
    def test_strategies(self, strategy, paths, trainer, uploads):
        trainer.args.set_push_to_hub("me/student", strategy=strategy, token=TOKEN)
        hub.push_checkpoint(trainer, trainer.checkpoint)
        assert [upload.get("path_in_repo") for upload in uploads] == paths
        out = Path(trainer.args.output_dir)
        if paths:
            assert (out / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"
            assert not (out / "student_raw.safetensors").exists() and not (out / "optimizer.pt").exists()
            assert uploads[0]["commit_message"] == "Training in progress, step 12"
            names = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
            assert set(uploads[0]["allow_patterns"]) == names | {"noise_grid.json"}
            assert len(trainer.push_in_progress.jobs) == len(paths)

    def test_one_at_a_time_unless_asked(self, trainer, uploads):
        trainer.args.set_push_to_hub("me/student", strategy="every_save")
        hub.push_checkpoint(trainer, trainer.checkpoint)
        hub.push_checkpoint(trainer, trainer.checkpoint)
        assert len(uploads) == 1
        trainer.args.hub_always_push = True
        hub.push_checkpoint(trainer, trainer.checkpoint)
        assert len(uploads) == 2 and len(trainer.push_in_progress.jobs) == 2

    def test_a_failed_push_is_reported(self, trainer, uploads, caplog):
        trainer.args.set_push_to_hub("me/student", strategy="every_save")
        hub.push_checkpoint(trainer, trainer.checkpoint)
        with caplog.at_level(logging.WARNING):
            trainer.push_in_progress.jobs[0].set_exception(OSError("the Hub is down"))
        assert "A push to the Hub failed" in caplog.text and "the Hub is down" in caplog.text


class TestRoundTrip:
    """One run in a process of its own, because the Hub's address is read at import: see [`_round_trip`]."""

    @pytest.fixture(scope="class")
    def trip(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("round-trip-secret-path")
        with LoopbackHub() as loopback:
            environment = os.environ | loopback.environment() | {"HF_HOME": str(folder / "home")}
            done = subprocess.run(
                [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-5000:]
            yield SimpleNamespace(folder=folder, hub=loopback, **json.loads((folder / "results.json").read_text()))

    def test_what_is_pushed(self, trip):
        files = trip.hub.files("tester/student")
        assert set(files) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pytorch_lora_weights.safetensors",
            "training_args.json",
            "teacher_manifest.json",
            "noise_grid.json",
            "README.md",
            "retention.png",
            *(f"completions/step_{step:06d}.png" for step in (0, 1, 2)),
        }
        titles = [commit.title for commit in trip.hub.repositories["tester/student"].commits.values()]
        assert titles[1] == "Training in progress, step 1" and titles[-1] == "Done"

    def test_no_secret_in_it(self, trip):
        assert TOKEN in trip.arguments  # it was there to leak
        for commit in trip.hub.repositories["tester/student"].commits.values():
            for name, content in commit.tree.items():
                for secret in (TOKEN, str(trip.folder), trip.folder.name):
                    assert secret.encode() not in content, name

    def test_teachers_from_the_hub(self, trip):
        commits = list(trip.hub.repositories["tester/teachers"].commits)
        first, last = trip.manifest["ocr"][0], trip.manifest["style"][0]
        assert (first["source"], first["subfolder"]) == ("tester/teachers", "ocr/lora")
        assert (first["revision"], last["revision"]) == (commits[1], commits[-1])
        assert first["sha256"] != last["sha256"]
        assert f"tree/{commits[1]}/ocr/lora" in trip.hub.files("tester/student")["README.md"].decode()

    def test_wrong_names_are_refused(self, trip):
        assert "tester/nobody: no such folder here and no such repository on the Hub" in trip.refused[0]
        assert "the repository has no revision 'nowhere'" in trip.refused[1]
        assert "Check the subfolder" in trip.refused[2]

    def test_the_card_of_the_repository(self, trip):
        card = ModelCard(trip.hub.files("tester/student")["README.md"].decode())
        assert card.data.base_model == "tester/base" and card.data.datasets == ["me/prompts"]
        assert trip.difference == 0 and trip.difference_to_base > 10


def _round_trip(folder: Path) -> None:
    """Base and teachers to the Hub, a student of them trained and pushed, and its card's code run elsewhere."""
    from transformers.utils.hub import hf_api

    api = hf_api()
    pipeline = make_pipeline()
    pipeline.save_pretrained(str(folder / "base"), repo_id="tester/base", push_to_hub=True)
    api.create_repo("tester/teachers")
    commits = []
    for seed, path in ((1, "ocr/lora"), (2, "ocr/lora"), (3, "style/lora")):
        make_lora(pipeline, folder / f"teacher-{seed}", seed)
        commits.append(
            api.upload_folder(repo_id="tester/teachers", folder_path=folder / f"teacher-{seed}", path_in_repo=path)
        )
    out = folder / "out"
    for junk in ("runs/host/events.out", "notes/image.png", "secrets.json", "retention.png"):
        (out / junk).parent.mkdir(parents=True, exist_ok=True)
        (out / junk).write_text(TOKEN if junk != "retention.png" else "a picture")
    dataset = Dataset.from_dict(ROWS)
    args = DiffusionOPDConfig(
        output_dir=str(out),
        use_cpu=True,
        max_steps=2,
        num_inference_steps=2,
        eval_num_inference_steps=4,
        height=16,
        width=16,
        guidance_scale=2.0,
        learning_rate=0.3,
        ema_decay=0,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        log_completions=True,
        num_completions_to_print=1,
        save_steps=1,
        report_to="none",
        push_to_hub=True,
        hub_model_id="tester/student",
        hub_strategy="every_save",
        hub_token=TOKEN,
        model_init_kwargs={"token": TOKEN, "cache_dir": str(folder / "cache")},
    )
    trainer = DiffusionOPDTrainer(
        model="tester/base",
        teachers={"ocr": f"tester/teachers/ocr/lora@{commits[0].oid}", "style": "tester/teachers/style/lora"},
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train()
    trainer.push_to_hub("Done", dataset_name="me/prompts")

    refused = []
    for name in ("tester/nobody", "tester/teachers/ocr/lora@nowhere", "tester/teachers/other"):
        with pytest.raises(TeacherError) as error:
            read_lora(pipeline, parse_teacher(name))
        refused.append(str(error.value))

    os.chdir(folder.parent)
    image = _run_card((Path(snapshot_download("tester/student")) / "README.md").read_text())
    results = {
        "arguments": f"{args.hub_token} {args.model_init_kwargs}",
        "manifest": trainer.bank.manifest(),
        "refused": refused,
        "difference": _difference(image, _own_image(trainer.pipeline)),
        "difference_to_base": _difference(image, _own_image(pipeline)),
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    _round_trip(Path(sys.argv[1]))
