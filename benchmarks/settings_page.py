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
Writes the tables of `choosing_settings.md` and `when_it_does_not_work.md` from the results of `settings.py` and
`symptoms.py`, and draws the picture of symptoms from the images that `symptoms.py --images` has kept.

    python benchmarks/settings_page.py
    python benchmarks/settings_page.py --images outputs/symptoms
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from scaling import with_tables
from settings import GAP_ONLY, retention

from trl_diffusion_opd.tiny import TASKS


SOURCE = Path(__file__).resolve().parents[1] / "docs" / "source"
RESULTS = {name: SOURCE / "results" / f"{name}.json" for name in ("settings", "symptoms")}
PAGES = [SOURCE / f"{name}.md" for name in ("choosing_settings", "when_it_does_not_work")]
PICTURE = SOURCE / "images" / "symptoms.png"
# The students that a setting is compared with are in its table too.
COMPARED = {
    "batch": [("updates", "50"), ("prompts", "all"), ("updates", "100")],
    "weights": [("prompts", "all")],
    "rank_and_rate": [("prompts", "all")],
}
NAMES = {
    ("prompts", "all"): {"batch": "8 x 100", "weights": "none", "rank_and_rate": "64, 0.002"},
    ("updates", "50"): {"batch": "16 x 50"},
    ("updates", "100"): {"batch": "16 x 100"},
}
# Rows of the picture: folders of kept images.
ROWS = {
    "base": "reference base/1_10",
    "style teacher": "reference style/1_10",
    "compose at guidance 7.5": "reference compose/7.5_10",
    "50 updates, no mistake": "healthy/1_10",
    "LoRA at strength 3": "healthy/strength_3",
    "rate x 100": "rate x 100/1_10",
    "folded in, drawn at 4.5": "guidance folded in/4.5_10",
    "alike prompts": "alike prompts/1_10",
    "reward hacking": "reward hacking/1_10",
}


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A table whose first columns, `words` of them, are text and whose others are figures."""
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def of_settings(results: list[dict[str, Any]], start: dict[str, float]) -> dict[str, str]:
    """
    A table of each group of settings: the gap on held-out prompts and the retention of each task. `start`: the gaps of a
    student that was not trained.
    """
    titles = {
        "updates": "updates",
        "prompts": "prompts per task",
        "rank_and_rate": "rank, rate",
        "batch": "prompts per task x updates",
        "weights": "`task_weights`",
    }
    found = {}
    for name, title in titles.items():
        group = name.replace("_", " ")
        rows = [result for result in results if result["group"] == group]
        if name == "updates":
            rows += [result for result in results if result["group"] == "seed"]
        if name in COMPARED:
            by_name = {(result["group"], result["value"]): result for result in results}
            rows = [by_name[one] for one in COMPARED[name]] + rows
        header = [title, *(f"gap {task}" for task in TASKS)]
        lines = [[label(name, result), *(f"{result['gap'][task]:.3f}" for task in TASKS)] for result in rows]
        if group not in GAP_ONLY:
            header += [*TASKS, "mean retention"]
            for line, kept in zip(lines, map(retention, rows), strict=True):
                line += [f"{value:.3f}" for value in (*kept.values(), statistics.mean(kept.values()))]
        if name == "updates":
            lines.insert(0, ["0, the base", *(f"{start[task]:.3f}" for task in TASKS), *["0"] * (len(TASKS) + 1)])
        if name == "prompts":
            header.append("gaps on training prompts")
            for line, result in zip(lines, rows, strict=True):
                own = result["gap_on_training_prompts"]
                line.append("-" if own is None else ", ".join(f"{own[task]:.3f}" for task in TASKS))
        found[name] = markdown(header, lines)
    return {**found, "converged": converged(results, start)}


def label(name: str, result: dict[str, Any]) -> str:
    """What a row is called in the table of this name."""
    if result["group"] == "seed":
        return f"200, seed {result['value']}"
    return NAMES.get((result["group"], result["value"]), {}).get(name, result["value"])


def converged(results: list[dict[str, Any]], start: dict[str, float]) -> str:
    """For each range of gaps, as shares of the base's: what part of the teachers' gains the students have, over all tasks."""
    bounds = (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)
    pairs = [
        (result["gap"][task] / start[task], kept) for result in results for task, kept in retention(result).items()
    ]
    lines = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        kept = [value for share, value in pairs if low <= share < high]
        if kept:
            figures = (min(kept), statistics.median(kept), max(kept))
            lines.append([f"{low:.0%} to {high:.0%}", str(len(kept)), *(f"{figure:.2f}" for figure in figures)])
    header = ["gap, of the gap at the start", "students and tasks", "lowest retention", "median", "highest"]
    return markdown(header, lines)


def mean_colours(drawn: dict[str, Any]) -> float:
    return statistics.mean(colours["saturation"] for colours in drawn["colours"].values())


def of_symptoms(results: dict[str, Any]) -> dict[str, str]:
    """What each mistake did to gaps, scores and colours."""
    lines, ways = [], []
    for name, result in results.items():
        if "gap" not in result:
            continue
        drawn = result["drawn"][0]
        gaps = [
            f"{result['before'][task]:.3f} → {result['gap'][task]:.3f}" if task in result["gap"] else "-"
            for task in TASKS
        ]
        lines.append([name, *gaps, *rest(drawn)])
        if len(result["drawn"]) > 1:
            ways += [way(name, one) for one in result["drawn"]]
    strengths = [[f"{one['strength']:g}", *rest(one)] for one in results["healthy"]["strengths"]]
    references = [
        way("base" if name == "base" else f"{name} teacher", one)
        for name, models in results["reference"]["models"].items()
        for one in models
    ]
    columns = [*TASKS, "saturation", "dusk on scenes"]
    return {
        "symptoms": markdown(["mistake", *(f"gap {task}" for task in TASKS), *columns], lines),
        "ways": markdown(["student", "guidance", "steps", *columns], ways),
        "strengths": markdown(["strength", *columns], strengths),
        "references": markdown(["model", "guidance", "steps", *columns], references),
        "hacking": hacking(results),
    }


def rest(drawn: dict[str, Any]) -> list[str]:
    """The scores, the mean saturation of all images, and how much of style's dusk is on the scenes of compose."""
    figures = (*(drawn["scores"][task] for task in TASKS), mean_colours(drawn), drawn["dusk_of_compose"])
    return [f"{figure:.3f}" for figure in figures]


def way(name: str, drawn: dict[str, Any]) -> list[str]:
    """A row of a model that was drawn in several ways."""
    return [name, f"{drawn['guidance_scale']:g}", str(drawn["steps"]), *rest(drawn)]


def hacking(results: dict[str, Any]) -> str:
    """What two teachers by a careless reward logged at the start and at the end, and what they draw."""
    lines = []
    for name, result in results.items():
        if not name.startswith("reward hacking"):
            continue
        first, last = result["history"][0], result["history"][-1]
        rewards = [
            f"{first[f'rewards/{reward}/mean']:.3f} → {last[f'rewards/{reward}/mean']:.3f}"
            for reward in ("darkness", "compose_graded")
        ]
        lines.append([name, str(last["step"]), *rewards, f"{result['drawn'][0]['scores']['compose']:.3f}"])
    header = ["run", "updates", "reward that is trained on", "reward that is only measured", "verdict of compose"]
    return markdown(header, lines)


def read() -> dict[str, str]:
    """All tables of the two pages."""
    settings, symptoms = (json.loads(RESULTS[name].read_text()) for name in ("settings", "symptoms"))
    return {**of_settings(settings, symptoms["healthy"]["before"]), **of_symptoms(symptoms)}


def draw_picture(images: Path, path: Path) -> None:
    """One row for each kind of student, and the first prompts of each task."""
    names = [f"{task}_{i}" for task in TASKS for i in range(2)]
    figure, axes = plt.subplots(len(ROWS), len(names), figsize=(1.0 * len(names) + 1.6, 1.0 * len(ROWS)))
    for line, (title, folder) in enumerate(ROWS.items()):
        for column, name in enumerate(names):
            axis = axes[line, column]
            axis.imshow(Image.open(images / folder / f"{name}.png"), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[line, 0].set_ylabel(title, fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="The folder of images of `symptoms.py`, for the picture.")
    args = parser.parse_args()
    found = read()
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), found))
    if args.images is not None:
        draw_picture(args.images, PICTURE)


if __name__ == "__main__":
    main()
