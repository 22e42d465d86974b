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

"""Rewards for videos: image rewards on frames, and how much moves."""

import numpy as np
import pytest
from helpers.stub_reward import redness
from PIL import Image

from trl_diffusion_opd import rewards
from trl_diffusion_opd.rewards import (
    CombinedReward,
    Frames,
    Motion,
    Reward,
    VideoReward,
    as_metric,
    check_reward,
    frames,
    load_reward,
    reward_fingerprint,
    score,
)
from trl_diffusion_opd.rewards.combined import scale_of
from trl_diffusion_opd.rewards.trial import is_of_reward, trial_error
from trl_diffusion_opd.scripts.arguments import load_rewards, reward_problems


def video(*reds):
    return [Image.new("RGB", (3, 2), (red, 0, 0)) for red in reds]


class Red(Reward):
    """How red the first pixel is. Has none of dark pixels, as if a server had failed, nor of one prompt."""

    name = "pickscore"  # a name with a scale
    bounds = (0.0, 255.0)
    columns = ("level",)

    def __init__(self, batch_size=3):
        super().__init__(batch_size)
        self.batches = []

    def why_not(self, prompt, columns):
        return "no" if prompt == "no" else super().why_not(prompt, columns)

    def _score(self, prompts, images, rows):
        self.batches.append([image.getpixel((0, 0))[0] for image in images])
        values = [image.getpixel((0, 0))[0] + row["level"] for image, row in zip(images, rows, strict=True)]
        return [None if value < 10 else value for value in values]


# Every second frame of the first is 20, 60, 100; the others are a picture, one with a dark frame, and no task of Red's.
VIDEOS = [video(20, 255, 60, 255, 100), video(30)[0], video(40, 0, 1), video(50, 50)]
PROMPTS = ["a", "b", "c", "no"]
ROWS = [{"prompt": p, "level": n} for p, n in zip(PROMPTS, [0, 0.5, 0, 0], strict=True)]


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 60.0), ("min", 20.0), ("max", 100.0)])
def test_frames_are_scored_in_the_rewards_own_batches(reduce, expected):
    inner = Red()
    reward = frames(inner, every=2, reduce=reduce)
    assert isinstance(reward, Frames)
    assert score([reward], ROWS, VIDEOS) == {"pickscore": [expected, 30.5, None, None]}
    assert inner.batches == [[20, 60, 100], [30, 40, 1]]  # across videos
    assert (reward.bounds, reward.columns, scale_of(reward)) == ((0.0, 255.0), ("level",), 26.0)
    assert reward.why_not("no", {"level": 1}) == "no" and "'level'" in reward.why_not("a", {})


def test_the_first_frame_is_always_scored():
    assert frames(redness)(prompts=["a"] * 2, images=[video(51, *range(7), 255), video(51, 0)]) == [0.6, 0.2]
    assert frames(redness, every=1)(prompts=["a"], images=[video(0, 102)]) == [0.2]
    with pytest.raises(ValueError, match="Reward 'redness': a video has no frames"):
        frames(redness)(prompts=["a"], images=[[]])


def test_sums_and_names():
    both = Frames(CombinedReward({redness: 1.0, Red(): 26.0}, name="taste"), every=4, reduce="max", name="best")
    assert both.score_names == ("best", "best/redness", "best/pickscore")
    assert score([both], ROWS[:1], VIDEOS[:1]) == {
        "best": [pytest.approx(100 + 100 / 255)],
        "best/redness": [100 / 255],
        "best/pickscore": [100.0],
    }
    other = CombinedReward({frames(redness): 1.0, Motion(): -1.0})
    values = score([other], ROWS[:1], [video(0, 51)])
    assert values == {
        "combined": [pytest.approx(-51 / 255 / 3)],
        "combined/redness": [0],
        "combined/motion": [51 / 255 / 3],
    }
    made = [frames(redness), frames(redness, every=4), frames(redness, reduce="min"), redness, frames(Red())]
    assert len({reward_fingerprint(reward) for reward in made}) == 5


def test_on_a_command_line():
    reward = load_reward("frames(jpeg_compressibility)", every=4, reward_kwargs={"batch_size": 2})
    assert (reward.name, reward.every, reward.reward.batch_size) == ("jpeg_compressibility", 4, 2)
    same = load_reward("frames", reward="jpeg_compressibility", every=4)
    assert same.fingerprint == reward.fingerprint
    both = load_reward("frames(jpeg_compressibility+helpers.stub_reward:redness)+motion", name="all")
    assert both.score_names == ("all", "all/combined", "all/motion") and both.takes_frames
    assert list(both.components["combined"].reward.components) == ["jpeg_compressibility", "redness"]
    options = {"reward_kwargs": {"frames(jpeg_compressibility)": {"every": 2}}}
    assert load_reward("frames(jpeg_compressibility)+motion", **options).components["jpeg_compressibility"].every == 2
    kwargs = {"frames(jpeg_compressibility)": {"every": 3}}
    ((loaded,),) = load_rewards(["film=frames(jpeg_compressibility)"], kwargs).values()
    assert loaded.every == 3 and reward_problems(["film=frames(jpeg_compressibility)"], kwargs) == []
    for spec, options, message in [
        ("frames(jpg)", {}, "There is no reward 'jpg'"),
        ("frames()", {}, "There is no reward ''"),
        ("frames(jpeg_compressibility", {}, r"There is no reward 'frames\(jpeg"),
        ("frames(jpeg_compressibility)", {"step": 2}, r"Reward 'frames' has no options \['step'\]"),
        ("frames(jpeg_compressibility)", {"reward": "x"}, "the option 'reward' is what the brackets have"),
        ("frames(jpeg_compressibility)", {"reward_kwargs": {"size": 2}}, r"has no options \['size'\]"),
        ("frames(jpeg_compressibility)+frames(jpg)", {}, "There is no reward 'jpg'"),
    ]:
        for made in (load_reward, check_reward):
            with pytest.raises(ValueError, match=message):
                made(spec, **options)
    check_reward("frames(pickscore+clipscore)", every=2)  # loads nothing
    assert callable(rewards.frames) and rewards.reward_class("frames") is Frames


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            {"every": 0, "reduce": "sum"},
            ["every=0: it must be a whole number", "reduce='sum': it must be one of 'mean', "],
        ),
        ({"every": 2.0}, ["every=2.0: it must be a whole number"]),
        ({"every": True}, ["every=True: it must"]),
        ({"reward_kwargs": {"a": 1}}, ["reward_kwargs are for a reward that is given by name"]),
        ({"reward": Motion()}, ["'motion' scores videos already. Use it without frames"]),
        ({"reward": frames(redness)}, ["'redness' scores videos already"]),
        ({"reward": Red}, ["is neither a name nor a reward function"]),
    ],
)
def test_bad_options(options, messages):
    with pytest.raises(ValueError) as error:
        Frames(**{"reward": redness, **options})
    assert len(str(error.value).splitlines()) == len(messages)
    assert all(message in str(error.value) for message in messages)


def test_a_reward_for_pictures_refuses_a_video_before_it_computes():
    inner = Red()
    for reward in (inner, CombinedReward({inner: 1.0})):
        with pytest.raises(
            ValueError, match=r"'pickscore' scores pictures, and was given .* of 5 frames. Use 'frames\(pick"
        ):
            score([reward], ROWS[:1], VIDEOS[:1])
    assert not inner.batches
    # At the trial, before the first step, as what it is: a wrong reward for these images.
    error = trial_error(inner, "film", ROWS[:1], VIDEOS[0], None)
    assert isinstance(error, ValueError) and is_of_reward(error)
    assert trial_error(frames(inner), "film", ROWS[:1], VIDEOS[0], None) is None


def test_motion_in_closed_form():
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    expected = np.abs(np.diff(noise.astype(np.float64), axis=0)).mean() / 255
    flicker = [Image.new("L", (2, 2), value) for value in (0, 255, 0)]
    images = [
        [Image.fromarray(frame) for frame in noise],
        flicker,
        video(9, 9, 9),
        video(200),
        video(200)[0],
        video(0, 51),
    ]
    scores = load_reward("motion", batch_size=2)(prompts=["a"] * 6, images=images)
    assert scores == pytest.approx([expected, 1.0, 0.0, 0.0, 0.0, 51 / 255 / 3], abs=1e-12)
    with pytest.raises(ValueError, match=r"the frames of a video have different sizes, \[\(3, 2\), \(4, 4\)\]"):
        Motion()(prompts=["a"], images=[[*video(1), Image.new("RGB", (4, 4))]])
    with pytest.raises(ValueError, match="Reward 'motion': a video has no frames"):
        Motion()(prompts=["a"], images=[[]])


def test_a_video_reward_of_your_own_and_metrics():
    class Length(VideoReward):
        name = "length"
        bounds = (1.0, None)

        def _score_videos(self, prompts, videos, rows):
            assert {frame.mode for frames in videos for frame in frames} == {"RGB"}
            return [float(len(frames)) for frames in videos]

    images = [video(0, 1, 2), Image.new("L", (2, 2))]
    assert as_metric(Length()).compute(prompts=["a", "b"], images=[images[0], [images[1]]])["length_scores"] == [3, 1]
    direct = frames(redness, every=2)
    metric = as_metric(direct)
    metric.add_batch(prompts=PROMPTS, images=VIDEOS)
    assert metric.compute()["redness_scores"] == direct(prompts=PROMPTS, images=VIDEOS)
