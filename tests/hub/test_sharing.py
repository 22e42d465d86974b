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

"""Sharing a student whose base is a folder, pushing a finished run with its card, and what a push says at its end."""

import copy
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.card_helpers import REPORT, difference, own_image, read_card, run_card, shown_lora, stand_in, write_card
from helpers.opd_fixtures import make_trainer
from helpers.tiny_sd3 import make_pipeline
from huggingface_hub import ModelCard, snapshot_download
from peft import get_peft_model
from PIL import Image

from trl_diffusion_opd import DiffusionOPDConfig, tiny
from trl_diffusion_opd.hub import push as hub_push
from trl_diffusion_opd.hub.names import repository_id_problem
from trl_diffusion_opd.hub.repository import PushError
from trl_diffusion_opd.models.teacher_files import weights_in
from trl_diffusion_opd.reporting.completions import Beside, Completion, log_completions
from trl_diffusion_opd.scripts import push
from trl_diffusion_opd.scripts.main import main as command


PUSHING = {"push_to_hub": True, "hub_model_id": "tester/student"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "my-flux"
    make_pipeline().save_pretrained(str(folder))
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> SimpleNamespace:
    """A finished run in `out`, with a card, from a base in a folder."""
    pipeline = copy.deepcopy(make_pipeline())
    pipeline.register_to_config(_name_or_path=str(base))
    trainer = stand_in(pipeline, tmp_path, get_peft_model(pipeline.transformer, shown_lora()))
    write_card(trainer)
    return trainer


def out(run: SimpleNamespace) -> Path:
    return Path(run.args.output_dir)


def log_images(folder: Path) -> None:
    image = Image.new("RGB", (16, 16), "red")
    beside = {"base": Beside(image, {})}
    prompts = {"ocr": "a sign |\u202e open", "a/b": "a dog"}
    log_completions([Completion(p, t, image, {}, beside=beside) for t, p in prompts.items()], folder, 12, [], [])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("owner/name", None),
        ("name", "it must have the form owner/name"),
        ("a/b/c", "it must have the form owner/name"),
        ("/home", "Repo id must"),
        ("me/my flux", "Repo id must"),
    ],
)
def test_ids(name, problem, tmp_path):
    found = repository_id_problem(name)
    assert found == problem or (problem and found.startswith(problem))
    if problem is not None:
        with pytest.raises(ValueError, match=f"hub_base_model='{name}': "):
            DiffusionOPDConfig(str(tmp_path), use_cpu=True, hub_base_model=name)


class TestTrainer:
    def test_refused_without_the_base_s_id(self, base, teachers, hub, tmp_path):
        for pipeline, which in ((str(base), "is a folder of this machine ('my-flux')"), (None, "was made in memory")):
            with pytest.raises(ValueError) as error:
                make_trainer(tmp_path / "out", teachers, pipeline=pipeline, learning_rate=0.1, **PUSHING)
            message = str(error.value)
            assert f"its base {which}" in message and "--hub_base_model owner/name" in message
            assert str(base.parent) not in message
        assert not (tmp_path / "out").exists()

    def test_named(self, base, teachers, hub, tmp_path, capsys, caplog):
        options = {**PUSHING, "hub_base_model": "tester/flux", "max_steps": 1, "save_strategy": "no"}
        trainer = make_trainer(tmp_path / "out", teachers, pipeline=str(base), **options)
        trainer.train()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):  # the second finds nothing to do
                trainer.push_to_hub()
                assert capsys.readouterr().out.splitlines()[-1] == f"Pushed: {hub.url}/tester/student"
        assert "No files have been modified" not in caplog.text
        files = hub.files("tester/student")
        card = ModelCard(files["README.md"].decode())
        assert (card.data.base_model, card.data.base_model_relation) == ("tester/flux", "adapter")
        assert 'from_pretrained("tester/flux", dtype=torch.float32)\n' in card.text and "its folder" not in card.text
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/flux"

    def test_another_id_than_the_base_s_own(self, teachers, hub, tmp_path):
        pipeline = make_pipeline()
        pipeline.register_to_config(_name_or_path="someone/base")
        with pytest.raises(ValueError, match="hub_base_model='tester/flux', but the base comes from 'someone/base'"):
            make_trainer(tmp_path / "out", teachers, pipeline=pipeline, hub_base_model="tester/flux")


class TestCommand:
    def refusal(self, capsys, *arguments: object) -> str:
        with pytest.raises(SystemExit) as error:
            command(["push", *map(str, arguments)])
        printed = capsys.readouterr().err
        assert error.value.code == 2 and "usage" not in printed and "Traceback" not in printed
        return printed

    def test_refused_without_the_base_s_id(self, run, hub, capsys):
        message = self.refusal(capsys, out(run), "tester/late", "--report", "nothing")
        assert "is a folder of this machine ('my-flux')" in message and "--hub_base_model owner/name" in message
        assert "--report nothing: there is no retention.json in it" in message and hub.repositories == {}
        assert "form owner/name" in self.refusal(capsys, out(run), "tester/late", "--hub_base_model", "flux")

    @pytest.mark.parametrize(
        ("files", "found"),
        [
            ({"model_index.json": b"{}"}, "a whole pipeline"),
            (
                {"pytorch_lora_weights.safetensors": b"", "README.md": b"---\nbase_model: someone/sdxl\n---\n"},
                "a LoRA for another base, 'someone/sdxl' (this student's is 'tester/flux')",
            ),
            (
                {"config.json": b'{"_class_name": "SD3Transformer2DModel"}'},
                "another model (SD3Transformer2DModel)",
            ),
            ({"model.gguf": b""}, "other weights (model.gguf)"),
        ],
    )
    def test_a_repository_that_holds_something_else(self, files, found, run, hub, capsys):
        hub.create("tester/late", files)
        before = (out(run) / "README.md").read_text()
        message = self.refusal(capsys, out(run), "tester/late", "--hub_base_model", "tester/flux")
        wanted = f"the repository 'tester/late' holds {found}. Choose another name, or empty it."
        assert message.splitlines() == ["cannot push:", f"- {wanted}"]
        assert hub.files("tester/late") == files and (out(run) / "README.md").read_text() == before
        # As the same function in Python
        if "for another base" not in found:
            with pytest.raises(PushError, match=re.escape(wanted)):
                hub_push.push(str(out(run)), "tester/late", None, blocking=True)
            job = hub_push.push(str(out(run)), "tester/late", None, blocking=False)
            assert wanted[:-1] in str(job.exception()) and hub.files("tester/late") == files

    def test_a_whole_transformer_goes_to_its_own_kind_alone(self, run, hub, capsys, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
        hub.create("tester/lora", {"adapter_config.json": b"{}"})
        message = self.refusal(capsys, tmp_path / "full", "tester/lora")
        assert "holds a LoRA, and this student is a whole transformer" in message
        hub.create("tester/full", {"config.json": b'{"_class_name": "SD3Transformer2DModel"}'})
        assert hub_push.push_problems(tmp_path / "full", "tester/full") == []

    def test_a_second_push_to_the_same_repository(self, run, hub):
        for _ in range(2):
            push.main([str(out(run)), "tester/late", "--hub_base_model", "tester/flux"])
        assert hub_push.push_problems(out(run), "tester/late") == []

    def test_a_new_branch(self, run, hub):
        push.main([str(out(run)), "tester/late", "--hub_base_model", "tester/flux", "--revision", "trial"])
        assert "adapter_config.json" in hub.files("tester/late", "trial")

    def test_without_a_token(self, run, hub, capsys, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        message = self.refusal(capsys, out(run), "tester/late", "--hub_base_model", "tester/flux")
        assert (
            "- there is no token: log in with `hf auth login`, or set HF_TOKEN to one with write permission" in message
        )
        assert "hub_token" not in message and "push_to_hub" not in message

    def test_a_command_line_that_is_wrong(self, run, hub, capsys):
        message = self.refusal(capsys, out(run))
        assert message.startswith("trl-diffusion-opd push: the following arguments are required: repo_id. `trl")

    def test_a_stranger_can_use_it(self, run, base, hub, capsys, tmp_path, monkeypatch):
        (tmp_path / "report").mkdir()
        of_it = REPORT | {"weights_sha256": {"student": weights_in(out(run))}}
        (tmp_path / "report" / "retention.json").write_text(json.dumps(of_it))
        (tmp_path / "report" / "samples.png").write_bytes(b"samples")
        (tmp_path / "report" / "curves.png").write_bytes(b"no part of a report")
        log_images(out(run))
        arguments = [out(run), "late", "--hub_base_model", "tester/flux", "--report", tmp_path / "report"]
        push.main(list(map(str, arguments)))
        assert capsys.readouterr().out.splitlines()[-1] == f"Pushed: {hub.url}/tester/late"
        files = hub.files("tester/late")
        card = ModelCard(files["README.md"].decode())
        assert card.text.startswith("\n# late\n") and 'load_lora_weights("tester/late")\n' in card.text
        assert (card.data.base_model, card.data.base_model_relation) == ("tester/flux", "adapter")
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/flux"
        assert "**0.900**" in card.text and "(samples.png)" in card.text and "curves.png" not in files
        # The gallery and the last picture
        assert "<Gallery />" in card.text and "this student, after update 12:" in card.text
        assert "![Images after update 12](completions/step_000012.png)" in card.text
        assert card.data.widget == [
            {"text": "a sign |\\u202e open", "output": {"url": "completions/sample_ocr_1.png"}},
            {"text": "a dog", "output": {"url": "completions/sample_a%252Fb_1.png"}},
        ]
        assert {"completions/sample_ocr_1.png", "completions/sample_a%2Fb_1.png"} <= set(files)
        assert not [name for name in files if name.startswith(".card") or name.endswith("last.json")]
        # Elsewhere
        hub.add_folder("tester/flux", base)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        image = run_card((Path(snapshot_download("tester/late")) / "README.md").read_text())
        assert difference(image, own_image(run.base_pipeline)) == 0

    def test_what_was_edited_by_hand_stays(self, run, hub, capsys):
        card = out(run) / "README.md"
        card.write_text(card.read_text() + "\nMy own words.\n")
        push.main([str(out(run)), "tester/late", "--hub_base_model", "tester/flux"])
        assert "README.md was edited by hand" in capsys.readouterr().out
        assert hub.files("tester/late")["README.md"].decode().endswith("My own words.\n")

    def test_the_tiny_base_needs_no_id(self, run, hub, tmp_path):
        run.base_pipeline.register_to_config(_name_or_path=tiny.BASE)
        write_card(run)
        push.main([str(out(run)), "tester/late"])
        text = hub.files("tester/late")["README.md"].decode()
        assert "from trl_diffusion_opd import tiny\n" in text and "from_pretrained(tiny.BASE, dtype" in text
        assert read_card(run).data.base_model is None
