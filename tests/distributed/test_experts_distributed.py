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

"""Two processes train two experts as one process does, also where an update uses one of them."""

from pathlib import Path
from typing import Any

import pytest
from helpers.families_experts import save_pair, trained_on_few_levels
from helpers.launching import Forks
from helpers.opd_fixtures import logged, relative_difference, snapshot
from helpers.two_processes import fsdp_environment, trained_by_two

from trl_diffusion_opd import DiffusionOPDTrainer
from trl_diffusion_opd.pipelines.experts import EXPERTS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_pair(folder, 0)
    return str(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> tuple[DiffusionOPDTrainer, list[list[str]]]:
    options = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    return trained_on_few_levels(tmp_path_factory.mktemp("one"), teacher, **options)


def test_an_expert_without_a_level_does_not_move(one: tuple[DiffusionOPDTrainer, list[list[str]]]) -> None:
    # Neither weight decay nor the optimizer's momentum moves it.
    assert all(len(moved) == 1 for moved in one[1])
    assert {expert for (expert,) in one[1]} == {*EXPERTS}


@pytest.mark.parametrize("environment", [None, fsdp_environment()], ids=["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(
    processes: Forks, tmp_path: Path, teacher: str, one: Any, environment: dict[str, str] | None
) -> None:
    scenario = {"teachers": teacher, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    reports, weights, _ = trained_by_two(processes, tmp_path, "train_experts.py", scenario, environment)
    trainer, moved = one
    assert [report["kind"].split(".")[1] for report in reports] == ["FSDP" if environment else "MULTI_CPU"] * 2
    assert [report["moved"] for report in reports] == [moved] * 2
    for name in ("loss", "grad_norm"):
        assert logged(reports[0]["log"], name) == pytest.approx(logged(trainer.state.log_history, name), rel=1e-4)
    assert relative_difference(weights[0], snapshot(trainer)) < 1e-4
    assert relative_difference(weights[1], weights[0]) == 0
