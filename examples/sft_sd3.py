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
Fine-tunes by flow matching, on images that teachers draw or on images of a dataset.

The embedded tiny model, on images of its teachers, on any laptop:

```bash
accelerate launch examples/sft_sd3.py --config examples/configs/tiny_sft.yaml
```

Stable Diffusion 3.5 Medium on a dataset with columns `image` and `prompt`:

```bash
accelerate launch examples/sft_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts style=owner/images \
    --max_sequence_length 128 --guidance_scale 4.5 \
    --per_device_train_batch_size 8 \
    --max_steps 1000 \
    --output_dir sd35-sft
```
"""

from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told
from trl_diffusion_opd.scripts.sft import ARGUMENTS, main


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
