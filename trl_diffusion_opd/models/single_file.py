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

"""Reads a teacher from a single file of a whole checkpoint, in the layout of other programs."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers.models.modeling_utils import ModelMixin
from safetensors import safe_open

from ..acceleration.quantization import base_weight
from ..pipelines.single_file import read_network
from ..problems import Refusal
from .teacher_config import TeacherError
from .teacher_files import TeacherFiles, check_keys


def read_single_file(files: TeacherFiles, base: ModelMixin) -> ModelMixin:
    """
    Reads the denoising network of a checkpoint in the dtype of the base. It has the base's config: a teacher is made
    from the base.

    Raises:
        TeacherError: If it does not fit the base, or holds integers.
    """
    label, path = files.label, files.folder / files.names[0]
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        check_keys(keys, label)
        kinds = {key: file.get_slice(key).get_dtype() for key in keys}
    if other := [key for key in keys if key.endswith("weight") and not kinds[key].startswith(("F", "BF"))]:
        raise TeacherError(f"{label}: holds {kinds[other[0]]} in {other[0]}. Save it in a floating-point dtype.")
    config = {key: value for key, value in json.loads(base.to_json_string()).items() if key != "quantization_config"}
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return read_network(path, type(base), folder, None, base_weight(base).dtype)
        except Refusal as error:
            said = str(error).replace(f"the config in {folder!r}", "the base's config")
            raise TeacherError(f"{label}: {said}") from error
