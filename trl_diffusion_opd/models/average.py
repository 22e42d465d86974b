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

"""The moving average of the trained weights: how it is updated, and how old the averaged weights are."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from torch import nn


if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

FOLLOWING = "auto"  # the `ema_decay` whose averaging window grows with the length of the run

# With "auto": mean age of the averaged weights, as a share of the updates so far. A larger share is smoother and lags
# more; docs/source/average.md compares them.
MEAN_AGE = 0.005

# If the average is older than this share of the run, it has not caught up when the run ends.
LAGGING_SHARE = 0.1


def moving_average(parameters: Iterable[nn.Parameter], decay: float | str | None) -> "EMAModel | None":
    """
    Returns the average that `ema_decay` asks for, starting as a copy of `parameters`, or `None` without one.

    With `"auto"` the decay of step n is `n / (n + γ)`: diffusers' warm-up with power 1, never ending. The weights of a
    late update i then count about as `i^(γ - 1)`, so the average covers the same fraction of a long run as of a short
    one (Karras et al. 2024, arXiv 2312.02696, Eq. 7).
    """
    from diffusers.training_utils import EMAModel  # here, since configs read this module and need no diffusers

    if not decay:
        return None
    if decay == FOLLOWING:
        return EMAModel(parameters, decay=1.0, use_ema_warmup=True, inv_gamma=1 / MEAN_AGE, power=1.0)
    return EMAModel(parameters, decay=float(decay))


def step_number(decay: float | str | None, update: int, interval: int) -> int:
    """
    Returns the n that sets the decay of the average's step after update number `update`.

    With `"auto"`, n counts the steps of the average, so the interval does not change how far back it reaches. With a
    fixed decay n counts updates: otherwise diffusers' warm-up `(1 + n) / (10 + n)` would last `interval` times as
    long.
    """
    return update // interval if decay == FOLLOWING else update


@cache  # it loops over all updates, and the start of a run asks twice
def mean_age(decay: float | str | None, updates: int, interval: int) -> float:
    """The mean age of the averaged weights at the end of a run, in updates; 0 without an average."""
    average = moving_average([], decay)
    if average is None:
        return 0.0
    age = 0.0  # the mean age right after the average's last step; it starts from the weights of update 0
    for update in range(interval, updates + 1, interval):
        age = average.get_decay(step_number(decay, update, interval)) * (age + interval)
    return age + updates % interval


def average_line(decay: float | str | None, updates: int, interval: int) -> str:
    """Says in one sentence, for the start of a run, which weights are evaluated and saved."""
    if not decay:
        return "Evaluated and saved: the weights as they are (no moving average)."
    age = mean_age(decay, updates, interval)
    return (
        f"Evaluated and saved: a moving average of the weights, {age:.1f} updates old in the mean at the end of these "
        f"{updates} updates ({age / updates:.1%} of the run)."
    )


def lag_problem(decay: float | str | None, updates: int, interval: int) -> str | None:
    """Returns a warning if the average still lags far behind the weights when the run ends, else `None`."""
    age = mean_age(decay, updates, interval)
    if age <= LAGGING_SHARE * updates:
        return None
    return (
        f"ema_decay={decay} every {interval} updates gives an average that is {age:.0f} updates old after {updates}: "
        f"the weights that are evaluated and saved lag behind. ema_decay='{FOLLOWING}' follows the run, 0 saves the "
        "weights as they are."
    )


def average_in_words(decay: float | str | None, interval: int) -> str:
    """Describes the average's settings for a model card."""
    if not decay:
        return "none"
    every = "every update" if interval == 1 else f"every {interval} updates"
    return (
        f"follows the run (mean age {MEAN_AGE:.1%} of the updates), {every}"
        if decay == FOLLOWING
        else f"{decay} {every}"
    )
