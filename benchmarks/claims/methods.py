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

"""What each method of the comparison trains: stages for `trl_diffusion_opd.scripts.stages`, made from the examples' own settings."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_diffusion_opd import DiffusionSFTConfig, tiny


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "source" / "results" / "claims"
TASKS = tuple(tiny.TASKS)
# With this many updates the small comparisons, between forms of distillation, end before all of them have converged.
SHORT_UPDATES = 80
SHORT_RANK = 32
RANKS = (2, 8, 32)
NOISE = {"ode": {"sampler": "ode"}} | {
    f"flow_sde_{level}": {"sampler": "flow_sde", "noise_level": level} for level in (0.3, 0.7)
}
WEIGHTINGS = ("kl", "velocity")

_GRPO = "examples/configs/tiny_grpo.yaml"
_OPD = "examples/configs/tiny.yaml"
_OF_STAGES = ("model_name_or_path", "teachers", "prompts", "eval_prompts", "reward_funcs", "lora_r", "lora_alpha")


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def teacher_updates() -> dict[str, int]:
    """Updates of the teachers' trainings."""
    stages = read("examples/stages/tiny_two_stage.yaml")["stages"]
    default = read(_GRPO)["max_steps"]
    return {
        task: stage.get("config", {}).get("max_steps", default) for task, stage in zip(TASKS, stages, strict=False)
    }


def rl_forwards(images: int) -> int:
    """Rows that the network sees forward in an update by GRPO: the rollout, and the steps that are trained."""
    settings = read(_GRPO)
    first, last = settings["sde_window_range"]
    return images * (settings["num_inference_steps"] + last - first)


def teacher_forwards() -> dict[str, int]:
    images = read(_GRPO)["per_device_train_batch_size"]
    return {task: updates * rl_forwards(images) for task, updates in teacher_updates().items()}


def opd_forwards(seed: int) -> int:
    path = RESULTS / f"opd_{seed}.json"
    if not path.exists():
        raise SystemExit(
            f"{path.name} is missing, and the budget of the others is that of opd. Run --methods opd first."
        )
    return json.loads(path.read_text())["cost"]["forwards"]


def budget(seed: int) -> int:
    """Forwards of all teachers and the student."""
    return sum(teacher_forwards().values()) + opd_forwards(seed)


def _rl_stage(name: str, tasks: Sequence[str], config: dict[str, Any]) -> dict[str, Any]:
    verifiers = "trl_diffusion_opd.tiny.verifiers"
    return {
        "name": name,
        "trainer": "grpo",
        "config_file": _GRPO,
        "prompts": [f"{task}=examples/data/tiny/{task}_train.jsonl" for task in tasks],
        "eval_prompts": [f"{task}=examples/data/tiny/{task}_validation.jsonl" for task in tasks],
        "reward_funcs": [f"{task}={verifiers}:{task}{end}" for task in tasks for end in ("_graded", "")],
        "config": {"reward_weights": [1.0, 0.0] * len(tasks), "eval_on_start": False, **config},
    }


def multi_task(seed: int, rank: int | None = None) -> list[dict[str, Any]]:
    """One trainer, all rewards, settings of the teachers: three groups of twelve images of each task in an update."""
    images = 36
    updates = round(budget(seed) / rl_forwards(images * len(TASKS)))
    config = {"per_device_train_batch_size": images, "max_steps": updates, "metric_for_best_model": "eval_reward"}
    stage = _rl_stage("multi-task", TASKS, {**config, "eval_steps": 50, "save_steps": 50, "num_eval_images": 128})
    return [stage if rank is None else stage | {"lora_r": rank, "lora_alpha": 2 * rank}]


def cascade(seed: int, order: Sequence[str]) -> list[dict[str, Any]]:
    """One task after another, each with its teacher's settings and its share of the budget."""
    updates, images = teacher_updates(), read(_GRPO)["per_device_train_batch_size"]
    scale = budget(seed) / sum(teacher_forwards().values())
    assert rl_forwards(images) * sum(updates.values()) == sum(teacher_forwards().values())
    stages = []
    for task in order:
        every = 40 if task == "compose" else 20
        config = {"max_steps": round(updates[task] * scale), "metric_for_best_model": f"eval_{task}/{task}"}
        stages.append(_rl_stage(task, [task], {**config, "eval_steps": every, "save_steps": every}))
    return stages


def distilled(rank: int | None = None, trainer: str = "opd", **config: Any) -> list[dict[str, Any]]:
    stage: dict[str, Any] = {"name": "student", "trainer": trainer, "config_file": _OPD}
    if rank is not None:
        stage |= {"lora_r": rank, "lora_alpha": 2 * rank}
    config = {"log_completions": False, "num_eval_images": 128, **config}
    if trainer == "sft":
        # Fine-tuning on images has no walk to configure; its teachers draw as in evaluations.
        settings = read(stage.pop("config_file"))
        config["num_inference_steps"] = settings["eval_num_inference_steps"]
        of_trainer = {field.name for field in dataclasses.fields(DiffusionSFTConfig)} - {"output_dir"}
        stage |= {key: settings[key] for key in _OF_STAGES if key not in stage}
        config = {key: value for key, value in settings.items() if key in of_trainer} | config
    return [stage | {"config": config}]


def short(rank: int = SHORT_RANK, trainer: str = "opd", **config: Any) -> list[dict[str, Any]]:
    lengths = {"max_steps": SHORT_UPDATES, "eval_steps": SHORT_UPDATES // 4, "save_steps": SHORT_UPDATES // 2}
    return distilled(rank, trainer, **lengths, **config)


METHODS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "opd": lambda seed: distilled(),
    "multi-task": multi_task,
    "multi-task-r64": lambda seed: multi_task(seed, rank=64),  # as much room as the distilled student has
}
for _i in range(len(TASKS)):
    _order = TASKS[_i:] + TASKS[:_i]
    METHODS["cascade-" + "-".join(_order)] = lambda seed, order=_order: cascade(seed, order)
for _rank in RANKS:
    METHODS[f"on-policy-r{_rank}"] = lambda seed, rank=_rank: short(rank)
    METHODS[f"off-policy-r{_rank}"] = lambda seed, rank=_rank: short(rank, on_policy=False)
    METHODS[f"sft-r{_rank}"] = lambda seed, rank=_rank: short(rank, "sft")
for _noise, _sampler in NOISE.items():
    for _weighting in WEIGHTINGS:
        METHODS[f"{_noise}-{_weighting}"] = lambda seed, sampler=_sampler, weighting=_weighting: short(
            loss_weighting=weighting, **sampler
        )
METHODS["policy-gradient"] = lambda seed: short(
    loss_type="policy_gradient", loss_weighting="kl", **NOISE["flow_sde_0.7"]
)
