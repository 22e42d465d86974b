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


"""Model cards: of a student, from its trainer, and of a teacher, from its folder."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import torch
from datasets import Dataset
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers.utils.hub import hf_api

from .. import __version__
from ..acceleration.quantization import described
from ..guards.markdown import cell, code, inline, literal
from ..guards.redaction import last_part, public_text, public_value, shown
from ..hub.push import CARD_FILE, REPORT_FILE, known_tokens
from ..models.average import average_in_words
from ..models.student import STUDENT_ADAPTER, public_name
from ..models.teacher_config import TeacherConfig
from ..models.teacher_files import find_files


if TYPE_CHECKING:
    from ..trainer.base_trainer import DiffusionTrainer

# In the order in which a reader meets them.
_PICTURES = {
    "samples.png": "The same prompts and noise: base, teacher, student",
    "retention.png": "Score of the base, the teachers and this student on each task",
    "radar.png": "All rewards of base, teachers and student",
    "curves.png": "Training curves",
}
_SHOWN_PACKAGES = ("trl", "diffusers", "peft", "transformers", "torch", "datasets")
_TASK = "text-to-image"


def write_model_card(
    trainer: "DiffusionTrainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    changes: Sequence[Mapping[str, Any]] = (),
) -> None:
    """
    Writes the model card `README.md` into the output folder.

    It shows the report `retention.json` and the pictures of it, if the folder has them, and what the trainer's
    `_card_fields` says of its method. The licence is the base's own, as the base's card on the Hub names it; where that
    can't be read, none is named.

    Args:
        trainer ([`DiffusionTrainer`])
        model_name (`str`, *optional*): the title, by default the name of the repository or the output folder.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data. Local paths are left out.
        tags (`str` or `list[str]`, *optional*): tags besides the method's own.
        changes (`list[dict]`, *optional*): what resumes have changed, as `DiffusionTrainer.changes` has it.
    """
    args = trainer.args
    folder = Path(args.output_dir or ".")
    is_lora = isinstance(trainer.student.model, PeftModel)
    base = trainer._pipeline.config.get("_name_or_path")
    base_id = _hub_id(base)
    datasets = [name for name in _list(dataset_name) if _hub_id(name)]
    repository = trainer.hub_model_id or args.hub_model_id
    name = model_name or (repository or last_part(str(folder))).split("/")[-1]
    report = _read_json(folder / REPORT_FILE)
    data = _card_data(
        name,
        base_id,
        relation="adapter" if is_lora else "finetune",
        tags=[*trainer._tag_names, *(["lora"] if is_lora else []), *_list(tags)],
        datasets=datasets,
        results=student_results(report, datasets) if report else [],
    )
    scale = args.eval_guidance_scale
    card = _render(
        "model_card.md",
        data,
        model_name=name,
        base_id=base_id,
        base_name=public_name(base) or "base",
        repository=repository,
        folder_name=last_part(str(folder)),
        trainer_name=trainer._name,
        paper=trainer._paper,
        fields=trainer._card_fields(),
        args=args,
        eval_guidance_scale=args.guidance_scale if scale is None else scale,
        call_options=_literals(_call_options(trainer), known_tokens(args)),
        kind=_kind(trainer),
        transformer_class=type(trainer._pipeline.transformer).__name__,
        settings=_settings(trainer),
        changes=changes,
        report=report,
        pictures={picture: text for picture, text in _PICTURES.items() if (folder / picture).exists()},
        datasets=datasets,
    )
    _save(card, folder)


def write_teacher_card(
    folder: str | Path,
    base: str,
    task: str,
    guidance_scale: float,
    call_options: Mapping[str, Any],
    *,
    report: Mapping[str, Any] | str | Path | None = None,
    repository: str | None = None,
    subfolder: str | None = None,
    method: str | None = None,
    datasets: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    dtype: str = "float32",
) -> Path:
    """
    Writes the model card of a teacher, a LoRA in PEFT's or in diffusers' format, as `README.md` into its folder.

    Args:
        folder (`str` or `Path`): the teacher's folder.
        base (`str`): the base, a Hub id or a folder, of which only the name is shown.
        task (`str`): what it teaches.
        guidance_scale (`float`): scale of classifier-free guidance at which it is to be asked, 1 for none.
        call_options (`dict[str, Any]`):
            Arguments of the pipeline for an image as in its evaluation, `prompt` first: steps, resolution, and guidance by
            the name that the pipeline has for it.
        report (`dict`, `str` or `Path`, *optional*):
            A retention report that it was a teacher in, or the file of one. Its scores on all tasks are shown.
        repository (`str`, *optional*): Hub id where the folder is or will be.
        subfolder (`str`, *optional*): folder in the repository.
        method (`str`, *optional*): a sentence on how it was trained.
        datasets (`str` or `list[str]`, *optional*): Hub ids of its training data.
        tags (`str` or `list[str]`, *optional*): tags besides `diffusion-opd`, `teacher` and `lora`.
        dtype (`str`, *optional*, defaults to `"float32"`): dtype of the base in the code of the card.

    Returns:
        `Path`: the card's file.

    Raises:
        [`ValueError`]: if the folder holds no LoRA, or the report knows no teacher of the task.
    """
    folder = Path(folder)
    found = find_files(TeacherConfig(str(folder)))
    if found.kind == "full":
        raise ValueError(f"{found.label}: a LoRA is needed here, and this is a whole transformer.")
    content = json.loads(Path(report).read_text(encoding="utf-8")) if isinstance(report, (str, Path)) else report
    if content is not None and task not in content["tasks"]:
        raise ValueError(f"The report has no task {task!r}; it has {', '.join(content['tasks'])}.")
    base_id = _hub_id(base)
    dataset_ids = [name for name in _list(datasets) if _hub_id(name)]
    name = "-".join(filter(None, ((repository or last_part(str(folder))).split("/")[-1], subfolder)))
    data = _card_data(
        name.replace("/", "-"),
        base_id,
        relation="adapter",
        tags=["diffusion-opd", "teacher", "lora", *_list(tags)],
        datasets=dataset_ids,
        results=_teacher_results(content, task, dataset_ids) if content else [],
    )
    config = _read_json(folder / CONFIG_NAME) or {}
    card = _render(
        "teacher_card.md",
        data,
        model_name=name,
        base_id=base_id,
        base_name=public_name(base) or last_part(base),
        repository=repository,
        subfolder=subfolder,
        folder_name=last_part(str(folder)),
        task=task,
        method=method,
        guidance_scale=guidance_scale,
        steps=call_options.get("num_inference_steps"),
        call_options=_literals(call_options, []),
        kind="lora" if found.kind == "diffusers" else "peft",
        dtype=dtype,
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        sha256=found.sha256(),
        scores=_teacher_scores(content, task) if content else [],
        report=content,
        datasets=dataset_ids,
    )
    _save(card, folder)
    return folder / CARD_FILE


def _render(template: str, data: ModelCardData, **fields: Any) -> ModelCard:
    path = str(files(__package__) / "templates" / template)
    # Names of tasks, rewards, layers and teachers are strangers', and the card is for all to see.
    shows: dict[str, Any] = {function.__name__: _public(function) for function in (inline, cell, code, literal)}
    return ModelCard.from_template(data, template_path=path, versions=_versions(), **shows, **fields)


def _public(show: Callable[..., str]) -> Callable[..., str]:
    return lambda value: show(public_text(value) if isinstance(value, str) else value)


@cache  # it takes some 50 ms, and a card is written with every checkpoint
def _versions() -> dict[str, str]:
    # Ours is not asked for: a checkout that is on the path, and not installed, has no metadata.
    return {"trl-diffusion-opd": __version__, **{name: version(name) for name in _SHOWN_PACKAGES}}


def _save(card: ModelCard, folder: Path) -> None:
    # In one move: an upload in the background may be reading the card.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CARD_FILE}"
    card.save(unfinished)
    os.replace(unfinished, folder / CARD_FILE)


# Metadata


def _card_data(
    name: str,
    base_id: str | None,
    relation: str,
    tags: list[str],
    datasets: list[str],
    results: list[EvalResult],
) -> ModelCardData:
    licence: dict[str, Any] = _base_license(base_id) if base_id else {}
    return ModelCardData(
        base_model=base_id,
        base_model_relation=relation if base_id else None,
        **licence,
        datasets=datasets or None,
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=[shown(tag) for tag in dict.fromkeys(tags)],
        model_name=shown(name) if results else None,
        eval_results=results or None,
    )


def _base_license(base_id: str) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the base's own card has them."""
    try:
        card = hf_api().model_info(base_id, timeout=10).card_data
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return {}
    found = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    named = {name: value for name, value in found.items() if isinstance(value, str)}
    if "license_link" in named and "://" not in named["license_link"]:
        named["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{named['license_link'].lstrip('/')}"
    return named


def student_results(report: Mapping[str, Any], datasets: list[str]) -> list[EvalResult]:
    """The student's score and retention on each task of a retention report, for the `model-index`."""
    results = []
    for task, row in report["tasks"].items():
        results += _result(report, datasets, task, row["reward"], row["reward"], row["student"], None)
        interval = row["ci95"]
        results += _result(
            report, datasets, task, "retention", "Retention of the teacher's gain", row["retention"], interval
        )
    return results


def _teacher_results(report: Mapping[str, Any], task: str, datasets: list[str]) -> list[EvalResult]:
    row = report["tasks"][task]
    return _result(report, datasets, task, row["reward"], row["reward"], row["teacher"], None)


def _result(
    report: Mapping[str, Any],
    datasets: list[str],
    task: str,
    metric: str,
    metric_name: str,
    value: float | None,
    interval: list[float] | None,
) -> list[EvalResult]:
    if value is None:
        return []
    task, metric, metric_name = (shown(public_text(text)) for text in (task, metric, metric_name))
    result = EvalResult(
        task_type=_TASK,
        task_name=f"Text to image: {task}",
        # Held-out prompts are usually files; the Hub wants a name all the same.
        dataset_type=datasets[0] if len(datasets) == 1 else re.sub(r"[^A-Za-z0-9._-]+", "-", task),
        dataset_name=f"held-out prompts of {task}",
        dataset_config=task,
        dataset_args={"num_images": report["num_images"]},
        metric_type=metric,
        metric_name=metric_name,
        metric_value=round(value, 4),
        metric_args={"ci95": [round(bound, 4) for bound in interval]} if interval else None,
        verified=False,
    )
    return [result]


def _teacher_scores(report: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """The teacher beside the base on every task: what it gained, and what it lost elsewhere."""
    own = report.get("scores", {}).get(f"teacher/{task}", {})
    intervals = report.get("scores_ci95", {}).get(f"teacher/{task}", {})
    rows = []
    for other, row in report["tasks"].items():
        reward = row["reward"]
        score = row["teacher"] if other == task else own.get(other, {}).get(reward)
        if score is not None:
            ci95 = intervals.get(other, {}).get(reward)
            rows.append({"task": other, "reward": reward, "base": row["base"], "teacher": score, "ci95": ci95})
    return rows


# Parts of the text


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository on the Hub and is no file or folder here."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _kind(trainer: "DiffusionTrainer") -> str:
    """How the student is loaded: as a LoRA by diffusers, by PEFT where the pipeline has no loader, or as a whole."""
    if not isinstance(trainer.student.model, PeftModel):
        return "full"
    return "lora" if isinstance(trainer._pipeline, LoraBaseMixin) else "peft"


def _call_options(trainer: "DiffusionTrainer") -> dict[str, Any]:
    """The pipeline's arguments for an image as in the evaluation."""
    dataset = trainer.eval_dataset if isinstance(trainer.eval_dataset, Dataset) else trainer.train_dataset
    scale = trainer.args.eval_guidance_scale
    # What the evaluation itself passes: families differ in the name of guidance, its offset and what turns it on.
    options = trainer.eval_field.call_options(
        [dataset[0]["prompt"]], trainer.args.guidance_scale if scale is None else scale
    )
    single = {name: value[0] if isinstance(value, list) else value for name, value in options.items()}
    return {**single, "num_inference_steps": trainer.args.eval_num_inference_steps}


def _literals(options: Mapping[str, Any], secrets: list[str]) -> dict[str, str]:
    """Those of `options` that can be written as Python literals, as such."""
    plain = {name: value for name, value in options.items() if isinstance(value, (str, bool, int, float))}
    # A prompt is no path, even if it looks like one.
    public = {name: value if name == "prompt" else public_value(value, secrets) for name, value in plain.items()}
    return {name: literal(value) for name, value in public.items()}


def _settings(trainer: "DiffusionTrainer") -> dict[str, Any]:
    args, plain = trainer.args, trainer.args.to_dict()  # enums as their values
    transformer: Any = trainer._pipeline.components["transformer"]
    quantized = described(transformer)
    samples = args.per_device_train_batch_size * (args.gradient_accumulation_steps or 1) * args.world_size
    settings = {
        "updates": trainer.state.global_step,
        "prompts an update": f"{samples} ({', '.join(trainer.tasks)} in equal parts)",
        "resolution": f"{args.width} x {args.height}",
        "optimizer": f"{plain['optim']}, betas ({args.adam_beta1}, {args.adam_beta2}), weight decay {args.weight_decay}",
        "learning rate": f"{args.learning_rate}, {plain['lr_scheduler_type']}",
        "gradient clipping": args.max_grad_norm,
        "moving average": average_in_words(args.ema_decay, args.ema_update_interval),
        "precision": f"base {args.dtype}"
        + (f", its weights quantised ({quantized})" if quantized else "")
        + (", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""),
        "seed": args.seed,
    }
    model = trainer.student.model
    if isinstance(model, PeftModel):
        config = model.peft_config[STUDENT_ADAPTER]
        targets = config.target_modules
        layers = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        settings["LoRA"] = f"rank {config.r}, alpha {config.lora_alpha}, on {layers}"
    settings["hardware"] = _hardware(args.device, args.world_size)
    seconds = training_seconds(trainer.state.log_history)
    if seconds is not None:
        settings["training time"] = f"{_duration(seconds)}, without evaluation and saving"
    return settings


def _hardware(device: torch.device, processes: int) -> str:
    if device.type in ("cuda", "xpu"):
        return f"{processes} x {torch.get_device_module(device).get_device_name(device)}"
    name = device.type.upper()
    return name if processes == 1 else f"{name}, {processes} processes"


def training_seconds(log_history: list[dict[str, float]]) -> float | None:
    """
    Time of all updates that the logs tell of, also over resumes: each log has the mean time of an update since the last.
    """
    seconds, last = 0.0, 0
    for entry in log_history:
        if "step_time" in entry:
            seconds += entry["step_time"] * (entry["step"] - last)
            last = int(entry["step"])
    return seconds if last else None


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
