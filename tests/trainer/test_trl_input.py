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

"""What is written for TRL's trainers is taken by these: conversations, class labels, rewards that log."""

import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import grpo_fixtures
from helpers.opd_fixtures import logged, make_dataset, make_trainer
from helpers.tiny_sd3 import SIZE

from trl_diffusion_opd.evaluation import evaluate_retention


def talk(dataset):
    """The same prompts and tasks as TRL's datasets have them."""
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in dataset]
    rows = [{**row, "task": ["draw", "count"].index(row["task"])} for row in rows]
    message = [{"role": Value("string"), "content": Value("string")}]
    names = ClassLabel(names=["draw", "count"])
    features = Features({"prompt": message, "task": names, "target": Value("int64")})
    return Dataset.from_list(rows, features=features)


def logs(completions, prompts, log_metric, log_extra, **columns):
    log_metric("length", np.mean([len(prompt) for prompt in prompts]))
    log_extra("capitals", [prompt.upper() for prompt in prompts])
    return [float(np.asarray(image).mean()) for image in completions]


def test_the_same_as_plain_text(tmp_path):
    given, plain = talk(make_dataset()), make_dataset()
    results = {}
    for name, dataset in (("talk", given), ("plain", plain)):
        trainer = make_trainer(
            tmp_path / name, "base", train_dataset=dataset, eval_dataset={"held": dataset}, reward_funcs=logs
        )
        trainer.train()
        results[name] = {k: v for k, v in trainer.evaluate().items() if "time" not in k and "per_second" not in k}
        assert trainer.train_dataset.to_dict() == plain.to_dict()
    assert results["talk"] == results["plain"] and "eval_held_count/logs" in results["plain"]


def test_in_the_report():
    reports = [
        evaluate_retention(
            grpo_fixtures.make_pipeline(),
            "base",
            "base",
            logs,
            dataset,
            num_images=2,
            num_inference_steps=2,
            **SIZE,
            guidance_scale=1.0,
        )
        for dataset in (talk(make_dataset()), make_dataset())
    ]
    assert reports[0] == reports[1]


def test_what_rewards_log_is_logged(tmp_path):
    trainer = make_trainer(
        tmp_path, "base", eval_dataset=make_dataset(), reward_funcs=logs, log_completions=True, num_eval_images=2
    )
    metrics = trainer.evaluate()
    assert metrics["eval_length"] == np.mean([len("count0"), len("draw0")])
    table = pyarrow.parquet.read_table(tmp_path / "completions" / "completions_00000.parquet").to_pydict()
    assert table["capitals"] == [prompt.upper() for prompt in table["prompt"]] and len(table["prompt"]) == 8


def test_what_rewards_log_of_a_round(tmp_path):
    trainer = grpo_fixtures.make_trainer(tmp_path, logs, train_dataset=talk(make_dataset()))
    trainer.train()
    assert logged(trainer.state.log_history, "length") == [np.mean([len("count0"), len("draw0")])]


def test_splits():
    with pytest.raises(
        ValueError, match=r"train_dataset is a DatasetDict. Choose one of its splits, such as dataset\['test'\]"
    ):
        make_trainer("out", "base", train_dataset=DatasetDict({"test": make_dataset()}))
    with pytest.raises(
        ValueError, match="dataset is a DatasetDict; it must be a datasets.Dataset .for a DatasetDict, pass one split"
    ):
        evaluate_retention("base", "base", "base", logs, DatasetDict({"test": make_dataset()}))
