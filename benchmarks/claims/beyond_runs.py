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


"""What is trained for the claims beyond the paper's: each claim's runs, and the settings that its methods are searched over."""

import json
from dataclasses import dataclass
from typing import Any

from beyond_worlds import TEMPLATES
from methods import RESULTS


BEYOND = RESULTS.parent / "beyond"
SEARCH_SEED = 100
SHORT = 26_000  # forwards: what OPD's 80 updates at ten steps cost, twice
LONG = 52_000  # as the whole student of `opd`
TEN = ({"steps": 10},)

# Fields of every config, besides those of `examples/configs/tiny.yaml`.
SHARED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "num_eval_images": 64,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 10,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
    "log_completions": False,
}
# Reinforcement learning has no teachers to evaluate.
WITH_TEACHERS: dict[str, Any] = {"eval_base_and_teachers": False}
OPD: dict[str, Any] = {"loss_weighting": "velocity", "num_trained_timesteps": 1, "learning_rate": 2e-3}

# Equal numbers of settings for each method, tried on a seed that is not tested.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "opd": [
        {**OPD, "learning_rate": 2e-3},
        {**OPD, "learning_rate": 1e-3},
        {**OPD, "learning_rate": 2e-3, "num_trained_timesteps": None},
    ],
    "dmd2": [
        {"loss_type": "dmd2", "learning_rate": rate, "fake_learning_rate": rate, "fake_updates": fake}
        for rate, fake in ((1e-3, 1), (3e-4, 1), (1e-3, 3))
    ],
    "tdm": [
        {"loss_type": "tdm", "learning_rate": rate, "fake_learning_rate": of_fake, "fake_updates": 1}
        for rate, of_fake in ((1e-3, 1e-3), (3e-4, 3e-4), (3e-4, 1.5e-3))
    ],
    "sft": [
        {"learning_rate": 2e-3},
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-3, "timestep_density": "uniform"},
    ],
}
# Forwards of the world that edits: what `tiny_edit`'s 400 updates cost, about half of it for comparisons of settings, and
# what its three teachers cost.
EDIT_STUDENT = 72_200
EDIT_SHORT = 33_600
EDIT_TEACHERS = (120 + 160 + 40) * 96 * 12
# One query of the teachers a rollout, at a step that is drawn with a preference, as DanceOPD does.
DANCE: dict[str, Any] = {"timestep_density": [5.0, 2.0], "unbiased_timesteps": False}
# Reinforcement learning on all its tasks, with the teachers' settings.
JOINT: dict[str, Any] = {
    "num_inference_steps": 8,
    "eval_num_inference_steps": 10,
    "sde_window_range": [0, 4],
    "num_generations": 12,
    "per_device_train_batch_size": 96,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
}

TRAINERS = {"opd": "opd", "dmd2": "dmd", "tdm": "dmd", "sft": "sft"}
FEW_STEP = ("opd", "dmd2", "tdm")


@dataclass(frozen=True)
class Run:
    """
    A training.

    Attributes:
        trainer (`str`): `opd`, `dmd`, `sft` or `grpo`.
        config (`dict`): fields of its config, besides `SHARED`.
        world (`str`): `tiny`, `edit`, `alike`, `short` or `short with teacher_prompt`: prompts and teachers.
        forwards (`int`): its budget, in rows that the network sees forward.
        sampled (`tuple[dict]`): `steps` and `guidance` that its student is drawn with.
        own_teacher (`bool`): whether the student teaches itself.
        curve (`bool`): whether it is evaluated during the training. This is not part of its budget.
    """

    trainer: str
    config: dict[str, Any]
    forwards: int = SHORT
    world: str = "tiny"
    sampled: tuple[dict[str, Any], ...] = TEN
    own_teacher: bool = False
    curve: bool = False


def with_steps(method: str, steps: int, setting: dict[str, Any], forwards: int, curve: bool = False) -> Run:
    """A method of the few-step comparison, trained on and drawn with a grid of `steps`. SFT's teachers draw with ten."""
    config = {**setting, "num_inference_steps": 10 if method == "sft" else steps, "eval_num_inference_steps": steps}
    return Run(TRAINERS[method], config, forwards, sampled=({"steps": steps},), curve=curve)


def search_runs() -> dict[str, Run]:
    runs = {}
    for steps, methods in ((4, FEW_STEP), (10, tuple(SETTINGS))):
        for method in methods:
            for i, setting in enumerate(SETTINGS[method]):
                runs[f"{method}-{steps}-{i}"] = with_steps(method, steps, setting, SHORT // 2)
    return runs


def found(method: str, steps: int) -> dict[str, Any]:
    """The setting of a method with the best mean verdict in the search. At two steps it is that of four."""
    searched = 4 if steps < 10 else 10
    best, chosen = -1.0, None
    for i, setting in enumerate(SETTINGS[method]):
        path = BEYOND / "search" / f"{method}-{searched}-{i}_{SEARCH_SEED}.json"
        if not path.exists():
            raise SystemExit(f"{path.name} is missing: run --search first.")
        scores = json.loads(path.read_text())["measured"][0]["scores"]
        mean = sum(scores.values()) / len(scores)
        if mean > best:
            best, chosen = mean, setting
    assert chosen is not None
    return chosen


def claim_runs() -> dict[str, dict[str, Run]]:
    """The runs of each claim. The settings of the first two are those that the search found."""
    at_scales = tuple({"steps": 10, "guidance": scale} for scale in (1.0, 2.0, 3.0, 5.0, 7.0))
    few = {"num_inference_steps": 5, "eval_num_inference_steps": 10}
    guided = {**OPD, **few, "guidance_scale": 3.0}
    return {
        "methods": {f"{m}-10": with_steps(m, 10, found(m, 10), SHORT, True) for m in SETTINGS if searched(m, 10)},
        "steps": {
            f"{method}-{steps}-long": with_steps(method, steps, found(method, steps), LONG)
            for steps in (4, 2)
            for method in FEW_STEP
            if searched(method, steps)
        },
        "extrapolation": {
            f"extrapolation-{factor:g}": Run("opd", {**OPD, **few, "teacher_extrapolation": factor}, curve=factor == 1)
            for factor in (1.0, 1.1, 1.25, 1.5)
        },
        "templates": {
            "alike-plain": Run("opd", {**OPD, **few}, world="alike"),
            "alike-templates": Run("opd", {**OPD, **few, "prompt_templates": TEMPLATES}, world="alike"),
        },
        "teacher_prompt": {
            "short-plain": Run("opd", {**OPD, **few}, world="short"),
            "short-teacher_prompt": Run("opd", {**OPD, **few}, world="short with teacher_prompt"),
        },
        "branches": {
            f"branches-{weight:g}": Run(
                "opd", {**guided, "guidance_branch_weight": weight}, forwards=2 * SHORT, sampled=at_scales
            )
            for weight in (0.0, 1.0)
        },
        "edits": {
            "edit-long": Run("opd", {**OPD, **few}, EDIT_STUDENT, world="edit", curve=True),
            "edit-single": Run("opd", {**OPD, **few}, EDIT_SHORT, world="edit", curve=True),
            "edit-danceopd": Run("opd", {**OPD, **few, **DANCE}, EDIT_SHORT, world="edit"),
            "edit-all": Run("opd", {**OPD, **few, "num_trained_timesteps": None}, EDIT_SHORT, world="edit"),
            "edit-joint": Run("grpo", JOINT, EDIT_TEACHERS + EDIT_STUDENT, world="edit", curve=True),
        },
        "own_teacher": {
            "own-teacher": Run("opd", {**OPD, **few}, world="short with teacher_prompt", own_teacher=True, curve=True),
        },
    }


def searched(method: str, steps: int) -> bool:
    """Whether all settings of a method have been tried."""
    name = f"{method}-{4 if steps < 10 else 10}"
    return all((BEYOND / "search" / f"{name}-{i}_{SEARCH_SEED}.json").exists() for i in range(len(SETTINGS[method])))
