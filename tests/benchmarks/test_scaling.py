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

"""The page about scaling: its formulas against PyTorch's own collectives and counts on paper, its tables against the JSON."""

import json
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_sd3 import make_transformer
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from trl_diffusion_opd import DiffusionOPDConfig
from trl_diffusion_opd.algorithms.samplers import default_skip_last_steps
from trl_diffusion_opd.models.student import default_lora_config


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402
import scaling_formulas as paper  # noqa: E402
import scaling_shapes as shapes  # noqa: E402


RESULT = json.loads((ROOT / "docs" / "source" / "results" / "scaling.json").read_text())
# What FSDP2 calls, by names of PyTorch 2.13 or of versions before it.
GATHER, SCATTER = (
    ("all_gather_single", "reduce_scatter_single")
    if "all_gather_single" in dir(torch.distributed)
    else ("all_gather_into_tensor", "reduce_scatter_tensor")
)
PAGE = (ROOT / "docs" / "source" / "scaling.md").read_text()
# Parameters of the released transformers, in billions.
RELEASED = {"SD3.5-M": 2.243, "FLUX.1-dev": 11.901, "Qwen-Image": 20.430}


# The counts


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes.MODELS)
def test_networks_are_the_released_ones(name):
    released = shapes.MODELS[name]
    model, base = shapes.network(released)
    found = shapes.parameters(model, base)
    assert found["base"] / 1e9 == pytest.approx(RELEASED[name], abs=5e-4)
    assert found == RESULT["models"][name]["parameters"]
    # FSDP2 splits the blocks that the network names, which are those that are counted.
    lists = [module for module in base.children() if isinstance(module, torch.nn.ModuleList)]
    assert {type(block).__name__ for blocks in lists for block in blocks} == set(base._no_split_modules)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_an_update_is_the_trainers():
    fields = DiffusionOPDConfig.__dataclass_fields__
    steps, sampler = fields["num_inference_steps"].default, fields["sampler"].default
    assert steps - default_skip_last_steps(sampler) == paper.STEPS


def test_flops_are_those_on_paper():
    """A small SD3: n image and m text tokens of width d, two layers of which the last has no text output."""
    side, m, layers, patch, channels, joint, pooled = 16, 7, 2, 2, 4, 16, 16
    with torch.device("meta"):
        base = make_transformer(num_layers=layers).requires_grad_(False)
        model = get_peft_model(base, default_lora_config(base))
    d, n, r = base.inner_dim, (side // patch) ** 2, 32
    inputs = {
        "hidden_states": torch.empty(1, channels, side, side, device="meta"),
        "encoder_hidden_states": torch.empty(1, m, joint, device="meta"),
        "pooled_projections": torch.empty(1, pooled, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    found = shapes.flops(model, base, inputs)

    linear, lora = 2 * d * d, 2 * r * 2 * d  # of a token, in a layer from d to d
    attention = 2 * 2 * (n + m) ** 2 * d
    modulation = linear * (6 + 6) + linear * (6 + 2)  # of both streams; the last text stream has scale and shift alone
    blocks = layers * (attention + n * (4 + 8) * linear) + m * ((3 * layers + 1 + 8) * linear) + modulation
    blocks += lora * (layers * n * 4 + m * (3 * layers + 1))
    timestep, text = 2 * 256 * d + linear, 2 * pooled * d + linear
    patches, output = 2 * n * patch**2 * channels * d, 2 * n * d * patch**2 * channels
    outside = patches + 2 * m * joint * d + timestep + text + 2 * linear + output
    assert found["forward"] == blocks + outside
    assert found["recompute"] == blocks

    # Backward: the gradients of inputs, which the first layer's projections don't need, and of the LoRA's two factors.
    projections = (n + m) * 3 * linear * (layers - 1) + (n * layers + m) * linear
    mlps = n * 8 * linear * layers + m * 8 * linear
    of_lora = 2 * lora * (layers * n * 4 + m * (3 * layers + 1)) - (n + m) * 3 * (lora // 2)
    assert found["backward"] == projections + mlps + 2 * layers * attention + of_lora + output


@pytest.mark.parametrize("kind", ["plain", "checkpointing"])
def test_activations_are_linear_in_the_batch(kind):
    for counted in RESULT["models"].values():
        for side, sizes in counted["activations"].items():
            line = paper.activations(counted, int(side), 4, kind == "checkpointing")
            assert line == pytest.approx(sizes[kind]["4"], rel=0.01)


# Communication, against what PyTorch hands over


@pytest.fixture
def eight():
    """The first of eight processes, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


class Moved(Counter):
    """Bytes of whole tensors by collective."""

    def watch(self, monkeypatch, name, position):
        function = getattr(dist, name)

        def counted(*args, **kwargs):
            tensor = args[position] if len(args) > position else list(kwargs.values())[position]
            self[name] += sum(t.nbytes for t in tensor) if isinstance(tensor, list) else tensor.nbytes
            return function(*args, **kwargs)

        monkeypatch.setattr(dist, name, counted)


def tiny(checkpointing=False):
    """A tiny SD3 in bfloat16 with a student and teachers, what is counted of it, and inputs of two rows."""
    base = make_transformer(num_layers=3).to(torch.bfloat16).requires_grad_(False)
    lora = default_lora_config(base)
    model = get_peft_model(base, lora)
    counted = {"parameters": shapes.parameters(model, base), "rows": 2, "calls": 1}
    for i in range(paper.TEACHERS):
        model.add_adapter(f"teacher{i}", lora, autocast_adapter_dtype=False)
    trained = {id(p) for name, p in model.named_parameters() if "default" in name}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    if checkpointing:
        base.enable_gradient_checkpointing()
    inputs = {
        "hidden_states": torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.zeros(2, 5, 16, dtype=torch.bfloat16),
        "pooled_projections": torch.zeros(2, 16, dtype=torch.bfloat16),
        "timestep": torch.ones(2),
    }
    return model, base, counted, inputs


def split(model, base, shape, reshard=True):
    """As accelerate does it: block by block, and what is left."""
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in base.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def trained_step(model, inputs, calls=1):
    """A teacher's forward, the student's, and its backward."""

    def velocity():
        # Autocast is around each forward, as in training. PyTorch 2.10 keeps a weight that was cast without gradients until
        # it ends: a student's forward in the same one would have none.
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)[0].float()

    with torch.no_grad():
        for _ in range(calls):
            velocity()
    sum(velocity().sum() for _ in range(calls)).backward()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_bytes_that_fsdp_gathers(shape, reshard, checkpointing, eight, monkeypatch):
    model, base, counted, inputs = tiny(checkpointing)
    split(model, base, shape, reshard)
    moved = Moved()
    moved.watch(monkeypatch, GATHER, 0)
    model.set_requires_gradient_sync(False)
    for _ in range(2):
        moved.clear()
        trained_step(model, inputs)
        root = paper.BF16 * (counted["parameters"]["base"] - counted["parameters"]["blocks"])  # once a step
        # Where 8 processes don't divide a first dimension, it is padded.
        exact = paper.gathers({**counted, "calls": 1}, reshard) * paper.gathered_bytes(counted) + root
        assert exact <= moved[GATHER] < 1.01 * exact


@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_that_fsdp_gathers_where_guidance_takes_two_calls(reshard, eight, monkeypatch):
    model, base, counted, inputs = tiny()
    shared = sum(p.nbytes for p in base.transformer_blocks[0].parameters())
    split(model, base, (8,), reshard)
    moved = Moved()
    moved.watch(monkeypatch, GATHER, 0)
    trained_step(model, inputs, calls=2)
    # The two calls' backwards meet at the first block, which is gathered once less.
    root = paper.BF16 * (counted["parameters"]["base"] - counted["parameters"]["blocks"])
    times = 6 if reshard else 2
    exact = times * paper.gathered_bytes(counted) - shared + root
    assert exact <= moved[GATHER] < 1.01 * exact
    guided = sum(paper.GUIDED) / paper.TASKS
    expected = guided * times + (1 - guided) * (5 if reshard else 2)
    assert paper.gathers({**counted, "calls": 2}, reshard) == pytest.approx(expected)


def groups_of(state):
    """PyTorch has had several groups of parameters in a state since 2.11 or later; before it is one, or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def test_fsdp_reduces_once_and_keeps_whole_gradients_until_then(eight, monkeypatch):
    model, base, counted, inputs = tiny()
    split(model, base, (2, 4))
    moved = Moved()
    for name in (SCATTER, "all_reduce"):
        moved.watch(monkeypatch, name, 1 if name == SCATTER else 0)
    model.set_requires_gradient_sync(False)
    trained_step(model, inputs)
    assert not moved
    states = [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    parameters = [p for state in states for group in groups_of(state) for p in group.fsdp_params]
    lora = paper.FP32 * counted["parameters"]["lora"]
    kept = [p.unsharded_accumulated_grad_data if p.unsharded_accumulated_grad is not None else p._unsharded_param.grad
            for p in parameters if p.sharded_param.requires_grad]  # fmt: skip
    assert sum(g.nbytes for g in kept) == lora
    model.set_requires_gradient_sync(True)
    trained_step(model, inputs)
    assert moved[SCATTER] == lora
    assert moved["all_reduce"] == lora // 4  # the replicas add their quarters


def test_bytes_that_ddp_moves_in_an_update(eight, monkeypatch):
    model, base, counted, inputs = tiny()
    moved = Moved()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)  # as the trainer has it
    moved.watch(monkeypatch, "_broadcast_coalesced", 1)

    def hook(group, bucket):
        moved["reduced"] += bucket.buffer().nbytes
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, hook)
    for _ in range(2):
        moved.clear()
        for step in range(paper.STEPS):
            with wrapped.no_sync() if step < paper.STEPS - 1 else nullcontext():
                trained_step(wrapped, inputs)
    assert paper.ddp_bytes(counted, 8) == 2 * 7 / 8 * moved["reduced"]
    assert moved["_broadcast_coalesced"] == 0


# The formulas


COUNTED = {
    "parameters": {"base": 100, "blocks": 80, "number_of_blocks": 4, "largest_block": 30, "lora": 8, "buffers": 5},
    "rows": 1,
    "calls": 2,
    "activations": {"512": {"plain": {"1": 70, "4": 190, "8": 350}, "checkpointing": {"1": 7, "4": 19, "8": 35}}},
    "flops": {"512": {"forward": 10, "backward": 12, "recompute": 9}},
}


def test_memory():
    ddp = paper.memory(COUNTED, 512, paper.Layout(8, 1, False, 3, 1))
    assert ddp == {
        "base": 200,
        "buffers": 10,
        "adapters": 4 * 8 + 3 * 2 * 8,
        "gradients": 4 * 8 + 4 * 8,
        "optimizer": 8 * 8,
        "moving average": 4 * 8,
        "activations": 150,
    }
    fsdp = paper.memory(COUNTED, 512, paper.Layout(8, 8, True, 1, 1))
    assert fsdp["base"] == 25 and fsdp["optimizer"] == 8 and fsdp["gradients"] == 4 * 8 + 4
    assert fsdp["gathered"] == 2 * 20 + 2 * (60 + 80 / 4)


def test_operations_of_a_sample():
    # Two guided teachers of two rows and one of one; the student has two rows.
    step = (2 * 2 + 1) / 3 * 10 + 2 * (10 + 12)
    assert paper.sample_flops(COUNTED, 512, False) == pytest.approx(9 * step)
    assert paper.sample_flops(COUNTED, 512, True) == pytest.approx(9 * (step + 2 * 9))
    assert paper.sample_flops(COUNTED, 512, False, passes=3) == pytest.approx(9 * (step + 2 * 10))
    layout = paper.Layout(8, 1, False, 3, 1)
    assert layout.samples == 72
    seconds = paper.compute_seconds(COUNTED, 512, layout, 0.5)
    assert seconds == pytest.approx(72 * 9 * step / (8 * 0.5 * 989e12))


def test_one_pass_against_three_has_the_bound():
    """With equal guidance, (3 + b) / (2 + b)."""
    counted = {**COUNTED, "calls": 1}
    ratio = paper.sample_flops(counted, 512, False, passes=3) / paper.sample_flops(counted, 512, False)
    assert ratio == pytest.approx((3 + 1.2) / (2 + 1.2))


def test_communication_is_hidden_from_the_batch_that_is_named():
    for name, counted in RESULT["models"].items():
        for side in map(int, counted["flops"]):
            batch = paper.hiding_batch(counted, side, 8, 0.45)
            reduction = paper.exposed_seconds(counted, side, paper.Layout(8, 8, False, 1000, 1), 0.45)
            for size, hidden in ((batch, True), (batch - 1, False)):
                exposed = paper.exposed_seconds(counted, side, paper.Layout(8, 8, False, size, 1), 0.45)
                assert (exposed == pytest.approx(reduction)) == hidden, name


# The page


def test_the_result_is_what_the_formulas_give():
    assert json.loads(json.dumps(scaling.compute(RESULT["models"]))) == RESULT


def test_the_page_has_the_results_tables():
    found = scaling.tables(RESULT)
    assert scaling.with_tables(PAGE, found) == PAGE
    assert all(text in PAGE for text in found.values())
