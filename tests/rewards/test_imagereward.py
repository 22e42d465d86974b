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

"""ImageReward on a tiny file in the authors' layout, against its formula written out with the names of that layout."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.clip_models import apply_head, cropped_pixels, make_head, make_images
from helpers.loopback_hub import READ_TOKEN, TOKEN
from huggingface_hub import HfApi
from transformers import BertTokenizer

from trl_diffusion_opd.rewards import ImageReward, load_reward


SIZE, PATCH, VISION_WIDTH, TEXT_WIDTH, LAYERS, HEADS = 16, 8, 128, 24, 2, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red"]
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,  # the file says this, whatever the width of the vision transformer is
    "add_cross_attention": True,
}
IMAGES = make_images()
PROMPTS = ["a red cat", "A dog", "cat " * 60, ""]


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    def linear(name, inputs, outputs):
        return {f"{name}.weight": random(outputs, inputs), f"{name}.bias": random(outputs)}

    def norm(name, width):
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    def attention(name, width, context):
        return {
            **linear(f"{name}.self.query", width, width),
            **linear(f"{name}.self.key", context, width),
            **linear(f"{name}.self.value", context, width),
            **linear(f"{name}.output.dense", width, width),
            **norm(f"{name}.output.LayerNorm", width),
        }

    vision, text, wide = "blip.visual_encoder", "blip.text_encoder", VISION_WIDTH
    weights = {
        f"{vision}.cls_token": random(1, 1, wide),
        f"{vision}.pos_embed": random(1, (SIZE // PATCH) ** 2 + 1, wide),
        f"{vision}.patch_embed.proj.weight": random(wide, 3, PATCH, PATCH) * 0.2,
        f"{vision}.patch_embed.proj.bias": random(wide),
        **norm(f"{vision}.norm", wide),
        f"{text}.embeddings.position_ids": torch.arange(CONFIG["max_position_embeddings"])[None],
        f"{text}.embeddings.word_embeddings.weight": random(CONFIG["vocab_size"], TEXT_WIDTH),
        f"{text}.embeddings.position_embeddings.weight": random(CONFIG["max_position_embeddings"], TEXT_WIDTH),
        **norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH),
        **linear("blip.vision_proj", wide, 8),
        **linear("blip.text_proj", TEXT_WIDTH, 8),
        **{f"mlp.{name}": tensor for name, tensor in make_head(TEXT_WIDTH, seed).items()},
    }
    for i in range(LAYERS):
        block = f"{vision}.blocks.{i}"
        weights |= norm(f"{block}.norm1", wide) | norm(f"{block}.norm2", wide)
        weights |= linear(f"{block}.attn.qkv", wide, 3 * wide) | linear(f"{block}.attn.proj", wide, wide)
        weights |= linear(f"{block}.mlp.fc1", wide, 48) | linear(f"{block}.mlp.fc2", 48, wide)
        layer = f"{text}.encoder.layer.{i}"
        weights |= attention(f"{layer}.attention", TEXT_WIDTH, TEXT_WIDTH)
        weights |= attention(f"{layer}.crossattention", TEXT_WIDTH, wide)
        weights |= linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 32)
        weights |= linear(f"{layer}.output.dense", 32, TEXT_WIDTH) | norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    return weights


def expected_score(weights: dict[str, torch.Tensor], image, prompt: str) -> float:
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    vision = "blip.visual_encoder"
    x = F.conv2d(
        cropped_pixels(image, SIZE)[None],
        w[f"{vision}.patch_embed.proj.weight"],
        w[f"{vision}.patch_embed.proj.bias"],
        stride=PATCH,
    )
    x = torch.cat([w[f"{vision}.cls_token"][0], x[0].flatten(1).T]) + w[f"{vision}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{vision}.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{vision}.norm", 1e-6)

    text = "blip.text_encoder"
    # 35 tokens at most; the padding of shorter prompts is masked, so it can as well be left out.
    ids = [2, *([WORDS.index(word) for word in prompt.lower().split()][:33]), 3]
    x = (
        w[f"{text}.embeddings.word_embeddings.weight"][ids]
        + w[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    )
    x = norm(x, f"{text}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for name, context in (("attention", None), ("crossattention", seen)):
            part = f"{layer}.{name}"
            context = x if context is None else context
            h = attend(
                linear(x, f"{part}.self.query"),
                linear(context, f"{part}.self.key"),
                linear(context, f"{part}.self.value"),
            )
            x = norm(x + linear(h, f"{part}.output.dense"), f"{part}.output.LayerNorm", 1e-12)
        h = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + h, f"{layer}.output.LayerNorm", 1e-12)
    head = {name.removeprefix("mlp."): tensor for name, tensor in w.items() if name.startswith("mlp.")}
    return (apply_head(head, x[0]) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model, tokenizer = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("bert")
    weights = make_weights()
    torch.save(weights, model / "ImageReward.pt")
    (model / "med_config.json").write_text(json.dumps(CONFIG))
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tokenizer)
    return SimpleNamespace(model=model, tokenizer=tokenizer, weights=weights)


@pytest.fixture
def scores(made: SimpleNamespace) -> list[float]:
    return [expected_score(made.weights, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]


def local(made: SimpleNamespace, **options) -> ImageReward:
    return ImageReward(**{"model": str(made.model), "tokenizer": str(made.tokenizer), **options})


def changed(made: SimpleNamespace, folder: Path, weights: object) -> ImageReward:
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    return local(made, model=str(folder))


def test_from_the_hub_as_published(made, scores, hub):
    for name in ("model", "tokenizer"):
        HfApi().create_repo(f"tester/{name}")
        HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=getattr(made, name))
    reward = load_reward("imagereward", model="tester/model", tokenizer="tester/tokenizer")
    assert reward(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=1e-5)
    assert max(scores) - min(scores) > 0.05
    commits = [
        f"tester/{name}@{hub.repositories[f'tester/{name}'].branches['main']}" for name in ("model", "tokenizer")
    ]
    assert reward.fingerprint == f"imagereward {commits[0]} {commits[1]} ImageReward.pt torchvision crop float32"


def test_the_prompt_and_the_image_both_matter(made):
    reward = local(made)
    one, other = reward(prompts=["a cat", "a dog"], images=[IMAGES[2]] * 2)
    third = reward(prompts=["a cat"], images=[IMAGES[3]])[0]
    assert abs(one - other) > 1e-3 and abs(one - third) > 1e-3


def test_batches_precision_and_autocast(made, scores):
    for size in (1, 3):
        assert local(made, batch_size=size)(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=1e-5)
    reward = local(made)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=1e-5)
    half = local(made, dtype="bfloat16")
    assert half(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=0.1)
    assert half.fingerprint != reward.fingerprint
    for module in (half.vision_model, half.text_model, half.head):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert half.text_model.dtype == torch.bfloat16 and half.head[0].weight.dtype == torch.float32


def test_unused_parts_may_be_missing(made, scores, tmp_path):
    needed = {
        name: tensor
        for name, tensor in made.weights.items()
        if not name.startswith(("blip.vision_proj", "blip.text_proj")) and not name.endswith("position_ids")
    }
    assert changed(made, tmp_path, needed)(prompts=PROMPTS, images=IMAGES) == pytest.approx(scores, abs=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        "name",
        [
            "blip.visual_encoder.blocks.1.attn.qkv.weight",
            "blip.visual_encoder.pos_embed",
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
            "mlp.layers.4.bias",
        ],
    )
    def test_weights_of_another_model(self, name, made, tmp_path):
        weights = made.weights
        with pytest.raises(ValueError, match="Reward 'imagereward': .*1 tensors are missing"):
            changed(made, tmp_path, {key: tensor for key, tensor in weights.items() if key != name})
        with pytest.raises(ValueError, match="Reward 'imagereward': .*1 tensors are unexpected"):
            changed(made, tmp_path, {**weights, f"{name}.other": torch.zeros(1)})
        if "pos_embed" not in name:  # the number of patches is read off it
            with pytest.raises(ValueError, match="Reward 'imagereward': .*1 tensors are of another shape"):
                changed(made, tmp_path, {**weights, name: weights[name][:-1]})

    def test_another_layout(self, made, tmp_path):
        with pytest.raises(ValueError, match=r"are unexpected \(text_encoder.embeddings.LayerNorm.bias"):
            changed(made, tmp_path, {name.removeprefix("blip."): tensor for name, tensor in made.weights.items()})
        with pytest.raises(ValueError, match="are unexpected"):
            changed(made, tmp_path, {f"module.{name}": tensor for name, tensor in made.weights.items()})

    def test_code_in_a_pickle_is_not_run(self, made, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "attacked"),)

        with pytest.raises(ValueError, match="'imagereward': .*ImageReward.pt is not a file of tensors only"):
            changed(made, tmp_path, {**made.weights, "x": Attack()})
        assert not (tmp_path / "attacked").exists()

    def test_repositories(self, made, hub, monkeypatch):
        with pytest.raises(ValueError, match="Reward 'imagereward': tester/none: .* no such repository on the Hub"):
            local(made, model="tester/none")
        with pytest.raises(ValueError, match="Reward 'imagereward': tester/none: .* no such repository on the Hub"):
            local(made, tokenizer="tester/none")
        hub.create("tester/gated", gated=True)
        hub.create("tester/private", private=True)
        for repository in ("tester/gated", "tester/private"):
            hub.add_folder(repository, made.model)
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
        with pytest.raises(ValueError, match="Reward 'imagereward': tester/gated: the repository is gated"):
            local(made, model="tester/gated")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ValueError, match="Reward 'imagereward': tester/private: .* private repository log in"):
            local(made, model="tester/private")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        local(made, model="tester/private")

    def test_files_that_are_not_there(self, made, tmp_path):
        with pytest.raises(ValueError, match="there is no ImageReward.pt, no med_config.json"):
            local(made, model=str(tmp_path))
        with pytest.raises(ValueError, match="there is no tokenizer.json or vocab.txt"):
            local(made, tokenizer=str(tmp_path))
