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

"""What a run prints: its lines, what an update takes, the estimate of the rest, the table of an evaluation, its end."""

import io
import sys
from types import SimpleNamespace

import pytest
from helpers.grpo_fixtures import make_trainer as grpo_trainer
from helpers.opd_fixtures import make_dataset, make_trainer
from helpers.sft_fixtures import image_dataset, sft_trainer
from transformers import PrinterCallback, ProgressCallback

from trl_diffusion_opd.reporting import run_lines
from trl_diffusion_opd.reporting.evaluation_table import print_evaluation
from trl_diffusion_opd.reporting.run_lines import RunClock, RunLines, best_line, summary, times_left, use_lines
from trl_diffusion_opd.rewards.common_scale import Reference


class Own(ProgressCallback):
    pass


def width(images, **columns):
    return [image.width / 100 for image in images]


def lines_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line]


class TestCallback:
    def test_only_transformers_own_are_replaced(self):
        for made in (ProgressCallback(), PrinterCallback()):
            callbacks = [made, Own()]
            use_lines(callbacks)
            assert [type(callback) for callback in callbacks] == [Own, RunLines]
        callbacks = [Own()]
        use_lines(callbacks)
        assert [type(callback) for callback in callbacks] == [Own]

    def test_users_take_it_away_as_they_would_in_trl(self, tmp_path, teachers, capsys):
        trainer = make_trainer(tmp_path, teachers, disable_tqdm=False)
        trainer.remove_callback(ProgressCallback)
        capsys.readouterr()
        trainer.train()
        assert "1/1" not in capsys.readouterr().out

    @pytest.mark.parametrize("disable_tqdm", [True, False])
    def test_distillation(self, tmp_path, teachers, capsys, disable_tqdm):
        trainer = make_trainer(tmp_path, teachers, max_steps=3, disable_tqdm=disable_tqdm, learning_rate=1e-2)
        capsys.readouterr()
        trainer.train()
        printed = capsys.readouterr()
        lines = lines_of(printed.out)
        assert [line.split("  ")[0] for line in lines if "gap count" in line] == ["1/3", "2/3", "3/3"]
        assert sum("An update takes" in line for line in lines) == 1  # once, at the end of so short a run
        assert lines[-1].startswith("Velocity gap from the first to the last line: count ")
        # No dict of a log, and no bar where the output is no terminal.
        assert "{" not in printed.out and "%|" not in printed.err + printed.out
        trainer.save_model()
        assert capsys.readouterr().out == f'The student is in {tmp_path}: pipe.load_lora_weights("{tmp_path}")\n'

    def test_a_bar_on_a_terminal(self, tmp_path, teachers, monkeypatch):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        trainer = make_trainer(
            tmp_path, teachers, disable_tqdm=False, reward_funcs=width, eval_dataset=make_dataset(count=1, draw=1)
        )
        trainer.train()
        assert "100%|" in terminal.getvalue() and "1/1" in terminal.getvalue()
        terminal.truncate(0)
        trainer.evaluate()
        assert "evaluation" in terminal.getvalue()

    def test_reward_and_loss(self, tmp_path, capsys):
        grpo_trainer(tmp_path / "grpo", width).train()
        assert "reward .16  spread 0  " in capsys.readouterr().out
        sft_trainer(tmp_path / "sft", train_dataset=image_dataset()).train()
        assert "1/1  loss " in (printed := capsys.readouterr().out) and "Loss: count " in printed

    def test_it_says_again_what_an_update_takes_if_that_changes_by_half(self, capsys):
        callback = RunLines()
        for seconds in (1.0, 1.4, 0.6, 1.5, 1.4, 0.7):
            callback._last = {"step_time": seconds, "time/student": seconds}
            callback._say_time()
        assert [line.split()[3] for line in lines_of(capsys.readouterr().out)] == ["1", "1.5", "0.7"]

    def test_a_finished_run_says_nothing_of_its_time(self, tmp_path, teachers, capsys):
        options = dict(save_strategy="steps", save_steps=1)
        make_trainer(tmp_path, teachers, **options).train()
        capsys.readouterr()
        make_trainer(tmp_path, teachers, **options).train(resume_from_checkpoint=True)
        assert "update in" not in capsys.readouterr().out


class TestClock:
    def test_the_rest_knows_evaluations_and_saves(self):
        moments = iter([0.0, 10.0, 12.0, 14.0, 34.0, 36.0, 41.0])
        clock = RunClock(lambda: next(moments))
        assert clock.left(5, 0, 0) == ""
        clock.end_update()  # 10 s: it sets things up
        assert clock.left(1, 2, 0) == "ETA 10 s + 2 evals"
        clock.end_update()
        clock.end_update()  # 2 s each
        assert clock.left(30, 0, 0) == "ETA 60 s"
        clock.end_evaluation(3, 18.0)  # took 18 s, with 2 s of what is done once
        assert clock.left(30, 3, 0) == "ETA 2 min"  # 60 + 54
        clock.end_update()
        clock.end_save()  # 5 s
        assert clock.left(0, 1, 4) == "ETA 38 s"
        assert clock.left(0, 0, 0) == ""

    @pytest.mark.parametrize(
        ("every", "done", "steps", "delay", "times"),
        [
            (10, 0, 100, 0, 10),
            (10, 10, 100, 0, 10),  # the one of this update comes after its line
            (10, 11, 100, 0, 9),
            (10, 11, 105, 0, 10),  # and one at the end
            (10, 0, 100, 50, 6),
            (10, 100, 100, 0, 1),
            (10, 5, 100, 200, 0),
        ],
    )
    def test_what_is_to_come(self, every, done, steps, delay, times):
        assert times_left(every, done, steps, delay) == times


class TestEnd:
    def test_first_and_last(self):
        log = [
            {"step": 1, "loss": 1.0, "velocity_gap/a": 0.5, "velocity_gap/b": 0.4},
            {"step": 1, "eval_loss": 9.0},
            {"step": 2, "loss": 1.0, "velocity_gap/a": 0.1, "velocity_gap/b": 0.2},
        ]
        assert summary(log) == ["Velocity gap from the first to the last line: a .50 -> .10, b .40 -> .20."]
        log = [{"loss": 1.0, **{f"reward/{i}": 0.5 + 0.1 * (k > 0) for i in range(30)}} for k in range(2)]
        lines = summary(log)
        assert all(len(one) <= 120 for one in lines)
        line = " ".join(one.strip() for one in lines)
        assert line.startswith("Reward from") and line.endswith(", and 18 more.")
        assert summary([{"loss": 1.0, "loss/a": 0.5, "loss/b": 0.25}]) == ["Loss: a .50, b .25."]
        assert summary([]) == summary([{"loss": 1.0}]) == []

    def test_best(self):
        args = SimpleNamespace(metric_for_best_model="reward", load_best_model_at_end=True)
        state = SimpleNamespace(best_metric=0.719, best_global_step=16)
        assert best_line(args, state) == "Best: update 16, eval_reward .72; its weights are loaded."
        args.load_best_model_at_end = False
        assert best_line(args, state).endswith("; the weights are the last update's.")
        args.metric_for_best_model = None
        assert best_line(args, state) is None


class TestTable:
    REWARDS = {"ocr": ["ocr"], "looks": ["pickscore", "taste"]}

    def printed(self, capsys, metrics, references=None, rewards=None, history=()):
        log = [{**metrics, "step": 8}]
        print_evaluation(metrics, [*history, *log], references or {}, rewards or self.REWARDS, "eval", "An evaluation")
        rows = [line[1:-1].split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in row] for row in rows]

    def test_base_teacher_now_and_best(self, capsys):
        metrics = {"eval_ocr/ocr": 0.5, "eval_looks/pickscore": 22.0, "eval_looks/taste": 0.2, "eval_reward": 0.6}
        metrics |= {"eval_kl/ocr": 2.1e-3, "eval_kl/looks": 0.1}
        history = [{"step": 4, "eval_ocr/ocr": 0.7, "eval_looks/taste": float("nan"), "eval_reward": 0.4}]
        references = {"ocr": {"ocr": Reference(0.4, 0.9, True)}, "looks": {"pickscore": Reference(21.0)}}
        assert self.printed(capsys, metrics, references, history=history) == [
            ["ocr", "ocr", "0.400", "0.900", "0.500", "0.700 (4)", "2.1e-3"],
            ["looks", "pickscore", "21.000", "-", "22.000", "22.000 (8)", ".10"],
            ["", "taste", "-", "-", "0.200", "0.200 (8)", ""],
            ["eval_reward", "", "", "", "0.600", "0.600 (8)", ""],
        ]

    def test_without_rewards_the_kl_alone(self, capsys):
        metrics = {"eval_kl/a": 0.2, "eval_kl/b": 0.1}
        history = [{"step": 4, "eval_kl/a": 0.1}]
        rows = self.printed(capsys, metrics, rewards={"a": [], "b": []}, history=history)
        assert rows == [["a", ".20", ".10 (4)"], ["b", ".10", ".10 (8)"]]

    def test_the_title_says_of_which_weights(self, tmp_path, teachers, capsys):
        evaluated = make_dataset(count=1, draw=1)
        for decay, title in ((0.5, "Evaluation of the average at update 0"), (None, "Evaluation at update 0")):
            trainer = make_trainer(tmp_path, teachers, ema_decay=decay, eval_dataset={"val": evaluated})
            capsys.readouterr()
            trainer.evaluate(evaluated)
            assert title in (printed := capsys.readouterr().out) and " on " not in printed
        trainer.evaluate()
        assert "Evaluation on val at update 0" in capsys.readouterr().out


def test_a_narrow_terminal(monkeypatch, tmp_path, teachers, capsys):
    monkeypatch.setattr(run_lines.shutil, "get_terminal_size", lambda *_: SimpleNamespace(columns=40))
    make_trainer(tmp_path, teachers).train()
    (line,) = [line for line in lines_of(capsys.readouterr().out) if line.startswith("1/1")]
    assert len(line) <= 40
