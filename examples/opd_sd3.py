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
Distils several teachers into one student (DiffusionOPD).

The embedded tiny model, on any laptop:

```bash
accelerate launch examples/opd_sd3.py --config examples/configs/tiny.yaml
```

With `--dry_run` it shows what the run would do, draws an image of every model, and stops.

Stable Diffusion 3.5 Medium with the paper's teachers, or any other flow-matching pipeline of diffusers:

```bash
accelerate launch examples/opd_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --teachers aesthetic=quanhaol/DiffusionOPD/AesTeacher/lora \
               ocr=quanhaol/DiffusionOPD/OCRTeacher/lora \
               geneval=quanhaol/DiffusionOPD/GenEvalTeacher/lora \
    --teacher_guidance_scales geneval=1.0 \
    --prompts aesthetic=prompts/aesthetic.txt ocr=prompts/ocr.txt geneval=prompts/geneval.jsonl \
    --max_sequence_length 128 --guidance_scale 4.5 \
    --per_device_train_batch_size 8 \
    --max_steps 1000 \
    --output_dir sd35-opd
```
"""

from trl_diffusion_opd.scripts.opd import ARGUMENTS, main
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
