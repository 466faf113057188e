"""A small Hugging Face Hub on 127.0.0.1: what `huggingface_hub` asks of one, and the errors it knows."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml


@dataclass
class Repository:
    """One model or data set: commits with their files, and the names of some of them."""

    commits: dict[str, Path]
    names: dict[str, str]
    """Branch or tag → commit."""
    gated: int = 0
    """Status with which files are refused (401, 403)."""
    private: bool = False


@dataclass
class Hub:
    """What the server holds, and what it was asked for."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of every request."""
    breaks: dict[str, int] = field(default_factory=dict)
    """File name → how many bytes of it go out before the connection drops, once."""
    gone: set[str] = field(default_factory=set)
    """Names of files that are listed and not sent."""
    status: int | None = None
    """What everything is answered with."""
    token: str | None = None
    """The only one that is accepted, where a request has one."""
    writers: dict[str, str] = field(default_factory=dict)
    """Organization → the token that may write there."""
    large: tuple[str, ...] = (".safetensors", ".gguf", ".bin")
    """Endings of files that go to the storage of large ones; all others go along with the commit."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 → content in that storage."""
    posted: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and JSON of every request that brings something."""
    root: Path = Path()
    """Folder for what is committed here."""

    def put(self, name: str, folder: Path, revision: str = "main", **facts: Any) -> str:
        """Make the files below a folder a commit, which the revision then names → its hash."""
        commit = hashlib.sha1(f"{name} {folder} {revision}".encode()).hexdigest()
        found = self.repositories.setdefault(name, Repository({}, {}))
        found.commits[commit] = folder
        found.names[revision] = commit
        for key, value in facts.items():
            setattr(found, key, value)
        return commit

    def fetched(self) -> list[str]:
        """Names of the files that were sent, whole or not."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].partition("/")[2] for path in paths]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        token = self.headers.get("Authorization")
        if self.hub.status is not None:
            return self._refuse(self.hub.status)
        if self.hub.token and token and token != f"Bearer {self.hub.token}":
            return self._refuse(401, message="Invalid credentials in Authorization header")
        for name, found in self.hub.repositories.items():
            for start in (f"/api/models/{name}", f"/api/{name}", f"/{name}"):
                if path == start or path.startswith(f"{start}/"):
                    if found.private and token is None:
                        return self._refuse(401, "RepoNotFound")
                    return self._about(name, found, path.removeprefix(start).strip("/"))
        return self._refuse(401, "RepoNotFound")

    def _about(self, name: str, found: Repository, rest: str) -> None:
        kind, _, rest = rest.partition("/")
        known = {**found.names, **{commit: commit for commit in found.commits}}
        # a branch may hold slashes: the longest name that fits
        fits = [one for one in known if rest == one or rest.startswith(f"{one}/")]
        if not fits and kind:
            return self._refuse(404, "RevisionNotFound")
        revision = max(fits, key=len) if kind else "main"
        commit, file = known[revision], rest.removeprefix(revision).strip("/")
        folder = found.commits[commit]
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if kind == "resolve":
            return self._send_file(found, commit, folder / file)
        sizes = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
        if kind == "tree":
            return self._send(
                [{"type": "file", "path": p, "size": n, "oid": "0" * 40} for p, n in sizes]
            )
        siblings = [{"rfilename": p, "size": n, "blobId": "0" * 40} for p, n in sizes]
        about = {"id": name, "sha": commit, "siblings": siblings, "tags": []}
        return self._send({**about, "private": found.private})

    def _send_file(self, found: Repository, commit: str, file: Path) -> None:
        if found.gated or not file.is_file() or file.name in self.hub.gone:
            refusal = (found.gated, "GatedRepo") if found.gated else (404, "EntryNotFound")
            self._refuse(*refusal)
            return
        data = file.read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if self.headers.get("Range") else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET":
            end = self.hub.breaks.pop(file.name, None)
            self.wfile.write(data[first : None if end is None else first + end])
            if end is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()

    def _take(self) -> None:
        """Requests that bring something."""
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.asked.append((self.command, path, None))
        if self.hub.status is not None:
            return self._refuse(self.hub.status)
        if path.startswith("/storage/"):  # signed addresses of another machine: no token
            return self._store(path.removeprefix("/storage/"), body)
        data = None if path.rpartition("/")[0].endswith("/commit") else json.loads(body)
        self.hub.posted.append((self.command, path, data))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token or (self.hub.token and token != self.hub.token):
            return self._refuse(401, message="Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._validate(data["content"])
        if path == "/api/repos/create":
            name = f"{data['organization']}/{data['name']}"
        else:
            name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if self.hub.writers.get(name.partition("/")[0]) != token:
            return self._refuse(403, message="You do not have the required permissions")
        if path == "/api/repos/create":
            return self._create(name, data)
        if name not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(data)
        if "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(self.hub.large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in data["files"]
            ]
            return self._send({"files": modes})
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400)
        self.hub.objects[oid] = body
        return self._send({})

    def _validate(self, content: str) -> None:
        head = content.split("---\n")
        front = None if len(head) < 3 else yaml.safe_load(head[1])
        if not isinstance(front, dict):
            return self._send({"errors": [{"message": "no front matter"}]}, 400)
        if front.get("base_model_relation") not in (None, "quantized", "finetune"):
            return self._send({"errors": [{"message": "base_model_relation is unknown"}]}, 400)
        return self._send({"errors": [], "warnings": []})

    def _create(self, name: str, data: Any) -> None:
        if name in self.hub.repositories:
            return self._send({"error": "You already created this model repo"}, 409)
        folder = self.hub.root / name / "0"
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        private = data.get("visibility") == "private" or bool(data.get("private"))
        self.hub.put(name, folder, private=private)
        return self._send({"url": f"{self.hub.address}/{name}", "id": name})

    def _batch(self, data: Any) -> None:
        found = []
        for one in data["objects"]:
            actions: dict[str, Any] = {
                "upload": {"href": f"{self.hub.address}/storage/{one['oid']}", "header": {}}
            }
            known = one["oid"] in self.hub.objects
            found.append({**one, **({} if known else {"actions": actions})})
        self._send({"transfer": "basic", "objects": found})

    def _commit(self, name: str, lines: list[Any]) -> None:
        repository = self.hub.repositories[name]
        before = repository.commits[repository.names["main"]]
        folder = before.parent / str(len(repository.commits))
        shutil.copytree(before, folder)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            path = folder / value["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._refuse(400, message="an object is missing")
                path.write_bytes(self.hub.objects[value["oid"]])
            else:
                path.write_bytes(base64.b64decode(value["content"]))
        commit = self.hub.put(name, folder)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return self._send({"success": True, "commitUrl": url, "commitOid": commit})

    def _send(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a Hub without anything on it."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the process's huggingface_hub, which read the environment when it was loaded, use this Hub and cache."""
    from huggingface_hub import constants

    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}{path}")
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.root = cache.parent / "hub"
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
