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
"""Finding the files of a teacher, locally or on the Hub, and reading them strictly."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from .hub_errors import download, listing
from .lora_layouts import DIFFERENCE_KEY, LORA_KEY, LYCORIS_KEY, convert, layout_of, some
from .pipeline_view import base_weight
from .quantization import plain_tensors
from .teacher_specs import TeacherConfig, TeacherError, local_folder


logger = logging.get_logger(__name__)

# The keys of a PeftModel, which this package uses throughout; files may have them or not.
PEFT_PREFIX = "base_model.model."

# LoraConfig fields that change neither the function of the adapter nor what it consists of beyond lora_A and lora_B, or
# that PEFT applies from the config alone. Any other field that differs from its default is refused, since parts of such
# an adapter would be dropped or its base changed.
_SUPPORTED_FIELDS = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout", "init_lora_weights", "inference_mode", "task_type",
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "megatron_core", "loftq_config",
    "qalora_group_size", "runtime_config",
}  # fmt: skip

# Initialisations that move part of the base's weights into the adapter: the adapter is then right on no other base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class TeacherFiles:
    """
    Where a teacher lies and where it came from.

    Attributes:
        kind: `"peft"` and `"diffusers"` are LoRAs, `"full"` is a whole transformer.
        folder: Local folder that holds the files.
        names: The files that define the teacher, relative to `folder`.
        source: Hub id or the name of the local folder; never a path.
        subfolder: As given by the user.
        revision: Commit on the Hub; `None` for a local folder.
    """

    kind: Literal["peft", "diffusers", "full"]
    folder: Path
    names: tuple[str, ...]
    source: str
    subfolder: str | None
    revision: str | None

    @property
    def label(self) -> str:
        """How messages call this teacher."""
        # A file that is not named as its kind's always are.
        name = self.names[0] if self.kind == "diffusers" and self.names[0] != LORA_WEIGHT_NAME_SAFE else None
        return "/".join(filter(None, (self.source, self.subfolder, name)))

    def sha256(self) -> str:
        """
        SHA-256 over the teacher's files: of a single file its own hash (the one the Hub shows), of several that of the
        listing `sha256sum` would print, because a LoRA's alpha lies in its config and belongs to the teacher.
        """
        digests = []
        for name in self.names:
            with open(self.folder / name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if len(digests) == 1:
            return digests[0]
        listing = "".join(f"{digest}  {name}\n" for digest, name in zip(digests, self.names, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()


def find_files(config: TeacherConfig) -> TeacherFiles:
    """
    Resolves a parsed teacher (not `"base"`) to local files, downloading what is needed and no more.

    Raises:
        TeacherError: If the folder, repository, revision or files do not exist, cannot be reached, or are pickles.
    """
    prefix = f"{config.subfolder.strip('/')}/" if config.subfolder else ""
    local = local_folder(config)
    if local is not None:
        source, revision, folder = local.resolve().name, None, local / prefix
        if config.revision is not None:
            raise TeacherError(f"{source}: a local folder has no revision ({config.revision!r} was asked for)")
        if not folder.is_dir():
            raise TeacherError(f"{source}: there is no folder {config.subfolder!r} in it")
    else:
        source = config.model_name_or_path
        # Configs first: they decide which of a repository's often very large weights are this teacher's.
        indices = [CONFIG_NAME, "model_index.json", "config.json", SAFE_WEIGHTS_INDEX_NAME]
        configs = indices + [f"transformer/{name}" for name in ("config.json", SAFE_WEIGHTS_INDEX_NAME)]
        snapshot = _download(config, config.revision, [prefix + name for name in configs])
        revision, folder = snapshot.name, snapshot / prefix
    label = f"{source}/{config.subfolder}" if config.subfolder else source

    kind: Literal["peft", "diffusers", "full"] = "diffusers"
    names: tuple[str, ...]
    # The weights of a PEFT folder or a transformer are these with the config beside them, also where they are named.
    if (folder / CONFIG_NAME).is_file() and config.weight_name in (None, PEFT_WEIGHTS_NAME):
        kind, names = "peft", (CONFIG_NAME, PEFT_WEIGHTS_NAME)
    elif any((folder / name).is_file() for name in ("model_index.json", "config.json")) and config.weight_name in (
        None,
        SAFETENSORS_WEIGHTS_NAME,
    ):
        if (folder / "model_index.json").is_file():
            prefix, folder = f"{prefix}transformer/", folder / "transformer"
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        weights = _shards(index, label) if index.is_file() else [SAFETENSORS_WEIGHTS_NAME]
        kind, names = "full", ("config.json", *weights)
    elif config.weight_name is not None:
        names = (config.weight_name,)
    else:
        names = (_lora_file(config, revision, folder, prefix, label),)

    if local is None and not all((folder / name).is_file() for name in names):
        _download(config, revision, [prefix + name for name in names])
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise TeacherError(
                f"{label}: holds {', '.join(pickles)} but no {', '.join(missing)}. Pickled weights are not read; convert "
                'them where you trust them: safetensors.torch.save_file(torch.load("'
                f'{pickles[0]}", weights_only=True), "{missing[0]}")'
            )
        raise TeacherError(
            f"{label}: has no {', '.join(missing)}. A teacher is a PEFT folder ({CONFIG_NAME}, {PEFT_WEIGHTS_NAME}), a "
            f"LoRA's file ({LORA_WEIGHT_NAME_SAFE}, a folder's only other one, or weight_name=), a transformer (config.json) or "
            "a pipeline (model_index.json), all with .safetensors weights. Check the subfolder and the revision."
        )
    return TeacherFiles(kind, folder, names, source, config.subfolder, revision)


def _shards(index: Path, label: str) -> list[str]:
    shards = _read_json(index, label).get("weight_map")
    if not (isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())):
        raise TeacherError(f"{label}: {index.name} has no weight_map, which says in which file each weight is")
    return sorted(set(shards.values()))


def _lora_file(config: TeacherConfig, revision: str | None, folder: Path, prefix: str, label: str) -> str:
    """The name of the LoRA's file in a folder: diffusers' own, else that of the only `.safetensors` file there."""
    is_local = local_folder(config) is not None
    if not is_local:
        _download(config, revision, [prefix + LORA_WEIGHT_NAME_SAFE])
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        return LORA_WEIGHT_NAME_SAFE
    if is_local:
        there = [path.name for path in folder.glob("*.safetensors")]
    else:
        there = listing(_shown(config), config.model_name_or_path, revision, folder, prefix, TeacherError)
    names = sorted(name for name in there if name.endswith(".safetensors") and "/" not in name)
    if len(names) > 1:
        raise TeacherError(
            f"{label}: has several files ({some(names)}). Say which one: name it at the end of the path, or with weight_name=."
        )
    return names[0] if names else LORA_WEIGHT_NAME_SAFE


def _shown(config: TeacherConfig) -> str:
    return f"{config.model_name_or_path}@{config.revision}" if config.revision else config.model_name_or_path


def _download(config: TeacherConfig, revision: str | None, names: list[str]) -> Path:
    return download(_shown(config), config.model_name_or_path, revision, names, TeacherError)


def _read_json(path: Path, label: str) -> dict[str, Any]:
    return _parse_json(path.read_bytes(), f"{label}: {path.name}")


def _parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise TeacherError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise TeacherError(f"{what} is a JSON {type(parsed).__name__}; an object is needed")
    return parsed


def read_lora(
    pipeline: DiffusionPipeline, config: TeacherConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor], TeacherFiles]:
    """
    Reads a LoRA in PEFT's or diffusers' format.

    Args:
        pipeline (`DiffusionPipeline`):
            The base. Its class knows how to convert the key layouts of other trainers.
        config ([`TeacherConfig`]):
            As `parse_teacher` returns it.

    Returns:
        The `LoraConfig`, the tensors on the CPU in the file's own dtype under PEFT's keys
        (`base_model.model.<module>.lora_A.weight`), and where they came from.

    Raises:
        TeacherError: If it is not a LoRA, is damaged, or holds what would be dropped (text encoders,
            `modules_to_save`, DoRA, biases).
    """
    if config.model_name_or_path == "base":
        raise TeacherError('"base" is the base model, not a LoRA')
    files = find_files(config)
    if files.kind == "full":
        raise TeacherError(f"{files.label}: a LoRA is needed here, and this is a whole transformer")
    return *read_lora_files(files, pipeline), files


def read_lora_files(files: TeacherFiles, pipeline: DiffusionPipeline) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The part of [`read_lora`] after the files are found. Same results and errors."""
    with _readable(files):
        raw, metadata = _load(files)
        if files.kind == "peft":
            config, tensors = _read_peft(files, raw, pipeline)
        else:
            config, tensors = _read_diffusers(files, raw, metadata, pipeline)
        _check_tensors(files, tensors)
    return config, {PEFT_PREFIX + key: value for key, value in tensors.items()}


@contextmanager
def _readable(files: TeacherFiles) -> Iterator[None]:
    """A stranger's file can make the libraries that read it fail in any way: whatever they raise says which teacher it was."""
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:
        names = " and ".join(files.names) if len(files.names) < 3 else "its files"
        raise TeacherError(f"{files.label}: cannot read {names} ({type(error).__name__}: {error})") from error


def _load(files: TeacherFiles) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a LoRA's file, in a dtype that can be computed in, and its metadata."""
    label = files.label
    path = files.folder / files.names[-1]
    try:
        with safe_open(path, "pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            if not any(LORA_KEY.search(key) or LYCORIS_KEY.search(key) or "lora" in key for key in keys):
                raise TeacherError(
                    f"{label}: {path.name} is no LoRA: none of its {len(keys)} tensors is a LoRA's (they are {some(keys)}). A "
                    "whole transformer is given as the folder that save_pretrained() makes; one in a single file is loaded "
                    "with from_single_file() first."
                )
        raw = load_file(path, device="cpu")
    except SafetensorError as error:
        raise TeacherError(f"{label}: {path.name} is not a readable safetensors file ({error})") from error
    if encoders := [key for key in raw if key.startswith(("text_encoder", "lora_te"))]:
        raise TeacherError(
            f"{label}: {path.name} also adapts text encoders ({some(encoders)}), which would be dropped: only the "
            "transformer is distilled. Use a teacher that was trained with frozen text encoders."
        )
    # diffusers filters these keys out of a file with a warning; without them it is another adapter.
    if dora := [key for key in raw if "dora_scale" in key or "lora_magnitude_vector" in key]:
        raise TeacherError(
            f"{label}: is a DoRA ({some(dora)}), which is not supported. Merge it into a full transformer."
        )
    # Nothing computes in 8 bits; bfloat16 holds all of their values.
    raw = {k: v.bfloat16() if v.is_floating_point() and v.itemsize == 1 else v for k, v in raw.items()}
    # Differences of zeros, as ComfyUI's extraction writes them for norms, change nothing.
    raw = {key: value for key, value in raw.items() if not DIFFERENCE_KEY.search(key) or value.any()}
    if other := [key for key in raw if not LORA_KEY.search(key)]:
        what = "LyCORIS's (LoKr, LoHa or OFT)" if any(LYCORIS_KEY.search(key) for key in other) else "no LoRA matrices"
        raise TeacherError(
            f"{label}: {path.name} holds tensors that are {what} and would be dropped: {some(other)}. Merge the whole file into "
            "its base with a program that knows it, and use the full transformer as the teacher."
        )
    whole = [key for key, value in raw.items() if not (value.is_floating_point() or key.endswith(".alpha"))]
    if whole:
        raise TeacherError(
            f"{label}: {path.name} holds {raw[whole[0]].dtype} in {some(whole)}. Save it in a floating-point dtype."
        )
    return raw, metadata


def _read_peft(
    files: TeacherFiles, raw: dict[str, torch.Tensor], pipeline: DiffusionPipeline
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    label = files.label
    config = _lora_config(_read_json(files.folder / CONFIG_NAME, label), label)
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in raw.items()}
    if len(tensors) < len(raw):
        twice = [key for key in raw if PEFT_PREFIX + key in raw]
        raise TeacherError(f"{label}: {some(twice)} is in it twice, with and without {PEFT_PREFIX!r} before it.")
    if layout_of(tensors) is None:
        return config, tensors
    # Some trainers (diffusion-pipe) save PEFT's config beside ComfyUI's keys. Whoever reads such a file goes by its keys alone.
    converted, alphas = convert(tensors, pipeline, label)
    if alphas or config.use_rslora or config.alpha_pattern or config.rank_pattern or config.lora_alpha != config.r:
        raise TeacherError(
            f"{label}: its {CONFIG_NAME} is PEFT's, with lora_alpha={config.lora_alpha} and r={config.r}, and its keys are not: "
            f"whether they were meant to be scaled is unclear. Save it with PEFT or diffusers."
        )
    return _infer_config(converted, {}, label), converted


def _read_diffusers(
    files: TeacherFiles, raw: dict[str, torch.Tensor], metadata: dict[str, str], pipeline: DiffusionPipeline
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    label, name = files.label, files.names[-1]
    tensors, alphas = convert(raw, pipeline, label)
    stored = _parse_json(metadata.get(LORA_ADAPTER_METADATA_KEY) or "{}", f"{label}: the metadata of {name}")
    if any(key.startswith("transformer.") for key in stored):
        # The options of text encoders lie beside them.
        stored = {k.removeprefix("transformer."): v for k, v in stored.items() if k.startswith("transformer.")}
    if not stored:
        return _infer_config(tensors, alphas, label), tensors
    if any(key.endswith(".alpha") for key in raw):
        raise TeacherError(f"{label}: has alpha both in its metadata and as tensors; which one counts is unclear")
    if "r" not in stored:
        raise TeacherError(f"{label}: the metadata of {name} is not of a LoRA: it has {', '.join(stored)}, but no r.")
    return _lora_config(stored, label), tensors


def _check_tensors(files: TeacherFiles, tensors: dict[str, torch.Tensor]) -> None:
    label, name = files.label, files.names[-1]
    if other := [key for key in tensors if not re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", key)]:
        raise TeacherError(
            f"{label}: {name} holds tensors that are no LoRA matrices ({some(other)}) and would be dropped. Load "
            "it with the library it was made with and save it with PEFT or diffusers."
        )
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise TeacherError(f"{label}: {name} holds NaN or infinite values in {some(bad)}")
    for side in "AB":
        # Either side zero makes every product zero, and the teacher silently equal to the base.
        if not any(value.any() for key, value in tensors.items() if f".lora_{side}." in key):
            raise TeacherError(
                f"{label}: every lora_{side} of {name} is zero, so this teacher is the base model. Was it saved before "
                'training? If the base is meant, say "base".'
            )


def _lora_config(stored: dict[str, Any], label: str) -> LoraConfig:
    peft_type = stored.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise TeacherError(f"{label}: is a PEFT adapter of type {peft_type}; only LORA is supported")
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(set(stored) - known):
        # As PEFT itself does with the fields of its other versions; what they may add to the file is refused by key.
        logger.warning(f"{label}: the installed PEFT does not know the LoRA options {unknown}; they are ignored.")
    try:
        config = LoraConfig(**{key: value for key, value in stored.items() if key in known})
    except Exception as error:  # as above
        raise TeacherError(f"{label}: PEFT does not accept its LoRA config ({error})") from error
    if config.use_dora:
        raise TeacherError(
            f"{label}: is a DoRA (use_dora=True), which is not supported. Merge it into a full transformer."
        )
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    # An empty list, dict or string says the same as None.
    changed = [
        key for key in values if key not in _SUPPORTED_FIELDS and (values[key] or None) != (defaults[key] or None)
    ]
    if changed:
        shown = ", ".join(f"{key}={values[key]!r}" for key in changed)
        raise TeacherError(
            f"{label}: its LoRA config has {shown}, which goes beyond lora_A and lora_B and would be dropped. Merge the "
            "adapter into its base and use the full transformer as the teacher."
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise TeacherError(
            f"{label}: was initialised with {init!r}, which changes the base's own weights, and so fits no base shared by "
            "several teachers. Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if 0 in (config.lora_alpha, *config.alpha_pattern.values()):
        raise TeacherError(
            f"{label}: its LoRA config has an alpha of 0, which makes the teacher the base where it counts."
        )
    config.init_lora_weights = True
    config.task_type = None
    return config


def _infer_config(tensors: dict[str, torch.Tensor], alphas: dict[str, float], label: str) -> LoraConfig:
    """Rank from the shapes; alpha from its tensors, else the rank (scale 1), which is how diffusers reads such files."""
    suffix = ".lora_B.weight"
    ranks = {key.removesuffix(suffix): value.shape[1] for key, value in tensors.items() if key.endswith(suffix)}
    if not ranks:
        raise TeacherError(f"{label}: holds no lora_B (its keys are like {some(list(tensors))})")
    alphas = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha: Any = Counter(alphas.values()).most_common(1)[0][0]  # an int to PEFT's types, a float to its arithmetic
    # PEFT lets a name also mean everything that ends with it; "^" and the regular expression mean the module alone.
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(re.escape(module) for module in sorted(ranks)),
        rank_pattern={f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(module)}": a for module, a in alphas.items() if a != alpha},
    )


def read_transformer(files: TeacherFiles, base: ModelMixin) -> nn.Module:
    """
    Loads a whole transformer, frozen, in the dtype of the base and on its device.

    Raises:
        TeacherError: If its class or config differs from the base's, or a weight is missing, left over, of another
            shape or not finite.
    """
    with _readable(files):
        return _load_transformer(files, base)


def _load_transformer(files: TeacherFiles, base: ModelMixin) -> nn.Module:
    label = files.label
    cls: Any = type(base)  # the config half of a diffusers model is not in ModelMixin's type
    stored = _read_json(files.folder / "config.json", label)
    if stored.get("_class_name") != cls.__name__:
        raise TeacherError(
            f"{label}: its config.json is of class {stored.get('_class_name')!r} and the base's transformer is a "
            f"{cls.__name__!r}. A full teacher needs the class of the base."
        )
    with torch.device("meta"):
        # The class fills in the options that an older config.json does not name.
        theirs = json.loads(cls.from_config(cls.load_config(files.folder)).to_json_string())
    ours = json.loads(base.to_json_string())
    # The base may be quantized where the teacher is not; what it computes is the same.
    names = sorted(key for key in {*ours, *theirs} - {"quantization_config"} if not key.startswith("_"))
    if differing := [key for key in names if ours.get(key) != theirs.get(key)]:
        shown = ", ".join(f"{key} {theirs.get(key)!r} (base {ours.get(key)!r})" for key in differing)
        raise TeacherError(f"{label}: made for another base: {shown}")
    try:
        model, info = cls.from_pretrained(
            files.folder, dtype=base_weight(base).dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise TeacherError(f"{label}: its weights do not load ({error})") from error
    if wrong := {key: value for key, value in info.items() if value}:
        raise TeacherError(f"{label}: its weights do not fit its config: {wrong}")
    if bad := [key for key, value in model.named_parameters() if not _is_finite(value)]:
        raise TeacherError(f"{label}: holds NaN or infinite values in {some(bad)}")
    return model.to(base.device).requires_grad_(False).eval()


def _is_finite(weight: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part.float()).all()) for part in plain_tensors(weight))
