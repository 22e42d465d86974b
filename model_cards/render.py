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
Renders the cards of this folder that show the tiny run, after `make demo`:

    python model_cards/render.py --run outputs/demo

`tiny-student.md` is the card that the run has written, with the pictures of the docs; `tiny-teacher-compose.md` is the
card of one of its teachers. `tiny-report.json` is the report that both show.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from trl_diffusion_opd import tiny, write_teacher_card


HERE = Path(__file__).resolve().parent
IMAGES = "../docs/source/images"
TASK = "compose"


def student_card(card: str) -> str:
    """
    The run's card, with links to the docs' pictures in place of those that lie beside it in the output folder. Its
    gallery is left out, since the images of `completions/` are not kept here.
    """
    card = re.sub(r"(?m)^widget:\n(?:[- ] .*\n)+", "", card)
    card = re.sub(r"<Gallery />\n\n## Images\n.*?(?=\n## )", "", card, flags=re.DOTALL)

    def link(match: re.Match[str]) -> str:
        path = f"{IMAGES}/demo_{match[2]}"
        return f"![{match[1]}]({path})\n\n" if (HERE / path).resolve().exists() else ""

    return re.sub(r"!\[([^\]]*)\]\(([a-z]+\.png)\)\n\n", link, card)


def teacher_card(report: Path) -> str:
    """The card of the tiny world's teacher of [`TASK`]."""
    options = {"num_inference_steps": 10, "height": 32, "width": 32, "max_sequence_length": 12}
    call_options = {"prompt": "two red squares", "guidance_scale": 1.0, **options}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / TASK
        shutil.copytree(tiny.TEACHERS[TASK], copy)
        method = "It was trained by GRPO on the prompts of its task, with the graded verifier as the reward."
        path = write_teacher_card(copy, tiny.BASE, TASK, 1.0, call_options, report=report, method=method)
        return path.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders the cards of the tiny run.")
    parser.add_argument("--run", type=Path, default=HERE.parent / "outputs" / "demo", help="output folder of the demo")
    run = parser.parse_args().run
    report = HERE / "tiny-report.json"
    content = json.loads((run / "retention.json").read_text(encoding="utf-8"))
    report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    card = (run / "README.md").read_text(encoding="utf-8")
    (HERE / "tiny-student.md").write_text(student_card(card), encoding="utf-8")
    (HERE / f"tiny-teacher-{TASK}.md").write_text(teacher_card(report), encoding="utf-8")


if __name__ == "__main__":
    main()
