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

"""The pages about choosing settings and about symptoms: their figures are those of the results, or of a page they link to."""

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.pages import ROOT, SOURCE, prose


sys.path.insert(0, str(ROOT / "benchmarks"))

import settings_page  # noqa: E402
import symptoms  # noqa: E402
from scaling import with_tables  # noqa: E402
from settings import CHANGES, retention  # noqa: E402


PAGES = [pytest.param(page, id=page.stem) for page in settings_page.PAGES]
TABLE = re.compile(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
# Figures with two decimals or more. Others (ranks, numbers of updates) are settings and no results.
FIGURE = re.compile(r"(?<![\w.])\d+\.\d{2,}(?![\w.]*\d)")
# What papers and their code say, which no page of ours has.
PUBLISHED = {"11.26", "0.451", "0.926"}


@cache
def tables() -> dict[str, str]:
    return settings_page.read()


def results(name: str) -> list | dict:
    return json.loads(settings_page.RESULTS[name].read_text(encoding="utf-8"))


def numbers(found: object) -> Iterator[float]:
    """Every number in a result."""
    if isinstance(found, dict | list):
        for one in found.values() if isinstance(found, dict) else found:
            yield from numbers(one)
    elif isinstance(found, float):
        yield found


def figures(text: str) -> set[str]:
    return set(FIGURE.findall(text))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text, tables()) == text
    assert TABLE.search(text)


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_its_source(page):
    text = page.read_text(encoding="utf-8")
    linked = {name for name in re.findall(r"\]\((\w+)(?:#[\w-]+)?\)", text) if (SOURCE / f"{name}.md").exists()}
    linked -= {one.stem for one in settings_page.PAGES}
    known = figures("\n".join(tables().values())) | PUBLISHED
    known |= {f"{number:.3f}" for name in settings_page.RESULTS for number in numbers(results(name))}
    for name in linked:
        known |= figures((SOURCE / f"{name}.md").read_text(encoding="utf-8"))
    known |= {f"0{figure}" for figure in re.findall(r"(?<![\d.])\.\d{2,}", (SOURCE / "cost.md").read_text())}
    own = figures(prose(TABLE.sub("", text)))
    assert own and not own - known


@pytest.mark.parametrize("page", PAGES)
def test_every_advice_says_what_it_rests_on(page):
    """Each section that has figures says where they come from."""
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        if figures(prose(section)):
            assert re.search(r"[Mm]easured in the tiny world|[Pp]ublished|[Pp]rovoked|rests on", section), section[:40]


def test_what_the_benchmarks_measure_is_in_the_results():
    found = {(result["group"], result["value"]) for result in results("settings")}
    assert found == {(group, value) for group, values in CHANGES.items() for value in values}
    assert set(results("symptoms")) == {"reference", *symptoms.STUDENTS, *symptoms.HACKED}


def test_another_result_is_another_table():
    changed = results("settings")
    start = results("symptoms")["healthy"]["before"]
    before = settings_page.of_settings(changed, start)
    changed[0]["gap"]["compose"] += 0.1
    after = settings_page.of_settings(changed, start)
    assert before != after


def test_retention_is_the_part_of_the_gain():
    scores = {"compose": {"base": 0.2, "teacher": 0.6, "student": 0.5}}
    assert retention({"scores": scores}) == {"compose": pytest.approx(0.75)}
    assert Path(settings_page.PICTURE).exists()
