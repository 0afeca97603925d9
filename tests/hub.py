"""A loopback server that speaks as much of the hub's protocol as downloads use."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"


class _Hub(BaseHTTPRequestHandler):
    """Repositories as folders; anything else is recorded and refused."""

    repos: Mapping[str, Path]
    claims: list[dict[str, Any]]
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        type(self).requests.append(f"{self.command} {path}")
        for repo, root in self.repos.items():
            if path.startswith(f"/api/models/{repo}"):
                return self._info(repo, root, path, body)
            if path.startswith(f"/{repo}/resolve/"):
                revision, name = path.removeprefix(f"/{repo}/resolve/").split("/", 1)
                file = root / name
                if revision in ("main", COMMIT) and file.is_file():
                    raw = file.read_bytes()
                    return self._send(200, raw, "application/octet-stream", body)
                return self._send(404, b"", "text/plain", body, {"X-Error-Code": "EntryNotFound"})
        return self._send(404, b"{}", "application/json", body, {"X-Error-Code": "RepoNotFound"})

    def _info(self, repo: str, root: Path, path: str, body: bool) -> None:
        files = [
            {"type": "file", "path": str(p.relative_to(root)), "size": p.stat().st_size,
             "oid": "0" * 40}
            for p in sorted(root.rglob("*")) if p.is_file()
        ]  # fmt: skip
        if "/tree/" in path:
            return self._send(200, json.dumps(files).encode(), "application/json", body)
        revision = path.partition("/revision/")[2]
        if revision not in ("", "main", COMMIT):
            missing = {"X-Error-Code": "RevisionNotFound"}
            return self._send(404, b"{}", "application/json", body, missing)
        siblings = [{"rfilename": f["path"], "size": f["size"]} for f in files] + self.claims
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "gated": False,
                "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": siblings}  # fmt: skip
        return self._send(200, json.dumps(info).encode(), "application/json", body)

    def _send(
        self, status: int, raw: bytes, kind: str, body: bool, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(raw)


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
    fields = {"repos": repos, "claims": claims or [], "requests": []}
    handler: Any = type("Handler", (_Hub,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
    finally:
        server.shutdown()
        server.server_close()


def hub_environment(endpoint: str, cache: Path) -> dict[str, str]:
    """Variables of a process that asks this hub alone, with an empty cache and no token."""
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY")
    return {k: v for k, v in os.environ.items() if k not in unset} | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
