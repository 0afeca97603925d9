"""What a judge would be asked about the latents of coders that are not trained yet.

The requests are made by the functions that make the real ones, about excerpts of placeholder text,
and counted as `bsc interp --dry-run` counts them. So their number, and the words of every prompt,
are those of a latent that can be tested in full. Assumed are the excerpts, with four characters a
token and two marked tokens each, the length of explanations, and that every latent that can be
drawn is drawn. Latents that fire too rarely make it fewer, and those above `census_rate` more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bsc.eval.interp.config import InterpConfig, JudgeConfig, Prices
from bsc.eval.interp.cost import CHARACTERS_PER_TOKEN, estimate_requests
from bsc.eval.interp.judges.connection import is_endpoint
from bsc.eval.interp.judges.prompts import (
    Request,
    explain_request,
    intruder_request,
    test_request,
)
from bsc.eval.interp.questions import INTRUDER_EXCERPTS
from bsc.study.config import Hardware
from bsc.train.run_config import PlannedCoder

__all__ = ["JudgeWork", "judge_work", "requests_of_a_latent"]

_EXPLANATION = "x" * 160
"""As long as bsc/eval/interp/asking.py takes an unwritten one to be."""
_MARKED = 2
"""Tokens of an excerpt that are marked."""


class JudgeWork(NamedTuple):
    """What a judge is asked."""

    latents: int
    requests: int
    prompt_tokens: float
    answer_tokens: float
    price: float
    at_once: int
    """Requests that are under way at a time."""


def judge_work(
    fields: Mapping[str, Any],
    make: Callable[[type[Any]], Any],
    named: Callable[[tuple[str, ...]], list[PlannedCoder]],
    hardware: Hardware,
) -> tuple[JudgeWork | None, list[PlannedCoder]]:
    """What a step of `interp` asks a judge, if it has one, and the coders that it scores.

    Args:
        fields: keys of the step.
        make: the config of a class that they are the flags of.
        named: coders of the run by names.
        hardware: whose prices are taken where the step has none.
    """
    config, by, prices = make(InterpConfig), make(JudgeConfig), make(Prices)
    coders = named(config.coders)
    if by.judge is None:
        return None, coders
    if not is_endpoint(by.judge):
        config = config.but(items=1)  # as `bsc interp` asks a local model
    if not (prices.price_in or prices.price_out):
        prices = prices.but(price_in=hardware.price_in, price_out=hardware.price_out)
    each = estimate_requests(requests_of_a_latent(config))
    latents = sum(len(config.only) or min(2 * config.latents, c.coder.n_latents) for c in coders)
    return JudgeWork(
        latents=latents,
        requests=latents * each.requests,
        prompt_tokens=latents * each.prompt_tokens,
        answer_tokens=latents * each.completion_tokens,
        price=latents * prices.cost(each.prompt_tokens, each.shared_tokens, each.completion_tokens),
        at_once=by.concurrency if is_endpoint(by.judge) else 1,
    ), coders


def requests_of_a_latent(config: InterpConfig) -> list[Request]:
    """Every request about a latent that can be explained and tested in full."""
    size = int(CHARACTERS_PER_TOKEN)
    plain = config.excerpt_tokens - min(_MARKED, config.excerpt_tokens - 1)
    tokens = [("x" * size, True)] * (config.excerpt_tokens - plain) + [("x" * size * plain, False)]
    found: list[Request] = []
    if config.explanations in ("own", "shuffled"):
        found.append(explain_request("", 0, [tokens] * config.explain_excerpts))
    explanation = "" if config.explanations == "blank" else _EXPLANATION
    for kind in config.tests:
        if kind == "intruder":
            five = [tokens] * INTRUDER_EXCERPTS
            parts = range(config.test_excerpts // INTRUDER_EXCERPTS)
            found += [intruder_request("", 0, part, five) for part in parts]
        else:
            left, part = 2 * config.test_excerpts, 0
            while left > 0:
                here = [tokens] * min(config.items, left)
                found.append(test_request(kind, "", 0, part, explanation, here))
                left, part = left - config.items, part + 1
    return found
