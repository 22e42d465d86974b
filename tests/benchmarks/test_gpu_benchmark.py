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

"""The command that measures a GPU, in small on a CPU: on the day of a GPU the script is not what fails."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_page  # noqa: E402
from gpu_parts.report import Report, without_paths  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_part_in_small(part, tmp_path):
    gpu.run_part(part, "cpu", tmp_path)
    report = json.loads((tmp_path / f"{part}.json").read_text())
    assert report["device"] == "cpu" and report["machine"]["torch"]
    assert len(report["checks"]) > 1
    assert [name for name, check in report["checks"].items() if not check["passed"]] == []


def test_a_check_that_fails_is_told_and_does_not_stop_the_others(tmp_path):
    report = Report("smoke", "cpu", tmp_path)
    report.check("raises", lambda: {}["missing"])
    report.check("does not hold", lambda: {"passed": False, "difference": 3.0})
    report.check("measures", lambda: {"seconds": 1.5})
    checks = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert [check["passed"] for check in checks.values()] == [False, False, True]
    assert checks["raises"]["error"].startswith("KeyError: 'missing' (test_gpu_benchmark.py:")
    assert checks["does not hold"]["difference"] == 3.0


def test_errors_have_no_folders_of_the_machine():
    text = without_paths(f"no {ROOT}/a.py, {Path.home()}/b, /usr/lib/python3/site-packages/torch/c.py")
    assert text == "no …/a.py, …/b, …/torch/c.py"


def test_a_part_that_is_cut_off_says_so(processes, tmp_path, capsys):
    assert not gpu.launch("smoke", "cpu", tmp_path, limit=0.5)
    report = json.loads((tmp_path / "smoke.json").read_text())
    assert report["ended"] == "cut off after 0.5 s" and report["checks"] == {}
    assert "smoke: cut off after 0.5 s" in capsys.readouterr().out


def test_no_part_begins_when_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), "--minutes", "0", "--device", "cpu"])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert "large: not begun, the 0 minutes are over" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_parts_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    gpu.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu.PARTS)


def test_page_is_what_the_results_say(tmp_path):
    page = gpu_page.PAGE.read_text()
    assert gpu_page.drawn(page) == page
    assert gpu_page.drawn(page, tmp_path).count("**Not run on a GPU yet.**") == len(gpu.PARTS)
