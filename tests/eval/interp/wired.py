"""An endpoint to a scripted judge, and something to ask it."""

from __future__ import annotations

from typing import Any

from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.evidence import Texts
from bsc.eval.interp.judges.connection import EndpointConfig
from bsc.eval.interp.judges.endpoint import Endpoint
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.judges.prompts import test_request as ask_test
from bsc.eval.interp.material import Material
from tests.eval.interp import planted
from tests.eval.interp.scripted import Scripted


def few_words(where: Texts) -> Material:
    words = [6, 9, 12, 15, 18, 21]
    config = InterpConfig(excerpt_tokens=16, latents=6, test_excerpts=10, explain_excerpts=10)
    return planted.material(where, planted.word_masks(where, words), config)


def endpoint(script: Scripted, **config: Any) -> Endpoint:
    usual: dict[str, Any] = {"concurrency": 8, "timeout": 1.0, "attempts": 8, "first_wait": 0.02}
    judge = Endpoint(EndpointConfig.of(script.url, None, **(usual | config)))
    judge.find_model()
    return judge


def requests(n: int) -> list[Request]:
    return [ask_test("fuzzing", "c", i, 0, f"word {i}", [[(f" w{i}", True)]]) for i in range(n)]
