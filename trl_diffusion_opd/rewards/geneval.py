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
The reward of GenEval: whether an image shows the objects of its prompt in the right number, colours and positions.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from ..guards.files import JSON
from .base import Row
from .center_crop import CenterCropProcessor
from .clip import CLIP_MODEL_FILES, CLIP_OPTIONAL_FILES, CLIP_PROCESSOR_FILES
from .geneval_rules import (
    COLORS,
    PUBLISHED,
    Detection,
    MetadataError,
    Thresholds,
    is_correct,
    kept_objects,
    parse_metadata,
    partial_score,
)
from .model_files import find_files
from .model_reward import ModelReward, load_pretrained


# A detector's class name (COCO's own or in the style of Pascal VOC) -> GenEval's name, where they differ.
_GENEVAL_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GROUND = "#999"  # grey, which replaces everything around an object


class _Detector(Mask2FormerForUniversalSegmentation):
    # Files from 2023 contain these tensors, which transformers now computes.
    _keys_to_ignore_on_load_unexpected = [r"relative_position_index$"]


class GenEval(ModelReward):
    """
    GenEval's verdict (Ghosh et al., 2023, arXiv 2310.11513): 1 if an image shows what its prompt asks for, else 0.

    A Mask2Former trained on COCO finds the objects. Each is cut out along its mask onto grey, and CLIP names its
    colour. The rules are in `geneval_rules`. GenEval's overall score (0.63 for SD3.5-M with guidance in Table 1 of
    DiffusionOPD) is the mean of its six categories' means. A mean over prompts is different, since categories have
    different numbers of prompts.

    Each prompt needs metadata: the columns of GenEval's `evaluation_metadata.jsonl` (`tag`, `include` and `exclude`),
    or one column `metadata` with such a row. Lists and objects may also be JSON strings.

    Args:
        model (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`): a Mask2Former for
            instance segmentation, a Hub id or a local folder.
        revision (`str`, *optional*): the detector's branch, tag or commit. Defaults to `main`.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`): CLIP model with its processor, a Hub
            id or a local folder.
        clip_revision (`str`, *optional*): CLIP's branch, tag or commit. Defaults to a pinned commit for the default
            model, else to `main`.
        graded (`bool`, *optional*, defaults to `False`): whether to return a share in [0, 1] instead of the verdict,
            for training. See [`geneval_rules.partial_score`].
        thresholds ([`geneval_rules.Thresholds`] or `dict` of its arguments, *optional*): when an object counts.
            Defaults to the published values.
        detector_size (`int`, *optional*, defaults to `800`): pixels of the shorter side of the detector's input. The
            default is that of the published evaluation. The longer side is at most 5/3 of it.
        device, dtype, batch_size: see [`ModelReward`].

    Raises:
        [`ValueError`]: if a model cannot be loaded completely; the message says which and why.
    """

    name = "geneval"
    bounds = (0.0, 1.0)
    columns = ("metadata",)

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        revision: str | None = None,
        clip: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
        graded: bool = False,
        thresholds: Thresholds | Mapping[str, JSON] = PUBLISHED,
        detector_size: int = 800,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 8,
    ):
        required = (("config.json",), ("model*.safetensors",), ("preprocessor_config.json",))
        files = find_files(self.name, model, revision, required, ("model.safetensors.index.json",))
        clip_files = find_files(
            self.name, clip, clip_revision, CLIP_MODEL_FILES + CLIP_PROCESSOR_FILES, CLIP_OPTIONAL_FILES
        )
        super().__init__((files, clip_files), device, dtype, batch_size)
        self.graded, self.detector_size = graded, detector_size
        self.thresholds = thresholds if isinstance(thresholds, Thresholds) else Thresholds(**thresholds)
        self._detector = self._placed(load_pretrained(_Detector, files))
        longest = detector_size * 5 // 3
        self._detector_processor = Mask2FormerImageProcessorPil.from_pretrained(
            files.folder, size={"shortest_edge": detector_size, "longest_edge": longest}, size_divisor=32
        )
        labels = self._detector.config.id2label
        self._names = [_GENEVAL_NAMES.get(labels[i], labels[i]) for i in range(len(labels))]
        self._clip = self._placed(load_pretrained(CLIPModel, clip_files))
        self._clip_tokenizer = CLIPTokenizer.from_pretrained(clip_files.folder)
        self._clip_processor = CenterCropProcessor.from_pretrained(clip_files.folder)
        self._color_weights: dict[str, torch.Tensor] = {}

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} torchvision crop graded={self.graded} detector_size={self.detector_size} {self.thresholds}"

    def why_not(self, prompt: str, columns: Row) -> str | None:
        try:
            parse_metadata(columns, self._names)
        except MetadataError as error:
            return str(error)
        return None

    def _score(self, prompts: list[str], images: list[Image.Image], rows: list[Row]) -> list[float]:
        return [
            self._judge(image, detections, row)
            for image, detections, row in zip(images, self.detect(images), rows, strict=True)
        ]

    def _judge(self, image: Image.Image, detections: Sequence[Detection], row: Row) -> float:
        metadata = parse_metadata(row, self._names)
        objects = kept_objects(detections, metadata.tag, self.thresholds)
        rule = partial_score if self.graded else is_correct
        return float(rule(metadata, objects, lambda found: self.colors(image, found), self.thresholds.position))

    def detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """
        Finds the objects in RGB images whose score is above the smaller of the two thresholds.

        As in the published detector, a score is a query's class probability times the mean probability of its mask's
        pixels. The box is the mask's bounding box.
        """
        of_size = defaultdict(list)
        for i, image in enumerate(images):  # grouped by size, since a batch of different sizes would be padded
            of_size[image.size].append(i)
        detections: list[list[Detection]] = [[] for _ in images]
        for (width, height), indices in of_size.items():
            pixels = self._detector_processor([images[i] for i in indices], return_tensors="pt").pixel_values
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                output = self._detector(pixels.to(self.device, self.dtype))
                for i, logits, masks in zip(
                    indices, output.class_queries_logits, output.masks_queries_logits, strict=True
                ):
                    detections[i] = self._detections(logits.float(), masks.float(), (height, width))
        return detections

    def _detections(self, logits: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> list[Detection]:
        """
        The objects of one image, from its class logits `[queries, classes + 1]` and mask logits
        `[queries, height, width]`.

        The image processor's own post-processing does the same on a grid of 384 x 384 px. It processes all queries on
        the CPU, which takes half a second an image. Here masks have the image's size, and only queries that can pass
        are processed.
        """
        scores = logits.softmax(-1)[:, :-1]  # the last class is "nothing"
        top = scores.flatten().topk(len(scores)).indices
        least = min(self.thresholds.confidence, self.thresholds.counting)
        top = top[scores.flatten()[top] > least]
        if len(top) == 0:
            return []
        queries, classes = top // scores.shape[1], top % scores.shape[1]
        resized = F.interpolate(masks[queries][None], size, mode="bilinear", align_corners=False)[0]
        inside = resized > 0
        mean = (resized.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        found = []
        for score, mask, name in zip(
            (scores[queries, classes] * mean).tolist(), inside.cpu().numpy(), classes.tolist(), strict=True
        ):
            if score > least:  # an empty mask has the score 0
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                found.append(Detection(self._names[name], score, box, mask))
        return found

    def colors(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of ten, chosen by CLIP. All objects must have the same class."""
        if not objects:
            return []
        crops = []
        for one in objects:
            ground = Image.new("RGB", image.size, _GROUND)
            alone = image if one.mask is None else Image.composite(image, ground, Image.fromarray(one.mask))
            crops.append(alone.crop(one.box))
        pixels = self._clip_processor(crops, return_tensors="pt").pixel_values
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            features = self._clip.get_image_features(pixels.to(self.device, self.dtype)).pooler_output
            similar = F.normalize(features.float(), dim=-1) @ self._weights_of(objects[0].name).T
        return [COLORS[i] for i in similar.argmax(-1).tolist()]

    def _weights_of(self, name: str) -> torch.Tensor:
        """
        The colour classifier of a class: the mean direction of each colour's template embeddings, `[colours, width]`.
        """
        if name not in self._color_weights:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            length = self._clip.config.text_config.max_position_embeddings
            tokens = self._clip_tokenizer(
                texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            features = self._clip.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            directions = F.normalize(features.float(), dim=-1).unflatten(0, (len(COLORS), len(_TEMPLATES)))
            self._color_weights[name] = F.normalize(directions.mean(1), dim=-1)
        return self._color_weights[name]
