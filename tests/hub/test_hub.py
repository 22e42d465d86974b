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

"""What is pushed and when; and the round trip: from teachers on the Hub to a student that others load from it."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from diffusers import StableDiffusion3Pipeline
from helpers.card_helpers import ROWS, difference, own_image, run_card, shown_lora, stand_in
from helpers.loopback_hub import TOKEN, LoopbackHub, Stored
from helpers.opd_fixtures import EVALUATED_AND_SAVED, make_config
from helpers.tiny_sd3 import make_lora, make_pipeline
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import get_peft_model
from transformers.utils.hub import PushInProgress, hf_api

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.hub import push as pushing
from trl_diffusion_opd.hub.files import PUSHED_FILES
from trl_diffusion_opd.hub.repository import PushError, make_repository, repository_problems
from trl_diffusion_opd.problems import Refusal
from trl_diffusion_opd.scripts import push


@pytest.fixture
def trainer(tmp_path: Path) -> SimpleNamespace:
    pipeline = make_pipeline()
    return stand_in(pipeline, tmp_path, get_peft_model(pipeline.transformer, shown_lora()))


class TestCheckpointPush:
    @pytest.fixture
    def uploads(self, trainer, tmp_path, monkeypatch) -> list[dict]:
        calls: list[dict] = []

        def upload_folder(**options):
            calls.append(options)

        def run_as_future(function, *args, **options):
            function(*args, **options)
            return Future()

        api = SimpleNamespace(upload_folder=upload_folder, run_as_future=run_as_future)
        monkeypatch.setattr(pushing, "hf_api", lambda: api)
        trainer.checkpoint = tmp_path / "out" / "checkpoint-12"
        trainer.checkpoint.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "noise_grid.json", "student_raw.safetensors", "optimizer.pt"):
            (trainer.checkpoint / name).write_text(name)
        return calls

    @pytest.mark.parametrize(
        ("strategy", "paths"),
        [
            ("every_save", [None]),
            ("checkpoint", [None, "last-checkpoint"]),
            ("all_checkpoints", [None, "checkpoint-12"]),
        ],
    )
    def test_strategies(self, strategy, paths, trainer, uploads):
        out = Path(trainer.args.output_dir)
        message = "Training in progress, step 12"
        pushed = pushing.push_checkpoint(trainer.checkpoint, str(out), "me/student", strategy, message, token=TOKEN)
        assert [upload.get("path_in_repo") for upload in uploads] == paths
        assert (out / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"
        assert not (out / "student_raw.safetensors").exists() and not (out / "optimizer.pt").exists()
        assert uploads[0]["commit_message"] == message and all(upload["token"] == TOKEN for upload in uploads)
        names = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
        assert set(uploads[0]["allow_patterns"]) == names | {"noise_grid.json"}
        assert len(pushed.jobs) == len(paths)

    def test_one_at_a_time_unless_asked(self):
        first = PushInProgress([Future()])
        assert pushing.is_due("every_save", None, wait=False) and not pushing.is_due("end", None, wait=True)
        assert not pushing.is_due("every_save", first, wait=False)
        # Training waits for the one under way, whose files it would overwrite.
        waited = []
        first.wait_until_done = lambda: waited.append(True)
        assert pushing.is_due("every_save", first, wait=True) and waited == [True]
        first.jobs[0].set_result(None)
        assert pushing.is_due("every_save", first, wait=False) and waited == [True]

    def test_by_allow_list(self, trainer, tmp_path):
        out = tmp_path / "out"
        for name in ("notes.png", "secrets.json", "runs/retention.png", "completions/step_1.png", "radar.png"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).touch()
        pushed = {path.relative_to(out).as_posix() for path in pushing.matching_files(out, PUSHED_FILES)}
        student = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
        assert pushed == student | {"completions/step_1.png", "radar.png"}


@pytest.fixture
def xet_hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The Hub with uploads the way of real clients: their own xet library, with a folder as its store."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(hub, "xet_store", tmp_path / "xet-store")
    (tmp_path / "xet-store").mkdir()
    (tmp_path / "xet-store-try.bin").write_bytes(b"a large file" * 100)
    hf_api().create_repo("tester/xet")
    try:
        hf_api().upload_file(
            path_or_fileobj=tmp_path / "xet-store-try.bin", path_in_repo="try.bin", repo_id="tester/xet"
        )
    except (OSError, RuntimeError) as error:
        pytest.skip(f"hf_xet no longer takes a folder as its store (local://, undocumented): {error}")
    assert isinstance(hub.files("tester/xet")["try.bin"], Stored)
    return hub


class TestRoundTrip:
    """Base and teachers to the Hub, a student of them trained and pushed, and its card's code run elsewhere."""

    @pytest.mark.parametrize("mode", ["lfs", "xet"])
    def test_from_hub_to_hub(self, mode, request, tmp_path, monkeypatch):
        hub: LoopbackHub = request.getfixturevalue("hub" if mode == "lfs" else "xet_hub")
        base, first = _push_sources(tmp_path)
        out = tmp_path / "out"
        for junk in ("runs/host/events.out", "notes/image.png", "secrets.json", "notes.png"):
            (out / junk).parent.mkdir(parents=True, exist_ok=True)
            (out / junk).write_text(TOKEN)
        (out / "radar.png").write_bytes(b"a picture")
        dataset = Dataset.from_dict(ROWS)
        args = make_config(
            out,
            max_steps=2,
            num_inference_steps=2,
            eval_num_inference_steps=4,
            guidance_scale=2.0,
            learning_rate=0.3,
            max_sequence_length=None,
            per_device_train_batch_size=1,
            log_completions=True,
            num_completions_to_print=1,
            **EVALUATED_AND_SAVED,
            push_to_hub=True,
            hub_model_id="tester/student",
            hub_strategy="every_save",
            hub_always_push=True,
        )
        trainer = DiffusionOPDTrainer(
            model="tester/base",
            teachers={"ocr": f"tester/teachers/ocr/lora@{first}", "style": "tester/teachers/style/lora"},
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        trainer.train()
        trainer.push_to_hub("Done", dataset_name="me/prompts")

        # What has come
        files = hub.files("tester/student")
        assert set(files) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "pytorch_lora_weights.safetensors",
            "training_args.json",
            "teacher_manifest.json",
            "noise_grid.json",
            "README.md",
            "radar.png",
            *(f"completions/step_{step:06d}.png" for step in (0, 1, 2)),
            *(f"completions/sample_{task}_1.png" for task in ("ocr", "style")),
        }
        assert isinstance(files["pytorch_lora_weights.safetensors"], Stored) == (mode == "xet")
        titles = [commit.title for commit in hub.repositories["tester/student"].commits.values()]
        assert titles[1:] == ["Training in progress, step 1", "Training in progress, step 2", "Done"]
        # The teachers were read from the Hub, at their commits
        commits = list(hub.repositories["tester/teachers"].commits)
        entries = {task: roles[0] for task, roles in json.loads(files["teacher_manifest.json"]).items()}
        assert {task: entry["revision"] for task, entry in entries.items()} == {"ocr": first, "style": commits[-1]}
        assert entries["ocr"]["sha256"] != entries["style"]["sha256"]
        card = ModelCard(files["README.md"].decode())
        assert f"tree/{first}/ocr/lora" in card.text
        assert card.data.base_model == "tester/base" and card.data.license == "openrail++"
        # Elsewhere
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        image = run_card((Path(snapshot_download("tester/student")) / "README.md").read_text())
        assert 'load_lora_weights("tester/student")' in card.text
        assert difference(image, own_image(trainer.pipeline)) == 0
        assert difference(image, own_image(base)) > 10

        # A second run may push to the same repository
        assert repository_problems("tester/student", "tester/base", None) == []

    def test_faults_on_the_way_of_real_clients(self, xet_hub, trainer):
        xet_hub.create("tester/student")
        xet_hub.fail("GET .*/xet-write-token", 500)
        xet_hub.fail("POST .*/commit/", 0)
        pushing.push_folder(trainer.args.output_dir, "tester/student")
        assert isinstance(xet_hub.files("tester/student")["pytorch_lora_weights.safetensors"], Stored)
        assert all(fault.times == 0 for fault in xet_hub.faults)
        (Path(trainer.args.output_dir) / "curves.png").write_bytes(b"a picture")
        xet_hub.fail("GET .*/xet-write-token", 403, times=100)
        with pytest.raises(PushError, match="could not be pushed to 'tester/student': .*Nothing is lost"):
            pushing.push(trainer.args.output_dir, "tester/student", None, blocking=True)

    def test_a_run_that_has_ended_is_pushed_from_its_folder(self, hub, trainer):
        push.main([trainer.args.output_dir, "tester/late"])
        assert "pytorch_lora_weights.safetensors" in hub.files("tester/late")
        with pytest.raises(Refusal, match="cannot push: there is no student in nothing-here"):
            push.main(["nothing-here", "tester/late"])

    def test_a_branch(self, hub, trainer):
        assert make_repository("student", revision="trial") == "tester/student"
        pushing.push(trainer.args.output_dir, "tester/student", None, blocking=True, revision="trial")
        assert "adapter_config.json" in hub.files("tester/student", "trial")
        assert "adapter_config.json" not in hub.files("tester/student")


def _push_sources(folder: Path) -> tuple[StableDiffusion3Pipeline, str]:
    """Pushes a base and two teachers in subfolders, one of them twice; the base and the commit of the first version."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(str(folder / "base"))
    (folder / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n# Base\n")
    api = hf_api()
    api.create_repo("tester/base")
    api.upload_folder(repo_id="tester/base", folder_path=folder / "base")
    api.create_repo("tester/teachers")
    commits = []
    for seed, path in ((1, "ocr/lora"), (2, "ocr/lora"), (3, "style/lora")):
        make_lora(pipeline, folder / f"teacher-{seed}", seed)
        commits.append(
            api.upload_folder(repo_id="tester/teachers", folder_path=folder / f"teacher-{seed}", path_in_repo=path).oid
        )
    return pipeline, commits[0]
