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

"""The student's images during training: when they are drawn, and that base and teachers are beside them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers import grpo_fixtures, nft_fixtures
from helpers.opd_fixtures import StopAt, make_dataset, make_teachers, make_trainer, student_lora
from helpers.sft_fixtures import sft_trainer
from PIL import Image
from transformers import TrainerCallback

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.reporting.completions import Completion, last_completions
from trl_diffusion_opd.trainer import training_pictures


SHOWN = {"log_completions": True, "num_completions_to_print": 2}
AT_BASE = student_lora(init_lora_weights=True)


@pytest.fixture
def teachers(tmp_path: Path) -> dict[str, str]:
    return make_teachers(tmp_path)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Completion]]:
    """What was logged, by update."""
    logged: dict[int, list[Completion]] = {}

    def log(completions: list[Completion], folder: str, step: int, *_: object) -> None:
        assert step not in logged, f"update {step} was drawn twice"
        logged[step] = completions

    monkeypatch.setattr(training_pictures, "log_completions", log)
    return logged


def same(one: Image.Image, two: Image.Image) -> bool:
    return bool((np.asarray(one) == np.asarray(two)).all())


class TestWhen:
    @pytest.mark.parametrize(
        ("options", "updates"),
        [
            ({"save_strategy": "steps", "save_steps": 2}, [0, 2, 4, 5]),
            ({"save_strategy": "no"}, [0, 5]),
            ({"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}, [0, 3, 5]),
        ],
    )
    def test_at_saves_and_at_the_end_if_there_are_no_evaluations(self, options, updates, tmp_path, teachers, shown):
        dataset = make_dataset(count=2, draw=1) if "eval_steps" in options else None
        make_trainer(tmp_path, teachers, eval_dataset=dataset, max_steps=5, **SHOWN, **options).train()
        assert list(shown) == updates

    def test_a_resumed_run_goes_on_with_them(self, tmp_path, teachers, shown):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, **SHOWN}
        make_trainer(tmp_path / "whole", teachers, **options).train()
        whole = dict(shown)
        shown.clear()
        make_trainer(tmp_path / "split", teachers, callbacks=[StopAt(2)], **options).train()
        assert list(shown) == [0, 2]
        shown.clear()
        trainer = make_trainer(tmp_path / "split", teachers, **options)
        trainer.train(resume_from_checkpoint=True)
        assert list(shown) == [4, 5]  # not those of update 2 again
        for step, completions in shown.items():
            for ours, theirs in zip(completions, whole[step], strict=True):
                assert same(ours.image, theirs.image) and list(ours.beside) == list(theirs.beside)
                assert all(same(ours.beside[name].image, theirs.beside[name].image) for name in theirs.beside)
        shown.clear()
        make_trainer(tmp_path / "split", teachers, **options).train(resume_from_checkpoint=True)
        assert list(shown) == []  # nothing was left to train

    def test_not_while_a_signal_waits(self, tmp_path, teachers, shown):
        trainer = make_trainer(tmp_path, teachers, max_steps=5, save_strategy="no", **SHOWN)

        class Signal(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 2:
                    trainer._stop._ask(15, None)

        trainer.add_callback(Signal())
        with pytest.raises(SystemExit):
            trainer.train()
        assert (tmp_path / "checkpoint-3").is_dir() and list(shown) == [0]


class TestReferences:
    def test_base_and_teachers_from_the_same_noise(self, tmp_path, teachers, shown):
        pair = [
            {"model_name_or_path": teachers[task], "weight": weight} for task, weight in (("count", 3), ("draw", 1))
        ]
        trainer = make_trainer(
            tmp_path,
            {"count": teachers["count"], "draw": [TeacherConfig(**one) for one in pair]},
            guidance_scale=2.0,
            max_steps=2,
            learning_rate=0.3,
            **SHOWN,
            peft_config=AT_BASE,
        )
        trainer.train()
        start, end = shown[0], shown[2]
        assert [list(one.beside) for one in start if one.task == "count"][0] == ["base, CFG 2", "teacher, CFG 2"]
        names = ["base, CFG 2", "teacher 1, CFG 2", "teacher 2, CFG 2"]
        assert [list(one.beside) for one in start if one.task == "draw"][0] == names
        for before, after in zip(start, end, strict=True):
            assert before.label == "student, CFG 2"
            # A LoRA starts at the base, which shows that noise and prompt are the same
            assert same(before.image, before.beside["base, CFG 2"].image)
            assert not same(after.image, after.beside["base, CFG 2"].image)
            assert all(after.beside[name] is before.beside[name] for name in before.beside)  # drawn once
        draw = next(one for one in start if one.task == "draw").beside
        assert len({draw[name].image.tobytes() for name in names}) == 3

    def test_a_prompt_twice(self, tmp_path, teachers, shown):
        dataset = Dataset.from_dict({"prompt": ["a cat", "a cat", "a dog"], "task": ["count", "count", "draw"]})
        make_trainer(tmp_path, teachers, train_dataset=dataset, max_steps=1, peft_config=AT_BASE, **SHOWN).train()
        first, second, _ = shown[0]
        assert not same(first.image, second.image)
        for one in (first, second):
            assert same(one.image, next(iter(one.beside.values())).image)

    def test_scores(self, tmp_path, teachers, shown):
        rewards = {"count": [grpo_fixtures.brightness]}
        make_trainer(tmp_path, teachers, reward_funcs=rewards, max_steps=1, **SHOWN).train()
        for one in shown[0]:
            for model in one.beside.values():
                expected = grpo_fixtures.brightness([model.image]) if one.task == "count" else []
                assert list(model.rewards.values()) == pytest.approx(expected)

    @pytest.mark.parametrize("method", ["grpo", "nft"])
    def test_training_by_reward_shows_the_base(self, method, tmp_path, shown):
        make = {"grpo": grpo_fixtures.make_trainer, "nft": nft_fixtures.make_trainer}[method]
        trainer = make(
            tmp_path, max_steps=2, learning_rate=0.3, ema_decay=0, peft_config=AT_BASE, save_strategy="no", **SHOWN
        )
        trainer.train()
        assert list(shown) == [0, 2]
        for before, after in zip(shown[0], shown[2], strict=True):
            ((caption, base),) = before.beside.items()
            assert caption.startswith("base, CFG") and base is after.beside[caption] and base.rewards
            assert same(before.image, base.image) and not same(after.image, base.image)

    def test_all_weights(self, tmp_path, shown):
        """Without a copy of the base, its images are those of the start."""
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, **SHOWN}
        make = grpo_fixtures.make_trainer
        make(tmp_path, peft_config=None, beta=0.0, callbacks=[StopAt(2)], **options).train()
        assert list(shown) == [0, 2]
        for before, after in zip(shown[0], shown[2], strict=True):
            (base,) = before.beside.values()
            assert same(before.image, base.image) and not same(after.image, base.image)
        shown.clear()
        make(tmp_path, peft_config=None, beta=0.0, **options).train(resume_from_checkpoint=True)
        assert list(shown) == [4] and all(one.beside == {} for one in shown[4])

    @pytest.mark.parametrize("taught", [True, False])
    def test_sft(self, taught, tmp_path, teachers, shown):
        trainer = sft_trainer(tmp_path, *([teachers] if taught else []), max_steps=1, save_strategy="no", **SHOWN)
        trainer.train()
        names = [caption.split(",")[0] for caption in shown[1][0].beside]
        assert names == (["base", "teacher"] if taught else ["base"])


def test_files(tmp_path, teachers):
    make_trainer(tmp_path, teachers, max_steps=1, save_strategy="no", **SHOWN).train()
    last = last_completions(tmp_path)
    assert last["step"] == 1 and Image.open(tmp_path / last["picture"]).width > 500
    assert {sample["task"] for sample in last["samples"]} == {"count", "draw"}
    assert all(Image.open(tmp_path / sample["file"]).size == (16, 16) for sample in last["samples"])
    assert not list((tmp_path / "completions").glob(".*"))
