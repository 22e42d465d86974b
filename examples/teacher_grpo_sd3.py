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
Trains a teacher by reinforcement learning (Flow-GRPO or GRPO-Guard), or one model on several tasks at once.

The embedded tiny model, on any laptop:

```bash
accelerate launch examples/teacher_grpo_sd3.py --config examples/configs/tiny_grpo.yaml
```

With `--dry_run` it draws and scores a round, shows what the run would cost, and stops.

Stable Diffusion 3.5 Medium, or any other flow-matching pipeline of diffusers:

```bash
accelerate launch examples/teacher_grpo_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts ocr=prompts/ocr.txt \
    --reward_funcs ocr=ocr \
    --loss_type grpo_guard \
    --num_generations 24 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 12 \
    --beta 0.009 \
    --max_sequence_length 128 --guidance_scale 4.5 \
    --max_steps 2000 \
    --output_dir sd35-ocr-teacher
```

With several tasks (`--prompts ocr=… geneval=…`, a reward for each) it is multi-task RL.
"""

from trl_diffusion_opd.scripts.grpo import ARGUMENTS, main
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
