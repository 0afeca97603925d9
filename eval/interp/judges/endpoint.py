"""A judge behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, or a hosted one.

One shape of request, POST {base}/chat/completions, by httpx, with tenacity's retries. As many
requests as the judge takes are under way at the same time: their number is halved when it says 429
or 503 and grows again by one for every round that goes well.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_random_exponential,
)

from bsc.eval.interp.judges.connection import (
    Connection,
    EndpointConfig,
    JudgeStopped,
    Never,
    NotNow,
)
from bsc.eval.interp.judges.facts import JudgeFacts, Parameters
from bsc.eval.interp.judges.gate import Gate
from bsc.eval.interp.judges.prompts import CANARY, CANARY_ANSWERS, Request, answers_in, schema_of
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.judges.wire import LONGEST_WAIT, is_length, reply_of

__all__ = ["Endpoint"]

Asked = Callable[[Request, Reply], None]
Form = Literal["json_schema", "json_object", None]
_AIDS: tuple[tuple[Form, bool], ...] = (
    ("json_schema", True),
    ("json_schema", False),
    ("json_object", False),
    (None, True),
    (None, False),
)
"""How a reply is held to its form, and whether probabilities are asked for, in order."""
_UNSUPPORTED = (400, 422)
"""How servers say that they do not know a field."""


class Endpoint:
    """A judge behind an endpoint."""

    def __init__(self, config: EndpointConfig) -> None:
        """Prepare; nothing is asked yet.

        Args:
            config: how to reach it.
        """
        self.config = config
        self.model = config.model or ""
        self.facts: JudgeFacts | None = None
        self._logprobs = False
        self._structured: Form = None
        self._failures = 0.0
        self._stopped: JudgeStopped | None = None
        self._echoed: str | None = None

    @property
    def parameters(self) -> Parameters:
        """That decide an answer; sent explicitly, since servers have defaults of their own."""
        return {"temperature": 0, "top_p": 1, "seed": 0}

    def find_model(self) -> None:
        """See which model it is, asking no question.

        Raises:
            UserError: there is no such endpoint, or it has several models.
        """
        if not self.model:
            self.model = Connection(self.config).only_model()

    def connect(self) -> None:
        """Find out what the judge can do, by a question whose answers are known.

        Raises:
            JudgeStopped: there is no such endpoint or model, the key is wrong, or the reply to a
                simple question cannot be read.
        """
        self.find_model()
        self._stopped, self._failures = None, 0
        asyncio.run(self._probe())

    def ask(self, requests: Iterable[Request], asked: Asked) -> None:
        """Ask every request and hand each reply over as it comes.

        Args:
            requests: taken one by one, as there is room.
            asked: called with each request and its reply; what it raises stops the asking.

        Raises:
            JudgeStopped: the key is wrong, the credit used up, or attempt after attempt fails.
        """
        self._stopped, self._failures = None, 0
        # Every collection would look through all objects of the libraries that are loaded, which
        # holds all requests up for longer than an answer takes.
        gc.freeze()
        try:
            asyncio.run(self._ask(iter(requests), asked))
        finally:
            gc.unfreeze()

    async def _ask(self, requests: Iterator[Request], asked: Asked) -> None:
        gate = Gate(self.config.concurrency)
        broken: list[Exception] = []

        async def worker(client: httpx.AsyncClient) -> None:
            while not self._stopped and not broken:
                try:
                    request = next(requests, None)
                    if request is None:
                        return
                    asked(request, await self._reply(client, request, gate))
                except JudgeStopped as error:
                    # The others end what is under way: it is paid for.
                    self._stopped = self._stopped or error
                except Exception as error:
                    # Not what a judge did: the ledger cannot be written, say.
                    broken.append(error)

        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(client)
                for client in Connection(self.config).clients(self.config.concurrency)
            ]
            await asyncio.gather(*map(worker, clients))
        if broken:
            raise broken[0]
        if self._stopped:
            raise self._stopped

    async def _reply(self, client: httpx.AsyncClient, request: Request, gate: Gate) -> Reply:
        started, attempts = time.monotonic(), 0
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NotNow),
                stop=self._enough,
                wait=self._wait,
                reraise=True,
            ):
                with attempt:
                    attempts += 1
                    await gate.enter()
                    try:
                        value = await self._watched(client, request, gate)
                    finally:
                        gate.leave()
            gate.went_well()
            reply = self._noted(value)
            return reply._replace(attempts=attempts, seconds=time.monotonic() - started)
        except (NotNow, Never) as error:
            return Reply(
                "failed",
                attempts=attempts,
                seconds=time.monotonic() - started,
                error=Connection(self.config).safe(str(error)),
            )

    def _enough(self, state: RetryCallState) -> bool:
        """Whether a request was attempted often enough."""
        error = state.outcome.exception() if state.outcome else None
        patient = isinstance(error, NotNow) and error.slow_down
        return state.attempt_number >= self.config.attempts * (2 if patient else 1)

    def _wait(self, state: RetryCallState) -> float:
        """Before an attempt is repeated: as long as the server says, else at random, doubling."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, NotNow) and error.after is not None:
            return min(error.after, LONGEST_WAIT)
        return wait_random_exponential(self.config.first_wait, max=60)(state)

    async def _watched(
        self, client: httpx.AsyncClient, request: Request, gate: Gate
    ) -> dict[str, Any]:
        """An attempt that is counted: a judge that fails again and again is left alone."""
        if self._stopped:
            raise self._stopped
        began, connection = time.monotonic(), Connection(self.config)
        try:
            value = await connection.complete(client, self._body(request))
        except (NotNow, Never) as error:
            weight = 1.0
            if isinstance(error, NotNow) and error.slow_down:
                gate.slow_down(began, error.after)
                # Rate limits pass; a judge that never answers is left alone all the same.
                weight = 0.25
            if isinstance(error, NotNow) or not is_length(str(error)):
                self._failures += weight
            if self._failures >= 2 * self.config.concurrency + 8:
                raise JudgeStopped(
                    f"judge {self.config.base}: attempt after attempt failed without an answer, "
                    f"the last one with: {connection.safe(str(error))}. What was answered is kept; "
                    f"the same command goes on from there."
                ) from None
            raise
        self._failures = 0
        return value

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            **self.parameters,
        }
        if self._structured == "json_schema":
            schema = {"name": "reply", "strict": True, "schema": schema_of(request)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self._structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        if self._logprobs and request.kind in ("detection", "fuzzing"):
            body |= {"logprobs": True, "top_logprobs": 5}
        return body

    def _noted(self, value: dict[str, Any]) -> Reply:
        """A response as a reply, without the key should the judge repeat it."""
        connection, echoed = Connection(self.config), value.get("model")
        self._echoed = connection.safe(echoed) if isinstance(echoed, str) else self._echoed
        reply = reply_of(value)
        return reply._replace(text=connection.without_key(reply.text))

    async def _probe(self) -> None:
        """Ask what is known, first with every aid, then with fewer until the judge takes it."""
        connection = Connection(self.config)
        async with connection.clients(1)[0] as client:
            gate, reply = Gate(1), Reply("failed")
            for self._structured, self._logprobs in _AIDS:
                reply = await self._reply(client, CANARY, gate)
                if not reply.error.startswith(tuple(f"HTTP {s}" for s in _UNSUPPORTED)):
                    break
            if reply.status == "failed":
                raise connection.unreachable(reply.error)
            answers = answers_in(reply.text, "detection", CANARY.items)
            if any(a is None for a in answers):
                raise JudgeStopped(
                    f"judge {self.model}: its reply to a simple question cannot be read: "
                    f"{connection.safe(reply.text)[:160]!r}. Expected JSON such as "
                    f'{{"1": 0, "2": 1}}. A model that follows instructions is needed.'
                )
            self._logprobs = self._logprobs and bool(reply.yes)
            again = await self._reply(client, CANARY, gate)
        right = sum(a == b for a, b in zip(answers, CANARY_ANSWERS, strict=True))
        self.facts = JudgeFacts.of(
            self.model,
            echoed_model=self._echoed,
            repeatable=again.text == reply.text,
            probabilities=self._logprobs,
            structured_output=self._structured,
            known_answers_right=f"{right} of {CANARY.items}",
        )
