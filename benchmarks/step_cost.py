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
What an update costs in one pass along the trajectory, and in the three passes of published loops.

One pass: at each state teacher forward, student forward, backward, and on. Three passes: a rollout, the teacher's
forwards on the stored states, then the student's forwards and backwards against the stored velocities. Both take the
same steps of the same prompts with the same networks, in turns within one process; with `b` the time of a backward over
that of a forward, one pass can be at most (3 + b) / (2 + b) times as fast. With checkpointing a backward repeats the
student's forward first: it is in the backward's time and so in `b`. The options that make an update cheaper are
measured against the three passes too.

    python benchmarks/step_cost.py --output step_cost.json

What an update holds at its peak beside what stays (activations, gradients and, with three passes, the stored trajectory) is
each of a process of its own, and stands beside what `estimate_memory` says. On a GPU and at SD3.5-M's own shape
`benchmarks/gpu.py` measures it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from run_settings import ONE_UPDATE
from torch import Tensor

from trl_diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer, estimate_memory, tiny
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.algorithms.rollout import sample_generators, walk
from trl_diffusion_opd.models.student import ATTENTION_TARGETS
from trl_diffusion_opd.profiling.timing import instant, seconds_between


TASKS = ("a", "b", "c")
# The tiny model as it is shipped, and one of the same architecture in which matrix products dominate.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"transformer": {}, "pixels": 32, "batch_size": 16, "repeats": 5},
    "wide": {
        "transformer": {
            "num_layers": 6,
            "num_attention_heads": 6,
            "attention_head_dim": 64,
            "caption_projection_dim": 384,
            "pos_embed_max_size": 64,
        },
        "pixels": 128,
        "batch_size": 1,
        "repeats": 3,
    },
    # The kinds of layers that SD3.5-M has (dual attention, normed queries and keys), 4 blocks for its 24, width 256 for
    # 1536, 256 tokens of image for 1024, with guidance.
    "sd35_small": {
        "transformer": {
            "num_layers": 4,
            "dual_attention_layers": (0, 1),
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "caption_projection_dim": 256,
            "pos_embed_max_size": 64,
        },
        "pixels": 128,
        "batch_size": 1,
        "guidance_scale": 4.5,
        "repeats": 3,
    },
    # SD3.5-M itself at 512 px, 64 x 64 latents and 205 tokens of text; only the encoders are the tiny model's, so that the
    # layers that take embeddings in are narrower (9 million parameters less of 2.2 billion).
    "sd35_medium": {
        "transformer": {
            "num_layers": 24,
            "dual_attention_layers": tuple(range(13)),
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "in_channels": 16,
            "out_channels": 16,
        },
        "pixels": 256,  # the tiny model's VAE has 4 pixels a latent for 8
        "max_sequence_length": 193,  # with the 12 of the tiny CLIP tokenizers
        "batch_size": 8,
        "guidance_scale": 4.5,
        "repeats": 3,
    },
}
SIZES["sd35_medium_b1"] = {**SIZES["sd35_medium"], "batch_size": 1}
DEFAULT_SIZES = ("tiny", "wide", "sd35_small")
# What an update may do with less, against three passes with guidance and all steps trained.
OPTIONS: dict[str, dict[str, Any]] = {
    "num_trained_timesteps=5": {"num_trained_timesteps": 5},
    "num_trained_timesteps=4": {"num_trained_timesteps": 4},
    "num_trained_timesteps=3": {"num_trained_timesteps": 3},
    "unguided student": {"guidance_scale": 1.0, "teacher_guidance_scale": 4.5},
    "unguided student, num_trained_timesteps=5": {
        "guidance_scale": 1.0,
        "teacher_guidance_scale": 4.5,
        "num_trained_timesteps": 5,
    },
}


def save_random_lora(pipeline: Any, folder: Path) -> str:
    """A LoRA of random weights for the pipeline's transformer, which is as it was afterwards; the name of its folder."""
    model = get_peft_model(pipeline.transformer, LoraConfig(r=32, target_modules=list(ATTENTION_TARGETS)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(str(folder))
    pipeline.transformer = model.unload()
    return str(folder)


def make_trainer(size: str, folder: Path, dtype: str = "float32", **options: Any) -> DiffusionOPDTrainer:
    """A trainer with three LoRA teachers of random weights."""
    torch.manual_seed(0)
    settings = SIZES[size]
    pipeline = DiffusionPipeline.from_pretrained(tiny.BASE)
    pipeline.set_progress_bar_config(disable=True)
    config = {**pipeline.transformer.config, **settings["transformer"]}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU would take minutes for random billions
        pipeline.transformer = SD3Transformer2DModel.from_config(config).to(getattr(torch, dtype)).eval()
    teachers = {}
    for task in TASKS:
        teachers[task] = save_random_lora(pipeline, folder / task)
    rows = [{"prompt": f"{word} red circle", "task": task} for task in TASKS for word in ("one", "two", "three") * 8]
    options = {
        "guidance_scale": settings.get("guidance_scale", 1.0),
        "gradient_checkpointing": False,
        "per_device_train_batch_size": settings["batch_size"],
        **options,
    }
    args = DiffusionOPDConfig(
        output_dir=str(folder / "out"),
        height=settings["pixels"],
        width=settings["pixels"],
        max_sequence_length=settings.get("max_sequence_length", 12),
        dtype=dtype,
        **ONE_UPDATE,
        **options,
    )
    trainer = DiffusionOPDTrainer(pipeline, teachers, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()  # optimizer, schedule and wrapping as in training, and a warm-up
    return trainer


def one_pass(trainer: DiffusionOPDTrainer, batches: list[list[dict[str, Any]]]) -> None:
    """An update as the trainer does it."""
    for batch in batches:
        trainer.training_step(trainer.model_wrapped, batch)
    finish_update(trainer)


def three_pass(trainer: DiffusionOPDTrainer, batches: list[list[dict[str, Any]]]) -> None:
    """The same update with a stored trajectory and stored teacher velocities."""
    field, model, scale = trainer.velocity_field, trainer.model_wrapped, trainer.args.guidance_scale
    steps, table = trainer.plan.steps, trainer.plan.walked
    for task, batch in zip(trainer.tasks, batches, strict=False):
        prompts = [row["prompt"] for row in batch]
        generators = sample_generators([trainer.args.seed, 0, trainer.tasks.index(task)], range(len(batch)))
        states: list[Tensor] = []

        def velocity(
            j: int, x: Tensor, z: Tensor | None, prompts: list[str] = prompts, states: list[Tensor] = states
        ) -> Tensor:
            states.append(x)
            return field(x, float(table.levels[j]), prompts, scale, model)

        with torch.no_grad():
            walk(velocity, field.initial_latents(prompts, generators), table)
            texts = trainer.texts(task, batch)
            targets = [trainer._target(task, x, float(table.levels[j]), texts) for j, x in enumerate(states)]
        for j in steps:
            student = field(states[j], float(table.levels[j]), prompts, scale, model)
            loss = float(trainer.plan.weights[j]) * velocity_gap_sq(student, targets[j]).mean()
            trainer._backward(trainer.rounds.share(task) / len(steps) * loss)
    finish_update(trainer)


def seconds_of(trainer: DiffusionOPDTrainer, run: Callable[[], Any]) -> float:
    """Seconds in which a device does what `run` asks of it."""
    begin = instant(trainer.accelerator.device)
    run()
    return seconds_between(begin, instant(trainer.accelerator.device))


def finish_update(trainer: DiffusionOPDTrainer) -> None:
    trainer.accelerator.clip_grad_norm_(trainer.student.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model_wrapped.zero_grad()


FORMS: dict[str, Callable[..., None]] = {"one_pass": one_pass, "three_pass": three_pass}


@contextmanager
def counted(trainer: DiffusionOPDTrainer) -> Any:
    """Counts the transformer's forwards and the seconds in them and in backwards, each of which is waited for."""
    model = trainer.model_wrapped
    spent = {"forwards": 0, "forward_s": 0.0, "grad_forward_s": 0.0, "backward_s": 0.0}
    forward, backward = model.forward, trainer._backward

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        output = []
        seconds = seconds_of(trainer, lambda: output.append(forward(*args, **kwargs)))
        spent["forwards"] += 1
        spent["forward_s"] += seconds
        spent["grad_forward_s"] += seconds * torch.is_grad_enabled()
        return output[0]

    def timed_backward(loss: Tensor) -> None:
        spent["backward_s"] += seconds_of(trainer, lambda: backward(loss))

    model.forward, trainer._backward = timed_forward, timed_backward  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        model.forward, trainer._backward = forward, backward  # type: ignore[method-assign]


def measure(size: str, dtype: str, checkpointing: bool) -> dict[str, Any]:
    """Times both forms in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(size, Path(folder), dtype, gradient_checkpointing=checkpointing)
        return timed(trainer, micro_batches(SIZES[size]["batch_size"]), SIZES[size]["repeats"])


def micro_batches(size: int) -> list[list[dict[str, Any]]]:
    """The micro-batches of an update, one a task."""
    return [[{"prompt": "two red circles", "task": task}] * size for task in TASKS]


def timed(trainer: DiffusionOPDTrainer, batches: list[list[dict[str, Any]]], repeats: int) -> dict[str, Any]:
    """
    Both forms of an update in turns.

    Returns:
        `dict`: for each form the median of its `"seconds"`, its `"forwards"`, and its `"overhead"`, the share of it that is in
        neither a forward nor a backward; `"speedup"`, the median of their ratios, `"b"`, `"bound"` and `"share_of_bound"`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for update in range(repeats):
        order = list(FORMS) if update % 2 else list(reversed(FORMS))
        for name in order:
            seconds[name].append(seconds_of(trainer, lambda name=name: FORMS[name](trainer, batches)))
    result: dict[str, Any] = {}
    for name, form in FORMS.items():
        with counted(trainer) as spent:
            total = seconds_of(trainer, lambda form=form: form(trainer, batches))
        inside = spent["forward_s"] + spent["backward_s"]
        result[name] = {
            "seconds": statistics.median(seconds[name]),
            "forwards": spent["forwards"],
            "overhead": 1 - inside / total,
        }
        if name == "three_pass":
            steps = len(trainer.plan) * len(batches)
            plain = (spent["forward_s"] - spent["grad_forward_s"]) / (spent["forwards"] - steps)
            # A forward that keeps its activations costs what one without does, or a little more, which is b's.
            b = (spent["backward_s"] / steps + spent["grad_forward_s"] / steps - plain) / plain
    ratios = [three / one for one, three in zip(seconds["one_pass"], seconds["three_pass"], strict=True)]
    result |= {"speedup": statistics.median(ratios), "b": b, "bound": (3 + b) / (2 + b)}
    result["share_of_bound"] = result["speedup"] / result["bound"]
    return result


def measure_options(size: str, dtype: str) -> dict[str, float]:
    """How many times as fast as three passes an update with each of the options is, without checkpointing."""
    with tempfile.TemporaryDirectory() as folder:
        plain = make_trainer(size, Path(folder), dtype)
        batches = micro_batches(SIZES[size]["batch_size"])
        updates = range(1, 2 + SIZES[size]["repeats"])
        speedups = {}
        for option, changes in OPTIONS.items():  # two trainers at a time: more would not fit
            trainer = make_trainer(size, Path(folder), dtype, **changes)
            three, one = [], []
            for update in updates:
                trainer.state.global_step = update  # which steps are trained is drawn anew
                three.append(seconds_of(plain, lambda: three_pass(plain, batches)))
                one.append(seconds_of(trainer, lambda trainer=trainer: one_pass(trainer, batches)))
            # Means: how far a walk goes depends on the draw.
            speedups[option] = statistics.mean(three) / statistics.mean(one)
    return speedups


def peaks(size: str, dtype: str, form: str, checkpointing: bool) -> dict[str, float]:
    """In MiB, of a process of its own: what an update in one form holds at its peak, and what `estimate_memory` says."""
    command = [sys.executable, __file__, "--only", size, form, "--dtype", dtype]
    command += ["--checkpointing"] if checkpointing else []
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def print_peaks(size: str, dtype: str, form: str, checkpointing: bool) -> None:
    """What [`peaks`] runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(size, Path(folder), dtype, gradient_checkpointing=checkpointing)
        estimate = {part: row["bytes"] for part, row in estimate_memory(trainer).items()}
        batches = micro_batches(SIZES[size]["batch_size"])
        device = trainer.accelerator.device
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            FORMS[form](trainer, batches)
            peak = torch.cuda.max_memory_allocated(device)
            result = {"peak_mib": peak, "estimate_mib": estimate["peak"], "update_mib": peak - before}
        else:
            result = {"update_mib": allocated(lambda: FORMS[form](trainer, batches[:1]), Path(folder))}
    result["update_estimate_mib"] = estimate["activations"] + estimate["gradients"]
    print(json.dumps({name: size / 2**20 for name, size in result.items()}))


def allocated(run: Callable[[], None], folder: Path) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once since `run` began, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--sizes", nargs="+", default=list(DEFAULT_SIZES), choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base")
    parser.add_argument("--options_size", default="sd35_small", choices=list(SIZES), help="measured with options")
    parser.add_argument("--only", nargs=2, metavar=("SIZE", "FORM"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.only:
        size, form = args.only
        print_peaks(size, args.dtype, form, args.checkpointing)
        return
    results = {}
    for size in args.sizes:
        for checkpointing in (False, True):
            result = measure(size, args.dtype, checkpointing)
            for form in FORMS:
                result[form] |= peaks(size, args.dtype, form, checkpointing)
            results[f"{size}, checkpointing" if checkpointing else size] = result
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print(
        "| model | form | forwards | s an update | outside the network | holds MiB | estimate | speed-up | b | bound | share |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for size, result in results.items():
        for form in FORMS:
            row = result[form]
            ratio = (
                f"{result['speedup']:.3f} | {result['b']:.2f} | {result['bound']:.3f} | {result['share_of_bound']:.1%}"
                if form == "one_pass"
                else "| | |"
            )
            print(
                f"| {size} | {form} | {row['forwards']} | {row['seconds']:.3f} | {row['overhead']:.1%} | "
                f"{row['update_mib']:.0f} | {row['update_estimate_mib']:.0f} | {ratio} |"
            )
    options = measure_options(args.options_size, args.dtype)
    print(f"\n| option, {args.options_size} | speed-up over three passes |\n|---|---|")
    for name, speedup in options.items():
        print(f"| {name} | {speedup:.2f} |")
    results["options"] = {"size": args.options_size, "speedup": options}
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
