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

"""The peak memory of training, from shapes alone: nothing is allocated and no network runs."""

import functools
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Trainer

from ..acceleration.compilation import repeated_blocks
from ..acceleration.quantization import base_weight, plain_tensors, quantized_layers, scales, weight_kind
from ..pipelines.view import StandIn, exchanged_forward


if TYPE_CHECKING:
    from ..trainer.base_trainer import DiffusionTrainer

# Rows of the data among which the longest prompt is looked for.
_LOOKED_AT = 1000
# Side of the square weight on which an optimizer shows what it keeps: above the size from which 8-bit ones are 8-bit.
_PROBE = 1024


def estimate_memory(
    trainer: "DiffusionTrainer", *, device_type: str | None = None, shards: int = 1
) -> dict[str, dict[str, Any]]:
    """
    The peak memory of training by part, in bytes, on one process's device.

    Weights are counted. Activations are those of the student's forward and backward on one micro-batch of the data's
    longest prompt, from shapes alone: a network of any size is estimated in seconds, also where it would not fit. An
    optimizer is asked what it keeps of a small weight. Not counted: what the allocator rounds up and keeps, kernels'
    workspaces, the CUDA context (some .5 GiB), DDP's buckets, the decoder's activations in evaluations, reward models.

    Args:
        trainer ([`DiffusionOPDTrainer`] or another of this package)
        device_type (`str`, *optional*):
            `"cuda"` for what mixed precision keeps there (layer norms are float32), `"cpu"` for what it keeps here; that of
            the trainer if not given.
        shards (`int`, *optional*, defaults to 1):
            Processes that share the student's network and its optimizer, under FSDP2. Two of its blocks are whole at a time,
            what is outside of the blocks, and the gradients.

    Returns:
        `dict`: by part `{"dtype", "bytes", "how"}`; the last one is `"peak"`, whose `"how"` names what happens then.
    """
    student = trainer.student.parameters()
    dtypes = {p.dtype for p in student}
    rows, elsewhere = _weights(trainer)
    if shards > 1:
        rows["gathered"] = _row(_gathered(trainer), dtypes, "counted: two blocks at a time and what is outside")
        for name in ("transformer", "student", "moving average"):
            if name in rows:
                rows[name]["bytes"] //= shards
    trained = sum(p.nbytes for p in student)
    state, temporary = optimizer_bytes(trainer)
    # FSDP2 splits them in the update's last backward.
    rows["gradients"] = _row(trained, dtypes, "as the student" if shards == 1 else "as the student, whole")
    rows["optimizer"] = _row(round(state * trained) // shards, set(), f"{state:.2f} bytes a byte of the student")
    resident = sum(row["bytes"] for row in rows.values())
    activations = activation_bytes(trainer, device_type)
    how = "from shapes: forward and backward of a micro-batch"
    if activations is None:
        how = "not estimated: the network's shapes depend on values"
    rows["activations"] = _row(activations or 0, set(), how)
    moments = {
        "the student's backward": resident + (activations or 0),
        "the optimizer's step": resident + round(temporary * trained) // shards,
        "encoding prompts": resident + sum(row["bytes"] for name, row in elsewhere.items() if name != "vae"),
        "decoding images": resident + sum(row["bytes"] for name, row in elsewhere.items() if name == "vae"),
    }
    moment = max(moments, key=lambda name: moments[name])
    without = " and activations" if activations is None else ""
    return {
        **elsewhere,
        **rows,
        "peak": _row(moments[moment], set(), f"estimate: at {moment}{without and ', without activations'}"),
    }


def _row(size: int, dtypes: set[torch.dtype], how: str) -> dict[str, Any]:
    return {"dtype": ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)), "bytes": size, "how": how}


# Weights


def _weights(trainer: "DiffusionTrainer") -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows of what is always on the device, and of what `offload_encoders` keeps in host memory between uses."""
    student, frozen = trainer.student.parameters(), trainer._frozen_parts()
    taken = {id(tensor) for tensor in itertools.chain(student, *frozen.values())}
    components: dict[str, Any] = trainer._pipeline.components
    rows, elsewhere = {}, {}
    for name, component in components.items():
        if not isinstance(component, nn.Module):
            continue
        own = [*component.parameters(), *component.buffers(), *scales(component)]
        tensors = [tensor for tensor in own if id(tensor) not in taken]
        if any(component is other for other in trainer._offload.modules):
            elsewhere[name] = _row_of(tensors, "counted: on the device while it is used")
        elif tensors:
            rows[name] = _row_of(tensors, "counted")
    rows["student"] = _row_of(student, "counted")
    rows |= {name: _row_of(tensors, "counted") for name, tensors in frozen.items() if tensors}
    if trainer.student.ema is not None:
        rows["moving average"] = _row_of(trainer.student.ema.shadow_params, "counted")
    return rows, elsewhere


def _row_of(tensors: Sequence[Tensor], how: str) -> dict[str, Any]:
    return _row(sum(map(bytes_of, tensors)), {part.dtype for t in tensors for part in plain_tensors(t)}, how)


def bytes_of(tensor: Tensor) -> int:
    """Bytes that a tensor holds; of a quantised one, those of its parts."""
    return sum(part.nbytes for part in plain_tensors(tensor))


def _gathered(trainer: "DiffusionTrainer") -> int:
    transformer: Any = trainer._pipeline.components["transformer"]
    blocks = [sum(bytes_of(p) for p in block.parameters()) for block in repeated_blocks(transformer)]
    return sum(bytes_of(p) for p in transformer.parameters()) - sum(blocks) + sum(sorted(blocks)[-2:])


def optimizer_bytes(trainer: "DiffusionTrainer") -> tuple[float, float]:
    """What the optimizer keeps, and what it needs besides in a step: in bytes, for a byte of the trained weights."""
    weight = nn.Parameter(torch.ones(_PROBE, _PROBE, dtype=trainer.student.parameters()[0].dtype))
    weight = nn.Parameter(weight.detach().to(trainer.accelerator.device))
    if trainer.optimizer is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        optimizer = kind([weight], **options)
    else:
        used = (
            trainer.optimizer.optimizer if isinstance(trainer.optimizer, AcceleratedOptimizer) else trainer.optimizer
        )
        # Not by its constructor, which need not take all that it keeps.
        optimizer = object.__new__(type(used))
        optimizer.__dict__.update(used.__dict__)
        optimizer.__dict__.pop("step", None)  # a schedule's, which is bound to the other one
        optimizer.state, optimizer.param_groups = defaultdict(dict), [{**used.param_groups[0], "params": [weight]}]
    live = Live()
    for step in range(2):  # the first one makes the states
        weight.grad = torch.ones_like(weight)
        with live if step else nullcontext():
            optimizer.step()
    kept = sum(bytes_of(value) for value in tree_leaves(optimizer.state_dict()["state"]) if isinstance(value, Tensor))
    return kept / weight.nbytes, live.peak / weight.nbytes


# Activations


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still there: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leaves tensors out that were there before: their views would be taken for new ones."""
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return output

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


# Autocast's list of what is computed in float32 is longer on CUDA than on the CPU; these have the large outputs.
_FLOAT32_ON_CUDA: tuple[tuple[Any, str], ...] = (
    (nn.functional, "layer_norm"),
    (nn.functional, "group_norm"),
    (nn.functional, "softmax"),
    (torch, "softmax"),
    (Tensor, "softmax"),
)


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """
    What autocast computes in float32 on CUDA is so within it.

    The functions are exchanged: a `TorchFunctionMode` is off while `backward` runs, in which checkpointing repeats forwards.
    """

    def of(function: Any) -> Any:
        @functools.wraps(function)
        def float32(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(_float32, (args, kwargs))
            return function(*args, **kwargs)

        return float32

    with ExitStack() as stack:
        for owner, name in _FLOAT32_ON_CUDA:
            original = getattr(owner, name)
            if name in vars(owner):
                stack.callback(setattr, owner, name, original)
            else:  # a tensor's is inherited
                stack.callback(delattr, owner, name)
            setattr(owner, name, of(original))
        yield


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


class _Dequantizing(torch.autograd.Function):
    """
    A linear layer on frozen weights that are dequantised as a whole for each product with them. One that `keeps` its inputs does
    so where checkpointing cannot let go of them, as bitsandbytes' 8 bits do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None, keeps: bool) -> Tensor:
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.inputs = x if keeps else None
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient.to(ctx.dtype) @ gradient.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


@contextmanager
def _kernels_in_shapes(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Within it quantised layers compute with shapes what their kernels do: in memory, what they make and what they keep."""

    def kernel(layer: Any) -> Callable[[Tensor], Tensor]:
        kind, shape = weight_kind(layer.weight), (layer.out_features, layer.in_features)

        def bitsandbytes(x: Tensor) -> Tensor:
            inner = x.to(layer.compute_dtype) if kind == "4bit" and layer.compute_dtype is not None else x
            return _Dequantizing.apply(inner, shape, layer.bias, kind == "8bit").to(x.dtype)

        def torchao(x: Tensor) -> Tensor:
            # Operations of PyTorch, of which the product keeps the dequantised weight for its backward.
            product = torch.mm(x.reshape(-1, shape[1]), x.new_empty(shape).t()) * x.new_empty(shape[0])
            product = product.reshape(*x.shape[:-1], shape[0])
            return (product if layer.bias is None else product + layer.bias).to(x.dtype)

        return torchao if kind == "torchao" else bitsandbytes

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(exchanged_forward(layer, kernel(layer)))
        yield


class _Step(nn.Module):
    """A forward of `model` for each call that the pipeline makes, and the backward of all: one module for `functional_call`,
    so that checkpointing, which repeats forwards within the backward, sees the same weights again."""

    def __init__(self, model: nn.Module, base: nn.Module):
        super().__init__()
        self.model: nn.Module = model
        self.__dict__["base"] = base  # not registered: its weights would be put back twice, the second time as shapes

    def forward(self, calls: Sequence[Mapping[str, Any]], backward: bool, live: Live) -> Any:
        with live, torch.set_grad_enabled(backward):
            velocities = [StandIn(self.model, self.__dict__["base"])(**inputs)[0] for inputs in calls]
            if backward:
                torch.stack([v.square().mean() for v in tree_leaves(velocities)]).sum().backward()
        return velocities


def step_bytes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    *,
    device_type: str = "cuda",
    precision: torch.dtype | None = None,
    backward: bool = True,
) -> int:
    """
    The most bytes that a forward and backward of `model` hold at once, beside weights, gradients and inputs.

    Args:
        model (`nn.Module`): the network, on any device, `meta` too; with checkpointing if it is on.
        base (`nn.Module`): the network without LoRAs: `model` itself, or what is within the [`~peft.PeftModel`].
        calls (`list[dict]`): the inputs of each of the forwards, on any device: their shapes are what counts.
        device_type (`str`, *optional*, defaults to `"cuda"`): where it would run.
        precision (`torch.dtype`, *optional*): of mixed precision, if it is on.
        backward (`bool`, *optional*, defaults to `True`): without it, that of forwards without gradients.
    """
    return _in_shapes(model, base, calls, device_type, precision, backward)[0]


def _in_shapes(
    model: nn.Module,
    base: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    device_type: str,
    precision: torch.dtype | None,
    backward: bool,
) -> tuple[int, Any]:
    shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        # On the CPU wherever it would run: its fused attention stands for the GPU's, whose kernels need one.
        if not isinstance(value, Tensor):
            return value
        with shapes:
            return torch.empty(value.shape, dtype=value.dtype, device="cpu").requires_grad_(value.requires_grad)

    step, live = _Step(model, base), Live()
    state = {name: fake(tensor) for name, tensor in [*step.named_parameters(), *step.named_buffers()]}
    quantized = list(quantized_layers(step))
    for name, layer in quantized:
        with shapes:  # as if they were not, for what looks at a weight
            state[f"{name}.weight"] = torch.empty(layer.out_features, layer.in_features, dtype=base_weight(base).dtype)
    inputs = tree_map(fake, [dict(call) for call in calls])
    known = [*state.values(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    for tensor in state.values():
        if tensor.requires_grad and backward:
            with shapes:  # gradients are there from the first micro-batch on
                tensor.grad = torch.empty_like(tensor)
            known.append(tensor.grad)
    live.ignore(known)
    with ExitStack() as modes:
        modes.enter_context(shapes)
        modes.enter_context(_kernels_in_shapes([layer for _, layer in quantized]))
        if device_type == "cuda":
            modes.enter_context(_as_on_cuda())
        if precision is not None:
            modes.enter_context(torch.autocast("cpu", precision))
        velocities = functional_call(step, state, (inputs, backward, live))
    return live.peak, velocities


def activation_bytes(trainer: "DiffusionTrainer", device_type: str | None = None) -> int | None:
    """The activations' part of [`estimate_memory`]; `None` where a network cannot be followed by shapes alone."""
    base: Any = trainer._pipeline.components["transformer"]
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    checkpointing = base.is_gradient_checkpointing
    if args.activation_checkpointing:
        base.enable_gradient_checkpointing()
    device_type = device_type or trainer.accelerator.device.type
    # Teachers' forwards keep nothing, but may have more rows than a student without guidance.
    trained = trainer._trained_scale()
    scales = {scale for task in trainer.tasks for scale in trainer._guidance_scales(task)} - {trained}
    try:
        return max(
            _of_scale(trainer, model, base, scale, device_type, backward=scale == trained)
            for scale in (trained, *scales)
        )
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    finally:
        if not checkpointing and base.is_gradient_checkpointing:
            base.disable_gradient_checkpointing()


def _of_scale(
    trainer: "DiffusionTrainer", model: nn.Module, base: nn.Module, scale: float, device_type: str, backward: bool
) -> int:
    precision, field, data = trainer.mixed_dtype, trainer.velocity_field, trainer.train_dataset
    longest = max(data[: min(len(data), _LOOKED_AT)]["prompt"], key=len)
    prompts = [longest] * trainer.args.train_batch_size
    calls: list[dict[str, Any]] = []

    def network(**inputs: Any) -> Any:
        # Some pipelines guide with a call each for prompt and empty prompt: an answer lets them come to the second.
        calls.append(inputs)
        _, (velocity,) = _in_shapes(model, base, [inputs], device_type, precision, backward=False)
        return (tree_map(lambda v: torch.zeros(v.shape, dtype=v.dtype, device=trainer.accelerator.device), velocity),)

    with torch.no_grad():
        x = field.initial_latents(prompts, [torch.Generator().manual_seed(0) for _ in prompts])
        field(x, float(field.levels[0]), prompts, scale, network)
    return step_bytes(model, base, calls, device_type=device_type, precision=precision, backward=backward)
