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

"""Makes metrics of the `evaluate` library from reward functions."""

import statistics
from collections.abc import Mapping, Sequence

import datasets
import evaluate
from PIL.Image import Image

from .base import SOURCE_IMAGES, Generated, Reward, RewardFunc, frames_of, reward_name
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

    `compute` returns the mean score (`None` if the reward applies to no image) and the score of every image, in order,
    with `None` where the reward does not apply. A [`CombinedReward`] adds its components. Images are kept in memory as
    PNG, without loss, so scores equal those of a direct call. Nothing is downloaded.

    Args:
        reward (reward function): the reward to compute.
        features ([`~datasets.Features`], *optional*): types of the columns that are given with the prompts, for
            example those of the dataset. Defaults to the columns that a [`Reward`] reads, as text. `source_images` is
            a list of PIL images in any case.

    A reward that scores videos, such as [`frames`], gets each image as a list of frames.
    """

    def __init__(self, reward: RewardFunc, features: datasets.Features | None = None):
        self.reward = reward
        read = reward.columns if isinstance(reward, Reward) else ()
        text = datasets.Features(dict.fromkeys(read, datasets.Value("string")))
        self._columns = {
            name: kind for name, kind in (text if features is None else features).items() if name != "prompt"
        }
        if SOURCE_IMAGES in self._columns:
            self._columns[SOURCE_IMAGES] = datasets.List(datasets.Image())
        self._of_videos = isinstance(reward, Reward) and reward.takes_frames
        super().__init__(keep_in_memory=True)
        self.info.module_name = reward_name(reward)  # its name in evaluate.combine

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"The reward {reward_name(self.reward)!r} of images and their prompts.",
            citation="",
            features=datasets.Features(
                {
                    "prompts": datasets.Value("string"),
                    "images": datasets.List(datasets.Image()) if self._of_videos else datasets.Image(),
                    **self._columns,
                }
            ),
        )

    def add_batch(self, *, prompts: Sequence[str], images: Sequence[Generated], **columns: Sequence[object]) -> None:
        """
        Adds images for [`compute`] to score.

        Args:
            prompts (`list[str]`), images (`list[PIL.Image.Image]`): the images, each with its prompt.
            columns (`list`): the reward's other columns, one value an image.
        """
        self._check({"prompts": prompts, "images": images, **columns})
        super().add_batch(prompts=prompts, images=[self._kept(image) for image in images], **columns)

    def add(self, *, prompts: str, images: Generated, **columns: object) -> None:
        """
        Adds one image. The arguments have the names of [`add_batch`], as `evaluate.combine` requires.
        """
        self._check({"prompts": prompts, "images": images, **columns})
        super().add(prompts=prompts, images=self._kept(images), **columns)

    def compute(self, **inputs: object) -> dict[str, float | list[float | None] | None]:
        """
        Scores the images that were added, or the `prompts`, `images` and columns given here.

        Returns:
            `dict`: the mean under the reward's name, and the score of each image under `name_scores`.
        """
        if "prompts" not in inputs and self.writer is None:
            raise ValueError(f"Metric {self.name!r} has nothing to compute: add prompts and images first.")
        return super().compute(**inputs)

    def _kept(self, image: Generated) -> Generated:
        """
        Copies without the files they were read from. Otherwise the path, or the lossy format, would be kept instead of
        pixels.
        """
        frames = [frame.copy() for frame in frames_of(image)]
        return frames if self._of_videos or not isinstance(image, Image) else frames[0]

    def _check(self, given: Mapping[str, object]) -> None:
        missing = [name for name in self.features if given.get(name) is None]
        if missing:
            raise ValueError(f"Metric {self.name!r} needs {list(self.features)}, but {missing} are missing.")

    def _enforce_nested_string_type(self, schema: object, obj: object) -> object:
        """
        As in `evaluate`, but accepts `None`: with several tasks, a column may have no value in the rows of others.
        """
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
    Makes an [`evaluate.Metric`] from any reward function. See [`RewardMetric`].

    Args:
        reward: a [`Reward`] or a plain function.
        features ([`~datasets.Features`], *optional*): types of the columns that are given with the prompts, for
            example those of the dataset.
    """
    return RewardMetric(reward, features)
