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

"""Quantized bases: the float32 LoRA on them, what is refused, what they hold. bitsandbytes and torchao run on this CPU."""

import logging

import pytest
import torch
import torch.distributed as dist
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3
from diffusers.utils.torch_utils import randn_tensor
from helpers.dmd_fixtures import make_trainer as dmd_trainer
from helpers.grpo_fixtures import make_trainer as grpo_trainer
from helpers.nft_fixtures import make_trainer as nft_trainer
from helpers.opd_fixtures import (
    Recorder,
    StopAt,
    make_config,
    make_trainer,
    measured,
    relative_difference,
    snapshot,
    train_losses,
)
from helpers.quantization_fixtures import KINDS, config, dequantized, load, make_base, weight, without_gpu
from helpers.sft_fixtures import sft_trainer
from helpers.tiny_sd3 import make_lora
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig
from transformers import BitsAndBytesConfig as TransformersConfig
from transformers import TorchAoConfig as TransformersTorchAoConfig

from trl_diffusion_opd import estimate_memory
from trl_diffusion_opd.acceleration import quantization
from trl_diffusion_opd.acceleration.quantization import base_weight, plain_tensors, quantized_layers, scales
from trl_diffusion_opd.pipelines.fingerprints import base_digest
from trl_diffusion_opd.pipelines.view import StandIn
from trl_diffusion_opd.scripts import arguments as cli
from trl_diffusion_opd.scripts.arguments import QuantizationArguments
from trl_diffusion_opd.trainer.checks import launch_problems
from trl_diffusion_opd.trainer.memory_estimate import activation_bytes


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    without_gpu(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two teachers by task, and a student to start from."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("count", "draw", "start")):
        make_lora(make_base(), folder / name, seed)
    return folder


def teachers(loras, **others):
    return {"count": str(loras / "count"), "draw": str(loras / "draw"), **others}


def everything(network):
    """All numbers that a network's weights consist of, those of its LoRAs left out."""
    own = [p for name, p in network.named_parameters() if "lora_" not in name]
    return [part.clone() for tensor in [*own, *network.buffers(), *scales(network)] for part in plain_tensors(tensor)]


def update(output_dir, pipeline, loras, **options):
    """Losses and gradients of an update of a student that starts from a file."""
    recorder = Recorder()
    options = {"student_init": str(loras / "start"), "callbacks": [recorder], **options}
    trainer = make_trainer(output_dir, teachers(loras), pipeline, **options)
    before = everything(trainer.base_pipeline.transformer)
    trainer.train()
    after = everything(trainer.base_pipeline.transformer)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return trainer, recorder.gradients[0]


# Against float32 with the dequantized weights


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_stands_for(kind, base):
    layers = dict(quantized_layers(load(base, kind).transformer))
    assert len(layers) > 20 and "transformer_blocks.0.attn.to_q" in layers
    for layer in layers.values():
        torch.testing.assert_close(quantization.dequantized(layer).float(), weight(layer, kind), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory, loras):
    return update(tmp_path_factory.mktemp("unquantized"), make_base(), loras)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind, base, loras, unquantized, tmp_path):
    pipeline = load(base, kind)
    reference = make_base()
    dequantized(pipeline.transformer, kind, reference.transformer)
    trainer, gradient = update(tmp_path / "ours", pipeline, loras)
    exact, expected = update(tmp_path / "exact", reference, loras)
    # bitsandbytes' 8 bits round inputs too: where a rounding falls the other way, all that follows differs a little.
    tolerance = 1e-3 if kind == "int8" else 1e-5
    assert train_losses(trainer) == pytest.approx(train_losses(exact), rel=tolerance)
    assert relative_difference(gradient, expected) < tolerance
    # To the base that was quantized it is far more.
    assert relative_difference(gradient, unquantized) > 10 * tolerance


def forward_of(transformer, model=None):
    """A call of two rows in the dtype of the transformer's weights, of the model around it if there is one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 6, 16), "pooled_projections": (2, 16)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return StandIn(model or transformer, transformer)(
        **inputs, timestep=torch.tensor([300.0, 700.0]), return_dict=False
    )[0]


def noise_in_float32(shape, generator=None, device=None, dtype=None, layout=None):
    """Noise that is drawn in float32, then rounded: with some versions of PyTorch the numbers depend on the dtype."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_half_precision(kind, base, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_stable_diffusion_3, "randn_tensor", noise_in_float32)
    pipeline = load(base, kind, torch.bfloat16)
    reference = make_base()
    dequantized(pipeline.transformer, kind, reference.transformer)
    trainer, gradient = update(tmp_path / "ours", pipeline, loras, dtype="bfloat16")
    _, expected = update(tmp_path / "exact", reference, loras)
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.bank.backbone.parameters()} == {torch.bfloat16}
    assert relative_difference(gradient, expected) < 0.03
    assert 0 < trainer.state.log_history[0]["noise_floor"] < 0.01 * trainer.state.log_history[0]["kl"]


def test_output_projection_is_dequantized_in_float32(base):
    """Of a bfloat16 base, against the same in float32 from the inputs of the projection on."""
    transformer = load(base, "nf4", torch.bfloat16).transformer
    quantization.prepare(transformer)
    seen = []
    transformer.norm_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        output = forward_of(transformer)
    layer = transformer.proj_out
    exact = weight(layer, "nf4").bfloat16().float()  # dequantized, a weight is in the base's dtype
    expected = nn.functional.linear(seen[0].float(), exact, layer.bias.float())
    patches = output.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 16)
    torch.testing.assert_close(patches, expected, rtol=1e-5, atol=1e-6)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradient_after_a_forward_without_gradients(kind, base):
    """On some CPUs bitsandbytes' 4-bit layers would pass none from then on."""
    transformer = load(base, kind).transformer.eval()
    quantization.prepare(transformer)
    x = torch.randn(2, 5, 64, requires_grad=True)
    layer = transformer.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer(x.detach())
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, weight(layer, kind).sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def test_weights_that_are_rearranged(base, loras, tmp_path):
    pipeline = load(base, "nf4")
    # As in a forward of its own without gradients, where the CPU is one of those.
    pipeline.transformer.transformer_blocks[1].ff.net[2].weight.quant_state.packing_format_for_cpu = True
    refused(
        tmp_path,
        loras,
        "Load the pipeline again, and give it to the trainer before you generate images",
        pipeline=pipeline,
    )


class Wrong(nn.Linear):
    """Passes the gradient of other weights."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.roll(1, 0)) + super().forward(x).detach()


def test_wrong_gradient_is_seen():
    assert quantization._passes_gradient(nn.Linear(64, 32)) and not quantization._passes_gradient(Wrong(64, 32))


# What is asked of a base


def test_dtype_is_that_of_what_is_not_quantized(base):
    storage = config("nf4")
    storage.bnb_4bit_quant_storage = torch.bfloat16
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": storage})
    transformer = type(make_base()).from_pretrained(base, dtype=torch.float32, quantization_config=mapping).transformer
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    network = nn.ModuleDict({"to_q": transformer.transformer_blocks[0].attn.to_q, "norm": nn.LayerNorm(64)})
    assert base_weight(network).dtype == torch.float32

    half = load(base, "nf4", torch.bfloat16).transformer
    layer = half.transformer_blocks[0].attn.to_q
    layer.compute_dtype = torch.float32  # diffusers' default, to which the layer casts its bias
    layer(torch.randn(2, 64))
    assert layer.bias.dtype == torch.float32
    attention = nn.ModuleDict({"to_q": layer, "norm": nn.LayerNorm(64, dtype=torch.bfloat16)})
    assert base_weight(attention).dtype == torch.bfloat16


def test_the_dtype_is_not_that_of_a_table_kept_in_float32():
    """As in Wan, whose first weight is such a table."""
    network = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2).to(torch.bfloat16))
    network.table = nn.Parameter(torch.zeros(2))
    assert base_weight(network).dtype == torch.bfloat16
    assert base_weight(network[:1]).dtype == torch.float32


@pytest.mark.parametrize(
    "given",
    [config("torchao int8"), PipelineQuantizationConfig(quant_mapping={"transformer": config("torchao int8")})],
)
def test_by_name(given, base, loras, tmp_path):
    trainer, gradient = update(tmp_path / "ours", str(base), loras, quantization_config=given)
    _, expected = update(tmp_path / "loaded", load(base, "torchao int8"), loras)
    assert len(list(quantized_layers(trainer.base_pipeline.transformer))) > 20
    assert relative_difference(gradient, expected) < 1e-6


def test_what_is_saved_quantized(base, loras, tmp_path):
    load(base, "nf4").save_pretrained(tmp_path / "saved")
    _, gradient = update(tmp_path / "ours", str(tmp_path / "saved"), loras)
    _, expected = update(tmp_path / "loaded", load(base, "nf4"), loras)
    assert relative_difference(gradient, expected) < 1e-6


def test_the_whole_of_a_run(base, loras, tmp_path):
    """The base as a teacher, moving average, checkpoints and resuming, images, files for a base that is not quantized."""
    options = dict(
        quantization_config=config("nf4"), max_steps=2, ema_decay=0.9, learning_rate=1e-2, gradient_checkpointing=True
    )
    through = make_trainer(tmp_path / "through", teachers(loras, draw="base"), str(base), **options)
    through.train()
    trainer = make_trainer(tmp_path / "run", teachers(loras, draw="base"), str(base), callbacks=[StopAt(1)], **options)
    trainer.train()
    trainer = make_trainer(tmp_path / "run", teachers(loras, draw="base"), str(base), **options)
    trainer.train(resume_from_checkpoint=True)
    assert relative_difference(snapshot(trainer), snapshot(through)) < 1e-6

    image = trainer.pipeline("a cat", height=16, width=16, num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(image).all()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    assert "base float32, its weights quantized (nf4 by bitsandbytes)" in (tmp_path / "run" / "README.md").read_text()
    plain = make_base()
    plain.load_lora_weights(str(tmp_path / "saved"))
    saved = {name: p for name, p in plain.transformer.named_parameters() if "lora_" in name}
    with trainer.student.ema_weights():
        ours = {name.removeprefix("base_model.model."): p for name, p in trainer.student.named_parameters().items()}
        assert len(saved) == len(ours) and all(
            torch.equal(saved[name.replace(".default.", ".default_0.")], p) for name, p in ours.items()
        )


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_several_processes(kind, base, loras, tmp_path):
    """DDP takes the network, and gives the same gradient. One process is enough to see what it asks of weights."""
    trainer = make_trainer(tmp_path / "run", teachers(loras, draw="base"), load(base, kind))
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        gradients = []
        for model in (trainer.model, nn.parallel.DistributedDataParallel(trainer.model)):
            trainer.model.zero_grad()
            forward_of(trainer.base_pipeline.transformer, model).square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in trainer.student.named_parameters().items()})
    finally:
        dist.destroy_process_group()
    assert relative_difference(*gradients) < 1e-6


@pytest.mark.parametrize(
    ("method", "kind"), [("grpo", "nf4"), ("nft", "torchao int8"), ("sft", "nf4"), ("dmd", "nf4")]
)
def test_other_trainers(method, kind, base, tmp_path):
    make = {
        "grpo": lambda folder, p: grpo_trainer(folder, pipeline=p, beta=0.1, sampler="flow_sde"),
        "nft": lambda folder, p: nft_trainer(folder, p),
        "sft": lambda folder, p: sft_trainer(folder, pipeline=p),
        "dmd": lambda folder, p: dmd_trainer(folder, pipeline=p),
    }[method]
    pipeline = load(base, kind)
    reference = make_base()
    dequantized(pipeline.transformer, kind, reference.transformer)
    changes = []
    for name, one in (("ours", pipeline), ("exact", reference)):
        trainer = make(tmp_path / name, one)
        before = snapshot(trainer)
        trainer.train()
        changes.append({name: p - before[name] for name, p in snapshot(trainer).items()})
    assert any(change.abs().max() > 0 for change in changes[0].values())
    # Adam's first steps have the size of the rate whatever the gradient's: small ones may turn.
    assert relative_difference(*changes) < 0.05


def test_full_teacher(base, loras, tmp_path):
    """A transformer that is not quantized teaches on a base that is."""
    trainer = make_trainer(tmp_path, str(base), load(base, "nf4", torch.bfloat16), dtype="bfloat16")
    (teacher,) = trainer.bank.teachers["count"]
    with torch.no_grad(), trainer.bank.use(teacher) as module:
        assert module.dtype == torch.bfloat16 and not list(quantized_layers(module))
        ours = forward_of(module)
        theirs = forward_of(make_base().to(torch.bfloat16).transformer)
    torch.testing.assert_close(ours, theirs)
    trainer.train()


def test_quantized_full_teacher(base, loras, tmp_path):
    load(base, "torchao int8").save_pretrained(tmp_path / "quantized")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "quantized"), load(base, "torchao int8"))
    (teacher,) = trainer.bank.backbone.networks()
    assert len(list(quantized_layers(teacher))) > 20
    trainer.train()
    # It is the base, but for the student's LoRA.
    with torch.no_grad(), trainer.bank.use(None) as own:
        torch.testing.assert_close(forward_of(teacher), forward_of(own.get_base_model()))


def test_quantized_text_encoder(base, loras, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    mapping = {
        "transformer": config("torchao int8"),
        "text_encoder_3": TransformersTorchAoConfig(Int8WeightOnlyConfig()),
    }
    given = PipelineQuantizationConfig(quant_mapping=mapping)
    options = dict(quantization_config=given, offload_encoders=True, prompt_cache_dir=str(tmp_path / "cache"))
    trainer, _ = update(tmp_path / "run", str(base), loras, **options)
    assert list(quantized_layers(trainer.base_pipeline.text_encoder_3))


def test_messages_of_8_bits_come_once(base, caplog):
    transformer = load(base, "int8").transformer
    quantization.prepare(transformer)
    quantization._ONCE.said = False
    caplog.set_level(logging.WARNING)
    with torch.no_grad():
        forward_of(transformer)
    assert caplog.text.count("inputs will be cast") == 1


# What is refused


def refused(tmp_path, loras, *messages, pipeline, **options):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, teachers(loras), pipeline, **options)
    for message in messages:
        assert message in str(error.value)


def test_config_for_what_is_loaded(base, loras, tmp_path):
    refused(
        tmp_path,
        loras,
        "quantization_config are for a model that is given by name, but this one is already loaded",
        "peft_config='lora'",
        pipeline=make_base(),
        quantization_config=config("nf4"),
        peft_config="lora",
    )


def test_full_weights(base, loras, tmp_path):
    refused(
        tmp_path,
        loras,
        "peft_config=None trains all weights, and the base's are quantized (Int8Tensor by torchao). Train a LoRA",
        "task_weights has a weight for task 'ocr'",
        pipeline=str(base),
        quantization_config=config("torchao int8"),
        peft_config=None,
        task_weights={"ocr": 2.0},
    )
    refused(
        tmp_path,
        loras,
        "the base's are quantized (8 bits by bitsandbytes)",
        pipeline=load(base, "int8"),
        peft_config=None,
    )


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (TransformersConfig(load_in_4bit=True), "transformers.BitsAndBytesConfig"),
        (Int8DynamicActivationInt8WeightConfig(), "torchao.Int8DynamicActivationInt8WeightConfig"),
        ({"load_in_4bit": True}, "builtins.dict"),
    ],
)
def test_config_of_another_library(given, name, base, loras, tmp_path):
    message = (
        f"quantization_config is a {name}. Give diffusers' config of the denoiser, such as diffusers.BitsAndBytes"
    )
    refused(tmp_path, loras, message, pipeline=str(base), quantization_config=given)


def test_config_of_no_component(base, loras, tmp_path):
    given = PipelineQuantizationConfig(quant_mapping={"transfomer": config("torchao int8")})
    message = "quantization_config is for ['transfomer'], which StableDiffusion3Pipeline does not have. It has ['text_encoder'"
    refused(tmp_path, loras, message, pipeline=str(base), quantization_config=given)


def test_bitsandbytes_without_a_gpu(base, loras, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "cannot be quantized: No GPU found. A GPU is needed for quantization. (diffusers needs a GPU to quantize by bitsandbytes"
    refused(tmp_path, loras, message, pipeline=str(base), quantization_config=config("nf4"))


@pytest.mark.parametrize(
    ("quant_type", "message"),
    [
        (Int8DynamicActivationInt8WeightConfig(), "passes no gradient or a wrong one. Quantize by"),
        (
            IntxWeightOnlyConfig(),
            "diffusers cannot train on a base that is quantized by torchao's IntxWeightOnlyConfig",
        ),
    ],
)
def test_quantization_that_is_not_trained_on(quant_type, message, base, loras, tmp_path):
    refused(tmp_path, loras, message, pipeline=str(base), quantization_config=TorchAoConfig(quant_type))


def test_sharding(base, tmp_path, monkeypatch):
    args = make_config(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(type(args), "world_size", 2)
    (problem,) = launch_problems(load(base, "nf4").transformer, args)
    assert "A quantized base is not supported with FSDP or DeepSpeed" in problem
    assert launch_problems(make_base().transformer, args) == []


def test_other_library(base, loras, tmp_path):
    pipeline = load(base, "torchao int8")
    pipeline.transformer.quantization_method = type(pipeline.transformer.quantization_method).GGUF
    refused(tmp_path, loras, "quantized by gguf. A LoRA can only be trained on one", pipeline=pipeline)


# Memory


def counted_by_hand(transformer, kind):
    """Bytes of a transformer: those of its quantized layers by the formulas of the documentation."""
    layers = dict(quantized_layers(transformer))
    rest = [
        t
        for n, t in [*transformer.named_parameters(), *transformer.named_buffers()]
        if n.removesuffix(".weight") not in layers
    ]
    size = sum(t.nbytes for t in rest)
    tables = 0
    for layer in layers.values():
        n, rows = layer.in_features * layer.out_features, layer.out_features
        size += {
            "nf4": n // 2 + 4 * n // 64,
            "nf4 nested": n // 2 + n // 64 + 4 * -(-n // (64 * 256)) + 4,
            "int8": n + 4 * rows,
            "torchao int8": n + 5 * rows,
            "torchao float8": n + 4 * rows,
        }[kind]
        tables += {"nf4": 4 * 16, "nf4 nested": 4 * 16 + 4 * 256}.get(kind, 0)
    return size, tables


@pytest.mark.parametrize("kind", ["nf4 nested", "int8", "torchao int8"])
def test_weights_are_counted(kind, base, loras, tmp_path):
    trainer = make_trainer(tmp_path, teachers(loras), load(base, kind))
    row = estimate_memory(trainer)["transformer"]
    size, tables = counted_by_hand(load(base, kind).transformer, kind)
    assert size <= row["bytes"] <= size + tables  # layers share tables
    assert ("uint8" if kind == "nf4 nested" else "int8") in row["dtype"].split(", ")
    trainer.train()
    assert estimate_memory(trainer)["transformer"]["bytes"] == row["bytes"]


# Few samples where weights are kept for the backward, many where a layer's weights are made and dropped within a kernel.
@pytest.mark.parametrize(
    ("kind", "batch", "checkpointing"),
    [("nf4", 8, False), ("int8", 8, True), ("torchao int8", 2, False), ("torchao int8", 2, True)],
)
def test_activations_are_those_of_a_real_pass(kind, batch, checkpointing, base, loras, tmp_path):
    options = dict(dtype="bfloat16", gradient_checkpointing=checkpointing, height=32, width=32)
    options["per_device_train_batch_size"] = batch
    trainer = make_trainer(tmp_path, teachers(loras), load(base, kind, torch.bfloat16), **options)
    estimate = activation_bytes(trainer, "cpu")
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    assert estimate == pytest.approx(measured(trainer, ["count0"] * batch), rel=0.1)


def test_digest_of_a_quantized_base(base):
    digests = {base_digest(load(base, kind)) for kind in ("nf4", "torchao int8")} | {base_digest(make_base())}
    assert len(digests) == 3 and base_digest(load(base, "torchao int8")) in digests


# The scripts


def test_options_of_the_scripts():
    assert QuantizationArguments().quantization_config("bfloat16") is None
    four = QuantizationArguments(load_in_4bit=True, use_bnb_nested_quant=True).quantization_config("bfloat16")
    assert isinstance(four, BitsAndBytesConfig) and four.quantization_method() == "nf4"
    assert four.bnb_4bit_use_double_quant and four.bnb_4bit_compute_dtype == torch.bfloat16
    assert QuantizationArguments(load_in_8bit=True).quantization_config("bfloat16").load_in_8bit
    torchao = QuantizationArguments(torchao_quant_type="int8_weight_only").quantization_config("bfloat16")
    assert isinstance(torchao, TorchAoConfig) and type(torchao.quant_type).__name__ == "Int8WeightOnlyConfig"
    with pytest.raises(ValueError, match="--load_in_4bit and --torchao_quant_type exclude each other"):
        QuantizationArguments(load_in_4bit=True, torchao_quant_type="int8_weight_only")


def test_options_without_the_library(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    QuantizationArguments()
    with pytest.raises(
        ValueError, match=r'--load_in_8bit needs bitsandbytes. .* `pip install "\.\[quantization\]"` in'
    ):
        QuantizationArguments(load_in_8bit=True)
