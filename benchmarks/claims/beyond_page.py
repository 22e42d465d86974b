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


"""
Draws `docs/source/claims_beyond.md` and its pictures from the results of `beyond.py`.

    python benchmarks/claims/beyond_page.py

Any of them may be missing: the page says which, and whether a claim holds is computed from those that are there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from beyond_runs import BEYOND, FEW_STEP, SEARCH_SEED, SETTINGS
from beyond_worlds import ALIKE, SHORT_TASKS
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from methods import TASKS
from page import Section, sentence, shown, table
from pictures import Line, plot_lines
from summary import Estimate, estimate, paired, retention, summarised

from trl_diffusion_opd.tiny import EDIT_TASKS


PICTURES = "images/beyond_{}.png"
EXTRAPOLATIONS = (1.0, 1.1, 1.25, 1.5)
WEIGHTS = (0.0, 1.0)
WANTED_SEEDS = 3

Result = Mapping[str, Any]


def read_results(folder: Path) -> dict[str, dict[int, Result]]:
    results: dict[str, dict[int, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["run"], {})[result["seed"]] = result
    return results


def seeds(value: Estimate) -> str:
    return f"{value.n} seed{'s' if value.n > 1 else ''}"


class Beyond:
    """The results, and the sections of the page that are made from them."""

    def __init__(self, folder: Path, output: Path):
        self.results, self.output = read_results(folder), output
        self.search = read_results(folder / "search")
        self.reference = self.results.get("reference", {}).get(0)
        self.edit_reference = self.results.get("edit-reference", {}).get(0)

    def missing(self, runs: Sequence[str]) -> list[str]:
        gaps = [
            f"`{run}` ({n} of {WANTED_SEEDS} seeds)"
            for run in runs
            if (n := len(self.results.get(run, {}))) < WANTED_SEEDS
        ]
        return [f"Not measured in full: {', '.join(gaps)}."] if gaps else []

    def figure(self, run: str, name: str, what: str = "scores", sampled: int = 0) -> dict[int, float]:
        """A figure of each seed: of a task, the `worst` or the `mean`."""
        return {
            seed: summarised(result["measured"][sampled][what])[name]
            for seed, result in self.results.get(run, {}).items()
        }

    def of_reference(self, world: str, model: str, steps: int, guidance: float = 1.0) -> dict[str, Any]:
        reference = self.edit_reference if world == "edit" else self.reference
        assert reference is not None
        found = [m for m in reference["measured"][world][model] if (m["steps"], m["guidance"]) == (steps, guidance)]
        return found[0]

    def ends(self, world: str, tasks: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Scores of the base, and of each task's own teacher, at ten steps."""
        base = self.of_reference(world, "base", 10)["scores"]
        return base, {task: self.of_reference(world, task, 10)["scores"][task] for task in tasks}

    def kept(self, run: str, world: str, tasks: Sequence[str]) -> dict[str, Estimate]:
        """The retention of each task over seeds, their `worst` and `mean`."""
        base, teachers = self.ends(world, tasks)
        of_seeds = [
            summarised(retention(base, teachers, result["measured"][0]["scores"]))
            for result in self.results[run].values()
        ]
        return {name: estimate([seed[name] for seed in of_seeds]) for name in of_seeds[0]}

    def present(self, runs: Sequence[str]) -> list[str]:
        return [run for run in runs if run in self.results]

    def scores_table(self, runs: Sequence[str], tasks: Sequence[str], what: str = "scores", sampled: int = 0) -> str:
        names = (*tasks, "worst", "mean")
        rows = [
            [f"`{run}`", str(len(self.results[run]))]
            + [shown(estimate(list(self.figure(run, name, what, sampled).values()))) for name in names]
            for run in self.present(runs)
        ]
        return table(["run", "seeds", *names], rows)

    def retention_table(self, runs: Sequence[str], world: str, tasks: Sequence[str]) -> str:
        rows = []
        for run in self.present(runs):
            kept = self.kept(run, world, tasks)
            rows.append([f"`{run}`", str(len(self.results[run])), *map(shown, kept.values())])
        return table(["retention", "seeds", *tasks, "worst", "mean"], rows)

    def curves(self, runs: Sequence[str], axes: Sequence[str]) -> dict[tuple[str, str, str], list[Line]]:
        panels: dict[tuple[str, str, str], list[Line]] = {}
        units = {"forwards": ("thousand forwards", 1e3), "seconds": ("seconds", 1.0)}
        for axis in axes:
            unit, scale = units[axis]
            for run in self.present(runs):
                for result in self.results[run].values():
                    points = result["curve"]
                    of_points = [fmean(point["scores"][f"{task}/{task}"] for task in TASKS) for point in points]
                    line = run, [point[axis] / scale for point in points], of_points
                    panels.setdefault(("mean of the tasks", unit, "validation score"), []).append(line)
        return panels

    # The sections

    def methods(self) -> Section:
        runs = [f"{method}-10" for method in SETTINGS]
        section = Section(self.missing(runs))
        if not (there := self.present(runs)):
            return section
        name = PICTURES.format("methods")
        plot_lines(self.curves(runs, ("forwards", "seconds")), self.output / name, columns=2)
        section.pictures[Path(name).name] = "Mean score against forwards and seconds"
        rows = []
        for run in there:
            costs = [result["cost"] for result in self.results[run].values()]
            updates = fmean(result["updates"] for result in self.results[run].values())
            figures = [f"{fmean(cost[axis] for cost in costs):,.0f}" for axis in ("forwards", "backwards", "seconds")]
            rows.append([f"`{run}`", f"{updates:.0f}", *figures])
        section.tables += [
            table(["run", "updates", "forwards", "backwards", "seconds"], rows),
            self.scores_table(runs, TASKS),
        ]
        section.findings += [
            sentence(
                f"At equal forwards OPD has a higher {figure} score than `{run}`",
                paired(self.figure("opd-10", figure), self.figure(run, figure)),
            )
            for figure in ("worst", "mean")
            for run in runs[1:]
        ]
        return section

    def steps(self) -> Section:
        runs = [f"{method}-{steps}-long" for steps in (4, 2) for method in FEW_STEP]
        section = Section(self.missing(runs))
        if self.reference is None or not self.present(runs):
            return section
        rows = []
        for steps in (10, 4, 2):
            for model, tasks in (("base", TASKS), *((task, [task]) for task in TASKS)):
                scores = self.of_reference("tiny", model, steps)["scores"]
                name = "base" if model == "base" else f"teacher of {model}"
                rows.append([name, str(steps), *(f"{scores[t]:.3f}" if t in tasks else "-" for t in TASKS)])
        section.tables += [
            table(["model", "steps", *TASKS], rows),
            self.scores_table(runs, TASKS),
            self.retention_table(runs, "tiny", TASKS),
        ]
        for steps in (4, 2):
            there = self.present([f"{method}-{steps}-long" for method in FEW_STEP])
            if not there:
                continue
            kept = {run: self.kept(run, "tiny", TASKS) for run in there}
            best = max(there, key=lambda run: kept[run]["mean"].mean)
            worst, mean = kept[best]["worst"], kept[best]["mean"]
            holds = "holds here" if mean.mean >= 0.9 else "does not hold here"
            section.findings.append(
                f"**A student of {steps} steps has 0.90 of its teachers' gain at ten steps, in the mean: {holds}**; the "
                f"best is `{best}`, mean {shown(mean)}, worst task {shown(worst)}, {seeds(mean)}."
            )
            ours = f"opd-{steps}-long"
            section.findings += [
                sentence(
                    f"`{ours}` above `{run}` in mean score",
                    paired(self.figure(ours, "mean"), self.figure(run, "mean")),
                )
                for run in there
                if run != ours
            ]
        return section

    def extrapolation(self) -> Section:
        runs = [f"extrapolation-{factor:g}" for factor in EXTRAPOLATIONS]
        section = Section(self.missing(runs))
        if self.reference is None or not self.present(runs):
            return section
        section.tables += [self.scores_table(runs, TASKS), self.scores_table(runs, TASKS, "diversity")]
        base, teachers = self.ends("tiny", TASKS)
        spread = {task: self.of_reference("tiny", task, 10)["diversity"][task] for task in TASKS}
        section.tables.append(
            table(
                ["own teacher", *TASKS],
                [
                    ["score", *(f"{teachers[task]:.3f}" for task in TASKS)],
                    ["score of the base", *(f"{base[task]:.3f}" for task in TASKS)],
                    ["diversity", *(f"{spread[task]:.3f}" for task in TASKS)],
                ],
            )
        )
        for run in runs[1:]:
            for name in (*TASKS, "mean"):
                change = paired(self.figure(run, name), self.figure(runs[0], name))
                section.findings.append(sentence(f"`{run}` raises {name} above `{runs[0]}`", change))
            lost = paired(self.figure(run, "mean", "diversity"), self.figure(runs[0], "mean", "diversity"))
            section.findings.append(sentence(f"`{run}` costs diversity", lost, sign=-1))
        return section

    def templates(self) -> Section:
        runs = ["alike-plain", "alike-templates"]
        section = Section(self.missing(runs))
        if self.reference is None or not self.present(runs):
            return section
        base, teachers = self.ends("alike", ALIKE)
        rows = [
            [name, *(f"{scores[task]:.3f}" for task in ALIKE)]
            for name, scores in (("base", base), ("own teacher", teachers))
        ]
        section.tables += [
            table(["model", *ALIKE], rows),
            self.scores_table(runs, ALIKE),
            self.retention_table(runs, "alike", ALIKE),
        ]
        for run in self.present(runs):
            kept = self.kept(run, "alike", ALIKE)
            lowest = min(ALIKE, key=lambda task: kept[task].mean)
            holds = "holds here" if kept[lowest].mean >= 0.9 else "does not hold here"
            section.findings.append(
                f"**`{run}` keeps 0.90 of every teacher's gain: {holds}**; lowest {shown(kept[lowest])} ({lowest}), "
                f"{seeds(kept[lowest])}."
            )
        return section

    def teacher_prompt(self) -> Section:
        runs = ["short-plain", "short-teacher_prompt", "own-teacher"]
        section = Section(self.missing(runs))
        if self.reference is None or not self.present(runs):
            return section
        base = self.of_reference("short", "base", 10)["scores"]
        teachers = self.ends("tiny", SHORT_TASKS)[1]
        long = self.of_reference("tiny", "base", 10)["scores"]
        rows = [
            [name, *(f"{scores[task]:.3f}" for task in SHORT_TASKS)]
            for name, scores in (
                ("base, short prompts", base),
                ("base, long prompts", long),
                ("own teacher, long prompts", teachers),
            )
        ]
        section.tables += [table(["model", *SHORT_TASKS], rows), self.scores_table(runs, SHORT_TASKS)]
        for task in (*SHORT_TASKS, "mean"):
            section.findings.append(
                sentence(
                    f"On short prompts `teacher_prompt` raises {task}",
                    paired(self.figure(runs[1], task), self.figure(runs[0], task)),
                )
            )
            start = summarised(base)[task]
            gained = {seed: value - start for seed, value in self.figure(runs[2], task).items()}
            claim = f"A student that teaches itself gains on short prompts in {task}, above the base"
            section.findings.append(sentence(claim, estimate(list(gained.values())) if gained else None))
        return section

    def branches(self) -> Section:
        runs = [f"branches-{weight:g}" for weight in WEIGHTS]
        section = Section(self.missing(runs))
        if self.reference is None or not self.present(runs):
            return section
        first = next(iter(self.results[self.present(runs)[0]].values()))
        rows = []
        scales = [measured["guidance"] for measured in first["measured"]]
        for i, scale in enumerate(scales):
            own = fmean(self.of_reference("tiny", task, 10, scale)["scores"][task] for task in TASKS)
            means = [shown(estimate(list(self.figure(run, "mean", sampled=i).values()))) for run in self.present(runs)]
            rows.append([f"{scale:g}", f"{own:.3f}", *means])
        section.tables.append(table(["scale", "own teachers", *(f"`{run}`" for run in self.present(runs))], rows))
        section.findings += [
            sentence(
                f"The branch loss raises the mean score at scale {scale:g}",
                paired(self.figure(runs[1], "mean", sampled=i), self.figure(runs[0], "mean", sampled=i)),
            )
            for i, scale in enumerate(scales)
        ]
        return section

    def edits(self) -> Section:
        runs = ["edit-long", "edit-joint", "edit-single", "edit-danceopd", "edit-all"]
        section = Section(self.missing(runs))
        if self.edit_reference is None or not self.present(runs):
            return section
        models = ("base", *EDIT_TASKS)
        rows = [
            [
                name if name == "base" else f"teacher of {name}",
                *(f"{self.of_reference('edit', name, 10)['scores'][task]:.3f}" for task in EDIT_TASKS),
            ]
            for name in models
        ]
        section.tables += [
            table(["model", *EDIT_TASKS], rows),
            self.scores_table(runs, EDIT_TASKS),
            self.retention_table(runs, "edit", EDIT_TASKS),
        ]
        ours = runs[0]
        if ours in self.results:
            kept = self.kept(ours, "edit", EDIT_TASKS)
            lowest = min(EDIT_TASKS, key=lambda task: kept[task].mean)
            holds = "holds here" if kept[lowest].mean >= 0.9 and kept["mean"].mean >= 0.95 else "does not hold here"
            section.findings.append(
                f"**One student keeps 0.90 of every teacher's gain and 0.95 in the mean: {holds}**; lowest "
                f"{shown(kept[lowest])} ({lowest}), mean {shown(kept['mean'])}, {seeds(kept['mean'])}."
            )
        for claim, run, other in (
            ("OPD has a higher {} score than joint reinforcement learning", ours, "edit-joint"),
            ("One query a rollout has a higher {} score than all steps", "edit-single", "edit-all"),
            ("DanceOPD's single query has a higher {} score than all steps", "edit-danceopd", "edit-all"),
        ):
            section.findings += [
                sentence(claim.format(figure), paired(self.figure(run, figure), self.figure(other, figure)))
                for figure in ("worst", "mean")
            ]
        return section

    def fixed_states(self) -> Section:
        runs = ["extrapolation-1", "opd-10", "own-teacher"]
        section = Section()
        panels: dict[tuple[str, str, str], list[Line]] = {}
        for run in self.present(runs):
            for result in self.results[run].values():
                for kind, label in (("kl", "on-policy"), ("fixed_kl", "fixed states")):
                    tasks = [name for name in result["curve"][0]["scores"] if name.startswith(f"{kind}/")]
                    points = [
                        (p["step"], fmean(p["scores"][name] for name in tasks)) for p in result["curve"] if tasks
                    ]
                    if points:
                        x, y = zip(*points, strict=True)
                        panels.setdefault((f"`{run}`".strip("`"), "updates", "KL"), []).append((label, x, y))
        if panels:
            name = PICTURES.format("fixed_states")
            plot_lines(panels, self.output / name, columns=len(panels))
            section.pictures[Path(name).name] = "The loss on the student's own states and on fixed ones"
        else:
            section.notes.append("Not measured yet.")
        return section

    def settings(self) -> Section:
        section = Section()
        rows = []
        for steps, methods in ((10, tuple(SETTINGS)), (4, FEW_STEP)):
            for method in methods:
                for i, setting in enumerate(SETTINGS[method]):
                    result = self.search.get(f"{method}-{steps}-{i}", {}).get(SEARCH_SEED)
                    if result is None:
                        continue
                    scores = summarised(result["measured"][0]["scores"])
                    words = ", ".join(
                        f"{name} {value}"
                        for name, value in setting.items()
                        if name not in ("loss_type", "loss_weighting")
                    )
                    rows.append([method, str(steps), words, f"{scores['worst']:.3f}", f"{scores['mean']:.3f}"])
        section.tables.append(table(["method", "steps", "setting", "worst", "mean"], rows))
        return section


def write_page(results: Path, output: Path) -> None:
    """
    Args:
        results (`Path`): the folder that `beyond.py` writes.
        output (`Path`): folder of `claims_beyond.md` and `images`.
    """
    (output / "images").mkdir(parents=True, exist_ok=True)
    beyond = Beyond(results, output)
    make: dict[str, Callable[[], Section]] = {
        "methods": beyond.methods,
        "steps": beyond.steps,
        "extrapolation": beyond.extrapolation,
        "templates": beyond.templates,
        "teacher_prompt": beyond.teacher_prompt,
        "branches": beyond.branches,
        "edits": beyond.edits,
        "fixed_states": beyond.fixed_states,
        "settings": beyond.settings,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    page = environment.get_template("beyond.md.jinja").render({name: section() for name, section in make.items()})
    (output / "claims_beyond.md").write_text(page, encoding="utf-8")


def main() -> None:
    write_page(BEYOND, BEYOND.parents[1])
    print("Wrote claims_beyond.md")


if __name__ == "__main__":
    main()
