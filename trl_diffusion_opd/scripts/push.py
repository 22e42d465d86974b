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
Uploads the student of a finished run to the Hub.

```bash
trl-diffusion-opd push sd35-opd me/sd35-opd
```
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..hub.errors import ERRORS, http_reason
from ..hub.files import CONFIG_FILE, CURVES_PICTURE, LORA_FILES, PICTURES, REPORT_FILE
from ..hub.names import repository_id_problem
from ..hub.push import push_folder, push_problems, pushed_line
from ..hub.repository import PushError, make_repository
from ..problems import Problems, Refusal
from ..reporting.cards import unnamed_base
from ..reporting.student_card import card_content, name_base, rewrite_card
from .refusals import RefusingParser, refusals_told


def main(arguments: Sequence[str]) -> None:
    """
    Runs the command.

    Raises:
        [`Refusal`]: if the student can't be pushed there. Nothing was changed then, neither on the Hub nor in the
            folder.
        [`SystemExit`]: if a push that was begun fails.
    """
    options = _parser().parse_args(arguments)
    _refuse(options)
    try:
        repo_id = make_repository(options.repo_id, private=options.private or None, revision=options.revision)
        _complete(options, repo_id)
        push_folder(options.folder, repo_id, revision=options.revision)
    except (PushError, *ERRORS) as error:
        print(f"The student could not be pushed to {options.repo_id!r}: {http_reason(error)}.", file=sys.stderr)
        sys.exit(1)
    print(pushed_line(repo_id, options.revision))


def _parser() -> argparse.ArgumentParser:
    parser = RefusingParser(
        prog="trl-diffusion-opd push",
        description="Uploads the student of a finished run to the Hub. Its card is rendered again with the name of the "
        "repository, and with the evaluation's report if there is one. A repository that holds something else, such "
        "as a whole pipeline or a LoRA for another base, is refused.",
    )
    parser.add_argument("folder", type=Path, help="output folder of the run")
    parser.add_argument("repo_id", help="owner/name of the repository, created if it does not exist")
    parser.add_argument("--revision", help="branch to commit to, created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--hub_base_model", metavar="OWNER/NAME", help="the base's Hub id, if the run had the base from a folder"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="EVALUATION",
        help="output folder of an evaluation, if it is another one than the run's: its report and pictures are copied "
        "to the run's, and pushed with it",
    )
    return parser


def _refuse(options: argparse.Namespace) -> None:
    folder, base_id = options.folder, options.hub_base_model
    if not any((folder / name).exists() for name in (*LORA_FILES, CONFIG_FILE)):
        raise Refusal(f"cannot push: there is no student in {folder}")
    problems = Problems()
    if base_id is not None and (reason := repository_id_problem(base_id)) is not None:
        problems.append(f"--hub_base_model {base_id}: {reason}")
    content = card_content(folder)
    if content is not None and base_id is None and content["base_id"] is None and not content["is_tiny"]:
        problems.append(f"the student can't be shared yet: {unnamed_base(content['base_name'], '--hub_base_model')}")
    if options.report is not None and not (options.report / REPORT_FILE).exists():
        problems.append(f"--report {options.report}: there is no {REPORT_FILE} in it")
    problems += push_problems(folder, options.repo_id, base_id)
    problems.raise_under("cannot push")


def _complete(options: argparse.Namespace, repo_id: str) -> None:
    """Copies the report, and brings the names in the card and in the LoRA's config up to date."""
    folder, base_id = options.folder, options.hub_base_model
    if options.report is not None and options.report.resolve() != folder.resolve():
        for name in (REPORT_FILE, *PICTURES):
            if name != CURVES_PICTURE and (options.report / name).exists():
                shutil.copyfile(options.report / name, folder / name)
    if base_id is not None:
        name_base(folder, base_id)
    left_alone = rewrite_card(folder, repo_id, base_id)
    if left_alone is not None:
        print(left_alone)


if __name__ == "__main__":
    with refusals_told():
        main(sys.argv[1:])
