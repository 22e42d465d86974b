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

"""The cards in model_cards/: in step with their templates, valid, and with code and commands that run."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.card_helpers import code_of, read_card, run_code, shown_lora, stand_in, write_card, write_report
from helpers.example_script import load_script
from helpers.tiny_sd3 import make_pipeline
from huggingface_hub import ModelCard
from peft import get_peft_model

from trl_diffusion_opd import TeacherConfig, tiny
from trl_diffusion_opd.models.student import Student, default_lora_config
from trl_diffusion_opd.scripts.arguments import load_teachers
from trl_diffusion_opd.scripts.opd import ARGUMENTS
from trl_diffusion_opd.scripts.parser import parse


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
RECIPE = CARDS / "sd35-medium-opd.md"
STUDENT, TEACHER = CARDS / "tiny-student.md", CARDS / "tiny-teacher-compose.md"


def _without_versions(card: str) -> str:
    return re.sub(r"(?m)^- ([\w-]+) \d\S*$", r"- \1", card)


@pytest.mark.parametrize("path", [RECIPE, STUDENT, TEACHER], ids=lambda path: path.stem)
def test_valid_and_complete(path, hub):
    card = ModelCard.load(path)
    card.validate()
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert {"diffusion-opd", "lora"} <= set(data["tags"])
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        assert (CARDS / link).resolve().is_file(), link


def test_the_teachers_card_is_the_templates():
    rendered = load_script("model_cards/render.py").teacher_card(CARDS / "tiny-report.json")
    assert _without_versions(rendered) == _without_versions(TEACHER.read_text())


def test_the_students_card_is_the_templates(tmp_path):
    """Its numbers need the run; its headings, tables and fixed sentences don't."""
    pipeline = make_pipeline()
    trainer = stand_in(pipeline, tmp_path, get_peft_model(pipeline.transformer, shown_lora()))
    write_report(tmp_path / "out")
    trainer.state.log_history = [{"step": 1, "step_time": 1.0}]
    write_card(trainer)

    def skeleton(text: str) -> list[str]:
        # Headings, the heads and rules of tables, the names of settings.
        lines = [line.split("|")[1] if line.startswith("| ") else line for line in text.splitlines()[3:]]
        fixed = [
            line
            for line in lines
            if re.match(r"#{2,}|\|-|\| \||A guidance|Retention is|All arguments|This stud", line)
        ]
        settings = re.findall(r"(?m)^\| (updates|resolution|optimizer|hardware|training time|LoRA|seed) \|", text)
        return [re.sub(r"\d+", "n", line) for line in fixed] + settings

    rendered, kept = skeleton(read_card(trainer).text), skeleton(ModelCard.load(STUDENT).text)
    assert rendered == kept and len(kept) > 15
    # The card is the one of weights that exist: it has scores, and they are in the metadata
    assert {result.metric_type for result in ModelCard.load(STUDENT).data.eval_results} >= {"retention", "compose"}


def test_the_code_of_the_tiny_cards(tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(tiny.BASE)
    (tmp_path / "compose").symlink_to(tiny.TEACHERS["compose"])
    as_teacher, alone = code_of(TEACHER.read_text())
    monkeypatch.chdir(tmp_path)
    assert run_code(as_teacher)["teacher"] == TeacherConfig("compose", guidance_scale=1.0)
    assert run_code(alone)["image"].size == (32, 32)
    pipeline = tiny_pipeline = run_code(
        "from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('base')"
    )["pipe"]
    (code,) = code_of(STUDENT.read_text())
    folder = re.search(r'load_lora_weights\("([\w-]+)"\)', code)[1]
    model = get_peft_model(pipeline.transformer, shown_lora())
    Student(model, tiny_pipeline).save(tmp_path / folder)
    assert run_code(code)["image"].size == (32, 32)


class TestRecipe:
    def test_it_claims_nothing_that_was_not_measured(self):
        card = ModelCard.load(RECIPE)
        assert card.data.eval_results is None and "not been made here" in card.text
        assert not re.search(r"(?i)retention|hours|minutes|GiB|\bGB\b", card.text)
        assert card.data.license_name == "stabilityai-ai-community"

    def test_the_command_has_the_settings_of_the_card(self):
        (command,) = re.findall(r"```bash\n(.*?)```", RECIPE.read_text(), re.DOTALL)
        words = shlex.split(command.replace("\\\n", " "))
        arguments = words[words.index("examples/opd_sd3.py") + 1 :]
        script, args = parse(ARGUMENTS, arguments)
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
        found = {
            "resolution": f"{args.height} x {args.width}",
            "samples": f"{samples}, {samples // 3} of each task",
            "LoRA": f"rank {script.lora_r}, alpha {script.lora_alpha}",
            "optimizer": f"betas ({args.adam_beta1}, {args.adam_beta2}), weight decay 1e-4",
            "rate": "3e-4, constant",
            "average": f"{args.ema_decay} every {args.ema_update_interval} updates",
            "length": f"{args.max_sequence_length} tokens",
            "rollout": f"(sampler `{args.sampler}`) | {args.guidance_scale} | {args.num_inference_steps} |",
            "evaluation": f"**{args.guidance_scale}** | **{args.eval_num_inference_steps}**",
        }
        text = RECIPE.read_text()
        assert [name for name, shown in found.items() if shown not in text] == []
        assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (3e-4, 1e-4, 1.0)
        assert (args.lr_scheduler_type.value, args.skip_last_steps) == ("constant", None)
        scales = load_teachers(script.teachers, script.teacher_guidance_scales)
        assert {task: roles[0].guidance_scale for task, roles in scales.items()} == {
            "aesthetic": None,
            "ocr": None,
            "geneval": 1.0,
        }

    def test_the_code(self, hub, tmp_path, monkeypatch):
        """With the ids resolved by the loopback Hub to tiny models, of which 512 px would be too much."""
        base = make_pipeline()
        base.save_pretrained(tmp_path / "base")
        hub.add_folder("stabilityai/stable-diffusion-3.5-medium", tmp_path / "base")
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base.transformer), default_lora_config(base.transformer))
        Student(model, base).save(tmp_path / "student")
        hub.add_folder("your-name/sd35-medium-opd", tmp_path / "student")
        monkeypatch.chdir(tmp_path)
        (code,) = code_of(RECIPE.read_text())
        names = run_code(code.replace("512", "16"))
        assert names["image"].size == (16, 16) and names["pipe"].transformer.peft_config["default_0"].r == 32
