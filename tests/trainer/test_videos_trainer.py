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

"""A student that films, from its dry run to its evaluation: every place where images are shown has its videos."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.families import save_teacher
from helpers.family_fixtures import family_trainer, prompts_of
from helpers.sft_fixtures import sft_trainer
from helpers.video_families import VIDEOS, of_frames
from peft import LoraConfig
from PIL import Image

from trl_diffusion_opd import estimate_memory, evaluate_retention


WAN = replace(of_frames(VIDEOS["wan"], 5), size=16)
SEEN: list[Any] = []


def change(images: list[Any], **kwargs: Any) -> list[float]:
    """How much neighbouring frames differ."""
    SEEN.extend(images)
    return [float(np.diff([np.asarray(frame, float) for frame in video], axis=0).std()) for video in images]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a dry run, and a run of one update with its evaluation."""
    folder = tmp_path_factory.mktemp("films")
    save_teacher(WAN, folder / "teacher", seed=1)
    trainer = family_trainer(
        WAN,
        folder / "out",
        str(folder / "teacher"),
        train_dataset=prompts_of(WAN, 1),
        eval_dataset=prompts_of(WAN, 1),
        per_device_train_batch_size=1,
        reward_funcs=change,
        num_inference_steps=2,
        eval_num_inference_steps=2,
        max_steps=1,
        log_completions=True,
        num_completions_to_print=1,
        guidance_scale=1.0,
        sampler="ode",
        loss_weighting="velocity",
        num_trained_timesteps=1,
    )
    trainer.dry_run()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return folder


def test_rewards_get_lists_of_frames(run: Path) -> None:
    assert SEEN and all(isinstance(video, list) and len(video) == 5 for video in SEEN)
    assert all(isinstance(frame, Image.Image) and frame.size == (16, 16) for video in SEEN for frame in video)


def test_dry_run_and_completions(run: Path) -> None:
    for stem in ("one_student", "one_base"):
        assert Image.open(run / "out" / "dry_run" / f"{stem}.png").size == (5 * 16, 16)
        assert Image.open(run / "out" / "dry_run" / f"{stem}.gif").n_frames > 1
    assert Image.open(run / "out" / "completions" / "sample_one_1.gif").size == (16, 16)


def test_card(run: Path) -> None:
    card = (run / "out" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "url: completions/sample_one_1.gif" in card
    assert "from diffusers.utils import export_to_video\n" in card and "num_frames=5," in card
    code = card.split("```python")[1].split("```")[0].rstrip()
    assert code.splitlines()[-2] == ").frames[0]"
    assert code.splitlines()[-1].startswith('export_to_video(frames, "video.mp4", fps=16)')
    compile(code, "card", "exec")


def test_evaluation_and_its_page(run: Path) -> None:
    def evaluate() -> Any:
        return evaluate_retention(
            WAN.build(),
            {"one": str(run / "teacher")},
            str(run / "out"),
            change,
            prompts_of(WAN, 1),
            num_inference_steps=2,
            guidance_scale=1.0,
            teacher_guidance_scale=1.0,
            output_dir=run / "report",
            num_samples=1,
            **WAN.kwargs,
        )

    report, drawn = evaluate(), len(SEEN)
    (run / "report" / "scores" / "0.jsonl").unlink()
    assert evaluate() == report, "videos that were read back have other scores"
    stored = sorted((run / "report").glob("images/*/one/00000.zip"))
    assert len(stored) == 3 and len(SEEN) > drawn
    page = (run / "report" / "samples.html").read_text()
    assert page.count("00000.gif") == 3 and page.count('alt="frames"') == 3
    for path in stored:
        assert Image.open(path.with_name("strip_00000.png")).size == (5 * 16, 16)


def test_more_frames_need_more_memory(run: Path, tmp_path: Path) -> None:
    few, many = (
        estimate_memory(family_trainer(of_frames(WAN, n), tmp_path / str(n), str(run / "teacher"))) for n in (1, 17)
    )
    assert many["peak"]["bytes"] > few["peak"]["bytes"]
    # Five latent frames in place of one: what grows with the tokens grows fivefold, the text does not.
    assert 1.5 < many["activations"]["bytes"] / few["activations"]["bytes"] < 5.5


def test_images_of_a_dataset_are_no_videos(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="draws videos of 5 frames, and an image can't be encoded as one. Set num_fra"
    ):
        sft_trainer(tmp_path, pipeline=WAN.build(), peft_config=LoraConfig(target_modules=["to_q"]), **WAN.kwargs)
