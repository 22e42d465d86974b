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

"""The example script of the baselines, run as a user runs it, and the stage files of the examples."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from helpers.example_script import run_example
from helpers.refusals import command_refuses
from safetensors.torch import load_file

from trl_diffusion_opd.scripts import stages


ROOT = Path(__file__).parents[2]
STAGE_FILES = sorted((ROOT / "examples" / "stages").glob("*.yaml"))
TRAINED = {"opd", "multi-task", "merge-opd", "off-policy", "policy-gradient", "sft"}


@pytest.fixture(autouse=True)
def root_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the paths of the stage files start
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shortened(folder):
    """The examples' own stage files, with two small updates a stage."""
    arguments = []
    for option, name in (("stages", "tiny_baselines"), ("cascade", "tiny_cascade")):
        content = yaml.safe_load((ROOT / "examples" / "stages" / f"{name}.yaml").read_text())
        for stage in content["stages"]:
            short = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True}
            if stage.get("trainer", content["shared"].get("trainer")) == "grpo":
                short |= {"per_device_train_batch_size": 12, "num_inference_steps": 4, "sde_window_range": [0, 2]}
            stage["config"] = {**stage.get("config", {}), **short}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        arguments += [f"--{option}", path]
    return arguments


def run(monkeypatch, folder, output_dir, *arguments):
    given = [*shortened(folder), "--output_dir", output_dir, "--num_test_images", 2, *arguments]
    run_example(monkeypatch, "baselines_tiny.py", *given)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    folder = tmp_path_factory.mktemp("through")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        run(monkeypatch, folder, folder / "out")
    return folder / "out"


@pytest.mark.slow
def test_one_report_of_all_methods(through):
    report = json.loads((through / "retention.json").read_text())
    assert set(report["students"]) == TRAINED | {"cascade", "merge"}
    assert set(report["scores"]) == {"base", *(f"teacher/{task}" for task in report["tasks"]), *report["students"]}
    assert set(report["tasks"]) == {"compose", "letters", "style"} and report["num_images"] == 2
    for task in report["tasks"]:
        assert all(isinstance(of_model[task][task], float) for of_model in report["scores"].values())
    # Two updates are not told from none, but the merge and what starts from it are far from the base.
    style = {name: entry["retention"] for name, entry in report["tasks"]["style"]["students"].items()}
    assert min(style["merge"], style["merge-opd"]) > 0.5 > style["opd"]


@pytest.mark.slow
def test_each_method_is_what_its_arguments_make_it(through):
    trained = {name: weights(through / name) for name in sorted(TRAINED)}
    names = list(trained)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not same(trained[one], trained[other]), (one, other)
    records = {path.parent.name: json.loads(path.read_text()) for path in through.glob("*/stage.json")}
    begun = {name for name, record in records.items() if record["student_init"] is not None}
    assert begun == {"cascade-letters", "cascade-style"}
    assert all(any(bool(p.any()) for name, p in of.items() if "lora_B" in name) for of in trained.values())


class Killed(BaseException):
    """Not an error: nothing handles it."""


@pytest.mark.slow
def test_after_a_kill_it_goes_on_to_the_same(through, tmp_path, monkeypatch, capsys):
    from trl_diffusion_opd import DiffusionGRPOTrainer

    updates, killed = [], 4  # in the second stage of the cascade, after its first checkpoint
    step = DiffusionGRPOTrainer.training_step

    def counted(self, *args, **kwargs):
        updates.append(Path(self.args.output_dir).name)
        if len(updates) == killed:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionGRPOTrainer, "training_step", counted)
    with pytest.raises(Killed):
        run(monkeypatch, tmp_path, tmp_path / "out", "--methods", "merge", "cascade")
    assert not (tmp_path / "out" / "retention.json").exists()
    run(monkeypatch, tmp_path, tmp_path / "out", "--methods", "merge", "cascade")
    assert updates == ["cascade-compose"] * 2 + ["cascade-letters"] * 3 + ["cascade-style"] * 2
    assert same(weights(tmp_path / "out" / "cascade-style"), weights(through / "cascade-style"))
    whole, ours = (json.loads((folder / "retention.json").read_text()) for folder in (through, tmp_path / "out"))
    assert list(ours["students"]) == ["merge", "cascade"]  # in the order in which they are named
    assert ours["scores"] == {name: whole["scores"][name] for name in ours["scores"]}
    shown = capsys.readouterr().out
    assert "The merge lost 0.0% of the teachers' mean update." in shown and "| cascade " in shown


def test_wrong_arguments_are_told_at_once(tmp_path, monkeypatch, capsys):
    told = (
        "there is no method 'ppo'; there are opd, multi-task, merge-opd, off-policy,",
        "num_test_images=0: it must be at least 1.",
    )
    with command_refuses(capsys, *told):
        run(monkeypatch, tmp_path, tmp_path / "out", "--methods", "ppo", "merge", "--num_test_images", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: path.stem)
def test_the_stage_files_are_valid(path):
    found, output_dir = stages.read_stages(path)  # refuses what a config or a trainer does not take
    assert found and output_dir.startswith("outputs/")
    for stage in found:
        assert all(Path(source.partition("=")[2]).exists() for source in stage.settings["prompts"])
        assert Path(stage.settings["model_name_or_path"]).is_dir()
    assert {"tiny_baselines", "tiny_cascade", "tiny_two_stage"} <= {each.stem for each in STAGE_FILES}
