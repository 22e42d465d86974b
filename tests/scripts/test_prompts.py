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

"""`trl-diffusion-opd prompts`, from a server in the test and from a folder. The lines are those of the real files' kinds."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trl_diffusion_opd.data.prompt_files import load_source
from trl_diffusion_opd.problems import Refusal
from trl_diffusion_opd.rewards.geneval_rules import Clause, parse_metadata
from trl_diffusion_opd.scripts import flow_grpo_prompts
from trl_diffusion_opd.scripts.main import main
from trl_diffusion_opd.scripts.prompts import NOTICE_FILE
from trl_diffusion_opd.scripts.prompts import main as prompts
from trl_diffusion_opd.scripts.refusals import REFUSED


COUNTED = {
    "tag": "counting",
    "include": [{"class": "bus", "count": 2}],
    "exclude": [{"class": "bus", "count": 3}],
    "prompt": "a photo of two buses",
}
PLACED = {
    "tag": "position",
    "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}],
    "prompt": "a photo of a cow right of a laptop",
}
GENEVAL = "".join(json.dumps(row) + "\n" for row in (COUNTED, PLACED)).encode()
OCR = 'A mug labeled "Campfire Brew"\nA café, a sign reads “OPEN”\n\n'.encode()
PICKSCORE = b", fantasy, pastel\r\na crow with cameras for eyes\n"
FILES = {
    f"dataset/{path}": content
    for split in ("train", "test")
    for path, content in {
        f"geneval/{split}_metadata.jsonl": GENEVAL,
        f"ocr/{split}.txt": OCR,
        f"pickscore/{split}.txt": PICKSCORE,
        f"pickscore_sfw/{split}.txt": PICKSCORE,
    }.items()
}


class Server:
    """Gives `files`, and for the paths in `faults` the whole answer that is there, after which it hangs up."""

    def __init__(self) -> None:
        self.files, self.faults, self.asked = dict(FILES), {}, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.removeprefix("/mirror/")
                server.asked.append(path)
                if path in server.faults:
                    self.wfile.write(server.faults[path])
                    return
                content = server.files.get(path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/mirror"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(*words: str) -> str:
    with pytest.raises(Refusal) as caught:
        prompts(words)
    return str(caught.value)


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_three_sets_are_written_and_read_back(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "geneval", "ocr", "pickscore", "--output", "p", "--source", f"{server.url}/"]) == 0
    printed = capsys.readouterr().out
    assert "geneval_train.jsonl: 2 prompts\n" in printed and "licence MIT" in printed and "unfiltered" in printed
    assert server.asked == [path for path in sorted(FILES, key=lambda path: path.split("/")[1]) if "sfw" not in path]
    assert {path.name for path in Path("p").iterdir()} == {
        *(f"{name}_{split}.jsonl" for name in ("geneval", "ocr", "pickscore") for split in ("train", "test")),
        NOTICE_FILE,
    }
    assert rows("p/geneval_train.jsonl") == [{"task": "geneval", **row} for row in (COUNTED, PLACED)]
    assert rows("p/ocr_test.jsonl") == [
        {"prompt": 'A mug labeled "Campfire Brew"', "task": "ocr"},
        {"prompt": "A café, a sign reads “OPEN”", "task": "ocr"},
    ]
    assert [row["prompt"] for row in rows("p/pickscore_train.jsonl")] == [
        ", fantasy, pastel",
        "a crow with cameras for eyes",
    ]
    # As the training commands and the reward read them, where a column mixes texts and numbers.
    read = load_source("prompts", "p/geneval_test.jsonl").dataset
    placed = parse_metadata(dict(read[1]))
    assert (placed.tag, placed.include[1]) == ("position", Clause("cow", 1, None, ("right of", 0)))
    assert parse_metadata(dict(read[0])).exclude == (Clause("bus", 3),)
    notice = Path("p", NOTICE_FILE).read_text()
    assert flow_grpo_prompts.COMMIT in notice and "MIT" in notice


def test_a_folder_instead_of_the_network() -> None:
    for path, content in FILES.items():
        Path("copy", path).parent.mkdir(parents=True, exist_ok=True)
        Path("copy", path).write_bytes(content)
    prompts(["pickscore_sfw", "--source", "copy"])
    assert {row["task"] for row in rows("prompts/pickscore_sfw_train.jsonl")} == {"pickscore"}
    Path("copy/dataset/ocr/test.txt").unlink()
    assert "ocr/test.txt cannot be read: No such file" in refusal("ocr", "--source", "copy")


def test_what_is_there_is_replaced_only_when_asked(server: Server) -> None:
    Path("prompts").mkdir()
    Path("prompts/ocr_test.jsonl").write_text("mine")
    said = refusal("ocr", "--source", server.url)
    assert "prompts has ocr_test.jsonl already" in said and "--overwrite" in said
    assert server.asked == [] and Path("prompts/ocr_test.jsonl").read_text() == "mine"
    prompts(["ocr", "--source", server.url, "--overwrite"])
    assert len(rows("prompts/ocr_test.jsonl")) == 2
    assert "prompts/ocr_test.jsonl is a file; name a folder" in refusal("ocr", "--output", "prompts/ocr_test.jsonl")


def test_lines_that_the_reward_cannot_score_are_left_out(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.files["dataset/ocr/train.txt"] = b'a sign\na sign "A"\na sign ""\n'
    wrong = json.dumps({**COUNTED, "tag": "sorting"}).encode()
    server.files["dataset/geneval/test_metadata.jsonl"] = wrong + b"\n" + GENEVAL
    prompts(["ocr", "geneval", "--source", server.url])
    printed = capsys.readouterr().out
    assert "ocr_train.jsonl: 1 prompts; 2 left out (line 1: it quotes no text" in printed
    assert "geneval_test.jsonl: 2 prompts; 1 left out (line 1: its metadata" in printed
    server.files["dataset/ocr/train.txt"] = b"a sign\n"
    said = refusal("ocr", "--source", server.url, "--overwrite")
    assert "ocr/train.txt has no prompt that can be used: line 1: it quotes no text" in said


def whole(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


JSONL, TEXT = "dataset/geneval/test_metadata.jsonl", "dataset/ocr/test.txt"
FAULTS = {
    "404": (TEXT, whole(b"404: Not Found", "404 Not Found"), "answered 404 Not Found: '404: Not Found'"),
    "redirect": (TEXT, whole(b"", "302 Found", "Location: http://login.test/"), "302 Found to http://login.test/"),
    "cut off": (TEXT, whole(OCR, length=len(OCR) + 9), "cannot be fetched: peer closed connection"),
    "a web page": (TEXT, whole(b"\n<!DOCTYPE html><title>Sign in</title>"), "is a web page and not the file: '"),
    "a web page for jsonl": (JSONL, whole(b"<html>Sign in"), "is a web page and not the file: '<html>Sign in'"),
    "no JSON": (JSONL, whole(GENEVAL + b"version 1\n"), "line 3: it is not JSON (Expecting value: line 1"),
    "deep JSON": (JSONL, whole(b"[" * 10**5), "line 1: it is not JSON ("),
    "no object": (JSONL, whole(GENEVAL + b"[1]\n"), "line 3: it is no JSON object with a text 'prompt': '[1]'"),
    "no prompt": (JSONL, whole(b'{"tag": "counting"}\n'), "line 1: it is no JSON object with a text 'prompt'"),
    "not UTF-8": (TEXT, whole(OCR + b"\xff\xfe\n"), "line 4: it is not in UTF-8"),
    "empty": (TEXT, whole(b"\n \n"), "has no prompt that can be used."),
    "compressed": (TEXT, whole(b"x", "200 OK", "Content-Encoding: gzip"), "an answer compressed by 'gzip'"),
    "too large": (TEXT, whole(b'a "b"\n' * 500), "an answer of more than 2,000 bytes"),
}


@pytest.mark.parametrize(("path", "answer", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_and_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, answer: bytes, expected: str
) -> None:
    monkeypatch.setattr(flow_grpo_prompts, "_MOST_BYTES", 2_000 if path == TEXT else 200_000)
    server.faults[path] = answer
    said = refusal("ocr", "geneval", "--source", server.url)
    assert f"{server.url}/{path}" in said and expected in said
    assert said.startswith("cannot write the prompts:\n- ") and not Path("prompts").exists()


def test_offline_and_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal("ocr", "--source", "http://127.0.0.1:9")
    assert "cannot be fetched: " in said and "HTTPS_PROXY" in said and "name its folder with --source" in said
    assert "'mirror' is no folder here, and no address" in refusal("ocr", "--source", "mirror")
    assert "must not have a user, a password" in refusal("ocr", "--source", "https://me:secret@mirror.test")
    with pytest.raises(SystemExit) as ended:
        main(["prompts", "counting"])
    assert ended.value.code == REFUSED and "invalid choice: 'counting'" in capsys.readouterr().err


def test_the_usual_source_is_a_fixed_commit() -> None:
    """The three files' addresses, as the repository has them at that commit."""
    base = "https://raw.githubusercontent.com/yifan123/flow_grpo/879042cf5707f8b90daa98d147d7deac2317c5da/dataset"
    told = [
        f"{flow_grpo_prompts.RAW_FILES}/{one.path.format(split='train')}" for one in flow_grpo_prompts.SETS.values()
    ]
    assert told == [
        f"{base}/geneval/train_metadata.jsonl",
        f"{base}/ocr/train.txt",
        f"{base}/pickscore/train.txt",
        f"{base}/pickscore_sfw/train.txt",
    ]
