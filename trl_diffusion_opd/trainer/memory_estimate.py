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

"""Estimates the peak memory of training, part by part: counted weights, and activations computed from shapes alone."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_map
from transformers import Trainer

from ..acceleration.compilation import repeated_blocks
from ..acceleration.quantization import plain_tensors, scales
from ..data.pictured_prompt import SOURCE_IMAGES, with_pictures
from ..data.readers import rows_of
from ..data.source_images import has_source_images, most_pictured
from ..data.tasks import task_of
from ..pipelines.denoiser import denoiser, denoiser_name
from ..profiling.memory import MemoryRow, bytes_of, optimizer_step_bytes, pass_in_shapes, step_bytes
from .base_trainer import DiffusionTrainer


# The longest prompt and the most pictures are looked for among so many rows of the data.
_LOOKED_AT = 1000
# Side of the square weight used to measure an optimizer's memory: large enough for 8-bit optimizers to use 8 bits.
_PROBE = 1024


def estimate_memory(
    trainer: DiffusionTrainer, *, device_type: str | None = None, shards: int = 1
) -> dict[str, MemoryRow]:
    """
    Estimates the peak memory of training on one process's device, part by part, in bytes.

    Weights are counted. Activations are those of the student's forward and backward on one micro-batch of the data's
    longest prompt, with as many pictures as a row has at most, and with GRPO's `one_pass` those of all forwards that
    wait for their backward. They are computed from shapes alone, so a network of any size takes seconds, even if it
    does not fit. The optimizer's memory is measured on a small weight. Not counted: memory that the allocator rounds
    up and keeps, workspaces of kernels, the CUDA context (some 0.5 GiB), DDP's buckets, the VAE's activations (in
    evaluations, and for pictures), reward models.

    Args:
        trainer ([`DiffusionOPDTrainer`] or another of this package): the trainer.
        device_type (`str`, *optional*):
            `"cuda"` or `"cpu"`: the device whose mixed precision is assumed (on CUDA layer norms are float32). By
            default, the trainer's.
        shards (`int`, *optional*, defaults to 1):
            Number of processes that share the student's network and its optimizer under FSDP2. Two blocks at a time,
            the weights outside of blocks, and the gradients are still whole.

    Returns:
        `dict`: for each part `{"dtype", "bytes", "how"}`. The last part is `"peak"`; its `"how"` says when it is
            reached.
    """
    student = trainer.student.parameters()
    dtypes = {p.dtype for p in student}
    rows, elsewhere = _weights(trainer)
    if shards > 1:
        rows["gathered"] = _row(_gathered(trainer), dtypes, "counted: two blocks at a time and what is outside")
        for name in (denoiser_name(trainer.base_pipeline), "student", "moving average"):
            if name in rows:
                rows[name]["bytes"] //= shards
    trained = sum(p.nbytes for p in student)
    state, temporary = optimizer_bytes(trainer)
    # FSDP2 splits the gradients only in the update's last backward.
    rows["gradients"] = _row(trained, dtypes, "as the student" if shards == 1 else "as the student, whole")
    rows["optimizer"] = _row(round(state * trained) // shards, set(), f"{state:.2f} bytes a byte of the student")
    if beside := trainer.trained_beside():  # its gradients are there when the student's are not
        size = round(state * sum(p.nbytes for p in beside)) // (shards if trainer.student.is_lora else 1)
        rows["second optimizer"] = _row(size, set(), f"{state:.2f} bytes a byte of what it trains")
    resident = sum(row["bytes"] for row in rows.values())
    activations = activation_bytes(trainer, device_type)
    how, graphs = "from shapes: forward and backward of a micro-batch", trainer.graphs_alive
    if graphs > 1:
        how = f"from shapes: {graphs} forwards of a micro-batch that wait for their backwards"
    if activations is None:
        how = "not estimated: the network's shapes depend on values"
    rows["activations"] = _row(activations or 0, set(), how)
    moments = {
        "the student's backward": resident + (activations or 0),
        "the optimizer's step": resident + round(temporary * trained) // shards,
        "encoding prompts": resident + sum(row["bytes"] for name, row in elsewhere.items() if name != "vae"),
        # Graphs that wait for their backward wait for the images' scores, too.
        "decoding images": resident
        + sum(row["bytes"] for name, row in elsewhere.items() if name == "vae")
        + (activations or 0) * (graphs > 1),
    }
    moment = max(moments, key=lambda name: moments[name])
    without = " and activations" if activations is None else ""
    return {
        **elsewhere,
        **rows,
        "peak": _row(moments[moment], set(), f"estimate: at {moment}{without and ', without activations'}"),
    }


def _row(size: int, dtypes: set[torch.dtype], how: str) -> MemoryRow:
    return {"dtype": ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)), "bytes": size, "how": how}


def _weights(trainer: DiffusionTrainer) -> tuple[dict[str, MemoryRow], dict[str, MemoryRow]]:
    """Rows for weights that are always on the device, and for those that `offload_encoders` keeps in host memory."""
    student, frozen = trainer.student.parameters(), trainer.frozen_parts()
    taken = {id(tensor) for tensor in itertools.chain(student, *frozen.values())}
    rows, elsewhere = {}, {}
    for name, component in trainer.base_pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        tensors = [tensor for tensor in _tensors(component) if id(tensor) not in taken]
        if any(component is other for other in trainer.offload.modules):
            elsewhere[name] = _row_of(tensors, "counted: on the device while it is used")
        elif tensors:
            rows[name] = _row_of(tensors, "counted")
    rows["student"] = _row_of(student, "counted")
    rows |= {name: _row_of(tensors, "counted") for name, tensors in frozen.items() if tensors}
    taken |= {id(tensor) for part in trainer.base_pipeline.components.values() for tensor in _tensors(part)}
    for own in () if trainer.bank is None else trainer.bank.own_pipelines():
        for part, module in own.modules().items():
            if part == "vae":  # it stays in host memory: only the start has used it
                continue
            tensors = [tensor for tensor in _tensors(module) if id(tensor) not in taken]
            taken |= {id(tensor) for tensor in tensors}
            name = f"teacher {own.source}: {part}"
            if any(module is other for other in trainer.offload.modules):
                elsewhere[name] = _row_of(tensors, "counted: on the device while it is used")
            elif tensors:
                rows[name] = _row_of(tensors, "counted")
    if trainer.student.ema is not None:
        rows["moving average"] = _row_of(trainer.student.ema.shadow_params, "counted")
    return rows, elsewhere


def _tensors(component: object) -> list[Tensor]:
    """All tensors of a pipeline's component; none if it is no network."""
    if not isinstance(component, nn.Module):
        return []
    return [*component.parameters(), *component.buffers(), *scales(component)]


def _row_of(tensors: Sequence[Tensor], how: str) -> MemoryRow:
    return _row(sum(map(bytes_of, tensors)), {part.dtype for t in tensors for part in plain_tensors(t)}, how)


def _gathered(trainer: DiffusionTrainer) -> int:
    transformer = denoiser(trainer.base_pipeline)
    blocks = [sum(bytes_of(p) for p in block.parameters()) for block in repeated_blocks(transformer)]
    return sum(bytes_of(p) for p in transformer.parameters()) - sum(blocks) + sum(sorted(blocks)[-2:])


def optimizer_bytes(trainer: DiffusionTrainer) -> tuple[float, float]:
    """Bytes that the optimizer keeps, and that it needs more in a step, for each byte of the trained weights."""
    weight = nn.Parameter(torch.ones(_PROBE, _PROBE, dtype=trainer.student.parameters()[0].dtype))
    weight = nn.Parameter(weight.detach().to(trainer.accelerator.device))
    if trainer.optimizer is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        optimizer = kind([weight], **options)
    else:
        used = (
            trainer.optimizer.optimizer if isinstance(trainer.optimizer, AcceleratedOptimizer) else trainer.optimizer
        )
        # Copied without its constructor, whose arguments are not known.
        optimizer = object.__new__(type(used))
        optimizer.__dict__.update(used.__dict__)
        optimizer.__dict__.pop("step", None)  # a scheduler's wrapper, which is bound to the original optimizer
        optimizer.state, optimizer.param_groups = defaultdict(dict), [{**used.param_groups[0], "params": [weight]}]
    return optimizer_step_bytes(optimizer, weight)


def activation_bytes(trainer: DiffusionTrainer, device_type: str | None = None) -> int | None:
    """The bytes of activations in [`estimate_memory`]. `None` if a network's shapes depend on values."""
    base = denoiser(trainer.base_pipeline)
    args = trainer.args
    model = trainer.student.model
    checkpointing = base.is_gradient_checkpointing
    if args.activation_checkpointing:
        base.enable_gradient_checkpointing()
    device_type = device_type or trainer.accelerator.device.type
    # Teachers' forwards keep nothing for a backward, but with guidance they may have more rows than the student's.
    trained, longest = trainer.trained_scale, _longest(trainer)
    scales = {scale for task in trainer.tasks for scale in trainer.guidance_scales(task)} - {trained}
    try:
        return max(
            _of_scale(trainer, model, base, scale, device_type, longest, backward=scale == trained)
            for scale in (trained, *scales)
        )
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    finally:
        if not checkpointing and base.is_gradient_checkpointing:
            base.disable_gradient_checkpointing()


def _longest(trainer: DiffusionTrainer) -> str:
    """The longest text that a model reads of the data's first rows, with the most pictures that one of them has."""
    first, column = trainer.prompts.select(range(min(_LOOKED_AT, len(trainer.prompts)))), trainer.args.task_column
    of_text = first.remove_columns([name for name in first.column_names if name == SOURCE_IMAGES])
    texts = [trainer.readers.texts(task_of(row, column), [row]) for row in rows_of(of_text[:])]
    longest = max((text for one in texts for text in one.prompt + one.student + one.teacher), key=len)
    if not has_source_images(first):
        return longest
    # They count more than the text: each has thousands of tokens.
    return with_pictures(longest, first[most_pictured(first, range(len(first)))][SOURCE_IMAGES])


def _of_scale(
    trainer: DiffusionTrainer,
    model: nn.Module,
    base: nn.Module,
    scale: float,
    device_type: str,
    longest: str,
    backward: bool,
) -> int:
    precision, field = trainer.mixed_dtype, trainer.velocity_field
    prompts = [longest] * trainer.args.train_batch_size
    calls: list[dict[str, object]] = []

    def network(**inputs: object) -> tuple:
        # Some pipelines call the network once for the prompt and once for the empty prompt. Zeros let them go on.
        calls.append(inputs)
        _, _, (velocity,) = pass_in_shapes(model, base, [inputs], device_type, precision, backward=False)
        return (tree_map(lambda v: torch.zeros(v.shape, dtype=v.dtype, device=trainer.accelerator.device), velocity),)

    with torch.no_grad():
        x = field.initial_latents(prompts, [torch.Generator().manual_seed(0) for _ in prompts])
        field(x, float(field.levels[0]), prompts, scale, network)
    graphs = trainer.graphs_alive if backward else 1
    return step_bytes(
        model, base, calls, device_type=device_type, precision=precision, backward=backward, graphs=graphs
    )
