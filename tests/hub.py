"""A loopback server that speaks as much of the hub's protocol as downloads and pushes use."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
"""The first commit of a repository that is served from a folder."""

Files = dict[str, bytes]


@dataclass
class HubRepository:
    """Every commit of a repository, from the first to the last."""

    commits: dict[str, Files]
    private: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def at(self, revision: str) -> tuple[str, Files] | None:
        sha = self.head if revision in ("", "main") else revision
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class HubState:
    """What a server has and was asked."""

    repos: dict[str, HubRepository]
    claims: list[dict[str, Any]] = field(default_factory=list)
    """Files that every repository says it has beside those that it has."""
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded and not yet, or never, committed, by SHA-256."""
    fails: Callable[[str], bool] = lambda request: False
    """Whether a request, such as `POST /api/repos/create`, ends in an error of the server."""
    written: list[dict[str, Any]] = field(default_factory=list)
    """Headers of commits, and bodies of requests that make a repository."""

    def clear(self) -> None:
        """Begin again, for the server that has this object."""
        self.__dict__.update(HubState({}).__dict__)


class _Hub(BaseHTTPRequestHandler):
    """Anything that is not known is recorded and refused."""

    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.state.requests.append(request)
        body = self._body()
        if self.state.fails(request):
            return self._send(400, b"{}", "application/json")
        if self.command in ("POST", "PUT"):
            return self._write(path, body)
        for name, repo in self.state.repos.items():
            if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/"):
                return self._info(name, repo, path)
            if path.startswith(f"/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                found = repo.at(revision)
                if found and file in found[1]:
                    return self._send(200, found[1][file], "application/octet-stream", found[0])
                return self._missing("Entry")
        return self._missing("Repo")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _write(self, path: str, body: bytes) -> None:
        if (
            not self.headers.get("Authorization", "").startswith("Bearer hf_")
            and "/lfs/" not in path
        ):
            return self._send(401, b"{}", "application/json")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.state.written.append(asked)
            first = {".gitattributes": b"*.safetensors filter=lfs\n"}
            sha = hashlib.sha1(name.encode()).hexdigest()
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.state.repos[name] = HubRepository({sha: first}, private)
            return self._json({"url": f"{self._origin}/{name}", "name": name})
        if path.startswith("/lfs/"):
            self.state.large[path.removeprefix("/lfs/")] = body
            return self._json({})
        for name, repo in self.state.repos.items():
            if path == f"/{name}.git/info/lfs/objects/batch":
                objects = [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{self._origin}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]  # fmt: skip
                return self._json({"transfer": "basic", "objects": objects})
            if path.startswith(f"/api/models/{name}/preupload/"):
                files = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                return self._json({"files": files})
            if path.startswith(f"/api/models/{name}/commit/"):
                return self._commit(name, repo, body)
        return self._missing("Repo")

    def _commit(self, name: str, repo: HubRepository, body: bytes) -> None:
        files = dict(repo.commits[repo.head])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.state.written.append(value)
                if value.get("parentCommit", repo.head) != repo.head:
                    return self._send(412, b'{"error": "not the head"}', "application/json")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
            else:
                del files[value["path"]]
        sha = hashlib.sha1(body + repo.head.encode()).hexdigest()
        repo.commits[sha] = files
        return self._json(
            {"success": True, "commitOid": sha, "commitUrl": f"{self._origin}/{name}/commit/{sha}",
             "hookOutput": ""}
        )  # fmt: skip

    @property
    def _origin(self) -> str:
        return f"http://{self.headers['Host']}"

    def _info(self, name: str, repo: HubRepository, path: str) -> None:
        found = repo.at(path.partition("/revision/")[2])
        if found is None:
            return self._missing("Revision")
        sha, held = found
        files = [
            {"type": "file", "path": path, "size": len(raw), "oid": "0" * 40}
            for path, raw in sorted(held.items())
        ]
        if "/tree/" in path:
            return self._json(files)
        siblings = [{"rfilename": f["path"], "size": f["size"]} for f in files]
        return self._json(
            {"id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": False,
             "disabled": False, "tags": [], "downloads": 0, "likes": 0,
             "siblings": [*siblings, *self.state.claims]}
        )  # fmt: skip

    def _missing(self, what: str) -> None:
        self._send(404, b"{}", "application/json", **{"X-Error-Code": f"{what}NotFound"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, raw: bytes, kind: str, commit: str = COMMIT, **more: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def _files(folder: Path) -> Files:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@contextmanager
def serve(state: HubState) -> Iterator[str]:
    """Serve what a state has, and yield the address."""
    handler: Any = type("Handler", (_Hub,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve_hub(
    repos: Mapping[str, Path], claims: list[dict[str, Any]] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories, all at one commit.

    Args:
        repos: folder by owner/name.
        claims: files that every repository says it has beside those that it has.

    Yields:
        The address, and the requests so far.
    """
    served = {name: HubRepository({COMMIT: _files(folder)}) for name, folder in repos.items()}
    state = HubState(served, claims or [])
    with serve(state) as endpoint:
        yield endpoint, state.requests


def hub_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """Variables of a process that asks this hub alone, with an empty cache and no token."""
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY")
    return {k: v for k, v in os.environ.items() if k not in unset} | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
