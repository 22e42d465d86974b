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

r"""
Trains a teacher for on-policy distillation by reinforcement learning on the forward process, DiffusionNFT.

A teacher for one task of the embedded 32 px model, on a laptop:

```bash
python examples/teacher_nft_sd3.py --config examples/configs/tiny_nft.yaml
```

With `--dry_run` it draws and scores a round, shows what the run would cost, and stops.

A GenEval teacher for Stable Diffusion 3.5 Medium on eight GPUs, with the settings of the paper:

```bash
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/teacher_nft_sd3.py \
    --model_name_or_path stabilityai/stable-diffusion-3.5-medium \
    --dtype bfloat16 \
    --prompts geneval=prompts/geneval.jsonl \
    --reward_funcs geneval=geneval \
    --max_sequence_length 128 \
    --num_generations 24 \
    --per_device_train_batch_size 6 \
    --gradient_accumulation_steps 24 \
    --max_steps 1000 \
    --output_dir sd35-geneval-teacher
```
"""

from trl_diffusion_opd.scripts.nft import ARGUMENTS, main
from trl_diffusion_opd.scripts.parser import parse
from trl_diffusion_opd.scripts.refusals import refusals_told


if __name__ == "__main__":
    with refusals_told():
        main(*parse(ARGUMENTS))
