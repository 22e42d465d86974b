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
A Hub on 127.0.0.1 that keeps everything in memory: what huggingface_hub asks for to create, upload to and download from
model repositories. Large files go the LFS way, so clients need HF_HUB_DISABLE_XET=1. HF_ENDPOINT is read when
huggingface_hub is imported: set it before.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_loopbacktoken"
USER = "tester"
_LARGE = (".safetensors", ".png", ".pt", ".pth", ".bin", ".parquet")


@dataclass
class Commit:
    title: str
    tree: dict[str, bytes]


@dataclass
class Repository:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(title, tree)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class LoopbackHub:
    """
    Serves from a thread while it is entered. Everyone may read; `TOKEN` may write as `USER`.

    Attributes:
        url: what HF_ENDPOINT is to be set to.
        repositories: by `owner/name`.
        requests: method and path of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, repo_id: str) -> Repository:
        repository = self.repositories[repo_id] = Repository()
        repository.commit("main", "initial commit", {})
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[revision]].tree


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # http.server writes a response in pieces, and each would wait for the acknowledgement of the one before: 40 ms.
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
        try:
            for methods, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    answer(self, body, **{name: unquote(part) for name, part in match.groupdict().items()})
                    return
            raise _Refused(404, f"this Hub has no route {self.command} {url.path}")
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused), **({"X-Error-Code": refused.code} if refused.code else {})}
            self._send({"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_id]

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo_id)
        sha = repository.resolve(revision)
        if sha is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha].tree

    # The API

    def whoami(self, body: bytes) -> None:
        self._check_token()
        access = {"displayName": "test", "role": "write"}
        self._send({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": access}})

    def create(self, body: bytes) -> None:
        self._check_token()
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.url}/{repo_id}"
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                self._send({"error": "You already created this model repo", "url": url}, 409)
                return
            self.hub.create(repo_id)
        self._send({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha, tree = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        self._send({"id": repo, "sha": sha, "private": False, "gated": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, tree = self._commit(repo, revision)
        self._send([{"type": "file", "path": path, **_entry(path, tree[path])} for path in sorted(tree)])

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._check_token()
        sha, tree = self._commit(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": _oid(path, tree[path])} if path in tree else {}))
        self._send({"files": answers, "commitOid": sha})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._check_token()
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/_lfs/{entry['oid']}"}}}
            known = entry["oid"] in self.hub.stored
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if known else upload)})
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(422, "the content has another hash")
        self.hub.stored[oid] = body
        self._send({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        self._check_token()
        repository = self._repository(repo)
        if revision not in repository.branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        title = ""
        with self.hub.lock:
            tree = dict(self.hub.files(repo, revision))
            for line in body.splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.stored:
                        raise _Refused(400, f"{value['path']} was never uploaded")
                    tree[value["path"]] = self.hub.stored[value["oid"]]
                else:
                    raise _Refused(400, f"this Hub knows no {key}")
            sha = repository.commit(revision, title, tree)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self._send({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, tree = self._commit(repo, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in tree:
            self._send({}, 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        headers["ETag"] = f'"{_oid(path, tree[path])}"'
        if path.endswith(_LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(tree[path]))}
        self._send(tree[path], headers=headers)


def _oid(path: str, content: bytes) -> str:
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"oid": _oid(path, content), "size": len(content)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 128}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = f"/api/models/{_REPO}"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _MODEL, _Handler.info),
    ("GET", f"{_MODEL}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"{_MODEL}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", f"{_MODEL}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"{_MODEL}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"/{_REPO}[.]git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
