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

"""The results of an earlier run in the folder: a new run moves them aside, a run that goes on keeps its own."""

import json
import shutil

import pytest
from helpers.opd_fixtures import make_dataset, make_trainer
from PIL import Image

from trl_diffusion_opd.checkpointing.checkpoint import checkpoints
from trl_diffusion_opd.checkpointing.results import images_after, results
from trl_diffusion_opd.models.teacher_files import weights_in


OPTIONS = dict(
    max_steps=3,
    save_strategy="steps",
    save_steps=1,
    learning_rate=1e-2,
    log_completions=True,
    num_completions_to_print=1,
)
STUDENT = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teachers):
    """A run of three updates with its student, card and images, and the files of an evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, teachers, **OPTIONS)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    write_evaluation(folder)
    return folder


def write_evaluation(folder):
    (folder / "retention.json").write_text(json.dumps({"weights_sha256": {"student": weights_in(folder)}}))
    (folder / "retention.md").write_text("# Retention\n")
    (folder / "samples.html").write_text('<a href="images/k/draw/0.png"><img src="images/k/draw/0.png"></a>')
    (folder / "curves.png").write_bytes(b"curves")
    (folder / "images" / "k" / "draw").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(folder / "images" / "k" / "draw" / "0.png")


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _names(folder):
    return {path.name for path in folder.iterdir()}


def _updates(folder):
    return sorted(int(path.stem[5:]) for path in (folder / "completions").glob("step_*.png"))


def test_a_new_run_leaves_nothing_of_the_earlier_one_in_the_folder(copied, teachers, caplog):
    was = {name: (copied / name).read_bytes() for name in STUDENT}
    make_trainer(copied, teachers, **OPTIONS | {"max_steps": 1}).train()
    aside = copied / "earlier-run-1"
    assert "moved to earlier-run-1, with the results beside them. To go on from one" in caplog.text
    evaluated = {"retention.json", "retention.md", "samples.html", "curves.png"}
    assert _names(aside) >= STUDENT | evaluated | {".card.json", "completions", "checkpoint-3", "training_args.json"}
    assert {name: (aside / name).read_bytes() for name in STUDENT} == was
    assert not _names(copied) & (evaluated | STUDENT - {"README.md"})  # the card is the new run's
    assert 'load_lora_weights("run/checkpoint-1")' in (copied / "README.md").read_text()
    assert _updates(aside) == [0, 1, 2, 3] and _updates(copied) == [0, 1]
    # The images of an evaluation stay: the next one reuses those of base and teachers. The page still shows them.
    assert (copied / "images" / "k" / "draw" / "0.png").exists()
    assert (aside / "samples.html").read_text().count('"../images/k/draw/0.png"') == 2


def test_results_without_checkpoints_are_moved_too(copied, teachers, caplog):
    for folder in checkpoints(copied):
        shutil.rmtree(folder)
    make_trainer(copied, teachers, **OPTIONS | {"max_steps": 1}).train()
    assert f"{copied} holds results that this run does not go on from (" in caplog.text
    assert _updates(copied) == [0, 1] and (copied / "earlier-run-1" / "retention.json").exists()


def test_a_run_that_goes_back_sets_later_results_and_images_aside(copied, teachers):
    last = copied / "completions" / "last.json"
    make_trainer(copied, teachers, **OPTIONS | {"log_completions": False}).train(
        resume_from_checkpoint=str(copied / "checkpoint-2")
    )
    aside = copied / "earlier-run-1"
    assert _names(aside) >= STUDENT | {"checkpoint-3", "retention.json", "completions"}
    assert _updates(aside) == [3] and _updates(copied) == [0, 1, 2]
    assert not last.exists() and (aside / "completions" / "last.json").exists()
    assert {path.suffix for path in (aside / "completions").glob("completions_*")} == {".parquet"}


def test_a_run_that_is_extended_keeps_its_results_until_it_has_others(copied, teachers, caplog):
    trainer = make_trainer(copied, teachers, **OPTIONS | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert not (copied / "earlier-run-1").exists() and _updates(copied) == [0, 1, 2, 3, 4]
    trainer.save_model()
    assert "is of an earlier student. It was moved to earlier-run-1;" in caplog.text
    assert _names(copied / "earlier-run-1") == {"retention.json", "retention.md", "samples.html"}
    write_evaluation(copied)
    trainer.save_model()  # the same weights: the report is theirs
    assert (copied / "retention.json").exists()


def test_images_after_the_last_complete_checkpoint(copied, teachers, caplog):
    shutil.rmtree(copied / "checkpoint-3")
    make_trainer(copied, teachers, **OPTIONS | {"max_steps": 2}).train(resume_from_checkpoint=True)
    assert _updates(copied) == [0, 1, 2] and _updates(copied / "earlier-run-1") == [3]
    assert "holds results that this run does not go on from" in caplog.text
    assert (copied / "retention.json").exists()  # of this very run


def test_what_is_evaluated_before_a_new_run_is_its_own(tmp_path, teachers):
    trainer = make_trainer(tmp_path, teachers, eval_dataset=make_dataset(), **OPTIONS | {"max_steps": 1})
    trainer.evaluate()
    trainer.train()
    assert _updates(tmp_path) == [0, 1] and not (tmp_path / "earlier-run-1").exists()


def test_files_of_others_are_no_results(tmp_path):
    for name in ("README.md", "config.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "images").mkdir()
    assert results(tmp_path, "a run") == [] == images_after(tmp_path, None)


def test_scores_of_base_and_teachers_stay_with_their_run(tmp_path):
    (tmp_path / "base_and_teachers.json").write_text(json.dumps({"run": "mine", "sets": {}}))
    assert results(tmp_path, "mine") == []
    assert results(tmp_path, "another") == [tmp_path / "base_and_teachers.json"]
