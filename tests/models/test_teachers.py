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

import copy
import hashlib
import json
import math
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from helpers.families import FAMILIES
from helpers.teachers_helpers import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    edit_json,
    make_bank,
    make_student,
    rewrite,
    save_full,
    velocity,
)
from helpers.tiny_sd3 import forward, make_lora, make_pipeline, make_transformer
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from trl_diffusion_opd.hub import errors as hub_errors
from trl_diffusion_opd.models.lora_files import infer_scales
from trl_diffusion_opd.models.lora_layouts import convert
from trl_diffusion_opd.models.roles import model_identity
from trl_diffusion_opd.models.teachers import (
    TeacherConfig,
    add_adapter,
    normalize_teachers,
    parse_teacher,
    read_lora,
)


@pytest.fixture
def pipeline():
    return make_pipeline()


# --- formats


def save_plain(pipeline, folder, *, prefix, with_alpha, **config):
    """A file without metadata: alpha as tensors, or the rank where there are none."""
    model = make_lora(pipeline, folder, format="diffusers", **config)
    peft_config = model.peft_config["default"]

    def change(tensors):
        tensors = {key.replace("transformer.", prefix, 1): value for key, value in tensors.items()}
        if with_alpha:
            for key in [key for key in tensors if key.endswith("lora_A.weight")]:
                module = key.removesuffix(".lora_A.weight")
                layer = model.base_model.model.get_submodule(module.removeprefix("transformer."))
                tensors[f"{module}.alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
        return tensors

    assert with_alpha or peft_config.lora_alpha == peft_config.r
    rewrite(folder / DIFFUSERS_FILE, change)
    return model


def save_pipeline(pipeline, folder, seed):
    other = make_pipeline(seed=seed)
    other.save_pretrained(folder)
    return other.transformer


def save_model_level(pipeline, folder, seed):
    model = copy.deepcopy(pipeline.transformer)
    model.add_adapter(LoraConfig(r=5, lora_alpha=20, target_modules=["attn.to_k"], init_lora_weights=False))
    model.save_lora_adapter(folder)
    return model


MIXED = {"rank_pattern": {"attn.to_q": 2, "^transformer_blocks.1.attn.to_v": 7}}
FORMATS = {
    "peft": (lambda p, f: make_lora(p, f, seed=1), {}),
    "peft, ff layers, rank 9, alpha 3": (
        lambda p, f: make_lora(p, f, seed=2, rank=9, lora_alpha=3, target_modules=["net.0.proj", "proj_out"]),
        {},
    ),
    "peft, rslora": (lambda p, f: make_lora(p, f, seed=3, rank=6, use_rslora=True), {}),
    "peft, patterns": (
        lambda p, f: make_lora(p, f, seed=4, **MIXED, alpha_pattern={"attn.to_k": 11, "attn.to_q": 1}),
        {},
    ),
    "peft, regex and excluded": (
        lambda p, f: make_lora(p, f, seed=5, target_modules=r".*\.attn\.to_[qk]", exclude_modules=r".*\.1\..*to_q"),
        {},
    ),
    "diffusers with metadata": (lambda p, f: make_lora(p, f, seed=6, rank=2, format="diffusers", **MIXED), {}),
    "diffusers, alpha tensors": (
        lambda p, f: save_plain(
            p, f, seed=7, prefix="transformer.", with_alpha=True, **MIXED, alpha_pattern={"attn.to_k": 13}
        ),
        {},
    ),
    "diffusers, no alpha": (
        lambda p, f: save_plain(p, f, seed=8, prefix="transformer.", with_alpha=False, lora_alpha=4), {}
    ),
    "model level, alpha tensors": (lambda p, f: save_plain(p, f, seed=10, prefix="", with_alpha=True), {}),
    "model level with metadata": (lambda p, f: save_model_level(p, f, seed=11), {}),
    "full": (lambda p, f: save_full(p, f, seed=12), {}),
    "pipeline": (lambda p, f: save_pipeline(p, f, seed=13), {}),
}  # fmt: skip


def test_every_format_gives_the_saving_models_velocity_side_by_side(pipeline, tmp_path):
    untouched = forward(pipeline.transformer)
    expected, teachers = {}, {"base": "base"}
    for number, (label, (save, options)) in enumerate(FORMATS.items()):
        folder = tmp_path / str(number)
        expected[label] = forward(save(pipeline, folder).eval())
        assert (expected[label] - untouched).abs().max() > 1e-2
        teachers[label] = TeacherConfig(str(folder), **options)
    shutil.copy(tmp_path / "5" / DIFFUSERS_FILE, tmp_path / "other.safetensors")
    teachers["weight_name"] = TeacherConfig(str(tmp_path), weight_name="other.safetensors")
    expected["weight_name"] = expected["diffusers with metadata"]
    teachers["subfolder"] = TeacherConfig(str(tmp_path), subfolder="0")
    expected["subfolder"] = expected["peft"]

    student = make_student(pipeline)
    expected["student"] = forward(student)
    bank = make_bank(pipeline, teachers, student)

    for label, (teacher,) in bank.teachers.items():
        reference = untouched if label == "base" else expected[label]
        assert torch.equal(velocity(bank, teacher), reference), label
    assert torch.equal(velocity(bank, None), untouched)
    assert torch.equal(forward(student), expected["student"])


def test_a_teacher_is_base_plus_scaled_product(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1, rank=4, lora_alpha=6)
    base = copy.deepcopy(pipeline.transformer)
    tensors = load_file(tmp_path / PEFT_FILE)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            key = f"base_model.model.{name.removesuffix('weight')}lora_"
            if f"{key}A.weight" in tensors:
                weight += 6 / 4 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    bank = make_bank(pipeline, str(tmp_path))
    torch.testing.assert_close(velocity(bank, bank.teachers["task"][0]), forward(base), atol=1e-5, rtol=1e-5)


def test_alpha_tensors_survive_a_loader_that_drops_them():
    raw = {f"transformer.x.{name}.weight": torch.ones(2, 2) for name in ("lora_A", "lora_B")}
    raw["transformer.x.alpha"] = torch.tensor(7.0)
    tensors, alphas, _ = convert(raw, FAMILIES["flux"].build(), "file")
    assert alphas == {"x": 7.0}
    assert sorted(tensors) == ["x.lora_A.weight", "x.lora_B.weight"]


def test_a_name_that_ends_other_names_means_its_module_alone():
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"out": nn.Linear(4, 4), "block": nn.ModuleDict({"out": nn.Linear(4, 4)})})

    tensors = {"out.lora_A.weight": torch.ones(2, 4), "out.lora_B.weight": torch.ones(4, 2)}
    network = make()
    config = infer_scales(tensors, {}).config(network)
    model = add_adapter(
        network, "teacher", config, {f"base_model.model.{key}": value for key, value in tensors.items()}
    )
    weight = model.get_submodule("base_model.model.out.lora_A.teacher").weight
    assert torch.equal(weight, tensors["out.lora_A.weight"])
    assert isinstance(model.get_submodule("base_model.model.block.out"), nn.Linear)


def test_lora_teachers_on_a_frozen_base_without_a_student(pipeline, tmp_path):
    expected = forward(make_lora(pipeline, tmp_path / "a", seed=1))
    full = forward(save_full(pipeline, tmp_path / "b", seed=2))
    base = copy.deepcopy(pipeline.transformer)
    untouched = forward(base)
    bank = make_bank(
        pipeline, {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "c": "base"}, base, student_adapter=None
    )
    (a,), (b,), (c,) = bank.teachers.values()
    assert torch.equal(velocity(bank, a), expected)
    assert torch.equal(velocity(bank, b), full)
    assert torch.equal(velocity(bank, c), untouched)
    assert torch.equal(forward(bank.backbone.network), untouched)
    assert not any(parameter.requires_grad for parameter in bank.backbone.parameters())
    assert {id(p) for p in bank.backbone.network.parameters()} < {id(p) for p in bank.backbone.parameters()}


def test_a_frozen_base_with_no_lora_stays_bare(pipeline):
    base = copy.deepcopy(pipeline.transformer)
    bank = make_bank(pipeline, "base", base, student_adapter=None)
    with bank.use(bank.teachers["task"][0]) as module:
        assert module is base
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_teachers_take_the_dtype_of_the_base_and_the_student_keeps_its_own(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "a", seed=1)
    save_full(pipeline, tmp_path / "b", seed=2)
    pipeline.transformer.to(torch.bfloat16)
    student = make_student(pipeline)
    bank = make_bank(pipeline, {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}, student)
    assert {p.dtype for p in bank.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


def test_a_student_continues_from_a_lora(pipeline, tmp_path):
    expected = forward(make_lora(pipeline, tmp_path, seed=1, rank=5, format="diffusers"))
    lora_config, state_dict, files = read_lora(pipeline, parse_teacher(str(tmp_path)))
    state = torch.get_rng_state()
    student = add_adapter(pipeline.transformer, "default", lora_config, state_dict, trainable=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(forward(student), expected)
    trainable = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(state_dict) and all("lora_" in name for name in trainable)
    assert (files.source, files.revision, student.peft_config["default"].r) == (tmp_path.name, None, 5)


# --- switching


def test_requires_grad_and_random_state_are_untouched(pipeline, tmp_path):
    for seed in (1, 2):
        make_lora(pipeline, tmp_path / str(seed), seed=seed)
    student = make_student(pipeline)
    # A frozen part of the student's adapter must stay frozen as well.
    next(p for n, p in student.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    state = torch.get_rng_state()
    bank = make_bank(pipeline, {"a": str(tmp_path / "1"), "b": [str(tmp_path / "2"), "base"]}, student)
    assert torch.equal(torch.get_rng_state(), state)

    def flags():
        return {name: p.requires_grad for name, p in student.named_parameters() if "teacher_" not in name}

    for teachers in bank.teachers.values():
        for teacher in teachers:
            with bank.use(teacher):
                during = flags()
            assert during == flags()
    names = {name.replace(".base_layer", ""): flag for name, flag in flags().items()}
    assert names == {name.replace(".base_layer", ""): flag for name, flag in before.items()}
    assert sum(flags().values()) == len([n for n in before if ".default." in n]) - 1
    assert not any(parameter.requires_grad for parameter in bank.backbone.parameters())
    assert student.active_adapter == "default"
    assert not any(module.training for module in student.modules())


def test_the_student_is_back_after_an_exception_and_after_nesting(pipeline, tmp_path):
    teacher_velocity = forward(make_lora(pipeline, tmp_path, seed=1))
    base_velocity = forward(pipeline.transformer)
    bank = make_bank(pipeline, str(tmp_path))
    (teacher,) = bank.teachers["task"]
    student_velocity = forward(bank.backbone.network)
    for inner in (teacher, None):
        with pytest.raises(KeyError), bank.use(inner):
            raise KeyError
        assert torch.equal(forward(bank.backbone.network), student_velocity)
    with bank.use(teacher) as module:
        assert torch.equal(velocity(bank, None), base_velocity)
        assert torch.equal(forward(module), teacher_velocity)
    assert torch.equal(forward(bank.backbone.network), student_velocity)


def test_switching_walks_over_no_modules(pipeline, tmp_path, monkeypatch):
    make_lora(pipeline, tmp_path, seed=1)
    bank = make_bank(pipeline, {"a": str(tmp_path), "b": "base"})

    def refuse(*args, **kwargs):
        raise AssertionError("a walk over all modules")

    for method in (
        "modules",
        "named_modules",
        "parameters",
        "named_parameters",
        "children",
        "named_children",
        "apply",
    ):
        monkeypatch.setattr(nn.Module, method, refuse)
    for teacher in (bank.teachers["a"][0], bank.teachers["b"][0], None):
        with bank.use(teacher):
            pass


def test_training_the_student_leaves_every_teachers_bytes(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "a", seed=1, target_modules=["attn.to_q", "attn.to_k"])
    make_lora(pipeline, tmp_path / "b", seed=2, format="diffusers")
    save_full(pipeline, tmp_path / "c", seed=3)
    student = make_student(pipeline)
    bank = make_bank(pipeline, {name: str(tmp_path / name) for name in "abc"}, student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert not {id(p) for p in trained} & {id(p) for p in bank.backbone.parameters()}
    assert {name.split(".")[-2] for name, p in student.named_parameters() if p.requires_grad} == {"default"}
    teachers = [p.detach().clone() for p in bank.backbone.parameters()]
    base = [p.detach().clone() for n, p in student.named_parameters() if "lora_" not in n]
    before = [p.detach().clone() for p in trained]
    assert len(teachers) == 2 * 2 * 2 + 2 * 15 + len([*make_transformer().parameters()])

    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for roles in bank.teachers.values():
        target = velocity(bank, roles[0])
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        output = student(
            hidden_states=x,
            timestep=torch.tensor([300.0, 700.0]),
            encoder_hidden_states=torch.ones(2, 6, 16),
            pooled_projections=torch.ones(2, 16),
            return_dict=False,
        )[0]
        (output - target).square().mean().backward()
    optimizer.step()

    assert all(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(teachers, bank.backbone.parameters(), strict=True))
    still = [p for n, p in student.named_parameters() if "lora_" not in n]
    assert all(torch.equal(old, new) for old, new in zip(base, still, strict=True))
    assert all(parameter.grad is None for parameter in bank.backbone.parameters())


# --- roles


def test_one_source_is_loaded_once(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "a", seed=1)
    save_full(pipeline, tmp_path / "b", seed=2)
    teachers = {
        "one": TeacherConfig(str(tmp_path / "a"), guidance_scale=1.0),
        "two": [str(tmp_path / "a"), TeacherConfig(str(tmp_path), subfolder="a", guidance_scale=7.0, weight=3)],
        "three": str(tmp_path / "b"),
        "four": str(tmp_path / "b"),
    }
    bank = make_bank(pipeline, teachers)
    roles = [role for task in bank.teachers.values() for role in task]
    assert [role.teacher.name for role in roles] == ["teacher_0"] * 3 + ["teacher_1"] * 2
    assert [role.guidance_scale for role in roles] == [1.0, 4.5, 7.0, 4.5, 4.5]
    assert [role.weight for role in roles] == [1.0, 0.25, 0.75, 1.0, 1.0]
    assert len(bank.backbone.networks()) == 1
    assert set(bank.backbone.network.peft_config) == {"default", "teacher_0"}


def test_normalize_teachers(tmp_path):
    assert normalize_teachers("base", ["a", "b"]) == {"a": [TeacherConfig("base")], "b": [TeacherConfig("base")]}
    weighted = [TeacherConfig("o/x", weight=0.7), TeacherConfig("o/y", weight=0.7), "o/z"]
    (configs,) = normalize_teachers({"a": weighted}, ["a"]).values()
    assert [config.weight for config in configs] == pytest.approx([0.7 / 2.4, 0.7 / 2.4, 1 / 2.4])
    assert math.fsum(config.weight for config in configs) == pytest.approx(1)
    with pytest.raises(ValueError) as error:
        normalize_teachers({"a": "nowhere", "b": [], "typo": "base"}, ["a", "b", "c"])
    for part in ("no teacher for task 'c'", "no prompts for task 'typo'", "'nowhere' is neither", "'b' is empty"):
        assert part in str(error.value)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_positive(weight):
    with pytest.raises(ValueError, match=f"weight of teacher 'base' is {weight}; it must be positive"):
        TeacherConfig("base", weight=weight)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("base", TeacherConfig("base")),
        ("owner/repo", TeacherConfig("owner/repo")),
        ("owner/repo@v1", TeacherConfig("owner/repo", revision="v1")),
        ("owner/repo/a/b@refs/pr/1", TeacherConfig("owner/repo", subfolder="a/b", revision="refs/pr/1")),
        (
            TeacherConfig("owner/repo/a", subfolder="b/", guidance_scale=2.0),
            TeacherConfig("owner/repo", subfolder="a/b", guidance_scale=2.0),
        ),
    ],
)
def test_parse_teacher(spec, expected):
    assert parse_teacher(spec) == expected


def test_an_existing_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/repo/lora@1").mkdir(parents=True)
    assert parse_teacher("owner/repo/lora@1") == TeacherConfig("owner/repo/lora@1")
    assert parse_teacher("owner/repo/other") == TeacherConfig("owner/repo", subfolder="other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("repo", "neither an existing folder nor of the form owner/repo"),
        ("/no/such/folder", "neither an existing folder"),
        ("./no/such", "neither an existing folder"),
        ("owner/repo@", "neither an existing folder"),
        ("owner//repo", "neither an existing folder"),
        (TeacherConfig("base", revision="v1"), '"base" is the base model itself and takes no revision'),
        (TeacherConfig("owner/repo@v1", revision="v2"), "names 'v1', but revision is 'v2'"),
    ],
)
def test_parse_teacher_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_teacher(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": " "}, "empty name"),
        ({"guidance_scale": -1.0}, "guidance_scale of teacher 'o/r' is -1.0"),
        ({"weight_name": "lora.bin"}, "only .safetensors files are read"),
    ],
)
def test_teacher_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**{"model_name_or_path": "o/r", **options})


# --- manifest


def test_manifest_and_summary_hold_no_paths(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "lora", seed=1, rank=6)
    bank = make_bank(pipeline, {"a": TeacherConfig(str(tmp_path), subfolder="lora", guidance_scale=2.0), "b": "base"})
    manifest = json.loads(json.dumps(bank.manifest()))
    assert manifest["a"] == [
        {
            "source": tmp_path.name,
            "subfolder": "lora",
            "revision": None,
            "sha256": bank.teachers["a"][0].teacher.sha256,
            "kind": "lora",
            "rank": 6,
            "guidance_scale": 2.0,
            "weight": 1.0,
            "lora_scale": 1.0,
            "base": None,
        }
    ]
    assert manifest["b"][0]["source"] == "base" and manifest["b"][0]["sha256"] is None
    assert [row["teacher"] for row in bank.summary()] == [f"{tmp_path.name}/lora", "base"]
    assert str(tmp_path.parent) not in json.dumps([manifest, bank.summary()])


def test_the_hash_is_that_of_the_files(pipeline, tmp_path):
    make_lora(pipeline, tmp_path, seed=1, format="diffusers")
    expected = hashlib.sha256((tmp_path / DIFFUSERS_FILE).read_bytes()).hexdigest()
    assert make_bank(pipeline, str(tmp_path)).teachers["task"][0].teacher.sha256 == expected


@pytest.mark.parametrize("changed", ["weights", "alpha"])
def test_resume_refuses_another_teacher(tmp_path, changed):
    folder = tmp_path / "ocr-teacher"
    make_lora(make_pipeline(), folder, seed=1)
    manifest = make_bank(make_pipeline(), {"ocr": str(folder)}).manifest()
    shutil.copytree(folder, tmp_path / "moved")
    make_bank(make_pipeline(), {"ocr": str(tmp_path / "moved")}, manifest=manifest)

    if changed == "weights":
        rewrite(folder / PEFT_FILE, lambda tensors: {key: 2 * value for key, value in tensors.items()})
    else:
        edit_json(folder / "adapter_config.json", lora_alpha=1)
    message = f"task 'ocr': ocr-teacher: not the teacher .* sha256 {manifest['ocr'][0]['sha256']}"
    with pytest.raises(ValueError, match=message):
        make_bank(make_pipeline(), {"ocr": str(folder)}, manifest=manifest)
    with pytest.raises(ValueError, match="base: not the teacher"):
        make_bank(make_pipeline(), {"ocr": "base"}, manifest=manifest)
    with pytest.raises(ValueError, match=re.escape("{'ocr': 1}, but is resumed with {'ocr': 2}")):
        make_bank(make_pipeline(), {"ocr": [str(tmp_path / "moved"), "base"]}, manifest=manifest)


# --- the Hub


def test_a_lora_at_another_strength(pipeline, tmp_path):
    make_lora(pipeline, tmp_path / "lora", seed=1)
    spec = str(tmp_path / "lora")
    teachers = {"a": TeacherConfig(spec, lora_scale=0.6), "b": spec, "c": TeacherConfig(spec, lora_scale=0.6)}
    bank = make_bank(pipeline, teachers)
    (weak,), (full,), (same,) = bank.teachers.values()
    assert weak.teacher is same.teacher and weak.teacher is not full.teacher
    deltas = {}
    for name, layer in bank.backbone.network.named_modules():
        if isinstance(layer, LoraLayer) and full.teacher.name in layer.lora_A:
            deltas[name] = [layer.get_delta_weight(role.teacher.name) for role in (weak, full)]
    assert deltas and all(torch.allclose(one, 0.6 * other) for one, other in deltas.values())
    assert [row["lora_scale"] for row in bank.summary()] == [0.6, 1.0, 0.6]
    assert model_identity([weak]) == model_identity([same]) != model_identity([full])
    manifest = json.loads(json.dumps(bank.manifest()))
    make_bank(make_pipeline(), teachers, manifest=manifest)
    with pytest.raises(ValueError, match="lora: its lora_scale is 0.5, but the checkpoint was trained with 0.6"):
        make_bank(make_pipeline(), {**teachers, "a": TeacherConfig(spec, lora_scale=0.5)}, manifest=manifest)


def test_what_is_no_lora_takes_no_strength(pipeline, tmp_path):
    save_full(pipeline, tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"is a whole transformer and takes no lora_scale \(0.5\)"):
        make_bank(pipeline, TeacherConfig(str(tmp_path), lora_scale=0.5))
    with pytest.raises(ValueError, match=r"is the base model itself and takes no lora_scale \(0.5\)"):
        parse_teacher(TeacherConfig("base", lora_scale=0.5))
    for scale in (0, math.nan, math.inf):
        with pytest.raises(
            ValueError, match=f"lora_scale of teacher 'x/y' is {scale}; it must be a finite number other"
        ):
            TeacherConfig("x/y", lora_scale=scale)


class FakeHub:
    """`snapshot_download` on folders `<commit>` of one repository; records which files were asked for."""

    def __init__(self, root, commits):
        self.root, self.commits, self.fetched = root, commits, []

    def __call__(self, repo_id, revision, allow_patterns):
        commit = self.commits.get(revision or "main", revision)
        repository, snapshot = self.root / commit, self.root / "cache" / "snapshots" / commit
        for path in repository.rglob("*"):
            name = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
                self.fetched.append(name)
        return str(snapshot)


@pytest.mark.slow
def test_hub_teachers_are_fetched_alone_and_pinned_on_resume(tmp_path, monkeypatch):
    old, new = "1" * 40, "2" * 40
    pipeline = make_pipeline()
    velocities = {}
    for seed, commit in ((1, old), (2, new)):
        velocities[commit] = forward(make_lora(pipeline, tmp_path / commit / "ocr" / "lora", seed=seed))
        make_lora(pipeline, tmp_path / commit / "other", seed=7)
    whole = save_pipeline(pipeline, tmp_path / new / "sd3", seed=3)
    hub = FakeHub(tmp_path, {"main": old})
    monkeypatch.setattr(hub_errors, "snapshot_download", hub)

    bank = make_bank(make_pipeline(), {"ocr": "owner/repo/ocr/lora", "sd": f"owner/repo/sd3@{new}"})
    assert torch.equal(velocity(bank, bank.teachers["ocr"][0]), velocities[old])
    assert torch.equal(velocity(bank, bank.teachers["sd"][0]), forward(whole))
    assert {name.partition("/")[0] for name in hub.fetched} == {"ocr", "sd3"}
    assert not [name for name in hub.fetched if "vae" in name or "text_encoder" in name]
    entry = bank.manifest()["ocr"][0]
    assert (entry["source"], entry["subfolder"], entry["revision"]) == ("owner/repo", "ocr/lora", old)

    hub.commits["main"] = new
    manifest = {"ocr": bank.manifest()["ocr"]}
    bank = make_bank(make_pipeline(), {"ocr": "owner/repo/ocr/lora"}, manifest=manifest)
    assert torch.equal(velocity(bank, bank.teachers["ocr"][0]), velocities[old])
    bank = make_bank(make_pipeline(), {"ocr": "owner/repo/ocr/lora"})
    assert torch.equal(velocity(bank, bank.teachers["ocr"][0]), velocities[new])


def test_offline_and_missing_repositories_are_named(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"owner/missing@v3: no such folder here, not in the local cache, and the Hub cannot be reached",
    ):
        make_bank(pipeline, "owner/missing/lora@v3")

    for error, message in (
        (RepositoryNotFoundError, "owner/missing@v3: no such folder here and no such repository on the Hub"),
        (RevisionNotFoundError, "owner/missing@v3: the repository has no revision 'v3'"),
    ):
        raises = Mock(side_effect=error("404", response=Mock(headers={})))
        monkeypatch.setattr(hub_errors, "snapshot_download", raises)
        with pytest.raises(ValueError, match=message):
            make_bank(make_pipeline(), "owner/missing/lora@v3")


def test_an_invalid_id_is_named(pipeline):
    with pytest.raises(ValueError, match="own er/r: neither an existing folder nor a valid repository id"):
        make_bank(pipeline, "own er/r")
