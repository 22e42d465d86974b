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
import os
import sys
from collections.abc import Sequence

from transformers.utils.hub import hf_api

from ..hub.errors import ERRORS, http_reason, retried
from ..hub.files import CONFIG_FILE, LORA_FILES
from ..hub.push import push_folder


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="trl-diffusion-opd push", description="Uploads the student of a finished run to the Hub."
    )
    parser.add_argument("folder", help="output folder of the run")
    parser.add_argument("repo_id", help="owner/name of the repository, created if it does not exist")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options = parser.parse_args(arguments)
    if not any(os.path.exists(os.path.join(options.folder, name)) for name in (*LORA_FILES, CONFIG_FILE)):
        parser.error(f"there is no student in {options.folder}")
    try:
        url = retried(hf_api().create_repo, options.repo_id, private=options.private or None, exist_ok=True)
        commit = push_folder(options.folder, url.repo_id, revision=options.revision)
    except ERRORS as error:
        parser.exit(1, f"The student could not be pushed to {options.repo_id!r}: {http_reason(error)}.\n")
    print(f"Pushed: {commit.commit_url}")


if __name__ == "__main__":
    main(sys.argv[1:])
