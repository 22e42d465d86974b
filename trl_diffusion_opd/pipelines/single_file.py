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
Reads single files (`.safetensors`) that hold a whole network, or a whole pipeline, in the layout of other programs.
diffusers converts the names; here is what it leaves open: which part of a file is the network, and whether all of it was
taken.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders import FromOriginalModelMixin, FromSingleFileMixin
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from ..guards.files import JSON
from ..guards.redaction import shown
from ..hub.errors import download, explained, retried
from ..problems import Refusal
from .denoiser import denoiser_name_in


SUFFIX = ".safetensors"
# How a file names its denoising network. A file of that network alone may have no prefix.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
# How it names the rest of the pipeline.
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "model_ema.")
# What converters raise for files that they were not written for.
_CONVERTERS_ERRORS = (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError)
_ADVICE = (
    "Name a folder or a repository in diffusers' layout whose architecture the file has: "
    'model_init_kwargs={"config": "folder"}.'
)
_NOT_WHOLE = re.compile(r"lora|lycoris|hada_|lokr_|oft_|\.dora|\.diff(_b)?$|\.alpha$|ia3")
_LAYER = re.compile(r"\.\d+\..*\.weight$")


def is_whole(path: Path) -> bool:
    """Whether a file holds a whole network, and not a LoRA or another change of one. Its names decide."""
    try:
        names = _shapes(path)
    except SafetensorError:
        return False
    return not any(map(_NOT_WHOLE.search, names)) and any(map(_LAYER.search, names))


def read_network(
    path: Path, network: type[ModelMixin], config: str, subfolder: str | None, dtype: torch.dtype
) -> ModelMixin:
    """
    Reads the denoising network of a file.

    Args:
        path (`Path`): the file.
        network (`type`): class of the network.
        config (`str`), subfolder (`str`, *optional*): the folder, or the repository and the folder in it, with the
            network's `config.json`.
        dtype (`torch.dtype`): of the network.

    Raises:
        [`Refusal`]: if diffusers has no converter for the class, or if a tensor of the network is missing in the file
            or left over.
    """
    if not issubclass(network, FromOriginalModelMixin):
        raise Refusal(f"diffusers reads no single files of a {network.__name__}. Give a folder in diffusers' layout.")
    shapes = _shapes(path)
    names = _own_names(shapes)
    if not names:
        raise Refusal(f"{path.name} holds no denoising network: its tensors are {_some(shapes)}.")
    with safe_open(path, "pt") as file:
        tensors = {ours: file.get_tensor(theirs) for theirs, ours in names.items()}
    try:
        model = network.from_single_file(tensors, config=config, subfolder=subfolder, dtype=dtype)
    except _CONVERTERS_ERRORS as error:
        raise _misfit(path, network, config, error) from error
    _check_complete(path, model, [math.prod(shapes[name]) for name in names])
    return model


def load_single_file(
    name: str, options: Mapping[str, JSON], model_config: str | None, revision: str | None
) -> DiffusionPipeline:
    """
    Loads a pipeline from a file.

    A file with encoders or an autoencoder is read as a whole, and the text encoders that it lacks come from
    `model_config`. For one with the denoising network alone, all the rest does.

    Args:
        name (`str`): the file, or `owner/repo[/sub/folder]/file.safetensors` on the Hub.
        options (`dict`): arguments of `from_pretrained`.
        model_config (`str`, *optional*): a folder or a Hub id in diffusers' layout whose configs the file has. By
            default the one that diffusers knows for such a file.
        revision (`str`, *optional*): branch, tag or commit of the file on the Hub.

    Raises:
        [`Refusal`]: if file or config cannot be had, or do not fit.
    """
    path = _local_file(name, revision)
    dtype = options["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise Refusal("model_init_kwargs: a single file has one dtype, so give no dict of them.")
    try:
        shapes = _shapes(path)
    except SafetensorError as error:
        raise Refusal(f"The base {name!r} is not a readable safetensors file ({shown(error)}).") from error
    if not is_whole(path):
        raise Refusal(
            f"The base {name!r} is no whole model: its tensors are {_some(shapes)}. Is it a LoRA? Then name its base."
        )
    config = model_config or _usual_config(name, shapes)
    with _config_at_fault(f"The config of the base {name!r} is taken from {config!r}", config):
        index = retried(DiffusionPipeline.load_config, config)
        pipeline_class, component, network = _classes(index, config)
        if any(name.startswith(_OTHER_PARTS) for name in shapes) and issubclass(pipeline_class, FromSingleFileMixin):
            given = {**options, **_lacking_encoders(index, config, shapes, dtype)}
            pipeline = _whole_pipeline(path, pipeline_class, config, given)
            own = [math.prod(shapes[name]) for name in _own_names(shapes)]
            _check_complete(path, pipeline.components[component], own)
        else:
            model = read_network(path, network, config, component, dtype)
            pipeline = retried(pipeline_class.from_pretrained, config, **{**options, component: model})
    # A card must not take the config's repository for the base.
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


@contextmanager
def _config_at_fault(said: str, config: str) -> Iterator[None]:
    """Context in which the config's folder or repository is read: an error says that, and how to name another."""
    try:
        with explained(said, config):
            yield
    except (OSError, HFValidationError) as error:
        raise Refusal(f"{said}, which cannot be read: {shown(error, 400)} {_ADVICE}") from error
    except Refusal as error:
        raise Refusal(f"{error} {_ADVICE}" if str(error).startswith(said) else str(error)) from error


def _whole_pipeline(
    path: Path, pipeline_class: type[DiffusionPipeline], config: str, options: Mapping[str, JSON]
) -> DiffusionPipeline:
    further = {key: value for key, value in options.items() if key != "use_safetensors"}
    try:
        pipeline = retried(pipeline_class.from_single_file, str(path), config=config, **further)
    except SingleFileComponentError as error:
        raise Refusal(
            f"{path.name} lacks a part of a {pipeline_class.__name__}: {shown(error.message, 300)}"
        ) from error
    except OSError:  # of the Hub, some of which are also a ValueError
        raise
    except _CONVERTERS_ERRORS as error:
        raise _misfit(path, pipeline_class, config, error) from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            _check_filled(path, part)
    return pipeline


def _misfit(path: Path, wanted: type, config: str, error: Exception) -> Refusal:
    return Refusal(
        f"{path.name} does not fit a {wanted.__name__} of the config in {config!r}: {type(error).__name__}: "
        f"{shown(error, 300)}"
    )


def _lacking_encoders(
    index: Mapping[str, JSON], config: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """The text encoders that a file lacks, from the config's folder or repository."""
    empty, found = _empty(shapes), {}
    for name, entry in index.items():
        if not name.startswith("text_encoder") or not isinstance(entry, list) or entry[0] != "transformers":
            continue
        encoder = getattr(transformers, str(entry[1]))
        is_inside = is_clip_model_in_single_file(encoder, empty) or (
            issubclass(encoder, transformers.T5EncoderModel) and is_t5_in_single_file(empty)
        )
        if not is_inside:
            found[name] = retried(encoder.from_pretrained, config, subfolder=name, dtype=dtype)
    return found


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _own_names(names: Iterable[str]) -> dict[str, str]:
    """The denoising network's tensors of a file, and the names under which diffusers' converters want them."""
    names = list(names)
    prefix = next((one for one in _PREFIXES if any(name.startswith(one) for name in names)), "")
    own = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not prefix:
        own = {name: name for name in names if not name.startswith(_OTHER_PARTS)}
    # The one converter that wants the prefix is that of UNets.
    is_unet = any(name.startswith("input_blocks.") for name in own.values())
    return {theirs: _PREFIXES[0] + ours for theirs, ours in own.items()} if is_unet else own


def _usual_config(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The repository whose config diffusers takes for such a file."""
    try:
        kind = infer_diffusers_model_type(_empty(shapes))
    except (KeyError, IndexError):
        kind = None
    # Stable Diffusion 1.5 is also what diffusers answers for a file that it does not know.
    if kind is None or (kind == "v1" and not any("input_blocks." in key for key in shapes)):
        raise Refusal(f"The base {name!r} is of a model that diffusers does not know by its file. {_ADVICE}")
    return str(fetch_diffusers_config(_empty(shapes))["pretrained_model_name_or_path"])


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _classes(index: Mapping[str, JSON], config: str) -> tuple[type[DiffusionPipeline], str, type[ModelMixin]]:
    component = denoiser_name_in(index)
    found = (str(index.get("_class_name")), str((index.get(component) or [None, None])[1]))
    pipeline_class, network = (getattr(diffusers, name, None) for name in found)
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise Refusal(f"{config!r} is of the class {found[0]!r}, which is no pipeline of diffusers.")
    if not (isinstance(network, type) and issubclass(network, ModelMixin)):
        raise Refusal(f"{config!r} has the {component} {found[1]!r}, which is no network of diffusers.")
    return pipeline_class, component, network


def _local_file(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    parts = name.split("/")
    if len(parts) < 3 or name.startswith(("/", ".", "~")) or "://" in name:
        raise Refusal(
            f"The base {name!r} is no file here, and not of the form owner/repo/file.safetensors for one on the Hub."
        )
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    found = download(f"The base {name!r}", repository, revision, [inside]) / inside
    if not found.is_file():
        raise Refusal(f"The base {name!r}: the repository {repository!r} has no file {inside!r}.")
    return found


def _check_complete(path: Path, model: torch.nn.Module, elements: list[int]) -> None:
    _check_filled(path, model)
    expected, given = sum(value.numel() for value in model.state_dict().values()), sum(elements)
    if given != expected:
        raise Refusal(
            f"{path.name} does not fit the config: the network of the file has {given:,} numbers, and a "
            f"{type(model).__name__} of this config has {expected:,}."
        )


def _check_filled(path: Path, model: torch.nn.Module) -> None:
    if missing := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise Refusal(f"{path.name} lacks weights of the {type(model).__name__}: {_some(missing)}.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(shown(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
