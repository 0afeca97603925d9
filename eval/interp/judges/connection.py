"""The way to an endpoint: its URL and key, and single requests over httpx.

A key comes from the environment, goes into the header, and is cut out of anything that a server
says. What a server sends is not trusted: neither to be JSON nor to be short.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from bsc.errors import UserError, nearest
from bsc.eval.interp.judges.wire import retry_after
from bsc.records import parse_json

__all__ = ["KEY_VARIABLE", "PRESETS", "Connection", "EndpointConfig", "JudgeStopped", "Never",
           "NotNow", "is_endpoint"]  # fmt: skip

PRESETS = {
    "vllm": ("http://127.0.0.1:8000/v1", None),
    "llama.cpp": ("http://127.0.0.1:8080/v1", None),
    "ollama": ("http://127.0.0.1:11434/v1", None),
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
}
"""Short names of endpoints and the variable that their key is in."""
KEY_VARIABLE = "BSC_JUDGE_KEY"
MAX_REPLY_BYTES = 1 << 20
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_SLOW_DOWN = {429, 503, 529}
_NO_CREDIT = ("insufficient_quota", "exceeded your current quota", "insufficient credit")


class JudgeStopped(UserError):
    """A judge cannot or will not go on. What it has answered is in the ledger."""


class NotNow(Exception):
    """An attempt that may go better another time."""

    def __init__(self, why: str, *, slow_down: bool = False, after: float | None = None) -> None:
        """Say why, whether it was too much at once, and how many seconds to wait."""
        super().__init__(why)
        self.slow_down, self.after = slow_down, after


class Never(Exception):
    """This request will never be answered."""

    def __init__(self, why: str, status: int = 0) -> None:
        """Say why, and the HTTP status if there was one."""
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class EndpointConfig:
    """How to reach a judge."""

    base: str
    """URL up to and with ``/v1``."""
    model: str | None = None
    """None: the only one that the endpoint lists."""
    key: str | None = field(default=None, repr=False)
    concurrency: int = 32
    timeout: float = 120.0
    """Seconds for one attempt."""
    attempts: int = 6
    """At one request; twice as many where the judge says that it is too much."""
    first_wait: float = 1.0
    """Seconds before the first repetition, on average; each next wait is twice as long at most."""

    @classmethod
    def of(
        cls, judge: str, model: str | None, *, key_variable: str | None = None, **rest: Any
    ) -> EndpointConfig:
        """From a URL or the name of a preset.

        Raises:
            UserError: it is no URL of an endpoint, or a key is in it, or is missing.
        """
        base, preset_variable = PRESETS.get(judge, (judge, None))
        try:
            parts = urlsplit(base)
            host, _ = parts.hostname, parts.port
            httpx.URL(base)
        except (ValueError, httpx.InvalidURL):
            parts, host = urlsplit(""), None
        # Never repeated in a message: what is there may be a key.
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"--judge: its URL has a name, a password or a query in it. Put a key into the "
                f"environment variable {KEY_VARIABLE}, and leave all else out of the URL."
            )
        if parts.scheme not in ("http", "https") or not host:
            raise UserError(f"--judge {judge}: expected a URL such as http://127.0.0.1:8000/v1.")
        if key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", key_variable, re.ASCII):
            raise UserError(
                "--judge-key-variable: expected the name of an environment variable, not a key."
            )
        key = os.environ.get(key_variable or preset_variable or KEY_VARIABLE, "").strip() or None
        if key is None and (key_variable or preset_variable):
            where = preset_variable if key_variable is None else "what --judge-key-variable names"
            raise UserError(f"--judge {judge}: its key is expected in {where}, which is not set.")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise UserError(
                "the key of the judge has blanks or characters in it that no key has. Look at the "
                "environment variable that it is in."
            )
        return cls(base.rstrip("/").removesuffix("/chat/completions"), model, key, **rest)

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return urlsplit(self.base).hostname in ("127.0.0.1", "localhost", "::1")


def is_endpoint(judge: str) -> bool:
    """Whether a judge's name is that of an endpoint rather than of a local model."""
    return judge in PRESETS or "://" in judge


class Connection:
    """Single requests to an endpoint."""

    def __init__(self, config: EndpointConfig) -> None:
        """Prepare; nothing is sent yet."""
        self.config = config

    def clients(self, n: int) -> list[httpx.AsyncClient]:
        """A client of one connection for each of n workers: a pool that many requests share looks
        through all of them at every request, which costs more than the request."""
        timeout = self.config.timeout
        # Reading the certificates takes as long as a hundred requests: once for all of them.
        verify = httpx.create_ssl_context() if self.config.base.startswith("https") else False
        return [
            httpx.AsyncClient(
                headers=self._headers(),
                timeout=httpx.Timeout(timeout, connect=min(15.0, timeout)),
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=1),
                trust_env=not self.config.local,
                verify=verify,
            )
            for _ in range(n)
        ]

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.config.key}"} if self.config.key else {}

    def without_key(self, text: str) -> str:
        """A text of the judge, without the key should it be there."""
        return text.replace(self.config.key, "[key]") if self.config.key else text

    def safe(self, text: str) -> str:
        """What a server said, short, in one line, without the key."""
        printable = "".join(c if c.isprintable() else " " for c in self.without_key(text)[:2_000])
        return " ".join(printable.split())[:300]

    def _trouble(self, error: Exception) -> str:
        return self.safe(f"{type(error).__name__}: {error}".rstrip(": "))

    def unreachable(self, why: Exception | str) -> JudgeStopped:
        """Nobody answers."""
        said = why if isinstance(why, str) else self._trouble(why)
        return JudgeStopped(
            f"judge {self.config.base}: no answer ({said}). Is the server running, and does the "
            f"URL end in /v1?"
        )

    def _wrong_key(self, status: int) -> JudgeStopped:
        what = "it does not accept the key" if self.config.key else "it wants a key"
        return JudgeStopped(
            f"judge {self.config.base}: {what} (HTTP {status}). Keys are read "
            f"from {KEY_VARIABLE}, or the variable that --judge-key-variable names."
        )

    def only_model(self) -> str:
        """The one model that the endpoint lists.

        Raises:
            UserError: it lists none or several, or does not answer.
        """
        try:
            response = httpx.get(
                f"{self.config.base}/models", headers=self._headers(), timeout=15,
                trust_env=not self.config.local,
            )  # fmt: skip
        except httpx.HTTPError as error:
            raise JudgeStopped(
                f"{self.unreachable(error)} With --judge-model NAME what it answered before is "
                f"scored without it."
            ) from None
        if response.status_code in (401, 403):
            raise self._wrong_key(response.status_code)
        names = _names(response)
        if len(names) != 1:
            listed = ": " + self.safe(", ".join(names[:8])) if names else ""
            raise UserError(
                f"--judge {self.config.base}: it lists {len(names) or 'no'} models at /models "
                f"(HTTP {response.status_code}). Name one with --judge-model{listed}"
            )
        return names[0]

    async def complete(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt at a chat completion; the JSON of the response.

        Raises:
            NotNow: another attempt may go better.
            Never: it will not.
            JudgeStopped: nor will any other request.
        """
        status, headers, text = await self._post(client, body)
        if status == 200:
            try:
                value = parse_json(text, halves=True)
                value["choices"][0]["message"]
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                raise NotNow(f"not the JSON of a completion: {self.safe(text)[:120]}") from None
            return dict(value)
        said = f"HTTP {status}: {self.safe(text)}"
        if status == 402 or (status == 429 and any(w in text for w in _NO_CREDIT)):
            raise JudgeStopped(
                f"judge {self.config.base}: no credit left ({said}). What was answered is kept; "
                f"the same command goes on from there."
            )
        if status in _RETRIED:
            raise NotNow(said, slow_down=status in _SLOW_DOWN, after=retry_after(headers))
        if status in (401, 403):
            raise self._wrong_key(status)
        if status == 404:
            raise JudgeStopped(
                f"judge {self.config.base}: no model {str(body['model'])!r}, or no "
                f"/chat/completions there ({said}). Name the model with --judge-model"
                f"{await self._known(client, str(body['model']))}."
            )
        raise Never(said, status)

    async def _post(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> tuple[int, httpx.Headers, str]:
        raw = bytearray()
        # Made here, and not by the client, which would merge it with its own first.
        request = httpx.Request(
            "POST", f"{self.config.base}/chat/completions", json=body,
            headers=self._headers() | {"User-Agent": "bsc"},
            extensions={"timeout": client.timeout.as_dict()},
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.config.timeout):
                got = await client.send(request, stream=True)
                try:
                    async for chunk in got.aiter_bytes():
                        raw += chunk
                        if len(raw) > MAX_REPLY_BYTES:
                            raise Never(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
                finally:
                    await got.aclose()
        except TimeoutError:
            raise NotNow(f"no answer within {self.config.timeout:g} s") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise NotNow(self._trouble(error)) from None
        return got.status_code, got.headers, raw.decode("utf-8", "replace")

    async def _known(self, client: httpx.AsyncClient, model: str) -> str:
        """Models that the endpoint has, for a message."""
        try:
            names = _names(await client.get(f"{self.config.base}/models", timeout=5))
        except httpx.HTTPError:
            return ""
        return self.safe(f"{nearest(model, names)}; it has {', '.join(names[:8])}")


def _names(response: httpx.Response) -> list[str]:
    """Printable names of the models in a list of them."""
    try:
        found = [m["id"] for m in response.json()["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [n for n in found if isinstance(n, str) and n.isprintable() and 0 < len(n) <= 300]
