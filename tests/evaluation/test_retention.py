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

import numpy as np
import pytest
from helpers.example_script import load_script

from trl_diffusion_opd.evaluation.retention import (
    interval,
    resample_counts,
    resampled_means,
    retention_of,
    retention_report,
    retention_table,
)


def make_scores(n=400, seed=0):
    """Two tasks; task b has no gain. Scores of one image are correlated between models, as with shared noise."""
    rng = np.random.default_rng(seed)
    scores = {}
    common = {task: rng.random(n) for task in "ab"}
    means = {"base": (0.4, 0.4), "teacher/a": (0.8, 0.1), "teacher/b": (0.2, 0.43), "student": (0.75, 0.4)}
    for model, of_tasks in means.items():
        scores[model] = {
            task: {"right": (0.6 * common[task] + 0.4 * rng.random(n) < mean).astype(float).tolist()}
            for task, mean in zip("ab", of_tasks, strict=True)
        }
    return scores


TEACHERS = {"a": "teacher/a", "b": "teacher/b"}


class TestReport:
    def test_means_and_retention(self):
        scores = make_scores()
        report = retention_report(scores, TEACHERS, ["student"], seed=3)
        x, y, z = (np.mean(scores[m]["a"]["right"]) for m in ("base", "teacher/a", "student"))
        entry = report["tasks"]["a"]
        assert entry["reward"] == "right"
        np.testing.assert_allclose([entry["base"], entry["teacher"], entry["student"]], [x, y, z], rtol=1e-12)
        assert entry["retention"] == pytest.approx((z - x) / (y - x), rel=1e-12)
        assert report["scores"]["teacher/b"]["a"]["right"] == pytest.approx(np.mean(scores["teacher/b"]["a"]["right"]))
        assert (report["num_images"], report["seed"]) == (400, 3)

    def test_too_few_images_are_told(self):
        report = retention_report(make_scores(n=29), TEACHERS, ["student"])
        assert "**29 images: too few for an interval.** Use 30 or more." in retention_table(report)
        report["tasks"]["a"]["num_images"] = 30
        assert "**29 images of b: too few for an interval.**" in retention_table(report)
        report["tasks"]["b"]["num_images"] = 30
        assert "too few" not in retention_table(report)

    def test_a_gain_below_the_limit_has_no_retention(self):
        report = retention_report(make_scores(), TEACHERS, ["student"])
        entry = report["tasks"]["b"]
        assert entry["teacher"] - entry["base"] < 0.05
        assert entry["retention"] is None and entry["ci95"] is None
        assert report["mean_retention"] == report["tasks"]["a"]["retention"]  # over the tasks that have one
        none = retention_report(make_scores(), {"a": "base", "b": "base"}, ["student"])
        assert none["mean_retention"] is None and none["mean_ci95"] is None

    def test_retention_is_not_clipped(self):
        scores = {m: {"a": {"r": [v] * 8}} for m, v in (("base", 0.5), ("t", 0.6), ("over", 0.7), ("under", 0.3))}
        report = retention_report(scores, {"a": "t"}, ["over", "under"])
        assert report["tasks"]["a"]["retention"] == pytest.approx(2.0)
        assert report["tasks"]["a"]["students"]["under"]["retention"] == pytest.approx(-2.0)
        assert report["students"]["under"]["mean_retention"] == pytest.approx(-2.0)

    def test_bootstrap_is_the_brute_force_one(self):
        scores = make_scores(n=60)
        report = retention_report(scores, {"a": "teacher/a"}, ["student"], seed=7)
        values = {model: np.array(of["a"]["right"]) for model, of in scores.items()}
        ratios = []
        for row in resample_counts(60, [7, 0]):
            images = np.repeat(np.arange(60), row.astype(int))  # the same images for the three models
            x, y, z = (values[model][images].mean() for model in ("base", "teacher/a", "student"))
            ratios.append((z - x) / (y - x))
        assert len(ratios) == 2000
        np.testing.assert_allclose(report["tasks"]["a"]["ci95"], np.percentile(ratios, [2.5, 97.5]), rtol=1e-9)

    def test_resampling_is_joint(self):
        # A student with 0.9 of the gain on every single image has it on every resample.
        rng = np.random.default_rng(0)
        base, gain = rng.random(100), rng.random(100)
        scores = {m: {"a": {"r": (base + k * gain).tolist()}} for m, k in (("base", 0), ("t", 1), ("s", 0.9))}
        np.testing.assert_allclose(retention_report(scores, {"a": "t"}, ["s"])["tasks"]["a"]["ci95"], [0.9, 0.9])

    def test_intervals_have_the_width_of_theory(self):
        scores = make_scores(n=2000)
        report = retention_report(scores, TEACHERS, ["student"])
        x, y, z = (np.array(scores[m]["a"]["right"]) for m in ("base", "teacher/a", "student"))
        low, high = report["scores_ci95"]["student"]["a"]["right"]
        assert (high - low) / 2 == pytest.approx(1.96 * z.std() / np.sqrt(2000), rel=0.07)
        # Delta method for the quotient of paired means.
        ratio = (z - x).mean() / (y - x).mean()
        deviation = ((z - x) - ratio * (y - x)).std() / (y - x).mean() / np.sqrt(2000)
        low, high = report["tasks"]["a"]["ci95"]
        assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.07)
        assert low < ratio < high

    def test_counts_are_resamples_with_replacement(self):
        counts = resample_counts(10, [0, 0], num_resamples=20000)
        assert (counts.sum(1) == 10).all()
        np.testing.assert_allclose(counts.mean(0), 1, atol=0.03)
        assert (counts[:, 0] == 0).mean() == pytest.approx(0.9**10, abs=0.01)

    def test_missing_values_are_left_out(self):
        values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
        counts = np.array([[2.0, 5.0, 1.0], [0.0, 3.0, 0.0]])
        np.testing.assert_allclose(resampled_means(values, counts), [[5 / 3, np.nan], [np.nan, np.nan]])
        scores = {m: {"a": {"r": [v, None, v]}} for m, v in (("base", 0.0), ("t", 1.0), ("s", 0.5))}
        report = retention_report(scores, {"a": "t"}, ["s"])
        assert (report["tasks"]["a"]["student"], report["tasks"]["a"]["retention"]) == (0.5, 0.5)
        never = {m: {"a": {"r": [None, None]}} for m in scores}
        assert retention_report(never, {"a": "t"}, ["s"])["tasks"]["a"]["base"] is None

    def test_an_interval_without_end_is_none(self):
        # A resample in which the teacher has no gain, or loses, has no retention.
        ratios = retention_of(np.array([0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.5]), np.array([0.5, 2.0, 0.4]))
        np.testing.assert_array_equal(ratios, [0.5, np.nan, np.nan])
        sample = np.linspace(0, 1, 1000)
        sample[:30] = np.nan
        assert interval(sample) is None
        sample[:20] = 0.5
        assert interval(sample) is not None
        # Six images: the gain is zero in many resamples.
        few = {
            m: {"a": {"r": v}} for m, v in (("base", [0, 0, 0, 1, 1, 1]), ("t", [0, 1, 0, 1, 1, 1]), ("s", [0] * 6))
        }
        entry = retention_report(few, {"a": "t"}, ["s"])["tasks"]["a"]
        assert entry["retention"] == pytest.approx(-3.0) and entry["ci95"] is None

    def test_table(self):
        scores = make_scores()
        report = retention_report(scores, TEACHERS, ["student"])
        *lines, blank, caption = retention_table(report).splitlines()
        assert len({len(line) for line in lines}) == 1 and len(lines) == 5 and not blank
        assert "2,000 resamples of a task's images (400 a task), the same for base, teacher and student" in caption
        assert "The mean is over the 1 of 2 tasks whose teacher gains 0.05 or more" in caption
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["task", "reward", "base", "teacher", "student", "retention", "95% interval"]
        entry = report["tasks"]["a"]
        assert cells[2][2:6] == [f"{entry[key]:.3f}" for key in ("base", "teacher", "student", "retention")]
        assert cells[3][5:] == ["–", "–"]
        assert cells[4][5] == f"**{report['mean_retention']:.3f}**"
        several = retention_table(retention_report({**scores, "late": scores["base"]}, TEACHERS, ["student", "late"]))
        assert several.count("| late") == 3 and several.count("| student") == 4


class TestBenchmark:
    def test_summary_over_seeds_is_the_brute_force_one(self):
        benchmark = load_script("benchmarks/retention.py")
        reports, n = {}, 50
        for seed in range(3):
            scores = {m: {"a": of["a"], "b": of["a"]} for m, of in make_scores(n, seed).items()}
            report = retention_report(scores, {"a": "teacher/a", "b": "teacher/a"}, ["student"])
            scores |= {"teacher/b": scores["teacher/a"]}
            reports[seed] = {**report, "image_scores": scores}
        summary = benchmark.summarize(reports)
        values = [
            [np.array(reports[s]["image_scores"][m]["a"]["right"]) for m in ("base", "teacher/a", "student")]
            for s in range(3)
        ]
        points = [(z.mean() - x.mean()) / (y.mean() - x.mean()) for x, y, z in values]
        assert summary["tasks"]["a"]["retention"] == pytest.approx(np.mean(points), rel=1e-12)
        assert summary["tasks"]["a"]["teacher"] == pytest.approx(np.mean([y.mean() for _, y, _ in values]), rel=1e-12)
        # The same by loops, and other random numbers.
        rng = np.random.default_rng(1)
        tasks, overall = [], []
        for _ in range(4000):
            seeds = rng.integers(3, size=3)
            ratios = []
            for _ in "ab":
                images = rng.integers(n, size=n)
                means = [[v[images].mean() for v in values[s]] for s in seeds]
                ratios.append(np.mean([(z - x) / (y - x) for x, y, z in means]))
            tasks.append(ratios[0])
            overall.append(np.mean(ratios))
        np.testing.assert_allclose(summary["tasks"]["a"]["ci95"], np.percentile(tasks, [2.5, 97.5]), atol=0.03)
        np.testing.assert_allclose(summary["mean_ci95"], np.percentile(overall, [2.5, 97.5]), atol=0.03)
        assert benchmark.summary_table(summary).count("\n") == 4
