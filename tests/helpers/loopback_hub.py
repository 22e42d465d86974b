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
A fake Hub on 127.0.0.1 that keeps everything in memory. It answers the requests of huggingface_hub for creating
repositories, uploading and downloading, and makes faults on demand.

Large files use LFS (HF_HUB_DISABLE_XET=1) or, with a folder as xet store, xet like real clients. Set HF_ENDPOINT and
HF_HUB_DISABLE_XET before huggingface_hub is imported, as conftest.py does.
"""

import base64
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_loopbacktoken"
READ_TOKEN = "hf_loopbackreader"
USER = "tester"
_LARGE = (".safetensors", ".png", ".pt", ".pth", ".bin", ".parquet")
_NUMBERS = itertools.count()  # of commits, so that none is like one of a repository that was there before
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass(frozen=True)
class Stored:
    """A large file in a xet store: the Hub knows its hashes and not its content."""

    sha256: str
    size: int
    xet_hash: str


Content = bytes | Stored


@dataclass
class Commit:
    title: str
    tree: dict[str, Content]


@dataclass
class Repository:
    """
    `kind` is model, dataset or space; a private one is shown to `TOKEN` alone, a gated one shows its name and its
    card.
    """

    kind: str = "model"
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, title: str, tree: dict[str, Content]) -> str:
        sha = hashlib.sha1(f"{next(_NUMBERS)} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(title, tree)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """
    What the next `times` requests that match get instead of an answer: an HTTP status, or with status 0 a connection
    that is cut in the middle of the request's body.
    """

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackHub:
    """
    Serves from a thread while it is entered. Everyone may read what is public; `TOKEN` may write as `USER`,
    `READ_TOKEN` may not.

    Args:
        xet_store (`Path`, *optional*): folder that clients use as the store of large files.

    Attributes:
        url: what HF_ENDPOINT is to be set to.
        repositories: models by `owner/name`, datasets and spaces by `datasets/owner/name` and `spaces/owner/name`.
        requests: method and path of every request, in order.
        faults: the [`Fault`]s to come, in order.
    """

    def __init__(self, xet_store: Path | None = None) -> None:
        self.xet_store = xet_store
        self.lock = threading.RLock()
        self.reset()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.repositories: dict[str, Repository] = {}
            self.stored: dict[str, bytes] = {}
            self.requests: list[str] = []
            self.faults: list[Fault] = []

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
            "HF_HUB_DISABLE_XET": "0" if self.xet_store else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> Repository:
        """Makes a repository with `files`; `options` are fields of [`Repository`]."""
        repository = Repository(**options)
        self.repositories[_key(repository.kind, repo_id)] = repository
        repository.commit("main", "initial commit", dict(files or {}))
        return repository

    def add_folder(self, repo_id: str, folder: Path, path_in_repo: str = "") -> str:
        """Commits the files of a local folder without a client, and returns the commit."""
        if repo_id not in self.repositories:
            self.create(repo_id)
        prefix = f"{path_in_repo}/" if path_in_repo else ""
        tree = dict(self.files(repo_id))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        tree |= {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        return self.repositories[repo_id].commit("main", "a folder", tree)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[revision]].tree

    def fail(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """The next requests whose "METHOD /path" matches `pattern` fail; underscores in header names are hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, times, named))

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def xet_hash(self, sha256: str) -> str | None:
        """The xet hash of a file in the store, from the shards that the client has written there."""
        wanted = {bytes.fromhex(sha256), _word_order(bytes.fromhex(sha256))}
        for shard in sorted((self.xet_store or Path()).rglob("*.mdb")):
            for file_hash, sha in _shard_files(shard.read_bytes()):
                if sha in wanted:
                    return _word_order(file_hash).hex()
        return None


def _key(kind: str, repo_id: str) -> str:
    return repo_id if kind == "model" else f"{kind}s/{repo_id}"


def _word_order(data: bytes) -> bytes:
    """Xet writes a hash as four little-endian words, and as text with the words' most significant digit first."""
    return b"".join(data[i : i + 8][::-1] for i in range(0, len(data), 8))


def _shard_files(shard: bytes) -> list[tuple[bytes, bytes]]:
    """Hash and sha256 of the files that a shard lists: records of 48 bytes after a header of as many."""
    found, position = [], 48
    while position + 48 <= len(shard) and shard[position : position + 32] != b"\xff" * 32:
        file_hash = shard[position : position + 32]
        flags = int.from_bytes(shard[position + 32 : position + 36], "little")
        entries = int.from_bytes(shard[position + 36 : position + 40], "little")
        position += 48 * (1 + entries * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            found.append((file_hash, shard[position : position + 32]))
            position += 48
    return found


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
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault is not None and fault.status == 0:
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        try:
            if fault is not None:
                self._send({"error": "injected"}, fault.status, fault.headers)
                return
            for methods, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods:
                    answer(self, body, **{name: unquote(part) for name, part in match.groupdict(default="").items()})
                    return
            raise _Refused(404, f"this Hub has no route {self.command} {url.path}")
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused), **({"X-Error-Code": refused.code} if refused.code else {})}
            self._send({"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

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

    def _token(self) -> str | None:
        """The token of the request, `None` without one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return token

    def _check_write(self, owner: str = USER) -> None:
        token = self._token()
        if token is None:
            raise _Refused(401, "Invalid username or password.")
        if token != TOKEN or owner != USER:
            raise _Refused(403, "Forbidden: you have no write permission here")

    def _repository(self, repo_id: str, kind: str = "models") -> Repository:
        repository = self.hub.repositories.get(_key(_KINDS[kind or "models"], repo_id))
        token = self._token()
        if repository is None or (repository.private and token != TOKEN):
            # As the Hub: who is not logged in can't tell a private repository from none.
            raise _Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repo_id: str, revision: str, kind: str = "models") -> tuple[str, dict[str, Content]]:
        repository = self._repository(repo_id, kind)
        sha = repository.resolve(revision or "main")
        if sha is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha].tree

    # The API

    def whoami(self, body: bytes) -> None:
        token = self._token()
        if token is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        access = {"displayName": "test", "role": "write" if token == TOKEN else "read"}
        self._send({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": access}})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        owner = request.get("organization") or USER
        self._check_write(owner)
        repo_id, kind = f"{owner}/{request['name']}", request.get("type") or "model"
        url = f"{self.hub.url}/{_key(kind, repo_id)}"
        with self.hub.lock:
            if _key(kind, repo_id) in self.hub.repositories:
                self._send({"error": "You already created this repo", "url": url}, 409)
                return
            self.hub.create(repo_id, kind=kind, private=request.get("visibility") == "private")
        self._send({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        """The Hub's own checks are not public: that it is YAML, and the fields whose form its documentation fixes."""
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            data, errors = {}, [{"message": str(error)}]
        for name in ("datasets", "tags"):
            entries = data.get(name, [])
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                errors.append({"message": f'"{name}" must be a list of strings'})
        for name in ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model"):
            if not isinstance(data.get(name, ""), str):
                errors.append({"message": f'"{name}" must be a string'})
        if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "quantized", "merge"):
            errors.append({"message": '"base_model_relation" is unknown'})
        for entry in data.get("model-index", []):
            for result in entry["results"]:
                if not all(result[part].get("type") for part in ("task", "dataset")) or not result["metrics"]:
                    errors.append({"message": '"model-index" has a result without task, dataset or metrics'})
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, body: bytes, kind: str, repo: str, revision: str = "") -> None:
        repository = self._repository(repo, kind)
        sha, tree = self._commit(repo, revision, kind)
        siblings = [{"rfilename": path} for path in sorted(tree)]
        card = tree.get("README.md", b"")
        match = re.match(rb"---\n(.*?)\n---\n", card if isinstance(card, bytes) else b"", re.DOTALL)
        answer = {"id": repo, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings}
        gated = "manual" if repository.gated else False
        self._send(answer | {"gated": gated, "cardData": yaml.safe_load(match[1]) if match else None})

    def auth_check(self, body: bytes, kind: str, repo: str, write: str) -> None:
        self._repository(repo, kind)
        if write:
            self._check_write(repo.split("/")[0])
        self._send({})

    def tree(self, body: bytes, kind: str, repo: str, revision: str, path: str = "") -> None:
        _, tree = self._commit(repo, revision, kind)
        inside = {name: content for name, content in tree.items() if name.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise _Refused(404, f"{path} does not exist", "EntryNotFound")
        self._send([{"type": "file", "path": name, **_entry(name, inside[name])} for name in sorted(inside)])

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        _, tree = self._commit(repo, revision, kind)
        paths = [path for path in parse_qs(body.decode())["paths"] if path in tree]
        self._send([{"type": "file", "path": path, **_entry(path, tree[path])} for path in paths])

    def refs(self, body: bytes, kind: str, repo: str) -> None:
        branches = self._repository(repo, kind).branches
        shown = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()]
        self._send({"branches": shown, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, body: bytes, kind: str, repo: str, branch: str) -> None:
        self._check_write(repo.split("/")[0])
        repository = self._repository(repo, kind)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send({})

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        self._check_write(repo.split("/")[0])
        sha, tree = self._commit(repo, revision, kind)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": _oid(path, tree[path])} if path in tree else {}))
        self._send({"files": answers, "commitOid": sha})

    def lfs_batch(self, body: bytes, kind: str, repo: str) -> None:
        self._check_write(repo.split("/")[0])
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

    def xet_token(self, body: bytes, kind: str, repo: str, revision: str, action: str) -> None:
        if action == "write":
            self._check_write(repo.split("/")[0])
        if self.hub.xet_store is None:
            raise _Refused(404, "this Hub has no xet store")
        url, expires = f"local://{self.hub.xet_store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self._send({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        self._check_write(repo.split("/")[0])
        repository = self._repository(repo, kind)
        if revision not in repository.branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        title = ""
        with self.hub.lock:
            tree = dict(repository.commits[repository.branches[revision]].tree)
            for line in body.splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    tree[value["path"]] = self._large(value)
                elif key == "deletedFile":
                    tree.pop(value["path"], None)
                else:
                    raise _Refused(400, f"this Hub knows no {key}")
            sha = repository.commit(revision, title, tree)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self._send({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def _large(self, value: dict[str, Any]) -> Content:
        if value["oid"] in self.hub.stored:
            return self.hub.stored[value["oid"]]
        xet_hash = self.hub.xet_hash(value["oid"]) if self.hub.xet_store else None
        if xet_hash is None:
            raise _Refused(400, f"{value['path']} was never uploaded")
        return Stored(value["oid"], value["size"], xet_hash)

    def resolve(self, body: bytes, kind: str, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo, kind)
        sha, tree = self._commit(repo, revision, kind)
        headers = {"X-Repo-Commit": sha}
        if repository.gated and self._token() != TOKEN:
            message = f"Access to {repo} is restricted. You must be authenticated to access it."
            headers |= {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self._send({}, 403 if self._token() else 401, headers)
            return
        if path not in tree:
            self._send({}, 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = tree[path]
        headers["ETag"] = f'"{_oid(path, content)}"'
        if path.endswith(_LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(_size(content))}
        if isinstance(content, Stored):
            route = f"{self.hub.url}/api/{kind or 'models'}/{repo}/xet-read-token/{sha}"
            self._send(b"", headers=headers | {"X-Xet-Hash": content.xet_hash, "X-Xet-Refresh-Route": route})
        else:
            self._send(content, headers=headers)


def _size(content: Content) -> int:
    return content.size if isinstance(content, Stored) else len(content)


def _oid(path: str, content: Content) -> str:
    if isinstance(content, Stored):
        return content.sha256
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"oid": _oid(path, content), "size": _size(content)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 128}
    if isinstance(content, Stored):
        entry["xetHash"] = content.xet_hash
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = f"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_FILES = f"/(?:(?P<kind>datasets|spaces)/)?{_REPO}"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _API, _Handler.info),
    ("GET", f"{_API}/revision/{_REVISION}", _Handler.info),
    ("GET", f"{_API}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("POST", f"{_API}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", f"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("GET", f"{_API}/xet-(?P<action>read|write)-token/{_REVISION}", _Handler.xet_token),
    ("POST", f"{_API}/commit/{_REVISION}", _Handler.commit),
    ("POST", f"{_FILES}[.]git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"{_FILES}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
