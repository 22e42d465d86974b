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

"""Families that edit pictures, and some more of the sweep's: of each way to take a picture one."""

import sys
from pathlib import Path

from helpers.edit_families import EDIT_FAMILIES, EditFamily


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from sweep_parts.picture_videos import WAN_2_2  # noqa: E402
from sweep_parts.pictures import PICTURES  # noqa: E402


PICTURE_FAMILIES: dict[str, EditFamily] = {
    **EDIT_FAMILIES,
    "z_image_omni": PICTURES["ZImageOmniPipeline"],
    # Its call takes no size.
    "longcat_edit": PICTURES["LongCatImageEditPipeline"],
    # Their states have latents of the picture in them: beside the noise, before it, and put back at each step.
    "kandinsky5_i2i": PICTURES["Kandinsky5I2IPipeline"],
    "ltx_i2v": PICTURES["LTXImageToVideoPipeline"],
    "hunyuan_video_i2v": PICTURES["HunyuanVideoImageToVideoPipeline"],
    # A CLIP reads the picture, too; the picture is in place of a frame.
    "wan_i2v": PICTURES["WanImageToVideoPipeline"],
    "wan_2_2_5b_i2v": WAN_2_2["wan_2_2_5b_i2v"],
}
