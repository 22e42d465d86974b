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

"""The rows of a micro-batch say their task, and those of a group their prompt: a data loader of another order stops a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from helpers import dmd_fixtures, grpo_fixtures, nft_fixtures
from helpers.opd_fixtures import make_config, make_dataset, make_trainer
from helpers.sft_fixtures import sft_trainer
from torch.utils.data import Sampler

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.trainer.checks import loader_problems


pytestmark = pytest.mark.slow


BASES = {"count": "base", "draw": "base"}
MAKE: dict[str, Callable[..., Any]] = {
    "opd": lambda folder, **options: make_trainer(folder, BASES, **options),
    "sft": sft_trainer,
    "grpo": lambda folder, **options: grpo_fixtures.make_trainer(folder, **{"num_generations": 2, **options}),
    "nft": nft_fixtures.make_trainer,
    "dmd": dmd_fixtures.make_trainer,
}


class Reordered(Sampler[int]):
    """What the trainer's own sampler gives, in another order."""

    def __init__(self, own: Any, order: Callable[[list[int]], list[int]]):
        self.own, self.order = own, order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(list(self.own)))

    def __len__(self) -> int:
        return len(self.own)

    def set_epoch(self, epoch: int) -> None:
        self.own.set_epoch(epoch)


def reorder(trainer: Any, order: Callable[[list[int]], list[int]]) -> None:
    own = trainer._get_train_sampler
    trainer._get_train_sampler = lambda *inputs: Reordered(own(*inputs), order)


@pytest.mark.parametrize("name", MAKE)
def test_rows_of_another_task_stop_the_run(tmp_path: Path, name: str) -> None:
    trainer = MAKE[name](tmp_path, max_steps=2, per_device_train_batch_size=2)
    before = {n: p.detach().clone() for n, p in trainer.student.named_parameters().items()}
    reorder(trainer, lambda rows: rows[2:] + rows[:2])
    with pytest.raises(
        RuntimeError,
        match="Micro-batch 1 of update 1 has 2 rows of draw, but it should have 2 of 'count'.*own data loader",
    ):
        trainer.train()
    assert all(bool((p == before[n]).all()) for n, p in trainer.student.named_parameters().items())


@pytest.mark.parametrize("name", ["opd", "nft"])
def test_rows_of_two_tasks_stop_the_run(tmp_path: Path, name: str) -> None:
    trainer = MAKE[name](tmp_path, max_steps=2, per_device_train_batch_size=2)
    reorder(trainer, lambda rows: rows[1:] + rows[:1])
    with pytest.raises(RuntimeError, match="has 2 rows of count, draw, but it should have 2 of 'count'"):
        trainer.train()


def test_fewer_rows_than_are_due_stop_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BASES, max_steps=1)
    reorder(trainer, lambda rows: rows[:1])
    with pytest.raises(RuntimeError, match="has 1 rows of count, but it should have 2 of 'count'"):
        trainer.train()


def test_a_round_that_goes_wrong_later_stops_there(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, BASES, max_steps=2)
    reorder(trainer, lambda rows: [*rows[:4], *reversed(rows[4:8])])
    with pytest.raises(RuntimeError, match="Micro-batch 1 of update 2 has 2 rows of draw"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_prompts_go_to_their_encoders_by_their_rows(tmp_path: Path) -> None:
    # With offloaded encoders a round's prompts are encoded before it, at the guidance of their teachers.
    trainer = make_trainer(tmp_path, BASES, max_steps=1, offload_encoders=True)
    reorder(trainer, lambda rows: rows[2:] + rows[:2])
    with pytest.raises(RuntimeError, match="has 2 rows of draw, but it should have 2 of 'count'"):
        trainer.train()


def test_without_a_task_column_all_rows_are_of_one_task(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "base", train_dataset=make_dataset().remove_columns("task"), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_groups_of_two_prompts_stop_the_run(tmp_path: Path, name: str) -> None:
    # All of one task, and yet completions of two prompts would be compared.
    dataset = make_dataset(count=6)
    trainer = MAKE[name](tmp_path, train_dataset=dataset, max_steps=1, per_device_train_batch_size=4)
    reorder(trainer, lambda rows: rows[1:] + rows[:1])
    with pytest.raises(RuntimeError, match="not whole groups of num_generations=2 with one prompt each"):
        trainer.train()


def test_a_second_update_on_a_round_has_its_rows(tmp_path: Path) -> None:
    dataset = make_dataset(count=6)
    options = dict(train_dataset=dataset, max_steps=2, per_device_train_batch_size=4, num_iterations=2)
    trainer = MAKE["grpo"](tmp_path, **options)
    reorder(trainer, lambda rows: rows[:4] + rows[8:])
    with pytest.raises(
        RuntimeError, match=r"Update 2 trains on the completions of the round before it \(num_iterations=2\)"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


# What would make it so is refused before the first step

LOADERS: dict[str, tuple[dict[str, Any], str]] = {
    "split_batches": (
        {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6},
        "split_batches=True splits a batch over the 2 processes, but here each process has its own batch. Leave it out, and use "
        "per_device_train_batch_size=3 for 6 samples over all processes.",
    ),
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        "dispatch_batches=True sends batches of tensors from the first process to the others, but here batches are rows of prompts",
    ),
    "num_steps": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "num_steps in gradient_accumulation_kwargs is not supported, since the tasks share an update's micro-batches. Use "
        "gradient_accumulation_steps.",
    ),
    "in_order": (
        {"dataloader_in_order": False, "dataloader_num_workers": 2},
        "dataloader_in_order=False gives batches in any order",
    ),
}


@pytest.mark.parametrize("label", LOADERS)
def test_loaders_of_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    options, message = LOADERS[label]
    args = make_config(tmp_path, **options)
    monkeypatch.setattr(DiffusionOPDConfig, "world_size", 2)
    [problem] = loader_problems(args)
    assert message in problem


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"tp_size": 2}])
def test_processes_that_share_a_batch(tmp_path: Path, sizes: dict[str, int]) -> None:
    args = make_config(tmp_path)
    args.parallelism_config = ParallelismConfig(**sizes)
    [problem] = loader_problems(args)
    assert problem.startswith("parallelism_config lets 2 processes share one batch (tp, cp or sp)")
    args.parallelism_config = ParallelismConfig(dp_replicate_size=2)
    assert loader_problems(args) == []


def test_processes_that_share_a_batch_by_the_launchers_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    [problem] = loader_problems(args)
    assert "lets 2 processes share one batch" in problem


@pytest.mark.parametrize("label", ["dispatch_batches", "num_steps"])
def test_loaders_are_refused_by_the_trainer(tmp_path: Path, label: str) -> None:
    options, message = LOADERS[label]
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, BASES, **options)
    assert message in str(error.value)


def test_on_one_process_a_batch_is_not_split(tmp_path: Path) -> None:
    harmless = {"split_batches": True, "even_batches": False, "non_blocking": True, "use_seedable_sampler": False}
    trainer = make_trainer(tmp_path, BASES, accelerator_config=harmless, dataloader_in_order=False)
    trainer.train()
    assert trainer.state.global_step == 1
