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

"""
Every recipe as it stands, in a dry run: on a Hub of this process that has a tiny base and tiny teachers under the names
and in the files that the recipe gives.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from helpers.edit_families import EDIT_FAMILIES, picture
from helpers.families import FAMILIES, flux2_klein
from helpers.families_experts import save_pair, wan_2_2
from helpers.loopback_hub import LoopbackHub
from helpers.noise_families import NOISE_FAMILIES
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from trl_diffusion_opd.pipelines.denoiser import denoiser, denoiser_name
from trl_diffusion_opd.scripts.arguments import config_path
from trl_diffusion_opd.scripts.main import main
from trl_diffusion_opd.scripts.values import PACKAGE
from trl_diffusion_opd.trainer import memory_estimate


pytestmark = pytest.mark.slow

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Recipe(NamedTuple):
    """
    `base` makes the stand-in; `teachers` is the form of their files; `options` make the run small; `edits` says whether its
    rows have pictures.
    """

    base: Callable[[], DiffusionPipeline]
    teachers: Literal["peft", "diffusers", "pair"]
    options: tuple[str, ...] = ()
    edits: bool = False


TEXT = ("--max_sequence_length", "16")
# FLUX.1 Kontext would draw, and bring pictures to, a million pixels.
FEW_PIXELS = '{"guidance_scale": 2.5, "max_area": 256, "_auto_resize": false}'
RECIPES = {
    "sd35_diffusionopd": Recipe(FAMILIES["sd3"].build, "peft", TEXT),
    "sd35_without_guidance": Recipe(FAMILIES["sd3"].build, "peft", TEXT),
    "flux2_klein_styles": Recipe(
        lambda: flux2_klein(is_distilled=True),
        "diffusers",
        (*TEXT, "--generation_kwargs", '{"text_encoder_out_layers": [1, 2, 3]}'),
    ),
    "flux1_kontext_styles": Recipe(
        EDIT_FAMILIES["flux_kontext"].family.build, "diffusers", (*TEXT, "--generation_kwargs", FEW_PIXELS), edits=True
    ),
    "qwen_image_styles": Recipe(FAMILIES["qwen_image"].build, "diffusers", TEXT),
    "sdxl_preference_and_pixels": Recipe(NOISE_FAMILIES["sdxl"].build, "diffusers"),
    "wan22_four_steps": Recipe(wan_2_2, "pair", (*TEXT, "--height", "32", "--width", "32")),
}
SMALL = "--height 16 --width 16 --use_cpu true --dataloader_pin_memory false".split()
SMALL += "--num_inference_steps 2 --eval_num_inference_steps 2 --per_device_train_batch_size 1 --lora_r 2".split()


def settings(name: str) -> dict:
    return yaml.safe_load(Path(config_path("config", name)).read_text(encoding="utf-8"))


def publish_teacher(hub: LoopbackHub, pipeline: DiffusionPipeline, spec: str, form: str, folder: Path) -> None:
    """Writes a random LoRA as the recipe's `spec` names it: `owner/repo[/sub/folder][/file.safetensors]`."""
    owner, repository, *inside = spec.split("/")
    file = inside.pop() if inside and inside[-1].endswith(".safetensors") else "pytorch_lora_weights.safetensors"
    if form == "pair":
        save_pair(folder, seed=1, name="{}_noise_model.safetensors")
    else:
        config = LoraConfig(r=2, lora_alpha=8, target_modules=list(TARGETS))
        model = get_peft_model(copy.deepcopy(denoiser(pipeline)), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=3.0)
        if form == "peft":
            model.save_pretrained(str(folder))
        else:
            layers = get_peft_model_state_dict(model, save_embedding_layers=False)
            layers = {key.removeprefix("base_model.model."): value for key, value in layers.items()}
            of_network = {f"{denoiser_name(pipeline)}_lora_layers": layers}
            type(pipeline).save_lora_weights(folder, weight_name=file, **of_network)
    hub.add_folder(f"{owner}/{repository}", folder, "/".join(inside))


def write_prompts(of_task: dict[str, str], edits: bool = False) -> None:
    for task, path in of_task.items():
        Path(path).parent.mkdir(exist_ok=True)
        rows = [{"prompt": f"{task} {animal}", "task": task} for animal in ("cat", "dog")]
        if edits:
            picture(1).save(Path(path).with_name("1.png"))
            rows = [{**row, "source_images": ["1.png"]} for row in rows]
        lines = [json.dumps(row) if path.endswith(".jsonl") else row["prompt"] for row in rows]
        Path(path).write_text("\n".join(lines), encoding="utf-8")


def test_each_recipe_has_its_stand_in() -> None:
    assert RECIPES.keys() == {path.stem for path in (PACKAGE / "recipes").glob("*.yaml")}
    assert not RECIPES.keys() & {path.stem for path in (PACKAGE / "configs").glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run(
    name: str,
    hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, given = RECIPES[name], settings(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # It takes most of the time of a dry run, and has tests of its own.
    monkeypatch.setattr(memory_estimate, "activation_bytes", lambda *given, **options: 0)
    pipeline = recipe.base()
    pipeline.save_pretrained(tmp_path / "base")
    hub.add_folder(given["model_name_or_path"], tmp_path / "base")
    for task, spec in given["teachers"].items():
        publish_teacher(hub, pipeline, spec, recipe.teachers, tmp_path / task)
    write_prompts(given["prompts"], recipe.edits)
    options = [*SMALL, *recipe.options, "--gradient_accumulation_steps", str(len(given["teachers"]))]
    assert main(["opd", "--config", name, "--dry_run", *options], may_launch=False) == 0
    assert "does not differ from the base" not in caplog.text
    folder = Path(given["output_dir"], "dry_run")
    for task, spec in given["teachers"].items():
        repository = "/".join(spec.split("/")[:2])
        inside = "/".join(spec.split("/")[2:])
        assert any(f"/{repository}/resolve/" in line and f"/{inside}" in line for line in hub.requests), spec
        assert (folder / f"{task}_teacher.png").exists() and (folder / f"{task}_student.png").exists()


def test_offline_says_what_to_do(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["opd", "--config", "sd35_diffusionopd", "--dry_run", *SMALL, "--gradient_accumulation_steps", "3"]
    with pytest.raises(SystemExit):
        main(words, may_launch=False)
    said = capsys.readouterr().err
    assert "there is no file 'prompts/geneval_train.jsonl'" in said
    write_prompts(settings("sd35_diffusionopd")["prompts"])
    with pytest.raises(SystemExit):
        main(words, may_launch=False)
    assert "stabilityai/stable-diffusion-3.5-medium" in capsys.readouterr().err
