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

"""A Hub that fails: what is refused before the first step, what is tried again, and that no checkpoint is ever lost."""

import json
import logging
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.loopback_hub import READ_TOKEN, LoopbackHub
from helpers.opd_fixtures import make_trainer
from helpers.tiny_sd3 import make_pipeline
from huggingface_hub import snapshot_download
from transformers.utils.hub import hf_api

from trl_diffusion_opd.hub import errors as hub_errors
from trl_diffusion_opd.hub.errors import download, explained, retried
from trl_diffusion_opd.hub.repository import PushError
from trl_diffusion_opd.models.teachers import TeacherError, parse_teacher, read_lora


pytestmark = pytest.mark.slow


CHECKPOINT = {"optimizer.pt", "student_raw.safetensors", "adapter_model.safetensors", "trainer_state.json", "complete"}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No time passes while the code under test, or huggingface_hub in it, waits to try again."""
    waited: list[float] = []
    sleeping = SimpleNamespace(sleep=waited.append)
    monkeypatch.setattr(hub_errors, "time", sleeping)
    monkeypatch.setattr("huggingface_hub.utils._http.time", sleeping)
    return waited


def _trainer(folder: Path, teachers: dict[str, str], **options):
    defaults = dict(max_steps=3, save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="tester/student")
    defaults["hub_base_model"] = "tester/base"
    return make_trainer(folder / "out", teachers, **{**defaults, "hub_strategy": "every_save", **options})


def _complete(folder: Path) -> list[int]:
    """Numbers of the checkpoints that are complete."""
    folders = sorted(folder.glob("out/checkpoint-*"))
    assert all({path.name for path in checkpoint.iterdir()} >= CHECKPOINT for checkpoint in folders)
    return [int(checkpoint.name.split("-")[1]) for checkpoint in folders]


class TestBeforeTheFirstStep:
    def _refused(self, folder: Path, teachers: dict[str, str], **options) -> str:
        with pytest.raises(ValueError) as error:
            _trainer(folder, teachers, **options)
        assert not (folder / "out").exists()
        (message,) = str(error.value).splitlines()[1:]
        return message

    def test_no_token(self, hub, tmp_path, teachers, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        message = self._refused(tmp_path, teachers)
        assert "there is no token: log in with `hf auth login`, or set HF_TOKEN or hub_token" in message
        assert hub.repositories == {}

    def test_a_wrong_token(self, hub, tmp_path, teachers):
        message = self._refused(tmp_path, teachers, hub_token="hf_wrong")
        assert "the Hub does not know your token (401). Log in with `hf auth login`" in message
        assert "hf_wrong" not in message

    def test_a_token_that_may_only_read(self, hub, tmp_path, teachers, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        assert "your token may only read. Make one with write permission" in self._refused(tmp_path, teachers)

    def test_a_repository_of_others(self, hub, tmp_path, teachers):
        message = self._refused(tmp_path, teachers, hub_model_id="somebody/student")
        assert "it belongs to 'somebody', but your token belongs to 'tester'" in message

    def test_no_right_to_write_there(self, hub, tmp_path, teachers):
        # As with a fine-grained token: it has no role, and the repository is there to be seen.
        hub.create("tester/student")
        hub.fail("GET /api/models/tester/student/auth-check/write", 403)
        assert "your token is not allowed to write there (403)" in self._refused(tmp_path, teachers)

    def test_an_impossible_name(self, hub, tmp_path, teachers):
        message = self._refused(tmp_path, teachers, hub_model_id="tester/my student")
        assert "hub_model_id='tester/my student': no repository can have that name. Repo id must" in message

    @pytest.mark.parametrize("kind", ["dataset", "space"])
    def test_another_kind_of_repository(self, kind, hub, tmp_path, teachers):
        hub.create("tester/student", kind=kind)
        message = self._refused(tmp_path, teachers)
        assert f"hub_model_id='tester/student' is a {kind} on the Hub, not a model. Choose another name." in message

    FOREIGN = {
        "a whole pipeline": {"model_index.json": {}},
        "another model (GPT2LMHeadModel)": {"config.json": {"architectures": ["GPT2LMHeadModel"]}, "a.bin": None},
        "other weights (model.gguf)": {"model.gguf": None},
        "a LoRA for another base, 'someone/flux' (this student's is 'someone/base')": {
            "adapter_config.json": {"base_model_name_or_path": "someone/flux"},
            "adapter_model.safetensors": None,
        },
    }

    @pytest.mark.parametrize("found", FOREIGN)
    def test_a_model_of_another_kind(self, found, hub, tmp_path, teachers):
        files = {
            name: b"{}" if data is None else json.dumps(data).encode() for name, data in self.FOREIGN[found].items()
        }
        hub.create("tester/student", files)
        pipeline = make_pipeline()
        pipeline.register_to_config(_name_or_path="someone/base")
        message = self._refused(tmp_path, teachers, pipeline=pipeline, hub_base_model=None)
        assert f"hub_model_id='tester/student' holds {found}. Choose another name, or empty it." in message
        assert set(hub.files("tester/student")) == set(files)

    def test_a_lora_whose_card_names_another_base(self, hub, tmp_path, teachers):
        card = b"---\nbase_model: someone/flux\n---\n"
        hub.create("tester/student", {"pytorch_lora_weights.safetensors": b"", "README.md": card})
        pipeline = make_pipeline()
        pipeline.register_to_config(_name_or_path="someone/base")
        assert "a LoRA for another base, 'someone/flux'" in self._refused(
            tmp_path, teachers, pipeline=pipeline, hub_base_model=None
        )

    def test_a_lora_where_all_weights_go(self, hub, tmp_path, teachers):
        hub.create("tester/student", {"pytorch_lora_weights.safetensors": b""})
        assert "a LoRA, and this student is a whole transformer" in self._refused(tmp_path, teachers, peft_config=None)

    @pytest.mark.parametrize("files", [{}, {"README.md": b"# Mine"}, {"adapter_config.json": b"{}"}])
    def test_what_is_fine(self, files, hub, tmp_path, teachers):
        hub.create("tester/student", files)
        assert _trainer(tmp_path, teachers).hub_model_id == "tester/student"

    def test_the_name_of_the_folder(self, hub, tmp_path, teachers):
        assert _trainer(tmp_path, teachers, hub_model_id=None).hub_model_id == "tester/out"

    @pytest.mark.parametrize("status", [429, 500, 503, 0])
    def test_faults_that_pass(self, status, hub, tmp_path, teachers):
        hub.fail("GET /api/whoami", status)
        hub.fail("POST /api/repos/create", status, times=2)
        assert _trainer(tmp_path, teachers).hub_model_id == "tester/student"

    def test_a_hub_that_stays_down(self, hub, tmp_path, teachers, waits):
        hub.fail("", 503, times=100)
        assert "the Hub itself has a fault (503). Try again later" in self._refused(tmp_path, teachers)
        assert waits == [1, 4, 16]  # bounded

    def test_everything_wrong_is_told_at_once(self, hub, tmp_path, teachers):
        with pytest.raises(ValueError) as error:
            _trainer(tmp_path, {**teachers, "draw": "tester/nobody"}, hub_token="hf_wrong", task_weights={"x": 1})
        message = str(error.value)
        assert "does not know your token" in message and "tester/nobody: no such folder" in message
        assert "task_weights has a weight for task 'x'" in message


PIPELINE = cache(make_pipeline)  # nothing is changed in it where a file is read


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    PIPELINE().save_pretrained(folder)
    return folder


class TestReading:
    """Teachers, rewards and bases all ask through [`explained`] and [`retried`]."""

    @pytest.fixture
    def teacher(self, hub: LoopbackHub, teachers: dict[str, str]) -> str:
        hub.add_folder("someone/teacher", Path(teachers["count"]))
        return "someone/teacher"

    def _refused(self, name: str) -> str:
        with pytest.raises(TeacherError) as error:
            read_lora(PIPELINE(), parse_teacher(name))
        return str(error.value)

    def test_a_revision_that_is_missing(self, teacher):
        assert f"{teacher}@v2: the repository has no revision 'v2'" in self._refused(f"{teacher}@v2")

    @pytest.mark.parametrize("token", [None, READ_TOKEN])
    def test_gated(self, hub, teacher, token, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        hub.repositories[teacher].gated = True
        message = self._refused(teacher)
        assert (
            f"gated. Accept its terms on https://huggingface.co/{teacher} and log in with `hf auth login`" in message
        )

    def test_private(self, hub, teacher, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        hub.repositories[teacher].private = True
        assert "no such repository on the Hub" in self._refused(teacher)
        assert "for a private repository log in with `hf auth login`" in self._refused(teacher)

    def test_a_wrong_token(self, teacher, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        message = self._refused(teacher)
        assert "the Hub does not know your token (401)" in message and "hf_wrong" not in message

    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 0])
    @pytest.mark.parametrize(
        "request_", ["GET /api/models/someone", "GET /api/.*/tree", "HEAD", "GET /someone.*safete"]
    )
    def test_faults_that_pass(self, request_, status, hub, teacher):
        hub.fail(request_, status)
        config, tensors, _ = read_lora(PIPELINE(), parse_teacher(teacher))
        assert config.r == 4 and tensors
        assert hub.faults[0].times == 0

    def test_retry_after(self, hub, teacher, waits):
        hub.fail("GET /api/models/someone", 429, Retry_After="7")
        read_lora(PIPELINE(), parse_teacher(teacher))
        assert waits == [7]
        hub.fail("GET /api/models/someone", 429, Retry_After="86400")
        snapshot = retried(snapshot_download, teacher)
        assert waits == [7, 300] and snapshot  # no longer than the Hub's windows

    @pytest.mark.parametrize(("status", "reason"), [(429, "no more requests from you"), (500, "has a fault (500)")])
    def test_faults_that_stay(self, status, reason, hub, teacher, waits):
        hub.fail("someone/teacher", status, times=1000)
        assert reason in self._refused(teacher)
        assert sum(waits) < 60

    def test_what_does_not_pass_is_not_tried_again(self, hub, teacher, waits):
        self._refused(f"{teacher}@v2")
        self._refused("someone/nobody")
        assert waits == []

    @pytest.mark.parametrize("fault", ["gated", "private", "token", "revision", "down"])
    def test_a_base(self, fault, hub, tmp_path, teachers, monkeypatch, saved_base):
        hub.add_folder("someone/base", saved_base)
        options = {}
        if fault in ("gated", "private"):
            monkeypatch.delenv("HF_TOKEN")
            setattr(hub.repositories["someone/base"], fault, True)
        elif fault == "token":
            monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        elif fault == "revision":
            options = {"model_init_kwargs": {"revision": "v9"}}
        else:
            hub.fail("someone/base", 500, times=1000)
        reasons = {
            "gated": "the repository is gated. Accept its terms on https://huggingface.co/someone/base",
            "private": "no such folder here and no such repository on the Hub. Check the spelling; for a private repository log in",
            "token": "the Hub does not know your token (401)",
            "revision": "the repository has no revision 'v9'",
            "down": "the Hub itself has a fault (500)",
        }
        with pytest.raises(ValueError) as error:
            make_trainer(tmp_path / "out", teachers, pipeline="someone/base", **options)
        assert f"The base model 'someone/base': {reasons[fault]}" in str(error.value)

    def test_a_base_after_a_fault(self, hub, tmp_path, teachers, saved_base):
        hub.add_folder("someone/base", saved_base)
        hub.fail("GET /api/models/someone/base", 500)
        assert make_trainer(tmp_path / "out", teachers, pipeline="someone/base").tasks

    def test_a_reward(self, hub, monkeypatch):
        """As the rewards ask for their weights."""
        hub.create("someone/reward", {"config.json": b"{}"}, private=True)
        assert (download("pickscore", "someone/reward", None, ["*.json"]) / "config.json").is_file()
        monkeypatch.delenv("HF_TOKEN")
        hub.create("someone/hidden", {"config.json": b"{}"}, private=True)
        with pytest.raises(ValueError, match="pickscore: no such folder here and no such repository on the Hub"):
            download("pickscore", "someone/hidden", None, ["*.json"])

    def test_errors_of_others_pass_unchanged(self):
        with pytest.raises(FileNotFoundError, match="mine"), explained("a model", "someone/model"):
            raise FileNotFoundError("mine")


class TestPushing:
    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            ("PUT /_lfs", 0),
            ("PUT /_lfs", 500),
            ("POST /.*/commit/", 0),
            ("POST /.*/commit/", 429),
            ("POST /api/validate-yaml", 500),
            ("POST .*preupload", 0),
        ],
    )
    def test_faults_that_pass(self, request_, status, hub, tmp_path, teachers, caplog):
        trainer = _trainer(tmp_path, teachers, max_steps=1)
        hub.fail(request_, status, Retry_After="0")
        with caplog.at_level(logging.WARNING, "trl_diffusion_opd.hub.push"):
            trainer.train()
        assert hub.faults[0].times == 0 and "failed" not in caplog.text
        pushed = hub.files("tester/student")
        assert pushed["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        titles = [commit.title for commit in hub.repositories["tester/student"].commits.values()]
        assert titles == ["initial commit", "Training in progress, step 1"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("status", "reason", "strategy"),
        [
            (401, "the Hub does not know your token (401)", "every_save"),
            (403, "your token is not allowed to do this (403)", "every_save"),
            (404, "404 Not Found", "every_save"),
            (500, "the Hub itself has a fault (500)", "every_save"),
            (500, "the Hub itself has a fault (500)", "checkpoint"),
            (0, "the connection to the Hub failed", "every_save"),
        ],
    )
    def test_training_goes_on(self, status, reason, strategy, hub, tmp_path, teachers, caplog):
        trainer = _trainer(tmp_path, teachers, hub_strategy=strategy, max_steps=2)
        hub.fail("POST .*(commit|preupload)|PUT", status, times=10_000)
        with caplog.at_level(logging.WARNING, "trl_diffusion_opd.hub.push"):
            trainer.train()
        assert trainer.state.global_step == 2 and _complete(tmp_path) == [1, 2]
        assert f"failed: {reason}" in caplog.text or reason in caplog.text
        assert "Training goes on and its checkpoints are intact; the next push brings everything." in caplog.text
        # The end: what happened, where the student is, and how to push it
        with pytest.raises(PushError) as error:
            trainer.push_to_hub()
        message = str(error.value)
        assert "could not be pushed to 'tester/student'" in message and reason in message
        folder = str(tmp_path / "out")
        assert f"saved in {folder!r}" in message
        assert f"`trl-diffusion-opd push {folder} tester/student`" in message
        assert set(hub.files("tester/student")) == set()
        # And then it works
        hub.faults.clear()
        trainer.push_to_hub()
        pushed = hub.files("tester/student")
        weights = (tmp_path / "out" / "pytorch_lora_weights.safetensors").read_bytes()
        assert pushed["pytorch_lora_weights.safetensors"] == weights and "README.md" in pushed

    def test_a_repository_that_was_deleted(self, hub, tmp_path, teachers, caplog):
        trainer = _trainer(tmp_path, teachers)
        hub.repositories.clear()
        with caplog.at_level(logging.WARNING, "trl_diffusion_opd.hub.push"):
            trainer.train()
        assert _complete(tmp_path) == [1, 2, 3]
        assert "there is no such repository, or your token does not see it (404)" in caplog.text

    def test_a_later_push_brings_everything(self, hub, tmp_path, teachers):
        trainer = _trainer(tmp_path, teachers, hub_always_push=True)
        hub.fail("PUT /_lfs", 403, times=3)  # the first push fails, the second comes through
        trainer.train()
        pushed = hub.files("tester/student")
        assert (
            pushed["adapter_model.safetensors"]
            == (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
        )

    def test_in_the_background(self, hub, tmp_path, teachers, caplog):
        trainer = _trainer(tmp_path, teachers, save_strategy="no")
        hub.fail("POST .*preupload", 403)
        with caplog.at_level(logging.WARNING, "trl_diffusion_opd.hub.push"):
            job = trainer.push_to_hub(blocking=False)
            assert job.exception() is not None
            hf_api().run_as_future(int).result()  # the next job comes after the first one's report
        assert "trl-diffusion-opd push" in caplog.text

    def test_a_push_that_nobody_announced_is_checked_too(self, hub, tmp_path, teachers):
        hub.create("tester/student", kind="dataset")
        trainer = _trainer(tmp_path, teachers, push_to_hub=False)
        with pytest.raises(PushError, match="is a dataset on the Hub, not a model"):
            trainer.push_to_hub()
        assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
