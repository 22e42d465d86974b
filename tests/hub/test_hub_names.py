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

"""Names of repositories, folders, files and revisions that lead out of a repository are refused, before anything is read."""

import os

import pytest
from helpers.teachers_helpers import make_bank
from helpers.tiny_sd3 import make_lora, make_pipeline
from huggingface_hub import snapshot_download

from trl_diffusion_opd.hub.names import way_out
from trl_diffusion_opd.models.teacher_config import TeacherConfig, parse_teacher
from trl_diffusion_opd.pipelines.loading import load_pipeline
from trl_diffusion_opd.rewards.model_files import find_files


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a/../../b", "'..' is no part"),
        ("..", "'..' is no part"),
        ("a/./b", "'.' is no part"),
        ("a//b", "it has an empty part"),
        ("/etc", "it has an empty part"),
        ("", "it has an empty part"),
        ("a\\..\\b", "it has a backslash"),
        ("C:\\x", "it has a backslash"),
        ("a\x00b", "it has a control character"),
        ("a\u202eb", "it has a control character"),
        ("refs/pr/1", None),
        ("a..b/.hidden/c...safetensors", None),
        ("v1.0-rc.2", None),
        ("日本/é x", None),
    ],
)
def test_ways_out(path, reason):
    found = way_out(path)
    assert found is reason is None or found.startswith(reason)


@pytest.mark.parametrize(
    "spec",
    [
        "someone/repo/../../x",
        "someone/repo/a/../../../x/lora.safetensors",
        "someone/../x",
        "someone/repo/./x",
        "someone/repo/a\\..\\..\\x",
        "someone/repo@../../x",
        "someone/repo@a\\b",
        "someone/repo/x@main/../../y",
    ],
)
def test_teachers_by_their_short_form(spec):
    with pytest.raises(ValueError, match="^Teacher 'someone/.*' is no local file, and on the Hub .* part|backslash"):
        parse_teacher(spec)


@pytest.mark.parametrize(
    "option",
    [
        {"subfolder": "../x"},
        {"subfolder": "a/../../x"},
        {"subfolder": "/etc"},
        {"subfolder": "a\\..\\x"},
        {"weight_name": "../x.safetensors"},
        {"weight_name": "/x.safetensors"},
        {"revision": "../../x"},
    ],
)
@pytest.mark.parametrize("name", ["someone/repo", "."])
def test_teachers_by_their_options(option, name):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} of teacher '{name}' is '.*': .*(part|backslash)"):
        TeacherConfig(name, **option)


def test_what_is_right_is_let_through():
    found = parse_teacher("someone/repo.v2/a-b/c_d/e.safetensors@refs/pr/1")
    assert (found.model_name_or_path, found.subfolder) == ("someone/repo.v2", "a-b/c_d")
    assert (found.weight_name, found.revision) == ("e.safetensors", "refs/pr/1")
    assert parse_teacher(TeacherConfig("someone/repo", subfolder="a/")).subfolder == "a"
    with pytest.raises(ValueError, match="is neither an existing folder") as caught:
        parse_teacher("x" * 10**5)  # longer than a file's name can be
    assert len(str(caught.value)) < 600


def test_no_file_of_this_machine_is_a_teacher_of_the_hub(hub, tmp_path):
    """It would be recorded, and shown in cards, under the commit of the repository."""
    make_lora(make_pipeline(), tmp_path / "lora", 1)
    hub.add_folder("someone/repo", tmp_path / "lora", "a")
    (bank,) = [make_bank(make_pipeline(), "someone/repo/a")]
    assert bank.manifest()["task"][0]["revision"]
    snapshot = snapshot_download("someone/repo")
    out = os.path.relpath(tmp_path / "lora", os.path.realpath(snapshot))
    with pytest.raises(ValueError, match="'..' is no part of a path in a repository"):
        make_bank(make_pipeline(), f"someone/repo/{out}")


def test_rewards_and_bases(hub, tmp_path):
    hub.create("someone/reward", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="valid repository id"):
        find_files("pickscore", "someone/reward/../../x", None, [("config.json",)])
    with pytest.raises(ValueError, match=r"the revision '../../x' can't be one: '\.\.' is no part"):
        find_files("pickscore", "someone/reward", "../../x", [("config.json",)])
    with pytest.raises(ValueError, match="someone/reward/../../x"):
        load_pipeline("someone/reward/../../x", "float32")
    assert not any("x" == part for request in hub.requests for part in request.split("/"))
