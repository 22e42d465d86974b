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

"""The student: which weights are trained, their moving average, and the files they are saved in."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..acceleration.sharding import forget_gathered, own_part, split_like, whole, whole_shape
from ..guards.file_modes import give_usual_mode
from ..guards.files import JSON
from ..guards.redaction import public_name, shown
from ..hub.files import ADAPTER_FILE, FULL_FILES, HIGH_NOISE_LORA_FILE, LORA_FILE, LOW_NOISE_LORA_FILE, RAW_FILE
from ..pipelines.denoiser import denoiser_name, loads_lora
from ..pipelines.experts import HIGH_NOISE, LOW_NOISE, Experts, has_experts
from .average import moving_average, step_number
from .lora_scales import LoraScales


STUDENT_ADAPTER = "default"
# diffusers' files of a pair, by the component that they are loaded into.
PAIR_FILES = {HIGH_NOISE: HIGH_NOISE_LORA_FILE, LOW_NOISE: LOW_NOISE_LORA_FILE}
_FULL_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"  # as diffusers names them

# The attention projections of the paper's released settings, by the names that diffusers gives them.
ATTENTION_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


def default_lora_config(transformer: nn.Module) -> LoraConfig:
    """
    Returns the paper's LoRA: rank 32, alpha 64, gaussian init, on those attention projections that `transformer` has.

    Raises:
        [`ValueError`]: if `transformer` has no layer of these names.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets = [target for target in ATTENTION_TARGETS if any(name.endswith("." + target) for name in names)]
    if not targets:
        raise ValueError(
            f"{type(transformer).__name__} has no attention projection by a name that diffusers uses "
            f"({', '.join(ATTENTION_TARGETS)}). Name the layers in peft_config=LoraConfig(target_modules=[...])."
        )
    return LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=targets)


class Student:
    """
    The trained weights of `model` and their exponential moving average.

    Args:
        model ([`~peft.PeftModel`] or `nn.Module`):
            A PeftModel whose adapter `default` is trained, or a whole network that is trained in full.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline the model belongs to: it writes the LoRA file that it can load again.
        ema_decay (`float` or `str`, *optional*):
            Decay of the average. `"auto"` adapts it to the length of the run; `None` or 0 keeps no average.
        ema_update_interval (`int`, *optional*, defaults to `1`):
            The average takes a step every so many updates.
        base_id (`str`, *optional*):
            The base's Hub id for `adapter_config.json`. By default, the name that the pipeline was loaded by.
        follow (`Callable`, *optional*):
            Called with this process's parts of the average, whenever they have changed.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: DiffusionPipeline,
        ema_decay: float | str | None = None,
        ema_update_interval: int = 1,
        base_id: str | None = None,
        follow: Callable[[Sequence[Tensor]], None] | None = None,
    ):
        self.model = model
        self.pipeline = pipeline
        self.base_id = base_id
        self.is_lora = isinstance(model, PeftModel)
        self._class_name = type(model).__name__  # FSDP2 gives the model a class of its own
        self.ema_decay = ema_decay
        self.ema_update_interval = ema_update_interval
        self.ema = moving_average(self.parameters(), ema_decay)
        self._follow = follow
        self._tell()

    @property
    def experts(self) -> Experts | None:
        """The two networks that the LoRA is on; `None` if it is on one."""
        network = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return network if isinstance(network, Experts) else None

    def by_expert(self, names: Iterable[str]) -> list[list[str]]:
        """The names of the parameters of each expert; an empty list if there are none."""
        if self.experts is None:
            return []
        return [[name for name in names if f".model.{expert}." in name] for expert in PAIR_FILES]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in the model's order. Don't call it between a forward and its backward."""
        forget_gathered(self.model)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def _parts(self) -> list[Tensor]:
        # The average is elementwise, so each process averages only the part of the weights that it holds.
        return [own_part(parameter) for parameter in self.parameters()]

    def named_states(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the part of the weights, and of their average, that this process holds."""
        for i, (name, parameter) in enumerate(self.named_parameters().items()):
            yield name, own_part(parameter).detach()
            if self.ema is not None:
                yield f"{name} (average)", self.ema.shadow_params[i]

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Moves the average toward the weights after update number `step` (counted from 1), if a step is due."""
        if self.ema is None or step % self.ema_update_interval:
            return
        self.ema.optimization_step = step_number(self.ema_decay, step, self.ema_update_interval)
        decay = self.ema.get_decay(self.ema.optimization_step)
        self._split_average()
        parts = self._parts()
        self.ema.to(parts[0].device)
        # Not EMAModel.step: it copies tensors that need no gradient, which is what parts look like, and it makes
        # ZeRO-3 gather whole weights.
        for average, part in zip(self.ema.shadow_params, parts, strict=True):
            average.sub_((1 - decay) * (average - part))
        self._tell()

    def _tell(self) -> None:
        if self._follow is not None and self.ema is not None:
            self._follow(self.ema.shadow_params)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Context in which the model has the averaged weights. It can be nested."""
        if self.ema is None or self.ema.temp_stored_params is not None:
            yield
            return
        self._split_average()
        self.ema.store(self._parts())
        self.ema.copy_to(self._parts())
        try:
            yield
        finally:
            self.ema.restore(self._parts())  # also forgets what was stored

    def _split_average(self) -> None:
        # The average is made before the weights are split among processes at the start of training.
        if self.ema is not None:
            pairs = zip(self.ema.shadow_params, self.parameters(), strict=True)
            self.ema.shadow_params = [split_like(average, p) for average, p in pairs]

    def whole_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """
        Gathers the weights that [`save`] writes when training splits the model: the LoRA, or all weights and buffers.
        All processes must call it; those without `keep` get nothing.
        """
        trained = self.named_parameters()
        return whole(trained if self.is_lora else self.model.state_dict(keep_vars=True), keep)

    def save(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """
        Writes the model's current weights: a LoRA in PEFT's and in diffusers' format, each with alpha; a full student
        as a diffusers model.

        Args:
            folder (`str` or `Path`): created if it does not exist.
            state_dict (`dict`, *optional*): the result of [`whole_weights`], needed where training splits the model.
        """
        os.makedirs(folder, exist_ok=True)
        model: Any = self.model
        if not self.is_lora:
            if "_name_or_path" in model.config:
                model.register_to_config(_name_or_path=public_name(model.config["_name_or_path"]))
            if state_dict is None:
                model.save_pretrained(folder)
                give_usual_mode(folder, FULL_FILES)
                return
            # Not save_pretrained: it takes the weights from the model, which holds only parts of them.
            model.save_config(folder)
            config_file = Path(folder) / model.config_name
            config = json.loads(config_file.read_text()) | {"_class_name": self._class_name}
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_torch_state_dict(state_dict, folder, filename_pattern=_FULL_PATTERN, max_shard_size="10GB")
            give_usual_mode(folder, FULL_FILES)
            return
        # Not PeftModel.save_pretrained: it also writes the teachers' adapters, and overwrites our model card.
        weights = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=STUDENT_ADAPTER, save_embedding_layers=False
        )
        weights = {name: w.detach().to("cpu").contiguous() for name, w in weights.items()}
        config = model.peft_config[STUDENT_ADAPTER]
        inference_mode, config.inference_mode = config.inference_mode, True
        config.base_model_name_or_path = self.base_id or public_name(self.pipeline.config.get("_name_or_path"))
        config.save_pretrained(folder)
        config.inference_mode = inference_mode
        save_file(weights, os.path.join(folder, ADAPTER_FILE), metadata={"format": "pt"})
        give_usual_mode(folder, ADAPTER_FILE)
        if not loads_lora(self.pipeline):
            return
        plain = {name.removeprefix("base_model.model."): w for name, w in weights.items()}
        part = denoiser_name(self.pipeline)
        for file, layers, own in self._diffusers_files(plain, config):
            metadata = _portable_metadata(own)
            type(self.pipeline).save_lora_weights(
                folder,
                weight_name=file,
                **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata},
            )
            _sort_metadata(Path(folder) / file)
            give_usual_mode(folder, file)

    def _diffusers_files(
        self, weights: dict[str, Tensor], config: LoraConfig
    ) -> Iterator[tuple[str, dict[str, Tensor], LoraConfig]]:
        """Yields name, weights and config of each of diffusers' files: one, or one for each of two experts."""
        network = self.experts
        if network is None:
            yield LORA_FILE, weights, config
            return
        for expert, file in PAIR_FILES.items():
            prefix = f"{expert}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            if own:
                yield file, own, _scales_of(network.of(expert), config.use_rslora).config(network.of(expert))

    def load_line(self, folder: str | Path) -> str:
        """
        Returns the line of Python that loads into a pipeline `pipe` of the base what [`save`] wrote. Of a pair it
        is two statements.
        """
        name, part = json.dumps(str(folder), ensure_ascii=False), denoiser_name(self.pipeline)
        if not self.is_lora:
            return f"pipe.{part} = {self._class_name}.from_pretrained({name})"
        if loads_lora(self.pipeline):
            if not has_experts(self.pipeline):
                return f"pipe.load_lora_weights({name})"
            high, low = (f'pipe.load_lora_weights({name}, weight_name="{file}"' for file in PAIR_FILES.values())
            return f"{high}); {low}, load_into_transformer_2=True)"
        return f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, {name}).merge_and_unload()"

    def save_state(self, folder: str | Path, write: bool = True) -> None:
        """
        Writes the raw weights, from which training resumes ([`save`] writes the averaged ones). All processes must
        call it; those with `write` write.
        """
        write_weights(self.named_parameters(), folder, RAW_FILE, write)

    @torch.no_grad()
    def load_state(self, folder: str | Path) -> None:
        """
        Restores weights and average from a checkpoint.

        Raises:
            [`ValueError`]: if the checkpoint's parameters are not those that the model trains.
        """
        self._take(load_file(os.path.join(folder, RAW_FILE)), self._parts(), folder)
        if self.ema is not None:
            self._split_average()
            self._take(self._read_saved(folder), self.ema.shadow_params, folder)
            self._tell()

    @torch.no_grad()
    def load_saved(self, folder: str | Path) -> None:
        """Loads what [`save`] wrote, as the weights and as the average."""
        saved = self._read_saved(folder)
        self._take(saved, self._parts(), folder)
        if self.ema is not None:
            self._split_average()
            self._take(saved, self.ema.shadow_params, folder)
            self._tell()

    def _read_saved(self, folder: str | Path) -> dict[str, Tensor]:
        if not self.is_lora:
            # A large model is saved in several files. They also hold buffers, which are not trained.
            files = sorted(Path(folder).glob(FULL_FILES))
            buffers = dict(self.model.named_buffers())
            return {name: w for file in files for name, w in load_file(file).items() if name not in buffers}
        saved = load_file(os.path.join(folder, ADAPTER_FILE))
        suffix = f".{STUDENT_ADAPTER}.weight"
        return {name.removesuffix(".weight") + suffix: w for name, w in saved.items()}

    def _take(self, source: dict[str, Tensor], targets: list[Tensor], folder: str | Path) -> None:
        """Copies whole tensors into this process's parts of the weights, or of their average."""
        own = self.named_parameters()
        if source.keys() != own.keys() or any(w.shape != whole_shape(own[name]) for name, w in source.items()):
            differing = sorted(source.keys() ^ own.keys())[:3]
            raise ValueError(
                f"{Path(folder).name} does not hold the weights that this student trains (differing: "
                f"{shown(differing or 'shapes')}). "
                "Resume with the peft_config that the run was started with."
            )
        for (name, parameter), target in zip(own.items(), targets, strict=True):
            target.copy_(split_like(source[name], parameter))


def _scales_of(network: nn.Module, use_rslora: bool) -> LoraScales:
    """Rank and alpha of the student's LoRA on a network, layer by layer."""
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and STUDENT_ADAPTER in module.r
    }
    ranks = {name: layer.r[STUDENT_ADAPTER] for name, layer in layers.items()}
    return LoraScales(ranks, {name: layer.lora_alpha[STUDENT_ADAPTER] for name, layer in layers.items()}, use_rslora)


def _sort_metadata(path: Path) -> None:
    """
    Sorts the entries of a safetensors file's metadata, so that equal weights give equal files.

    safetensors writes the entries in random order. The file's hash would then change by chance: a push would see a
    change, and a run that uses the file as a teacher would see another teacher.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "safetensors writes the same text, padded"
        file.seek(8)
        file.write(text.ljust(size))


def _portable_metadata(config: LoraConfig) -> dict[str, JSON]:
    # Only the fields that are set: an older PEFT that reads the file raises a TypeError on fields it does not know.
    fresh = LoraConfig().to_dict()
    targets = config.target_modules
    metadata = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
    }
    for name in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if config.to_dict()[name] != fresh[name]:
            metadata[name] = config.to_dict()[name]
    return json.loads(json.dumps(metadata))


def write_weights(parameters: Mapping[str, nn.Parameter], folder: str | Path, file: str, write: bool) -> None:
    """Writes weights as they are. All processes must call it; those with `write` write."""
    weights = whole(parameters, keep=write)
    if write:
        save_file(weights, os.path.join(folder, file), metadata={"format": "pt"})
        give_usual_mode(folder, file)


def frozen_copy(transformer: nn.Module) -> nn.Module:
    """
    Returns a frozen copy of `transformer`. Where the student is trained in full, LoRA teachers and the base itself are
    computed on this copy.
    """
    return copy.deepcopy(transformer).requires_grad_(False).eval()
