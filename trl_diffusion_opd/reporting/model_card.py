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


"""Collects what a student's model card says about its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import nn
from transformers import TrainerState

from ..acceleration.quantization import described
from ..guards.redaction import known_tokens, public_name, public_text
from ..models.average import average_in_words
from ..models.student import STUDENT_ADAPTER
from ..models.teachers import Manifest
from ..pipelines.denoiser import denoiser, denoiser_name, loads_lora
from ..pipelines.experts import has_experts
from ..pipelines.frames import number_of_frames
from ..pipelines.images import draws_videos
from .cards import as_list, framework_versions, hub_id, is_tiny, literals
from .progress import duration
from .student_card import Content, render_student_card


# Arguments that the card shows as they are.
_SHOWN_ARGUMENTS = ("sampler", "guidance_scale", "num_inference_steps", "eval_num_inference_steps", "dtype")


class MethodFacts(TypedDict, total=False):
    """The fields of [`CardFacts`] that a method fills in."""

    method: str
    teachers: Manifest
    settings: dict[str, str]
    no_walk: bool
    steps_drawn: bool


@dataclass(frozen=True)
class CardFacts:
    """
    The facts in a student's card that are not read from its folder.

    Attributes:
        trainer_name (`str`), paper (`dict`): name and paper of the method, in the form of TRL's trainers.
        tags (`list[str]`): tags of the method.
        args ([`~transformers.TrainingArguments`]), state ([`~transformers.TrainerState`])
        pipeline ([`~diffusers.DiffusionPipeline`]): the base.
        model (`nn.Module`): the student, a PeftModel or the whole denoiser.
        tasks (`list[str]`): the tasks, in order.
        repository (`str`, *optional*): Hub id where the student is or will be.
        call_options (`dict`): arguments of the pipeline for an image as in the evaluation.
        examples (`dict[str, str]`): what the student reads of a prompt of each task.
        templates (`dict[str, str]`): the text that the student reads in a task, with `{prompt}` in the prompt's place.
        changes (`list[dict]`): settings that resumes have changed.
        method (`str`, *optional*): a sentence on how the student learned.
        teachers (`dict`): teachers of each task, as the manifest lists them.
        settings (`dict`): further settings of the method, for the table.
        no_walk (`bool`): whether the method trains without a sampler.
        steps_drawn (`bool`): whether each update trains other steps of the walk, so that its curves jump.
        checkpoint (`str`, *optional*): the folder of the checkpoint that the card is of, while the training goes on.
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
    examples: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    changes: Sequence[Mapping[str, object]] = ()
    method: str | None = None
    teachers: Manifest = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    no_walk: bool = False
    steps_drawn: bool = False
    checkpoint: str | None = None


def write_model_card(
    folder: str | Path,
    facts: CardFacts,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """
    Writes the model card `README.md` of a student into its folder, and what it is rendered from, so that
    [`~student_card.rewrite_card`] can render it again for another repository.

    If the folder has the student's report `retention.json` and its pictures, the card shows them. The licence is copied from the
    base's card on the Hub; if that can't be read, the card names none.

    Args:
        folder (`str` or `Path`): the output folder.
        facts ([`CardFacts`]): the card's other content.
        model_name (`str`, *optional*): the title. By default, the name of the repository or of the output folder.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data. Local paths are left out.
        tags (`str` or `list[str]`, *optional*): tags besides the method's own.
    """
    folder, args = Path(folder), facts.args
    is_lora = isinstance(facts.model, PeftModel)
    base = facts.pipeline.config.get("_name_or_path")
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    content: Content = {
        "model_name": model_name,
        "base_id": args.hub_base_model or hub_id(base),
        "base_name": public_name(base) or "base",
        "is_tiny": is_tiny(base) and args.hub_base_model is None,
        "load_options": {name: str(options[name]) for name in ("revision", "variant") if options.get(name)},
        "kind": _kind(facts),
        "is_video": draws_videos(facts.pipeline),
        "films": number_of_frames(facts.pipeline, facts.call_options) != 1,
        "denoiser": denoiser_name(facts.pipeline),
        "denoiser_class": type(denoiser(facts.pipeline)).__name__,
        "tags": [*facts.tags, *(["lora"] if is_lora else []), *as_list(tags)],
        "datasets": [name for name in as_list(dataset_name) if hub_id(name)],
        "facts": {
            "trainer_name": facts.trainer_name,
            "paper": {**facts.paper},
            "method": facts.method,
            "teachers": facts.teachers,
            "changes": [{**change} for change in facts.changes],
            "no_walk": facts.no_walk,
            "steps_drawn": facts.steps_drawn,
        },
        "args": {name: args.to_dict()[name] for name in _SHOWN_ARGUMENTS}
        | {"evaluation_guidance": args.evaluation_guidance},
        "call_options": literals(facts.call_options, known_tokens(args)),
        "examples": {task: public_text(prompt, known_tokens(args)) for task, prompt in facts.examples.items()},
        "templates": {task: public_text(text, known_tokens(args)) for task, text in facts.templates.items()},
        "settings": {name: str(value) for name, value in (_settings(facts) | {**facts.settings}).items()},
        "versions": framework_versions(),
        "checkpoint": facts.checkpoint,
    }
    render_student_card(folder, content, facts.repository)


def _kind(facts: CardFacts) -> Literal["lora", "pair", "peft", "full"]:
    """
    How the student is loaded: `"lora"` by diffusers, `"pair"` by diffusers into two experts, `"peft"` if the pipeline
    cannot load LoRAs, or `"full"` for a whole network.
    """
    if not isinstance(facts.model, PeftModel):
        return "full"
    if not loads_lora(facts.pipeline):
        return "peft"
    return "pair" if has_experts(facts.pipeline) else "lora"


def _settings(facts: CardFacts) -> dict[str, object]:
    args, plain = facts.args, facts.args.to_dict()  # enums as their values
    quantized = described(denoiser(facts.pipeline))
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
        settings["training time"] = f"{duration(seconds)}, without evaluation and saving"
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
