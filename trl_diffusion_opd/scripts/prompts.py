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
Fetches the prompts of the paper's setting and writes them as jsonl files, which `--prompts` and `--test_prompts` of the
training commands read.

```bash
trl-diffusion-opd prompts geneval ocr pickscore --output prompts/
```
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..guards.redaction import shown
from ..problems import Problems, Refusal
from .flow_grpo_prompts import COMMIT, RAW_FILES, REPOSITORY, SETS, SPLITS, Prompts, load_prompts, source_problems
from .refusals import RefusingParser, refusals_told


NOTICE_FILE = "SOURCE.md"
_NOTICE = f"""# Where these prompts are from

`trl-diffusion-opd prompts` took the files `geneval_*`, `ocr_*`, `pickscore_*` and `pickscore_sfw_*` of this folder from
[Flow-GRPO]({REPOSITORY}), commit `{COMMIT}`, or from the copy of it that `--source` named. Each line is one of that
repository's, as JSON. Its licence is MIT: [LICENSE]({REPOSITORY}/blob/{COMMIT}/LICENSE).

`geneval` is made in the manner of [GenEval](https://github.com/djghosh13/geneval). `pickscore` and `pickscore_sfw` are
prompts that people wrote for [Pick-a-Pic](https://huggingface.co/datasets/yuvalkirstain/pickapic_v1).
"""
_UNSAFE = (
    "pickscore holds what people typed, unfiltered: some of it is sexual, violent or unlawful to draw. Its authors "
    "recommend pickscore_sfw."
)


def main(arguments: Sequence[str]) -> None:
    """
    Runs the command.

    Raises:
        [`Refusal`]: if a file cannot be had or is there already. Nothing was written then.
    """
    options = _parser().parse_args(arguments)
    names = list(dict.fromkeys(options.sets))
    files = {options.output / f"{name}_{split}.jsonl": (name, split) for name in names for split in SPLITS}
    problems = Problems(source_problems(options.source))
    problems += _there_already(options.output, [] if options.overwrite else list(files))
    problems.raise_under("cannot write the prompts")
    found: dict[Path, Prompts] = {}
    with problems.collect():
        found = dict(zip(files, load_prompts(options.source, files.values()), strict=True))
    problems.raise_under("cannot write the prompts")
    _write(options.output, found)
    for path, prompts in found.items():
        left_out = f"; {len(prompts.left_out):,} left out ({shown(prompts.left_out[0])})" if prompts.left_out else ""
        print(f"{path}: {len(prompts.rows):,} prompts{left_out}")
    print(f"They are from {REPOSITORY}, licence MIT: see {options.output / NOTICE_FILE}.")
    if "pickscore" in names:
        print(_UNSAFE)


def _parser() -> argparse.ArgumentParser:
    parser = RefusingParser(
        prog="trl-diffusion-opd prompts",
        description=f"Fetches sets of prompts from {REPOSITORY} (MIT) at a fixed commit, and writes a training and a "
        "test file of each, NAME_train.jsonl and NAME_test.jsonl: `prompt`, `task`, and the columns that the task's "
        f"reward reads. {_UNSAFE}",
    )
    parser.add_argument("sets", nargs="+", metavar="NAME", choices=SETS, help=f"one or more of {', '.join(SETS)}")
    parser.add_argument(
        "--output", type=Path, default=Path("prompts"), metavar="FOLDER", help="where to write (default: prompts)"
    )
    parser.add_argument(
        "--source",
        default=RAW_FILES,
        metavar="ADDRESS",
        help="a mirror of the repository's files, or a folder with a copy of it, for machines without a way to GitHub "
        "(default: GitHub)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    return parser


def _there_already(output: Path, files: Sequence[Path]) -> list[str]:
    if output.exists() and not output.is_dir():
        return [f"--output {output} is a file; name a folder."]
    there = [path.name for path in files if path.exists()]
    if not there:
        return []
    return [f"{output} has {', '.join(there)} already. Give --overwrite to replace them, or another --output."]


def _write(output: Path, found: Mapping[Path, Prompts]) -> None:
    """Writes all files, or none."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output, prefix=".prompts-") as folder:
            for path, prompts in found.items():
                with open(Path(folder, path.name), "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in prompts.rows)
            Path(folder, NOTICE_FILE).write_text(_NOTICE, encoding="utf-8")
            for name in [path.name for path in found] + [NOTICE_FILE]:
                Path(folder, name).replace(output / name)
    except OSError as error:
        raise Refusal(f"cannot write the prompts to {output}: {error.strerror}.") from error


if __name__ == "__main__":
    with refusals_told():
        main(sys.argv[1:])
