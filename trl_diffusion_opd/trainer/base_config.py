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

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from datasets.utils.py_utils import convert_file_size_to_int
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available
from trl.trainer.base_config import _BaseConfig

from ..acceleration.processes import world_problems
from ..algorithms.samplers import SAMPLERS, checked_noise_level
from ..data.readers import Readers
from ..guards.files import JSON
from ..guards.finite import infinite_options
from ..guards.log_lines import without_lines
from ..hub.names import repository_id_problem
from ..models.average import FOLLOWING
from ..pipelines.loading_options import DTYPES, dtype_name, full_dtype, model_init_problems
from ..problems import Problems
from ..rewards.scoring import timeout_problems
from .option_checks import idle_options, step_problems, tracker_problems, unknown_option


# The value of `student_init` that starts from the mean of the teachers' LoRAs.
MERGE = "merge"


@dataclass
class DiffusionConfig(_BaseConfig):
    r"""
    Parameters shared by all trainers of this package. Not used directly.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`str` or `dict`, *optional*):
            Keyword arguments for [`~diffusers.DiffusionPipeline.from_pretrained`], such as `revision` and `variant`,
            used when `model` is a string. The retention report loads the base with them too. A `dtype` in them sets
            `dtype`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the base model's weights: `"float32"`, `"bfloat16"` or `"float16"`. `"bfloat16"` halves the memory
            of the base. A LoRA stays float32.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Whether to keep text encoders and VAE in host memory, to save device memory. The encoders are moved to the
            device to encode the prompts of a round, and encoders and VAE to draw images.
        attention_backend (`str`, *optional*):
            diffusers' attention backend for the transformers, such as `"flash"`, `"_native_cudnn"` or `"flex"`. It is
            tried on one forward, and refused if it has no effect, cannot run or passes no gradient. `None` keeps the
            current backend.
        prompt_cache_dir (`str`, *optional*):
            Folder that keeps the prompts' embeddings across runs, in memory-mapped Arrow files. Set it if encoding
            takes long or you start several runs. `None` keeps up to 2 GiB of embeddings in memory.
        prompt_cache_max_size (`str`, *optional*, defaults to `"50GB"`):
            Maximum total size of `prompt_cache_dir`. Once it is full, further prompts are encoded again in every run.

        > Parameters that control the rollout

        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps of a training rollout. The pipeline's own scheduler sets their noise levels.
        sampler (`str`, *optional*, defaults to `"ode"`):
            Sampler of the training rollout: `"ode"`, `"flow_sde"`, `"dance_sde"`, `"cps"`, `"ddim"` or `"dpm2m"`.
        noise_level (`float`, *optional*):
            How much noise a stochastic sampler adds at each step (`eta`). `None` is 0.7. Refused with `"ode"` and
            `"dpm2m"`, which add none.
        guidance_scale (`float`, *optional*):
            Scale of classifier-free guidance; 1.0 is no guidance. For pipelines with a `true_cfg_scale`, this sets it.
            `None` is the default of the pipeline's own `__call__`; the trainer then sets the number.
        height (`int`, *optional*, defaults to `512`), width (`int`, *optional*, defaults to `512`):
            Size of the images in pixels.
        max_sequence_length (`int`, *optional*):
            Length of the encoded prompts in tokens. `None` is the pipeline's default.
        generation_kwargs (`str` or `dict`, *optional*):
            Further arguments of the pipeline's `__call__`.

        > Parameters that control the tasks

        source_images_column (`str`, *optional*, defaults to `"source_images"`):
            Column of the dataset with the pictures that a prompt is about, for pipelines that edit: in each row a list
            of 0 to n pictures (`datasets.Image`, names of files, or bytes). Rewards get it as `source_images`.
        task_column (`str`, *optional*, defaults to `"task"`):
            Column of the dataset that names each prompt's task. Not needed if there is only one task.
        task_weights (`str` or `dict`, *optional*):
            Weights of the tasks' losses; 1 for tasks not named. They don't change how often a task is sampled.
        gradient_accumulation_steps (`int`, *optional*):
            Micro-batches in an update. Every task has an equal part of each update, so it must be a multiple of the
            number of tasks. `None` is the number of tasks. Raise it for a larger batch without more memory.

        > Parameters that control the student

        student_init (`str`, *optional*):
            A LoRA to start from: a folder, or `owner/repo[/sub/folder][@revision]`. Or `"merge"`: average the
            teachers' weight updates, and start from the best approximation of the average that has the rank of
            `peft_config`.
        ema_decay (`float` or `str`, *optional*, defaults to `"auto"`):
            Decay of the moving average of the weights. The average is what is evaluated and saved. `"auto"` adapts it
            to the run: the averaged weights have a mean age of 0.5% of the updates so far. A number is a fixed decay;
            the paper uses 0.9 with `ema_update_interval=8`. `None` or 0 keeps no average.
        ema_update_interval (`int`, *optional*, defaults to `1`):
            The average takes a step every so many updates.

        > Parameters that control the evaluation

        eval_num_inference_steps (`int`, *optional*, defaults to `40`):
            Denoising steps of an image in an evaluation, which uses the deterministic sampler.
        eval_guidance_scale (`float`, *optional*):
            Guidance scale of an evaluation. `None` is `guidance_scale`.
        num_eval_images (`int`, *optional*):
            Images of each task in an evaluation, spread over its prompts. `None` is one for each prompt.
        eval_base_and_teachers (`bool`, *optional*, defaults to `True`):
            Whether the first evaluation also scores the base and each task's teachers, on the same prompts and noise.
            They are shown beside the student's rewards, and `eval_reward` is then the share of the teachers' gain that
            the student has. It takes as long as two more evaluations, once. Without rewards nothing is done.
        reward_timeout (`float`, *optional*, defaults to `900`):
            Seconds to wait for one call of a reward function; `None` for no limit. In an evaluation, a late call
            counts as no score, with a warning. If training needs the reward, training stops.

        > Parameters that control sharing

        hub_base_model (`str`, *optional*):
            The base's id on the Hub (`owner/name`) where `model` is a folder or was made in memory. The model card and
            `adapter_config.json` name it, since nobody else has the folder. Needed to push such a student. The
            repository need not exist yet.

        > Parameters that control the logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to draw images for fixed prompts at the start and at every evaluation; without evaluations
            (`eval_strategy="no"`) at every save and at the end. A picture with the images of base, teachers and
            student side by side, and a table of prompts and rewards, are saved under `completions/` in the output
            folder and sent to the trackers. The rewards are also printed.
        num_completions_to_print (`int`, *optional*, defaults to `4`):
            Prompts of each task in that table.

    > [!TIP]
    > `torch_compile=True` compiles the repeated blocks of the transformer, for the student and all teachers. Teachers
    of the > same rank and alpha share the compiled code. It can't be used with FSDP or DeepSpeed.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` where the device supports it and `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `3e-4` instead of `5e-5`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0.0`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `gradient_accumulation_steps`: Defaults to the number of tasks instead of `1`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    """

    if TYPE_CHECKING:
        output_dir: str = ""  # never None: `TrainingArguments` sets one where none is given

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "generation_kwargs", "task_weights"]

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep it False: further columns of the dataset go to the reward functions."}
    )

    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16. If not set, on where the device supports it."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: keyword arguments for `DiffusionPipeline.from_pretrained`."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the base model's weights. A LoRA stays float32.", "choices": list(DTYPES)},
    )

    offload_encoders: bool = field(
        default=False, metadata={"help": "Keep text encoders and VAE in host memory while they are not used."}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "diffusers' attention backend for the transformers, such as 'flash'."}
    )
    prompt_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps the prompts' embeddings across runs."}
    )
    prompt_cache_max_size: str = field(
        default="50GB", metadata={"help": "Maximum total size of `prompt_cache_dir`, such as '50GB'."}
    )

    # Parameters that control the rollout
    num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps of a training rollout."})
    sampler: str = field(
        default="ode",
        metadata={"help": "Sampler of the training rollout.", "choices": list(SAMPLERS)},
    )
    noise_level: float | None = field(
        default=None,
        metadata={"help": "How much noise the sampler adds (eta). 0.7 if not set. Not for ode and dpm2m."},
    )
    guidance_scale: float = field(
        default=None,  # type: ignore[assignment]  # None until the pipeline is known
        metadata={"help": "Classifier-free guidance scale; 1.0 is none. If not set, the pipeline's own default."},
    )
    height: int = field(default=512, metadata={"help": "Height of the images in pixels."})
    width: int = field(default=512, metadata={"help": "Width of the images in pixels."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Length of encoded prompts in tokens. If not set, the pipeline's default."}
    )
    generation_kwargs: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "JSON: further arguments of the pipeline's `__call__`."}
    )

    # Parameters that control the tasks
    source_images_column: str = field(
        default="source_images",
        metadata={"help": "Column of the dataset with each row's list of pictures to edit or to refer to."},
    )
    task_column: str = field(default="task", metadata={"help": "Column of the dataset that names a prompt's task."})
    task_weights: dict[str, JSON] | str | None = field(
        default=None, metadata={"help": "Weights of the tasks' losses, e.g. '{\"ocr\": 2.0}'. 1 for tasks not named."}
    )
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]  # None until the tasks are known
        default=None,
        metadata={"help": "Micro-batches in an update: a multiple of the number of tasks, which is the default."},
    )

    # Parameters that control the student
    student_init: str | None = field(
        default=None, metadata={"help": "A LoRA to start from: a folder, a Hub id, or 'merge'."}
    )
    ema_decay: float | str | None = field(
        default=FOLLOWING,
        metadata={
            "help": "Decay of the average that is evaluated and saved. 'auto' adapts to the run; 0 is no average."
        },
    )
    ema_update_interval: int = field(default=1, metadata={"help": "The average takes a step every so many updates."})

    # Parameters that control the evaluation
    eval_num_inference_steps: int = field(default=40, metadata={"help": "Denoising steps of images in evaluations."})
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of evaluations. If not set, `guidance_scale`."}
    )
    num_eval_images: int | None = field(
        default=None, metadata={"help": "Images of each task in an evaluation. If not set, one for each prompt."}
    )
    eval_base_and_teachers: bool = field(
        default=True,
        metadata={"help": "Score base and teachers once, at the first evaluation, to compare the student with them."},
    )
    reward_timeout: float | None = field(
        default=900.0, metadata={"help": "Seconds to wait for one call of a reward function; None for no limit."}
    )

    # Parameters that control sharing
    hub_base_model: str | None = field(
        default=None, metadata={"help": "The base's Hub id (owner/name) in the model card, if the base is a folder."}
    )

    # Parameters that control the logging
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Draw and log images for fixed prompts at the start and at evaluations; without these, at saves."
        },
    )
    num_completions_to_print: int = field(
        default=4, metadata={"help": "Prompts of each task whose images are logged."}
    )

    def __new__(cls, *args: object, **options: object) -> "DiffusionConfig":
        # Python's own error would only say that an argument is unexpected.
        problems = [unknown_option(cls, name) for name in options.keys() - {known.name for known in fields(cls)}]
        if problems:
            raise TypeError("\n".join(sorted(problems)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # TRL turns bf16 on everywhere, and TrainingArguments then refuses a CPU. A laptop should just work.
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        given = self.__dict__
        if given["resume_from_checkpoint"] in ("True", "true"):  # a command line gives text
            given["resume_from_checkpoint"] = True
        if (
            given["hub_token"] is not None
        ):  # a line break, as at a file's end, would cause an error that shows the token
            given["hub_token"] = given["hub_token"].strip()
        # Without an accelerator it would only warn.
        given["dataloader_pin_memory"] = given["dataloader_pin_memory"] and torch.accelerator.is_available()
        # TRL sets the old name, for which transformers would warn users who have set neither.
        for name in ("checkpointing", "checkpointing_kwargs"):
            if given[f"activation_{name}"] is None:
                given[f"activation_{name}"] = given[f"gradient_{name}"]
        self.dtype = full_dtype(self.dtype)
        if isinstance(given["ema_decay"], str):  # a command line gives text
            with suppress(ValueError):
                given["ema_decay"] = float(given["ema_decay"])
        self._refuse_broken_json()
        # Its advice for processes that do not know of each other is another one than that of `world_problems`.
        with without_lines("In order to use Torch DDP, launch your script with", "transformers.training_args"):
            super().__post_init__()
        # Under ZeRO-3 transformers would split every model that is loaded from now on. For text encoders and rewards
        # there is no engine that gathers them again.
        unset_hf_deepspeed_config()
        if self.dtype == "float32":  # the default
            self.dtype = min(self._given_dtypes(), default=self.dtype)
        problems = self._problems()
        # Checked separately, since comparisons with NaN are all false.
        problems += [
            f"{name}={value}: it must be a finite number."
            for name, value in infinite_options(self)
            if not any(problem.startswith(f"{name}=") for problem in problems)
        ]
        Problems(problems).raise_under(type(self).__name__)

    def _refuse_broken_json(self) -> None:
        """Names the option whose JSON is broken, since the error of transformers, which parses it, does not."""
        problems = []
        for name in self._VALID_DICT_FIELDS:
            value = self.__dict__[name]
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    problems.append(
                        f"{name}={value!r} is not JSON ({error}). Put names and texts in double quotes: '{{\"key\": 1}}'."
                    )
        Problems(problems).raise_under(type(self).__name__)

    @property
    def evaluation_guidance(self) -> float:
        """The guidance scale of evaluations."""
        return self.guidance_scale if self.eval_guidance_scale is None else self.eval_guidance_scale

    @property
    def templates(self) -> dict[str, str]:
        """What the student reads in each task that has a template."""
        return {}

    @property
    def readers(self) -> Readers:
        """What each model reads of a row."""
        return Readers(self.templates)

    def _given_dtypes(self) -> set[str]:
        """Names of the dtypes for the whole base in `model_init_kwargs`, where TRL's users write them."""
        options = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        given = [options[key] for key in ("dtype", "torch_dtype") if isinstance(options.get(key), str | torch.dtype)]
        return {name for name in map(dtype_name, given) if name is not None}

    def _problems(self) -> list[str]:
        """Lists what is wrong with these settings, a sentence each. Subclasses add to it."""
        problems = []
        for name in ("model_init_kwargs", "generation_kwargs", "task_weights"):
            if isinstance(getattr(self, name), str):
                problems.append(f"{name}={getattr(self, name)!r} is not a JSON object such as '{{\"key\": 1}}'.")
        options = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        problems += model_init_problems(options)
        others = self._given_dtypes() - {self.dtype}
        if others:
            problems.append(
                f"dtype={self.dtype!r}, but model_init_kwargs has {' and '.join(sorted(others))}: give only one."
            )
        problems += self._choice_problems("dtype", "sampler")
        problems += idle_options(self) + step_problems(self) + tracker_problems(self.report_to)
        problems += world_problems()
        try:
            convert_file_size_to_int(self.prompt_cache_max_size)
        except ValueError:
            problems.append(
                f"prompt_cache_max_size={self.prompt_cache_max_size!r}: it must be a number with a unit, such as "
                "'50GB'."
            )
        if self.hub_base_model is not None and (reason := repository_id_problem(self.hub_base_model)) is not None:
            problems.append(f"hub_base_model={self.hub_base_model!r}: {reason}.")
        problems += self._noise_problems()
        problems += self._range_problems()
        unusable = timeout_problems(self.reward_timeout)
        problems += unusable
        waits_longer = self.reward_timeout is not None and self.reward_timeout >= self.ddp_timeout
        if waits_longer and not unusable and self.world_size > 1:
            problems.append(
                f"reward_timeout={self.reward_timeout:g} is not less than ddp_timeout={self.ddp_timeout}, after which "
                "the other processes stop waiting for the one that scores. Set a longer ddp_timeout."
            )
        if isinstance(self.task_weights, dict):
            for task, weight in self.task_weights.items():
                if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                    problems.append(f"task_weights: {task}={weight!r} is not a positive number.")
        return problems

    def _noise_problems(self) -> list[str]:
        try:
            if self.sampler in SAMPLERS:
                checked_noise_level(self.sampler, self.noise_level)
        except ValueError as error:
            return [str(error)]
        return []

    def _range_problems(self) -> list[str]:
        problems = []
        for name in (
            "num_inference_steps",
            "eval_num_inference_steps",
            "gradient_accumulation_steps",
            "ema_update_interval",
            "num_eval_images",
            "num_completions_to_print",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: it must be at least 1.")
        for name in ("guidance_scale", "eval_guidance_scale"):
            scale = getattr(self, name)
            if scale is not None and scale < 1:
                problems.append(f"{name}={scale}: it must be at least 1.0, which is no guidance.")
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "num_train_epochs",
            "adam_epsilon",
        ):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)}: it must be a finite number, not negative.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: it must be in [0, 1).")
        if isinstance(self.ema_decay, str) and self.ema_decay != FOLLOWING:
            problems.append(f"ema_decay={self.ema_decay!r}: it must be a number in [0, 1), or {FOLLOWING!r}.")
        elif isinstance(self.ema_decay, float | int) and not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay={self.ema_decay}: it must be in [0, 1).")
        return problems

    def _choice_problems(self, *names: str) -> list[str]:
        # A command line's parser checks choices, but Python does not.
        choices = {known.name: known.metadata["choices"] for known in fields(self) if known.name in names}
        return [
            f"{name}={getattr(self, name)!r}: it must be one of {', '.join(choices[name])}."
            for name in names
            if getattr(self, name) not in choices[name]
        ]
