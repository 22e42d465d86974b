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

"""Rewards as metrics of the evaluate library."""

import statistics
from collections.abc import Mapping, Sequence

import datasets
import evaluate
from PIL.Image import Image

from .base import Reward, RewardFunc, reward_name
from .scoring import score


class RewardMetric(evaluate.Metric):
    """
    A reward function as an [`evaluate.Metric`].

    ```python
    metric = as_metric(load_reward("pickscore"))
    for batch in batches:
        metric.add_batch(prompts=batch["prompt"], images=pipeline(batch["prompt"]).images)
    metric.compute()  # {"pickscore": 22.3, "pickscore_scores": [22.1, 22.5, ...]}
    ```

    `compute` returns the mean over the images that the reward applies to (`None` if there are none) and the score of every
    image, in order, `None` where it does not apply. A [`CombinedReward`] adds its components. Images are kept as they are,
    as PNG in memory, so the scores are those of a direct call. Nothing is downloaded.

    Args:
        reward (reward function): what to compute.
        features ([`~datasets.Features`], *optional*): of the columns that are given with the prompts; those of the dataset
            will do. Without them they are the columns that a [`Reward`] says it reads, as text.
    """

    def __init__(self, reward: RewardFunc, features: datasets.Features | None = None):
        self.reward = reward
        read = reward.columns if isinstance(reward, Reward) else ()
        text = datasets.Features(dict.fromkeys(read, datasets.Value("string")))
        self._columns = {
            name: kind for name, kind in (text if features is None else features).items() if name != "prompt"
        }
        super().__init__(keep_in_memory=True)
        self.info.module_name = reward_name(reward)  # what evaluate.combine calls it

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"The reward {reward_name(self.reward)!r} of images and their prompts.",
            citation="",
            features=datasets.Features(
                {"prompts": datasets.Value("string"), "images": datasets.Image(), **self._columns}
            ),
        )

    def add_batch(self, *, prompts: Sequence[str], images: Sequence[Image], **columns: Sequence[object]) -> None:
        """
        Adds images to what [`compute`] scores.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): one prompt an image.
            columns (`list`): the reward's other columns, a value an image.
        """
        self._check({"prompts": prompts, "images": images, **columns})
        super().add_batch(prompts=prompts, images=[_bare(image) for image in images], **columns)

    def add(self, *, prompts: str, images: Image, **columns: object) -> None:
        """
        Adds one image. The arguments are named as in [`add_batch`], as `evaluate.combine` wants it.
        """
        self._check({"prompts": prompts, "images": images, **columns})
        super().add(prompts=prompts, images=_bare(images), **columns)

    def compute(self, **inputs: object) -> dict[str, float | list[float | None] | None]:
        """
        Scores what was added, or `prompts`, `images` and columns that are given here.

        Returns:
            `dict`: the mean under the reward's name, and under `name_scores` a value an image.
        """
        if "prompts" not in inputs and self.writer is None:
            raise ValueError(f"Metric {self.name!r} has nothing to compute: add prompts and images first.")
        return super().compute(**inputs)

    def _check(self, given: Mapping[str, object]) -> None:
        missing = [name for name in self.features if given.get(name) is None]
        if missing:
            raise ValueError(f"Metric {self.name!r} lacks {missing}; it needs {list(self.features)}.")

    def _enforce_nested_string_type(self, schema: object, obj: object) -> object:
        """As in evaluate, but in a dataset of several tasks a column has no value in the rows of others."""
        return None if obj is None else super()._enforce_nested_string_type(schema, obj)

    def _compute(
        self, *, prompts: Sequence[str], images: Sequence[Image], **columns: Sequence[object]
    ) -> dict[str, float | list[float | None] | None]:
        # evaluate.combine gives every metric the columns of all of them.
        own = {name: values for name, values in columns.items() if name in self.features}
        rows = [{"prompt": prompt, **{name: own[name][i] for name in own}} for i, prompt in enumerate(prompts)]
        result: dict[str, float | list[float | None] | None] = {}
        for name, values in score([self.reward], rows, images).items():
            applicable = [value for value in values if value is not None]
            result[name] = statistics.fmean(applicable) if applicable else None
            result[f"{name}_scores"] = values
        return result


def as_metric(reward: RewardFunc, features: datasets.Features | None = None) -> RewardMetric:
    """
    Any reward function as an [`evaluate.Metric`]: see [`RewardMetric`].

    Args:
        reward: a [`Reward`] or a plain function.
        features ([`~datasets.Features`], *optional*): of the columns that are given with the prompts; those of the dataset
            will do.
    """
    return RewardMetric(reward, features)


def _bare(image: Image) -> Image:
    """Without the file that it was read from, whose path, or lossy format, would be kept in place of its pixels."""
    return image.copy()
