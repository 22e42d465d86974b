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

"""Compiled blocks: the same training, and no compilation once every kind of forward has been seen."""

import threading

import pytest
import torch
from helpers.opd_fixtures import make_teachers, make_trainer, snapshot, train_losses
from helpers.tiny_sd3 import ATTENTION, make_pipeline
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.acceleration import compilation
from trl_diffusion_opd.acceleration.compilation import compile_blocks
from trl_diffusion_opd.models.adapter_switch import AdapterSwitch


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class CountGraphs(TrainerCallback):
    """Graphs compiled by the end of every update."""

    def __init__(self) -> None:
        self.start, self.seen = graphs(), []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(graphs() - self.start)


def sixteen_teachers(folder, ranks=(4,)) -> dict[str, list[TeacherConfig]]:
    """LoRAs of random weights, half for each task."""
    paths = []
    for i in range(16):
        torch.manual_seed(i)
        r = ranks[i % len(ranks)]
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=ATTENTION, init_lora_weights=False)
        model = get_peft_model(make_pipeline().transformer, config)
        model.save_pretrained(str(folder / str(i)))
        paths.append(TeacherConfig(str(folder / str(i))))
    return {"count": paths[:8], "draw": paths[8:]}


def compiled_updates(tmp_path, teachers, **options) -> tuple[list[int], list[float]]:
    count = CountGraphs()
    trainer = make_trainer(
        tmp_path,
        teachers,
        torch_compile=True,
        torch_compile_backend="eager",
        callbacks=[count],
        max_steps=3,
        **options,
    )
    trainer.train()
    return count.seen, train_losses(trainer)


class TestCompilation:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_sixteen_teachers_compile_as_one_and_in_the_first_update(self, tmp_path, checkpointing):
        teachers = sixteen_teachers(tmp_path)
        options = dict(gradient_checkpointing=checkpointing, beta=0.1, num_trained_timesteps=2)
        seen, losses = compiled_updates(tmp_path / "sixteen", teachers, **options)
        assert seen[0] > 0 and seen == [seen[0]] * 3
        torch._dynamo.reset()
        two = {task: configs[:1] for task, configs in teachers.items()}
        assert compiled_updates(tmp_path / "two", two, **options)[0] == seen
        plain = make_trainer(tmp_path / "plain", teachers, max_steps=3, **options)
        plain.train()
        assert losses == pytest.approx(train_losses(plain), rel=1e-5)

    def test_another_rank_adds_its_own(self, tmp_path):
        one = compiled_updates(tmp_path / "one", sixteen_teachers(tmp_path / "equal"))[0]
        torch._dynamo.reset()
        two = compiled_updates(tmp_path / "two", sixteen_teachers(tmp_path / "mixed", ranks=(2, 4, 8, 16)))[0]
        assert (
            two == [two[0]] * 3 and one[0] < two[0] <= one[0] + 3 * 2
        )  # of every other rank, inner blocks and the last

    def test_full_weights_with_full_and_lora_teachers(self, tmp_path):
        make_pipeline(seed=3).save_pretrained(tmp_path / "full")
        teachers = {"count": str(tmp_path / "full"), "draw": make_teachers(tmp_path)["draw"]}
        options = dict(peft_config=None)
        seen, losses = compiled_updates(tmp_path / "compiled", teachers, **options)
        assert seen == [seen[0]] * 3
        plain = make_trainer(tmp_path / "plain", teachers, max_steps=3, **options)
        plain.train()
        assert losses == pytest.approx(train_losses(plain), rel=1e-5)

    def test_saved_student_is_the_plain_ones(self, tmp_path):
        teachers = make_teachers(tmp_path)
        compiled = make_trainer(tmp_path / "a", teachers, torch_compile_backend="eager", max_steps=2)
        plain = make_trainer(tmp_path / "b", teachers, max_steps=2)
        for trainer in (compiled, plain):
            trainer.train()
            trainer.save_model()
        ours, theirs = snapshot(compiled), snapshot(plain)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
        files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"]
        assert files[0] == files[1]
        assert not [name for name in compiled.model.state_dict() if "_orig_mod" in name]

    def test_nothing_to_compile_is_refused(self):
        with pytest.raises(ValueError, match="no list of equal blocks"):
            compile_blocks(nn.Sequential(nn.Linear(2, 2)))

    def test_nothing_to_compile_is_told_with_all_else(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compilation, "is_repeated_blocks", lambda module: False)
        with pytest.raises(ValueError) as error:
            make_trainer(tmp_path, "base", torch_compile=True, gradient_accumulation_steps=3)
        assert "- torch_compile: SD3Transformer2DModel has no list of equal blocks to compile." in str(error.value)
        assert "- gradient_accumulation_steps=3 is not a multiple" in str(error.value)


class TestSharedName:
    def test_layers_that_an_adapter_leaves_alone(self):
        torch.manual_seed(0)
        x = torch.randn(3, 4)
        layers = {"all": ["0", "1"], "one": ["1"]}
        model = get_peft_model(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            LoraConfig(r=2, target_modules=layers["all"], init_lora_weights=False),
        )
        for name, targets in layers.items():
            config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False)
            model.add_adapter(name, config)
        switch, shared = AdapterSwitch(model, "default"), AdapterSwitch(model, "default")
        shared.share_name()
        for name in ("all", "one", "all", "default", None, "one"):
            with switch.use(name):
                expected = model(x)
            with shared.use(name):
                assert torch.equal(model(x), expected)
        assert shared.active == "default"


class Named(nn.Module):
    """A block of which every name needs a graph of its own."""

    name = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.name == "one" else x + len(self.name)


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_blocks_have_our_limit_of_graphs_with_any_torch(in_a_thread):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    network = nn.Module()
    network.blocks = nn.ModuleList([Named(), Named()])
    compile_blocks(network, backend=backend)
    x, kinds = torch.zeros(2), 2 * torch._dynamo.config.recompile_limit
    assert kinds < compilation.RECOMPILE_LIMIT

    def call():
        for i in range(kinds):
            network.blocks[0].name = "n" * (i + 5)
            assert network.blocks[0](x).tolist() == [i + 5] * 2

    if in_a_thread:  # where autograd's backward runs the forward again
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert len(seen) == kinds
