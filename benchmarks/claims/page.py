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
Draws `docs/source/claims.md` and its pictures from the results of the comparison.

    python benchmarks/claims/page.py

Any of them may be missing: the page says which, and whether a claim holds is computed from those that are there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from methods import METHODS, NOISE, RANKS, RESULTS, TASKS, WEIGHTINGS, teacher_forwards
from pictures import Line, plot_bars, plot_lines
from summary import (
    AXES,
    Estimate,
    cumulated,
    equal_costs,
    estimate,
    forgetting,
    paired,
    retention,
    stage_costs,
    summarised,
)


SEEDS = (0, 1, 2)
JOINT = tuple(method for method in METHODS if method.startswith("multi-task"))
CASCADES = tuple(method for method in METHODS if method.startswith("cascade-"))
OTHERS = JOINT + CASCADES
ALL_ORDERS = "cascade, mean of its orders"
MERGES = tuple(f"merge-r{rank}" for rank in (*RANKS, 64))
PICTURES = "images/claims_{}.png"
TOTALS = ("worst", "mean")

# [method][seed]: what `run.py` writes.
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


@dataclass
class Section:
    """What the template shows of one claim: what is missing, pictures with their texts, tables, computed sentences."""

    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def read_results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["method"], {})[result["seed"]] = result
    return results


def missing(results: Results, methods: Sequence[str]) -> list[str]:
    """A sentence that names what was not measured; none if all was."""
    gaps = []
    for method in methods:
        expected = SEEDS if method in METHODS else SEEDS[:1]
        seeds = [str(seed) for seed in expected if seed not in results.get(method, {})]
        if len(seeds) == len(expected):
            gaps.append(f"`{method}`")
        elif seeds:
            gaps.append(f"`{method}` (seed {', '.join(seeds)})")
    return [f"Not measured yet: {', '.join(gaps)}."] if gaps else []


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Estimate, sign: str = "") -> str:
    bounds = "" if value.low is None else f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})"
    return f"{value.mean:{sign}.3f}{bounds}"


def tests(results: Results, method: str, figure: str) -> dict[int, float]:
    """A test score of each seed: of a task, the `worst` or the `mean`. Of all orders of the cascade the mean of what there is."""
    if method == ALL_ORDERS:
        of_orders = [tests(results, order, figure) for order in CASCADES]
        seeds = sorted({seed for scores in of_orders for seed in scores})
        return {seed: estimate([scores[seed] for scores in of_orders if seed in scores]).mean for seed in seeds}
    return {seed: summarised(result["test"])[figure] for seed, result in results.get(method, {}).items()}


def scores_table(results: Results, methods: Sequence[str]) -> str:
    figures = (*TASKS, *TOTALS)
    rows = [
        [method, str(len(results[method]))]
        + [shown(estimate(list(tests(results, method, figure).values()))) for figure in figures]
        for method in methods
        if method in results
    ]
    return table(["method", "seeds", *figures], rows)


def comparison(results: Results, ours: str, theirs: str, figure: str) -> Estimate | None:
    return paired(tests(results, ours, figure), tests(results, theirs, figure))


def sentence(claim: str, difference: Estimate | None, sign: int = 1) -> str:
    """
    Whether a claim holds. `sign`: 1 if it claims that the difference is above zero, -1 if below.
    """
    if difference is None:
        return f"**{claim}: not measured.**"
    figures = f"difference {shown(difference, '+')}, {difference.n} seed{'s' if difference.n > 1 else ''}"
    if difference.n < 2:
        return f"**{claim}: not decided**, one seed has no interval; {figures}."
    verdict = difference.verdict
    if verdict == "open":
        return f"**{claim}: not shown here**, the interval contains zero; {figures}."
    if (verdict == "positive") == (sign > 0):
        return f"**{claim}: holds here**; {figures}."
    return f"**{claim}: does not hold here**, the opposite was found; {figures}."


def teacher_costs(results: Results) -> dict[str, dict[str, float]]:
    """
    What teachers add to OPD's cost, counted in both ways. Their seconds are their forwards at the speed of the other trainings by
    reward, which ran beside OPD's; the teachers were not trained then.
    """
    runs = [result["cost"] for method in OTHERS for result in results.get(method, {}).values()]
    pace = sum(cost["seconds"] for cost in runs) / sum(cost["forwards"] for cost in runs)
    forwards = teacher_forwards().values()
    return {
        name: {"forwards": float(count(forwards)), "seconds": count(forwards) * pace}
        for name, count in (("sum", sum), ("longest", max))
    }


def cost_lines(results: Results, before: Mapping[str, Mapping[str, float]], axis: str, figure: str) -> list[Line]:
    """OPD twice, joint RL by validation; cascades by the tests after their stages, from the base on."""
    scale = 1e3 if axis == "forwards" else 1.0
    runs: list[tuple[str, Mapping[str, Any], Mapping[str, float] | None]] = [
        (f"opd, teachers: {way}", result, added)
        for way, added in before.items()
        for result in results.get("opd", {}).values()
    ]
    runs += [(method, result, None) for method in JOINT for result in results.get(method, {}).values()]
    lines: list[Line] = []
    for label, result, added in runs:
        points = [point for point in cumulated(result, TASKS, added) if len(point["scores"]) == len(TASKS)]
        x, y = [point[axis] / scale for point in points], [summarised(point["scores"])[figure] for point in points]
        lines.append((label, x, y))
    for method in CASCADES:
        for result in results.get(method, {}).values():
            x, y = [], []
            if "base" in results:
                x, y = [0.0], [summarised(results["base"][0]["test"])[figure]]
            so_far = 0.0
            for stage, costs in stage_costs(result).items():
                so_far += costs[axis] / scale
                x.append(so_far)
                y.append(summarised(result["test_after"][stage])[figure])
            lines.append((method, x, y))
    return lines


def cost_section(results: Results, output: Path) -> Section:
    methods = ("opd", *OTHERS)
    section = Section(missing(results, (*methods, "base")))
    if not any(method in results for method in OTHERS):
        return section
    before = teacher_costs(results)
    units = {"forwards": "thousand forwards", "seconds": "seconds"}
    panels = {
        (f"{figure} of the tasks", units[axis], "score"): cost_lines(results, before, axis, figure)
        for figure in TOTALS
        for axis in AXES
    }
    name = PICTURES.format("cost")
    plot_lines(panels, output / name, columns=2)
    section.pictures[Path(name).name] = "Worst-task and mean score against forwards and seconds"
    present = [method for method in methods if method in results]
    rows, totals = [], {}
    for method in present:
        for way in before if method == "opd" else ["-"]:
            of_axis = {
                axis: [
                    r["cost"][axis] + (before[way][axis] if method == "opd" else 0) for r in results[method].values()
                ]
                for axis in AXES
            }
            mean = {axis: estimate(values).mean for axis, values in of_axis.items()}
            rows.append(
                [method, way, str(len(results[method])), f"{mean['forwards']:,.0f}", f"{mean['seconds']:,.0f}"]
            )
            if way != "longest":
                totals[method] = {
                    seed: r["cost"]["forwards"] + (before["sum"]["forwards"] if method == "opd" else 0)
                    for seed, r in results[method].items()
                }
    section.tables += [
        table(["method", "teachers", "seeds", "forwards", "seconds"], rows),
        scores_table(results, present),
    ]
    rivals = [method for method in present if method != "opd" and comparison(results, "opd", method, "worst")]
    pairs = [
        (cost, totals[method][seed])
        for seed, cost in totals.get("opd", {}).items()
        for method in rivals
        if seed in totals[method]
    ]
    if not all(map(equal_costs, pairs)):
        section.findings.append("**OPD against the others: not decided**, their forwards are not equal.")
        return section
    if any(method in CASCADES for method in rivals):
        rivals.append(ALL_ORDERS)
    section.findings += [
        sentence(
            f"At equal forwards, all teachers counted, OPD has a higher {figure} score than `{method}`",
            comparison(results, "opd", method, figure),
        )
        for figure in TOTALS
        for method in rivals
    ]
    return section


def forgetting_section(results: Results, gradients: Mapping[str, Any] | None) -> Section:
    section = Section(missing(results, CASCADES))
    forgot: dict[int, list[float]] = {}
    rows = []
    for method in CASCADES:
        if method not in results:
            continue
        changes: dict[tuple[str, str], list[float]] = {}
        for seed, result in results[method].items():
            for task, later in forgetting(result["test_after"]).items():
                for stage, change in later.items():
                    changes.setdefault((task, stage), []).append(change)
                forgot.setdefault(seed, []).append(later[list(later)[-1]])
        rows += [
            [method, task, stage, str(len(values)), shown(estimate(values), "+")]
            for (task, stage), values in changes.items()
        ]
    if rows:
        section.tables.append(table(["order", "task", "after stage", "seeds", "change"], rows))
    of_seeds = [estimate(values).mean for values in forgot.values()]
    claim = "A cascade forgets (mean change of earlier tasks at the end, over the orders that a seed has)"
    section.findings.append(sentence(claim, estimate(of_seeds) if of_seeds else None, sign=-1))
    if gradients is None:
        section.notes.append("Gradients were not measured yet.")
        return section
    rows = []
    for method, places in gradients["interference"].items():
        if method == "settings":
            continue
        for place, figures in places["at"].items():
            for pair, cosine in figures["cosine"].items():
                corrected = figures["corrected"][pair]["mean"]
                reliable = [figures["reliability"][task]["mean"] for task in pair.split("-")]
                rows.append(
                    [
                        method,
                        place,
                        pair,
                        shown(estimate(cosine["seeds"]), "+"),
                        "-" if corrected is None else f"{corrected:+.3f}",
                        ", ".join(f"{value:.2f}" for value in reliable),
                    ]
                )
                if method == "rl" and place == "later":
                    claim = f"Joint RL interferes between {pair} (cosine of gradients, on the way)"
                    section.findings.append(sentence(claim, estimate(cosine["seeds"]), sign=-1))
    section.tables.append(table(["gradients of", "at", "tasks", "cosine", "corrected", "reliability"], rows))
    return section


def curve_panels(results: Results, methods: Sequence[str]) -> dict[tuple[str, str, str], list[Line]]:
    panels: dict[tuple[str, str, str], list[Line]] = {}
    for figure in (*TASKS, "mean"):
        for method in methods:
            for result in results.get(method, {}).values():
                points = cumulated(result, TASKS)
                line = [point["step"] for point in points], [summarised(p["scores"])[figure] for p in points]
                panels.setdefault((figure, "updates", "validation score"), []).append((method, *line))
    return panels


def trained_section(results: Results, methods: Sequence[str], name: str, text: str, output: Path) -> Section:
    """Curves and table of methods that train all tasks at once."""
    section = Section(missing(results, methods))
    if panels := curve_panels(results, methods):
        name = PICTURES.format(name)
        plot_lines(panels, output / name, columns=2)
        section.pictures[Path(name).name] = text
        section.tables.append(scores_table(results, methods))
    return section


def forms_section(results: Results, gradients: Mapping[str, Any] | None, output: Path) -> Section:
    methods = ("flow_sde_0.7-kl", "policy-gradient")
    section = trained_section(results, methods, "forms", "Closed form and policy gradient", output)
    difference = comparison(results, *methods, "mean")
    section.findings.append(sentence("The closed form ends with a higher mean score", difference))
    if gradients is None:
        section.notes.append("The variance of gradients at frozen states was not measured yet.")
        return section
    rows = [
        [f"`{form}`", *(f"{figures[name]:.4g}" for name in ("nsr", "predicted", "norm_ratio"))]
        for form, figures in gradients["variance"]["lora"].items()
    ]
    section.tables.append(table(["form", "noise / signal", "predicted", "norm ratio"], rows))
    noise = {form: figures["nsr"] for form, figures in gradients["variance"]["lora"].items()}
    others = {form: value for form, value in noise.items() if form != "closed_form"}
    lowest = min(others, key=lambda form: others[form])
    holds = "holds here" if noise["closed_form"] < others[lowest] else "does not hold here"
    section.findings.append(
        f"**The closed form has less variance: {holds}**; noise to signal {noise['closed_form']:.3g}, "
        f"at least {others[lowest]:.3g} of the others (`{lowest}`)."
    )
    return section


def noise_section(results: Results, output: Path) -> Section:
    methods = [f"{noise}-{weighting}" for noise in NOISE for weighting in WEIGHTINGS]
    section = trained_section(results, methods, "noise", "Samplers and weightings", output)
    noisy = [noise for noise in NOISE if noise != "ode"]
    compared = [("states and weights", "ode-kl", f"{noise}-kl") for noise in noisy]
    compared += [("states", "ode-velocity", f"{noise}-velocity") for noise in noisy]
    compared += [("weights", f"{noise}-velocity", f"{noise}-kl") for noise in NOISE]
    section.findings += [
        sentence(
            f"`{ours}` above `{theirs}` in mean score (difference in {cause})",
            comparison(results, ours, theirs, "mean"),
        )
        for cause, ours, theirs in compared
    ]
    return section


def ranks_section(results: Results, output: Path) -> Section:
    kinds = ("on-policy", "off-policy", "sft")
    methods = [f"{kind}-r{rank}" for rank in RANKS for kind in kinds]
    section = Section(missing(results, methods))
    bars = {
        kind: {
            f"rank {rank}": estimate(list(tests(results, f"{kind}-r{rank}", "mean").values()))
            for rank in RANKS
            if f"{kind}-r{rank}" in results
        }
        for kind in kinds
    }
    if any(bars.values()):
        name = PICTURES.format("ranks")
        plot_bars({kind: of_kind for kind, of_kind in bars.items() if of_kind}, "mean test score", output / name)
        section.pictures[Path(name).name] = "Mean score by rank, with 95% intervals"
        rows = [
            [method, f"{estimate([r['cost']['forwards'] for r in results[method].values()]).mean:,.0f}"]
            for method in methods
            if method in results
        ]
        section.tables += [scores_table(results, methods), table(["method", "forwards"], rows)]
    section.findings += [
        sentence(
            f"On-policy above {other} at rank {rank} in mean score",
            comparison(results, f"on-policy-r{rank}", f"{other}-r{rank}", "mean"),
        )
        for rank in RANKS
        for other in kinds[1:]
    ]
    return section


def retention_section(results: Results, output: Path) -> Section:
    teachers = [f"teacher-{task}" for task in TASKS]
    models, students = ("base", *teachers, "opd", *MERGES), ("opd", *MERGES)
    section = Section(missing(results, models))
    if any(model in results for model in models):
        section.tables.append(scores_table(results, models))
    if any(model not in results for model in ("base", *teachers)) or not any(s in results for s in students):
        section.notes.append("Without the base, all teachers and a student there is no retention.")
        return section
    base = results["base"][0]["test"]
    goals = {task: results[f"teacher-{task}"][0]["test"][task] for task in TASKS}
    kept: dict[str, dict[str, Estimate]] = {}
    for student in students:
        if student in results:
            of_seeds = [summarised(retention(base, goals, r["test"])) for r in results[student].values()]
            kept[student] = {name: estimate([seed[name] for seed in of_seeds]) for name in of_seeds[0]}
    names = list(next(iter(kept.values())))
    rows = [[student, *(shown(of[name]) for name in names)] for student, of in kept.items()]
    section.tables.append(table(["retention", *names], rows))
    name = PICTURES.format("retention")
    plot_bars({s: {n: of[n] for n in names if n != "worst"} for s, of in kept.items()}, "retention", output / name)
    section.pictures[Path(name).name] = "Retention by task, with 95% intervals"
    if "opd" in kept:
        ours = kept["opd"]
        lowest = min((task for task in TASKS if task in ours), key=lambda task: ours[task].mean)
        reached = ours[lowest].mean >= 0.90 and ours["mean"].mean >= 0.95
        section.findings.append(
            f"**OPD keeps at least 0.90 of every teacher's gain, and 0.95 in the mean: "
            f"{'holds' if reached else 'does not hold'} here**; lowest {ours[lowest].mean:.3f} ({lowest}), "
            f"mean {ours['mean'].mean:.3f}, {ours['mean'].n} seeds."
        )
    return section


def write_page(results_folder: Path, gradients: Path, output: Path) -> None:
    """
    Args:
        results_folder, gradients (`Path`): what `run.py` and `gradients.py` wrote; the second, and any of the first, may be missing.
        output (`Path`): folder of `claims.md` and `images`.
    """
    (output / "images").mkdir(parents=True, exist_ok=True)
    for stale in (output / "images").glob(Path(PICTURES.format("*")).name):
        stale.unlink()
    results = read_results(results_folder)
    measured = json.loads(gradients.read_text(encoding="utf-8")) if gradients.exists() else None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    make: dict[str, Callable[[], Section]] = {
        "cost": lambda: cost_section(results, output),
        "forgetting": lambda: forgetting_section(results, measured),
        "forms": lambda: forms_section(results, measured, output),
        "noise": lambda: noise_section(results, output),
        "ranks": lambda: ranks_section(results, output),
        "retention": lambda: retention_section(results, output),
    }
    page = environment.get_template("page.md.jinja").render({name: section() for name, section in make.items()})
    (output / "claims.md").write_text(page, encoding="utf-8")


def main() -> None:
    beside = RESULTS.parent
    write_page(RESULTS, beside / "claims_gradients.json", beside.parent)
    print("Wrote claims.md")


if __name__ == "__main__":
    main()
