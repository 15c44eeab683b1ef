"""A Hub on the loopback interface, for the real huggingface_hub client.

It speaks what the client asks for a model: model info with file metadata, the tree, and
``/resolve/`` with HEAD, GET, ETag, X-Repo-Commit, ranges, and for large files a redirect to a
second origin (the "CDN") with X-Linked-Etag and X-Linked-Size. Faults are switched on per file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = re.compile(r".*\.(safetensors|gguf|bin|onnx|pth)")
_PIECE = 1 << 16


@functools.lru_cache(64)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits (hash → name → bytes) and refs (branch or tag → hash). With ``xet``, large files are
    said to be in Xet storage, which this server does not have. Without ``writable`` only pull
    requests are taken, which become refs ``refs/pr/N``."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    xet: bool = False
    writable: bool = True

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit that ``refs`` point to; returns its hash."""
        seed = json.dumps({name: sha256(data) for name, data in files.items()}, sort_keys=True)
        commit = hashlib.sha1(f"{len(self.commits)}{seed}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs |= dict.fromkeys(refs or ("main",), commit)
        return commit


@dataclass(frozen=True)
class Request:
    """One request as it came in; ``cdn`` tells which of the two origins it went to."""

    method: str
    path: str
    headers: dict[str, str]
    cdn: bool


@dataclass
class Faults:
    """What goes wrong: ``cut`` and ``hold`` stop a file's body after so many bytes, once
    (``reset`` makes the cut abrupt); ``damage`` flips a byte of the named files; ``listed_size``
    lies about a size, or with ``None`` leaves it out; ``status`` answers every API request with it.
    ``answers`` are statuses for the next requests of a file, one each (0 for its content),
    and ``cut_all`` stops every body of a large file after so many bytes."""

    cut: dict[str, int] = field(default_factory=dict)
    reset: bool = False
    hold: dict[str, int] = field(default_factory=dict)
    damage: set[str] = field(default_factory=set)
    listed_size: dict[str, int | None] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    cut_all: int | None = None
    ignore_ranges: bool = False
    status: int | None = None


class HubServer:
    """``with HubServer() as hub``: ``hub.url`` is the endpoint, ``hub.requests`` the log."""

    token = "hf_loopback"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        #: Bytes of content that were sent, by the file's name.
        self.served: Counter[str] = Counter()
        self.faults = Faults()
        self.guard = threading.Lock()
        self.held = threading.Event()
        self._release = threading.Event()
        self._servers = [self._serve(cdn=False), self._serve(cdn=True)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def repo(self, name: str, **settings: Any) -> Repo:
        return self.repos.setdefault(name, Repo(**settings))

    def downloads(self) -> list[Request]:
        """GET requests for the content of files, without redirects."""
        return [
            r
            for r in self.requests
            if r.method == "GET"
            and (r.cdn or ("/resolve/" in r.path and not LFS.fullmatch(r.path)))
        ]

    def _serve(self, cdn: bool) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub, Handler.cdn = hub, cdn
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._release.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def wait_for_release(self) -> None:
        self.held.set()
        self._release.wait(60)


#: Kind and id of a repository, as the API names them.
_REPO = r"(models|datasets)/([^/]+/[^/]+)"


def _key(match: re.Match[str]) -> str:
    """The repository's key in ``HubServer.repos``: datasets have their kind before the id."""
    return match[2] if match[1] == "models" else f"{match[1]}/{match[2]}"


def headers_token(headers: Any) -> str | None:
    given = str(headers.get("authorization", ""))
    return given.removeprefix("Bearer ") or None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    cdn: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """What a commit takes: how each file is to be sent, and then the commit itself."""
        headers = {k.lower(): v for k, v in self.headers.items()}
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, path, headers, self.cdn))
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if match := re.fullmatch(rf"/api/{_REPO}/preupload/(.+)", path):
            if self._commit(_key(match), match[3]) is not None:
                files = json.loads(body)["files"]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                made = [{"path": f["path"], **how} for f in files]
                self._json({"files": made})
        elif match := re.fullmatch(rf"/api/{_REPO}/commit/(.+)", path):
            self._add(_key(match), match[3], body, "create_pr" in parse_qs(url.query))
        else:
            self._error(404, None)

    def _add(self, name: str, revision: str, body: bytes, pull_request: bool) -> None:
        if (found := self._commit(name, revision)) is None:
            return
        repo = self.hub.repos[name]
        if headers_token(self.headers) != self.hub.token:
            self._error(401, None)
        elif not repo.writable and not pull_request:
            self._error(403, None)
        else:
            files = dict(found[1])
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    files[entry["value"]["path"]] = content
            number = len(repo.commits)
            ref = f"refs/pr/{number}" if pull_request else "main"
            commit = repo.commit(files, ref)
            made = {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit}
            if pull_request:
                made["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
            self._json(made)

    def _answer(self) -> None:
        headers = {k.lower(): v for k, v in self.headers.items()}
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, path, headers, self.cdn))
        if self.cdn:
            repo, commit, name = path.removeprefix("/cdn/").split(":")
            self._file(name, self.hub.repos[repo].commits[commit][name], {})
        elif match := re.fullmatch(rf"/api/{_REPO}(?:/revision/(.+))?", path):
            self._info(_key(match), match[3] or "main", "blobs" in parse_qs(url.query))
        elif match := re.fullmatch(rf"/api/{_REPO}/tree/([^/]+)/?(.*)", path):
            self._tree(_key(match), match[3])
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif "/xet-read-token/" in path:
            self._error(501, None)
        else:
            self._error(404, "EntryNotFound")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit, or ``None`` after an error has been sent."""
        if self.hub.faults.status:
            self._error(self.hub.faults.status, None)
            return None
        found = self.hub.repos.get(repo)
        if found is None:
            # Without a token, a missing repository and a private one look the same.
            known = self.headers.get("authorization") == f"Bearer {self.hub.token}"
            self._error(404 if known else 401, "RepoNotFound")
            return None
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            self._error(404, "RevisionNotFound")
            return None
        return commit, found.commits[commit]

    def _listing(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        listed = []
        for name, data in sorted(files.items()):
            size = self.hub.faults.listed_size.get(name, len(data))
            entry: dict[str, Any] = {"path": name, "size": size, "oid": git_oid(data)}
            if LFS.fullmatch(name) and size is not None:
                entry["lfs"] = {"sha256": sha256(data), "size": size, "pointerSize": 130}
            listed.append(entry)
        return listed

    def _info(self, repo: str, revision: str, blobs: bool) -> None:
        if (found := self._commit(repo, revision)) is None:
            return
        siblings = [
            {"rfilename": e["path"]}
            | ({"size": e["size"], "blobId": e["oid"], "lfs": e.get("lfs")} if blobs else {})
            for e in self._listing(found[1])
        ]
        gated = "auto" if self.hub.repos[repo].gated else False
        self._json({"id": repo, "modelId": repo, "sha": found[0], "private": False,
                    "gated": gated, "tags": [], "siblings": siblings})  # fmt: skip

    def _tree(self, repo: str, revision: str) -> None:
        if (found := self._commit(repo, revision)) is None:
            return
        entries = self._listing(found[1])
        for entry in entries:
            entry["type"] = "file"
            if "lfs" in entry:
                entry["lfs"]["oid"] = entry["lfs"].pop("sha256")
        self._json(entries)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._commit(repo, revision)) is None:
            return
        commit, files = found
        given = self.headers.get("authorization")
        if self.hub.repos[repo].gated and given != f"Bearer {self.hub.token}":
            self._error(401 if given is None else 403, "GatedRepo")
        elif name not in files:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif LFS.fullmatch(name):
            data = files[name]
            self.send_response(302)
            self.send_header("Location", f"{self.hub.cdn_url}/cdn/{repo}:{commit}:{name}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{sha256(data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
            if self.hub.repos[repo].xet:
                self.send_header("X-Xet-Hash", sha256(data))
                auth = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}"
                self.send_header("Link", f'<{auth}>; rel="xet-auth"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            etag = f'"{git_oid(files[name])}"'
            self._file(name, files[name], {"X-Repo-Commit": commit, "ETag": etag})

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        if name in faults.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        answers = faults.answers.get(name)
        if answers and (status := answers.pop(0)):
            self._error(status, None)
            return
        start, end, size = 0, len(data), len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if wanted and not faults.ignore_ranges:
            start = int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, hold = (
            planned.pop(name) if start <= planned.get(name, -1) < end else None
            for planned in (faults.cut, faults.hold)
        )
        most = start + faults.cut_all if self.cdn and faults.cut_all else None
        stop = min(n for n in (cut, hold, most, end) if n is not None)
        try:
            for at in range(start, stop, _PIECE):
                piece = data[at : min(at + _PIECE, stop)]
                self.wfile.write(piece)
                with self.hub.guard:
                    self.hub.served[name] += len(piece)
            if hold is not None:
                self.wfile.flush()
                self.hub.wait_for_release()
        except OSError:
            return
        finally:
            if stop < end:
                self._hang_up(abruptly=faults.reset)

    def _hang_up(self, abruptly: bool) -> None:
        self.close_connection = True
        if abruptly:
            # A reset throws away what was sent and lies unread.
            time.sleep(0.05)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.wfile.close()
            self.connection.close()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command in ("GET", "POST"):
            self.wfile.write(body)

    def _error(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
