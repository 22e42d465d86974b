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

"""Compares a run's settings with those of the checkpoint it resumes from, and says which changes are refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import xxhash
from accelerate.scheduler import AcceleratedScheduler
from datasets import Dataset
from peft import LoraConfig
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments

from ..data.readers import has_teacher_prompts, read_columns
from ..data.source_images import SOURCE_IMAGES, pictures_digest
from ..guards.files import JSON, read_json
from ..guards.redaction import public_arguments, shown
from ..hub.files import ADAPTER_CONFIG_FILE, ARGUMENTS_FILE, CHANGES_FILE, EVALUATION_SETTINGS_FILE, PROMPTS_FILE


# Fields of a LoRA's config that give its saved matrices their meaning.
_OF_THE_LORA = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

# What the name of a changed setting of the evaluation begins with
_OF_THE_EVALUATION = "evaluation: "
# Arguments that change the images of an evaluation too
_OF_ITS_IMAGES = ("seed", "height", "width", "max_sequence_length", "generation_kwargs", "prompt_templates")

# Entries of an optimizer's parameter group that training arguments set, besides the learning rate.
_OF_A_GROUP = ("weight_decay", "betas", "eps")
_OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

# Arguments that do not change what a run learns: where it writes, what it shows, the machine it is on.
_WITHOUT_MEANING = (
    ("output_dir", "run_name", "project", "resume_from_checkpoint", "local_rank", "disable_tqdm", "debug")
    + (
        "report_to",
        "prediction_loss_only",
        "do_train",
        "do_eval",
        "do_predict",
        "prompt_cache_dir",
        "prompt_cache_max_size",
    )
    + ("log_completions", "num_completions_to_print", "num_eval_images", "metric_for_best_model", "greater_is_better")
    + ("reward_timeout", "skip_memory_metrics", "restore_callback_states_from_checkpoint", "load_best_model_at_end")
)
_FAMILIES_WITHOUT_MEANING = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "ddp_",
    "trackio_",
)


PromptsDigest = dict[str, dict[str, int | str]]  # by task, how many there are and their hash
Schedule: TypeAlias = LRScheduler | AcceleratedScheduler


@dataclass(frozen=True)
class Change:
    """
    A setting that differs from the checkpoint's.

    Attributes:
        name (`str`), then, now: JSON values.
        refusal (`str`, *optional*): why the run can't go on with it.
    """

    name: str
    then: object
    now: object
    refusal: str | None = None

    def row(self) -> tuple[str, str, str]:
        return self.name, _short(self.then), _short(self.now)


def changes_since(
    folder: Path,
    args: TrainingArguments,
    lora: LoraConfig | None,
    prompts: PromptsDigest,
    evaluation: Mapping[str, object],
) -> list[Change]:
    """
    Lists what has changed since a checkpoint was saved: arguments, the student's LoRA, the prompts, the evaluation.

    Args:
        folder (`Path`), args ([`~transformers.TrainingArguments`]): the checkpoint, and this run's arguments.
        lora ([`~peft.LoraConfig`], *optional*): the student's config, if the student is a LoRA.
        prompts (`dict`): as [`prompts_of`] returns it.
        evaluation (`dict`): the settings of evaluations by name, ready for JSON.
    """
    of_lora = [] if lora is None else lora_changes(folder, lora)
    changes = argument_changes(folder, args) + of_lora + prompt_changes(folder, prompts)
    return changes + evaluation_changes(folder, evaluation)


def argument_changes(folder: Path, args: TrainingArguments) -> list[Change]:
    """Lists the arguments that have changed since the checkpoint was saved."""
    then: dict[str, JSON] = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    now: dict[str, JSON] = json.loads(json.dumps(public_arguments(args)))
    changes = []
    for name in sorted(then.keys() & now.keys()):
        if then[name] == now[name] or name in _WITHOUT_MEANING or name.startswith(_FAMILIES_WITHOUT_MEANING):
            continue
        refusal = None
        if name == "optim":
            refusal = "another optimizer cannot use the saved state. Name a saved LoRA as student_init to begin anew with its weights."
        elif name in _OF_THE_OPTIMIZER and args.deepspeed is not None:
            refusal = "DeepSpeed goes on with the optimizer that it has saved."
        elif name == "learning_rate" and now["lr_scheduler_type"] == "reduce_lr_on_plateau":
            refusal = "lr_scheduler_type='reduce_lr_on_plateau' goes on with the rate that it has found."
        changes.append(Change(name, then[name], now[name], refusal))
    return changes


def lora_changes(folder: Path, config: LoraConfig) -> list[Change]:
    """Lists what has changed in the student's LoRA config since the checkpoint was saved."""
    then = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps({name: getattr(config, name) for name in _OF_THE_LORA}))
    refusal = (
        "the saved matrices would have another effect. Resume with the peft_config that the run was started with."
    )
    return [
        Change(f"peft_config.{name}", then[name], now[name], refusal)
        for name in _OF_THE_LORA
        if then.get(name) != now[name]
    ]


def prompts_of(dataset: Dataset, rows: Mapping[str, np.ndarray]) -> PromptsDigest:
    """
    Returns the number of prompts of each task, and a hash of them in their order, with what teachers read.

    Args:
        dataset ([`~datasets.Dataset`])
        rows (`dict[str, np.ndarray]`): the rows of each task.
    """
    found: PromptsDigest = {}
    for task, numbers in rows.items():
        digest = xxhash.xxh3_64()
        for name in read_columns(dataset):
            if name == SOURCE_IMAGES:
                digest.update(pictures_digest(dataset, numbers).encode())
            elif name == "prompt" or has_teacher_prompts(dataset, numbers):
                for batch in dataset.select(numbers).select_columns([name]).iter(10_000):
                    digest.update("\0".join(text or "" for text in batch[name]).encode())
        found[task] = {"prompts": len(numbers), "hash": digest.hexdigest()}
    return found


def prompt_changes(folder: Path, now: PromptsDigest) -> list[Change]:
    """Lists the tasks whose prompts have changed since the checkpoint was saved."""
    then = json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    return [
        Change(f"prompts of {task}", counted(then.get(task)), counted(now.get(task)))
        for task in sorted(then.keys() | now.keys())
        if then.get(task) != now.get(task)
    ]


def counted(digest: Mapping[str, int | str] | None) -> str | None:
    """A number of prompts with their hash: other prompts may be as many."""
    return None if digest is None else f"{digest['prompts']:,} (hash {str(digest['hash'])[:6]})"


def evaluation_changes(folder: Path, now: Mapping[str, object]) -> list[Change]:
    """Lists the settings of evaluations that have changed since the checkpoint was saved."""
    then: dict[str, JSON] = read_json(folder / EVALUATION_SETTINGS_FILE) or {}
    return [
        Change(f"{_OF_THE_EVALUATION}{name}", then.get(name), now.get(name))
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def comparable_after(changes: Sequence[Mapping[str, object]]) -> int:
    """
    Returns the update after which all evaluations of a run can be compared: the last at which a resume has changed what
    they measure. -1 if none has.

    Args:
        changes (`list[dict]`): as [`record`] returns them.
    """
    found = [-1]
    for change in changes:
        name, after = change["name"], change["after"]
        assert isinstance(name, str) and isinstance(after, int)
        if name.startswith(_OF_THE_EVALUATION) or name in _OF_ITS_IMAGES:
            found.append(after)
    return max(found)


def recorded(folder: Path) -> list[dict[str, object]]:
    """Reads the changes that earlier resumes had made when the checkpoint was saved."""
    return read_json(folder / CHANGES_FILE) or []


def record(changes: Sequence[Change], update: int) -> list[dict[str, object]]:
    """Describes the changes of a resume after `update`, in the form in which checkpoints store them."""
    return [{"after": update, **{k: v for k, v in asdict(one).items() if k != "refusal"}} for one in changes]


class KeptSettings:
    """
    Keeps the settings of an optimizer and its schedule while their saved state is loaded.

    Loading replaces them by the checkpoint's, so a new learning rate or weight decay would have no effect.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        # Not the whole group: some optimizers keep state in it.
        self.groups = [{k: group[k] for k in _OF_A_GROUP if k in group} for group in optimizer.param_groups]
        own = _unwrapped(schedule)
        self.base_rates = list(own.base_lrs) if isinstance(own, LambdaLR) else None

    def restore(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        """Restores the kept settings. A changed learning rate is passed through the schedule at its current step."""
        for group, kept in zip(optimizer.param_groups, self.groups, strict=True):
            group |= kept
        own = _unwrapped(schedule)
        if isinstance(own, LambdaLR) and self.base_rates is not None and own.base_lrs != self.base_rates:
            rates = [
                base * factor(own.last_epoch) for base, factor in zip(self.base_rates, own.lr_lambdas, strict=True)
            ]
            for group, base, rate in zip(optimizer.param_groups, self.base_rates, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate
            own.load_state_dict(own.state_dict() | {"base_lrs": list(self.base_rates), "_last_lr": rates})


def _short(value: object) -> str:
    return "–" if value is None else shown(value, 40)


def _unwrapped(schedule: Schedule) -> LRScheduler:
    return schedule.scheduler if isinstance(schedule, AcceleratedScheduler) else schedule
