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

"""Rows with pictures through whole trainers: what is learnt, what rewards see, what is saved, and what is refused."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.edit_families import EDIT_FAMILIES, EditFamily, picture, small_pictures
from helpers.families import FAMILIES, save_teacher
from helpers.family_fixtures import family_trainer
from helpers.picture_families import PICTURE_FAMILIES
from helpers.pipeline_recorder import recorder
from PIL import Image

from trl_diffusion_opd import DiffusionOPDTrainer, evaluate_retention
from trl_diffusion_opd.algorithms.rollout import sample_generators
from trl_diffusion_opd.data.pictured_prompt import SOURCE_IMAGES, with_pictures
from trl_diffusion_opd.data.source_images import has_source_images, plain_source_images
from trl_diffusion_opd.evaluation import rehearse_report, report_problems
from trl_diffusion_opd.pipelines.velocity import VelocityField
from trl_diffusion_opd.scripts.prompt_sources import load_prompts
from trl_diffusion_opd.trainer import training_pictures


pytestmark = pytest.mark.slow

SEED, STEPS = 5, 2
KLEIN = EDIT_FAMILIES["flux2_klein"]
PROMPT = "make it blue"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with small_pictures():
        yield


def rows() -> list[dict[str, Any]]:
    """Two tasks: one draws from text alone, and the rows of the other have one or two pictures."""
    return [
        {"prompt": "a red cat", "task": "draw", "source_images": []},
        {"prompt": PROMPT, "task": "edit", "source_images": [picture(1)]},
        {"prompt": PROMPT, "task": "edit", "source_images": [picture(2, 128, 64), picture(3)]},
    ]


def kept_pictures(seen: list[Any]) -> Any:
    def score(images: list[Image.Image], source_images: list[list[Image.Image]], **columns: Any) -> list[float]:
        seen.extend(source_images)
        return [float(np.asarray(image).mean()) for image in images]

    return score


def make_trainer(folder: Path, teachers: Any, family: Any = KLEIN.family, **options: Any) -> DiffusionOPDTrainer:
    settings = dict(
        train_dataset=Dataset.from_list(rows()),
        num_inference_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-1,
        seed=SEED,
        max_steps=1,
    )
    return family_trainer(family, folder / "student", teachers, **{**settings, **options})


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, torch.nn.Module]]:
    folder = tmp_path_factory.mktemp("teachers")
    models = {task: save_teacher(KLEIN.family, folder / task, seed) for seed, task in enumerate(("draw", "edit"))}
    return {task: str(folder / task) for task in models}, models


def expected_loss(teacher: torch.nn.Module, row: dict[str, Any], task_index: int, edit: EditFamily = KLEIN) -> float:
    """Eq. 12 along the base's own walk of a row, by the pipeline's own loop."""
    family, scale = edit.family, edit.family.guidance_scale
    pipeline = family.build()
    velocity = VelocityField(family.build(), num_inference_steps=STEPS, **family.kwargs)
    pipeline.scheduler = recorder(pipeline.scheduler)
    pipeline(
        **edit.call_kwargs(scale, row["prompt"], row["source_images"]),
        num_inference_steps=STEPS,
        generator=sample_generators([SEED, 0, task_index], [0]),
        output_type="latent",
    )
    sigmas, losses = pipeline.scheduler.sigmas.double(), []
    prompts = [with_pictures(row["prompt"], row["source_images"])]
    with torch.no_grad():
        for j, (level, x, student) in enumerate(pipeline.scheduler.trace[:-1]):
            gap = (student.double() - velocity(x, level, prompts, scale, teacher).double()).square().mean()
            losses.append(float(0.5 * (sigmas[j + 1] - sigmas[j]) ** 2 * gap))
    return sum(losses) / len(losses)


def test_one_update_saved_and_loaded_by_diffusers(
    teachers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, models = teachers
    seen: list[Any] = []
    logged: list[Any] = []
    monkeypatch.setattr(training_pictures, "log_completions", lambda shown, *_: logged.extend(shown))
    evaluated = dict(eval_dataset=Dataset.from_list(rows()), reward_funcs=kept_pictures(seen), log_completions=True)
    trainer = make_trainer(tmp_path, folders, **evaluated)
    given = [row for row in trainer.train_dataset if row["task"] == "edit"]
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    drawn = expected_loss(models["draw"], rows()[0], 0)
    # The sampler chooses one of the task's two rows.
    either = [(drawn + expected_loss(models["edit"], row, 1)) / 2 for row in rows()[1:]]
    assert either[0] != pytest.approx(either[1], rel=1e-2)
    assert min(abs(loss - one) for one in either) < 1e-3 * loss

    seen.clear()
    trainer.evaluate()
    assert sorted(len(pictures) for pictures in seen) == [0, 1, 2] and all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for pictures in seen
        if pictures
        for a, b in zip(pictures, given[len(pictures) - 1]["source_images"], strict=True)
    )

    assert logged and all(("source" in one.beside) == (one.task == "edit") for one in logged)
    source = next(one.beside["source"].image for one in logged if one.task == "edit")
    assert np.array_equal(np.asarray(source), np.asarray(picture(1)))

    trainer.save_model()
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "from diffusers.utils import load_image\n" in card and '    image=load_image("source.png"),\n' in card
    check_loaded(trainer, KLEIN)


def check_loaded(trainer: DiffusionOPDTrainer, edit: EditFamily) -> None:
    """The saved student, loaded by diffusers, draws what the trainer's does."""
    pipe = edit.family.build()
    call = {**edit.call_kwargs(1.0, PROMPT, [picture(1)]), "num_inference_steps": STEPS, "output_type": "np"}
    base = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    pipe.load_lora_weights(trainer.args.output_dir)
    image = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    own = trainer.pipeline(**call, generator=torch.Generator().manual_seed(3)).images
    np.testing.assert_allclose(image, own, atol=1e-5)
    assert np.abs(image - base).max() > 1e-4


@pytest.mark.parametrize("name", [name for name in EDIT_FAMILIES if name != "flux2_klein"])
def test_an_update_of_other_families(name: str, tmp_path: Path) -> None:
    edit = EDIT_FAMILIES[name]
    row = {"prompt": PROMPT, "source_images": [picture(i) for i in range(edit.numbers[-1])]}
    teacher = save_teacher(edit.family, tmp_path / "teacher", 0)
    trainer = make_trainer(tmp_path, str(tmp_path / "teacher"), edit.family, train_dataset=Dataset.from_list([row]))
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(expected_loss(teacher, row, 0, edit), rel=1e-3)
    trainer.save_model()
    check_loaded(trainer, edit)


@pytest.mark.parametrize("column", [SOURCE_IMAGES, "before"])
def test_rows_of_a_file_are_evaluated(column: str, teachers: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    lines = [{"prompt": PROMPT, column: [f"pictures/{i}.png"]} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = load_prompts("prompts", [f"edit={tmp_path / 'rows.jsonl'}"], "task", pictures_column=column)
    seen: list[Any] = []
    report = evaluate_retention(
        KLEIN.family.build(),
        {"edit": teachers[0]["edit"]},
        {"student": teachers[0]["draw"]},
        {"edit": kept_pictures(seen)},
        dataset,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_dir=tmp_path / "report",
        source_images_column=column,
        **KLEIN.family.kwargs,
    )
    assert report is not None and set(report["tasks"]) == {"edit"}
    page = (tmp_path / "report" / "samples.html").read_text()
    for i in range(2):
        source = Image.open(tmp_path / "report" / "sources" / f"edit_{i}.png")
        assert np.array_equal(np.asarray(source), np.asarray(picture(i))) and f'src="sources/edit_{i}.png"' in page
    assert all(np.array_equal(np.asarray(one[0]), np.asarray(picture(i % 2))) for i, one in enumerate(seen[-2:]))


def test_a_report_at_the_end_is_rehearsed_with_pictures(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    dataset = of(prompt=[PROMPT], task=["edit"], before=[[str(tmp_path / "a.png")]])
    seen: list[Any] = []
    rewards = {"edit": [kept_pictures(seen)]}

    def problems(column: str) -> list[str]:
        return report_problems(["edit"], rewards, dataset, "task", "--test_prompts", column)

    def rehearse(family: Any) -> None:
        pipeline, options = family.build(), dict(task_column="task", seed=0, guidance_scale=1.0)
        field = VelocityField(pipeline, num_inference_steps=STEPS, **family.kwargs)
        rehearse_report(field, pipeline.transformer, rewards, dataset, source_images_column="before", **options)

    assert problems("before") == []
    rehearse(KLEIN.family)
    assert seen and all(np.array_equal(np.asarray(source), np.asarray(picture(1))) for (source,) in seen)
    with pytest.raises(ValueError, match="(?s)The report at the end would fail.*StableDiffusion3Pipeline takes none"):
        rehearse(FAMILIES["sd3"])
    assert "--test_prompts has no column 'befor', which source_images_column names" in problems("befor")[0]
    (tmp_path / "a.png").unlink()
    assert "--test_prompts, column 'before', row 0: the picture: there is no file 'a.png'." in problems("before")[0]


def test_a_column_of_another_name(tmp_path: Path) -> None:
    dataset, seen = Dataset.from_list(rows()).rename_column(SOURCE_IMAGES, "before"), []
    options = dict(eval_dataset=dataset, reward_funcs=kept_pictures(seen), source_images_column="before")
    make_trainer(tmp_path, "base", train_dataset=dataset, **options).evaluate()
    assert sorted(map(len, seen)) == [0, 1, 2]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    dataset = of(prompt=["a"], source_images=[[picture(1)]])
    message = "dataset has no column 'before', which source_images_column names; it has ['prompt', 'source_images']."
    assert f"train_{message}" in refusal(tmp_path, dataset, KLEIN.family, source_images_column="before")
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_retention(
            KLEIN.family.build(), "base", "base", kept_pictures([]), dataset, source_images_column="before"
        )


FORMS = {
    "one picture a row": lambda folder: [picture(1), None],
    "names of files": lambda folder: [[str(folder / "a.png")], []],
    "bytes": lambda folder: [[(folder / "a.png").read_bytes()], []],
    "one name a row": lambda folder: [str(folder / "a.png"), None],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_column(form: str, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "pictures": FORMS[form](tmp_path)})
    plain = plain_source_images(dataset, "pictures")
    assert has_source_images(plain) and plain.column_names == ["prompt", "source_images"]
    ((first,), none) = plain["source_images"][:]
    assert first.mode == "RGB" and np.array_equal(np.asarray(first), np.asarray(picture(1))) and not none


def refusal(tmp_path: Path, dataset: Dataset, family: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, "base", family, train_dataset=dataset, **options)
    return str(error.value)


def of(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def test_refusals(tmp_path: Path) -> None:
    qwen, kontext = EDIT_FAMILIES["qwen_image_edit"].family, EDIT_FAMILIES["flux_kontext"].family
    some = of(prompt=["a", "b"], source_images=[[picture(1)], []])
    assert "1 of 2 rows without a picture in 'source_images', the first is row 1." in refusal(tmp_path, some, qwen)
    assert "draws nothing without a picture, and train_dataset has none" in refusal(tmp_path, of(prompt=["a"]), qwen)
    many = of(prompt=["a"], source_images=[[picture(1), picture(2)]])
    assert "has 1 row(s) with 2 picture(s), which FluxKontextPipeline can't take" in refusal(tmp_path, many, kontext)
    assert "height and width are not set" in refusal(tmp_path, many, KLEIN.family, height=None, width=None)
    common = {**kontext.generation_kwargs, "image": picture(1)}
    assert "which all rows would get" in refusal(tmp_path, some, kontext, generation_kwargs=common)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(_png(picture(1))[:200])
    for file, message in (
        ("broken.png", "the picture 'broken.png' can't be read"),
        ("cut.png", "the picture 'cut.png' can't be read"),
        ("missing.png", "there is no file 'missing.png'"),
    ):
        rows = of(prompt=["a", "b"], source_images=[[], [str(tmp_path / file)]])
        told = refusal(tmp_path, rows, KLEIN.family)
        assert "train_dataset, column 'source_images', row 1: " in told and message in told
    numbers = of(prompt=["a"], source_images=[[1]])
    assert "column 'source_images' holds List(Value('int64'))" in refusal(tmp_path, numbers, KLEIN.family)


def test_pictures_that_would_be_drawn_in_another_size_are_refused(tmp_path: Path) -> None:
    longcat = PICTURE_FAMILIES["longcat_edit"]
    wide = of(prompt=["a", "b"], source_images=[[picture(1)], [picture(2, 128, 64)]])
    with longcat.context():
        told = refusal(tmp_path, wide, longcat.family)
        assert "has 1 row(s) with pictures of 128 x 64 pixels" in told and "takes no size" in told
        sizes = of(prompt=["a"] * 33, source_images=[[picture(i, 64 + i, 64)] for i in range(33)])
        assert "has pictures of 33 sizes" in refusal(tmp_path, sizes, longcat.family)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_pipeline_for_text_alone_refuses_pictures(tmp_path: Path) -> None:
    dataset = of(prompt=["a"], source_images=[[picture(1)]])
    assert "StableDiffusion3Pipeline takes none. Remove the column" in refusal(tmp_path, dataset, FAMILIES["sd3"])
