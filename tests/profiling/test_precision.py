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

"""What bfloat16 does to the loss and the gradient, and what is said of it."""

import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.alike_rounding import AlikeRounding
from helpers.opd_fixtures import TINY_SETTINGS, make_teachers, make_trainer
from helpers.tiny_sd3 import make_lora, make_pipeline, make_transformer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from trl_diffusion_opd.algorithms import flow
from trl_diffusion_opd.algorithms.flow import velocity_gap_sq
from trl_diffusion_opd.pipelines import view as pipeline_view
from trl_diffusion_opd.pipelines.velocity import VelocityField


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import precision  # noqa: E402


pytestmark = pytest.mark.slow


SIZE = {name: TINY_SETTINGS[name] for name in ("height", "width", "max_sequence_length")}


# The subtraction alone


@pytest.mark.parametrize("gap", precision.GAPS)
def test_means_lose_what_velocities_keep(gap):
    """At the first step of SD3's 10, t = 1, dt = -0.04, where the means are almost the state itself."""
    generator = torch.Generator().manual_seed(0)
    x, teacher, direction = torch.randn(3, 1, 100_000, generator=generator)
    student = teacher + gap * direction
    c, exact = -0.04, student - teacher
    means = [(x + c * v).bfloat16().float() for v in (student, teacher)]
    naive = (means[0] - means[1]) / c
    loss = velocity_gap_sq(student, teacher) / exact.square().mean()
    cosine = torch.nn.functional.cosine_similarity(naive, exact).item()
    assert loss.item() == pytest.approx(1.0, rel=1e-5)
    excess = (naive.square().mean() / exact.square().mean()).item()
    least, most = {0.1: (1.05, 2.0), 0.01: (5.0, 15.0), 0.001: (50.0, 150.0)}[gap]
    assert least < excess < most
    # Which way a mean is rounded is chance: the mean difference is right, and all of the excess is noise.
    assert cosine == pytest.approx(excess**-0.5, rel=0.1)


# A whole update


def small_lora(folder, seed):
    """A LoRA with an effect of some percent of the base's weights."""
    make_lora(make_pipeline(), folder, seed)
    weights = load_file(folder / precision.ADAPTER_FILE)
    save_file({n: w * (0.1 if "lora_B" in n else 1) for n, w in weights.items()}, folder / precision.ADAPTER_FILE)
    return str(folder)


SEEDS = (2, 1)  # of the student's LoRA and of the other, whose effect is linear enough up to a gap of 10%


@pytest.fixture(scope="module", params=precision.GUIDANCE_SCALES)
def pair(request, tmp_path_factory):
    """Guidance, and trainers in float32 and on a bfloat16 base. All that is random or encoded is alike on every processor."""
    folder = tmp_path_factory.mktemp("precision")
    prompts = [f"draw{i}" for i in range(4)]
    options = dict(SIZE, guidance_scale=request.param, num_inference_steps=10)
    with AlikeRounding():
        loras = [small_lora(folder / str(seed), seed) for seed in SEEDS]
        (folder / "teacher").mkdir()
        teacher = precision.combine(*loras, folder / "teacher")
        trainers = [
            precision.make_trainer(make_pipeline(), loras[0], teacher, prompts, dtype, folder / str(dtype), **options)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    return request.param, trainers


# By guidance and gap: the share of the other LoRA at which the velocities differ by the gap, as `precision.share_of_gap`
# finds it by several updates.
SHARES = {
    1.0: {0.1: 5.51747, 0.01: 0.510083, 0.001: 0.0498782},
    4.5: {0.1: 5.793, 0.01: 0.605386, 0.001: 0.0586498},
}
TINY_SHARES = {0.1: 0.348301, 0.01: 0.0367644, 0.001: 0.00373384}


@pytest.fixture(scope="module")
def table(pair):
    """Guidance, and what was measured at each gap."""
    guidance, trainers = pair
    with AlikeRounding():
        rows = {gap: precision.measure(*trainers, gap, share=SHARES[guidance][gap]) for gap in precision.GAPS}
    return guidance, rows


def test_share_of_a_gap(pair):
    guidance, trainers = pair
    with AlikeRounding():
        assert precision.share_of_gap(trainers[0], 0.01) == pytest.approx(SHARES[guidance][0.01], rel=1e-4)


def behind_the_network(trainer, share, form="velocities"):
    """
    An update, and the same from what enters the output projection, in float64: all that comes after it.

    Returns:
        The relative error of the loss, and the largest one of a step's gradient with respect to the projection's output.
    """
    projection = trainer.accelerator.unwrap_model(trainer.model).get_base_model().proj_out
    weight, bias = projection.weight.double(), projection.bias.double()
    guidance, steps = trainer.args.guidance_scale, len(trainer.plan)
    forwards, losses, errors = [], [], []

    def velocity(output):
        empty, full = output.chunk(2) if guidance != 1 else (output, output)
        return empty + guidance * (full - empty)

    def step_loss(j, student, target, noise):
        (teachers, _), (hidden, output) = forwards[0], forwards[-1]
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            ours = nn.functional.linear(hidden.detach().double(), weight, bias).detach().requires_grad_()
            theirs = nn.functional.linear(teachers.double(), weight, bias)
            loss = trainer.plan.weights[j] / steps * (velocity(ours) - velocity(theirs)).square().mean()
            (expected,) = torch.autograd.grad(loss, ours)
        losses.append(loss.item())
        output.register_hook(lambda g: errors.append(float((g.double() - expected).norm() / expected.norm())))
        forwards.clear()
        return type(trainer)._step_loss(trainer, j, student, target, noise)

    handle = projection.register_forward_hook(lambda module, inputs, output: forwards.append((inputs[0], output)))
    trainer._step_loss = step_loss
    try:
        run = precision.update(trainer, share, form)
    finally:
        handle.remove()
        del trainer._step_loss
    assert len(errors) == len(losses) == steps == 9
    return abs(run["loss"] / sum(losses) - 1), max(errors)


@pytest.mark.parametrize("share", precision.GAPS)
def test_all_behind_the_network_is_float32(pair, share):
    """On this machine's own kernels. How near the teacher is depends on its share of the other LoRA."""
    loss, gradient = behind_the_network(pair[1][1], share)
    assert loss < 1e-5 and gradient < 1e-4


def in_bfloat16(v_student, v_teacher):
    return v_student.bfloat16() - v_teacher.bfloat16()


@pytest.mark.parametrize("broken", ["means", "velocities", "projection"])
@pytest.mark.parametrize("share", precision.GAPS)
def test_rounding_behind_the_network_is_found(pair, share, broken, monkeypatch):
    """What the test above is able to see: means or velocities subtracted in bfloat16, the projection computed in it."""
    if broken == "velocities":
        monkeypatch.setattr(flow, "velocity_difference", in_bfloat16)
    if broken == "projection":
        monkeypatch.setattr(pipeline_view, "_float32_projection", lambda *_: nullcontext())
    loss, gradient = behind_the_network(pair[1][1], share, "means" if broken == "means" else "velocities")
    assert loss > 1e-3 and gradient > 1e-2


# By guidance and gap: at most the ratio of the losses, at least the cosine of the gradients, at most the deviation of the
# ratio of their norms from 1. The rounding is done on purpose and alike on every processor, so these hold on all. With
# guidance 4.5 little is left of a gap of 0.1%.
BOUNDS = {
    1.0: {0.1: (1.05, 0.9999, 0.02), 0.01: (1.36, 0.999, 0.04), 0.001: (14.0, 0.9, 0.2)},
    4.5: {0.1: (1.14, 0.999, 0.04), 0.01: (11.5, 0.96, 0.2), 0.001: (450.0, 0.0, 1.0)},
}


def within(found, bounds):
    ratio, cosine, deviation = bounds
    return (
        1 / ratio < found["loss_ratio"] < ratio
        and found["gradient_cosine"] > cosine
        and abs(found["gradient_norm_ratio"] - 1) < deviation
    )


@pytest.mark.parametrize("gap", precision.GAPS)
def test_update_against_float32(table, gap):
    guidance, rows = table
    row = rows[gap]
    assert row["velocity_gap"] == pytest.approx(gap, rel=0.05)
    assert within(row["velocities"], BOUNDS[guidance][gap]), row
    # What is logged is the loss that is trained.
    assert row["kl_bfloat16"] / row["kl"] == pytest.approx(row["velocities"]["loss_ratio"], rel=1e-4)


@pytest.mark.parametrize("gap", precision.GAPS)
def test_means_in_bfloat16_break_the_bounds(table, gap):
    guidance, rows = table
    ours, naive = (rows[gap][form] for form in precision.FORMS)
    assert abs(naive["loss_ratio"] - 1) > 1.5 * abs(ours["loss_ratio"] - 1)
    assert not within(naive, BOUNDS[guidance][gap]), naive


def test_noise_floor_of_a_weak_lora_is_a_lower_bound(table):
    """It comes from the LoRA's own rounding; where the LoRA changes little, the base's counts too."""
    row = table[1][0.01]
    assert 5 < (row["kl_bfloat16"] - row["kl"]) / row["noise_floor"] < 50


def test_noise_floor_is_where_the_kl_loses_its_meaning(tmp_path):
    """On the tiny world, with LoRAs from training: the measured KL is the true one and about the floor."""
    with AlikeRounding():
        trainers = precision.tiny_world(1.0, 2, tmp_path)
        above, at, below = (
            precision.measure(*trainers, gap, ["velocities"], share) for gap, share in TINY_SHARES.items()
        )
    assert [row["velocity_gap"] for row in (above, at, below)] == pytest.approx([*TINY_SHARES], rel=0.05)
    floor = at["noise_floor"]
    assert above["kl"] > 50 * floor and above["kl_bfloat16"] == pytest.approx(above["kl"], rel=0.05)
    for row in (at, below):
        assert 0.5 < (row["kl_bfloat16"] - row["kl"]) / row["noise_floor"] < 2
    # A tenfold smaller gap, a hundredfold smaller KL, and the measured one stays at the floor.
    assert below["kl"] < 0.05 * floor < 0.05 * 2 * below["kl_bfloat16"]
    assert below["velocities"]["gradient_cosine"] < 0.9 < 0.95 < at["velocities"]["gradient_cosine"]


def test_rounding_on_purpose_is_bfloat16s():
    """As products of whole numbers, which are exact, and of others, which are rounded once."""
    generator = torch.Generator().manual_seed(0)
    whole, other = torch.randint(-8, 9, (2, 16, 16), generator=generator).bfloat16()
    assert torch.equal(_alike(whole, other), whole @ other)
    with AlikeRounding():
        a, b = torch.randn(2, 16, 512, generator=generator)
    assert abs(a.mean()) < 0.05 and a.std() == pytest.approx(1, abs=0.05)
    a, b = a.bfloat16(), b.bfloat16().T
    assert torch.equal(_alike(a, b), (a.double() @ b.double()).bfloat16())


def _alike(a, b):
    with AlikeRounding():
        return a @ b


# Where half precision ends


@pytest.mark.parametrize("wrapped", [False, True])
def test_output_projection_is_float32(wrapped, tmp_path):
    """Also of a LoRA on a copy of the base: what teaches a student that is trained in full."""
    pipeline = make_pipeline()
    model = make_lora(pipeline, tmp_path, seed=1) if wrapped else pipeline.transformer
    for module in (model, pipeline.transformer):
        module.to(torch.bfloat16)
    field = VelocityField(pipeline, num_inference_steps=4, **SIZE)
    projection = (model.base_model.model if wrapped else model).proj_out
    seen = []
    handle = projection.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = field.initial_latents(["draw"], [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        v = field(x, 0.7, ["draw"], 1.0, model)
    handle.remove()
    ((hidden, output),) = seen
    weight, bias = projection.weight.float(), projection.bias.float()
    assert output.dtype == torch.float32
    assert torch.equal(output, nn.functional.linear(hidden.float(), weight, bias))
    # Nothing after it rounds: the velocity has its values, which bfloat16 does not.
    assert torch.equal(v.flatten().sort().values, output.flatten().sort().values)
    assert not torch.equal(v, v.bfloat16().float())
    assert projection.weight.dtype == torch.bfloat16 and "forward" not in vars(projection)


def test_output_projection_of_a_teacher_of_its_own(tmp_path):
    pipeline, teacher = make_pipeline(), make_transformer(seed=3).to(torch.bfloat16)
    pipeline.transformer.to(torch.bfloat16)
    field = VelocityField(pipeline, num_inference_steps=4, **SIZE)
    outputs = []
    teacher.proj_out.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    with torch.no_grad():
        field(field.initial_latents(["draw"], [torch.Generator().manual_seed(0)]), 0.7, ["draw"], 1.0, teacher)
    assert outputs == [torch.float32]


def test_a_float32_lora_takes_half_precision_as_it_is(tmp_path):
    """Without a float32 copy of what enters it; autocast casts its weights, which are small."""
    pipeline = make_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    teachers = make_teachers(tmp_path / "teachers")
    trainer = make_trainer(tmp_path / "run", teachers, pipeline=pipeline, peft_config="default")
    entered = []
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(
                lambda module, inputs: entered.append((module.weight.dtype, inputs[0].dtype))
            )
    trainer.train()
    assert set(entered) == {(torch.float32, torch.bfloat16)}
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    assert layer.cast_input_dtype_enabled, "outside of training, PEFT's own way is back"


# What the console says


def half_precision_run(tmp_path, teachers, **options):
    """The student starts as the teacher of `count` and stays there."""
    pipeline = make_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    trainer = make_trainer(
        tmp_path,
        teachers,
        pipeline=pipeline,
        student_init=teachers["count"],
        peft_config="default",
        learning_rate=0.0,
        max_steps=3,
        **options,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "noise_floor" in record.getMessage()]


def test_kl_below_the_floor_is_said_once(tmp_path, caplog):
    teachers = make_teachers(tmp_path / "teachers")
    with caplog.at_level(logging.WARNING), AlikeRounding():
        first, *_ = half_precision_run(tmp_path / "run", teachers)
    (message,) = warnings_of(caplog)
    assert first["kl/count"] < 2 * first["noise_floor"] < first["kl/draw"]
    figures = f"kl/count is {first['kl/count']:.2g} at update 1, with a noise_floor of {first['noise_floor']:.2g}"
    assert message.startswith(figures) and "'count'" in message and "dtype='float32' and bf16=False" in message


@pytest.mark.parametrize(("kl", "said"), [(1.9e-6, True), (2.1e-6, False)])
def test_what_counts_as_below_the_floor(kl, said, tmp_path, caplog):
    trainer = make_trainer(tmp_path / "run", make_teachers(tmp_path / "teachers"))
    with caplog.at_level(logging.WARNING):
        trainer.log({"loss": kl, "kl/count": kl, "kl/draw": 1.0, "noise_floor": 1e-6})
        trainer.log({"eval_kl/count": 0.0})  # an evaluation has no floor
        trainer.log({"loss": 0.0, "kl/count": 0.0, "kl/draw": 0.0, "noise_floor": 0.0})  # the first update of a LoRA
    assert len(warnings_of(caplog)) == said
