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
Prepares a trainer's parts before Trainer's own constructor runs: pipeline, velocity field, student, tasks, rewards,
and the method's own parts. It collects all problems and raises them in one message.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.utils.py_utils import convert_file_size_to_int
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed

from ..acceleration.attention import use_attention_backend
from ..acceleration.compilation import compile_blocks, repeated_blocks
from ..acceleration.offload import Offload, offloaded
from ..acceleration.quantization import QuantizationConfig, exempt_from_broadcast
from ..checkpointing.run_folder import folder_problems
from ..data.readers import read_columns, rows_of, template_problems
from ..data.source_images import SOURCE_IMAGES, plain_source_images
from ..data.tasks import plain_dataset, task_of, task_rows
from ..models.adapter_switch import remove_adapters
from ..models.expert_teachers import read_lora
from ..models.lora_adapter import add_adapter
from ..models.lora_config import for_experts, layer_problems
from ..models.student import STUDENT_ADAPTER, default_lora_config
from ..models.student_copy import StudentCopy
from ..models.teacher_config import TeacherError, TeacherSpec, parse_teacher
from ..pipelines.denoiser import denoiser
from ..pipelines.experts import Experts, unseen_expert
from ..pipelines.fingerprints import encoder_fingerprint
from ..pipelines.loading import load_pipeline
from ..pipelines.prompt_store import PromptStore
from ..pipelines.text_length import cut_warning, silence_tokenizers
from ..pipelines.velocity import VelocityField
from ..problems import Problems, Refusal
from ..rewards import RewardFunc, RewardFuncs, rewards_by_task
from .base_config import MERGE, DiffusionConfig
from .best_metric import metric_problems
from .checks import (
    base_name_problems,
    evaluation_data_problems,
    hub_problems,
    launch_problems,
    loader_problems,
    loading_problems,
    model_problems,
    picture_data_problems,
    read_data_problems,
    scored_data_problems,
    task_column_problems,
    training_data_problems,
    uses_fsdp,
)
from .option_checks import evaluation_problems, idle_evaluation
from .rounds import Rounds


logger = logging.getLogger(__name__)

# Prompts whose length is measured at most: a tokenizer takes about a second for them.
_MEASURED_PROMPTS = 10_000
# Tokens that every family's text encoders read at least, together: CLIP's.
_SHORTEST_LIMIT = 77


@dataclass
class Parts:
    """
    The parts of a trainer.

    Attributes:
        args ([`DiffusionConfig`]), pipeline ([`~diffusers.DiffusionPipeline`])
        undo (`ExitStack`): callbacks that restore the pipeline if the trainer cannot start.
        train_dataset, eval_dataset: the datasets, with tasks as plain names.
        given_rewards, given_teachers: as the constructor got them.
        rounds ([`Rounds`]), reward_funcs (`dict[str, list[Callable]]`): empty if the data can't be trained on.
        offload ([`Offload`]): the modules that leave the device between uses.
        velocity_field ([`VelocityField`]), student (`nn.Module`): set unless the pipeline can't be trained.
        method (`dict`): the method's own attributes of the trainer.
        average_copy ([`StudentCopy`], *optional*): what follows the student's average, where it teaches.
        start_lines (`list[str]`): what the start says about guidance and teachers.
    """

    args: DiffusionConfig
    pipeline: DiffusionPipeline
    undo: ExitStack
    train_dataset: Dataset
    eval_dataset: Dataset | Mapping[str, Dataset] | None
    rounds: Rounds
    offload: Offload
    given_rewards: RewardFuncs | None = None
    given_teachers: TeacherSpec | Mapping[str, TeacherSpec] | None = None
    reward_funcs: dict[str, list[RewardFunc]] = field(default_factory=dict)
    velocity_field: VelocityField = field(init=False)
    student: Any = None
    method: dict[str, Any] = field(default_factory=dict)
    average_copy: StudentCopy | None = None
    start_lines: list[str] = field(default_factory=list)

    @property
    def transformer(self) -> ModelMixin:
        return denoiser(self.pipeline)

    def modules(self) -> Iterator[nn.Module]:
        """The pipeline's networks."""
        return (component for component in self.pipeline.components.values() if isinstance(component, nn.Module))

    def prompt_store(self, pipeline: DiffusionPipeline) -> PromptStore | None:
        """Makes the store of a pipeline's embeddings on disk; `None` if the arguments name no folder."""
        args = self.args
        if args.prompt_cache_dir is None:
            return None
        size = convert_file_size_to_int(args.prompt_cache_max_size)
        return PromptStore(args.prompt_cache_dir, encoder_fingerprint(pipeline), size)

    def use_attention_backend(
        self, network: nn.Module, as_student: bool = False, field: VelocityField | None = None
    ) -> Callable[[], None] | None:
        """
        Sets the attention backend of a network, or refuses it. Returns a function that undoes it. Mixed precision is
        used only for the student's network. `field` is that of the network's pipeline, by default the student's.
        """
        args = self.args
        if args.attention_backend is None:
            return None
        mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        trial = partial((field or self.velocity_field).one_forward, network, batch_size)
        return use_attention_backend(network, args.attention_backend, trial, mixed if as_student else None)


class Method:
    """Hooks of a trainer's class that run before there is a trainer object."""

    config_class: ClassVar[type[DiffusionConfig]]

    @classmethod
    def method_metrics(cls, dataset: Dataset, args: DiffusionConfig, with_teachers: bool) -> list[str]:
        """Names of the metrics that the trainer's `_evaluate_method` returns for a dataset, without prefix."""
        return []

    @classmethod
    def look_at_base(cls, parts: Parts) -> None:
        """Can inspect the pipeline before the student's LoRA is added to its transformer."""

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        """Adds what the method needs besides the student to `parts.method`, and all problems to `problems`."""


def prepare(
    trainer: type[Method],
    undo: ExitStack,
    *,
    model: str | DiffusionPipeline,
    args: DiffusionConfig | None,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | Mapping[str, Dataset] | None,
    reward_funcs: RewardFuncs | None,
    teachers: TeacherSpec | Mapping[str, TeacherSpec] | None,
    quantization_config: QuantizationConfig,
    peft_config: PeftConfig | str | None,
) -> Parts:
    """
    Makes all parts of a trainer.

    Args:
        trainer (`type[DiffusionTrainer]`): the trainer's class.
        undo (`ExitStack`): gets callbacks that restore the pipeline.
        model, args, train_dataset, eval_dataset, reward_funcs, teachers, quantization_config, peft_config:
            As the trainers take them.

    Raises:
        [`ValueError`]: if anything is wrong. One message lists everything.
    """
    args = _checked(trainer, model, args)
    set_seed(args.seed)  # before the LoRA's random initialisation
    parts = _load(model, args, train_dataset, eval_dataset, quantization_config, undo)
    parts.given_rewards, parts.given_teachers = reward_funcs, teachers
    problems = Problems()
    _look_at_data(parts, trainer, problems)
    # After problems of the data, the model is still checked, so that one message lists everything. After `unfit` it
    # isn't.
    unfit = Problems(loading_problems(model, parts.pipeline, args, quantization_config))
    unfit += model_problems(parts.pipeline, args, peft_config)
    problems += base_name_problems(args, parts.pipeline)
    problems += evaluation_problems(args, eval_dataset)
    problems += launch_problems(parts.transformer, args) + loader_problems(args)
    if args.student_init == MERGE and teachers is None:
        problems.append(
            "student_init='merge' starts from the mean of the teachers' LoRAs, but there are no teachers. Name a "
            "LoRA, or write './merge' if you mean a folder of that name."
        )
    if not unfit:
        _make_field(parts, unfit)
    if not unfit and parts.rounds.tasks:
        problems += picture_data_problems(parts.velocity_field, parts.train_dataset, parts.eval_dataset, args)
        parts.velocity_field.one_by_one = uses_fsdp(args) or args.deepspeed_plugin is not None
    if not unfit and parts.rounds.tasks:
        _warn_of_long_prompts(parts)
    if not unfit:
        _make_student(parts, trainer, peft_config, unfit, problems)
    if not unfit:
        trainer.prepare_method(parts, problems)
    if args.should_save:
        problems += folder_problems(args.output_dir)
    if args.push_to_hub:
        problems += _push_problems(parts, full_weights=peft_config is None)
    Problems([*unfit, *problems]).raise_under(f"{trainer.__name__} cannot start")
    if args.process_index == 0 and (warning := idle_evaluation(args, eval_dataset)) is not None:
        logger.warning(warning)
    _settle(parts)
    return parts


def _checked(trainer: type[Method], model: str | DiffusionPipeline, args: DiffusionConfig | None) -> DiffusionConfig:
    """Returns the arguments; by default, the config's defaults with an `output_dir` named after model and method."""
    wanted = trainer.config_class
    if args is None:
        name = model if isinstance(model, str) else str(model.config.get("_name_or_path"))
        method = wanted.__name__.removeprefix("Diffusion").removesuffix("Config")
        args = wanted(f"{name.rstrip('/').split('/')[-1]}-{method}")
    if not isinstance(args, wanted):
        raise Refusal(f"args is a {type(args).__name__}, but {trainer.__name__} takes a {wanted.__name__}.")
    return args


def _load(
    model: str | DiffusionPipeline,
    args: DiffusionConfig,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | Mapping[str, Dataset] | None,
    quantization_config: QuantizationConfig,
    undo: ExitStack,
) -> Parts:
    """Loads the pipeline if it is given by name, and changes nothing in it."""
    init_kwargs = args.model_init_kwargs
    assert init_kwargs is None or isinstance(init_kwargs, dict)  # the config has parsed or refused strings
    pipeline = load_pipeline(model, args.dtype, init_kwargs, quantization_config)
    if isinstance(train_dataset, Dataset):
        train_dataset = plain_source_images(plain_dataset(train_dataset, args.task_column), args.source_images_column)
    eval_dataset = plain_source_images(plain_dataset(eval_dataset, args.task_column), args.source_images_column)
    offload, rounds = Offload([], args.device), Rounds({}, {}, 1, args.task_column)
    parts = Parts(args, pipeline, undo, train_dataset, eval_dataset, rounds, offload)
    if isinstance(model, DiffusionPipeline):
        undo.callback(_restorer(parts.modules()))
    return parts


def _look_at_data(parts: Parts, trainer: type[Method], problems: Problems) -> None:
    """Finds the tasks and their rewards, and checks the data."""
    args, column = parts.args, parts.args.task_column
    problems += training_data_problems(parts.train_dataset, column)
    if not problems:
        of_tasks = {
            "teachers": parts.given_teachers,
            "reward_funcs": parts.given_rewards,
            "task_weights": args.task_weights,
        }
        problems += task_column_problems(parts.train_dataset, column, of_tasks, "train_dataset")
    if problems:
        return
    rows = task_rows(parts.train_dataset, column)
    problems += template_problems(args.templates, list(rows))
    if parts.given_teachers is not None:
        problems += read_data_problems(parts.train_dataset, parts.eval_dataset, column)
        parts.start_lines += args.readers.lines(parts.train_dataset, rows)
    unscored = Problems(evaluation_data_problems(parts.eval_dataset, column, list(rows)))
    with unscored.collect():
        parts.reward_funcs = rewards_by_task(parts.given_rewards, list(rows))

    def of_method(dataset: Dataset) -> list[str]:
        return trainer.method_metrics(dataset, args, parts.given_teachers is not None)

    problems += unscored or metric_problems(args, parts.eval_dataset, parts.reward_funcs, of_method)
    problems += scored_data_problems(parts.reward_funcs, parts.train_dataset, parts.eval_dataset, column)
    parts.rounds = Rounds.of(rows, args, problems)


def _make_field(parts: Parts, unfit: Problems) -> None:
    """Moves the pipeline to its device and makes the velocity field."""
    args, kwargs = parts.args, parts.args.generation_kwargs
    assert kwargs is None or isinstance(kwargs, dict)  # the config has parsed or refused strings
    store: PromptStore | None = None
    with unfit.collect():
        store = parts.prompt_store(parts.pipeline)
        if args.offload_encoders:
            parts.offload = Offload(offloaded(parts.pipeline), args.device)
            parts.undo.callback(parts.offload.remove)
    for module in parts.modules():
        module.eval()  # without dropout: the checks below encode prompts, and the embeddings are kept
        if all(module is not other for other in parts.offload.modules):
            module.to(args.device)  # the checks below run the pipeline
    if unfit:
        return
    with unfit.collect():
        parts.velocity_field = VelocityField(
            parts.pipeline,
            num_inference_steps=args.num_inference_steps,
            height=args.height,
            width=args.width,
            max_sequence_length=args.max_sequence_length,
            generation_kwargs=kwargs,
            prompt_store=store,
        )
        _settle_guidance(parts)


def _settle_guidance(parts: Parts) -> None:
    """Sets `guidance_scale` in the arguments if it is `None`, and writes the lines about guidance."""
    args = parts.args
    is_default = args.guidance_scale is None
    if is_default:
        args.guidance_scale = parts.velocity_field.default_guidance_scale()
    parts.start_lines += parts.velocity_field.guidance_lines(args.guidance_scale, is_default)


def _warn_of_long_prompts(parts: Parts) -> None:
    """Warns of training prompts that no text encoder reads whole."""
    silence_tokenizers(parts.pipeline.components)
    first = _read_first(parts)
    # A token has at least one byte. Some pipelines put words of their own into the length, hence the half.
    bound = (parts.args.max_sequence_length or _SHORTEST_LIMIT) // 2
    if max(len(prompt.encode()) for prompt in first) < bound:
        return  # the limits themselves would cost a run of the text encoders
    found = parts.velocity_field.text_limits()
    if parts.args.process_index == 0 and (warning := cut_warning(first, found)) is not None:
        logger.warning(warning)


def _read_first(parts: Parts) -> list[str]:
    """What models read of the first training rows. Without a template and `teacher_prompt`, only the prompts."""
    args, dataset = parts.args, parts.train_dataset
    columns = [one for one in read_columns(dataset, parts.given_teachers is not None) if one != SOURCE_IMAGES]
    tasks = [args.task_column] if args.task_column in dataset.column_names else []
    readers, found = args.readers, dict[str, None]()
    for row in rows_of(dataset.select_columns(columns + tasks)[:_MEASURED_PROMPTS]):
        texts = readers.texts(task_of(row, args.task_column), [row])
        found |= dict.fromkeys(texts.student + texts.teacher)
    return [*found]


def _make_student(
    parts: Parts, trainer: type[Method], peft_config: PeftConfig | str | None, unfit: Problems, problems: Problems
) -> None:
    args, transformer = parts.args, parts.transformer
    for scale in {args.guidance_scale, args.evaluation_guidance}:
        with problems.collect():
            parts.velocity_field.check_guidance(scale)
    with problems.collect():
        if (put_back := parts.use_attention_backend(transformer, as_student=True)) is not None:
            parts.undo.callback(put_back)
    parts.undo.callback(_without_student(transformer))
    trainer.look_at_base(parts)
    for module in parts.modules():
        module.requires_grad_(False)
        module.eval()
    with unfit.collect():
        parts.student = _student_network(parts, peft_config)
    if isinstance(parts.student, PeftModel):
        unfit += layer_problems(parts.student)
    if args.process_index == 0 and (unseen := unseen_expert(parts.velocity_field.levels.tolist(), parts.pipeline)):
        logger.warning(unseen)


def _student_network(parts: Parts, peft_config: PeftConfig | str | None) -> nn.Module:
    """Returns the network with the student: the base with the trained LoRA, or the transformer itself."""
    transformer, init = parts.transformer, parts.args.student_init
    model: nn.Module
    if peft_config is None:
        model = transformer.requires_grad_(True)
    elif init not in (None, MERGE):  # a merge is done later, when the teachers are loaded
        config, weights, files = read_lora(parts.pipeline, parse_teacher(init))
        own = (config.r, config.lora_alpha)
        if isinstance(peft_config, LoraConfig) and (peft_config.r, peft_config.lora_alpha) != own:
            logger.warning(
                f"The student starts from {init}, a LoRA of rank {config.r} and alpha {config.lora_alpha}. The "
                f"peft_config of rank {peft_config.r} and alpha {peft_config.lora_alpha} has no effect."
            )
        try:
            model = add_adapter(transformer, STUDENT_ADAPTER, config, weights, trainable=True)
        except TeacherError as error:
            raise TeacherError(f"{files.label}: {error}") from error
    else:
        config = peft_config if isinstance(peft_config, PeftConfig) else default_lora_config(transformer)
        config = copy.deepcopy(config)  # the caller's config must not change
        if isinstance(transformer, Experts):
            config = for_experts(config)
        config.base_model_name_or_path = None  # PEFT warns if it differs from the base's, which has none here
        config.task_type = None  # TRL's CAUSAL_LM would look for a language model's methods
        config.lora_dropout = 0.0  # the forward that draws the image is also the trained one: it must be deterministic
        config.inference_mode = False  # a config read from a saved LoRA has True, which would freeze it
        model = get_peft_model(transformer, config, adapter_name=STUDENT_ADAPTER)
    model.eval()
    # Trainer's name for what diffusers calls enable_gradient_checkpointing.
    model.activation_checkpointing_enable = lambda **_: transformer.enable_gradient_checkpointing()  # type: ignore
    return model


def _push_problems(parts: Parts, full_weights: bool) -> Sequence[str]:
    # One process asks the Hub, and all processes get the answer.
    args, found = parts.args, [Problems()]
    if args.process_index == 0:
        found = [Problems(hub_problems(args, parts.pipeline, full_weights, args.hub_token))]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _settle(parts: Parts) -> None:
    """Takes the last steps, when there are no problems."""
    args = parts.args
    if args.ddp_find_unused_parameters is None:
        # The search costs time. Where every trained parameter is used, it is not needed; of two experts, the last
        # backward of an update uses one.
        args.ddp_find_unused_parameters = isinstance(parts.transformer, Experts)
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # they are constants, and SD3's table of positions alone has 453 MB
    if args.torch_compile:
        compile_blocks(parts.transformer, args.torch_compile_backend, args.torch_compile_mode)
    exempt_from_broadcast(parts.student)


def _restorer(components: Iterable[nn.Module]) -> Callable[[], None]:
    """Returns a function that restores the modules' current devices, modes, and `requires_grad` of parameters."""
    modules = list(components)
    devices = [(module, parameter.device) for module in modules for parameter in [*module.parameters()][:1]]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]

    def restore() -> None:
        for module, device in devices:
            if next(module.parameters()).device != device:
                module.to(device)
        for part, training in modes:
            part.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


def _without_student(transformer: nn.Module) -> Callable[[], None]:
    """Returns a function that removes the student and everything made for it from the pipeline's transformer."""

    def remove() -> None:
        remove_adapters(transformer)
        for block in repeated_blocks(transformer):
            vars(block).pop("_compiled_call_impl", None)
        vars(transformer).pop("activation_checkpointing_enable", None)

    return remove
