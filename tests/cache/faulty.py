"""A proxy in front of an object store that fails on demand, the way networks and services do."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Fault = Callable[[str, str], str | None]
"""By method and path: "503", "403", "lost" (done, but the answer never comes), "cut" (half of the
body comes), "down" (nobody there), or None."""


class FaultyServer:
    """Forwards to the server behind, but for what `fault` says of each request."""

    def __init__(self, behind: str) -> None:
        self.behind = urlsplit(behind).netloc
        self.fault: Fault = lambda method, path: None
        self.seen: list[tuple[str, str, str]] = []
        """Method, path and what became of each request."""
        self._lock = threading.Lock()

    def once(self, method: str, part: str, what: str, times: int = 1) -> None:
        """Let the first requests of a kind fail."""
        left = [times]

        def fault(asked: str, path: str) -> str | None:
            with self._lock:
                if asked == method and part in path and left[0]:
                    left[0] -= 1
                    return what
            return None

        self.fault = fault

    def answer(self, handler: Any) -> None:
        what = self.fault(handler.command, handler.path)
        self.seen.append((handler.command, handler.path, what or ""))
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length) if length else None
        if what == "down":
            handler.connection.close()
            handler.close_connection = True
            return
        if what in ("503", "403"):
            code = {"503": "SlowDown", "403": "InvalidAccessKeyId"}[what]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            handler.send_response(int(what))
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text if handler.command != "HEAD" else b"")
            return
        behind = http.client.HTTPConnection(self.behind, timeout=30)
        behind.request(handler.command, handler.path, body, dict(handler.headers))
        found = behind.getresponse()
        content = found.read()
        behind.close()
        if what == "lost":
            handler.connection.close()
            handler.close_connection = True
            return
        handler.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server"):
                handler.send_header(name, value)
        size = found.getheader("Content-Length") if handler.command == "HEAD" else len(content)
        handler.send_header("Content-Length", str(size or 0))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        handler.wfile.write(content[: len(content) // 2] if what == "cut" else content)
        if what == "cut":
            handler.wfile.flush()
            handler.connection.close()
            handler.close_connection = True


@contextmanager
def faulty(behind: str) -> Iterator[tuple[str, FaultyServer]]:
    """The address of a proxy that fails on demand, and what decides it."""
    server = FaultyServer(behind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer
        disable_nagle_algorithm = True

        def _any(self) -> None:
            try:
                server.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", server
    finally:
        running.shutdown()
        running.server_close()
