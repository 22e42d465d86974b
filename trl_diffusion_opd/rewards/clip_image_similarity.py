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

"""How much of its source picture an edited picture keeps."""

import statistics

import torch
import torch.nn.functional as F
from PIL.Image import Image

from .base import SOURCE_IMAGES, Row, source_pictures
from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES, ClipReward
from .model_files import find_files


class CLIPImageSimilarity(ClipReward):
    """
    The cosine between CLIP ViT-L/14's embeddings of an edited picture and of its source picture.

    The row's column `source_images` has the sources. With several, it is the mean of their cosines: each of them has
    to be found in the result. Rows without a source have no score, since nothing is to be kept.

    1 is the unchanged source. So a model that edits nothing has the highest score: use it beside a reward for the edit
    itself, such as `vlm_judge`. Pictures of other shapes than squares lose their edges to CLIP's crop, the source as
    well as the result.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`): CLIP model with its processor, a Hub
            id or a local folder.
        revision (`str`, *optional*): the model's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        device, dtype, batch_size: see [`ModelReward`].

    Raises:
        [`ValueError`]: if the model cannot be loaded completely; the message says why.
    """

    name = "clip_image_similarity"
    bounds = (-1.0, 1.0)
    columns = (SOURCE_IMAGES,)

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 16,
    ):
        files = find_files(self.name, model, revision, CLIP_MODEL_FILES + CLIP_PROCESSOR_FILES, CLIP_OPTIONAL_FILES)
        super().__init__(files, files, device=device, dtype=dtype, batch_size=batch_size)

    def why_not(self, prompt: str, columns: Row) -> str | None:
        return None if source_pictures(columns) else f"it has no picture in column {SOURCE_IMAGES!r}"

    def _score(self, prompts: list[str], images: list[Image], rows: list[Row]) -> list[float]:
        # Samples of one row share its pictures, which are embedded once.
        pictures = {id(picture): picture for row in rows for picture in source_pictures(row)}
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            results = self._unit_embeddings(images)
            sources = self._unit_embeddings([picture.convert("RGB") for picture in pictures.values()])
            cosines = (results @ sources.T).tolist()
        place = {key: i for i, key in enumerate(pictures)}
        return [
            statistics.fmean(of_result[place[id(picture)]] for picture in source_pictures(row))
            for of_result, row in zip(cosines, rows, strict=True)
        ]

    def _unit_embeddings(self, images: list[Image]) -> torch.Tensor:
        """Embeddings of length 1, float32, `[images, projection]`. At most `batch_size` go through the model at a time."""
        parts = [
            F.normalize(self._image_features(images[start : start + self.batch_size]), dim=-1)
            for start in range(0, len(images), self.batch_size)
        ]
        return torch.cat(parts)
