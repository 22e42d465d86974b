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

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "claims"))

import beyond_page  # noqa: E402
import beyond_runs  # noqa: E402
import beyond_worlds  # noqa: E402
from beyond_worlds import ALIKE, alike, short, shortened  # noqa: E402
from methods import TASKS  # noqa: E402

from trl_diffusion_opd.tiny import EDIT_TASKS  # noqa: E402


def measured(scores, steps=10, guidance=1.0, tasks=TASKS):
    of_tasks = dict(zip(tasks, scores, strict=True))
    return {"steps": steps, "guidance": guidance, "scores": of_tasks, "diversity": dict.fromkeys(tasks, 0.2)}


def result(run, seed, scores, steps=10, tasks=TASKS):
    curve = [
        {"step": step, "forwards": step, "seconds": step, "scores": {f"{task}/{task}": 0.5 for task in tasks}}
        | {"kl": 1.0}
        for step in (0, 10)
    ]
    cost = {"forwards": 26_000, "backwards": 9_000, "seconds": 80.0}
    return {
        "run": run, "seed": seed, "updates": 100, "cost": cost, "curve": curve, "measured": [measured(scores, steps, tasks=tasks)]
    }  # fmt: skip


def reference():
    models = {"base": (0.3, 0.5, 0.2), **dict.fromkeys(TASKS, (0.8, 0.9, 1.0))}
    tiny = {name: [measured(scores, steps) for steps in (10, 4, 2)] for name, scores in models.items()}
    of_alike = {name: [measured((0.2, 0.2, 0.2), tasks=ALIKE)] for name in ("base",)}
    of_alike |= {task: [measured((0.6, 0.6, 0.6), tasks=ALIKE)] for task in ALIKE}
    return {"run": "reference", "seed": 0, "measured": {"tiny": tiny, "alike": of_alike}}


def page(folder, output, *results):
    folder.mkdir(exist_ok=True)
    for one in results:
        (folder / f"{one['run']}_{one['seed']}.json").write_text(json.dumps(one))
    beyond_page.write_page(folder, output)
    return (output / "claims_beyond.md").read_text()


class TestPage:
    def test_without_results_it_says_what_is_missing(self, tmp_path):
        text = page(tmp_path / "none", tmp_path)
        assert "`opd-10` (0 of 3 seeds)" in text and ": holds here" not in text

    def test_few_steps_against_the_teachers_gain_at_ten(self, tmp_path):
        # 0.3 + 0.95 x 0.5, and so on: 0.95 of each gain; the other method has 0.5 of them.
        good = [result("opd-4-long", seed, (0.775, 0.88, 0.96), 4) for seed in (0, 1, 2)]
        poor = [result("tdm-4-long", seed, (0.55, 0.70, 0.60), 4) for seed in (0, 1, 2)]
        text = page(tmp_path / "results", tmp_path, reference(), *good, *poor)
        assert (
            "0.90 of its teachers' gain at ten steps, in the mean: holds here**; the best is `opd-4-long`, mean 0.950"
            in text
        )
        assert "`opd-4-long` above `tdm-4-long` in mean score: holds here" in text
        text = page(tmp_path / "worse", tmp_path, reference(), *poor)
        assert "in the mean: does not hold here**; the best is `tdm-4-long`, mean 0.500" in text

    def test_retention_on_alike_prompts_is_of_the_lowest_task(self, tmp_path):
        kept = [result("alike-templates", seed, (0.6, 0.58, 0.56), tasks=ALIKE) for seed in (0, 1, 2)]
        lost = [result("alike-plain", seed, (0.6, 0.5, 0.3), tasks=ALIKE) for seed in (0, 1, 2)]
        text = page(tmp_path / "results", tmp_path, reference(), *kept, *lost)
        assert "`alike-templates` keeps 0.90 of every teacher's gain: holds here**; lowest 0.900 " in text.replace(
            "(0.900 to 0.900) ", ""
        )
        assert "`alike-plain` keeps 0.90 of every teacher's gain: does not hold here**; lowest 0.250" in text

    def test_edits_are_compared_with_their_own_teachers(self, tmp_path):
        models = {"base": (0.2, 0.4, 0.0), **dict.fromkeys(EDIT_TASKS, (0.6, 0.8, 1.0))}
        of_edit = {name: [measured(scores, tasks=EDIT_TASKS)] for name, scores in models.items()}
        own = {"run": "edit-reference", "seed": 0, "measured": {"edit": of_edit}}
        good = [result("edit-long", seed, (0.58, 0.78, 0.97), tasks=EDIT_TASKS) for seed in (0, 1, 2)]
        joint = [result("edit-joint", seed, (0.3, 0.5, 0.9), tasks=EDIT_TASKS) for seed in (0, 1, 2)]
        text = page(tmp_path / "results", tmp_path, own, *good, *joint)
        assert "0.90 of every teacher's gain and 0.95 in the mean: holds here**; lowest 0.950" in text
        assert "OPD has a higher worst score than joint reinforcement learning: holds here" in text
        assert "One query a rollout has a higher worst score than all steps: not measured" in text
        text = page(tmp_path / "worse", tmp_path, own, *[{**one, "run": "edit-long"} for one in joint])
        assert "0.90 of every teacher's gain and 0.95 in the mean: does not hold here**; lowest 0.250" in text

    def test_the_committed_page_is_the_one_of_the_committed_results(self, tmp_path):
        beyond_page.write_page(beyond_runs.BEYOND, tmp_path)
        assert (tmp_path / "claims_beyond.md").read_text() == (ROOT / "docs/source/claims_beyond.md").read_text()


class TestWorlds:
    def test_rewards_of_plain_pictures(self):
        black, crimson = (Image.new("RGB", (8, 8), colour) for colour in ((0, 0, 0), (255, 0, 0)))
        half = Image.fromarray(np.vstack([np.zeros((4, 8, 3)), np.full((4, 8, 3), 255)]).astype(np.uint8))
        assert beyond_worlds.dark([black, half]) == [1.0, 0.5]
        assert beyond_worlds.red([black, crimson]) == [0.5, 1.0]
        assert beyond_worlds.upper([black, half]) == [0.5, 1.0]

    def test_diversity_is_the_mean_distance_of_pairs(self):
        black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (255, 255, 255))
        assert beyond_worlds.diversity([black, black, white]) == pytest.approx(2 / 3)

    def test_tasks_share_one_kind_of_prompt(self):
        rows = alike("test")
        assert set(rows["task"]) == set(ALIKE) and len(set(rows["prompt"])) > len(rows) / 2

    def test_short_prompts_leave_out_what_the_teachers_read(self):
        rows = short("test", True)
        assert all(
            shortened(long) == prompt != long
            for long, prompt in zip(rows["teacher_prompt"], rows["prompt"], strict=True)
        )
        assert "teacher_prompt" not in short("test", False).column_names


def test_every_method_is_searched_over_as_many_settings():
    assert len({len(settings) for settings in beyond_runs.SETTINGS.values()}) == 1
