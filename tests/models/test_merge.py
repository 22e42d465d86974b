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

"""Merged LoRAs: the mean of the updates and its best approximation, PEFT's methods, files, and what is refused."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers.opd_fixtures import make_dataset, make_trainer
from helpers.tiny_sd3 import ATTENTION, forward, make_lora, make_pipeline, make_transformer
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from trl_diffusion_opd import TeacherConfig, merge_teachers
from trl_diffusion_opd.models.merge import truncated_svd


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of different ranks, alphas, layers and formats."""
    folder = tmp_path_factory.mktemp("teachers")
    make_lora(make_pipeline(), folder / "count", seed=1, rank=4, use_rslora=True)
    make_lora(make_pipeline(), folder / "draw", seed=2, rank=3, lora_alpha=5, format="diffusers")
    make_lora(make_pipeline(), folder / "equal", seed=3, rank=4, target_modules=["attn.to_q", "attn.to_k"])
    return {name: str(folder / name) for name in ("count", "draw", "equal")}


def updates(folder, formats="peft"):
    """`dW` of each layer, in float64, through the weights that PEFT or diffusers merges."""
    base = {name: p.detach().clone() for name, p in make_transformer().double().state_dict().items()}
    if formats == "peft":
        model = PeftModel.from_pretrained(make_transformer().double(), folder, autocast_adapter_dtype=False)
        merged = model.double().merge_and_unload()
    else:
        pipeline = make_pipeline()
        pipeline.load_lora_weights(folder)
        pipeline.transformer.double()
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        merged = pipeline.transformer
    difference = {name: p - base[name] for name, p in merged.state_dict().items()}
    return {name.removesuffix(".weight"): d.numpy() for name, d in difference.items() if d.abs().max() > 0}


def mean_update(teachers, count=0.5, draw=0.5):
    one, two = updates(teachers["count"]), updates(teachers["draw"], "diffusers")
    return {name: count * one[name] + draw * two[name] for name in one}


def norm(values):
    return np.sqrt(sum(np.square(value).sum() for value in values))


def pair(teachers):
    return {"count": teachers["count"], "draw": teachers["draw"]}


def test_truncated_svd_is_numpys():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    a = torch.randn(7, 30, generator=generator, dtype=torch.float64)
    u, s, vh = np.linalg.svd((b @ a).numpy())
    for rank in range(1, 10):
        new_b, new_a, lost, whole = truncated_svd(b, a, rank)
        kept = min(rank, 7)
        assert new_b.shape == (20, kept) and new_a.shape == (kept, 30)
        best = u[:, :kept] * s[:kept] @ vh[:kept]
        assert np.abs((new_b @ new_a).numpy() - best).max() < 1e-12
        assert lost == pytest.approx(np.square(s[kept:7]).sum(), abs=1e-20, rel=1e-12)
        assert whole == pytest.approx(np.square(s).sum())


@pytest.mark.parametrize("rank", [1, 3, 6, 7, 12])
def test_svd_is_the_best_approximation_of_the_mean_update(rank, teachers, tmp_path):
    report = merge_teachers(make_pipeline(), pair(teachers), tmp_path, rank=rank)
    mean, merged = mean_update(teachers), updates(tmp_path)
    lost = []
    for name, update in mean.items():
        u, s, vh = np.linalg.svd(update)
        assert np.abs(merged[name] - u[:, :rank] * s[:rank] @ vh[:rank, :]).max() < 1e-6
        lost.append(np.square(s[rank:]).sum())
        assert report.layers[name] == pytest.approx(np.sqrt(lost[-1] / np.square(s).sum()), abs=1e-7)
    assert report.layers.keys() == mean.keys()
    assert report.error == pytest.approx(np.sqrt(sum(lost)) / norm(mean.values()), abs=1e-7)
    # Two teachers of ranks 4 and 3: nothing is lost from rank 7 on.
    assert (report.error > 1e-3) == (rank < 7)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
    assert json.loads((tmp_path / "merge_report.json").read_text())["error"] == report.error


def test_tasks_and_teachers_are_weighted(teachers, tmp_path):
    specs = {
        "count": [TeacherConfig(teachers["count"], weight=3.0), "base"],  # the base is an update of 0
        "draw": teachers["draw"],
    }
    merge_teachers(make_pipeline(), specs, tmp_path, rank=8, weights={"draw": 3.0})
    expected, merged = mean_update(teachers, count=0.25 * 0.75, draw=0.75), updates(tmp_path)
    assert all(np.abs(merged[name] - expected[name]).max() < 1e-6 for name in expected)
    report = json.loads((tmp_path / "merge_report.json").read_text())
    assert report["weights"] == {"count": 0.25, "draw": 0.75}
    assert [entry["kind"] for entry in report["teachers"]["count"]] == ["lora", "base"]


@pytest.mark.slow
def test_the_mean_of_the_factors_is_not_the_mean_of_the_updates(tmp_path):
    folders = {}
    for seed, task in enumerate(("count", "draw")):
        make_lora(make_pipeline(), tmp_path / task, seed)
        folders[task] = str(tmp_path / task)
    factors = [load_file(tmp_path / task / "adapter_model.safetensors") for task in folders]
    (tmp_path / "naive").mkdir()
    naive = {name: (factors[0][name] + factors[1][name]) / 2 for name in factors[0]}
    save_file(naive, tmp_path / "naive" / "adapter_model.safetensors")
    (tmp_path / "naive" / "adapter_config.json").write_bytes((tmp_path / "count" / "adapter_config.json").read_bytes())
    merge_teachers(make_pipeline(), folders, tmp_path / "svd", rank=8)
    one, two = (updates(folder) for folder in folders.values())
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    far = norm([updates(tmp_path / "naive")[name] - mean[name] for name in mean]) / norm(mean.values())
    near = norm([updates(tmp_path / "svd")[name] - mean[name] for name in mean]) / norm(mean.values())
    assert near < 1e-6 and far > 0.3


def test_what_is_written_loads(teachers, tmp_path):
    pipeline = make_pipeline()
    before = {name: p.clone() for name, p in pipeline.transformer.state_dict().items()}
    merge_teachers(pipeline, pair(teachers), tmp_path, rank=5)
    # The base is as it was, and takes the LoRA.
    assert not any(isinstance(module, LoraLayer) for module in pipeline.transformer.modules())
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    pipeline.load_lora_weights(tmp_path)
    peft = PeftModel.from_pretrained(make_transformer(), tmp_path).eval()
    assert torch.allclose(forward(pipeline.transformer), forward(peft), atol=1e-6)
    assert not torch.allclose(forward(pipeline.transformer), forward(make_transformer()), atol=1e-3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "merge_report.json",
    }


def test_layers_of_one_teacher_alone(teachers, tmp_path):
    specs = {"count": teachers["count"], "equal": teachers["equal"]}
    merge_teachers(make_pipeline(), specs, tmp_path, rank=8)
    one, two, merged = updates(teachers["count"]), updates(teachers["equal"]), updates(tmp_path)
    assert len(two) < len(one) and merged.keys() == one.keys()
    for name in one:
        assert np.abs(merged[name] - (one[name] + two.get(name, 0)) / 2).max() < 1e-6


# PEFT's methods


def test_cat_is_the_mean_itself(teachers, tmp_path):
    report = merge_teachers(make_pipeline(), pair(teachers), tmp_path, method="cat")
    expected, merged = mean_update(teachers), updates(tmp_path)
    assert all(np.abs(merged[name] - expected[name]).max() < 1e-6 for name in expected)
    assert report.rank == 7 and report.error < 1e-6


def test_ties_on_updates(teachers, tmp_path):
    report = merge_teachers(make_pipeline(), pair(teachers), tmp_path, method="ties_svd", density=1.0, rank=16)
    one, two = updates(teachers["count"]), updates(teachers["draw"], "diffusers")
    merged, distance = updates(tmp_path), []
    mean = mean_update(teachers)
    for name in one:
        # At density 1 nothing is pruned: the mean of those that have the sign of the sum.
        sign = np.where(one[name] + two[name] >= 0, 1, -1)
        agree = np.stack([np.sign(one[name]) == sign, np.sign(two[name]) == sign])
        expected = (np.stack([one[name], two[name]]) * agree).sum(0) / np.maximum(agree.sum(0), 1)
        assert np.abs(merged[name] - expected).max() < 1e-5
        distance.append(merged[name] - mean[name])
    assert report.error == pytest.approx(norm(distance) / norm(mean.values()), rel=1e-4)


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
def test_dare_depends_on_its_seed_alone(method, teachers, tmp_path):
    results = []
    for i, seed in enumerate((5, 5, 6)):
        torch.manual_seed(i)
        merge_teachers(make_pipeline(), pair(teachers), tmp_path / str(i), method=method, density=0.5, seed=seed)
        results.append(load_file(tmp_path / str(i) / "adapter_model.safetensors"))
    name = next(iter(results[0]))
    assert torch.equal(results[0][name], results[1][name]) and not torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_methods_on_factors(method, teachers, tmp_path):
    make_lora(make_pipeline(), tmp_path / "other", seed=7, rank=4)
    specs = {"count": teachers["count"], "draw": str(tmp_path / "other")}
    density = None if method == "linear" else 0.6
    report = merge_teachers(make_pipeline(), specs, tmp_path / "out", method=method, density=density)
    assert report.rank == 4 and report.error > 0.1
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path / "out")
    assert torch.isfinite(forward(pipeline.transformer)).all()


# The student of a distillation


def lora(rank=6, **options):
    return LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=ATTENTION, init_lora_weights="gaussian", **options)


def student_update(trainer):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
        for name, module in trainer.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_a_student_starts_from_the_merge(teachers, tmp_path, capsys):
    trainer = make_trainer(tmp_path, pair(teachers), student_init="merge", peft_config=lora(), learning_rate=1e-3)
    mean, update = mean_update(teachers), student_update(trainer)
    for name in mean:
        u, s, vh = np.linalg.svd(mean[name])
        assert np.abs(update[name] - u[:, :6] * s[:6] @ vh[:6]).max() < 1e-5
    assert 0 < trainer.merge_report.error < 1
    assert f"Its rank loses {trainer.merge_report.error:.1%} of it." in " ".join(capsys.readouterr().out.split())
    # It trains, and the teachers don't.
    frozen = [p.detach().clone() for p in trainer.bank.backbone.parameters()]
    trainer.train()
    moved = student_update(trainer)
    assert any(np.abs(moved[name] - update[name]).max() > 1e-6 for name in moved)
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.bank.backbone.parameters(), strict=True))


def test_directions_that_no_teacher_uses_can_be_trained(teachers, tmp_path):
    trainer = make_trainer(tmp_path, pair(teachers), student_init="merge", peft_config=lora(rank=10))
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert bool((b[:, 7:] == 0).all()) and bool((a[7:].abs().sum(1) > 0).all())
            assert bool(a[:7].any())


def test_a_student_without_the_teachers_layers_is_refused(teachers, tmp_path):
    config = LoraConfig(r=4, target_modules=["attn.to_q"])
    with pytest.raises(ValueError, match=r"has no place for \d+ of the layers that the teachers adapt, such as"):
        make_trainer(tmp_path, pair(teachers), student_init="merge", peft_config=config)


def test_full_weights_cannot_start_from_a_merge(teachers, tmp_path):
    with pytest.raises(ValueError, match="student_init names a LoRA to start from, but peft_config=None"):
        make_trainer(tmp_path, pair(teachers), student_init="merge", peft_config=None)


@pytest.mark.slow
def test_a_resumed_run_of_a_merged_student(teachers, tmp_path):
    from helpers.opd_fixtures import StopAt, relative_difference, snapshot

    options = dict(student_init="merge", peft_config=lora(), max_steps=3, learning_rate=1e-2)
    through = make_trainer(tmp_path / "through", pair(teachers), **options)
    through.train()
    make_trainer(tmp_path / "halves", pair(teachers), callbacks=[StopAt(2)], **options).train()
    resumed = make_trainer(tmp_path / "halves", pair(teachers), **options)
    resumed.train(resume_from_checkpoint=True)
    assert relative_difference(snapshot(resumed), snapshot(through)) == 0


# What is refused


def refusal(tmp_path, specs, **options):
    with pytest.raises(ValueError) as error:
        merge_teachers(make_pipeline(), specs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_options_that_do_not_fit_are_told_at_once(teachers, tmp_path):
    message = refusal(
        tmp_path, pair(teachers), rank=0, lora_alpha=0, density=0.5, weights={"style": 1.0, "draw": -1.0}
    )
    for expected in (
        "rank=0: it must be at least 1.",
        "lora_alpha=0: it must be at least 1.",
        "density=0.5: method='svd' prunes nothing.",
        "weights names the task 'style', which has no teacher; teachers are given for ['count', 'draw'].",
        "weights: draw=-1.0 is not a positive number.",
    ):
        assert expected in message
    assert "method='mean': it must be one of svd, cat, linear, ties" in refusal(
        tmp_path, pair(teachers), method="mean"
    )
    assert "method='ties' needs the fraction of the numbers" in refusal(tmp_path, pair(teachers), method="ties")
    assert "PEFT sets it to the rank" in refusal(tmp_path, pair(teachers), method="cat", lora_alpha=3)


def test_teachers_that_do_not_fit_are_refused(teachers, tmp_path):
    message = refusal(tmp_path, pair(teachers), method="linear")
    assert "method='linear' needs teachers of the same rank; theirs are [[4], [3]]. Use 'svd'." in message
    message = refusal(tmp_path, {"count": teachers["count"], "draw": "base"}, method="cat")
    assert "method='cat' merges two LoRAs or more, but there is only one. Use method='svd'." in message
    assert "There is nothing to merge: no teacher is a LoRA." in refusal(tmp_path, "base")
    make_transformer(seed=1).save_pretrained(tmp_path / "whole")
    message = refusal(tmp_path, {"count": teachers["count"], "draw": str(tmp_path / "whole")})
    assert "The teacher of task 'draw', whole, is a whole transformer. Only LoRAs can be merged." in message


def test_a_trainer_with_a_whole_teacher_is_refused(teachers, tmp_path):
    make_transformer(seed=1).save_pretrained(tmp_path / "whole")
    specs = {"count": teachers["count"], "draw": str(tmp_path / "whole")}
    with pytest.raises(ValueError, match="Only LoRAs can be merged"):
        make_trainer(tmp_path / "out", specs, student_init="merge", peft_config=lora(), train_dataset=make_dataset())


# The command


def test_command(teachers, tmp_path, monkeypatch, capsys):
    make_pipeline().save_pretrained(tmp_path / "base")
    specs = [f"{task}={folder}" for task, folder in pair(teachers).items()]
    options = ["--rank", "3", "--method", "svd", "--weights", "draw=2", "--output_dir", str(tmp_path / "out")]
    arguments = ["merge", "--base", str(tmp_path / "base"), "--teachers", *specs, *options]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_module("trl_diffusion_opd.scripts.merge", run_name="__main__")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert f"rank 3 by svd, {report['error']:.2%} from the mean of the updates" in capsys.readouterr().out
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base")
    pipeline.load_lora_weights(tmp_path / "out")
    merge_teachers(make_pipeline(), pair(teachers), tmp_path / "again", rank=3, weights={"draw": 2.0})
    again = make_pipeline()
    again.load_lora_weights(tmp_path / "again")
    assert torch.allclose(forward(pipeline.transformer), forward(again.transformer), atol=1e-5)
