"""A Hugging Face Hub of one's own: real HTTP on 127.0.0.1, the endpoints and headers that huggingface_hub relies on.

Folders are pushed as commits. Large files (safetensors, pickles, GGUF) live in a second server, the content store, and
the Hub answers for them with a redirect to a signed address, as the real one does. Every request is recorded, with the
bytes that went out; faults can be queued for the next reads of large files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".gguf")
API = re.compile(r"/api/models/(?P<repo>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+)/?)?")
RESOLVE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Request:
    """One request: the server ("hub" or "store"), what was asked of it and how many body bytes it sent."""

    server: str
    method: str
    path: str
    file: str | None
    authorization: str | None
    range: tuple[int, int] | None
    status: int = 0
    sent: int = 0


@dataclass
class Commit:
    id: str
    folder: Path

    def file(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None


@dataclass
class HubServer:
    """Use as a context manager. `faults` are taken one by one by GETs of large files: "503", "drop" (the connection
    breaks half-way), "short" (half the bytes, in a well-formed answer). `latency_s` precedes every answer."""

    gated: set[str] = field(default_factory=set)
    faults: deque[str] = field(default_factory=deque)
    ignores_ranges: bool = False
    has_store: bool = True
    latency_s: float = 0.0
    retry_after: str | None = "0"
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._repos: dict[str, dict[str, Commit]] = {}
        self._signatures: set[str] = set()
        self._counter = itertools.count()

    def __enter__(self) -> HubServer:
        self._hub, self._store = (_serve(handler, self) for handler in (_Hub, _Store))
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    def push(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Makes the files of `folder` the head of a branch; returns the commit. The folder is served in place."""
        commit = Commit(hashlib.sha1(f"{repo} {next(self._counter)}".encode()).hexdigest(), folder)
        self._repos.setdefault(repo, {}).update({branch: commit, commit.id: commit})
        return commit.id

    def expire_addresses(self) -> None:
        """From now on the store refuses every address that was handed out before."""
        self._signatures.clear()

    def large_reads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET" and _is_large(request.file)]

    def address(self, repo: str, commit: Commit, file: str) -> str:
        signature = str(next(self._counter))
        self._signatures.add(signature)
        return f"http://127.0.0.1:{self._store.server_port}/{commit.id}/{repo}/{file}?signature={signature}"

    def is_valid(self, signature: str) -> bool:
        return signature in self._signatures

    def has(self, repo: str) -> bool:
        return repo in self._repos

    def commit(self, repo: str, revision: str) -> Commit | None:
        return self._repos[repo].get(revision)

    def commit_by_id(self, id: str) -> Commit:
        return next(commits[id] for commits in self._repos.values() if id in commits)


def _serve(handler: type[_Handler], hub: HubServer) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def _is_large(file: str | None) -> bool:
    return file is not None and file.endswith(LARGE)


def _etag(path: Path) -> str:
    return _sha256(path, path.stat().st_mtime_ns)


@functools.cache
def _sha256(path: Path, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


class _Handler(BaseHTTPRequestHandler):
    """What both servers share: recording, plain answers, and files with ranges and faults."""

    hub: HubServer
    server_name: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._record_and_answer()

    def do_GET(self) -> None:
        self._record_and_answer()

    def log_message(self, *_: object) -> None:
        pass

    def _record_and_answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        self.request_record = Request(
            self.server_name, self.command, path, path.rsplit("/", 1)[-1], self.headers.get("Authorization"),
            (int(wanted[1]), int(wanted[2])) if wanted else None,
        )  # fmt: skip
        self.hub.requests.append(self.request_record)
        time.sleep(self.hub.latency_s)
        self.answer(urlsplit(self.path))

    def answer(self, url) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """An answer with `body`; header names have _ for -."""
        self.send_head(status, len(body), **headers)
        self.send_body(body)

    def send_head(self, status: int, length: int, **headers: str) -> None:
        self.request_record.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_body(self, body: bytes) -> None:
        if self.command == "GET":
            self.wfile.write(body)
            self.request_record.sent += len(body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def send_file(self, path: Path, **headers: str) -> None:
        headers |= {"ETag": f'"{_etag(path)}"', "Accept_Ranges": "bytes"}
        fault = self.hub.faults.popleft() if self._is_faulty() else None
        if fault == "503":
            again = {"Retry_After": self.hub.retry_after} if self.hub.retry_after is not None else {}
            self.send(503, b"overloaded", **again)
            return
        size = path.stat().st_size
        first, last, status = 0, size - 1, 200
        if self.request_record.range and not self.hub.ignores_ranges:
            first, last = self.request_record.range
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            status = 206
        body = _read(path, first, last + 1) if self.command == "GET" else bytes(last + 1 - first)
        half = body[: len(body) // 2]
        self.send_head(status, len(half if fault == "short" else body), **headers)
        self.send_body(body if fault is None else half)
        if fault == "drop":
            self.close_connection = True

    def _is_faulty(self) -> bool:
        return self.command == "GET" and _is_large(self.request_record.file) and bool(self.hub.faults)


class _Hub(_Handler):
    server_name = "hub"

    def answer(self, url) -> None:
        match = API.fullmatch(url.path) or RESOLVE.fullmatch(url.path)
        if not match:
            self.send(404)
            return
        asked = {name: unquote(value) for name, value in match.groupdict().items() if value}
        repo, revision = asked["repo"], asked.get("revision", "main")
        if not self.hub.has(repo):
            self._refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        elif (commit := self.hub.commit(repo, revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif "file" in asked:
            self._answer_file(repo, commit, asked["file"])
        elif asked.get("what") == "tree":
            self.send_json([_tree_entry(path, commit) for path in _files(commit)])
        else:
            siblings = [{"rfilename": str(path.relative_to(commit.folder))} for path in _files(commit)]
            gated = "manual" if repo in self.hub.gated else False
            self.send_json({"id": repo, "sha": commit.id, "siblings": siblings, "private": False, "gated": gated})

    def _answer_file(self, repo: str, commit: Commit, file: str) -> None:
        path = commit.file(file)
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 403 if self.headers.get("Authorization") else 401
            self._refuse(status, "GatedRepo", f"Access to model {repo} is restricted.")
        elif path is None:
            self._refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.id)
        elif _is_large(file) and self.hub.has_store:
            self.send(
                302, Location=self.hub.address(repo, commit, file), X_Repo_Commit=commit.id,
                X_Linked_Size=str(path.stat().st_size), X_Linked_Etag=f'"{_etag(path)}"',
            )  # fmt: skip
        else:
            self.send_file(path, X_Repo_Commit=commit.id)

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self.send(status, X_Error_Code=code, X_Error_Message=message, **headers)


class _Store(_Handler):
    server_name = "store"

    def answer(self, url) -> None:
        _, commit, *_, file = url.path.split("/")
        if not self.hub.is_valid(parse_qs(url.query)["signature"][0]):
            self.send(403, b"Request has expired")
        else:
            self.send_file(self.hub.commit_by_id(commit).folder / file)


def _files(commit: Commit) -> list[Path]:
    return sorted(path for path in commit.folder.rglob("*") if path.is_file())


def _tree_entry(path: Path, commit: Commit) -> dict:
    size = path.stat().st_size
    entry = {"type": "file", "path": str(path.relative_to(commit.folder)), "size": size, "oid": _etag(path)[:40]}
    if _is_large(path.name):
        entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 134}
    return entry
