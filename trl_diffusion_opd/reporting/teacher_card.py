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


"""Writes the model card of a teacher into its folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult
from safetensors import safe_open

from ..guards.files import read_json
from ..guards.redaction import last_part, public_name
from ..hub.files import ADAPTER_CONFIG_FILE, CARD_FILE, HIGH_NOISE_LORA_FILE, LOW_NOISE_LORA_FILE
from ..models.expert_teachers import find_for_any_base
from ..models.teacher_config import TeacherConfig
from ..models.teacher_files import TeacherFiles
from ..pipelines.frames import FRAMES_ARGUMENTS
from .cards import as_list, card_data, hub_id, is_tiny, literals, render, results_of, save
from .report import Report
from .videos import FPS


def write_teacher_card(
    folder: str | Path,
    base: str,
    task: str,
    guidance_scale: float,
    call_options: Mapping[str, object],
    *,
    report: Report | str | Path | None = None,
    repository: str | None = None,
    subfolder: str | None = None,
    method: str | None = None,
    datasets: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    dtype: str = "float32",
) -> Path:
    """
    Writes the model card `README.md` of a teacher into its folder. The teacher is a LoRA in PEFT's or diffusers'
    format.

    Args:
        folder (`str` or `Path`): the teacher's folder.
        base (`str`): the base: a Hub id, or a folder, whose name alone is shown.
        task (`str`): the task that it teaches.
        guidance_scale (`float`): classifier-free guidance scale to use it with; 1 for none.
        call_options (`dict`):
            Arguments of the pipeline for an image as in its evaluation: `prompt` first, then steps, resolution, and
            guidance under the pipeline's own name for it.
        report (`dict`, `str` or `Path`, *optional*):
            A retention report in which it was a teacher, or the report's file. The card shows its scores on all tasks.
        repository (`str`, *optional*): Hub id where the folder is or will be.
        subfolder (`str`, *optional*): folder in the repository.
        method (`str`, *optional*): a sentence on how it was trained.
        datasets (`str` or `list[str]`, *optional*): Hub ids of its training data.
        tags (`str` or `list[str]`, *optional*): tags besides `diffusion-opd`, `teacher` and `lora`.
        dtype (`str`, *optional*, defaults to `"float32"`): dtype of the base in the card's code.

    Returns:
        `Path`: the card's file.

    Raises:
        [`ValueError`]: if the folder holds no LoRA, or the report has no such task.
    """
    folder = Path(folder)
    found = find_for_any_base(TeacherConfig(str(folder)))
    if found.kind == "full":
        raise ValueError(f"{found.label}: a LoRA is needed here, but this is a whole network.")
    content = json.loads(Path(report).read_text(encoding="utf-8")) if isinstance(report, (str, Path)) else report
    if content is not None and task not in content["tasks"]:
        raise ValueError(f"The report has no task {task!r}; it has {', '.join(content['tasks'])}.")
    base_id = hub_id(base)
    dataset_ids = [name for name in as_list(datasets) if hub_id(name)]
    name = "-".join(filter(None, ((repository or last_part(str(folder))).split("/")[-1], subfolder)))
    data = card_data(
        name.replace("/", "-"),
        base_id,
        relation="adapter",
        tags=["diffusion-opd", "teacher", "lora", *as_list(tags)],
        datasets=dataset_ids,
        results=_teacher_results(content, task, dataset_ids) if content else [],
        is_video=_films(call_options),
    )
    card = render(
        "teacher_card.md",
        data,
        model_name=name,
        base_id=base_id,
        base_name=public_name(base) or last_part(base),
        is_tiny=is_tiny(base),
        repository=repository,
        subfolder=subfolder,
        folder_name=last_part(str(folder)),
        task=task,
        method=method,
        guidance_scale=guidance_scale,
        steps=call_options.get("num_inference_steps"),
        call_options=literals(call_options, []),
        **_loading(found),
        **_of_frames(call_options),
        dtype=dtype,
        **_of_config(folder),
        sha256=found.sha256(),
        scores=_teacher_scores(content, task) if content else [],
        report=content,
        datasets=dataset_ids,
    )
    save(card, folder)
    return folder / CARD_FILE


def _films(call_options: Mapping[str, object]) -> bool:
    """Whether a call with these arguments makes a video of more than one frame."""
    return any(call_options.get(name) not in (None, 1) for name in FRAMES_ARGUMENTS)


def _of_frames(call_options: Mapping[str, object]) -> dict[str, object]:
    named = any(name in FRAMES_ARGUMENTS for name in call_options)
    return {"draws_frames": named, "films": _films(call_options), "fps": FPS}


def _of_config(folder: Path) -> dict[str, object]:
    config = read_json(folder / ADAPTER_CONFIG_FILE) or {}
    return {"rank": config.get("r"), "alpha": config.get("lora_alpha")}


def _loading(found: TeacherFiles) -> dict[str, object]:
    """How it is loaded: as a student's card says it, the pipeline's name for its network, and the files of a pair."""
    if (found.folder / HIGH_NOISE_LORA_FILE).is_file():  # beside PEFT's file, which is for both experts
        return {"kind": "pair", "pair": (HIGH_NOISE_LORA_FILE, LOW_NOISE_LORA_FILE), "denoiser": "transformer"}
    if found.other is not None:
        return {"kind": "pair", "pair": (found.names[-1], found.other.names[-1]), "denoiser": "transformer"}
    kind = "lora" if found.kind == "diffusers" else "peft"
    return {"kind": kind, "denoiser": _denoiser(found.folder / found.names[-1])}


def _denoiser(file: Path) -> str:
    """The pipeline's name for the network that a LoRA is for. Only UNets go down and up again."""
    with safe_open(file, "pt") as weights:
        return "unet" if any("up_blocks" in key for key in weights.keys()) else "transformer"


def _teacher_results(report: Report, task: str, datasets: list[str]) -> list[EvalResult]:
    row = report["tasks"][task]
    return results_of(report, datasets, task, row["reward"], row["reward"], row["teacher"], None)


def _teacher_scores(report: Report, task: str) -> list[dict[str, object]]:
    """Scores of base and teacher on every task. They show the gain on its own task, and losses on others."""
    own = report.get("scores", {}).get(f"teacher/{task}", {})
    intervals = report.get("scores_ci95", {}).get(f"teacher/{task}", {})
    rows: list[dict[str, object]] = []
    for other, row in report["tasks"].items():
        reward = row["reward"]
        score = row["teacher"] if other == task else own.get(other, {}).get(reward)
        if score is not None:
            ci95 = intervals.get(other, {}).get(reward)
            rows.append({"task": other, "reward": reward, "base": row["base"], "teacher": score, "ci95": ci95})
    return rows
