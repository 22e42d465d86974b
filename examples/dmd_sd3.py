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

# /// script
# dependencies = ["trl-diffusion-opd"]
# ///

"""
Distils several teachers into one student that draws in few steps, by matching distributions (DMD2 or TDM).

The embedded tiny model, on any laptop:

```bash
accelerate launch examples/dmd_sd3.py --config examples/configs/tiny_dmd.yaml
```

A four-step student of two of the paper's teachers for Stable Diffusion 3.5 Medium, without guidance:

```bash
accelerate launch examples/dmd_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts ocr=prompts/ocr.txt aesthetic=prompts/pickapic.txt \
    --teachers ocr=quanhaol/DiffusionOPD/OCRTeacher/lora aesthetic=quanhaol/DiffusionOPD/AesTeacher/lora \
    --num_inference_steps 4 --guidance_scale 1.0 --teacher_guidance_scale 4.5 \
    --max_sequence_length 128 \
    --per_device_train_batch_size 8 \
    --max_steps 1000 \
    --output_dir sd35-four-steps
```
"""

from trl_diffusion_opd.scripts.dmd import ARGUMENTS, main
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
