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
What `make wheel-check` asks of a wheel and of the source distribution: that they hold what they should and nothing else, and
that the command, the README's ten lines and the snippet after them run where the wheel is installed, away from the checkout.
Needs the standard library alone.

```bash
python tests/check_wheel.py contents dist/trl_diffusion_opd-*.whl
python tests/check_wheel.py source dist/trl_diffusion_opd-*.tar.gz
python tests/check_wheel.py command  # with the Python of the environment that the wheel is installed in
python tests/check_wheel.py readme  # likewise
```
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from zipfile import ZipFile


ROOT = Path(__file__).parents[1]
PACKAGE = "trl_diffusion_opd"
# Without these the package would import but not work.
DATA = (
    "py.typed",
    "accelerate_configs/fsdp2.yaml",
    "configs/tiny.yaml",
    "recipes/sd35_diffusionopd.yaml",
    "stage_configs/tiny_cascade.yaml",
    "tiny/data/compose_train.jsonl",
    "reporting/templates/model_card.md",
    "tiny/weights/base/model_index.json",
    "tiny/weights/teachers/style",
    "tiny/data/edit_local_train.parquet",
    "tiny/weights/edit_base/model_index.json",
    "tiny/weights/edit_teachers/local",
)
# Each of the README's snippets under "Ten lines", then what must be true after it.
AFTER = (
    """
from pathlib import Path

assert Path("cj.png").is_file() and Path("student/pytorch_lora_weights.safetensors").is_file(), list(Path().rglob("*"))
assert len([entry for entry in trainer.state.log_history if "loss" in entry]) > 0, trainer.state.log_history
""",
    """
assert pipe.get_active_adapters(), "no LoRA was loaded"
assert any(weight.any() for name, weight in pipe.transformer.named_parameters() if "lora_B" in name), "the LoRA is zero"
pipe("a red circle", num_inference_steps=2, guidance_scale=1.0, height=32, width=32, max_sequence_length=12)
""",
)


# Folders beside the package that the source distribution has whole, with what links lead to.
SOURCES = ("benchmarks", "docs", "examples", "model_cards", "tests")
# Commands, and a file that is there after each.
SHORT = "--max_steps 2 --eval_strategy no --eval_on_start false --save_strategy no --use_cpu true"
COMMANDS = (
    ("env", ()),
    (f"opd --config tiny {SHORT} --log_completions false --num_test_images 2", ("outputs/demo/retention.json",)),
    (f"sft --config tiny_sft {SHORT} --accelerate_config cpu", ("outputs/sft/pytorch_lora_weights.safetensors",)),
)


def check_contents(wheel: Path) -> None:
    """Exits with what the wheel lacks of the checkout's package, or has beside it."""
    folder = ROOT / PACKAGE
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    expected = {file.relative_to(ROOT).as_posix() for file in files}
    with ZipFile(wheel) as archive:
        entries = set(archive.namelist())
    metadata = {name for name in entries if re.match(rf"{PACKAGE}-[^/]+\.dist-info/", name)}
    found = entries - metadata
    if found != expected:
        sys.exit(f"{wheel.name} lacks {sorted(expected - found)}, has beside the package {sorted(found - expected)}")
    missing = [path for path in DATA if not any(name.startswith(f"{PACKAGE}/{path}") for name in found)]
    if missing or not any(name.endswith("/LICENSE") for name in metadata):
        sys.exit(f"{wheel.name} lacks {', '.join(missing) or 'LICENSE'}")


def check_source(archive: Path) -> None:
    """Exits with what a source distribution lacks of the checkout."""
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    expected = {"pyproject.toml", "Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    for folder, _, names in (one for source in SOURCES for one in os.walk(ROOT / source, followlinks=True)):
        if not {"__pycache__", "results"} & set(Path(folder).parts):
            expected |= {Path(folder, name).relative_to(ROOT).as_posix() for name in names}
    if expected - found:
        sys.exit(f"{archive.name} lacks {sorted(expected - found)}")


def check_command() -> None:
    """Exits with the first command that fails, or leaves no file; all run in one folder, which is empty at first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        for words, files in COMMANDS:
            command = [str(Path(sys.executable).with_name("trl-diffusion-opd")), *words.split()]
            done = subprocess.run(command, cwd=folder, env=environment)
            missing = [name for name in files if not Path(folder, name).is_file()]
            if done.returncode or missing:
                sys.exit(
                    f"trl-diffusion-opd {words}: exit status {done.returncode}, and there is no {', '.join(missing)}"
                )


def snippets() -> list[str]:
    """The Python blocks of the README's section "Ten lines"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Ten lines\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    if len(blocks) != len(AFTER):
        sys.exit(f'README.md: {len(blocks)} Python blocks under "Ten lines", {len(AFTER)} expected')
    return blocks


def check_readme() -> None:
    """Exits with the first snippet that fails; each runs in a process of its own, in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = f"import {PACKAGE}, sys\nassert {PACKAGE}.__file__.startswith(sys.prefix), {PACKAGE}.__file__\n"
    with tempfile.TemporaryDirectory() as folder:
        for number, (snippet, after) in enumerate(zip(snippets(), AFTER, strict=True), start=1):
            script = Path(folder, f"snippet_{number}.py")
            script.write_text(where + snippet + after, encoding="utf-8")
            done = subprocess.run([sys.executable, script.name], cwd=folder, env=environment)
            if done.returncode:
                sys.exit(f'README.md: snippet {number} of "Ten lines" fails where the wheel is installed:\n{snippet}')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("contents", help="what is in a wheel").add_argument("wheel", type=Path)
    commands.add_parser("source", help="what is in a source distribution").add_argument("archive", type=Path)
    commands.add_parser("command", help="the console script, with this Python's packages")
    commands.add_parser("readme", help="the README's snippets, with this Python's packages")
    arguments = parser.parse_args()
    if arguments.command == "contents":
        check_contents(arguments.wheel)
    elif arguments.command == "source":
        check_source(arguments.archive)
    elif arguments.command == "command":
        check_command()
    else:
        check_readme()
