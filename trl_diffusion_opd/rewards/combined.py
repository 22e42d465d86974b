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

"""Adds rewards with weights, after dividing each by a scale that brings it near 1. Also loads rewards by name."""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..problems import Refusal
from .base import Generated, Reward, RewardFunc, Row, reward_fingerprint, reward_name
from .names import check_named, load_named
from .scoring import Scores, call_reward, rows_of


if TYPE_CHECKING:
    from transformers import TrainerState


# Divisors from the published code of Flow-GRPO and DiffusionNFT: 26 for PickScore (about 22), 5 for UnifiedReward (1
# to 5) and 500 for kB. Aesthetic scores are ratings from 1 to 10. Other rewards are near 1 already.
SCALES: Mapping[str, float] = MappingProxyType(
    {"aesthetic": 10.0, "jpeg_compressibility": 500.0, "pickscore": 26.0, "unifiedreward": 5.0}
)


# A reward for images that scores videos by their frames. Its class loads the reward in the brackets.
_FRAMES = "frames"
_OF_FRAMES = re.compile(rf"{_FRAMES}\((.*)\)", re.DOTALL)


def scale_of(function: RewardFunc) -> float:
    """The divisor that brings a reward near 1: of this package's rewards that of `SCALES`, and 1 of all others."""
    return SCALES.get(function.name, 1.0) if isinstance(function, Reward) else 1.0


class CombinedReward(Reward):
    """
    The weighted sum of several rewards, each divided by its scale. It is `None` if one of them does not apply.

    `CombinedReward({"pickscore": 1, "clipscore": 1, "hpsv2": 1})` is the aesthetic reward of DiffusionOPD
    ([arXiv:2605.15055](https://huggingface.co/papers/2605.15055)) and of the teachers before it: PickScore / 26 +
    CLIPScore + HPSv2.1. Without scales, PickScore would dominate the sum. The short form is
    `"pickscore+clipscore+hpsv2"`.

    The unscaled score of each component is logged and reported as `name/component`.

    Args:
        rewards (`dict`): weight of each reward. A reward is a name, an import path, a [`Reward`] or a function. A
            weight may be negative.
        name (`str`, *optional*, defaults to `"combined"`): name of the metric.
        scales (`dict[str, float]`, *optional*): divisor of each component, by its name. Defaults to 10 for
            `aesthetic`, 500 for `jpeg_compressibility`, 26 for `pickscore`, 5 for `unifiedreward`, and 1 for all
            others.
        reward_kwargs (`dict`, *optional*): arguments of components that are given by name.

    Raises:
        [`ValueError`]: if a component cannot be loaded, two have the same name, a weight or a scale is invalid, or an
            option names no component. One message lists everything that is wrong.
    """

    name = "combined"

    def __init__(
        self,
        rewards: Mapping[str | RewardFunc, float],
        name: str = "combined",
        scales: Mapping[str, float] | None = None,
        reward_kwargs: Mapping[str, Mapping[str, object]] | None = None,
    ):
        scales, reward_kwargs = scales or {}, reward_kwargs or {}
        super().__init__()
        self.name = name
        self.components: dict[str, RewardFunc] = {}
        self.weights: dict[str, float] = {}
        problems = [] if rewards else ["there is no component."]
        for spec, weight in rewards.items():
            try:
                component = load_reward(spec, **reward_kwargs.get(spec, {})) if isinstance(spec, str) else spec
            except (ImportError, ValueError) as error:
                problems.append(str(error))
                continue
            if not callable(component):
                problems.append(f"{component!r} is neither a name nor a function.")
                continue
            component_name = reward_name(component)
            if component_name in self.components:
                problems.append(f"two components are named {component_name!r}. Rename one.")
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                problems.append(f"the weight of {component_name!r} is {weight!r}; it must be a finite number.")
            self.components[component_name] = component
            self.weights[component_name] = weight
        problems += [f"scales has {key!r}, which is no component." for key in scales if key not in self.components]
        problems += [
            f"reward_kwargs has {key!r}, which is no component." for key in reward_kwargs if key not in rewards
        ]
        problems += [
            f"the scale of {key!r} is {value}; it must be positive." for key, value in scales.items() if not value > 0
        ]
        if problems:
            raise ValueError("\n".join(f"Reward {name!r}: {problem}" for problem in problems))
        self.scales = {key: float(scales.get(key, scale_of(component))) for key, component in self.components.items()}
        of_package = [component for component in self.components.values() if isinstance(component, Reward)]
        self.columns = tuple(dict.fromkeys(column for component in of_package for column in component.columns))
        self.takes_frames = any(component.takes_frames for component in of_package)
        self.bounds = self._bounds()

    def _bounds(self) -> tuple[float | None, float | None]:
        lowest: float | None = 0.0
        highest: float | None = 0.0
        for key, component in self.components.items():
            bounds = component.bounds if isinstance(component, Reward) else (None, None)
            factor = self.weights[key] / self.scales[key]
            low, high = bounds if factor >= 0 else bounds[::-1]
            lowest = None if lowest is None or low is None else lowest + factor * low
            highest = None if highest is None or high is None else highest + factor * high
        return lowest, highest

    @property
    def fingerprint(self) -> str:
        parts = [
            f"{self.weights[key]}/{self.scales[key]}*{reward_fingerprint(component)}"
            for key, component in self.components.items()
        ]
        return f"{self.name}({' + '.join(parts)})"

    @property
    def score_names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}/{key}" for key in self.components))

    def why_not(self, prompt: str, columns: Row) -> str | None:
        for key, component in self.components.items():
            reason = component.why_not(prompt, columns) if isinstance(component, Reward) else None
            if reason is not None:
                return f"{key!r} can't score it: {reason}"
        return None

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> list[float | None]:
        return self.named_scores(prompts, images, completions, trainer_state, **columns)[self.name]

    def named_scores(
        self,
        prompts: Sequence[str],
        images: Sequence[Generated],
        completions: Sequence[Generated] | None = None,
        trainer_state: "TrainerState | None" = None,
        **columns: Sequence[object],
    ) -> Scores:
        """The sum under the reward's name, and the components' unscaled scores as `name/component`."""
        rows = rows_of(prompts, columns)
        parts = {
            key: call_reward(component, rows, images, trainer_state)[key] for key, component in self.components.items()
        }
        factors = [self.weights[key] / self.scales[key] for key in parts]
        totals = [
            None if None in values else math.fsum(f * v for f, v in zip(factors, values, strict=True))
            for values in zip(*parts.values(), strict=True)
        ]
        return {self.name: totals} | {f"{self.name}/{key}": values for key, values in parts.items()}


def load_reward(spec: str, **options: Any) -> RewardFunc:
    """
    Loads a reward function by its name, by its import path `package.module:function`, or by its file
    `path/my_rewards.py:function`. A class is instantiated.

    Args:
        spec (`str`): a name from this package, an import path, a file, or several of them joined by `+`. Those are added with
            equal weights by [`CombinedReward`]. `frames(...)` around any of these scores videos by their frames, with
            [`Frames`].
        options: arguments of a named reward or of a class, such as the `url` of `"remote"`.

    Raises:
        [`ValueError`]: if there is no such function, an option is wrong, or its weights cannot be loaded.
        [`ImportError`]: if the reward needs a package that is not installed. The message names the extra to install.
    """
    parts = _summands(spec)
    if len(parts) > 1:
        return CombinedReward(dict.fromkeys(parts, 1.0), **options)
    if (found := _OF_FRAMES.fullmatch(spec)) is not None:
        return load_named(_FRAMES, **_options_of_frames(spec, found[1], options))
    return load_named(spec, **options)


def check_reward(spec: str, **options: Any) -> None:
    """
    Checks a reward and its options like [`load_reward`], but without loading weights.

    Raises:
        [`ValueError`]: if there is no such function, or an option is wrong.
        [`ImportError`]: if importing the reward needs a package that is not installed.
    """
    parts = _summands(spec)
    inner = options.get("reward_kwargs") or {}
    if len(parts) > 1:
        for part in parts:
            check_reward(part, **inner.get(part, {}))
    elif (found := _OF_FRAMES.fullmatch(spec)) is not None:
        check_named(_FRAMES, **_options_of_frames(spec, found[1], options))
        check_reward(found[1], **inner)
    else:
        check_named(spec, **options)


def _summands(spec: str) -> list[str]:
    """The parts of a sum. A sum in the brackets of `frames(...)` is one part."""
    parts: list[str] = []
    for piece in spec.split("+"):
        if parts and parts[-1].startswith(f"{_FRAMES}(") and parts[-1].count("(") > parts[-1].count(")"):
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return parts


def _options_of_frames(spec: str, inner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if "reward" in options:
        raise Refusal(f"Reward {spec!r}: the option 'reward' is what the brackets have. Leave it out.")
    return {"reward": inner, **options}
