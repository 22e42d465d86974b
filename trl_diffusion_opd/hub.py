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
"""What a run shows to others: its arguments, its model card, and what of its output folder goes to the Hub."""

import glob
import json
import logging
import os
import shutil
from concurrent.futures import Future
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from .student import STUDENT_ADAPTER, public_name


if TYPE_CHECKING:
    from .trainer.base_trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "training_args.json"
CARD_FILE = "README.md"
REPORT_FILE = "retention.json"

# What a saved student consists of, which a checkpoint has as well.
STUDENT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    ARGUMENTS_FILE,
    "teacher_manifest.json",
    "noise_grid.json",
)
# Everything that is pushed. Not by exclusion: logs, optimizer states and whatever else lies in the folder may hold
# tokens, paths and the name of the machine.
PUSHED_FILES = (*STUDENT_FILES, CARD_FILE, REPORT_FILE, "*.png", "completions/*.png")

# In the order in which a reader meets them.
_PICTURES = {
    "retention.png": "Score of the base, the teachers and this student on each task",
    "samples.png": "The same prompts and noise: base, teacher, student",
    "curves.png": "Training curves",
}
_SHOWN_PACKAGES = ("trl-diffusion-opd", "trl", "diffusers", "peft", "transformers", "torch", "datasets")
# They are paths even where they look like a Hub id: "outputs/demo".
_PATH_ARGUMENTS = ("output_dir", "logging_dir", "resume_from_checkpoint", "deepspeed", "fsdp_config")


def write_arguments(args: Any, folder: str | Path) -> None:
    """
    Writes `training_args.json`: the arguments without tokens, and with local paths reduced to their last part.

    Args:
        args ([`~transformers.TrainingArguments`])
        folder (`str` or `Path`): an existing folder.
    """
    content = json.dumps(public_arguments(args), indent=2, sort_keys=True)
    (Path(folder) / ARGUMENTS_FILE).write_text(content + "\n", encoding="utf-8")


def public_arguments(args: Any) -> dict[str, Any]:
    """The arguments as JSON values, without tokens, and with local paths reduced to their last part."""
    arguments = args.to_dict()
    for name in _PATH_ARGUMENTS:
        if isinstance(arguments.get(name), str):
            arguments[name] = _last_part(arguments[name])
    return _public(arguments)


def _public(value: Any) -> Any:
    """A JSON value that says the same without secrets and local paths."""
    if isinstance(value, dict):
        return {str(name): _public(entry) for name, entry in value.items() if not _is_secret(str(name))}
    if isinstance(value, (list, tuple)):
        return [_public(entry) for entry in value]
    if isinstance(value, str):
        is_path = os.path.isabs(value) or value.startswith(("~", "./", "../")) or os.path.isdir(value)
        return _last_part(value) if is_path else value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _is_secret(name: str) -> bool:
    return name.lower().endswith(("token", "api_key", "password", "secret"))


def _last_part(path: str) -> str:
    return Path(path).expanduser().absolute().name


def write_model_card(
    trainer: "DiffusionTrainer",
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """
    Writes the model card `README.md` into the output folder. It needs no network.

    It shows the report `retention.json` and the pictures `retention.png`, `samples.png` and `curves.png`, if the folder has
    them, and what the trainer's `_card_fields` says of its method.

    Args:
        trainer ([`DiffusionTrainer`])
        model_name (`str`, *optional*): the title, by default the name of the repository or the output folder.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data. Local paths are left out.
        tags (`str` or `list[str]`, *optional*): tags besides the method's own.
    """
    folder = Path(trainer.args.output_dir or ".")
    is_lora = isinstance(trainer.student.model, PeftModel)
    base = trainer._pipeline.config.get("_name_or_path")
    base_id = _hub_id(base)
    datasets = [name for name in _list(dataset_name) if _hub_id(name)]
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=("adapter" if is_lora else "finetune") if base_id else None,
        datasets=datasets or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys([*trainer._tag_names, *(["lora"] if is_lora else []), *_list(tags)])),
    )
    repository = trainer.hub_model_id or trainer.args.hub_model_id
    report = folder / REPORT_FILE
    scale = trainer.args.eval_guidance_scale
    card = ModelCard.from_template(
        data,
        template_path=str(files(__package__) / "templates" / "model_card.md"),
        model_name=model_name or (repository or _last_part(str(folder))).split("/")[-1],
        base_id=base_id,
        base_name=public_name(base) or "base",
        repository=repository,
        folder_name=_last_part(str(folder)),
        trainer_name=trainer._name,
        paper=trainer._paper,
        fields=trainer._card_fields(),
        args=trainer.args,
        eval_guidance_scale=trainer.args.guidance_scale if scale is None else scale,
        call_options=_call_options(trainer),
        kind=_kind(trainer),
        transformer_class=type(trainer._pipeline.transformer).__name__,
        settings=_settings(trainer),
        report=json.loads(report.read_text(encoding="utf-8")) if report.exists() else None,
        pictures={name: text for name, text in _PICTURES.items() if (folder / name).exists()},
        datasets=datasets,
        versions={name: version(name) for name in _SHOWN_PACKAGES},
    )
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / CARD_FILE)


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


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


def _call_options(trainer: "DiffusionTrainer") -> dict[str, str]:
    """The pipeline's arguments for an image as in the evaluation, as Python literals."""
    dataset = trainer.eval_dataset if isinstance(trainer.eval_dataset, Dataset) else trainer.train_dataset
    scale = trainer.args.eval_guidance_scale
    # What the evaluation itself passes: families differ in the name of guidance, its offset and what turns it on.
    options = trainer.eval_field._call_options(
        [dataset[0]["prompt"]], trainer.args.guidance_scale if scale is None else scale
    )
    literals = {name: value[0] if isinstance(value, list) else value for name, value in options.items()}
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        for name, value in {**literals, "num_inference_steps": trainer.args.eval_num_inference_steps}.items()
        if isinstance(value, (str, bool, int, float))
    }


def _settings(trainer: "DiffusionTrainer") -> dict[str, Any]:
    args, plain = trainer.args, trainer.args.to_dict()  # enums as their values
    samples = args.per_device_train_batch_size * (args.gradient_accumulation_steps or 1) * args.world_size
    settings = {
        "updates": trainer.state.global_step,
        "prompts an update": f"{samples} ({', '.join(trainer.tasks)} in equal parts)",
        "resolution": f"{args.width} x {args.height}",
        "optimizer": f"{plain['optim']}, betas ({args.adam_beta1}, {args.adam_beta2}), weight decay {args.weight_decay}",
        "learning rate": f"{args.learning_rate}, {plain['lr_scheduler_type']}",
        "gradient clipping": args.max_grad_norm,
        "moving average": f"{args.ema_decay} every {args.ema_update_interval} updates" if args.ema_decay else "none",
        "precision": f"base {args.dtype}"
        + (", bf16 autocast" if args.bf16 else ", fp16 autocast" if args.fp16 else ""),
        "seed": args.seed,
    }
    model = trainer.student.model
    if isinstance(model, PeftModel):
        config = model.peft_config[STUDENT_ADAPTER]
        targets = config.target_modules
        shown = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        settings["LoRA"] = f"rank {config.r}, alpha {config.lora_alpha}, on {shown}"
    return settings


def push(
    trainer: "DiffusionTrainer",
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> Any:
    """
    Saves the student with its card and uploads what of the output folder [`PUSHED_FILES`] names.

    Call it on all processes.

    Args:
        trainer ([`DiffusionTrainer`])
        commit_message (`str`, *optional*, defaults to `"End of training"`)
        blocking (`bool`, *optional*, defaults to `True`): whether to return only when the upload is done.
        token (`str`, *optional*): with write permission, by default `hub_token` of the arguments.
        revision (`str`, *optional*): branch to commit to, by default `hub_revision` of the arguments.
        private (`bool`, *optional*): whether a repository that is made is private, by default `hub_private_repo`.
        kwargs: passed to `create_model_card`.

    Returns:
        The [`~huggingface_hub.CommitInfo`], or with `blocking=False` a future of it; `None` on other processes.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    token = trainer.args.hub_token if token is None else token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**kwargs)
    trainer._finish_current_push()
    return _upload(trainer, commit_message, token, revision or trainer.args.hub_revision, run_as_future=not blocking)


def push_checkpoint(trainer: "DiffusionTrainer", checkpoint_folder: str | Path) -> None:
    """
    Uploads the student of a checkpoint in the background, as `hub_strategy` says.

    `"end"` uploads nothing here and `"every_save"` the student. `"checkpoint"` adds the whole checkpoint, with its
    optimizer state, as `last-checkpoint`, and `"all_checkpoints"` under its own name. While an upload is under way the next
    one is left out, unless `hub_always_push` is set.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    under_way = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if under_way and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    # A copy, because saving again would gather sharded weights from all processes.
    for path in _matching(Path(checkpoint_folder), STUDENT_FILES):
        shutil.copy(path, Path(args.output_dir or ".") / path.name)
    if args.save_strategy == SaveStrategy.EPOCH:
        message = f"Training in progress, epoch {int(trainer.state.epoch or 0)}"
    else:
        message = f"Training in progress, step {trainer.state.global_step}"
    jobs = [_upload(trainer, message, args.hub_token, args.hub_revision, run_as_future=True)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        is_last = args.hub_strategy == HubStrategy.CHECKPOINT
        jobs.append(
            hf_api().upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                token=args.hub_token,
                revision=args.hub_revision,
                run_as_future=True,
            )
        )
    for job in jobs:
        job.add_done_callback(_report_failure)
    if under_way:
        trainer.push_in_progress.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)


def _upload(
    trainer: "DiffusionTrainer", message: str | None, token: str | None, revision: str | None, run_as_future: bool
) -> Any:
    folder = Path(trainer.args.output_dir or ".")
    names = [path.relative_to(folder).as_posix() for path in _matching(folder, PUSHED_FILES)]
    return hf_api().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        # By name: in the Hub's patterns a star also matches slashes, and "*.png" whatever lies in a subfolder.
        allow_patterns=[glob.escape(name) for name in names],
        commit_message=message,
        token=token,
        revision=revision,
        run_as_future=run_as_future,
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _report_failure(job: "Future[Any]") -> None:
    # Nobody asks these futures for their result: without this a student would silently not be there.
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(f"A push to the Hub failed; training goes on, and its files are intact: {error}")
