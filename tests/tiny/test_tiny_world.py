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

"""The embedded tiny world: verifiers, prompts, shipped weights, and the scripts that make them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from helpers.launching import Forks
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from trl_diffusion_opd import tiny
from trl_diffusion_opd.models.student import ATTENTION_TARGETS
from trl_diffusion_opd.tiny.prompts import corrupt, specs, to_prompt
from trl_diffusion_opd.tiny.scenes import Scene, draw


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "tiny"))

import make  # noqa: E402
import make_data  # noqa: E402
import make_training  # noqa: E402
import measure  # noqa: E402
import modules  # noqa: E402


# The last block answers no text queries, so what would change them gets no gradient and stays at its zero start.
UNREAD = {"base_model.model.transformer_blocks.3.attn.add_q_proj.lora_B.weight"}


def rows_of(task: str, *splits: str) -> list[dict[str, str]]:
    return [row for split in splits for row in tiny.dataset(split) if row["task"] == task]


def mean(scores: list[float | None]) -> float:
    return float(np.mean([score for score in scores if score is not None]))


def score(task: str, images: list[Image.Image], rows: list[dict[str, str]], graded: bool = False) -> float:
    function = (tiny.graded_rewards if graded else tiny.rewards)[task]
    columns = {key: [row[key] for row in rows] for key in ("task", "spec")}
    return mean(function(prompts=[row["prompt"] for row in rows], images=images, completions=images, **columns))


class TestVerifiers:
    @pytest.mark.parametrize("task", ["compose", "letters"])
    def test_ground_truth_scores_high_and_shuffled_captions_low(self, task: str) -> None:
        rows = rows_of(task, "test", "validation") + rows_of(task, "train")[:80]
        images = [tiny.render(row["spec"], seed) for seed, row in enumerate(rows)]
        order = np.random.default_rng(0).permutation(len(rows))
        shuffled = [rows[i] for i in order]
        for graded in (False, True):
            assert score(task, images, rows, graded) >= 0.98
        assert score(task, images, shuffled) <= 0.2
        assert score(task, images, shuffled, graded=True) <= 0.5

    def test_one_wrong_attribute_costs_the_verdict_and_part_of_the_grade(self) -> None:
        rng = np.random.default_rng(0)
        rows = rows_of("compose", "train")[:150]
        wrong = [tiny.render(json.dumps(corrupt(json.loads(row["spec"]), rng)), i) for i, row in enumerate(rows)]
        assert score("compose", wrong, rows) == 0.0
        assert 0.3 < score("compose", wrong, rows, graded=True) < 0.9

    def test_one_wrong_letter_costs_the_verdict_and_part_of_the_grade(self) -> None:
        row = rows_of("letters", "test")[0]
        spec = json.loads(row["spec"])
        other = "A" if spec["word"][1] != "A" else "C"
        image = tiny.render(json.dumps({**spec, "word": spec["word"][0] + other}))
        assert score("letters", [image], [row]) == 0.0
        assert 0.5 <= score("letters", [image], [row], graded=True) < 0.9

    @pytest.mark.parametrize(("wanted", "drawn"), [("P", "F"), ("C", "E"), ("N", "O"), ("H", "K"), ("T", "I")])
    def test_a_letter_that_no_prompt_asks_for_is_not_a_poor_one_that_some_do(self, wanted: str, drawn: str) -> None:
        spec = {**json.loads(rows_of("letters", "test")[0]["spec"]), "word": wanted + wanted}
        row = {**rows_of("letters", "test")[0], "spec": json.dumps(spec)}
        right = tiny.render(row["spec"])
        wrong = tiny.render(json.dumps({**spec, "word": wanted + drawn}))
        assert score("letters", [right], [row]) == 1.0
        assert score("letters", [wrong], [row]) == 0.0

    def test_blank_image_scores_nothing(self) -> None:
        blank = draw(Scene(), np.random.default_rng(0))
        for task in tiny.TASKS:
            row = rows_of(task, "test")[0]
            assert score(task, [blank], [row]) == 0.0
            assert score(task, [blank], [row], graded=True) == 0.0

    def test_style_is_linear_in_the_degree_of_styling(self) -> None:
        rows = rows_of("style", "test")
        for degree in (0.0, 0.25, 0.5, 0.75, 1.0):
            images = [tiny.render(row["spec"], i, dusk=degree) for i, row in enumerate(rows)]
            assert score("style", images, rows) == pytest.approx(degree, abs=0.02)
        styled = [tiny.render(row["spec"], i) for i, row in enumerate(rows)]
        assert score("style", styled, rows) >= 0.98

    def test_full_styling_spoils_colours(self) -> None:
        rows = rows_of("compose", "test")
        images = [tiny.render(row["spec"], i, dusk=1.0) for i, row in enumerate(rows)]
        assert score("compose", images, rows) == 0.0

    def test_row_of_another_task_does_not_apply(self) -> None:
        row = rows_of("letters", "test")[0]
        assert tiny.rewards["compose"](images=[tiny.render(row["spec"])], spec=[row["spec"]]) == [None]

    def test_row_without_a_specification_does_not_apply(self) -> None:
        row = rows_of("letters", "test")[0]
        images, spec = [tiny.render(row["spec"])] * 2, [None, row["spec"]]
        assert tiny.rewards["letters"](images=images, spec=spec) == [None, 1.0]

    def test_names_differ_so_that_all_can_be_logged_together(self) -> None:
        functions = [*tiny.rewards.values(), *tiny.graded_rewards.values()]
        assert len({function.__name__ for function in functions}) == 6

    def test_wrong_size_is_refused(self) -> None:
        row = rows_of("style", "test")[0]
        with pytest.raises(ValueError, match="32 x 32 px, got \\(64, 64\\)"):
            tiny.rewards["style"](images=[Image.new("RGB", (64, 64))], spec=[row["spec"]])


class TestPrompts:
    def test_splits_are_disjoint_in_prompts_and_scenes(self) -> None:
        prompts = {split: set(tiny.dataset(split)["prompt"]) for split in ("train", "validation", "test")}
        scenes = {
            split: {
                json.dumps([s["task"], sorted(s["objects"]), s["word"]]) for s in specs(split) if not s["relation"]
            }
            for split in prompts
        }
        for sets in (prompts, scenes):
            for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
                assert not sets[one] & sets[other]

    @pytest.mark.parametrize("task", tiny.TASKS)
    def test_enough_prompts_all_different(self, task: str) -> None:
        rows = rows_of(task, "train", "validation", "test")
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert len(rows_of(task, "test")) >= 40
        assert len(rows_of(task, "train")) >= 80

    def test_columns(self) -> None:
        data = tiny.dataset("validation")
        assert isinstance(data, Dataset)
        assert data.column_names == ["prompt", "task", "spec"]
        assert all(to_prompt(json.loads(row["spec"])) == row["prompt"] for row in data)

    def test_unknown_split(self) -> None:
        with pytest.raises(ValueError, match="no split 'dev'"):
            tiny.dataset("dev")

    def test_every_prompt_fits_both_tokenizers_without_unknown_tokens(self) -> None:
        clip, t5 = modules.clip_tokenizer(), modules.t5_tokenizer()
        for split in ("train", "validation", "test"):
            for prompt in tiny.dataset(split)["prompt"]:
                for tokens in (clip(prompt).input_ids, t5(prompt).input_ids):
                    assert len(tokens) <= modules.MAX_TOKENS
                assert t5.unk_token_id not in t5(prompt).input_ids
                assert clip.decode(clip(prompt).input_ids, skip_special_tokens=True).replace(" ", "") == (
                    prompt.lower().replace(" ", "")
                )


def test_import_is_light(processes: Forks) -> None:
    code = "import sys; from trl_diffusion_opd import tiny; print('torch' in sys.modules or 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return DiffusionPipeline.from_pretrained(tiny.BASE)


class TestWeights:
    def test_files_are_small_and_safe(self) -> None:
        folders = (Path(tiny.BASE), *(Path(folder) for folder in tiny.TEACHERS.values()))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 16 * 2**20
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert not any('_name_or_path": "' in path.read_text() for path in files if path.suffix == ".json")

    def test_base_is_a_pipeline_of_under_three_million_parameters(self, pipeline: StableDiffusion3Pipeline) -> None:
        assert type(pipeline) is StableDiffusion3Pipeline
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert len(parts) == 5
        assert 2_000_000 <= modules.num_parameters(*parts) <= 3_000_000
        assert pipeline.scheduler.config.shift == 3.0

    def test_base_draws_32_px_and_guidance_does_something(self, pipeline: StableDiffusion3Pipeline) -> None:
        plain, again, guided = (
            measure.generate(pipeline, ["two red squares"], seed=3, steps=4, guidance_scale=scale)[0]
            for scale in (1.0, 1.0, 4.0)
        )
        assert plain.size == (32, 32)
        assert plain.tobytes() == again.tobytes() != guided.tobytes()

    @pytest.mark.parametrize("task", tiny.TASKS)
    def test_teacher_is_a_complete_lora_on_the_bare_transformer(self, task: str) -> None:
        folder = Path(tiny.TEACHERS[task])
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 32)
        assert sorted(config["target_modules"]) == sorted(ATTENTION_TARGETS)
        tensors = load_file(folder / "adapter_model.safetensors")
        # Eight projections in four blocks, save the text output of the last block, which nothing would read.
        assert len(tensors) == 2 * (8 * 4 - 1)
        for name, tensor in tensors.items():
            assert name.startswith("base_model.model.transformer_blocks.")
            assert torch.isfinite(tensor).all()
            assert (name in UNREAD) != bool(tensor.abs().max() > 0)

    def test_vae_keeps_what_the_verifiers_read(self, pipeline: StableDiffusion3Pipeline) -> None:
        for task in tiny.TASKS:
            assert make.round_trip(pipeline.vae, task) >= 0.97


# Each compose prompt once. 64 images put a standard error of 0.06 on a score near 0.5; noise is fixed, so only float sums
# move these scores. 512 images are in docs/source/tiny_world.md.
NUM_IMAGES = 64


@pytest.mark.slow
class TestTeachersPullApart:
    @pytest.fixture(scope="class")
    def matrix(self, pipeline: StableDiffusion3Pipeline) -> dict[str, dict[str, float]]:
        scores = {"base": measure.task_scores(pipeline, num_images=NUM_IMAGES)}
        for task in tiny.TASKS:
            model = PeftModel.from_pretrained(pipeline.transformer, tiny.TEACHERS[task])
            scores[task] = measure.task_scores(pipeline, num_images=NUM_IMAGES)
            model.unload()
        return scores

    @pytest.mark.parametrize("task", tiny.TASKS)
    def test_base_is_right_sometimes(self, matrix: dict[str, dict[str, float]], task: str) -> None:
        assert 0.15 <= matrix["base"][task] <= 0.7

    @pytest.mark.parametrize("task", tiny.TASKS)
    def test_teacher_is_well_above_base_and_the_other_teachers(
        self, matrix: dict[str, dict[str, float]], task: str
    ) -> None:
        assert matrix[task][task] - matrix["base"][task] >= 0.2
        for other in tiny.TASKS:
            if other != task:
                assert matrix[task][task] - matrix[other][task] >= 0.15


class TestMaking:
    def test_captions_of_the_base_are_wrong_as_often_as_said(self) -> None:
        pictures = make_data.base_pictures(900, seed=0)
        spec_of = {to_prompt(spec): spec for split in ("train", "validation", "test") for spec in specs(split)}
        images = [Image.fromarray(image) for image in pictures.images]
        for task, expected in (
            ("compose", 1 - make_data.WRONG_COMPOSE),
            # A replaced letter is the right one again in one case of twelve.
            ("letters", (1 - make_data.WRONG_LETTER * 11 / 12) ** 2),
            ("style", make_data.BASE_DUSK[0] / sum(make_data.BASE_DUSK)),
        ):
            chosen = [i for i, prompt in enumerate(pictures.prompts) if spec_of[prompt]["task"] == task]
            found = [spec_of[pictures.prompts[i]] for i in chosen]
            rows = [{"prompt": to_prompt(s), "task": task, "spec": json.dumps(s)} for s in found]
            assert score(task, [images[i] for i in chosen], rows) == pytest.approx(expected, abs=0.08)

    def test_styled_pictures_are_train_prompts_at_full_degree(self) -> None:
        pictures = make_data.styled_pictures(60, seed=0)
        rows = {row["prompt"]: row for row in rows_of("style", "train")}
        images = [Image.fromarray(image) for image in pictures.images]
        assert score("style", images, [rows[prompt] for prompt in pictures.prompts]) >= 0.98

    def test_a_few_steps_of_both_trainings(self) -> None:
        torch.manual_seed(0)
        vae = modules.vae()
        pictures = make_data.base_pictures(24, seed=0)
        make_training.train_vae(vae, pictures.images, steps=2, batch_size=4)
        assert vae.config["scaling_factor"] != 1.0
        pipeline = modules.pipeline(vae)
        latents = make._latents(vae, pictures.images)
        before = pipeline.text_encoder_3.shared.weight.clone()
        make_training.train_base(pipeline, pictures.prompts, latents, steps=2, batch_size=8)
        assert not torch.equal(before, pipeline.text_encoder_3.shared.weight)

    @pytest.mark.slow
    def test_check_measures_the_teachers_that_are_there_and_says_how_the_others_are_made(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "base").symlink_to(tiny.BASE)
        (tmp_path / "teachers").mkdir()
        (tmp_path / "teachers" / "style").symlink_to(tiny.TEACHERS["style"])
        matrix = make.check(tmp_path, num_images=4)
        assert list(matrix) == ["base", "style"]
        assert matrix["style"]["style"] - matrix["base"]["style"] > 0.4
        printed = capsys.readouterr().out
        for task in ("compose", "letters"):
            assert (
                f"{task}: no teacher in {tmp_path / 'teachers' / task}. examples/two_stage_tiny.py makes it."
                in printed
            )
