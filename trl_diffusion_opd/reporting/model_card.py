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


"""Writes the model card of a student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import EvalResult
from peft import PeftModel
from torch import nn
from transformers import TrainerState

from ..acceleration.quantization import described
from ..guards.files import read_json
from ..guards.redaction import known_tokens, last_part, public_name
from ..hub.files import CURVES_PICTURE, RADAR_PICTURE, REPORT_FILE, RETENTION_PICTURE, SAMPLES_PICTURE
from ..models.average import average_in_words
from ..models.student import STUDENT_ADAPTER
from ..models.teachers import Manifest
from .cards import as_list, card_data, hub_id, literals, render, results_of, save
from .report import Report


# The pictures of the card and their captions, in the card's order.
_PICTURES = {
    SAMPLES_PICTURE: "The same prompts and noise: base, teacher, student",
    RETENTION_PICTURE: "Score of the base, the teachers and this student on each task",
    RADAR_PICTURE: "All rewards of base, teachers and student",
    CURVES_PICTURE: "Training curves",
}


class MethodFacts(TypedDict, total=False):
    """The fields of [`CardFacts`] that a method fills in."""

    method: str
    teachers: Manifest
    settings: dict[str, str]
    no_walk: bool


@dataclass(frozen=True)
class CardFacts:
    """
    The facts in a student's card that are not read from its folder.

    Attributes:
        trainer_name (`str`), paper (`dict`): name and paper of the method, in the form of TRL's trainers.
        tags (`list[str]`): tags of the method.
        args ([`~transformers.TrainingArguments`]), state ([`~transformers.TrainerState`])
        pipeline ([`~diffusers.DiffusionPipeline`]): the base.
        model (`nn.Module`): the student, a PeftModel or the transformer.
        tasks (`list[str]`): the tasks, in order.
        repository (`str`, *optional*): Hub id where the student is or will be.
        call_options (`dict`): arguments of the pipeline for an image as in the evaluation.
        changes (`list[dict]`): settings that resumes have changed.
        method (`str`, *optional*): a sentence on how the student learned.
        teachers (`dict`): teachers of each task, as the manifest lists them.
        settings (`dict`): further settings of the method, for the table.
        no_walk (`bool`): whether the method trains without a sampler.
    """

    trainer_name: str
    paper: Mapping[str, str]
    tags: Sequence[str]
    args: Any
    state: TrainerState
    pipeline: DiffusionPipeline
    model: nn.Module
    tasks: Sequence[str]
    repository: str | None
    call_options: Mapping[str, object]
    changes: Sequence[Mapping[str, object]] = ()
    method: str | None = None
    teachers: Manifest = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    no_walk: bool = False


def write_model_card(
    folder: str | Path,
    facts: CardFacts,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """
    Writes the model card `README.md` of a student into its folder.

    If the folder has the report `retention.json` and its pictures, the card shows them. The licence is copied from the
    base's card on the Hub; if that can't be read, the card names none.

    Args:
        folder (`str` or `Path`): the output folder.
        facts ([`CardFacts`]): the card's other content.
        model_name (`str`, *optional*): the title. By default, the name of the repository or of the output folder.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data. Local paths are left out.
        tags (`str` or `list[str]`, *optional*): tags besides the method's own.
    """
    folder, args, repository = Path(folder), facts.args, facts.repository
    is_lora = isinstance(facts.model, PeftModel)
    base = facts.pipeline.config.get("_name_or_path")
    base_id = hub_id(base)
    datasets = [name for name in as_list(dataset_name) if hub_id(name)]
    name = model_name or (repository or last_part(str(folder))).split("/")[-1]
    report = read_json(folder / REPORT_FILE)
    data = card_data(
        name,
        base_id,
        relation="adapter" if is_lora else "finetune",
        tags=[*facts.tags, *(["lora"] if is_lora else []), *as_list(tags)],
        datasets=datasets,
        results=student_results(report, datasets) if report else [],
    )
    card = render(
        "model_card.md",
        data,
        model_name=name,
        base_id=base_id,
        base_name=public_name(base) or "base",
        repository=repository,
        folder_name=last_part(str(folder)),
        facts=facts,
        args=args,
        eval_guidance_scale=args.evaluation_guidance,
        call_options=literals(facts.call_options, known_tokens(args)),
        kind=_kind(facts),
        transformer_class=type(facts.pipeline.components["transformer"]).__name__,
        settings=_settings(facts) | {**facts.settings},
        report=report,
        pictures={picture: text for picture, text in _PICTURES.items() if (folder / picture).exists()},
        datasets=datasets,
    )
    save(card, folder)


def student_results(report: Report, datasets: list[str]) -> list[EvalResult]:
    """The student's score and retention on each task of a report, as results for the `model-index`."""
    results = []
    for task, row in report["tasks"].items():
        results += results_of(report, datasets, task, row["reward"], row["reward"], row["student"], None)
        interval = row["ci95"]
        results += results_of(
            report, datasets, task, "retention", "Retention of the teacher's gain", row["retention"], interval
        )
    return results


def _kind(facts: CardFacts) -> str:
    """
    How the student is loaded: `"lora"` by diffusers, `"peft"` if the pipeline cannot load LoRAs, or `"full"` for a
    whole transformer.
    """
    if not isinstance(facts.model, PeftModel):
        return "full"
    return "lora" if isinstance(facts.pipeline, LoraBaseMixin) else "peft"


def _settings(facts: CardFacts) -> dict[str, object]:
    args, plain = facts.args, facts.args.to_dict()  # enums as their values
    transformer = facts.pipeline.components["transformer"]
    quantized = described(transformer)
    samples = args.per_device_train_batch_size * (args.gradient_accumulation_steps or 1) * args.world_size
    settings: dict[str, object] = {
        "updates": facts.state.global_step,
        "prompts an update": f"{samples} ({', '.join(facts.tasks)} in equal parts)",
        "resolution": f"{args.width} x {args.height}",
        "optimizer": f"{plain['optim']}, betas ({args.adam_beta1}, {args.adam_beta2}), weight decay {args.weight_decay}",
        "learning rate": f"{args.learning_rate}, {plain['lr_scheduler_type']}",
        "gradient clipping": args.max_grad_norm,
        "moving average": average_in_words(args.ema_decay, args.ema_update_interval),
        "precision": f"base {args.dtype}"
        + (f", its weights quantized ({quantized})" if quantized else "")
        + (", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""),
        "seed": args.seed,
    }
    model = facts.model
    if isinstance(model, PeftModel):
        config = model.peft_config[STUDENT_ADAPTER]
        targets = config.target_modules
        layers = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        settings["LoRA"] = f"rank {config.r}, alpha {config.lora_alpha}, on {layers}"
    settings["hardware"] = _hardware(args.device, args.world_size)
    seconds = training_seconds(facts.state.log_history)
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
    The time of all logged updates, also across resumes. Each log entry has the mean time of an update since the entry
    before.
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
