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

"""The page of all pipelines says what the sweep found, and the families of the tests are among those that work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.families import FAMILIES
from helpers.families_flow import FLOW_FAMILIES
from helpers.noise_families import NOISE_FAMILIES
from helpers.picture_families import PICTURE_FAMILIES


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from sweep_page import OUTCOMES, PAGE, RESULTS, page  # noqa: E402
from sweep_parts.classes import Rule, classes, left_out  # noqa: E402
from sweep_parts.pictures import PICTURES, PICTURES_NOT_BUILT  # noqa: E402
from sweep_parts.videos import FRAMES  # noqa: E402


REPORT = json.loads(RESULTS.read_text())
# Those that begin from a picture are left out of the sweep.
OF_A_PICTURE = {"FluxKontextPipeline", "QwenImageEditPipeline"}


def test_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(REPORT), "run python benchmarks/sweep_page.py"
    assert all(len(line) <= 119 for line in PAGE.read_text().splitlines() if not line.startswith("|"))


def assert_small(name: str, found: dict[str, Any]) -> None:
    assert found["velocity"] <= 1e-5 and found["walk"] <= 1e-4 and found["image"] <= 1e-5 < found["moved"], name


def assert_outcomes(pipelines: dict[str, dict[str, Any]]) -> None:
    for name, found in pipelines.items():
        assert found["outcome"] in OUTCOMES
        if found["outcome"] == "works":
            assert_small(name, found)
        else:
            assert found["reason"], name


def test_every_pipeline_has_an_outcome_and_all_but_those_that_work_a_reason() -> None:
    assert_outcomes(REPORT["pipelines"])


def test_videos_of_several_frames_work() -> None:
    assert REPORT["videos"].keys() == FRAMES.keys()
    for name, found in REPORT["videos"].items():
        assert found["outcome"] == "works" and found["frames"] > 1, name
        assert_small(name, found)


def test_pipelines_that_take_pictures_have_an_outcome() -> None:
    assert REPORT["pictures"].keys() == PICTURES.keys() | PICTURES_NOT_BUILT.keys()
    assert_outcomes(REPORT["pictures"])


@pytest.mark.parametrize("name", PICTURE_FAMILIES)
def test_families_with_pictures_work(name: str) -> None:
    kind = type(PICTURE_FAMILIES[name].family.make()).__name__.removeprefix("_").replace("FromSeeds", "Pipeline")
    assert REPORT["pictures"][kind]["outcome"] == "works"


def test_all_classes_of_diffusers_are_asked() -> None:
    import diffusers

    if diffusers.__version__ != REPORT["diffusers"]:
        pytest.skip(f"the sweep was of diffusers {REPORT['diffusers']}")
    rules = {name: left_out(name, pipeline) for name, pipeline in classes().items()}
    assert {name for name, rule in rules.items() if rule is None} == set(REPORT["pipelines"])
    assert {name: rule.name for name, rule in rules.items() if rule is not None} == REPORT["left_out"]
    assert rules["FluxControlPipeline"] is Rule.GUIDED_BY_INPUT
    assert rules["KandinskyPriorPipeline"] is Rule.NO_TEXT


@pytest.mark.parametrize("name", [*FAMILIES, *FLOW_FAMILIES, *NOISE_FAMILIES])
def test_families_of_the_tests_work(name: str) -> None:
    family = (FAMILIES | FLOW_FAMILIES | NOISE_FAMILIES)[name]
    kind = type(family.make()).__name__
    if kind in OF_A_PICTURE:
        assert REPORT["left_out"][kind] == Rule.GUIDED_BY_INPUT.name
    else:
        assert REPORT["pipelines"][kind]["outcome"] == ("works" if family.trainable else "refused")
