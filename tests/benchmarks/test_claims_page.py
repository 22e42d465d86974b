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

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "claims"))

import page  # noqa: E402
import summary  # noqa: E402
from methods import METHODS, TASKS, teacher_forwards  # noqa: E402


def make_result(method, seed, scores, forwards, stages=None):
    """A result whose stages end 20 updates after their last evaluation."""
    stages = stages or {"student": 120}
    forwards_an_update = forwards / sum(stages.values())
    own = {name: [name] if len(stages) > 1 else TASKS for name in stages}
    return {
        "method": method,
        "seed": seed,
        "settings": [{"name": name, "config": {"max_steps": updates}} for name, updates in stages.items()],
        "cost": {"forwards": forwards, "seconds": forwards / 1000},
        "curves": {
            name: [
                {
                    "step": step,
                    "forwards": step * forwards_an_update,
                    "seconds": step * forwards_an_update / 1000,
                    "scores": {f"{task}/{task}": 0.5 for task in own[name]} | {"kl/compose": 9.0},
                }
                for step in (updates - 70, updates - 20)
            ]
            for name, updates in stages.items()
        },
        "test": dict(zip(TASKS, scores, strict=True)),
        "test_after": {name: dict(zip(TASKS, scores, strict=True)) for name in stages},
    }


def write(folder, *results):
    folder.mkdir(exist_ok=True)
    for result in results:
        (folder / f"{result['method']}_{result['seed']}.json").write_text(json.dumps(result))


def drawn(folder, output):
    page.write_page(folder, folder / "no_gradients.json", output)
    return (output / "claims.md").read_text()


class TestSummary:
    def test_t_interval_in_closed_form(self):
        # With two degrees of freedom: t = (2p - 1) sqrt(2 / (4p(1 - p))).
        t = 0.95 * (2 / (4 * 0.975 * 0.025)) ** 0.5
        found = summary.estimate([1.0, 2.0, 6.0])
        half = t * 7**0.5 / 3**0.5
        assert (found.n, found.mean) == (3, 3.0)
        assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-9)

    def test_one_seed_has_no_interval(self):
        assert summary.estimate([0.7]) == summary.Estimate(1, 0.7, None, None)
        assert summary.estimate([0.7]).verdict == "open"

    def test_differences_are_paired_by_seed(self):
        found = summary.paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 0.5, 7: 3.0})
        assert found == summary.Estimate(2, 0.5, 0.5, 0.5)
        assert found.verdict == "positive"
        assert summary.paired({0: 1.0}, {1: 1.0}) is None

    def test_curves_are_cumulated_from_the_stages_whole_cost(self):
        result = make_result("cascade", 0, (0.1, 0.2, 0.3), 3000.0, {"compose": 100, "style": 200})
        points = summary.cumulated(result, TASKS, {"forwards": 7.0, "seconds": 0.0})
        assert [point["forwards"] for point in points] == pytest.approx([307, 807, 2307, 2807])
        assert points[0]["scores"] == {"compose": 0.5}
        assert summary.stage_costs(result)["style"] == pytest.approx({"forwards": 2000, "seconds": 2})

    def test_forgetting(self):
        after = {"a": {"a": 0.9, "b": 0.2}, "b": {"a": 0.6, "b": 0.8}}
        assert summary.forgetting(after) == {"a": {"b": pytest.approx(-0.3)}}

    def test_retention(self):
        found = summary.retention({"a": 0.2, "b": 0.5}, {"a": 0.6, "b": 0.5}, {"a": 0.5, "b": 0.9})
        assert found == {"a": pytest.approx(0.75)}


class TestSentence:
    @pytest.mark.parametrize(
        ("values", "sign", "words"),
        [
            ([0.2, 0.21, 0.19], 1, "holds here"),
            ([-0.2, -0.21, -0.19], 1, "does not hold here**, the opposite"),
            ([-0.2, -0.21, -0.19], -1, "holds here"),
            ([0.2, -0.1, 0.1], 1, "not shown here**, the interval contains zero"),
            ([0.2], 1, "not decided"),
        ],
    )
    def test_says_what_the_interval_says(self, values, sign, words):
        found = page.sentence("It is so", summary.estimate(values), sign)
        assert f"It is so: {words}" in found

    def test_nothing_measured(self):
        assert page.sentence("It is so", None) == "**It is so: not measured.**"


class TestPage:
    def pair(self, folder, factor):
        teachers = sum(teacher_forwards().values())
        for seed in range(3):
            opd = make_result("opd", seed, (0.6 + 0.01 * seed, 0.9, 0.9), 50_000.0)
            whole = factor * (teachers + 50_000.0)
            write(folder, opd, make_result("multi-task", seed, (0.3, 0.9, 0.9), whole))

    def test_claim_at_equal_cost(self, tmp_path):
        self.pair(tmp_path / "results", 1.01)
        text = drawn(tmp_path / "results", tmp_path)
        assert (
            "a higher worst score than `multi-task`: holds here**; difference +0.310 (+0.285 to +0.335), 3 seeds."
            in text
        )
        teachers = sum(teacher_forwards().values())
        assert f"| opd | sum | 3 | {teachers + 50_000:,} |" in text
        assert f"| opd | longest | 3 | {max(teacher_forwards().values()) + 50_000:,} |" in text

    def test_unequal_cost_decides_nothing(self, tmp_path):
        self.pair(tmp_path / "results", 2.0)
        text = drawn(tmp_path / "results", tmp_path)
        assert "not decided**, their forwards are not equal." in text
        assert "holds here" not in text.split("## Interference")[0].split("## OPD against")[1]

    def test_orders_of_the_cascade_are_pooled_by_seed(self, tmp_path):
        self.pair(tmp_path / "results", 1.0)
        whole = sum(teacher_forwards().values()) + 50_000.0
        first, second, third = page.CASCADES
        for order, seed, compose in ((first, 0, 0.2), (second, 1, 0.4), (third, 2, 0.3), (third, 0, 0.4)):
            write(tmp_path / "results", make_result(order, seed, (compose, 0.9, 0.9), whole))
        # Seed 0: 0.6 - (0.2 + 0.4) / 2, then 0.61 - 0.4 and 0.62 - 0.3.
        mean = (0.3 + 0.21 + 0.32) / 3
        text = drawn(tmp_path / "results", tmp_path)
        assert f"a higher worst score than `{page.ALL_ORDERS}`: holds here**; difference +{mean:.3f}" in text
        assert f"than `{first}`: not decided**, one seed has no interval; difference +0.400" in text

    def test_nothing_is_there(self, tmp_path):
        (tmp_path / "results").mkdir()
        text = drawn(tmp_path / "results", tmp_path)
        assert "images/claims_" not in text
        assert not list((tmp_path / "images").iterdir())
        assert all(f"`{method}`" in text for method in METHODS)

    def test_missing_seeds_are_named(self, tmp_path):
        write(tmp_path / "results", make_result("opd", 1, (0.6, 0.9, 0.9), 50_000.0))
        assert "`opd` (seed 0, 2)" in drawn(tmp_path / "results", tmp_path)

    def test_same_bytes_again_and_no_stale_picture(self, tmp_path):
        self.pair(tmp_path / "results", 1.0)
        stale = tmp_path / "images" / "claims_old.png"
        files = []
        for _ in range(2):
            drawn(tmp_path / "results", tmp_path)
            paths = [tmp_path / "claims.md", *sorted((tmp_path / "images").iterdir())]
            files.append({path.name: path.read_bytes() for path in paths})
            stale.write_bytes(b"")
        drawn(tmp_path / "results", tmp_path)
        assert files[0] == files[1] and "claims_cost.png" in files[0]
        assert not stale.exists()
