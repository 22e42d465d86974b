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

"""LoRA pairs for a base with two experts: which files are a pair, what is refused, and what is read of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES
from helpers.families_experts import WAN_2_2, save_pair
from helpers.loopback_hub import LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.expert_teachers import find_for_any_base, find_teacher, noise_of, read_lora
from trl_diffusion_opd.models.lora_adapter import add_adapter
from trl_diffusion_opd.models.lora_config import for_experts
from trl_diffusion_opd.models.teacher_config import TeacherConfig, TeacherError, parse_teacher
from trl_diffusion_opd.models.teachers import TeacherBank
from trl_diffusion_opd.pipelines.denoiser import denoiser
from trl_diffusion_opd.pipelines.experts import EXPERTS, HIGH_NOISE, LOW_NOISE


HIGH, LOW = "x_high_noise.safetensors", "x_low_noise.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return WAN_2_2.build()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    folder = tmp_path_factory.mktemp("pair")
    return folder, save_pair(folder, 0)


def products(model: PeftModel) -> dict[str, Tensor]:
    """What the LoRA adds to each layer's weight, in float64."""
    layers = {name: m for name, m in model.get_base_model().named_modules() if "default" in getattr(m, "scaling", {})}
    return {
        name: m.scaling["default"] * m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double()
        for name, m in layers.items()
    }


def loaded(pipeline: Any, config: TeacherConfig) -> dict[str, Tensor]:
    lora, tensors, _ = read_lora(pipeline, parse_teacher(config))
    return products(add_adapter(denoiser(WAN_2_2.build()), "default", lora, tensors))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("x_high_noise.safetensors", HIGH_NOISE),
        ("Wan2.2-HighNoise_v1.safetensors", HIGH_NOISE),
        ("high/lora.safetensors", HIGH_NOISE),
        ("low_noise_model.safetensors", LOW_NOISE),
        ("style-LOW.safetensors", LOW_NOISE),
        ("transformer_2/pytorch_lora_weights.safetensors", LOW_NOISE),
        ("transformer/pytorch_lora_weights.safetensors", HIGH_NOISE),
        ("highlands_slow.safetensors", None),
        ("high_and_low.safetensors", None),
    ],
)
def test_names_of_halves(name: str, expert: str | None) -> None:
    assert noise_of(name) == expert


def moved(folder: Path, target: Path, high: str, low: str) -> Path:
    for file, name in ((HIGH, high), (LOW, low)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / file, target / name)
    return target


@pytest.mark.parametrize(
    ("high", "low", "options"),
    [
        (HIGH, LOW, {}),
        (HIGH, LOW, {"weight_name": HIGH}),
        (HIGH, LOW, {"weight_name": HIGH, "low_noise_weight_name": LOW}),
        ("Wan-HighNoise.safetensors", "Wan-LowNoise.safetensors", {}),
        ("high_noise/a.safetensors", "low_noise/a.safetensors", {}),
        (
            "one.safetensors",
            "two.safetensors",
            {"weight_name": "one.safetensors", "low_noise_weight_name": "two.safetensors"},
        ),
        (
            "a/x.safetensors",
            "b/x.safetensors",
            {"weight_name": "a/x.safetensors", "low_noise_weight_name": "b/x.safetensors"},
        ),
    ],
)
def test_a_pair_is_read_into_its_experts(
    pipeline: Any, pair: tuple[Path, PeftModel], tmp_path: Path, high: str, low: str, options: dict[str, str]
) -> None:
    folder, model = pair
    config = TeacherConfig(str(moved(folder, tmp_path, high, low)), **options)
    ours, theirs = loaded(pipeline, config), products(model)
    assert ours.keys() == theirs.keys() and {name.split(".")[0] for name in ours} == {*EXPERTS}
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-12) for name in ours)


def test_a_file_of_a_pair_by_its_path(pipeline: Any, pair: tuple[Path, PeftModel]) -> None:
    assert loaded(pipeline, TeacherConfig(str(pair[0] / HIGH))).keys() == products(pair[1]).keys()


def test_one_expert_without_a_lora(pipeline: Any, pair: tuple[Path, PeftModel]) -> None:
    for options, expert in (
        ({"weight_name": HIGH, "low_noise_weight_name": "base"}, HIGH_NOISE),
        ({"weight_name": "base", "low_noise_weight_name": LOW}, LOW_NOISE),
    ):
        own = loaded(pipeline, TeacherConfig(str(pair[0]), **options))
        assert own and all(name.startswith(f"{expert}.") for name in own)


def test_halves_of_other_ranks_and_scalings(pipeline: Any, tmp_path: Path) -> None:
    theirs: dict[str, Tensor] = {}
    for seed, (noise, expert, rank, rslora) in enumerate(
        (("high", HIGH_NOISE, 4, True), ("low", LOW_NOISE, 2, False))
    ):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=3, use_rslora=rslora, target_modules=["attn1.to_q"], init_lora_weights=False
        )
        model = get_peft_model(WAN_2_2.build().components[expert], config)
        model.save_pretrained(tmp_path / noise)
        theirs |= {f"{expert}.{name}": product for name, product in products(model).items()}
    names = {"weight_name": "high/adapter_model.safetensors", "low_noise_weight_name": "low/adapter_model.safetensors"}
    ours = loaded(pipeline, TeacherConfig(str(tmp_path), **names))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6) for name in ours)


def only(*names: str) -> Callable[[Path, Path], None]:
    def copy(folder: Path, target: Path) -> None:
        for name in names:
            shutil.copy(folder / (LOW if "low" in name else HIGH), target / name)

    return copy


def peft_folder(folder: Path, target: Path) -> None:
    config = LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False)
    get_peft_model(WAN_2_2.build().transformer, config).save_pretrained(target)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (only(HIGH), {}, r"none is for low noise by its name.*Name both: TeacherConfig"),
        (only(), {}, "has no .safetensors files that are for high noise or low noise"),
        (
            only(HIGH),
            {"weight_name": HIGH},
            r"is half of a pair, and the half for low noise is not named \(there is no x_low",
        ),
        (only("a.safetensors"), {"weight_name": "a.safetensors"}, "the half for low noise is not named. Name both"),
        (only(LOW), {"low_noise_weight_name": LOW}, "the half for high noise is not named"),
        (only(HIGH, LOW), {"weight_name": LOW}, "weight_name='x_low_noise.safetensors' is for low noise"),
        (
            only(HIGH, LOW),
            {"weight_name": LOW, "low_noise_weight_name": HIGH},
            "weight_name='x_low_noise.safetensors' is for low noise",
        ),
        (only(HIGH, LOW, "y_high.safetensors"), {}, "has several files for one expert"),
        (peft_folder, {}, "adapter_model.safetensors is a LoRA of one network"),
    ],
)
def test_half_of_a_pair_is_refused(
    pipeline: Any,
    pair: tuple[Path, PeftModel],
    tmp_path: Path,
    files: Callable[[Path, Path], None],
    options: dict[str, str],
    message: str,
) -> None:
    files(pair[0], tmp_path)
    with pytest.raises(TeacherError, match=message):
        read_lora(pipeline, parse_teacher(TeacherConfig(str(tmp_path), **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_name": HIGH, "low_noise_weight_name": HIGH}, "for both experts"),
        ({"weight_name": "base"}, "only .safetensors files are read"),
        ({"weight_name": HIGH, "low_noise_weight_name": "x.bin"}, "low_noise_weight_name .*only .safetensors"),
        ({"weight_name": HIGH, "low_noise_weight_name": "../x.safetensors"}, "low_noise_weight_name of teacher"),
    ],
)
def test_names_that_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig("folder", **options)


def test_a_base_of_one_network_takes_no_pair(pair: tuple[Path, PeftModel]) -> None:
    wan = FAMILIES["wan"].build()
    with pytest.raises(TeacherError, match="this base has one transformer"):
        find_teacher(TeacherConfig(str(pair[0]), weight_name=HIGH, low_noise_weight_name=LOW), wan)
    assert find_teacher(TeacherConfig(str(pair[0]), weight_name=HIGH), wan).other is None


def test_the_hash_is_of_both_files(pipeline: Any, pair: tuple[Path, PeftModel], tmp_path: Path) -> None:
    found = find_teacher(TeacherConfig(str(pair[0])), pipeline)
    changed = moved(pair[0], tmp_path, HIGH, LOW)
    tensors = load_file(changed / LOW)
    save_file({name: 2 * value for name, value in tensors.items()}, changed / LOW)
    assert find_teacher(TeacherConfig(str(changed)), pipeline).sha256() != found.sha256()
    exchanged = replace(found, names=found.other.names, other=replace(found.other, names=found.names))
    assert exchanged.sha256() != found.sha256()
    assert find_for_any_base(TeacherConfig(str(pair[0]))).sha256() == found.sha256()


def test_a_whole_pipeline_teaches_both_experts(tmp_path: Path) -> None:
    pipeline, teacher = WAN_2_2.build(), WAN_2_2.build()
    for name in EXPERTS:
        with torch.no_grad():
            teacher.components[name].proj_out.weight *= 1.5
        teacher.components[name].save_pretrained(tmp_path / name)
    teacher.save_config(tmp_path)
    configs = {"one": [TeacherConfig(str(tmp_path))]}
    bank = TeacherBank(Backbone(denoiser(pipeline)), pipeline, configs, 1.0)
    with bank.use(bank.teachers["one"][0]) as network:
        for name in EXPERTS:
            assert torch.equal(network.of(name).proj_out.weight, teacher.components[name].proj_out.weight)
    shutil.rmtree(tmp_path / LOW_NOISE)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors"):
        TeacherBank(Backbone(denoiser(WAN_2_2.build())), pipeline, configs, 1.0)
    with pytest.raises(ValueError, match="is one transformer, and this base has two experts"):
        alone = {"one": [TeacherConfig(str(tmp_path / HIGH_NOISE))]}
        TeacherBank(Backbone(denoiser(WAN_2_2.build())), pipeline, alone, 1.0)


@pytest.mark.parametrize(
    "targets",
    [r"blocks\.\d+\.attn1\.to_q", ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"], ["attn1.to_q"]],
)
def test_targets_name_layers_of_one_transformer(targets: Any) -> None:
    config = for_experts(LoraConfig(r=2, target_modules=targets, rank_pattern={r"^blocks\.0\.attn1\.to_q": 3}))
    model = get_peft_model(denoiser(WAN_2_2.build()), config)
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    layers = {
        f"base_model.model.{e}.blocks.{i}.attn1.to_q.lora_A.default.weight": 3 - i for e in EXPERTS for i in (0, 1)
    }
    assert ranks == layers


def save_lokr(path: Path, seed: int) -> Tensor:
    """A LoKr of one layer, in LyCORIS's layout. Returns the change of its weight."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(4, 4, generator=generator), torch.randn(6, 6, generator=generator)
    save_file({"lycoris_blocks_0_attn1_to_q.lokr_w1": w1, "lycoris_blocks_0_attn1_to_q.lokr_w2": w2}, path)
    return 0.5 * torch.kron(w1.double(), w2.double())  # at half its strength


def test_a_pair_of_lokr_is_folded_into_both(pair: tuple[Path, PeftModel], tmp_path: Path) -> None:
    changes = {
        e: save_lokr(tmp_path / name, seed) for seed, (e, name) in enumerate(zip(EXPERTS, (HIGH, LOW), strict=True))
    }
    pipeline, plain = WAN_2_2.build(), WAN_2_2.build()
    configs = {"one": [TeacherConfig(str(tmp_path), lora_scale=0.5)]}
    bank = TeacherBank(Backbone(denoiser(pipeline)), pipeline, configs, 1.0)
    with bank.use(bank.teachers["one"][0]) as network:
        for expert, change in changes.items():
            name = "blocks.0.attn1.to_q"
            old = plain.components[expert].get_submodule(name).weight.double()
            new = network.of(expert).get_submodule(name).weight.double()
            torch.testing.assert_close(new - old, change, rtol=0, atol=1e-5)
    shutil.copy(pair[0] / LOW, tmp_path / LOW)
    with pytest.raises(ValueError, match="one half of the pair is a LoRA and the other a LoKr"):
        TeacherBank(Backbone(denoiser(WAN_2_2.build())), pipeline, configs, 1.0)


def test_a_pair_on_the_hub(hub: LoopbackHub, pipeline: Any, pair: tuple[Path, PeftModel], tmp_path: Path) -> None:
    moved(pair[0], tmp_path, f"style/{HIGH}", f"style/{LOW}")
    commit = hub.add_folder("someone/wan22", tmp_path)
    for name in ("someone/wan22/style", f"someone/wan22/style/{HIGH}"):
        found = find_teacher(parse_teacher(name), pipeline)
        assert found.revision == found.other.revision == commit
        assert found.sha256() == find_teacher(TeacherConfig(str(pair[0])), pipeline).sha256()
