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

"""The embedded world that edits: rows with pictures, verifiers, shipped weights, and the scripts that make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Image as ImageFeature
from datasets import List, load_dataset
from diffusers import DiffusionPipeline, FluxKontextPipeline
from peft import PeftModel
from PIL import Image

from trl_diffusion_opd import tiny
from trl_diffusion_opd.tiny.edits import KINDS, draw_source, edit_spec, edit_specs, pairs, source_scene, target_scene
from trl_diffusion_opd.tiny.prompts import SPLITS
from trl_diffusion_opd.tiny.scenes import SHAPES, Scene, Thing, draw


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "tiny"))

import edit_data  # noqa: E402
import edit_measure  # noqa: E402
import make_edit  # noqa: E402
import make_edit_rows  # noqa: E402
import modules  # noqa: E402


EDITS = ("local", "global")
DATA = Path(tiny.__file__).parent / "data"


def specs_of(task: str, split: str = "test") -> list[str]:
    return [json.dumps(spec) for spec in edit_specs(task, split)]


def verdict(task: str, images: list[Image.Image], specs: list[str], graded: bool = False) -> float:
    scores = (tiny.edit_graded_rewards if graded else tiny.edit_rewards)[task](images=images, spec=list(specs))
    return float(np.mean([score for score in scores if score is not None]))


def picture(scene: Scene) -> Image.Image:
    return draw(scene, np.random.default_rng(0))


class TestVerifiers:
    @pytest.mark.parametrize("task", tiny.EDIT_TASKS)
    def test_ground_truth_scores_high_and_shuffled_pairs_low(self, task: str) -> None:
        specs = specs_of(task)
        truths = [tiny.render_edit(spec, seed) for seed, spec in enumerate(specs)]
        assert verdict(task, truths, specs) >= 0.98
        assert verdict(task, truths, specs, graded=True) >= 0.98
        assert verdict(task, truths, specs[1:] + specs[:1]) <= 0.2

    @pytest.mark.parametrize("task", EDITS)
    def test_the_given_picture_itself_is_no_result_and_scores_half(self, task: str) -> None:
        specs = specs_of(task)
        sources = [draw_source(json.loads(spec)) for spec in specs]
        assert verdict(task, sources, specs) == 0
        assert verdict(task, sources, specs, graded=True) == pytest.approx(0.5, abs=0.02)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_second_change_costs_the_verdict_and_part_of_the_grade(self, kind: str) -> None:
        for text in [one for one in specs_of("local") if json.loads(one)["kind"] == kind][:12]:
            spec = json.loads(text)
            scene = target_scene(spec, np.random.default_rng(0))
            untouched = 0 if spec["index"] else (1 if kind != "remove" else 0)
            old = scene.things[untouched]
            new = Thing(old.color, next(shape for shape in SHAPES if shape != old.shape), old.cell, old.offset)
            things = [new if thing is old else thing for thing in scene.things]
            image = picture(Scene(tuple(things)))
            assert verdict("local", [image], [text]) == 0
            assert 0.5 < verdict("local", [image], [text], graded=True) < 0.97

    def test_the_whole_picture_at_dusk_is_no_local_edit(self) -> None:
        text = specs_of("local")[0]
        scene = target_scene(json.loads(text), np.random.default_rng(0))
        image = picture(Scene(scene.things, dusk=0.5))
        assert verdict("local", [image], [text]) == 0

    def test_a_thing_may_be_added_in_any_free_cell_but_not_twice(self) -> None:
        text = next(one for one in specs_of("local") if json.loads(one)["kind"] == "add")
        spec = json.loads(text)
        kept = source_scene(spec).things
        free = [cell for cell in range(4) if cell not in {thing.cell for thing in kept}]
        new = [Thing(spec["color"], spec["shape"], cell, (2, 3)) for cell in free]
        assert verdict("local", [picture(Scene((*kept, thing))) for thing in new], [text] * 2) == 1
        assert verdict("local", [picture(Scene((*kept, *new)))], [text]) == 0

    def test_dusk_is_graded_and_its_things_are_looked_at_in_its_light(self) -> None:
        text = specs_of("global")[0]
        scene = source_scene(json.loads(text))
        images = [picture(Scene(scene.things, dusk=degree)) for degree in (0.0, 0.3, 0.6, 0.9, 1.0)]
        grades = [verdict("global", [image], [text], graded=True) for image in images]
        assert grades == pytest.approx([0.5, 0.65, 0.8, 0.95, 1.0], abs=0.03)
        assert [verdict("global", [image], [text]) for image in images] == [0, 0, 0, 1, 1]
        empty = picture(Scene(dusk=1.0))
        assert verdict("global", [empty], [text]) == 0
        assert verdict("global", [empty], [text], graded=True) == pytest.approx(0.5, abs=0.02)

    def test_row_of_another_task_does_not_apply(self) -> None:
        text, image = specs_of("global")[0], Image.new("RGB", (32, 32))
        for task in ("draw", "local"):
            assert tiny.edit_rewards[task](images=[image], spec=[text]) == [None]
            assert tiny.edit_graded_rewards[task](images=[image], spec=[None]) == [None]


class TestRows:
    def test_no_picture_of_a_split_shows_the_things_of_anothers(self) -> None:
        shown = {split: set(pairs(split)) for split in SPLITS}
        assert sum(map(len, shown.values())) == len(set.union(*shown.values())) == 66
        for split in SPLITS:
            for task in EDITS:
                for spec in edit_specs(task, split):
                    assert frozenset((color, shape) for color, shape, *_ in spec["things"]) in map(
                        frozenset, shown[split]
                    )

    def test_columns(self) -> None:
        rows = tiny.edit_dataset("validation")
        assert rows.column_names == ["prompt", "task", "source_images", "spec"]
        assert rows.features["source_images"] == List(ImageFeature())
        assert {task: {len(row) for row in rows.filter(lambda one, task=task: one["task"] == task)["source_images"]}
                for task in tiny.EDIT_TASKS} == {"draw": {0}, "local": {1}, "global": {1}}  # fmt: skip
        row = rows.filter(lambda one: one["task"] == "local")[0]
        assert row["source_images"][0].tobytes() == draw_source(json.loads(row["spec"])).tobytes()

    def test_an_edit_names_a_thing_that_is_there_or_a_new_one(self) -> None:
        for spec in edit_specs("local", "train"):
            shown = [(color, shape) for color, shape, *_ in spec["things"]]
            if spec["kind"] == "add":
                assert (spec["color"], spec["shape"]) not in shown
            else:
                assert spec["index"] in (0, 1) and spec["color"] != shown[spec["index"]][0]

    def test_unknown_split(self) -> None:
        with pytest.raises(ValueError, match="no split 'dev'"):
            tiny.edit_dataset("dev")

    def test_every_prompt_fits_both_tokenizers_without_unknown_tokens(self) -> None:
        clip = modules.clip_tokenizer(modules.EDIT_WORDS, modules.EDIT_MAX_TOKENS)
        t5 = modules.t5_tokenizer(modules.EDIT_WORDS, modules.EDIT_MAX_TOKENS)
        for prompt in set(tiny.edit_dataset("train")["prompt"]):
            words = len(prompt.split())
            assert len(clip(prompt).input_ids) == words + 2 <= modules.EDIT_MAX_TOKENS
            assert len(t5(prompt).input_ids) == words + 1 and t5.unk_token_id not in t5(prompt).input_ids

    def test_the_packaged_files_are_the_datasets_rows(self) -> None:
        for split in SPLITS:
            for task in tiny.EDIT_TASKS:
                of_file = "json" if task == "draw" else "parquet"
                path = DATA / f"edit_{task}_{split}.{'jsonl' if task == 'draw' else of_file}"
                read = load_dataset(of_file, data_files=str(path), split="train")
                rows = tiny.edit_dataset(split, (task,))
                assert list(read["prompt"]) == list(rows["prompt"]) and list(read["spec"]) == list(rows["spec"])
                if task != "draw":
                    given = make_edit_rows.pictures_as_bytes(rows[0]["source_images"])
                    assert read[0]["source_images"] == given


@pytest.fixture(scope="module")
def pipeline() -> FluxKontextPipeline:
    return DiffusionPipeline.from_pretrained(tiny.EDIT)


class TestWeights:
    def test_files_are_small_and_safe(self) -> None:
        folders = (Path(tiny.EDIT), *(Path(folder) for folder in tiny.EDIT_TEACHERS.values()))
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 10 * 10**6
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert not any('_name_or_path": "' in path.read_text() for path in files if path.suffix == ".json")

    def test_base_is_a_kontext_of_under_three_million_parameters_in_float32(
        self, pipeline: FluxKontextPipeline
    ) -> None:
        assert type(pipeline) is FluxKontextPipeline
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert len(parts) == 4 and modules.num_parameters(*parts) <= 3_000_000
        assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}

    @pytest.mark.parametrize("task", tiny.EDIT_TASKS)
    def test_teacher_is_a_lora_on_the_bare_transformer(self, task: str) -> None:
        config = json.loads((Path(tiny.EDIT_TEACHERS[task]) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 32)

    def test_vae_keeps_what_the_verifiers_read(self, pipeline: FluxKontextPipeline) -> None:
        for task in tiny.EDIT_TASKS:
            assert make_edit.round_trip(pipeline.vae, task) >= 0.95


@pytest.mark.slow
class TestTeachers:
    @pytest.mark.parametrize("task", tiny.EDIT_TASKS)
    def test_teacher_is_well_above_the_base(self, pipeline: FluxKontextPipeline, task: str) -> None:
        base = edit_measure.edit_scores(pipeline, num_images=64, tasks=(task,))
        model = PeftModel.from_pretrained(pipeline.transformer, tiny.EDIT_TEACHERS[task])
        teacher = edit_measure.edit_scores(pipeline, num_images=64, tasks=(task,))
        model.unload()
        assert teacher[task] - base[task] >= 0.15


class TestMaking:
    @pytest.mark.parametrize("task", tiny.EDIT_TASKS)
    def test_results_of_the_base_are_wrong_as_often_as_said(self, task: str) -> None:
        rows = edit_data.edit_rows(task, 200, seed=0)
        assert len(rows.prompts) == len(rows.results) == 200
        assert (rows.sources is None) == (task == "draw")
        again = edit_data.edit_rows(task, 200, seed=0)
        assert np.array_equal(rows.results, again.results) and rows.prompts == again.prompts

    def test_a_wrong_local_edit_is_of_the_same_picture_and_not_the_right_one(self) -> None:
        rng, wrong = np.random.default_rng(0), 0
        for spec in edit_specs("local", "validation"):
            scene = edit_data._wrong_edit(spec, rng)
            wrong += verdict("local", [picture(scene)], [json.dumps(spec)]) == 0
        # One edit of a dozen that are drawn is the right one by chance.
        assert wrong / len(edit_specs("local", "validation")) >= 0.85

    def test_specs_are_drawn_alike(self) -> None:
        rng = np.random.default_rng(0)
        pair = pairs("train")[0]
        kinds = [edit_spec("local", pair, rng)["kind"] for _ in range(300)]
        assert all(60 <= kinds.count(kind) <= 140 for kind in KINDS)

    def test_a_few_steps_train_the_encoders_too(
        self, pipeline: FluxKontextPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(make_edit, "ROWS", 3)
        torch.manual_seed(0)
        fresh = modules.edit_pipeline(pipeline.vae)
        before = fresh.text_encoder_2.shared.weight.clone()
        make_edit.train(fresh, tmp_path, steps=2, batch=dict.fromkeys(tiny.EDIT_TASKS, 4))
        assert not torch.equal(before, fresh.text_encoder_2.shared.weight)
