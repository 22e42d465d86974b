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

"""The model cards of students and teachers: metadata, text, and that their code does what it says."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import StableDiffusion3Pipeline
from helpers.card_helpers import (
    COMMIT,
    FIELDS,
    REPORT,
    code_of,
    difference,
    own_image,
    read_card,
    run_card,
    run_code,
    shown_lora,
    stand_in,
    write_card,
    write_report,
)
from helpers.tiny_sd3 import make_lora, make_pipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import get_peft_model

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.models.teachers import read_lora
from trl_diffusion_opd.reporting import model_card
from trl_diffusion_opd.reporting.model_card import training_seconds
from trl_diffusion_opd.reporting.teacher_card import write_teacher_card


SD35_LICENSE = "---\nlicense: other\nlicense_name: stabilityai-ai-community\nlicense_link: LICENSE.md\n---\n# Base\n"
CALL = {"prompt": "a cat", "guidance_scale": 2.0, "num_inference_steps": 4, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3Pipeline:
    folder = str(tmp_path_factory.mktemp("model") / "base")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder)
    pipeline.register_to_config(_name_or_path=folder)
    return pipeline


@pytest.fixture
def trainer(base: StableDiffusion3Pipeline, tmp_path: Path) -> SimpleNamespace:
    """With a LoRA that shows, its base in `base` and its output in `out`."""
    (tmp_path / "base").symlink_to(base.config["_name_or_path"])
    pipeline = copy.deepcopy(base)
    return stand_in(pipeline, tmp_path, get_peft_model(pipeline.transformer, shown_lora()))


def _write_report(trainer: SimpleNamespace) -> None:
    write_report(Path(trainer.args.output_dir))


class TestStudent:
    def test_metadata(self, trainer, tmp_path, hub):
        hub.create("someone/base", {"README.md": SD35_LICENSE.encode()})
        trainer.base_pipeline.register_to_config(_name_or_path="someone/base")
        trainer.hub_model_id = "me/student"
        write_card(trainer, dataset_name=["me/prompts", str(tmp_path)], tags="mine")
        data = read_card(trainer).data.to_dict()
        assert data == {
            "base_model": "someone/base",
            "base_model_relation": "adapter",
            "license": "other",
            "license_name": "stabilityai-ai-community",
            "license_link": "https://huggingface.co/someone/base/blob/main/LICENSE.md",
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["trl", "diffusion-opd", "lora", "mine"],
            "datasets": ["me/prompts"],
        }
        text = read_card(trainer).text
        assert text.startswith("\n# student\n")
        assert 'pipe.load_lora_weights("me/student")\n' in text
        assert 'from_pretrained("someone/base", dtype=torch.float32)\n' in text

    @pytest.mark.parametrize("card", [None, "# No metadata\n", "---\ntags:\n- mine\n---\n"])
    def test_no_licence_is_made_up(self, card, trainer, hub):
        if card is not None:
            hub.create("someone/base", {"README.md": card.encode()})
        trainer.base_pipeline.register_to_config(_name_or_path="someone/base")
        write_card(trainer)
        assert not [name for name in read_card(trainer).data.to_dict() if name.startswith("license")]

    def test_the_licence_of_a_gated_base(self, trainer, hub, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        hub.create("someone/base", {"README.md": SD35_LICENSE.encode()}, gated=True)
        trainer.base_pipeline.register_to_config(_name_or_path="someone/base")
        write_card(trainer)
        assert read_card(trainer).data.license_name == "stabilityai-ai-community"

    def test_a_hub_that_is_down_costs_the_licence_only(self, trainer, hub):
        hub.create("someone/base", {"README.md": SD35_LICENSE.encode()})
        hub.fail("GET /api/models/someone/base", 500)
        trainer.base_pipeline.register_to_config(_name_or_path="someone/base")
        write_card(trainer)
        assert read_card(trainer).data.license is None and read_card(trainer).data.base_model == "someone/base"
        write_card(trainer)
        assert read_card(trainer).data.license == "other"

    def test_valid_for_the_hub(self, trainer, hub):
        """huggingface_hub's own checks: of the metadata by the Hub, and there and back through its types."""
        _write_report(trainer)
        trainer.hub_model_id = "me/student"
        write_card(trainer, dataset_name="me/prompts")
        card = read_card(trainer)
        card.validate()
        assert "POST /api/validate-yaml" in hub.requests
        data = card.data.to_dict()
        assert ModelCardData(**data).to_dict() == data
        name, results = model_index_to_eval_results(data["model-index"])
        assert name == "student"
        found = [(r.dataset_config, r.metric_type, r.metric_value, r.verified) for r in results]
        assert found == [
            ("ocr", "ocr", 0.7, False),
            ("ocr", "retention", 0.9, False),
            ("style", "look", 0.5, False),
        ]
        assert {(r.task_type, r.dataset_type) for r in results} == {("text-to-image", "me/prompts")}
        assert results[1].metric_args == {"ci95": [0.8, 1.01]} and results[0].dataset_args == {"num_images": 64}
        assert all(result.dataset_name for result in results)

    def test_invalid_metadata_would_be_seen(self, hub):
        card = ModelCard("---\ndatasets: prompts\nbase_model_relation: child\n---\n")
        with pytest.raises(ValueError, match="datasets.*base_model_relation"):
            card.validate()

    def test_a_local_base_is_a_name(self, trainer, tmp_path):
        write_card(trainer)
        data = read_card(trainer).data.to_dict()
        assert not {"base_model", "base_model_relation", "datasets", "license", "model-index"} & set(data)
        assert str(tmp_path) not in read_card(trainer).content
        assert "the local model `base`" in read_card(trainer).text

    def test_teachers_and_sampling(self, trainer):
        write_card(trainer)
        text = read_card(trainer).text
        link = f"https://huggingface.co/someone/teachers/tree/{COMMIT}/ocr/lora"
        assert f"| ocr | [someone/teachers/ocr/lora]({link}) | 4.5 | 1 | 16 | commit 0123456789ab |" in text
        assert "| style\\|x | local-teacher | 1.0 | 1 | 4 | sha256 beefbeefbeef |" in text
        assert "| training (sampler `ode`) | 2.5 | 3 |" in text
        assert "| evaluation; use these to sample | **2.0** | **4** |" in text
        assert FIELDS["method"] in text and "| loss | kl |" in text
        assert "| updates | 12 |" in text and "| LoRA | rank 4, alpha 8, on attn.add_k_proj," in text
        assert "| hardware | CPU |" in text and "training time" not in text
        assert "2605.15055" in text and "vonwerra2020trl" in text and "Results" not in text
        assert "{{" not in text.replace("{{TRL: Transformers", "").replace("{{DiffusionOPD}}", "")

    def test_results(self, trainer):
        _write_report(trainer)
        for picture in ("samples.png", "radar.png"):
            (Path(trainer.args.output_dir) / picture).touch()
        write_card(trainer)
        text = read_card(trainer).text
        assert "| ocr | ocr | 0.250 | 0.750 | 0.700 | 0.900 | 0.800 to 1.010 |" in text
        assert "| style | look | 0.500 | 0.520 | 0.500 | – | – |" in text
        assert "| **mean** | | | | | **0.900** | 0.800 to 1.010 |" in text and "64 images a task, seed 7" in text
        assert text.index("](samples.png)") < text.index("](radar.png)") and "](retention.png)" not in text

    def test_curves_that_jump_are_explained(self, trainer):
        """Where each update trains other steps, and where there are curves to see."""
        note = "single points of the training curves jump"
        facts = {**FIELDS, "steps_drawn": True}
        trainer._card_fields = lambda: facts
        write_card(trainer)
        assert note not in read_card(trainer).text
        (Path(trainer.args.output_dir) / "curves.png").write_bytes(b"a picture")
        write_card(trainer)
        assert note in read_card(trainer).text
        facts["steps_drawn"] = False
        write_card(trainer)
        text = read_card(trainer).text
        assert note not in text and "![Training curves](curves.png)" in text

    def test_training_time_adds_up_over_resumes(self, trainer):
        # 10 updates of 2 s, then 30 of 6 s.
        logs = [{"step": 10, "step_time": 2.0}, {"step": 10, "eval_loss": 1.0}, {"step": 40, "step_time": 6.0}]
        assert training_seconds(logs) == 200.0 and training_seconds([{"step": 3, "loss": 1.0}]) is None
        trainer.state.log_history = logs
        write_card(trainer)
        assert "| training time | 3 min, without evaluation and saving |" in read_card(trainer).text

    @pytest.mark.parametrize("kind", ["lora", "peft", "full"])
    def test_its_code_makes_the_students_image(self, kind, trainer, base, tmp_path, monkeypatch):
        pipeline = trainer.base_pipeline
        if kind == "peft":
            monkeypatch.setattr(model_card, "loads_lora", lambda pipeline: False)
        if kind == "full":
            merged = trainer.student.model.merge_and_unload()
            pipeline.transformer = merged
            trainer = stand_in(pipeline, tmp_path / "full", merged)
            (tmp_path / "full" / "base").symlink_to(tmp_path / "base")
        write_card(trainer)
        monkeypatch.chdir(Path(trainer.args.output_dir).parent)
        text = read_card(trainer).text
        assert ("load_lora_weights" in text, "PeftModel" in text) == (kind == "lora", kind == "peft")
        assert ("lora" in read_card(trainer).data.tags) == (kind != "full")
        image = run_card(text)
        assert difference(image, own_image(pipeline)) <= 1  # rounding of a merge
        assert difference(image, own_image(base)) > 10

    def test_classifier_free_guidance_by_its_own_name(self, trainer):
        # Qwen-Image and Flux: guidance_scale would be an embedding, and without a negative prompt nothing happens.
        calls = []
        trainer.evaluator.field = SimpleNamespace(
            call_options=lambda prompts, scale: (
                calls.append((prompts, scale))
                or {"prompt": prompts, "negative_prompt": [""], "true_cfg_scale": scale, "image": object()}
            )
        )
        write_card(trainer)
        text = read_card(trainer).text
        assert calls == [(["a cat"], 2.0)]
        assert '    negative_prompt="",\n    true_cfg_scale=2.0,\n    num_inference_steps=4,\n' in text


class TestTeacher:
    @pytest.mark.parametrize("format", ["peft", "diffusers"])
    @pytest.mark.parametrize("place", ["folder", "hub"])
    def test_its_code(self, format, place, base, hub, tmp_path, monkeypatch):
        model = make_lora(base, tmp_path / "ocr-teacher", 1, format=format)
        (tmp_path / "base").symlink_to(base.config["_name_or_path"])
        options = {"repository": "me/teachers", "subfolder": "ocr/lora"} if place == "hub" else {}
        write_teacher_card(tmp_path / "ocr-teacher", str(tmp_path / "base"), "ocr", 2.0, CALL, **options)
        if place == "hub":
            hub.add_folder("me/teachers", tmp_path / "ocr-teacher", "ocr/lora")
        monkeypatch.chdir(tmp_path)
        as_teacher, alone = code_of((tmp_path / "ocr-teacher" / "README.md").read_text())
        name = "me/teachers" if place == "hub" else "ocr-teacher"
        expected = TeacherConfig(name, subfolder=options.get("subfolder"), guidance_scale=2.0)
        assert run_code(as_teacher)["teacher"] == expected
        image = run_code(alone)["image"]
        pipeline = copy.deepcopy(base)
        pipeline.transformer = model.get_base_model()  # with its LoRA layers
        assert difference(image, own_image(pipeline)) <= 1
        assert difference(image, own_image(base)) > 10

    def test_text_and_metadata(self, base, hub, tmp_path):
        hub.create("someone/base", {"README.md": SD35_LICENSE.encode()})
        make_lora(base, tmp_path / "ocr-teacher", 1, rank=4)
        path = write_teacher_card(
            tmp_path / "ocr-teacher",
            "someone/base",
            "ocr",
            1.0,
            CALL,
            report=REPORT,
            repository="me/teachers",
            subfolder="ocr/lora",
            method="Trained with RL.",
            datasets="me/prompts",
        )
        card = ModelCard.load(path)
        card.validate()
        data = card.data.to_dict()
        assert data["base_model"] == "someone/base" and data["license_name"] == "stabilityai-ai-community"
        assert data["tags"] == ["diffusion-opd", "teacher", "lora"] and data["base_model_relation"] == "adapter"
        _, (result,) = model_index_to_eval_results(data["model-index"])
        assert (result.metric_type, result.metric_value, result.dataset_type) == ("ocr", 0.75, "me/prompts")
        assert card.text.startswith("\n# teachers-ocr/lora\n") and "Trained with RL." in card.text
        assert "| guidance scale to use | **1.0** (no classifier-free guidance) |" in card.text
        assert "| LoRA | rank 4, alpha 8 |" in card.text
        _, _, files = read_lora(base, TeacherConfig(str(tmp_path / "ocr-teacher")))
        assert f"| sha256, as in the cards of its students | `{files.sha256()}` |" in card.text
        assert "| **ocr** | ocr | 0.250 | 0.750 | 0.700 to 0.800 |" in card.text
        assert "| style | look | 0.500 | 0.400 | – |" in card.text  # what it lost elsewhere
        assert "{{" not in card.text.replace("{{DiffusionOPD}}", "")

    def test_refusals(self, base, tmp_path):
        with pytest.raises(ValueError, match="has no pytorch_lora_weights.safetensors. A teacher is"):
            write_teacher_card(tmp_path, "base", "ocr", 1.0, CALL)
        make_lora(base, tmp_path, 1)
        with pytest.raises(ValueError, match="no task 'count'; it has ocr, style"):
            write_teacher_card(tmp_path, "base", "count", 1.0, CALL, report=REPORT)
