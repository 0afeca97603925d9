"""What asking a judge costs: before it is asked, and while it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bsc.config import Config
from bsc.eval.interp.config import Prices
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.judges.reply import Reply

__all__ = ["Estimate", "Meter", "estimate_requests"]

CHARACTERS_PER_TOKEN = 4.0
_ANSWER_TOKENS = {"explain": 40, "detection": 6, "fuzzing": 6, "intruder": 8}
"""Tokens of a reply; those of detection and fuzzing for each excerpt."""


def prompt_tokens(request: Request) -> float:
    """An estimate from the number of characters."""
    return request.characters / CHARACTERS_PER_TOKEN + 4 * len(request.messages)


class Estimate(Config):
    """What is still to be asked."""

    requests: int = 0
    prompt_tokens: float = 0
    shared_tokens: float = 0
    """Tokens of the prompts that a request has in common with the one before it."""
    completion_tokens: float = 0

    def plus(self, other: Estimate) -> Estimate:
        """The sum of two."""
        return Estimate(**{n: getattr(self, n) + getattr(other, n) for n in Estimate.model_fields})


def estimate_requests(requests: Iterable[Request]) -> Estimate:
    """Add up requests in the order in which they would be asked."""
    n, prompt, shared, completion = 0, 0.0, 0.0, 0.0
    before = ""
    for request in requests:
        text = "".join(m["content"] for m in request.messages)
        same = next(
            (i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b),
            min(len(before), len(text)),
        )
        n += 1
        prompt += prompt_tokens(request)
        shared += same / CHARACTERS_PER_TOKEN
        each = request.items if request.kind in ("detection", "fuzzing") else 1
        completion += _ANSWER_TOKENS[request.kind] * each
        before = text
    return Estimate(
        requests=n, prompt_tokens=prompt, shared_tokens=shared, completion_tokens=completion
    )


class Meter:
    """Adds up what was spent and holds requests back that the budget has no room for."""

    def __init__(self, prices: Prices, entries: Iterable[dict[str, Any]] = ()) -> None:
        """Begin with what the ledger says was spent before."""
        self.prices = prices
        self.requests, self.prompt, self.cached, self.completion = 0, 0, 0, 0
        self.held_back = False
        self._reserved: dict[int, float] = {}
        for entry in entries:
            self._add(entry["prompt_tokens"], entry["cached_tokens"], entry["completion_tokens"])

    def _add(self, prompt: int, cached: int, completion: int) -> None:
        self.requests += 1
        self.prompt += prompt
        self.cached += cached
        self.completion += completion

    @property
    def spent(self) -> float:
        """In the currency of the prices."""
        return self.prices.cost(self.prompt, self.cached, self.completion)

    def let_through(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Requests, until the next one could exceed the budget."""
        for request in requests:
            if self.prices.budget is not None:
                # No token is less than a byte: rather too much than too little.
                size = sum(len(m["content"].encode()) + 16 for m in request.messages)
                most = self.prices.cost(size, 0, request.max_tokens)
                if self.spent + sum(self._reserved.values()) + most > self.prices.budget:
                    self.held_back = True
                    return
                self._reserved[id(request)] = most
            yield request

    def note(self, request: Request, reply: Reply) -> Reply:
        """A reply came. One that does not say how many tokens it took gets an estimate."""
        self._reserved.pop(id(request), None)
        if reply.status == "failed":
            return reply
        if not reply.prompt_tokens:
            reply = reply._replace(
                prompt_tokens=round(prompt_tokens(request)),
                completion_tokens=round(len(reply.text) / CHARACTERS_PER_TOKEN),
                counted=False,
            )
        self._add(reply.prompt_tokens, reply.cached_tokens, reply.completion_tokens)
        return reply
