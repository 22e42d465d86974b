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

"""`--teacher_lora_scales` and `--teacher_guidance_scales`."""

import pytest

from trl_diffusion_opd.reporting.console import print_teachers
from trl_diffusion_opd.scripts.arguments import load_teachers


SPECS = ["a=x/one", "b=x/two", "b=x/three"]


def test_scales_are_of_a_tasks_teachers():
    found = load_teachers(SPECS, ["a=2"], ["a=0.6", "b=1", "b=-2"])
    scales = {task: [(one.guidance_scale, one.lora_scale) for one in of_task] for task, of_task in found.items()}
    assert scales == {"a": [(2.0, 0.6)], "b": [(None, 1.0), (None, -2.0)]}
    assert [one.lora_scale for one in load_teachers(SPECS, None, ["b=0.5"])["b"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (["c=1"], r"--teacher_lora_scales: no teacher for task 'c'; teachers are given for \['a', 'b'\]"),
        (["a=strong"], "--teacher_lora_scales: 'strong' for task 'a' is not a number"),
        (["b=1", "b=2", "b=3"], "task 'b' has 2 teachers and 3 scales. Give one for all of them, or one for each"),
        (["a=0"], "lora_scale of teacher 'x/one' is 0.0; it must be a finite number other than 0"),
    ],
)
def test_refuses_scales(scales, message):
    with pytest.raises(ValueError, match=message):
        load_teachers(SPECS, None, scales)


def test_the_table_at_the_start_shows_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    row = dict(task="a", teacher="x", kind="lora", rank=4, guidance_scale=1.0, revision=None, sha256=None)
    print_teachers(
        [{**row, "weight": 0.5, "lora_scale": 0.6}, {**row, "weight": 1.0, "lora_scale": 1.0}], {"a": 1}, None
    )
    assert "weight 0.50, lora_scale 0.6" in " ".join(capsys.readouterr().out.split())
