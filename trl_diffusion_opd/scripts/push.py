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

from transformers.utils.hub import hf_api

from ..hub.errors import ERRORS, http_reason, retried
from ..hub.files import CONFIG_FILE, CURVES_PICTURE, LORA_FILES, PICTURES, REPORT_FILE
from ..hub.names import repository_id_problem
from ..hub.push import push_folder, pushed_line
from ..reporting.cards import unnamed_base
from ..reporting.student_card import card_content, name_base, rewrite_card


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="trl-diffusion-opd push",
        description="Uploads the student of a finished run to the Hub. Its card is rendered again with the name of the "
        "repository, and with the evaluation's report if there is one.",
    )
    parser.add_argument("folder", type=Path, help="output folder of the run")
    parser.add_argument("repo_id", help="owner/name of the repository, created if it does not exist")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--hub_base_model", metavar="OWNER/NAME", help="the base's Hub id, if the run had the base from a folder"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="folder of an evaluation, whose report is copied into FOLDER"
    )
    options = parser.parse_args(arguments)
    problems = _problems(options)
    if problems:
        parser.error("\n".join(problems))
    try:
        url = retried(hf_api().create_repo, options.repo_id, private=options.private or None, exist_ok=True)
        _complete(options, url.repo_id)
        push_folder(options.folder, url.repo_id, revision=options.revision)
    except ERRORS as error:
        parser.exit(1, f"The student could not be pushed to {options.repo_id!r}: {http_reason(error)}.\n")
    print(pushed_line(url.repo_id, options.revision))


def _problems(options: argparse.Namespace) -> list[str]:
    folder, base_id = options.folder, options.hub_base_model
    if not any((folder / name).exists() for name in (*LORA_FILES, CONFIG_FILE)):
        return [f"there is no student in {folder}"]
    problems = []
    if base_id is not None and (reason := repository_id_problem(base_id)) is not None:
        problems.append(f"--hub_base_model {base_id}: {reason}")
    content = card_content(folder)
    if content is not None and base_id is None and content["base_id"] is None and not content["is_tiny"]:
        problems.append(f"the student can't be shared yet: {unnamed_base(content['base_name'], '--hub_base_model')}")
    if options.report is not None and not (options.report / REPORT_FILE).exists():
        problems.append(f"--report {options.report}: there is no {REPORT_FILE} in it")
    return problems


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
    main(sys.argv[1:])
