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

"""Several teachers of a task in one forward: the velocities of separate forwards, and fewer of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, Family
from helpers.family_fixtures import family_trainer
from helpers.opd_fixtures import (
    TASKS,
    make_dataset,
    make_trainer,
    relative_difference,
    snapshot,
    student_lora,
    train_losses,
)
from helpers.sft_fixtures import sft_trainer
from helpers.teachers_helpers import make_bank
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline
from peft import LoraConfig, get_peft_model

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.teachers import TeacherBank, normalize_teachers
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.pipelines.view import StandIn


pytestmark = pytest.mark.slow


# What differs in how these families encode prompts, lay out rows and combine guidance: doubled rows; packed latents and
# shared ids; two calls and batches padded to the longest prompt; lists; two calls, one norm; left padding to sixteens.
LAYOUTS = ["sd3", "flux", "flux2_klein", "qwen_image", "z_image", "lumina2", "hidream", "wan", "cogview4"]


def save_lora(family: Family, folder: Path, seed: int, **options: Any) -> str:
    """A LoRA with an effect of the size of the base's own weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2 + seed, target_modules=list(family.lora_targets), init_lora_weights=False, **options)
    get_peft_model(family.build().transformer, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward of a transformer."""
    seen: list[int] = []
    forward = StandIn.forward

    def counted(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        before = self.rows
        output = forward(self, *args, **kwargs)
        seen.append(self.rows - before)
        return output

    monkeypatch.setattr(StandIn, "forward", counted)
    return seen


def family_bank(name: str, folder: Path) -> tuple[TeacherBank, VelocityField, Family]:
    """A student and three teachers of one task: two LoRAs and the base."""
    family = FAMILIES[name]
    teachers = {"task": [save_lora(family, folder / str(seed), seed) for seed in (1, 2)] + ["base"]}
    pipeline = family.build()
    field = VelocityField(pipeline, num_inference_steps=2, **family.kwargs)
    lora = LoraConfig(r=2, target_modules=list(family.lora_targets), init_lora_weights=False)
    student = get_peft_model(pipeline.transformer, lora).eval()
    bank = TeacherBank(
        Backbone(student, "default"),
        pipeline,
        normalize_teachers(teachers, ["task"]),
        family.guidance_scale,
        batched=True,
    )
    return bank, field, family


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_one_forward_gives_what_separate_ones_give(name: str, tmp_path: Path, rows: list[int]) -> None:
    bank, field, family = family_bank(name, tmp_path)
    prompts = list(family.prompts)
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(len(prompts))])
    bank.check_batched(field)
    inputs = (field, bank.teachers["task"], x, field.levels[1].item(), prompts)
    bank.batched = False
    rows.clear()
    separate, apart = bank.mean_velocity(*inputs), list(rows)
    bank.batched = True
    rows.clear()
    together = bank.mean_velocity(*inputs)
    assert sum(rows) == sum(apart) == 3 * 2 * len(prompts)
    assert len(rows) == len(apart) / 3
    assert (together - separate).norm() / separate.norm() < 1e-6
    # A mean hides an exchange of the teachers.
    group = bank.forwards(bank.teachers["task"])[0]
    velocities = []
    for teacher, velocity in zip(group, bank._velocities(*inputs[:1], group, *inputs[2:]), strict=True):
        with bank.use(teacher) as module:
            alone = field(x, inputs[3], prompts, teacher.guidance_scale, module)
        assert (velocity - alone).norm() / alone.norm() < 1e-6
        velocities.append(alone)
    assert (velocities[0] - velocities[1]).norm() / velocities[0].norm() > 1e-2, "equal teachers would prove nothing"
    assert bank.backbone.active == "default"


def test_copies_of_a_prompt_are_not_encoded_again(tmp_path: Path) -> None:
    bank, field, family = family_bank("qwen_image", tmp_path)  # pads to the longest: the batch is encoded as a whole
    prompts = list(family.prompts)
    x = field.initial_latents(prompts, [torch.Generator().manual_seed(i) for i in range(2)])
    bank.check_batched(field)
    with torch.no_grad():
        field(x, 1.0, prompts, family.guidance_scale, bank.backbone.network)
        encoder = field.pipeline.components["text_encoder"]
        encoded = []
        hook = encoder.register_forward_pre_hook(lambda *args: encoded.append(args))
        bank.mean_velocity(field, bank.teachers["task"], x, 1.0, prompts)
        hook.remove()
    assert encoded == []


def test_teachers_of_another_scale_and_full_ones_have_their_own_forwards(tmp_path: Path, rows: list[int]) -> None:
    pipeline = make_pipeline()
    for seed in (1, 2, 3):
        make_lora(pipeline, tmp_path / str(seed), seed)
    make_pipeline(seed=5).save_pretrained(tmp_path / "full")
    one, two, three, full = (str(tmp_path / name) for name in ("1", "2", "3", "full"))
    teachers = {
        "task": [
            TeacherConfig(one, weight=1.0),
            TeacherConfig(full, weight=2.0),
            TeacherConfig(two, weight=3.0, guidance_scale=2.0),
            TeacherConfig("base", weight=4.0),
            TeacherConfig(three, weight=5.0, guidance_scale=2.0),
            TeacherConfig(one, weight=6.0),
            TeacherConfig(one, weight=7.0, guidance_scale=1.0),
            TeacherConfig(full, weight=8.0),
        ]
    }
    bank = make_bank(pipeline, teachers, batched=True)
    groups = [
        [(role.teacher.name, role.guidance_scale) for role in group] for group in bank.forwards(bank.teachers["task"])
    ]
    names = {
        path: next(role.teacher.name for role in bank.teachers["task"] if role.config.model_name_or_path == path)
        for path in (one, two, three, full)
    }
    assert groups == [
        [(names[one], 4.5), ("base", 4.5)],
        [(names[full], 4.5)],
        [(names[two], 2.0), (names[three], 2.0)],
        [(names[one], 1.0)],
    ]
    field = VelocityField(pipeline, num_inference_steps=2, **SIZE)
    x = field.initial_latents(["a", "b"], [torch.Generator().manual_seed(i) for i in range(2)])
    rows.clear()
    with torch.no_grad():
        together = bank.mean_velocity(field, bank.teachers["task"], x, 0.5, ["a", "b"])
        assert rows == [8, 4, 8, 2]
        bank.batched = False
        separate = bank.mean_velocity(field, bank.teachers["task"], x, 0.5, ["a", "b"])
    assert (together - separate).norm() / separate.norm() < 1e-6


def several(folder: Path, **lora: Any) -> dict[str, list[str]]:
    """Three LoRAs for the first task, one and the base for the second."""
    names = [str(folder / f"teacher{seed}") for seed in (1, 2, 3)]
    for seed, name in enumerate(names, start=1):
        make_lora(make_pipeline(), name, seed, rank=2 * seed, **lora)
    return dict(zip(TASKS, (names, [names[0], "base"]), strict=True))


def both_ways(folder: Path, make: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    trainers = []
    for batched in (False, True):
        trainer = make(folder / f"batched {batched}", *args, batch_teachers=batched, **options)
        trainer.train()
        trainers.append(trainer)
    return trainers


@pytest.mark.parametrize("options", [{}, {"peft_config": None}, {"on_policy": False, "guidance_scale": 3.0}])
def test_training_is_the_same_with_fewer_forwards(tmp_path: Path, rows: list[int], options: dict[str, Any]) -> None:
    settings = dict(max_steps=1, learning_rate=1e-2, eval_on_start=True, eval_strategy="steps", eval_steps=1)
    settings |= dict(eval_dataset=make_dataset(count=1, draw=1), **options)
    separate, together = both_ways(tmp_path, make_trainer, several(tmp_path), **settings)
    assert train_losses(together) == pytest.approx(train_losses(separate), rel=1e-5)
    assert relative_difference(snapshot(together), snapshot(separate)) < 1e-5
    losses = [
        [entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (separate, together)
    ]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_n_teachers_are_one_forward_of_n_times_the_rows(tmp_path: Path, rows: list[int]) -> None:
    for batched, expected in ((False, [2, 2, 2]), (True, [6])):
        trainer = make_trainer(tmp_path / str(batched), several(tmp_path), batch_teachers=batched)
        x = trainer.velocity_field.initial_latents(["a", "b"], [torch.Generator().manual_seed(i) for i in range(2)])
        rows.clear()
        with torch.no_grad():
            trainer.bank.mean_velocity(trainer.velocity_field, trainer.bank.teachers[TASKS[0]], x, 0.5, ["a", "b"])
        assert rows == expected


def test_supervised_fine_tuning_draws_the_same_images(tmp_path: Path) -> None:
    separate, together = both_ways(tmp_path, sft_trainer, several(tmp_path), learning_rate=1e-2)
    assert train_losses(together) == pytest.approx(train_losses(separate), rel=1e-4)


def test_a_dry_run_times_what_the_run_does(tmp_path: Path, rows: list[int]) -> None:
    reports = []
    for batched in (False, True):
        trainer = make_trainer(
            tmp_path / str(batched), several(tmp_path), batch_teachers=batched, num_trained_timesteps=None
        )
        rows.clear()
        reports.append(trainer.dry_run())
        assert (6 in rows) == batched
    assert reports[1]["tasks"]["count"]["kl"] == pytest.approx(reports[0]["tasks"]["count"]["kl"], rel=1e-5)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_half_precision(tmp_path: Path, lora_dtype: torch.dtype) -> None:
    teachers = several(tmp_path)["count"]
    pipeline = make_pipeline()
    pipeline.transformer.to(torch.bfloat16)
    student = get_peft_model(pipeline.transformer, student_lora()).eval()
    bank = TeacherBank(
        Backbone(student, "default"), pipeline, normalize_teachers(teachers, ["task"]), 4.5, batched=True
    )
    for name, parameter in bank.backbone.network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(lora_dtype)
    field = VelocityField(pipeline, num_inference_steps=2, **SIZE)
    x = field.initial_latents(["a", "b"], [torch.Generator().manual_seed(i) for i in range(2)])
    group = bank.forwards(bank.teachers["task"])[0]
    with torch.no_grad():
        for teacher, together in zip(group, bank._velocities(field, group, x, 0.5, ["a", "b"]), strict=True):
            with bank.use(teacher) as module:
                alone = field(x, 0.5, ["a", "b"], 4.5, module)
                pipeline.transformer.float()  # PEFT holds the same modules
                exact = field(x, 0.5, ["a", "b"], 4.5, module)
            for name, parameter in bank.backbone.network.named_parameters():
                parameter.data = parameter.data.to(lora_dtype if "lora_" in name else torch.bfloat16)
            rounding = (alone - exact).norm() / exact.norm()
            assert together.dtype == torch.float32
            assert (together - exact).norm() / exact.norm() < 1.5 * rounding < 0.05


class TestRefusals:
    def test_compiled_blocks_and_all_else_in_one_message(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="batch_teachers=True with torch_compile=True") as error:
            make_trainer(
                tmp_path, {**several(tmp_path), "draw": "missing/folder/x"}, batch_teachers=True, torch_compile=True
            )
        assert "missing/folder" in str(error.value)

    def test_layers_whose_rows_are_not_samples(self, tmp_path: Path) -> None:
        # Z-Image embeds the captions of a batch as one long list of tokens.
        family = FAMILIES["z_image"]
        pipeline = family.build()
        torch.manual_seed(0)
        for name in "ab":
            lora = LoraConfig(r=2, target_modules=["cap_embedder.1"], init_lora_weights=False)
            get_peft_model(family.build().transformer, lora).save_pretrained(tmp_path / name)
        student = get_peft_model(
            pipeline.transformer, LoraConfig(r=2, target_modules=list(family.lora_targets))
        ).eval()
        teachers = normalize_teachers([str(tmp_path / "a"), str(tmp_path / "b")], ["task"])
        bank = TeacherBank(Backbone(student, "default"), pipeline, teachers, 4.0, batched=True)
        field = VelocityField(pipeline, num_inference_steps=2, **family.kwargs)
        x = field.initial_latents(["a", "b"], [torch.Generator().manual_seed(i) for i in range(2)])
        with torch.no_grad():
            before = field(x, 0.5, ["a", "b"], 1.0, student)
            with pytest.raises(
                ValueError, match=r"the 2 teachers of task 'task' cannot share a forward \(Length of .adapter_names"
            ):
                bank.check_batched(field)
            # PEFT's hooks would still say which row is whose.
            assert torch.equal(field(x, 0.5, ["a", "b"], 1.0, student), before)
        bank.batched = False
        bank.check_batched(field)
        teachers_by_name = {"one": [str(tmp_path / "a"), str(tmp_path / "b")]}
        with pytest.raises(ValueError, match="(?s)cannot start.*task_weights.*cannot share a forward"):
            family_trainer(
                family,
                tmp_path,
                teachers_by_name,
                guidance_scale=1.0,
                batch_teachers=True,
                task_weights={"x": 1.0},
            )

    def test_a_pipeline_that_takes_one_prompt_for_its_image(self, tmp_path: Path) -> None:
        bank, field, _ = family_bank("qwen_image_edit", tmp_path)
        with pytest.raises(ValueError, match="cannot share a forward .*number of images"):
            bank.check_batched(field)

    # Guidance sample by sample, or the second time backwards.
    @pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 1, 3, 2]])
    def test_rows_in_another_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
        pipeline = make_pipeline()
        bank = make_bank(pipeline, {"task": list(several(tmp_path)["count"])}, batched=True)
        field = VelocityField(pipeline, num_inference_steps=2, **SIZE)
        bank.check_batched(field)
        forward = StandIn.forward

        def reordered(self: StandIn, hidden_states: Any, **inputs: Any) -> Any:
            rows = order if len(hidden_states) == 4 else [*range(len(hidden_states))]
            return forward(self, hidden_states=hidden_states[rows], **inputs)

        monkeypatch.setattr(StandIn, "forward", reordered)
        with pytest.raises(
            ValueError, match="cannot share a forward .StableDiffusion3Pipeline does not give its transf"
        ):
            bank.check_batched(field)
