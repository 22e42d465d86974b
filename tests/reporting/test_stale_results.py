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

"""A card shows the report, pictures and images of its own student, and of no earlier one."""

import json
from pathlib import Path

import pytest
import torch
from helpers.card_helpers import read_card, shown_lora, stand_in, write_card, write_report
from helpers.tiny_sd3 import make_pipeline
from peft import get_peft_model
from PIL import Image

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.models.teacher_files import weights_in
from trl_diffusion_opd.reporting.completions import Beside, Completion, log_completions
from trl_diffusion_opd.reporting.model_card import write_model_card
from trl_diffusion_opd.reporting.student_card import name_base, rewrite_card


PICTURES = ("samples.png", "retention.png", "radar.png")


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture
def trainer(pipeline, tmp_path):
    """A stand-in for a trainer whose folder has a student, its report and pictures."""
    pipeline.register_to_config(_name_or_path="someone/base")
    trainer = stand_in(pipeline, tmp_path, get_peft_model(make_pipeline().transformer, shown_lora()))
    write_report(tmp_path / "out")
    for name in (*PICTURES, "curves.png"):
        (tmp_path / "out" / name).write_bytes(b"picture")
    return trainer


def _train_on(trainer) -> None:
    """The student gets other weights, and is saved over the one before."""
    with torch.no_grad():
        next(p for p in trainer.student.model.parameters() if p.requires_grad).add_(1)
    trainer.student.save(trainer.args.output_dir)


def test_the_report_of_the_student_is_shown(trainer, hub, capsys):
    write_card(trainer)
    card = read_card(trainer)
    assert "**0.900**" in card.text and all(name in card.text for name in (*PICTURES, "curves.png"))
    assert card.data.eval_results and "leaves it out" not in capsys.readouterr().out


def test_the_report_of_an_earlier_student_is_left_out_and_told_once(trainer, hub, capsys):
    _train_on(trainer)
    write_card(trainer)
    write_card(trainer)
    card = read_card(trainer)
    assert "**0.900**" not in card.text and not any(name in card.text for name in PICTURES)
    assert not card.data.eval_results and "curves.png" in card.text
    assert capsys.readouterr().out.count("is not of the student there, so its card leaves it out.") == 1


def test_a_push_leaves_it_out_too(trainer, hub, capsys):
    write_card(trainer)
    out = Path(trainer.args.output_dir)
    assert rewrite_card(out, "me/student") is None
    assert "**0.900**" in read_card(trainer).text
    _train_on(trainer)
    assert rewrite_card(out, "me/student") is None
    assert "**0.900**" not in read_card(trainer).text and not read_card(trainer).data.eval_results


def test_a_report_that_names_no_weights_is_left_out(trainer, hub):
    out = Path(trainer.args.output_dir)
    report = json.loads((out / "retention.json").read_text())
    del report["weights_sha256"]
    (out / "retention.json").write_text(json.dumps(report))
    write_card(trainer)
    assert "**0.900**" not in read_card(trainer).text


def test_the_base_s_id_in_the_config_changes_no_weights(trainer):
    out = Path(trainer.args.output_dir)
    before = weights_in(out)
    name_base(out, "someone/else")
    assert before is not None and weights_in(out) == before
    assert weights_in(out.parent) is None


def test_the_card_of_a_checkpoint_loads_the_checkpoint_and_has_no_report(trainer, hub):
    write_model_card(trainer.args.output_dir, DiffusionOPDTrainer.card_facts(trainer, "checkpoint-12"))
    text = read_card(trainer).text
    assert 'pipe.load_lora_weights("out/checkpoint-12")  # a checkpoint: the training goes on, or was stopped' in text
    assert "**0.900**" not in text and not any(name in text for name in (*PICTURES, "curves.png"))
    assert rewrite_card(Path(trainer.args.output_dir), "me/student") is None  # the folder's student is pushed
    assert 'pipe.load_lora_weights("me/student")\n' in read_card(trainer).text


@pytest.mark.parametrize(("update", "is_its_own"), [(12, True), (6, False)])
def test_images_of_an_earlier_update_are_no_gallery(trainer, hub, update, is_its_own):
    image = Image.new("RGB", (8, 8))
    shown = Completion("a cat", "ocr", image, {}, beside={"base": Beside(image, {})})
    log_completions([shown], trainer.args.output_dir, update, [], [])
    write_card(trainer)
    card = read_card(trainer)
    assert ("<Gallery />" in card.text) == is_its_own == (card.data.get("widget") is not None)
    said = "and this student, after update 12:" if is_its_own else "and the student, after update 6 of 12:"
    assert said in card.text
