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
Tasks that can't be told apart: what is measured is right, who is warned, what it costs, and that training is
untouched.
"""

import itertools
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from helpers.families import FAMILIES
from helpers.launching import TESTS, Forks
from helpers.opd_fixtures import make_trainer, snapshot, train_losses
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_lora, make_pipeline
from helpers.two_processes import fsdp_environment

from trl_diffusion_opd import TeacherConfig, tiny
from trl_diffusion_opd.algorithms.separability import (
    Pair,
    conflict_warning,
    disagreement,
    identical_prompts,
    prompt_counts,
    prompt_features,
    told_apart,
)
from trl_diffusion_opd.data.tasks import TaskSampler
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.trainer.base_trainer import DiffusionTrainer
from trl_diffusion_opd.trainer.conflicts import TaskComparison


# The figures


def test_identical_prompts():
    one, other = (prompt_counts(pa.array(texts)) for texts in (["x", "x", "y", "z"], ["x", "w", "w", "w", "z"]))
    # x is in conflict in a fifth of the rows (1/2 and 1/5), z in a fifth (1/4 and 1/5).
    assert identical_prompts(one, other) == identical_prompts(other, one) == (2, pytest.approx(0.4))
    assert identical_prompts(one, one) == (3, 1.0)
    assert identical_prompts(one, prompt_counts(pa.array(["a"]))) == (0, 0.0)


def test_features_of_whatever_an_encoder_returns():
    pooled, sequence = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 3.0], [3.0, 5.0], [90.0, 90.0]]])
    mask = torch.tensor([[1, 1, 0]])
    for embeddings, expected in (
        (pooled, [1, 2]),
        ((pooled, None, sequence[:, :2]), [1, 2, 2, 4]),
        ([(sequence, mask)], [2, 4]),
        ([[sequence[0, :1]], [], pooled.bfloat16()], [1, 3, 1, 2]),
        (torch.stack([sequence, sequence + 1]), [31.333333 + 0.5, 32.666667 + 0.5]),
        ((None, mask), []),
    ):
        features = prompt_features(embeddings)
        assert features.dtype == np.float64
        np.testing.assert_allclose(features, expected, rtol=1e-6)


def vectors(n: int, first: int = 0, shift: float = 0.0, features: int = 40) -> dict[str, np.ndarray]:
    """
    Random features, some a thousand times larger than others; `shift` is in the smallest alone, and one is constant.
    """
    sizes = np.geomspace(1000, 1, features)
    rows = {str(i): sizes * np.random.default_rng(i).normal(size=features) for i in range(first, first + n)}
    for row in rows.values():
        row[-1] += shift
        row[0] = 7.0
    return rows


def test_told_apart():
    one = vectors(60)
    assert 0.35 < told_apart(one, vectors(60, 60)) < 0.65
    assert told_apart(one, vectors(60, 60, shift=8.0)) > 0.95
    # Tasks of different sizes: chance stays chance, and the smaller is found.
    assert 0.3 < told_apart(one, vectors(20, 60)) < 0.7
    assert told_apart(one, vectors(20, 60, shift=8.0)) > 0.9
    # The same prompts in both: a prompt must not be told by its twin.
    assert told_apart(one, one) == 0.5
    assert told_apart(one, vectors(15, 60)) is None


def test_what_is_the_same_for_all_tells_nothing_apart():
    same = {str(i): np.full(4, 2.0 + 1e-6 * (i >= 20)) for i in range(40)}
    one, other = ({k: v for k, v in same.items() if (int(k) >= 20) == late} for late in (False, True))
    assert told_apart(one, other) == 0.5


def test_disagreement():
    assert disagreement(2.0, (1.0, 1.0), 100.0, 1e-6) == pytest.approx(math.sqrt(2))  # nothing in common
    assert disagreement(4.0, (1.0, 1.0), 100.0, 1e-6) == 2.0  # opposite
    assert disagreement(1.0, (1.0, 0.0), 100.0, 1e-6) == pytest.approx(math.sqrt(2))  # one is the base
    assert disagreement(1e-11, (1e-11, 0.0), 100.0, 1e-6) == 0.0  # rounding
    assert disagreement(1.0, (0.0, 0.0), 100.0, 1e-6) == math.inf  # the base at two scales of guidance


@pytest.mark.parametrize(
    ("identical", "accuracy", "apart", "warned"),
    [
        (0.0, 0.5, 1.4, True),
        (0.5, 0.9, 1.4, True),
        (0.2, None, 1.4, True),
        (0.0, None, 1.4, False),
        (0.0, 0.95, 1.4, False),
        (0.0, 0.5, 0.1, False),
        (0.0, 0.5, None, False),
    ],
)
def test_what_is_a_conflict(identical, accuracy, apart, warned):
    pair = Pair(("a", "b"), 3, identical, accuracy, apart)
    assert pair.in_conflict == warned == (conflict_warning([pair]) is not None)


def test_many_conflicts_are_one_warning():
    pairs = [Pair(("a", str(i)), 0, 0.0, 0.5, 1.0 if i else 0.0) for i in range(14)]
    lines = conflict_warning(pairs).splitlines()
    assert len(lines) == 1 + 10 + 1 + 1 and lines[11] == "- and 3 more pairs" and "'0'" not in lines[1]


def test_prompts_that_come_first_and_in_the_company_of_training():
    rows = [np.arange(100), np.arange(100, 120)]
    sampler = TaskSampler(rows, batch_size=4, micro_batches=1, seed=3)
    firsts = sampler.first_companies(30)
    assert [len(companies) for companies in firsts] == [4, 3]
    round_by_round = [company.tolist() for number in range(4) for company in sampler.companies(number)]
    for companies in firsts:
        assert companies[0].tolist() in round_by_round
    assert set(np.concatenate(firsts[1])) == set(rows[1])


COLORS, SHAPES = ("red", "blue", "green", "yellow"), ("cat", "dog", "square", "ring")
SCENES = [f"a {a} {b} left of a {c} {d}" for a, b, c, d in itertools.product(COLORS, SHAPES, COLORS, SHAPES)]
SCENES = [SCENES[i] for i in np.random.default_rng(0).permutation(len(SCENES))]


# Pooled outputs and three encoders, lists of tensors, a mask, layers first, padding that is attended to.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "z_image", "qwen_image", "hidream", "wan"])
def test_a_word_in_front_tells_the_prompts_of_a_family_apart(name):
    family = FAMILIES[name]
    field = VelocityField(
        family.build(),
        num_inference_steps=2,
        height=family.size,
        width=family.size,
        max_sequence_length=family.max_sequence_length,
        generation_kwargs=family.generation_kwargs | family.guidance_options,
    )

    def features(prompts, scale=1.0):
        return {p: prompt_features(e) for p, e in zip(prompts, field.embeddings(prompts, scale), strict=True)}

    one, other = SCENES[:80], SCENES[80:160]
    marked = [f"two {prompt}" for prompt in other]
    assert told_apart(features(one), features(other)) < 0.6
    assert told_apart(features(one), features(marked)) > 0.95
    # What comes with every prompt under guidance is the same for all.
    scale = family.guidance_scale
    assert told_apart(features(one, scale), features(other, scale)) < 0.6


# The trainers


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("count", "draw", "more"), start=1):
        make_lora(make_pipeline(), folder / name, seed)
    return {name: str(folder / name) for name in ("count", "draw", "more")}


def data(n: int = 24, marks: tuple[str, str] = ("", ""), same: int = 0) -> Dataset:
    """`n` prompts of one kind for each of two tasks, each task's with its word in front, the first `same` in both."""
    prompts = {"count": SCENES[:n], "draw": SCENES[:same] + SCENES[n : 2 * n - same]}
    rows = [
        {"prompt": mark + prompt, "task": task}
        for (task, of_task), mark in zip(prompts.items(), marks, strict=True)
        for prompt in of_task
    ]
    return Dataset.from_list(rows)


MARKED = ("a word ", "one more ")


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if "can't be told apart" in record.message]


def two(teachers):
    return {task: teachers[task] for task in ("count", "draw")}


def pairs_of(trainer, **options) -> list[Pair]:
    return trainer.task_comparison().pairs(trainer.make_sampler(), **options)


def test_a_conflict_is_named_before_the_first_step(tmp_path, teachers, caplog, capsys):
    trainer = make_trainer(tmp_path, two(teachers), train_dataset=data(), callbacks=[])
    begun = []
    trainer._begin_costs = lambda: begun.extend(warnings(caplog)) or trainer._cost.begin(0.0, 1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.train()
    (warning,) = warnings(caplog)
    assert begun[0] == warning
    (pair,) = pairs_of(trainer)
    assert pair.tasks == ("count", "draw") and pair.identical == 0 and pair.accuracy < 0.75 and pair.disagreement > 0.5
    for part in (
        "- 'count' and 'draw': from a prompt's embedding the task is found",
        f"{pair.accuracy:.0%}",
        f"{pair.disagreement:.2f} apart",
        "the mean",
        "with prompt_templates, such as",
    ):
        assert part in warning
    assert f"{pair.disagreement:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_no_conflict(tmp_path, teachers, caplog, capsys):
    cases = {
        "told apart": (two(teachers), data(marks=MARKED)),
        "the same teacher": ({"count": teachers["count"], "draw": teachers["count"]}, data()),
        "one task": (teachers["count"], data().remove_columns("task")),
        "too few prompts to say": (two(teachers), data(15)),
        "few of many prompts in both": (two(teachers), data(15, same=1)),
    }
    with caplog.at_level(logging.WARNING):
        for number, (specs, dataset) in enumerate(cases.values()):
            trainer = make_trainer(tmp_path / str(number), specs, train_dataset=dataset)
            networks = []
            trainer.bank.backbone.network.get_base_model().register_forward_pre_hook(
                lambda *_, n=networks: n.append(1)
            )
            trainer._compare_tasks()
            assert networks == [], "teachers are asked only where the prompts can't be told apart"
            assert ("Tasks by their prompts" in capsys.readouterr().out) == (number not in (1, 2))
    assert warnings(caplog) == []


def test_many_identical_prompts(tmp_path, teachers, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, two(teachers), train_dataset=data(10, same=5)).train()
    (warning,) = warnings(caplog)
    assert "5 prompts are in both, 50.0% of the rows" in warning and "embeddings" not in warning


@pytest.mark.slow
def test_near_identical_prompts(tmp_path, teachers):
    """A character is enough to tell them apart, if it is in all prompts of a task and in none of the other."""
    texts = SCENES[:48]
    halves = (texts[::2], texts[1::2])
    rows = [{"prompt": p, "task": t} for t, half in zip(("count", "draw"), halves, strict=True) for p in half]
    marked = [{"prompt": "!" * (t == "draw") + p, "task": t} for p in texts[:24] for t in ("count", "draw")]
    accuracies = [
        pairs_of(make_trainer(tmp_path / name, two(teachers), train_dataset=Dataset.from_list(of_name)))[0].accuracy
        for name, of_name in (("alike", rows), ("marked", marked))
    ]
    assert accuracies[0] < 0.75 and accuracies[1] > 0.9


@pytest.mark.slow
def test_teachers_that_are_compared(tmp_path, teachers):
    mixed = [teachers["count"], teachers["draw"]]
    specs = {
        "a": teachers["count"],
        "b": TeacherConfig(teachers["count"], guidance_scale=3.0),
        "c": mixed,
        "d": mixed[::-1],
        "e": "base",
        "f": TeacherConfig("base", guidance_scale=3.0),
    }
    rows = [{"prompt": p, "task": t} for t in specs for p in SCENES[:2]]
    found = pairs_of(make_trainer(tmp_path, specs, train_dataset=Dataset.from_list(rows)))
    apart = {"".join(pair.tasks): pair.disagreement for pair in found}
    assert "cd" not in apart and len(apart) == 14
    assert apart["ef"] == math.inf
    assert apart["ae"] == pytest.approx(math.sqrt(2), abs=1e-4)  # what a teacher has in common with the base
    # The mean of two teachers is half of what they are apart from each.
    assert 0.3 < apart["ac"] < 1.0 < 1.2 < apart["ae"]


def test_disagreement_of_the_trainer_is_that_of_the_velocities(tmp_path, teachers):
    trainer = make_trainer(tmp_path, two(teachers), train_dataset=data(), guidance_scale=2.0, num_inference_steps=3)
    (pair,) = pairs_of(trainer)
    field, bank = trainer.velocity_field, trainer.bank
    sums = torch.zeros(3, dtype=torch.float64)
    draw, latents = field.initial_latents, []
    field.initial_latents = lambda prompts, g: latents.append((draw(prompts, g), prompts)) or latents[-1][0]
    pairs_of(trainer)
    starts = [(x, prompts) for x, prompts in latents if prompts != [""]]
    student = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for x, prompts in starts[1::2]:  # the first of each is of the encoding ahead
            for t, below in zip(field.levels[:-1].tolist(), field.levels[1:].tolist(), strict=True):
                v = []
                for role in (bank.teachers["count"][0], bank.teachers["draw"][0], None):
                    with bank.use(role) as module:
                        v.append(field(x, t, prompts, 2.0, module).double())
                sums += torch.stack([(a - b).square().mean() for a, b in ((v[0], v[1]), (v[0], v[2]), (v[1], v[2]))])
                x = x + (below - t) * field(x, t, prompts, 2.0, student)
    assert len(starts) == 4
    assert pair.disagreement == pytest.approx(math.sqrt(2 * sums[0] / (sums[1] + sums[2])), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 2.0, "sampler": "flow_sde", "offload_encoders": True}],
    ids=["plain", "offloaded"],
)
def test_training_is_the_same_to_the_bit(tmp_path, teachers, monkeypatch, options):
    looked_at, compare = [], DiffusionTrainer._compare_tasks

    def noted(trainer):
        before, numpy, sampler = torch.get_rng_state(), np.random.get_state()[1].tolist(), trainer._sampler
        compare(trainer)
        assert torch.equal(before, torch.get_rng_state()) and numpy == np.random.get_state()[1].tolist()
        assert trainer._sampler is sampler, "the one of the data loader, which is told the epoch"
        looked_at.append(trainer)

    monkeypatch.setattr(DiffusionTrainer, "_compare_tasks", noted)
    settings = {
        "train_dataset": data(),
        "max_steps": 3,
        "per_device_train_batch_size": 12,
        **options,
    }  # into the second epoch
    looked = make_trainer(tmp_path / "looked", two(teachers), **settings)
    looked.train()
    monkeypatch.setattr(DiffusionTrainer, "_compare_tasks", lambda trainer: None)
    plain = make_trainer(tmp_path / "plain", two(teachers), **settings)
    plain.train()
    assert looked_at == [looked]
    assert train_losses(looked) == train_losses(plain)
    weights = snapshot(plain)
    assert all(torch.equal(weight, weights[name]) for name, weight in snapshot(looked).items())


@pytest.mark.slow
def test_a_resumed_run_is_not_before_its_first_step(tmp_path, teachers, caplog):
    options = {"train_dataset": data(), "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, two(teachers), max_steps=1, **options).train()
    caplog.clear()
    make_trainer(tmp_path, two(teachers), max_steps=2, **options).train(resume_from_checkpoint=True)
    assert warnings(caplog) == []


@pytest.mark.slow
def test_what_it_costs(tmp_path, teachers):
    """Of ten thousand prompts a few are encoded, in the company in which training then finds them encoded."""
    n = 5000
    rows = [{"prompt": f"{task} {i}", "task": task} for task in ("count", "draw") for i in range(n)]
    pipeline = make_pipeline()
    trainer = make_trainer(tmp_path, two(teachers), pipeline, train_dataset=Dataset.from_list(rows), max_steps=8)
    encoded = []
    pipeline.text_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
    trainer._compare_tasks()
    assert 256 <= sum(encoded) < 256 + 8  # beside the trials of the cache
    encoded.clear()
    trainer.train()  # 16 prompts a task, all of them among those
    assert sum(encoded) == 0


@pytest.mark.slow
def test_images_of_teachers_are_not_drawn_first(tmp_path, teachers, caplog):
    trainer = sft_trainer(tmp_path, two(teachers), train_dataset=data(), teacher_cache_dir=str(tmp_path / "images"))
    drawn = []
    draw = trainer._draw_shard
    trainer._draw_shard = lambda *inputs: drawn.append(len(warnings(caplog))) or draw(*inputs)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert set(drawn) == {1} and len(warnings(caplog)) == 1


@pytest.mark.slow
def test_dry_run(tmp_path, teachers, capsys):
    rows = [*data(), *({"prompt": f"the word {p}", "task": "more"} for p in SCENES[48:72])]
    trainer = make_trainer(tmp_path, teachers, train_dataset=Dataset.from_list(rows), eval_num_inference_steps=1)
    report = trainer.dry_run()
    entries = {tuple(entry["tasks"]): entry for entry in report["separability"]}
    assert [*entries][0] == ("count", "draw") and len(entries) == 3
    for tasks, entry in entries.items():
        assert entry["disagreement"] > 0.5 and (entry["accuracy"] < 0.75) == (tasks == ("count", "draw"))
        assert entry["identical_prompts"] == 0
    (warning,) = report["warnings"]
    assert (
        "- 'count' and 'draw': from a prompt's embedding" in warning
        and " in both" not in warning
        and "'more'" not in warning
    )
    json.dumps(report["separability"])
    shown = capsys.readouterr().out
    assert "Tasks by their prompts" in shown and "count, more" in shown


@pytest.mark.slow
def test_the_tiny_world_is_told_apart(tmp_path):
    options = {"height": 32, "width": 32, "max_sequence_length": 12, "peft_config": "default"}
    trainer = make_trainer(tmp_path, tiny.TEACHERS, tiny.BASE, train_dataset=tiny.dataset("train"), **options)
    found = pairs_of(trainer, thorough=True)
    assert len(found) == 3
    assert all(pair.accuracy > 0.95 and pair.identical == 0 and pair.disagreement > 1 for pair in found)
    assert not any(pair.in_conflict for pair in found)


# Several processes


def compare(folder: str, teachers: dict[str, str], split: bool) -> None:
    """Trains for an update, and writes what was found before it, how many forwards that took, and the loss."""
    if split:
        sys.path.insert(0, str(TESTS / "distributed"))
        from fsdp_on_cpu import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    trainer = make_trainer(folder, teachers, train_dataset=data(), per_device_train_batch_size=1)
    forwards: list[int] = []
    trainer.bank.backbone.network.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    found: list[object] = []
    find = TaskComparison.pairs
    TaskComparison.pairs = lambda *inputs: found.append(find(*inputs)) or found[-1]
    begin = trainer._begin_costs
    trainer._begin_costs = lambda: found.append(len(forwards)) or begin()
    trainer.train()
    pairs, count = found
    report = [
        [pair.report() for pair in pairs],
        count,
        train_losses(trainer)[0],
        str(trainer.accelerator.distributed_type),
    ]
    Path(folder, f"{trainer.accelerator.process_index}.json").write_text(json.dumps(report))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split by FSDP2"])
def test_two_processes_find_the_same(tmp_path, teachers, processes: Forks, split):
    environment = fsdp_environment() if split else None
    ended = processes.run(compare, str(tmp_path), two(teachers), split, environment=environment)
    assert [one.code for one in ended] == [0, 0], ended
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    (report,), forwards, loss, kind = first
    assert forwards == 2 * 3 * 4 and ("FSDP" in kind) == split
    # And what one process finds, with as many prompts at a time.
    trainer = make_trainer(tmp_path, two(teachers), train_dataset=data(), per_device_train_batch_size=2)
    (pair,) = pairs_of(trainer)
    assert report["accuracy"] == pair.accuracy
    assert report["disagreement"] == pytest.approx(pair.disagreement, rel=1e-5)
    trainer.train()
    assert loss == pytest.approx(train_losses(trainer)[0], rel=1e-5)
