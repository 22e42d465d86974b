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

"""The launch configurations of the examples are what accelerate takes, to the point that a CPU allows."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers.opd_fixtures import make_config, make_teachers, make_trainer
from helpers.tiny_sd3 import make_transformer

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.checkpointing.checkpoint import deepspeed_problems
from trl_diffusion_opd.trainer.checks import launch_problems


FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
KINDS = {
    "cpu": "NO",
    "single_gpu": "NO",
    "multi_gpu": "MULTI_GPU",
    "multi_node": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
}


def launch_arguments(name, *options):
    """What `accelerate launch` makes of the file, after its own checks."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    path = FOLDER / f"{name}.yaml"
    text, config = path.read_text(), load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == KINDS[name]
    assert text.startswith("# ")
    arguments = launch_arguments(name)
    assert arguments.num_processes == yaml.safe_load(text)["num_processes"] == config.num_processes
    # Settings within a section are not checked when the file is read: each must be an option of the launcher.
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in yaml.safe_load(text).get(section, {}).items():
            assert key in vars(launch_command_parser().parse_args(["script.py"])), key
            assert vars(arguments)[key] == value


def test_fsdp2_settings(monkeypatch):
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    for key, value in environment.items():
        if "FSDP" in key:
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_settings(stage, monkeypatch):
    arguments = launch_arguments(f"deepspeed_zero{stage}")
    arguments.deepspeed_fields_from_accelerate_config = ""  # which of them conflict with a file of DeepSpeed's own
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for key in set(environment) - set(os.environ):
        if "DEEPSPEED" in key:
            monkeypatch.setenv(key, environment[key])
    plugin = DeepSpeedPlugin()
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == plugin.zero_stage == stage
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
    # "auto" there would be read from a language model's hidden_size.
    assert "reduce_bucket_size" not in zero and "stage3_prefetch_bucket_size" not in zero


def test_several_machines_know_their_places():
    arguments = launch_arguments("multi_node", "--machine_rank", "1", "--main_process_ip", "10.1.2.3")
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.machine_rank == 1 and arguments.nnodes == "2" and arguments.nproc_per_node == "8"
    assert arguments.node_rank == 1 and arguments.rdzv_endpoint == "10.1.2.3:29500"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def refusal(tmp_path, **options):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, "base", gradient_accumulation_steps=3, **options)
    assert "- gradient_accumulation_steps=3 is not a multiple" in str(error.value)  # all is told at once
    return str(error.value)


@pytest.fixture
def launched(monkeypatch):
    """Two processes, as far as the arguments know, with the environment of a launcher."""

    def launch(**environment):
        monkeypatch.setattr(DiffusionOPDConfig, "world_size", 2)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


def test_what_fsdp_can_not_do_is_refused(tmp_path, launched, monkeypatch):
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    message = refusal(tmp_path, torch_compile=True)
    assert "- torch_compile=True is not supported with FSDP: leave it out." in message
    assert "- FSDP version 1 is not supported. Set fsdp_version: 2 in its settings." in message
    buffer = "pos_embed.pos_embed"
    assert f"loading: true fails on SD3Transformer2DModel, which saves a buffer ({buffer})" in message
    launched(FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    assert refusal(tmp_path).count("\n- ") == 1
    # On one process it is no matter.
    launched(FSDP_VERSION="1")
    monkeypatch.setattr(DiffusionOPDConfig, "world_size", 1)
    assert refusal(tmp_path).count("\n- ") == 1


def test_fsdp_of_the_arguments_is_checked_as_well(tmp_path, launched):
    launched()
    assert "- FSDP version 1 is not" in refusal(tmp_path, fsdp=True, fsdp_config={"version": 1})
    assert "FSDP version" not in refusal(tmp_path, fsdp=True, fsdp_config={"version": 2})


def test_torch_compile_is_refused_with_deepspeed(tmp_path):
    args = make_config(tmp_path, torch_compile=True)
    assert launch_problems(make_transformer(), args) == []
    # What the arguments make under its launcher. Made here, it would be transformers' for all tests to come.
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"fp16": {"enabled": False}})
    (problem,) = launch_problems(make_transformer(), args)
    assert problem == "torch_compile=True is not supported with DeepSpeed: leave it out."


def test_fp16_is_refused_with_deepspeed(tmp_path):
    args = make_config(tmp_path)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"fp16": {"enabled": True}})
    (problem,) = launch_problems(make_transformer(), args)
    assert problem.startswith("fp16 is not supported with DeepSpeed")
    args.deepspeed_plugin.deepspeed_config = {}
    assert launch_problems(make_transformer(), args) == []


def test_deepspeed_resumes_its_own_checkpoints_on_as_many_processes(tmp_path):
    (problem,) = deepspeed_problems(tmp_path, 2, stage=2)
    assert problem.startswith("it has no optimizer of DeepSpeed's")
    (tmp_path / "global_step2").mkdir()
    for rank in (0, 1):
        (tmp_path / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert deepspeed_problems(tmp_path, 2, stage=2) == []
    (problem,) = deepspeed_problems(tmp_path, 4, stage=2)
    assert problem == (
        "it was saved by 2 processes under DeepSpeed, but this run has 4. DeepSpeed's checkpoints need the same number of "
        "processes."
    )
    (problem,) = deepspeed_problems(tmp_path, 2, stage=3)
    assert problem.startswith("it was not saved under ZeRO-3, which this run has")
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    assert deepspeed_problems(tmp_path, 2, stage=3) == []
    (problem,) = deepspeed_problems(tmp_path, 2, stage=1)
    assert problem.startswith("it was saved under ZeRO-3, which this run does not have")


class Engine:
    """What accelerate calls of DeepSpeed's engine, counted."""

    def __init__(self):
        self.backwards = self.steps = 0

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.boundary = is_boundary

    def backward(self, loss, **options):
        self.backwards += 1
        loss.backward()

    def step(self):
        assert self.boundary
        self.steps += 1

    def get_global_grad_norm(self):
        return None


def test_deepspeed_steps_once_an_update(tmp_path):
    trainer = make_trainer(tmp_path, make_teachers(tmp_path), gradient_accumulation_steps=4, max_steps=2)
    engine, accelerator = Engine(), trainer.accelerator
    wrapper = DeepSpeedEngineWrapper(engine)
    accelerator.backward = lambda loss: wrapper.backward(loss, sync_gradients=accelerator.sync_gradients)
    trainer.train()
    assert (engine.backwards, engine.steps) == (2 * 4 * 3, 2)
