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

"""Every method under DeepSpeed gives what one process gives, and goes on from its checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import SD3Transformer2DModel
from helpers.launching import free_port
from helpers.opd_fixtures import logged, relative_difference
from helpers.split_runs import UPDATES, state_of, trained_alone
from helpers.two_processes import reports_in, weights_in
from safetensors.torch import load_file


TESTS = Path(__file__).parents[1]
CONFIGS = TESTS.parent / "examples" / "accelerate_configs"
# ZeRO-2 leaves the weights whole: what is read of them is what DDP has.
RUNS = {2: ("opd", "full", "half"), 3: ("opd", "full", "half", "sft", "grpo", "nft", "nft_full")}


def launch(stage: int, folder: Path) -> None:
    """Trains on two processes with the example's settings, but for their number and precision."""
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += ["--config_file", str(CONFIGS / f"deepspeed_zero{stage}.yaml")]
    command += [str(TESTS / "distributed" / "train_deepspeed.py"), str(folder), *RUNS[stage]]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-20000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory, teachers, processes):
    """The folder and the reports of two processes, by the stage of ZeRO, each trained when it is first asked for."""
    trained = {}

    def run(stage):
        if stage not in trained:
            folder = tmp_path_factory.mktemp(f"zero{stage}")
            (folder / "scenario.json").write_text(json.dumps(teachers))
            launch(stage, folder)
            trained[stage] = folder, reports_in(folder)
        return trained[stage]

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teachers):
    return trained_alone(tmp_path_factory.mktemp("alone"), teachers)


EXACT = [(stage, name) for stage, names in RUNS.items() for name in names if name != "half"]


@pytest.mark.parametrize(("stage", "name"), EXACT)
def test_two_processes_give_what_one_gives(stage, name, two, alone):
    folder, reports = two(stage)
    trainer = alone(name)
    for metric in ("loss", "grad_norm"):
        theirs = logged(trainer.state.log_history, metric)
        assert len(theirs) == UPDATES
        assert logged(reports[0][name]["log"], metric) == pytest.approx(theirs, rel=1e-5), metric
    weights = weights_in(folder, name)
    assert relative_difference(weights[0], state_of(trainer)) < 1e-5
    assert relative_difference(weights[1], weights[0]) == 0


@pytest.mark.parametrize("stage", RUNS)
def test_it_is_deepspeed_that_trained(stage, two):
    for report in two(stage)[1]:
        assert report.pop("unset") == [2, 1]  # one micro-batch a task
        for run in report.values():
            assert run["kind"] == "DistributedType.DEEPSPEED"
            assert run["split"] and all(is_split == (stage == 3) for is_split in run["split"])
            assert run["steps"] == UPDATES  # many backwards, one step of the optimizer


@pytest.mark.parametrize("stage", RUNS)
def test_precision_is_that_of_one_process(stage, two, alone):
    # DeepSpeed's own would round a LoRA's weights to bfloat16.
    for report in two(stage)[1]:
        assert report["half"]["dtypes"] == ["torch.float32"]
    trainer = alone("half")
    theirs = logged(trainer.state.log_history, "loss")
    assert logged(two(stage)[1][0]["half"]["log"], "loss") == pytest.approx(theirs, rel=1e-3)
    weights = load_file(two(stage)[0] / "half_0.safetensors")
    # Adam's first steps are the gradients' signs, which rounding turns.
    assert relative_difference(weights, state_of(trainer)) < 1e-2


@pytest.mark.parametrize("stage", RUNS)
def test_the_average_is_saved_alone_and_whole(stage, two, alone):
    folder, _ = two(stage)
    trainer = alone("opd")
    trainer.save_model()
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        ours, theirs = load_file(folder / "saved" / "opd" / file), load_file(Path(trainer.args.output_dir) / file)
        assert relative_difference(ours, theirs) < 1e-5
    full = SD3Transformer2DModel.from_pretrained(folder / "saved" / "full")
    trainer = alone("full")
    with trainer.student.ema_weights():
        theirs = {name: p.detach().clone() for name, p in trainer.student.named_parameters().items()}
    assert relative_difference({name: p.detach() for name, p in full.named_parameters()}, theirs) < 1e-5


@pytest.mark.parametrize("stage", RUNS)
def test_checkpoints_have_no_base(stage, two, alone):
    folder = two(stage)[0] / "of_two" / "opd"
    model = alone("opd").model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters()) > 5 * trained
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")}
    assert sizes and all(size < 3 * 4 * trained + 100_000 for size in sizes.values()), sizes
