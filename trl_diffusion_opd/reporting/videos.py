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

"""Videos as files and as pictures: MP4 where ffmpeg is, else an animated GIF, and strips of frames."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from ..pipelines.images import Picture


# Frames a second of videos that are shown. Models were trained at 8 to 30, and no pipeline says at how many.
FPS = 16
MP4, GIF = ".mp4", ".gif"
_MOST = 8  # frames of a strip


@dataclass(frozen=True)
class Clip:
    """
    An encoded video.

    Attributes:
        data (`bytes`): the content of its file.
        suffix (`str`): `".mp4"` (H.264) or `".gif"`.
    """

    data: bytes
    suffix: str

    def write(self, path: Path) -> Path:
        """Writes the file beside `path`, with this clip's suffix, in one step. Returns where it is."""
        path = path.with_name(f"{path.name}{self.suffix}")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(self.data)
        os.replace(temporary, path)
        return path


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Joins at most 8 evenly spaced frames of a video side by side, the first and the last among them."""
    shown = min(len(frames), _MOST)
    chosen = [frames[round(i * (len(frames) - 1) / max(1, shown - 1))] for i in range(shown)]
    joined = Image.new("RGB", (sum(frame.width for frame in chosen), max(frame.height for frame in chosen)))
    left = 0
    for frame in chosen:
        joined.paste(frame, (left, 0))
        left += frame.width
    return joined


def still(picture: Picture) -> Image.Image:
    """The image itself, or the strip of a video."""
    return strip(picture) if isinstance(picture, list) else picture


def encoded(frames: Sequence[Image.Image]) -> Clip:
    """
    Encodes a video at 16 frames a second: as MP4 (H.264, which browsers play) if there is an ffmpeg that can, from the
    package `imageio-ffmpeg` or on the path, else as an animated GIF.
    """
    frames = [frame.convert("RGB") for frame in frames]
    data = _mp4(frames)
    return Clip(gif(frames), GIF) if data is None else Clip(data, MP4)


def gif(frames: Sequence[Image.Image]) -> bytes:
    """An animated GIF, which repeats for ever. It has 256 colours a frame."""
    file = BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / FPS), loop=0)
    return file.getvalue()


def _mp4(frames: Sequence[Image.Image]) -> bytes | None:
    """`None` without an ffmpeg that writes H.264."""
    program = _ffmpeg()
    if program is None:
        return None
    width, height = frames[0].size
    given = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FPS} -i -".split()
    # H.264 with halved colours, the only one that every browser plays, has even sides.
    made = "-an -c:v libx264 -pix_fmt yuv420p -vf pad=ceil(iw/2)*2:ceil(ih/2)*2 -movflags +faststart -f mp4".split()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        command = [program, "-y", "-loglevel", "error", *given, *made, str(path)]
        done = subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        return path.read_bytes() if done.returncode == 0 and path.is_file() else None


def _ffmpeg() -> str | None:
    if find_spec("imageio_ffmpeg") is None:
        return shutil.which("ffmpeg")
    try:
        return import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except RuntimeError:  # the package was installed without its program
        return shutil.which("ffmpeg")
