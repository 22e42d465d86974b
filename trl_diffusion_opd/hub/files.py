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

"""The names of all files that a run writes to its output folder, and the list of those that are pushed to the Hub."""

# The student
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's format
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers'
# diffusers' too, of a base with two experts: for its transformer and its transformer_2.
HIGH_NOISE_LORA_FILE = "pytorch_lora_weights_high_noise.safetensors"
LOW_NOISE_LORA_FILE = "pytorch_lora_weights_low_noise.safetensors"
CONFIG_FILE = "config.json"
FULL_FILES = "diffusion_pytorch_model*.safetensors"
FULL_INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
ARGUMENTS_FILE = "training_args.json"
MANIFEST_FILE = "teacher_manifest.json"
CARD_FILE = "README.md"
MERGE_REPORT_FILE = "merge_report.json"

# Only in checkpoints, beside Trainer's own files
RAW_FILE = "student_raw.safetensors"
OLD_POLICY_FILE = "old_policy.safetensors"
FAKE_SCORE_FILE = "fake_score.safetensors"
FAKE_OPTIMIZER_FILE = "fake_optimizer.pt"
GRID_FILE = "noise_grid.json"
PROMPTS_FILE = "prompts.json"
EVALUATION_SETTINGS_FILE = "evaluation.json"
CHANGES_FILE = "changes.json"
SEAL_FILE = "complete"
DEEPSPEED_FILES = "global_step*/*_optim_states.pt"  # one a process
ZERO3_FILES = "global_step*/zero_pp_rank_*_model_states.pt"

# Written by a stage of `trl-diffusion-opd stages`
STAGE_FILE = "stage.json"
FINISHED_FILE = "finished"

# In the output folder itself
LOCK_FILE = ".lock"
CARD_CONTENT_FILE = ".card.json"  # what the card is rendered from
REFERENCES_FILE = "base_and_teachers.json"
COMPLETIONS_FOLDER = "completions"
LAST_COMPLETIONS_FILE = "last.json"  # in this folder: the images that the card shows
DRY_RUN_FOLDER = "dry_run"
DRY_RUN_PICTURE = "dry_run.png"

# Written by an evaluation
REPORT_FILE = "retention.json"
SCORES_FILE = "retention_scores.json"
TABLES_FILE = "retention.md"
TIMING_FILE = "timing.json"
PAGE_FILE = "samples.html"
RETENTION_PICTURE = "retention.png"
RADAR_PICTURE = "radar.png"
SAMPLES_PICTURE = "samples.png"
CURVES_PICTURE = "curves.png"

# What an evaluation writes besides its images and scores, which the next one reuses
EVALUATION_FILES = (
    REPORT_FILE,
    SCORES_FILE,
    TABLES_FILE,
    TIMING_FILE,
    PAGE_FILE,
    RETENTION_PICTURE,
    RADAR_PICTURE,
    SAMPLES_PICTURE,
)
# A folder with one of these files is a LoRA.
LORA_FILES = (ADAPTER_CONFIG_FILE, LORA_FILE)
# The files of a saved student. A checkpoint has them as well.
STUDENT_FILES = (
    *LORA_FILES,
    HIGH_NOISE_LORA_FILE,
    LOW_NOISE_LORA_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    FULL_FILES,
    FULL_INDEX_FILE,
    ARGUMENTS_FILE,
    MANIFEST_FILE,
    GRID_FILE,
)
PICTURES = (RETENTION_PICTURE, RADAR_PICTURE, SAMPLES_PICTURE, CURVES_PICTURE)
# The only files that are pushed. Others, such as logs and optimizer states, may contain tokens, paths and the
# machine's name.
PUSHED_FILES = (
    *STUDENT_FILES,
    CARD_FILE,
    REPORT_FILE,
    *PICTURES,
    f"{COMPLETIONS_FOLDER}/step_*.png",
    f"{COMPLETIONS_FOLDER}/sample_*.png",
    f"{COMPLETIONS_FOLDER}/sample_*.gif",
    f"{COMPLETIONS_FOLDER}/sample_*.mp4",
)
