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

"""Teachers of another size or checkpoint: they run through their own pipelines, and what does not fit is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import TorchAoConfig
from helpers.families import FAMILIES
from helpers.noise_families import NOISE_FAMILIES
from helpers.own_pipelines import large_pipeline, save_large
from helpers.teachers_helpers import make_student, rewrite
from helpers.tiny_sd3 import SIZE, make_lora, make_pipeline, make_transformer, make_vae
from torchao.quantization import Int8WeightOnlyConfig

from trl_diffusion_opd import TeacherConfig
from trl_diffusion_opd.acceleration.offload import Offload
from trl_diffusion_opd.acceleration.quantization import is_quantized
from trl_diffusion_opd.models.backbone import Backbone
from trl_diffusion_opd.models.own_pipeline import OwnPipelines
from trl_diffusion_opd.models.roles import model_identity
from trl_diffusion_opd.models.targets import State, anchor_scales
from trl_diffusion_opd.models.teachers import TeacherBank, normalize_teachers
from trl_diffusion_opd.pipelines.denoiser import denoiser, denoiser_name
from trl_diffusion_opd.pipelines.velocity import VelocityField


PROMPTS = ["a red fox", "two cats, asleep"]
LEVELS = (1.0, 0.62, 0.05)
ROUNDING = 1e-5  # between equal networks whose weights lie elsewhere in memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return save_large(tmp_path_factory.mktemp("own") / "large")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA on the large pipeline: its folder, and the model that it was saved from."""
    folder = tmp_path_factory.mktemp("own") / "lora"
    return str(folder), make_lora(large_pipeline(), folder, seed=1)


@pytest.fixture
def student():
    return make_pipeline()


def field_of(pipeline, **options):
    return VelocityField(pipeline, num_inference_steps=4, **{**SIZE, **options})


def make_bank(student, teachers, options=None, **kwargs):
    field = field_of(student, generation_kwargs=options)
    own = OwnPipelines(student, field, SIZE["max_sequence_length"], options, Offload([], torch.device("cpu")))
    tasks = [*teachers] if isinstance(teachers, dict) else ["task"]
    network = make_student(student)
    bank = TeacherBank(
        Backbone(network, "default"), student, normalize_teachers(teachers, tasks), 4.5, own=own, **kwargs
    )
    return bank, field


@torch.no_grad()
def gap(bank, field, reference, scale=4.5, network=None, task="task", levels=LEVELS):
    """The largest difference of a teacher's velocity from its own pipeline's, on the student's latents."""
    x = field.initial_latents(PROMPTS, [torch.Generator().manual_seed(i) for i in range(2)])
    (role,) = bank.teachers[task]
    gaps = []
    for t in levels:
        ours = bank.velocity(field, role, x, t, PROMPTS)
        assert torch.equal(ours, bank.mean_velocity(field, [role], x, t, PROMPTS))
        gaps.append((ours - reference(x, t, PROMPTS, scale, network)).abs().max())
    return max(gaps)


# --- velocities


@pytest.mark.parametrize("spec", ["pipeline", "base"])
def test_the_velocity_is_its_own_pipelines(spec, student, large):
    teacher = large if spec == "pipeline" else TeacherConfig("base", base=large)
    bank, field = make_bank(student, teacher)
    bank.check_guidance(field)
    assert gap(bank, field, field_of(large_pipeline())) < ROUNDING
    assert gap(bank, field, field_of(bank.own_pipelines()[0].pipeline)) == 0  # to the bit, with the same weights
    assert gap(bank, field, field) > 0.1  # the student's own is another
    (entry,) = bank.manifest()["task"]
    assert (entry["kind"], entry["source"], entry["base"]) == ("pipeline", "large", None)


def test_beyond_it_from_the_students_base(student, large):
    """In another size there is no base to extrapolate from but the student's."""
    bank, field = make_bank(student, large)
    (role,) = bank.teachers["task"]
    x = field.initial_latents(PROMPTS, [torch.Generator().manual_seed(i) for i in range(2)])
    with torch.no_grad():
        target = State(bank, field, x, 0.62).target([role], PROMPTS, 1.25)
        own, base = (of(x, 0.62, PROMPTS, 4.5) for of in (field_of(large_pipeline()), field_of(make_pipeline())))
    torch.testing.assert_close(target, base + 1.25 * (own - base), rtol=0, atol=ROUNDING)
    assert anchor_scales([role], 1.25) == {4.5} and anchor_scales([role], 1.0) == set()


def test_a_lora_on_another_base(student, large, lora):
    folder, model = lora
    teachers = {
        "a": TeacherConfig(folder, base=large),
        "b": TeacherConfig(folder, base=large, guidance_scale=1.0),
        "c": large,
    }
    bank, field = make_bank(student, teachers, batched=True)
    reference = field_of(large_pipeline())
    assert gap(bank, field, reference, network=model, task="a") < ROUNDING
    assert gap(bank, field, reference, 1.0, network=model, task="b") < ROUNDING
    assert gap(bank, field, reference, task="c") < ROUNDING  # without the LoRA
    assert len(bank.own_pipelines()) == 1  # loaded once
    assert [len(group) for group in bank.forwards([bank.teachers[task][0] for task in teachers])] == [1, 1, 1]
    (entry,) = bank.manifest()["a"]
    assert (entry["kind"], entry["base"]["source"]) == ("lora", "large")
    assert entry["base"]["sha256"] == bank.manifest()["c"][0]["sha256"]
    assert bank.summary()[0]["teacher"] == "lora on large"
    # No two are taken for one model.
    assert len({str(model_identity(roles)) for roles in bank.teachers.values()}) == 3


def test_the_students_own_architecture_stays_in_its_pipeline(student, tmp_path):
    other = make_pipeline()
    other.register_modules(transformer=make_transformer(7))
    other.save_pretrained(tmp_path)
    bank, _ = make_bank(student, str(tmp_path))
    assert bank.own_pipelines() == [] and bank.teachers["task"][0].teacher.kind == "full"
    # Its own pipeline is used where that is asked for.
    bank, field = make_bank(make_pipeline(), TeacherConfig("base", base=str(tmp_path)))
    assert gap(bank, field, field_of(other)) < ROUNDING


def test_equal_parts_are_the_students(student, large):
    bank, _ = make_bank(student, large)
    (own,) = bank.own_pipelines()
    for name in ("text_encoder_2", "text_encoder_3", "vae"):
        assert own.modules()[name] is student.components[name]
    assert own.modules()["text_encoder"] is not student.text_encoder
    assert "its own text_encoder; the student's text_encoder_2, text_encoder_3; shift 5.0" in own.line


def test_options_of_its_own(student, large):
    options = {"negative_prompt": "rain"}
    own = {"negative_prompt": "snow", "max_sequence_length": 8}
    teachers = {"a": large, "b": TeacherConfig(large, generation_kwargs=own)}
    bank, field = make_bank(student, teachers, options, batched=True)
    roles = [role for of_task in bank.teachers.values() for role in of_task]
    assert roles[0].teacher is roles[1].teacher and len(bank.forwards(roles)) == 2
    assert gap(bank, field, field_of(large_pipeline(), generation_kwargs=options), task="a") < ROUNDING
    reference = field_of(large_pipeline(), generation_kwargs={"negative_prompt": "snow"}, max_sequence_length=8)
    assert gap(bank, field, reference, task="b") < ROUNDING
    assert gap(bank, field, reference, task="a") > 0
    with pytest.raises(ValueError, match="large: generation_kwargs: StableDiffusion3Pipeline takes no 'snow'"):
        make_bank(make_pipeline(), TeacherConfig(large, generation_kwargs={"snow": 1}))


def test_offloading_and_quantizing_it_alone(student, large, lora):
    folder, model = lora
    quantized = TorchAoConfig(Int8WeightOnlyConfig())
    teachers = {
        "a": TeacherConfig(folder, base=large, offload=True),
        "b": TeacherConfig(large, quantization_config=quantized),
    }
    bank, field = make_bank(student, teachers)
    offloaded, other = bank.own_pipelines()
    resting = ["_hf_hook" in vars(own.modules()["text_encoder"]) for own in (offloaded, other)]
    assert resting == [True, False] and "_hf_hook" not in vars(student.text_encoder)
    assert gap(bank, field, field_of(large_pipeline()), network=model, task="a") < ROUNDING
    assert is_quantized(denoiser(other.pipeline)) and not is_quantized(student.transformer)
    assert 0 < gap(bank, field, field_of(large_pipeline()), task="b") < 0.2


DEEPER = {"flux": {"num_layers": 2}, "sdxl": {"layers_per_block": 2}, "cogview4": {"num_layers": 3}}


@pytest.mark.parametrize("name", DEEPER)
def test_other_families(name, tmp_path):
    """Packed latents, a model that predicts noise, timesteps apart from the levels."""
    family = {**FAMILIES, **NOISE_FAMILIES}[name]
    student, teacher = family.build(), family.build()
    network = denoiser(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        other = type(network).from_config({**network.config, **DEEPER[name]})
    teacher.register_modules(**{denoiser_name(teacher): other.eval()})
    teacher.save_pretrained(tmp_path)
    field, reference = (VelocityField(one, num_inference_steps=4, **family.kwargs) for one in (student, teacher))
    offload = Offload([], torch.device("cpu"))
    own = OwnPipelines(student, field, family.max_sequence_length, family.generation_kwargs, offload)
    backbone = Backbone(denoiser(student))
    bank = TeacherBank(backbone, student, normalize_teachers(str(tmp_path), ["task"]), 2.0, own=own)
    assert gap(bank, field, reference, 2.0, levels=field.levels[:-1].tolist()) < ROUNDING


def test_levels_that_a_teacher_does_not_know_are_refused(tmp_path):
    """Its schedule ends below 1, where the student's walk begins."""
    NOISE_FAMILIES["sdxl"].build().save_pretrained(tmp_path / "noise")
    student, family = NOISE_FAMILIES["sdxl_zero_snr"].build(), NOISE_FAMILIES["sdxl_zero_snr"]
    field = VelocityField(student, num_inference_steps=4, **family.kwargs)
    own = OwnPipelines(student, field, family.max_sequence_length, None, Offload([], torch.device("cpu")))
    teachers = normalize_teachers(TeacherConfig("base", base=str(tmp_path / "noise")), ["task"])
    with pytest.raises(
        ValueError, match=r"noise: it was trained on noise levels from 0\.\d+ to 0\.\d+, and .* 1\.000"
    ):
        TeacherBank(Backbone(student.unet), student, teachers, 1.0, own=own)


# --- what is refused


def four_times_the_latents(pipeline):
    pipeline.register_modules(
        transformer=make_transformer(num_layers=1, in_channels=8, out_channels=8), vae=make_vae((4, 8), 8)
    )


def other_autoencoder(pipeline):
    pipeline.register_modules(transformer=make_transformer(num_layers=1), vae=make_vae((4, 8)))


def other_size(pipeline):
    pipeline.register_modules(transformer=make_transformer(num_layers=1), vae=make_vae((4, 8, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            four_times_the_latents,
            r"odd: its latents are \(1, 8, 8, 8\) for an image of 16 x 16 pixels, .* \(1, 4, 8, 8\)",
        ),
        (other_size, r"odd: its latents are \(1, 4, 4, 4\) for an image of 16 x 16 pixels"),
        (other_autoencoder, r"odd: it decodes other images from the same latents .* \d\.\d\d apart"),
    ],
)
def test_other_latents_are_refused(change, message, student, tmp_path):
    odd = make_pipeline(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        change(odd)
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=message):
        make_bank(student, str(tmp_path / "odd"))


def test_bases_that_cannot_be_used(student, large, lora, tmp_path):
    """All in one message."""
    folder, _ = lora
    (tmp_path / "empty").mkdir()
    broken, nan, cut = (tmp_path / name for name in ("broken", "nan", "cut"))
    for copy in (broken, nan, cut):
        shutil.copytree(large, copy)
    (broken / "model_index.json").write_text("{")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    rewrite(nan / weights, lambda tensors: {key: value * torch.nan for key, value in tensors.items()})
    rewrite(cut / weights, lambda t: {key: value for key, value in t.items() if "proj_out" not in key})
    bases = {"a": tmp_path / "empty", "b": broken, "c": nan, "d": cut}
    teachers = {task: TeacherConfig(folder, base=str(base)) for task, base in bases.items()}
    with pytest.raises(ValueError) as error:
        make_bank(student, teachers)
    for line in (
        "task 'a': empty: has no model_index.json. A teacher's base is a whole pipeline",
        "task 'b': broken: ",
        "task 'c': nan: holds NaN or infinite values in ",
        "task 'd': cut: its network's weights do not fit its config: proj_out.",
    ):
        assert line in str(error.value)


def make_small_lora(folder):
    make_lora(make_pipeline(), folder / "small", seed=2)
    return folder / "small"


def test_a_lora_of_the_student_is_none_of_the_base(student, large, tmp_path):
    with pytest.raises(ValueError, match="small: its config asks for 16 tensors that the file lacks"):
        make_bank(student, TeacherConfig(str(make_small_lora(tmp_path)), base=large))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", "neither an existing folder nor of the form owner/repo"),
        ("owner/repo/sub", "neither an existing folder nor of the form owner/repo"),
        ("owner/repo@", "neither an existing folder nor of the form owner/repo"),
        ("", "neither an existing folder"),
    ],
)
def test_a_base_must_be_named_rightly(base, message):
    with pytest.raises(ValueError, match=f"base of teacher 'o/r' is '{re.escape(base)}': .*{message}"):
        TeacherConfig("o/r", base=base)


def test_options_are_for_an_own_pipeline(student, tmp_path):
    with pytest.raises(ValueError, match="offload is for a teacher with a pipeline of its own"):
        make_bank(student, TeacherConfig(str(make_small_lora(tmp_path)), offload=True))


def test_without_own_pipelines_it_is_refused(student, large):
    network = make_student(student)
    with pytest.raises(ValueError, match="large: is of another base than the student"):
        TeacherBank(Backbone(network, "default"), student, normalize_teachers(large, ["a"]), 4.5)


def test_guidance_is_checked_on_its_own_pipeline(student, large):
    config = TeacherConfig(large, guidance_scale=0.5)  # the pipeline guides only above 1
    bank, field = make_bank(student, config)
    with pytest.raises(ValueError, match="task 'task': large: guidance_scale=0.5 does nothing"):
        bank.check_guidance(field)


# --- resuming


def test_resume_refuses_another_base(student, large, lora, tmp_path):
    folder, _ = lora
    shutil.copytree(large, tmp_path / "moved")
    config = TeacherConfig(folder, base=large)
    bank, _ = make_bank(student, config)
    manifest = bank.manifest()
    make_bank(make_pipeline(), replace(config, base=str(tmp_path / "moved")), manifest=manifest)
    other = save_large(tmp_path / "other", seed=6)
    with pytest.raises(
        ValueError, match="lora: its base is not the one .* which was large with sha256 .* this one is other"
    ):
        make_bank(make_pipeline(), replace(config, base=other), manifest=manifest)
    # A text encoder counts too.
    encoder = tmp_path / "moved" / "text_encoder" / "model.safetensors"
    rewrite(encoder, lambda t: {key: 2 * value for key, value in t.items()}, {"format": "pt"})
    with pytest.raises(ValueError, match="lora: its base is not the one"):
        make_bank(make_pipeline(), replace(config, base=str(tmp_path / "moved")), manifest=manifest)


# --- the Hub


def test_a_base_on_the_hub_is_pinned(student, large, lora, hub, tmp_path):
    first = hub.add_folder("me/large", Path(large))
    folder, model = lora
    teachers = {"a": TeacherConfig(folder, base="me/large"), "b": "me/large"}
    bank, field = make_bank(student, teachers)
    manifest = bank.manifest()
    assert manifest["a"][0]["base"] == {"source": "me/large", "revision": first, "sha256": manifest["b"][0]["sha256"]}
    assert gap(bank, field, field_of(large_pipeline()), network=model, task="a") < ROUNDING
    hub.add_folder("me/large", Path(save_large(tmp_path / "new", seed=6)))
    bank, _ = make_bank(make_pipeline(), teachers, manifest=manifest)  # at the commits of the manifest
    assert bank.manifest() == manifest
    bank, _ = make_bank(make_pipeline(), teachers)
    assert bank.manifest()["a"][0]["base"]["sha256"] != manifest["a"][0]["base"]["sha256"]
    hub.add_folder("me/many", Path(large), "large")
    with pytest.raises(ValueError, match=r"me/many/large: is a pipeline of another .* hf download me/many --include"):
        make_bank(make_pipeline(), "me/many/large")
    with pytest.raises(ValueError, match="me/none: no such folder here and no such repository on the Hub"):
        make_bank(make_pipeline(), TeacherConfig(folder, base="me/none"))
