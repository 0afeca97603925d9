"""Which latents are scored, how, by whom and for how much. Imports neither torch nor zarr."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import field_validator, model_validator

from bsc.config import Config
from bsc.options import option

__all__ = ["TESTS", "InterpConfig", "JudgeConfig", "Marking", "Prices", "TestKind"]

TestKind = Literal["detection", "fuzzing", "intruder"]
TESTS: tuple[TestKind, ...] = get_args(TestKind)
Marking = Literal["all", "strong"]

_JUDGE, _WHICH, _TESTS, _COST = "The judge", "Which latents", "Explanations and tests", "Cost"


DECIDING = ("latents", "census_rate", "min_firings", "test_excerpts", "excerpt_tokens", "seed")
"""What of an `InterpConfig` changes a score without a judge. Marks are part of the overlap, so they
are always those of all firing tokens."""


class JudgeConfig(Config):
    """Who is asked."""

    judge: str | None = option(
        None,
        "URL up to /v1, vllm, llama.cpp, ollama, openai, openrouter, or a model to run here.",
        _JUDGE,
        shown="none, offline scores alone",
    )
    judge_model: str | None = option(
        None, "Model of the endpoint.", _JUDGE, shown="the only one it has"
    )
    judge_key_variable: str | None = option(
        None, "Environment variable of its key.", _JUDGE, shown="BSC_JUDGE_KEY"
    )
    concurrency: int = option(32, "Requests under way at most.", _JUDGE, ge=1)
    timeout: float = option(120.0, "Seconds for an answer.", _JUDGE, ge=0.1)
    device: str | None = option(
        None, "Device of a judge that runs here.", _JUDGE, shown="a GPU where there is one"
    )


class InterpConfig(Config):
    """Which latents are scored, and what is shown of them."""

    coders: tuple[str, ...] = option(
        (), "Coders, by name or pattern; several times.", _WHICH, shown="all", metavar="GLOB"
    )
    latents: int = option(50, "Latents of each of a coder's two samples.", _WHICH, ge=1)
    only: tuple[int, ...] = option(
        (), "Just these latents; several times.", _WHICH, flag="--latent"
    )
    """By number, in the place of the samples."""
    census_rate: float = option(
        0.1, "Latents that fire this often are all in the weighted sample.", _WHICH, gt=0, le=1
    )
    min_firings: int = option(
        30, "Latents with fewer firings are not drawn; they are counted.", _WHICH, ge=4
    )
    tests: tuple[TestKind, ...] = option(
        TESTS,
        "detection, fuzzing, intruder; several times.",
        _TESTS,
        flag="--test",
        shown="all three",
    )
    explain_excerpts: int = option(20, "Excerpts to explain from.", _TESTS, ge=5)
    test_excerpts: int = option(20, "Excerpts of either kind to test on.", _TESTS, ge=5)
    excerpt_tokens: int = option(32, "Tokens of an excerpt.", _TESTS, ge=2)
    items: int = option(5, "Excerpts in a request.", _TESTS, ge=1, le=50)
    marks: Marking = option("all", "Marked tokens: all that fire, or strong.", _TESTS)
    """strong: those of at least 0.3 of the excerpt's largest."""
    negatives: Literal["auto", "silent", "active"] = option(
        "auto", "Fuzzing: against silent excerpts, active ones, or auto.", _TESTS
    )
    """Against silent excerpts, against silent tokens of active excerpts, or against the latter
    where the former hardly exist."""
    explanations: str = option(
        "own", "own, shuffled, blank, or a file of coder, latent, explanation.", _TESTS
    )
    """``"own"``: the judge writes them. As controls ``"shuffled"``, those of other latents, and
    ``"blank"``. Or a CSV or JSONL file."""
    seed: int = option(0, "Seed of every draw.", _TESTS, ge=0)

    @field_validator("tests")
    @classmethod
    def _not_empty(cls, value: tuple[TestKind, ...]) -> tuple[TestKind, ...]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(TESTS)}")
        return tuple(dict.fromkeys(value))


class Prices(Config):
    """What a judge charges, in any currency, per million tokens."""

    budget: float | None = option(
        None, "What may be spent on this judge; it stops before more.", _COST, gt=0
    )
    """No request is sent that could take what was spent on this judge, ever, above this."""
    price_in: float = option(0.0, "Price of a million tokens of prompts.", _COST, ge=0)
    price_out: float = option(0.0, "Price of a million tokens of replies.", _COST, ge=0)
    price_cached: float | None = option(
        None, "Price of a million cached tokens of prompts.", _COST, ge=0, shown="as others"
    )
    """Cached are those of a prefix that the judge has kept."""

    @model_validator(mode="after")
    def _budget_of_something(self) -> Prices:
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ValueError("--budget needs the prices, --price-in and --price-out")
        return self

    def cost(self, prompt: float, cached: float, completion: float) -> float:
        """Price of so many tokens, the cached ones among those of the prompt."""
        kept = self.price_in if self.price_cached is None else self.price_cached
        return (
            (prompt - cached) * self.price_in + cached * kept + completion * self.price_out
        ) / 1e6
