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

"""The page about memory and time: its table against the JSON, the JSON against the configs, and configs that fit their card."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.edit_families import EDIT_FAMILIES, picture
from helpers.tiny_sd3 import make_transformer
from torch import nn

from trl_diffusion_opd.acceleration.quantization import quantized_layers
from trl_diffusion_opd.models.student import default_lora_config
from trl_diffusion_opd.profiling.memory import step_bytes


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory_and_time as script  # noqa: E402
import memory_and_time_shapes as shapes  # noqa: E402
import scaling_formulas as paper  # noqa: E402
from peft import get_peft_model  # noqa: E402
from scaling import with_tables  # noqa: E402


RESULT = json.loads((ROOT / "docs" / "source" / "results" / "memory_and_time.json").read_text())
SCALING = json.loads((ROOT / "docs" / "source" / "results" / "scaling.json").read_text())["models"]
ROWS = {row["config"]: row for row in RESULT["rows"]}
# Parameters of the released networks, in billions.
RELEASED = {"FLUX.2-klein 4B": 3.876, "SDXL": 2.567, "Wan 2.1 1.3B": 1.419, "Wan 2.1 14B": 14.288}


def test_numbers_follow_from_the_configs_and_the_counts():
    assert json.loads(json.dumps(script.compute(RESULT["counts"]))) == RESULT


@pytest.mark.parametrize("page", ["docs/source/memory_and_time.md", "README.md"])
def test_tables_are_those_of_the_result(page):
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text and with_tables(text, script.tables(RESULT)) == text


def test_every_config_for_a_card_is_in_the_table():
    names = {path.stem for path in (ROOT / "trl_diffusion_opd" / "configs").glob("*gb.yaml")}
    assert names == set(script.CONFIGS) == set(ROWS)


@pytest.mark.parametrize("config", script.CONFIGS)
def test_a_config_fits_its_card(config):
    row = ROWS[config]
    assert row["peak"] <= (1 - paper.RESERVE) * row["card_bytes"]
    assert row["peak"] == max(row["memory"]["train"], row["memory"]["encode"])


@pytest.mark.parametrize("row", RESULT["recipes"], ids=lambda row: row["recipe"])
def test_a_recipe_fits_its_card_and_says_what_it_takes(row):
    assert row["peak"] <= (1 - paper.RESERVE) * row["card_bytes"]
    text = (ROOT / "trl_diffusion_opd" / "recipes" / f"{row['recipe']}.yaml").read_text()
    assert f"# Memory: about {row['peak'] / 1e9:.0f} GB, on one GPU of {row['card_bytes'] / 1e9:.0f} GB" in text


def test_a_picture_has_as_many_tokens_as_the_image():
    (row,) = (row for row in RESULT["recipes"] if row["recipe"] == "flux1_kontext_styles")
    plain = ROWS["flux1_dev_48gb"]  # the same network and batch
    assert (row["batch"], row["height"], row["precision"]) == (plain["batch"], plain["height"], plain["precision"])
    tokens = (2 * 4096 + 512) / (4096 + 512)
    assert row["memory"]["activations"] == pytest.approx(tokens * plain["memory"]["activations"], rel=0.05)
    # Two teachers of rank 256 in bfloat16 beside the student's LoRA of rank 32 in float32.
    lora = RESULT["counts"]["flux1_kontext_styles"]["lora"]
    assert row["memory"]["adapters"] == 4 * lora + 2 * 2 * 8 * lora


def test_inputs_are_those_of_the_pipeline():
    """Their names, and the tokens of the picture behind those of the image, with ids of their own."""
    family, seen = EDIT_FAMILIES["flux_kontext"].family, {}
    pipeline = family.build()
    pipeline.transformer.forward = lambda **inputs: seen.update(inputs) or (inputs["hidden_states"],)
    pipeline(**family.call_kwargs(1.0, ("a",)), image=picture(1), num_inference_steps=1, output_type="latent")
    ours = shapes.kontext_inputs(1, 1024, 512)
    assert ours.keys() == seen.keys() - {"joint_attention_kwargs", "return_dict"}
    for inputs in (ours, seen):
        assert inputs["hidden_states"].shape[1] == inputs["img_ids"].shape[0]
    assert ours["hidden_states"].shape == (1, 2 * 4096, 64)
    assert all(ours[name].ndim == seen[name].ndim for name in ours)


@pytest.mark.parametrize("config", script.CONFIGS)
def test_a_config_shows_pictures_and_saves(config):
    _, args = script.parse(script.opd.ARGUMENTS, ["--config", config, "--use_cpu", "true"])
    assert args.log_completions and args.save_strategy == "steps" and args.max_steps == script.UPDATES
    assert args.guidance_scale is not None, "written in the file, so that it does not follow the pipeline's default"


@pytest.mark.parametrize(("config", "side"), [("sd35_80gb", 512), ("flux1_dev_80gb", 1024), ("qwen_image_80gb", 1024)])
def test_it_agrees_with_the_page_about_scaling(config, side):
    row, counted = ROWS[config], SCALING[script.CONFIGS[config]]
    line = paper.activations(counted, side, row["batch"], checkpointing=True)
    assert row["memory"]["activations"] == pytest.approx(line, rel=0.02)
    assert RESULT["counts"][config]["flops"] == counted["flops"][str(side)]
    layout = paper.Layout(1, 1, True, row["batch"], 1)
    beside = 0 if row["offload_encoders"] else paper.BF16 * sum(counted["others"].values())
    assert row["memory"]["train"] == pytest.approx(
        sum(paper.memory(counted, side, layout).values()) + beside, rel=0.02
    )


def test_time_of_the_papers_update():
    row, counted = ROWS["sd35_80gb"], SCALING["SD3.5-M"]
    assert (row["samples"], row["steps"]) == (paper.SAMPLES, paper.STEPS)
    assert row["update_flops"] == pytest.approx(paper.SAMPLES * paper.sample_flops(counted, 512, True))
    assert row["seconds"]["0.45"] == pytest.approx(row["update_flops"] / (0.45 * 989e12))
    # 8.99 s for 24 samples and 3 trained steps.
    assert RESULT["measured"]["seconds"] == pytest.approx(8.99 / 24 / 3 * 72 * 9, rel=1e-3)


def test_encoders_come_on_top_of_the_transformer():
    sizes = ROWS["qwen_image_48gb"]["memory"]
    held = sum(sizes[part] for part in ("base", "adapters", "gradients", "optimizer", "moving average"))
    assert sizes["encode"] == held + sizes["encoders"] > sizes["train"] == held + sizes["activations"]
    assert sizes["encoders"] == 2 * SCALING["Qwen-Image"]["others"]["Qwen2.5-VL-7B"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_networks_are_the_released_ones(name):
    released = shapes.MODELS[name]
    with torch.device("meta"):
        base = released.network(**released.config)
    assert sum(p.numel() for p in base.parameters()) / 1e9 == pytest.approx(RELEASED[name], abs=5e-4)


@pytest.mark.parametrize(("precision", "bytes_a_weight"), [("bfloat16", 2), ("8-bit", 1), ("4-bit", 0.5 + 4 / 64)])
def test_a_quantized_network_in_shapes(precision, bytes_a_weight):
    with torch.device("meta"):
        base = make_transformer(num_layers=2).to(torch.bfloat16).eval().requires_grad_(False)
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    rest = sum(t.numel() for t in (*base.parameters(), *base.buffers())) - linear
    assert shapes.base_bytes(base, precision) == round(bytes_a_weight * linear) + 2 * rest
    shapes.quantize(base, precision)
    quantized = len(list(quantized_layers(base)))
    assert quantized == (0 if precision == "bfloat16" else sum(isinstance(m, nn.Linear) for m in base.modules()))
    with torch.device("meta"):
        model = get_peft_model(base, default_lora_config(base))
    inputs = {
        "hidden_states": torch.empty(2, 4, 16, 16, device="meta"),
        "encoder_hidden_states": torch.empty(2, 7, 16, device="meta"),
        "pooled_projections": torch.empty(2, 16, device="meta"),
        "timestep": torch.empty(2, device="meta"),
    }
    assert step_bytes(model, base, [inputs], precision=torch.bfloat16) > 0
