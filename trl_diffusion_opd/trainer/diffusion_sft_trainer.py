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

"""Fine-tunes by flow matching, on images of a dataset or on images that teachers draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Image
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..acceleration.quantization import QuantizationConfig
from ..algorithms.flow import noised
from ..algorithms.rollout import CACHE_DRAW, EVAL_DRAW, gaussian, sample_generators, walk
from ..algorithms.samplers import SamplerTable, sampler_table
from ..algorithms.sft import density_quantile, flow_matching_loss, shifted
from ..data.latent_cache import LatentCache, Shard
from ..data.readers import Readers, Texts, read_columns
from ..data.source_images import SOURCE_IMAGES, has_source_images
from ..data.tasks import task_rows
from ..models.roles import model_identity
from ..models.teacher_config import TeacherSpec
from ..pipelines.fingerprints import base_digest
from ..problems import Problems
from ..reporting import console as tables
from ..reporting.model_card import MethodFacts
from ..rewards import RewardFuncs, Row
from .base_config import DiffusionConfig
from .base_trainer import DiffusionTrainer
from .checks import own_level_problems
from .diffusion_sft_config import DiffusionSFTConfig
from .preparation import Parts
from .teaching import load_teachers


_EVAL_LEVELS = 8


class DiffusionSFTTrainer(DiffusionTrainer):
    """
    Trainer for supervised fine-tuning of flow-matching models ([Flow
    Matching](https://huggingface.co/papers/2210.02747)).

    It noises an image `x0` to `x_t = (1 - t) x0 + t eps`, and trains the velocity at `x_t` to be `eps - x0`. The
    images come from the dataset or, with `teachers`, are drawn by each task's teacher for its prompts. The second is
    the off-policy baseline of on-policy distillation.

    Example:

    ```python
    from trl_diffusion_opd import DiffusionSFTConfig, DiffusionSFTTrainer, tiny

    trainer = DiffusionSFTTrainer(
        model=tiny.BASE,
        teachers=tiny.TEACHERS,
        args=DiffusionSFTConfig("student", height=32, width=32, max_sequence_length=12, guidance_scale=1.0,
        max_steps=50), train_dataset=tiny.dataset("train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~diffusers.DiffusionPipeline`]):
            The base: a Hub id, a folder, or a loaded pipeline. The transformer of a loaded pipeline is wrapped in
            place.
        teachers (`str`, [`TeacherConfig`], `list` of these, or `dict` from task to any of these, *optional*):
            The frozen teachers of each task, as for [`DiffusionOPDTrainer`]. Without them, the dataset must have
            images.
        reward_funcs (function, `list` or `dict` from task to either, *optional*):
            Rewards that are measured on the images of evaluations. They never enter the loss.
        args ([`DiffusionSFTConfig`], *optional*):
            Configuration. By default, that of the class, with an `output_dir` named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt`, without teachers `image` (of type [`~datasets.Image`]), and with several tasks `task`.
            Other columns are passed to the reward functions.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Prompts of evaluations, with the same columns.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler to use instead of those of `args`.
        quantization_config ([`~diffusers.PipelineQuantizationConfig`] or diffusers' config for a model, *optional*):
            How a base that is given by name is quantized, with bitsandbytes or torchao. A config for a model is
            applied to the transformer. The LoRA stays float32.
        peft_config ([`~peft.LoraConfig`], *optional*, defaults to `"default"`):
            The student's LoRA, as for [`DiffusionOPDTrainer`]. `None` trains all weights.

    Raises:
        [`ValueError`]: before the first step, if anything is wrong. One message lists everything.
    """

    _tag_names = ["trl", "diffusion-sft"]
    _name = "DiffusionSFT"
    _paper = {
        "title": "Flow Matching",
        "id": "2210.02747",
        "citation": "@article{flowmatching,\n    title  = {{Flow Matching for Generative Modeling}},\n"
        "    eprint = {arXiv:2210.02747},\n}",
    }
    args: DiffusionSFTConfig
    table: SamplerTable  # with teachers
    cache: LatentCache | None = None
    config_class = DiffusionSFTConfig
    timed_parts = (*DiffusionTrainer.timed_parts, "teacher")

    def __init__(
        self,
        model: str | DiffusionPipeline,
        teachers: TeacherSpec | Mapping[str, TeacherSpec] | None = None,
        reward_funcs: RewardFuncs | None = None,
        args: DiffusionSFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: QuantizationConfig = None,
        peft_config: PeftConfig | str | None = "default",
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_funcs=reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            teachers=teachers,
        )

    # Before the first step

    @classmethod
    def look_at_base(cls, parts: Parts) -> None:
        args = parts.args
        assert isinstance(args, DiffusionSFTConfig)
        if parts.given_teachers is not None and args.teacher_cache_dir is not None:
            parts.method["_base_digest"] = base_digest(parts.pipeline)

    @classmethod
    def prepare_method(cls, parts: Parts, problems: Problems) -> None:
        args = parts.args
        assert isinstance(args, DiffusionSFTConfig)
        problems += own_level_problems(parts.transformer, args)
        dataset, column = parts.train_dataset, args.image_column
        features = dataset.features if isinstance(dataset, Dataset) else {}
        if parts.given_teachers is None:
            cls._prepare_images(parts, features, problems)
            return
        if column in features:
            problems.append(
                f"train_dataset has a column {column!r}, but with teachers its images would be ignored. Remove the "
                "column, or leave out the teachers."
            )
        with problems.collect():
            parts.method["table"] = sampler_table(args.sampler, parts.velocity_field.levels, args.noise_level)
        loaded = len(problems)
        load_teachers(parts, problems, args.teacher_guidance_scale, args.batch_teachers)
        bank = parts.method.get("bank")
        if args.teacher_cache_dir is not None and has_source_images(parts.train_dataset):
            problems.append(
                f"teacher_cache_dir={args.teacher_cache_dir!r} keeps one image a prompt, whatever its {SOURCE_IMAGES}. "
                "Leave it unset."
            )
        if args.teacher_cache_dir is not None and bank is not None and bank.has_student:
            problems.append(
                f'teacher_cache_dir={args.teacher_cache_dir!r}: the images of the teacher "student" change as it learns, '
                "so they can't be kept. Leave it unset."
            )
        if args.teacher_cache_dir is not None and len(problems) == loaded and parts.rounds.tasks:
            cache = parts.method["cache"] = _make_cache(parts)
            problems += [f"teacher_cache_dir: {problem}" for problem in cache.problems()]

    @classmethod
    def _prepare_images(cls, parts: Parts, features: Mapping[str, object], problems: Problems) -> None:
        args = parts.args
        assert isinstance(args, DiffusionSFTConfig)
        column = args.image_column
        if args.teacher_cache_dir is not None:
            problems.append(
                f"teacher_cache_dir={args.teacher_cache_dir!r} is for images of teachers, but there are none. Leave "
                "it unset."
            )
        if features and not isinstance(features.get(column), Image):
            found = f"its type is {features[column]}" if column in features else f"the columns are {list(features)}"
            problems.append(
                f"train_dataset has no images in the column {column!r}; {found}. Name the column with image_column, "
                f"and give it the type: dataset.cast_column({column!r}, datasets.Image()). Or train on images of "
                "teachers."
            )
        with problems.collect():
            parts.velocity_field.check_encode()

    def _start(self) -> None:
        # A grid of all timesteps of the scheduler. It gives any timestep's noise level, and the network's input for
        # it.
        self._fine_field = self.velocity_field.with_all_levels()
        if self.is_world_process_zero():
            if self.bank is not None:
                self._print_teachers(self.bank)
            else:
                tables.print_tasks(self.rounds.counts)
            tables.print_trained(self.student.parameters())
            tables.print_line("Training is without guidance; guidance_scale is for teachers and evaluations.")

    # Images

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as [`DiffusionTrainer.train`]. First, teachers draw the images that the cache lacks."""
        if self.cache is not None:
            self._fill_cache(self.cache)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _fill_cache(self, cache: LatentCache) -> None:
        """Draws the images that the cache lacks. Every process calls the transformer equally often."""
        if self.is_world_process_zero():
            cache.start()
        missing = gather_object([cache.missing()])[0]  # one process's list: others might see files written meanwhile
        if missing:
            self._compare_tasks()  # now, since drawing the images can take hours
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for first in range(0, len(missing), world):
            shard = missing[min(first + rank, len(missing) - 1)]
            latents = self._draw_shard(shard, cache.prompts_of(shard))
            if first + rank < len(missing):
                cache.write(shard, latents)
        self.accelerator.wait_for_everyone()

    def _draw_shard(self, shard: Shard, prompts: list[str]) -> Tensor:
        size, parts = self.args.per_device_eval_batch_size, []
        entropy = [self.args.seed, CACHE_DRAW, self.tasks.index(shard.task)]
        for first in range(0, len(prompts), size):
            generators = sample_generators(entropy, shard.numbers[first : first + size])
            parts.append(self._teacher_latents(shard.task, prompts[first : first + size], generators).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def _teacher_latents(self, task: str, prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        """Draws latents of images with the task's teachers, which read these prompts, and the arguments' sampler."""
        texts = Texts(prompts, prompts, prompts)
        x = self.velocity_field.initial_latents(prompts, generators)
        levels = self.table.levels.tolist()
        x = walk(lambda j, x, _: self._target(task, x, levels[j], texts), x, self.table, generators)
        return self.velocity_field.clean(x)

    def _latents(self, task: str, rows: Sequence[Row], texts: Texts, generators: list[torch.Generator]) -> Tensor:
        if self.bank is None:
            return self.velocity_field.encode([row[self.args.image_column] for row in rows])
        if self.cache is None:
            return self._teacher_latents(task, texts.teacher, generators)
        n = self.args.num_images_per_prompt
        chosen = [int(torch.randint(n, (1,), generator=generator)) for generator in generators]
        latents = [self.cache.read(task, text, which) for text, which in zip(texts.teacher, chosen, strict=True)]
        return torch.stack(latents).to(self.accelerator.device)

    # Training

    # The type of `inputs` differs from Trainer's, whose inputs are a dict of tensors.
    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: list[Row], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Noises one task's images, each to its own level, and trains the velocity there."""
        self._in_eval_mode(model)
        task, positions = self.turn(self._micro_step, inputs)
        generators = sample_generators([self.args.seed, self.state.global_step, self.tasks.index(task)], positions)
        texts = self.texts(task, inputs)
        x0 = self._latents(task, inputs, texts, generators)
        q = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        eps = gaussian(generators, x0)
        with self._gradient_sync(model, last=True):
            loss = self._flow_loss(model, x0, eps, q, texts.student)
            self._backward(self.rounds.share(task) * loss.mean())
        mean = self._record(task, loss.detach().mean())
        self._end_micro_batch()
        return (mean * self.rounds.share(task)).to(x0.device, torch.float32)

    @property
    def trained_scale(self) -> float:
        return 1.0

    def teacher_scales(self, task: str) -> set[float]:
        return set() if self.cache is not None else super().teacher_scales(task)

    def _flow_loss(self, model: nn.Module, x0: Tensor, eps: Tensor, q: Tensor, prompts: list[str]) -> Tensor:
        """The loss of each image. `q`, in (0, 1), is the quantile of its timestep in the configured distribution."""
        args = self.args
        u = density_quantile(q, args.timestep_density, args.logit_mean, args.logit_std)
        t = shifted(u, self._fine_field.levels)
        x = noised(x0, eps, t)
        # Without guidance, since flow matching trains the conditional velocity.
        v = self._student_velocity(
            model, x, t.tolist(), prompts, guidance_scale=self.trained_scale, field=self._fine_field
        )
        loss = flow_matching_loss(v, x0, eps)
        weights = self._fine_field.output_weights(t.tolist())
        return loss if weights is None else loss * torch.tensor(weights, device=loss.device, dtype=loss.dtype)

    def _record(self, task: str, loss: Tensor) -> Tensor:
        """Logs and returns the mean loss over processes. All processes stop if one loss is not finite."""
        everyone = self._gather_finite(task, None, loss[None, None])
        self._metrics["train"][f"loss/{task}"].append(float(everyone.mean()))
        return everyone.mean()

    # Evaluation and files

    @torch.no_grad()
    def _evaluate_method(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        """Computes the loss on each task's first evaluation rows, one micro-batch, with fixed noise and levels."""
        if not _has_images(dataset, self.args, self.bank is not None):
            return {}
        model = self.student.model
        size = self.args.per_device_eval_batch_size
        first = self.accelerator.process_index * size
        losses: dict[str, float] = {}
        for task, of_task in task_rows(dataset, self.args.task_column).items():
            rows = [dataset[int(row)] for row in np.resize(of_task, first + size)[first:]]
            texts = self.texts(task, rows)
            entropy = [self.args.seed, EVAL_DRAW, self.tasks.index(task)]
            generators = sample_generators(entropy, range(first, first + size))
            if self.bank is None:
                x0 = self._latents(task, rows, texts, generators)
            else:  # the cache only has images for the training prompts
                x0 = self._teacher_latents(task, texts.teacher, generators)
            parts = []
            for k in range(_EVAL_LEVELS):
                q = torch.full((len(rows),), (k + 0.5) / _EVAL_LEVELS, dtype=torch.float64)
                eps = gaussian(generators, x0)
                parts.append(self._flow_loss(model, x0, eps, q, texts.student).mean())
            gathered = self.accelerator.gather(torch.stack(parts)[None]).cpu().double()
            losses[f"{metric_key_prefix}_loss/{task}"] = float(gathered.mean())
        return {f"{metric_key_prefix}_loss": sum(losses.values()) / len(losses), **losses}

    @classmethod
    def method_metrics(cls, dataset: Dataset, args: DiffusionConfig, with_teachers: bool) -> list[str]:
        assert isinstance(args, DiffusionSFTConfig)
        tasks = task_rows(dataset, args.task_column) if _has_images(dataset, args, with_teachers) else {}
        return ["loss", *(f"loss/{task}" for task in tasks)] if tasks else []

    def _card_fields(self) -> MethodFacts:
        args = self.args
        density = args.timestep_density
        if density == "logit_normal":
            density += f", mean {args.logit_mean}, standard deviation {args.logit_std}"
        settings = {"loss": "flow matching, without guidance", "timesteps": density}
        if self.bank is None:
            method = "The student was trained by flow matching on images with captions."
            return {"method": method, "no_walk": True, "settings": settings}
        settings["images"] = (
            f"{args.num_images_per_prompt} a prompt, drawn once" if self.cache else "fresh for every update"
        )
        method = (
            "The student was trained by flow matching on images that the frozen teacher of each prompt's task drew."
        )
        return {"method": method, "no_walk": True, "settings": settings, "teachers": self.bank.manifest()}


def _has_images(dataset: Dataset, args: DiffusionSFTConfig, with_teachers: bool) -> bool:
    """Whether an evaluation has images to compute the loss on: a teacher's, or its own."""
    return with_teachers or isinstance(dataset.features.get(args.image_column), Image)


def _make_cache(parts: Parts) -> LatentCache:
    args = parts.args
    assert isinstance(args, DiffusionSFTConfig) and args.teacher_cache_dir is not None
    read = parts.train_dataset.select_columns(read_columns(parts.train_dataset))
    of_task = {  # what the teachers draw
        task: list(dict.fromkeys(Readers().texts_of(task, read.select(rows)[:]).teacher))
        for task, rows in parts.rounds.rows.items()
    }
    settings = {
        "base": parts.method["_base_digest"],
        "teachers": {task: model_identity(roles) for task, roles in parts.method["bank"].teachers.items()},
        "sampler": args.sampler,
        "noise_level": args.noise_level,
        "levels": parts.velocity_field.levels.tolist(),
        "height": args.height,
        "width": args.width,
        "max_sequence_length": args.max_sequence_length,
        "generation_kwargs": str(args.generation_kwargs),
        "seed": args.seed,
    }
    return LatentCache(args.teacher_cache_dir, settings, of_task, args.num_images_per_prompt)
