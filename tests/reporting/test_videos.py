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

"""Videos as files: strips, GIF and MP4, the store of an evaluation, completions, and what trackers get."""

import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import wandb
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from trl_diffusion_opd.evaluation.store import Store
from trl_diffusion_opd.reporting import videos
from trl_diffusion_opd.reporting.completions import Beside, Completion, last_completions, log_completions


def film(number: int, size: tuple[int, int] = (8, 6)) -> list[Image.Image]:
    """Frames of one brightness each, different ones."""
    return [Image.new("L", size, 10 * i).convert("RGB") for i in range(number)]


def noise(number: int) -> list[Image.Image]:
    return [Image.fromarray(one) for one in np.random.default_rng(0).integers(0, 256, (number, 6, 8, 3), np.uint8)]


@pytest.fixture(autouse=True)
def no_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_ffmpeg", lambda: None)


@pytest.mark.parametrize(
    ("number", "shown"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 5, 6, 7, 8]), (22, range(0, 22, 3))]
)
def test_a_strip_has_eight_evenly_spaced_frames(number: int, shown: list[int]) -> None:
    pixels = np.asarray(videos.strip(film(number)))
    assert pixels.shape == (6, 8 * len(shown), 3)
    assert pixels[3, 4::8, 0].tolist() == [10 * i for i in shown]


def test_a_gif_has_all_frames_at_its_speed(tmp_path: Path) -> None:
    path = videos.encoded(film(9)).write(tmp_path / "a.b")
    assert path.name == "a.b.gif"
    with Image.open(path) as image:
        frames = [np.asarray(frame.convert("RGB"))[3, 4, 0] for frame in ImageSequence.Iterator(image)]
        assert frames == [10 * i for i in range(9)]
        assert image.info["duration"] == 60 and image.info["loop"] == 0  # in hundredths of a second


FFMPEG = """#!{python}
import sys
data = sys.stdin.buffer.read()
open(sys.argv[-1], "wb").write(data if {works} else b"half a file")
sys.exit(0 if {works} and "libx264" in sys.argv and "8x6" in sys.argv else 1)
"""


@pytest.mark.parametrize("works", [True, False])
def test_an_ffmpeg_gets_every_frame_and_one_that_fails_leaves_a_gif(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(FFMPEG.format(python=sys.executable, works=works))
    program.chmod(0o755)
    monkeypatch.setattr(videos, "_ffmpeg", lambda: str(program))
    clip = videos.encoded(film(3))
    if works:
        assert clip.suffix == ".mp4" and clip.data == b"".join(bytes([10 * i] * 8 * 6 * 3) for i in range(3))
    else:
        assert clip == videos.Clip(videos.gif(film(3)), ".gif")


def test_the_store_keeps_videos_to_the_bit(tmp_path: Path) -> None:
    store, frames = Store(tmp_path, 0), noise(5)
    still = [frames[0], frames[0], frames[0]]  # equal frames are not merged
    store.save("key", "a task", {0: frames, 1: still, 7: frames[1]})
    for number, kept in ((0, frames), (1, still)):
        loaded = store.load("key", "a task", number)
        assert isinstance(loaded, list) and len(loaded) == len(kept)
        assert all(np.array_equal(a, b) for a, b in zip(loaded, kept, strict=True))
    assert isinstance(store.load("key", "a task", 7), Image.Image)
    assert store.numbers("key", "a task") == {0, 1, 7}
    path = store.path("key", "a task", 0, ".zip")
    whole = path.read_bytes()
    for broken in (whole[:-30], whole[:60] + b"?" + whole[61:]):
        path.write_bytes(broken)
        assert store.numbers("key", "a task") == {1, 7}


def test_completions_show_and_keep_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict] = []
    monkeypatch.setattr(wandb, "run", SimpleNamespace())
    monkeypatch.setattr(wandb, "log", sent.append)
    monkeypatch.setattr(wandb, "Table", lambda **table: table)
    writer = SummaryWriter(str(tmp_path / "runs"))
    rows = [
        Completion("one", "a", film(9), {"video": 1.0}, label="student", beside={"base": Beside(film(9), {})}),
        Completion("two", "a", film(2)[1], {"video": 2.0}),
    ]
    log_completions(rows, tmp_path, 3, ["wandb"], [writer])
    writer.close()
    folder, gif = tmp_path / "completions", videos.gif(film(9))
    assert (folder / "sample_a_1.gif").read_bytes() == gif
    assert np.array_equal(Image.open(folder / "sample_a_1.png"), videos.strip(film(9)))
    assert [one["file"] for one in last_completions(tmp_path)["samples"]] == [
        "completions/sample_a_1.gif",
        "completions/sample_a_2.png",
    ]
    table = datasets.Dataset.from_parquet(str(folder / "completions_00003.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table["video"][:] == [gif, None] and table["reward_video"][:] == [1.0, 2.0]
    assert table[0]["image"].size == (64, 6) and table[1]["image"].size == (8, 6)
    with Image.open(folder / "step_000003.png") as picture:
        assert picture.width > 100
    (logged,) = sent
    video = logged["completions_video/a_1"]
    assert isinstance(video, wandb.Video) and "completions_video/a_2" not in logged
    assert Path(video._path).read_bytes() == gif
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    (shown,) = events.Images("completions_video/a_1")
    assert shown.encoded_image_string == gif and (shown.width, shown.height, shown.step) == (8, 6, 3)
