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

"""Single files in the layout of the models' authors, as bases and as teachers, against the weights that they were made of."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import BitsAndBytesConfig, StableDiffusion3Pipeline, UNet2DConditionModel
from helpers.loopback_hub import LoopbackHub
from helpers.opd_fixtures import make_trainer
from helpers.original_layouts import sd3, unet, vae
from helpers.tiny_sd3 import make_lora, make_pipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_diffusion_opd.guards.redaction import public_name
from trl_diffusion_opd.models.teacher_config import TeacherError, parse_teacher
from trl_diffusion_opd.models.teacher_files import find_files
from trl_diffusion_opd.models.whole_transformer import read_transformer
from trl_diffusion_opd.pipelines.loading import load_pipeline
from trl_diffusion_opd.pipelines.single_file import is_whole, read_network
from trl_diffusion_opd.problems import Refusal


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value.contiguous() for key, value in state.items()}


def same(network: nn.Module, other: nn.Module) -> bool:
    ours, theirs = network.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in diffusers' layout, with the weights of seed 0."""
    folder = tmp_path_factory.mktemp("base")
    make_pipeline(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other() -> StableDiffusion3Pipeline:
    return make_pipeline(1)


@pytest.fixture(scope="module")
def original(other: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    """The transformer of seed 1, under its authors' names."""
    return sd3(other.transformer.state_dict())


@pytest.fixture
def file(original: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(prefixed("model.diffusion_model.", original), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_base_of_a_transformer_alone(prefix, base, other, original, tmp_path) -> None:
    name = tmp_path / "other.safetensors"
    save_file(prefixed(prefix, original), name)
    pipeline = load_pipeline(str(name), "float32", {"config": str(base)})
    assert type(pipeline) is StableDiffusion3Pipeline
    assert same(pipeline.transformer, other.transformer) and same(pipeline.vae, make_pipeline(0).vae)
    # A card names the file, neither the config's folder nor where the file lies.
    assert public_name(pipeline.config["_name_or_path"]) == "other.safetensors"


def test_a_base_in_diffusers_names(base, other, tmp_path) -> None:
    save_file(prefixed("", other.transformer.state_dict()), tmp_path / "d.safetensors")
    pipeline = load_pipeline(str(tmp_path / "d.safetensors"), "bfloat16", {"config": str(base)})
    assert pipeline.transformer.dtype == torch.bfloat16
    assert same(pipeline.transformer, copy.deepcopy(other.transformer).to(torch.bfloat16))


def test_a_base_with_its_autoencoder(base, other, original, tmp_path) -> None:
    """What the file holds is the file's; the encoders, which it lacks, are the config's."""
    whole = prefixed("model.diffusion_model.", original)
    whole |= prefixed("first_stage_model.", vae(other.vae.state_dict(), levels=2))
    save_file(whole, tmp_path / "whole.safetensors")
    pipeline = load_pipeline(str(tmp_path / "whole.safetensors"), "float32", {"config": str(base)})
    assert same(pipeline.transformer, other.transformer) and same(pipeline.vae, other.vae)
    assert not same(pipeline.vae, make_pipeline(0).vae)
    assert same(pipeline.text_encoder_3, make_pipeline(0).text_encoder_3)


def test_a_base_on_the_hub(base, file, other, hub: LoopbackHub) -> None:
    hub.add_folder("me/base", base)
    hub.add_folder("me/files", file.parent, "sub")
    pipeline = load_pipeline("me/files/sub/other.safetensors", "float32", {"config": "me/base"})
    assert same(pipeline.transformer, other.transformer)
    assert not any("transformer/diffusion_pytorch_model" in line for line in hub.requests)
    with pytest.raises(Refusal, match="the repository 'me/files' has no file 'none.safetensors'"):
        load_pipeline("me/files/none.safetensors", "float32", {"config": "me/base"})


def test_a_unet(tmp_path) -> None:
    """Of Stable Diffusion 1.5's kind, with its second copy (`model_ema.`) beside it, which is not read."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    state = prefixed("model.diffusion_model.", unet(network.state_dict(), layers=2, attends=(True, False)))
    save_file(state | {"model_ema.decay": torch.zeros(1)}, tmp_path / "unet.safetensors")
    network.save_config(tmp_path)
    read = read_network(tmp_path / "unet.safetensors", UNet2DConditionModel, str(tmp_path), None, torch.float32)
    assert same(read, network)


def edited(name: str, original: dict[str, Tensor], path: Path) -> Path:
    """A file with a fault."""
    state = dict(original)
    if name == "lacks a weight":
        del state["final_layer.linear.bias"]
    elif name == "has one more":
        state["joint_blocks.0.x_block.extra.weight"] = torch.zeros(3, 3)
    elif name == "another size":
        state["x_embedder.proj.weight"] = torch.zeros(8, 4, 2, 2)
    elif name == "no network":
        state = {"first_stage_model.a.0.weight": torch.zeros(2)}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


FAULTS = {
    "lacks a weight": r"does not fit a SD3Transformer2DModel of {config}: KeyError: 'final_layer.linear.bias'",
    "has one more": r"the network of the file has [\d,]+ numbers, and a SD3Transformer2DModel of this config has",
    "another size": r"does not fit a SD3Transformer2DModel of {config}: ",
    "no network": r"holds no denoising network: its tensors are first_stage_model.a.0.weight",
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.items(), ids=FAULTS)
def test_a_fault_is_refused(fault, expected, base, original, tmp_path) -> None:
    path = edited(fault, original, tmp_path / "wrong.safetensors")
    if fault != "no network":  # that one begins as a whole pipeline
        with pytest.raises(Refusal, match="wrong.safetensors .*" + expected.format(config=f"the config in '{base}'")):
            load_pipeline(str(path), "float32", {"config": str(base)})
    config = find_files(parse_teacher(str(path)))
    with pytest.raises(TeacherError, match="wrong.safetensors.*" + expected.format(config="the base's config")):
        read_transformer(config, make_pipeline(0).transformer)


def test_what_is_no_base(base, tmp_path, hub) -> None:
    make_lora(make_pipeline(0), tmp_path, seed=0, format="diffusers")
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    assert not is_whole(lora)
    refused = {
        str(lora): "is no whole model: its tensors are transformer.*Is it a LoRA",
        "nowhere.safetensors": "is no file here, and not of the form owner/repo/file.safetensors",
    }
    for name, expected in refused.items():
        with pytest.raises(Refusal, match=expected):
            load_pipeline(name, "float32", {"config": str(base)})
    for name in ("model.ckpt", "me/repo/model.gguf"):
        with pytest.raises(Refusal, match="of single files only .safetensors are read"):
            load_pipeline(name, "float32")


def test_a_config_that_is_not_there(file, base, hub) -> None:
    for config in ("me/none", str(file.parent)):
        with pytest.raises(Refusal, match=f'{config}.*model_init_kwargs={{"config": "folder"}}'):
            load_pipeline(str(file), "float32", {"config": config})
    # Of Stable Diffusion 1.5's kind, diffusers knows the repository; of this tiny one it does not.
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 1, 1)}, file.parent / "unet.safetensors"
    )
    for name, expected in {"unet": "taken from 'stable-diffusion-v1-5/", "other": "does not know by its file"}.items():
        with pytest.raises(Refusal, match=expected):
            load_pipeline(str(file.parent / f"{name}.safetensors"), "float32")
    with pytest.raises(Refusal, match="a single file, which is not quantized while it is loaded"):
        load_pipeline(str(file), "float32", {"config": str(base)}, BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(Refusal, match="a single file has one dtype"):
        load_pipeline(str(file), "float32", {"config": str(base), "dtype": {"vae": "float32"}})


def test_a_teacher(file, other, tmp_path) -> None:
    """Beside a LoRA, through a trainer: its whole checkpoint is a network of its own."""
    make_lora(make_pipeline(0), tmp_path / "lora", seed=0)
    trainer = make_trainer(tmp_path / "out", {"count": str(file), "draw": str(tmp_path / "lora")})
    (role,) = trainer.bank.teachers["count"]
    assert role.teacher.kind == "full" and role.teacher.source
    with trainer.bank.use(role) as network:
        assert same(network, other.transformer)


def test_a_teacher_on_the_hub(file, other, hub: LoopbackHub) -> None:
    hub.add_folder("me/files", file.parent)
    files = find_files(parse_teacher("me/files/other.safetensors"))
    assert (files.kind, files.label, files.revision is None) == ("full", "me/files/other.safetensors", False)
    assert same(read_transformer(files, make_pipeline(0).transformer), other.transformer)
