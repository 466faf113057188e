"""A small Hugging Face Hub on 127.0.0.1: what `huggingface_hub` asks of one, and the errors it knows."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


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
        return self._send({"id": name, "sha": commit, "siblings": siblings, "tags": []})

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

    def _send(self, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
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
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
