"""The workbench over HTTP, for the browser of this machine and for nobody else.

It listens on 127.0.0.1, under an address that has a random token in it. A request is refused unless
it names this host (a page elsewhere whose name was pointed here names another), comes from this
page if it says where it comes from, has the token, and is small. Nothing but the run is served.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib.resources import files
from typing import Any

from pydantic import ValidationError

from bsc.errors import UserError
from bsc.eval.browse.live.workbench import Question, Workbench
from bsc.eval.report.report import environment_of
from bsc.formats import printable
from bsc.records import parse_json
from bsc.train.run import Run

__all__ = ["application", "listen", "serve"]

MAX_BODY = 128 << 10
"""Bytes of a request."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Guard:
    """Refuses what is not from this page, and takes the token out of the address."""

    def __init__(self, app: Any, port: int, token: str) -> None:
        self.app, self.token = app, token
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal:
            await _answer(send, *refusal)
            return
        if scope["path"] == f"/{self.token}":  # addresses of the page are relative to the slash
            await _answer(send, 308, "", location=f"/{self.token}/")
            return
        body = await _body(receive)
        if body is None:
            await _answer(send, 413, "the request is too large")
            return
        rest = "/" + scope["path"].removeprefix(f"/{self.token}").lstrip("/")
        scope = {**scope, "path": rest, "raw_path": rest.encode(), "root_path": ""}
        await self.app(scope, _once(body, receive), _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: list[tuple[str, str]] = [
            (k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]
        ]
        named = [v for k, v in headers if k == "host"]
        if len(named) != 1 or named[0] not in self.hosts:
            return 421, "this is not the host that was asked for"
        if any(v not in self.origins for k, v in headers if k == "origin"):
            return 403, "asked for by another page"
        if any(v in ("cross-site", "same-site") for k, v in headers if k == "sec-fetch-site"):
            return 403, "asked for by another page"
        given = scope["path"].split("/")[1] if "/" in scope["path"] else ""
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return 404, "not found"
        for length in (v for k, v in headers if k == "content-length"):
            if not length.isdigit() or int(length) > MAX_BODY:
                return 413, "the request is too large"
        return None


async def _body(receive: Receive) -> bytes | None:
    """The body of a request; None where it is too large, of which no more is read."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            return None
        parts.append(part)
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _once(body: bytes, then: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await then()

    return receive


def _with_headers(send: Send) -> Send:
    async def answer(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *own]
        await send(message)

    return answer


async def _answer(send: Send, status: int, words: str, **more: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers += [(name.encode(), value.encode()) for name, value in more.items()]
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await _with_headers(send)(start)
    await send({"type": "http.response.body", "body": f"{words}\n".encode()})


def application(workbench: Workbench, port: int, token: str) -> Any:
    """The whole server, as an ASGI application.

    Args:
        workbench: that answers.
        port: it listens on.
        token: that addresses have to have.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles
    except ImportError:
        raise UserError(
            "--live needs a web server: pip install 'bsc[live]' (starlette and uvicorn)."
        ) from None

    here = files("bsc.eval")
    style = "".join(
        (here / place).read_text()
        for place in ("report/style.css", "browse/browse.css", "browse/live/live.css")
    )
    script = (here / "browse/live/live.js").read_text()
    page = environment_of("bsc.eval.browse.live").get_template("live.html.j2")

    async def index(request: Request) -> Response:
        about = workbench.about()
        return HTMLResponse(page.render(about=about, facts=json.dumps(about)))

    async def ask(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return JSONResponse({"error": "should be JSON"}, status_code=415)
        try:
            asked = Question.model_validate(_edits_by_number(parse_json(await request.body())))
            return JSONResponse(await _in_a_thread(workbench.look, asked))
        except ValidationError as error:
            words = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return JSONResponse({"error": printable(words)}, status_code=422)
        except (ValueError, UserError) as error:
            return JSONResponse({"error": printable(str(error))}, status_code=422)

    def asset(text: str, kind: str) -> Any:
        async def give(request: Request) -> Response:
            return Response(text, media_type=kind)

        return give

    routes: list[Any] = [
        Route("/", index),
        Route("/look", ask, methods=["POST"]),
        Route("/style.css", asset(style, "text/css")),
        Route("/live.js", asset(script, "text/javascript")),
    ]
    pages = workbench.run.browse_folder
    if (pages / "index.html").exists():
        routes.append(Mount("/pages", StaticFiles(directory=pages, html=True)))
    return _Guard(Starlette(routes=routes), port, token)


def _edits_by_number(asked: Any) -> Any:
    """A question whose edits have numbers for keys: those of JSON are text."""
    if not isinstance(asked, Mapping) or not isinstance(asked.get("edits", {}), Mapping):
        raise ValueError("should be an object, with edits as one")
    edits = {int(latent): value for latent, value in asked.get("edits", {}).items()}
    return {**asked, "edits": edits}


async def _in_a_thread(work: Callable[[Question], Any], asked: Question) -> Any:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(work, asked)


def listen(port: int = 0) -> socket.socket:
    """A socket on this machine's own address; port 0: any that is free.

    Raises:
        UserError: the port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", port))
        found.listen(64)
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(
            f"--port {port}: cannot be listened on ({error}). Without it, any free one is."
        ) from None
    return found


def serve(run: Run, said: Callable[[str], None], *, port: int = 0, **options: Any) -> None:
    """Serve a run until it is interrupted.

    Args:
        run: a trained run.
        said: is given the address.
        port: to listen on; 0: any that is free.
        options: of the `Workbench`.
    """
    listening = listen(port)
    try:
        token, place = secrets.token_urlsafe(16), listening.getsockname()[1]
        app = application(Workbench(run, **options), place, token)
        import uvicorn

        config = uvicorn.Config(app, log_level="warning", server_header=False, lifespan="off")
        said(f"http://127.0.0.1:{place}/{token}/")
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
