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

"""Writes the rows of the world that edits as files, which the command line reads: `python benchmarks/tiny/make_edit_rows.py`."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from datasets import Dataset, List, Value
from PIL import Image

from trl_diffusion_opd import tiny
from trl_diffusion_opd.tiny.edits import EDIT_TASKS, edit_dataset
from trl_diffusion_opd.tiny.prompts import SPLITS


def pictures_as_bytes(pictures: list[Image.Image]) -> list[bytes]:
    """PNG files."""
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        files.append(buffer.getvalue())
    return files


def write_rows(folder: Path) -> None:
    """One file a task and split: jsonl without pictures, parquet with the bytes of one PNG a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for task in EDIT_TASKS:
            rows = edit_dataset(split, (task,)).remove_columns("task")
            path = folder / f"edit_{task}_{split}"
            if task == "draw":
                rows.remove_columns("source_images").to_json(path.with_suffix(".jsonl"))
                continue
            columns = {**rows.to_dict(), "source_images": [pictures_as_bytes(row) for row in rows["source_images"]]}
            features = rows.features.copy()
            features["source_images"] = List(Value("binary"))
            Dataset.from_dict(columns, features=features).to_parquet(path.with_suffix(".parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path(tiny.__file__).parent / "data")
    write_rows(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
