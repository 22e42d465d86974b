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

"""The page without a trainer: it computes the trainer's gradient, and it runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.example_script import load_script
from helpers.opd_fixtures import make_config
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from trl_diffusion_opd import DiffusionOPDTrainer, VelocityField, tiny
from trl_diffusion_opd.algorithms.rollout import sample_generators


SIZE = {"height": 32, "width": 32, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def page() -> Any:
    return load_script("examples/minimal_opd.py")


class Gradients(TrainerCallback):
    """The student's weights and gradients in the first update, before the optimizer's step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in trained.items()}
        self.gradients = {name: p.grad.clone() for name, p in trained.items()}


def test_its_gradient_is_the_trainers(page: Any, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Watched(DiffusionOPDTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            seen.append([row["prompt"] for row in inputs])
            return super().training_step(model, inputs, num_items_in_batch)

    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=page.ATTENTION)
    recorded = Gradients()
    args = make_config(
        tmp_path, **SIZE, num_inference_steps=5, per_device_train_batch_size=3, max_grad_norm=0.0, bf16=False, seed=3
    )
    trainer = Watched(
        tiny.BASE,
        teachers={task: tiny.TEACHERS[task] for task in page.TASKS},
        args=args,
        train_dataset=tiny.dataset("train").filter(lambda row: row["task"] in page.TASKS),
        callbacks=[recorded],
        peft_config=lora,
    )
    trainer.train()
    tasks = trainer.tasks

    pipe = page.DiffusionPipeline.from_pretrained(tiny.BASE)
    field = VelocityField(pipe, num_inference_steps=5, **SIZE)
    model = get_peft_model(pipe.transformer, lora, adapter_name="student")
    for task in page.TASKS:
        model.load_adapter(tiny.TEACHERS[task], adapter_name=task)
    model.set_adapter("student")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = {name.replace(".default.", ".student."): value for name, value in recorded.weights.items()}
    assert trained.keys() == ours.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(ours[name])
    for number, prompts in enumerate(seen):
        page.distil(field, model, tasks[number], prompts, sample_generators([3, 0, number], range(3)))

    assert len(seen) == 2
    moved = [name for name, gradient in recorded.gradients.items() if gradient.norm() > 0]
    assert len(moved) > 0.9 * len(trained)  # the last block has no use for a part of its text layers
    for name, gradient in recorded.gradients.items():
        other = trained[name.replace(".default.", ".student.")].grad
        assert (other - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.slow
def test_it_runs(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page.main(updates=11, batch=2)
    first, last = capsys.readouterr().out.splitlines()
    of = [dict(part.rsplit(" ", 1) for part in line.partition(": ")[2].split(", ")) for line in (first, last)]
    assert all(float(of[1][task]) < 0.8 * float(of[0][task]) for task in page.TASKS), of
    assert {path.name for path in tmp_path.iterdir()} == {"minimal_student", "letters.png", "style.png"}
    assert (tmp_path / "minimal_student" / "student" / "adapter_model.safetensors").is_file()
