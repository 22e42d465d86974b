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

"""
Gradients on the tiny world: do the tasks' pull against each other, and how noisy are the forms of the distillation loss?

    python benchmarks/claims/gradients.py --work outputs/claims/gradients

Nothing is trained. What is in the folder `--work` already is not measured again, if it was measured with the same settings.
The result, `docs/source/results/claims_gradients.json`:

    {"interference": {
        "settings": {...},
        "rl" | "opd": {"at": {"base" | "later": {
            "cosine": {"compose-letters": {"mean": x, "seeds": [...]}, "compose-style": ..., "letters-style": ...},
            "corrected": the same, cos / sqrt(rel rel), null where a gradient is all noise,
            "reliability": {"compose": {"mean": x, "seeds": [...]}, ...}}}}},
     "variance": {
        "settings": {...},
        "steps": [{"step": j, "level": t, "kl": nats, "d": dimensions, "rho": d,
                   "nsr": {form: x}, "predicted": {form: x}, "cosine": ..., "corrected": ..., "norm_ratio": ...}, ...],
        "lora": {form: {"nsr": x, "predicted": x, "cosine": x, "corrected": x, "norm_ratio": x}},
        "lora_steps": as "steps", for the gradient of the LoRA}}

Interference: joint RL is `DiffusionGRPOTrainer` with `tiny_grpo.yaml` and graded rewards, OPD is `DiffusionOPDTrainer` with
`tiny.yaml`, both on the student's LoRA of `tiny.yaml`: "base" is where training starts (B = 0, so the gradient is in B alone),
"later" the mean of the three teachers. OPD trains all steps instead of drawing one for all tasks, which has the same
expectation; a common draw would correlate the tasks' noise.

Variance: frozen states of the student "later" on a walk by Flow-SDE, one a task and step, KL weighting. "steps" is the gradient
with respect to the velocity, where the Jacobian is the identity and rho the dimension d; "lora_steps" that of the LoRA, where
`rho = tr(J J') |gap|² / |J' gap|²` is measured. Figures are means over the tasks' states; a step's `predicted` is the mean of
what is predicted at each. The forms are those of [`FORMS`].
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from gradient_statistics import Moments, against, corrected_cosine, cosine
from methods import ROOT, TASKS, read
from peft import LoraConfig
from torch import Tensor

from trl_diffusion_opd import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionOPDConfig,
    DiffusionOPDTrainer,
    merge_teachers,
    tiny,
)
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.algorithms.grpo import log_ratio, transition_kl
from trl_diffusion_opd.algorithms.opd import policy_gradient_loss
from trl_diffusion_opd.algorithms.rollout import sample_generators, walk
from trl_diffusion_opd.models.student import ATTENTION_TARGETS


OUTPUT = ROOT / "docs" / "source" / "results" / "claims_gradients.json"
OPD, GRPO = "examples/configs/tiny.yaml", "examples/configs/tiny_grpo.yaml"
METHODS, PLACES = ("rl", "opd"), ("base", "later")
QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "log_completions": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_steps": 10**9,
}
Trainer = DiffusionGRPOTrainer | DiffusionOPDTrainer


def make_trainer(method: str, student_init: str | None, seed: int, folder: Path, **options: Any) -> Trainer:
    """A trainer of all tasks with the settings of the examples, on the student's LoRA of OPD's."""
    lora = read(OPD)
    settings = read(GRPO if method == "rl" else OPD)
    settings.pop("reward_weights", None)  # of one task's rewards, with one that is only watched
    settings |= QUIET | {"output_dir": str(folder), "seed": seed, "student_init": student_init} | options
    config_class = DiffusionGRPOConfig if method == "rl" else DiffusionOPDConfig
    fields = {field.name for field in dataclasses.fields(config_class)}
    arguments: dict[str, Any] = {
        "model": tiny.BASE,
        "train_dataset": tiny.dataset("train"),
        "peft_config": LoraConfig(
            r=lora["lora_r"],
            lora_alpha=lora["lora_alpha"],
            init_lora_weights="gaussian",
            target_modules=list(ATTENTION_TARGETS),
        ),
        "args": config_class(**{name: value for name, value in settings.items() if name in fields}),
    }
    if method == "rl":
        return DiffusionGRPOTrainer(reward_funcs=tiny.graded_rewards, **arguments)
    return DiffusionOPDTrainer(teachers=tiny.TEACHERS, **arguments)


def merged(folder: Path) -> str:
    """The mean of the teachers' updates as a LoRA of the student's rank: where a student is on its way."""
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    merge_teachers(pipeline, tiny.TEACHERS, folder, rank=read(OPD)["lora_r"])
    return str(folder)


def rows_of(dataset: Dataset, task: str, seed: int) -> Iterator[dict[str, Any]]:
    """A task's rows in random order, again and again."""
    rows = [row for row in dataset if row["task"] == task]
    rng = np.random.default_rng([seed, TASKS.index(task)])
    while True:
        yield from (rows[i] for i in rng.permutation(len(rows)))


# Interference


def gradient(trainer: Trainer) -> Tensor:
    """Takes the accumulated gradient of the LoRA, shape `(1, p)`."""
    parts = []
    for parameter in trainer.student.parameters():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)[None]


def rl_draw(trainer: DiffusionGRPOTrainer, batches: list[list[dict[str, Any]]]) -> Iterator[tuple[str, Tensor]]:
    """Each task's gradient of a round of joint RL. Rows come once a group."""
    groups = trainer.args.num_generations
    for rollout in trainer.roll_out([[row for row in batch for _ in range(groups)] for batch in batches]).rollouts:
        for loss_of in trainer.losses(trainer.model, rollout):
            trainer.accelerator.backward(loss_of()[0])
        yield rollout.task, gradient(trainer)


def opd_draw(trainer: DiffusionOPDTrainer, batches: list[list[dict[str, Any]]]) -> Iterator[tuple[str, Tensor]]:
    """Each task's gradient of a round of OPD."""
    for task, batch in zip(trainer.tasks, batches, strict=True):
        trainer.training_step(trainer.model, batch)
        yield task, gradient(trainer)


def interference(
    method: str, seed: int, draws: int, prompts: int, student_init: str | None, folder: Path
) -> dict[str, Any]:
    """Cosines of the tasks' mean gradients over `draws` rounds of `prompts` prompts a task."""
    options = {} if method == "rl" else {"num_trained_timesteps": None}
    trainer = make_trainer(method, student_init, seed, folder, **options)
    streams = [rows_of(trainer.train_dataset, task, seed) for task in trainer.tasks]
    moments = {task: Moments() for task in trainer.tasks}
    draw: Callable[..., Iterator[tuple[str, Tensor]]] = rl_draw if method == "rl" else opd_draw
    for k in range(1, draws + 1):  # the noise of a round depends on the number of the update
        trainer.state.global_step = k
        for task, sample in draw(trainer, [[next(stream) for _ in range(prompts)] for stream in streams]):
            moments[task].add(sample)
    pairs = {f"{a}-{b}": (moments[a], moments[b]) for a, b in combinations(TASKS, 2)}
    return {
        "cosine": {name: cosine(a.mean, b.mean) for name, (a, b) in pairs.items()},
        "corrected": {name: corrected_cosine(a, b) for name, (a, b) in pairs.items()},
        "reliability": {task: moments[task].reliability for task in TASKS},
    }


def over_seeds(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and values of every figure over seeds; no mean where a seed has no value."""
    result: dict[str, Any] = {}
    for figure, names in units[0].items():
        result[figure] = {}
        for name in names:
            values = [unit[figure][name] for unit in units]
            mean = None if None in values else statistics.mean(values)
            result[figure][name] = {"mean": mean, "seeds": values}
    return result


# Variance


def closed_form(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """What OPD trains by `loss_weighting="kl"`."""
    return c**2 / (2 * s**2) * velocity_gap_sq(v, target)


def attached_mean(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """`KL · ratio`, differentiated through both, each a mean over the dimensions."""
    return transition_kl(v, target, c, s) * log_ratio(v, v.detach(), z, c, s).exp()


def attached_sum(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """The same with sums, and the product divided once."""
    d = z[0].numel()
    return transition_kl(v, target, c, s) * (d * log_ratio(v, v.detach(), z, c, s)).exp()


def log_ratio_baseline(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """What OPD trains by `loss_type="policy_gradient"`."""
    return policy_gradient_loss(v, target, z, c, s, weight=c**2 / (2 * s**2))


def log_ratio_no_baseline(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """The same without subtracting the KL from the log-ratio."""
    kl = z[0].numel() * transition_kl(v, target, c, s).detach()
    return log_ratio_baseline(v, target, z, c, s) + kl * log_ratio(v, v.detach(), z, c, s)


def log_ratio_baseline_mean(v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """With both factors averaged over the dimensions instead of their product."""
    return log_ratio_baseline(v, target, z, c, s) / z[0].numel()


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {
    "closed_form": closed_form,
    "attached_sum": attached_sum,
    "attached_mean": attached_mean,
    "log_ratio": log_ratio_no_baseline,
    "log_ratio_baseline": log_ratio_baseline,
    "log_ratio_baseline_mean": log_ratio_baseline_mean,
}


def predicted(kl: float, d: int, rho: float) -> dict[str, float]:
    """Noise-to-signal of one transition; `kl` summed over its `d` dimensions."""
    return {
        "closed_form": 0.0,
        "attached_sum": rho * kl / 2,
        "attached_mean": rho * kl / (2 * d**2),
        "log_ratio": rho * kl / 2 + rho + 1,
        "log_ratio_baseline": rho + 1,
        "log_ratio_baseline_mean": rho + 1,
    }


def velocity_gradients(form: str, v: Tensor, target: Tensor, z: Tensor, c: float, s: float) -> Tensor:
    """Gradients of a form with respect to the velocity of one state, `(1, ...)`, a row a draw of `z`."""
    leaf = v.detach().expand(len(z), *v.shape[1:]).clone().requires_grad_()
    (rows,) = torch.autograd.grad(FORMS[form](leaf, target.expand_as(leaf), z, c, s).sum(), leaf)
    return rows


def measured(
    v: Tensor,
    target: Tensor,
    row: tuple[float, float],
    draws: int,
    generator: torch.Generator,
    pull: Callable[[Tensor], Tensor],
    chunk: int,
) -> dict[str, Any]:
    """
    All forms at one state.

    Args:
        v, target (`Tensor` of shape `(1, ...)`): velocities of student and teacher.
        row (`tuple`): c and s of the step.
        draws (`int`): of the step's noise, a multiple of `chunk`.
        pull (`Callable`): takes gradients of the velocity, `(chunk, ...)`, to those of the parameters, `(chunk, p)`.
    """
    (c, s), d = row, v[0].numel()
    moments = {form: Moments() for form in FORMS}
    exact_v = velocity_gradients("closed_form", v, target, torch.zeros_like(v), c, s)
    exact, of_noise = pull(exact_v)[0], 0.0
    for _ in range(draws // chunk):
        z = torch.randn(chunk, *v.shape[1:], generator=generator)
        of_noise += float(pull(z).double().square().sum()) / draws
        for form, sums in moments.items():
            sums.add(pull(velocity_gradients(form, v, target, z, c, s)))
    kl = d * float(transition_kl(v, target, c, s))
    rho = of_noise * float(exact_v.double().square().sum() / exact.double().square().sum())
    shrunk = {"log_ratio_baseline_mean": 1 / d}
    figures = {form: against(sums, exact, shrunk.get(form, 1.0)) for form, sums in moments.items()}
    by_figure = {name: {form: figures[form][name] for form in FORMS} for name in figures["closed_form"]}
    return {"kl": kl, "d": d, "rho": rho, "predicted": predicted(kl, d, rho), **by_figure}


def states(trainer: DiffusionOPDTrainer, task: str, prompt: str, seed: int) -> dict[int, Tensor]:
    """The states of one walk at which the trainer would train."""
    field, visited = trainer.velocity_field, {}
    generators = sample_generators([seed, TASKS.index(task)], [0])

    def velocity(j: int, x: Tensor, z: Tensor | None) -> Tensor:
        visited[j] = x
        return field(x, float(trainer.plan.table.levels[j]), [prompt], trainer.args.guidance_scale, trainer.model)

    x = field.initial_latents([prompt], generators)
    with torch.no_grad():
        walk(velocity, x, trainer.plan.walked, generators)
    return visited


def variance(task: str, draws: int, lora_draws: int, student_init: str, folder: Path) -> dict[str, Any]:
    """All forms along one walk for a prompt of a task, in the space of velocities and in that of the LoRA."""
    options = {"sampler": "flow_sde", "noise_level": 0.7, "loss_weighting": "kl", "num_trained_timesteps": None}
    trainer = make_trainer("opd", student_init, 0, folder, **options)
    assert isinstance(trainer, DiffusionOPDTrainer)
    first = next(rows_of(trainer.train_dataset, task, 0))
    prompt, texts = first["prompt"], trainer.texts(task, [first])
    parameters = trainer.student.parameters()
    generator = torch.Generator().manual_seed(TASKS.index(task))
    steps: dict[str, list[dict[str, Any]]] = {"steps": [], "lora_steps": []}
    for j, x in states(trainer, task, prompt, seed=0).items():
        table = trainer.plan.table
        t, row = float(table.levels[j]), (float(table.c[j]), float(table.s[j]))
        with torch.no_grad():
            target = trainer._target(task, x, t, texts)
        v = trainer._student_velocity(trainer.model, x, t, [prompt])

        def to_lora(gradients: Tensor, v: Tensor = v) -> Tensor:
            parts = torch.autograd.grad(v, parameters, gradients[:, None], retain_graph=True, is_grads_batched=True)
            return torch.cat([part.flatten(1) for part in parts], dim=1)

        fixed = v.detach()
        in_velocity = measured(fixed, target, row, draws, generator, lambda g: g.flatten(1), chunk=1024)
        in_lora = measured(fixed, target, row, lora_draws, generator, to_lora, chunk=32)
        steps["steps"].append({"step": j, "level": t, **in_velocity})
        steps["lora_steps"].append({"step": j, "level": t, **in_lora})
    return steps


def mean_of(entries: list[Any]) -> Any:
    """Means of numbers that are nested alike; `None` where one is."""
    if isinstance(entries[0], dict):
        return {name: mean_of([entry[name] for entry in entries]) for name in entries[0]}
    return None if None in entries else statistics.mean(entries)


def over_states(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the tasks' states, a step, and over all steps for the LoRA."""
    result = {name: [mean_of(list(same)) for same in zip(*(u[name] for u in units), strict=True)] for name in units[0]}
    figures = mean_of(result["lora_steps"])
    names = ("nsr", "predicted", "cosine", "corrected", "norm_ratio")
    return {**result, "lora": {form: {name: figures[name][form] for name in names} for form in FORMS}}


# Together


def once(
    path: Path, settings: dict[str, Any], measure: Callable[..., dict[str, Any]], **places: Any
) -> dict[str, Any]:
    """What is in the file, if it was measured with the same settings; else `measure(**settings, **places)`, and it is written."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found["result"]
    start = time.perf_counter()
    result = measure(**settings, **places)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"settings": settings, "result": result}))
    partial.replace(path)
    print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def rounded(value: Any) -> Any:
    """Six digits of every number."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def report(result: dict[str, Any]) -> None:
    for method in METHODS:
        for at, figures in result["interference"][method]["at"].items():
            print(
                f"\n{method} at {at}: " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in figures["reliability"].items())
            )
            for pair, value in figures["cosine"].items():
                corrected = figures["corrected"][pair]
                print(f"  {pair}: {value['mean']:+.3f}, corrected {corrected['mean']}, seeds {corrected['seeds']}")
    print("\n| space | step | level | KL | rho | form | NSR | predicted | cosine | corrected | norm ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for space in ("steps", "lora_steps"):
        for step in result["variance"][space]:
            for form in FORMS:
                print(
                    f"| {space} | {step['step']} | {step['level']:.3f} | {step['kl']:.4g} | {step['rho']:.4g} | {form} | "
                    + " | ".join(
                        f"{step[name][form]}" for name in ("nsr", "predicted", "cosine", "corrected", "norm_ratio")
                    )
                    + " |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl_draws", type=int, default=32, help="rounds of joint RL a seed")
    parser.add_argument("--rl_prompts", type=int, default=2, help="groups of a task in a round")
    parser.add_argument("--opd_draws", type=int, default=24, help="rounds of OPD a seed")
    parser.add_argument("--opd_prompts", type=int, default=8, help="prompts of a task in a round")
    parser.add_argument("--draws", type=int, default=16384, help="of a step's noise, a multiple of 1024")
    parser.add_argument("--lora_draws", type=int, default=256, help="the same for the LoRA's gradient, of 32")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    work, output = args.work.resolve(), args.output.resolve()
    os.chdir(ROOT)
    work.mkdir(parents=True, exist_ok=True)
    counts = {
        method: {"draws": getattr(args, f"{method}_draws"), "prompts": getattr(args, f"{method}_prompts")}
        for method in METHODS
    }
    inner = {"draws": args.draws, "lora_draws": args.lora_draws}
    settings = {"seeds": args.seeds, **counts, "later": "merge of the teachers"}
    result: dict[str, Any] = {"interference": {"settings": settings}, "variance": {"settings": inner}}
    with tempfile.TemporaryDirectory() as folder:
        places = {"base": None, "later": merged(Path(folder) / "merged")}
        for method in METHODS:
            result["interference"][method] = {"at": {}}
            for at in PLACES:
                units = []
                for seed in args.seeds:
                    unit = {"method": method, "seed": seed, **counts[method]}
                    path = work / f"{method}_{at}_{seed}.json"
                    units.append(once(path, unit, interference, student_init=places[at], folder=Path(folder)))
                result["interference"][method]["at"][at] = over_seeds(units)
        units = []
        for task in TASKS:
            path = work / f"variance_{task}.json"
            units.append(
                once(path, {"task": task, **inner}, variance, student_init=places["later"], folder=Path(folder))
            )
        result["variance"] |= over_states(units)
    result = rounded(result)
    output.write_text(json.dumps(result, indent=1) + "\n")
    report(result)


if __name__ == "__main__":
    main()
