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

"""
The code of README and documentation does what it says. A page's Python blocks run one after another, with one update in place
of many; the arguments of its commands are accepted; its YAML has fields that there are. `<!-- not run: why -->` before a block
says why it does not run. Its syntax and the names of its arguments are looked at all the same.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from helpers.pages import ROOT, Block, blocks, doc_pages
from trl import TrlParser

import trl_diffusion_opd
from trl_diffusion_opd import rewards
from trl_diffusion_opd.scripts.main import main as command_line
from trl_diffusion_opd.scripts.stages import StageSpec


PAGES = [ROOT / "README.md", *doc_pages()]
BLOCKS = {page: blocks(page.read_text(encoding="utf-8")) for page in PAGES}
# What no page's point depends on, and what takes the time.
FEWER = (
    (r"\bmax_steps=\d+", "max_steps=1"),
    (r"\bnum_images(_per_prompt)?=\d+", r"num_images\1=1"),
    (r"\b(height|width)=\d+", r"\1=32"),
    # Prompts of all tasks, for teachers that draw an image of each.
    (r'(\.select_columns\(\["prompt", "task"\]\))', r"\1.shuffle(seed=0).select(range(48))"),
)
TRAINS = ("trainer.train()", "run_stages(", "evaluate_retention(")
# Commands of a shell that need no looking at.
PLAIN = ("cd", "export", "git", "source")


def pages_with(language: str) -> list:
    """Pages that have such blocks to run; those that train are slow."""
    found = []
    for page, of_page in BLOCKS.items():
        texts = [block.text for block in of_page if block.language == language and block.why_not is None]
        slow = language == "python" and any(word in text for text in texts for word in TRAINS)
        if texts:
            found.append(pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if slow else []))
    return found


def every(language: str) -> list:
    found = [(page, block) for page in PAGES for block in BLOCKS[page] if block.language == language]
    return [pytest.param(block, id=f"{page.stem}:{block.line}") for page, block in found]


def test_every_block_says_what_it_is():
    known = {"", "python", "bash", "yaml", "json", "bibtex"}
    for page, of_page in BLOCKS.items():
        assert {block.language for block in of_page} <= known, page
        assert not [block for block in of_page if block.why_not is not None and len(block.why_not) < 8], page


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    namespace = {"__name__": "page"}
    for block in BLOCKS[page]:
        if block.language == "python" and block.why_not is None:
            text = block.text
            for pattern, fewer in FEWER:
                text = re.sub(pattern, fewer, text)
            exec(compile(block.first, f"{page.name}, before line {block.line}", "exec"), namespace)
            # As many lines above it as on the page, so that a traceback names the page's own.
            exec(compile("\n" * block.line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("block", every("python"))
def test_arguments_in_python(block):
    """Also in the blocks that are not run: functions and classes of the package take what they are given."""
    for call in ast.walk(ast.parse(block.text)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            name = call.func.id
            called = getattr(rewards if name in rewards.__all__ else trl_diffusion_opd, name, None)
            if called is not None:
                takes = inspect.signature(called).parameters
                free = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
                unknown = [one.arg for one in call.keywords if one.arg is not None and one.arg not in takes]
                assert free or not unknown, f"{name} has no {unknown}"


@pytest.mark.parametrize(
    "name", ["README.md", "quickstart.md", "diffusion_opd_trainer.md", "tiny_world.md", "tiny_edit.md"]
)
def test_images_are_drawn_as_the_student_was_trained(name):
    """A pipeline's own guidance and text length draw another model than the one that was trained and measured."""
    (page,) = (page for page in PAGES if page.name == name and page.parent in (ROOT, ROOT / "docs" / "source"))
    calls = [
        call
        for block in BLOCKS[page]
        if block.language == "python"
        for call in ast.walk(ast.parse(block.text))
        if isinstance(call, ast.Call)
    ]
    # `options = dict(...)` of a page, for `pipe(prompt, **options)`
    shared = {one.arg for call in calls if ast.unparse(call.func) == "dict" for one in call.keywords}
    drawn = [call for call in calls if re.fullmatch(r"pipe|trainer\.pipeline|pipe\.to\(.*\)", ast.unparse(call.func))]
    for call in drawn:
        given = set().union(*({one.arg} if one.arg else shared for one in call.keywords))
        assert {"guidance_scale", "num_inference_steps", "max_sequence_length"} <= given, ast.unparse(call)
    assert drawn


class Parsed(Exception):
    """A script has taken its arguments, and would now begin. `rest`: those that no option has taken."""

    def __init__(self, rest: list[str]):
        super().__init__()
        self.rest = rest


@pytest.fixture
def stop_when_parsed(monkeypatch):
    """Every parser of arguments raises [`Parsed`] once it has accepted them."""
    parse_args, parse_with_config = argparse.ArgumentParser.parse_args, TrlParser.parse_args_and_config

    def plain(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed([])

    def with_config(self, args=None, **options):
        parsed = parse_with_config(self, args, **options)
        raise Parsed(parsed[-1] if options.get("return_remaining_strings") else [])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", plain)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", with_config)
    monkeypatch.chdir(ROOT)


def check_script(script: str, arguments: list[str], is_module: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script accepts its arguments. Dots among them stand for those of a configuration."""
    if not is_module and not arguments and "parse" not in Path(script).read_text(encoding="utf-8"):
        return  # It takes none, and would begin.
    arguments = [one for part in arguments for one in (CONFIG if part == "..." else [part])]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    known = set(sys.modules)
    with monkeypatch.context() as context:
        if not is_module:
            context.syspath_prepend(Path(script).parent)
        with pytest.raises(Parsed) as stop:
            (runpy.run_module if is_module else runpy.run_path)(script, run_name="__main__")
    assert not stop.value.rest, f"{script} has no option {stop.value.rest}"
    # What lies beside a script is imported by names that another folder may have too.
    for name in set(sys.modules) - known:
        if name.partition(".")[0] != "trl_diffusion_opd" and str(ROOT) in str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]


CONFIG = ["--config", "examples/configs/tiny.yaml"]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = words[next((at for at, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0) :]
    match words:
        case ["make", *targets]:
            written = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(targets) <= set(written)
        case ["pip", "install", *requirements]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for one in requirements:
                for extras in re.findall(r"(?:trl-diffusion-opd|^\.)\[([\w,-]+)\]", one):
                    assert set(extras.split(",")) <= project["optional-dependencies"].keys(), one
        case ["accelerate", "launch", *arguments]:
            launch, rest = launch_command_parser().parse_known_args(arguments)
            assert not rest, rest
            assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
            check_script(launch.training_script, launch.training_script_args, launch.module, monkeypatch)
        case ["python", "-m", module, *arguments]:
            check_script(module, arguments, True, monkeypatch)
        case ["python", script, *arguments]:
            check_script(script, arguments, False, monkeypatch)
        case ["trl-diffusion-opd", command, *arguments]:
            arguments = [one for part in arguments for one in (CONFIG if part == "..." else [part])]
            with pytest.raises(Parsed):  # with what is the launcher's left over; all else it has refused
                command_line([command, *arguments], may_launch=False)
        case _:
            assert words[0] in PLAIN, f"Nothing is known of {words[0]!r}: say why it is not run."


@pytest.mark.usefixtures("stop_when_parsed")
@pytest.mark.parametrize("page", pages_with("bash"))
def test_bash(page, monkeypatch):
    for block in BLOCKS[page]:
        if block.language == "bash" and block.why_not is None:
            for line in block.text.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    if words := shlex.split(command, comments=True):
                        check_command(words, monkeypatch)


@pytest.mark.parametrize("block", every("json"))
def test_json(block: Block):
    for line in block.text.splitlines() if block.text.startswith('{"') else [block.text]:
        json.loads(line)


def options(command: str) -> set[str]:
    """What a configuration file of a command may hold."""
    module = importlib.import_module(f"trl_diffusion_opd.scripts.{command}")
    return {one.name for arguments in module.ARGUMENTS for one in fields(arguments)}


@pytest.mark.parametrize("block", every("yaml"))
def test_yaml(block: Block):
    """A file of stages, a configuration of a command, or a part of a launch configuration."""
    content = yaml.safe_load(block.text)
    if "stages" in content:
        assert content.keys() == {"output_dir", "shared", "stages"}
        for stage in content["stages"]:
            given = {**content["shared"], **stage}
            assert given.keys() <= {one.name for one in fields(StageSpec)}
            names = importlib.import_module(f"trl_diffusion_opd.scripts.{given['trainer']}").ARGUMENTS[1]
            assert given["config"].keys() <= {one.name for one in fields(names)}
    elif not content.keys() <= {one.name for one in fields(ClusterConfig)} | {"parallelism_config"}:
        assert any(content.keys() <= options(command) for command in ("opd", "grpo", "nft", "sft", "dmd"))
