"""A judge over the wire that misbehaves in every way that judges do."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from bsc.errors import UserError
from bsc.eval.interp.evidence import Texts
from bsc.eval.interp.interp import interpret
from bsc.eval.interp.judges.connection import JudgeStopped
from bsc.eval.interp.judges.gate import Gate
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.judges.wire import retry_after
from bsc.eval.interp.scores import Interpretability
from tests.eval.interp import planted
from tests.eval.interp.scripted import Direct, Scripted, rule, uniform
from tests.eval.interp.wired import endpoint, few_words, requests


@pytest.fixture(scope="module")
def right(where: Texts, tmp_path_factory: pytest.TempPathFactory) -> Interpretability:
    """What the same judge gives when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("right")
    return interpret(planted.materials(folder, few_words(where)), Direct(rule))


def once_each(kind: str, every: int = 3) -> Callable[[int, list[dict[str, str]]], str | None]:
    """Some prompts go wrong the first time that they are asked."""
    seen: Counter[str] = Counter()

    def fault(number: int, messages: list[dict[str, str]]) -> str | None:
        text = json.dumps(messages)
        seen[text] += 1
        return kind if seen[text] == 1 and uniform(text) < 1 / every else None

    return fault


@pytest.mark.parametrize("kind", ["429", "503", "500", "reset", "truncated"])
def test_what_passes_is_asked_again_and_moves_no_score(
    script: Scripted, where: Texts, tmp_path: Path, right: Interpretability, kind: str
) -> None:
    script.fault = once_each(kind)
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert found["coders"] == right["coders"]
    asked = script.questions()
    assert set(asked.values()) == {1}, "a prompt was answered twice"
    assert len(script.bodies) > len(asked) + 2  # and some went wrong


def test_a_hanging_judge_is_asked_again(
    script: Scripted, where: Texts, tmp_path: Path, right: Interpretability
) -> None:
    script.fault = lambda n, m: "hang" if n in (4, 9) else None
    judge = endpoint(script, timeout=0.3)
    assert (
        interpret(planted.materials(tmp_path, few_words(where)), judge)["coders"] == right["coders"]
    )


@pytest.mark.parametrize("kind", ["fences", "think", "no usage"])
def test_other_forms_of_the_same_answer(
    script: Scripted, where: Texts, tmp_path: Path, right: Interpretability, kind: str
) -> None:
    script.fault = lambda n, m: kind if n > 2 else None
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert found["coders"] == right["coders"]
    assert found["usage"]["prompt_tokens"] > 1_000  # where it does not count, we do


@pytest.mark.parametrize(
    ("kind", "state"),
    [("prose", "unparsable"), ("short list", "unparsable"), ("cut off", "unparsable"),
     ("empty", "unparsable"), ("sorry", "refused"), ("refusal", "refused"), ("context", "failed"),
     ("huge", "failed")],
)  # fmt: skip
def test_what_is_no_answer_is_no_score(
    script: Scripted, where: Texts, tmp_path: Path, kind: str, state: str
) -> None:
    """Every test question about some latents gets it."""

    def fault(number: int, messages: list[dict[str, str]]) -> str | None:
        said = messages[1]["content"].split("\n")[0]
        return kind if said.startswith("Explanation") and ("w12" in said or "w6" in said) else None

    script.fault = fault
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script, timeout=20.0))
    for test in ("detection", "fuzzing"):
        figures = found["coders"]["coder"]["tests"][test]
        assert figures["states"] == {"ok": 4, state: 2}
        assert figures["unweighted"]["mean"] > 0.95
        assert figures["unweighted"]["coverage"] == pytest.approx(4 / 6)
        low, high = figures["unweighted"]["bounds"]
        assert low < 0.7 and high > 0.95
    assert any(state in flag for flag in found["flags"])
    # What failed is asked again another time, what was answered badly is not.
    script.fault = lambda n, m: None
    n = len(script.bodies)
    again = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert (len(script.bodies) > n) == (state == "failed")
    if state == "failed":
        assert again["coders"]["coder"]["tests"]["fuzzing"]["states"] == {"ok": 6}


def test_no_credit_stops_and_loses_nothing(
    script: Scripted, where: Texts, tmp_path: Path, right: Interpretability
) -> None:
    script.fault = lambda n, m: "402" if n >= 40 else None
    of = planted.materials(tmp_path, few_words(where))
    with pytest.raises(UserError, match=r"no credit left.*goes on from there"):
        interpret(of, endpoint(script))
    paid = script.questions()
    assert len(paid) >= 30
    assert (tmp_path / "interp" / "simulated-loopback" / "interp.json").exists()
    script.fault = lambda n, m: None
    assert interpret(of, endpoint(script))["coders"] == right["coders"]
    assert set(script.questions().values()) == {1}


def test_a_judge_that_fails_for_ever_is_left_alone(script: Scripted, tmp_path: Path) -> None:
    script.fault = lambda n, m: "500"
    judge = endpoint(script, first_wait=0.001)
    replies: list[Reply] = []
    with pytest.raises(JudgeStopped, match="attempt after attempt failed"):
        judge.ask(requests(500), lambda q, r: replies.append(r))
    assert len(script.bodies) < 60 and all(r.status == "failed" for r in replies)


def test_a_judge_that_dies_midway(script: Scripted) -> None:
    judge = endpoint(script, first_wait=0.001)
    got: list[str] = []
    gone = replace(judge.config, base="http://127.0.0.1:9/v1")

    def asked(request: Request, reply: Reply) -> None:
        got.append(reply.status)
        if len(got) == 20:
            judge.config = gone

    with pytest.raises(JudgeStopped, match="attempt after attempt failed"):
        judge.ask(requests(300), asked)
    assert got.count("ok") >= 20


def test_what_the_callback_raises_comes_out(script: Scripted) -> None:
    def asked(request: Request, reply: Reply) -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        endpoint(script).ask(requests(50), asked)


def test_no_more_requests_at_once_than_asked_for(script: Scripted) -> None:
    script.delay = 0.02
    endpoint(script, concurrency=6).ask(requests(60), lambda q, r: None)
    assert 4 <= script.most_at_once <= 6


def test_fewer_at_once_when_told_and_slowly_more_again() -> None:
    async def run() -> None:
        gate = Gate(16)
        now = time.monotonic()
        for _ in range(3):
            gate.slow_down(now, None)  # of requests that were under way together
        assert gate.limit == 8
        gate.slow_down(time.monotonic(), None)
        assert gate.limit == 4
        for _ in range(4):
            await gate.enter()
        fifth = asyncio.create_task(gate.enter())
        await asyncio.sleep(0.01)
        assert not fifth.done()
        gate.leave()
        await asyncio.wait_for(fifth, 1)
        for _ in range(4):
            gate.went_well()
        assert gate.limit == 5
        for _ in range(200):
            gate.went_well()
        assert gate.limit == 16
        gate.slow_down(time.monotonic(), 0.05)
        for _ in range(4):
            gate.leave()
        began = time.monotonic()
        await gate.enter()
        assert time.monotonic() - began >= 0.04

    asyncio.run(run())


def test_retry_after_is_honoured(script: Scripted) -> None:
    times: list[float] = []

    def fault(number: int, messages: list[dict[str, str]]) -> str | None:
        times.append(time.monotonic())
        return "429" if len(times) == 1 else None

    script.fault = fault
    endpoint(script, concurrency=1).ask(requests(1), lambda q, r: None)
    assert times[1] - times[0] >= 0.05


def test_retry_after_in_all_its_forms() -> None:
    def after(text: str) -> float | None:
        return retry_after(httpx.Headers({"Retry-After": text}))

    assert after("2") == 2 and after("1e9") == 120 and after("-5") == 0
    assert after("soon") is None and after("nan") is None
    assert after("Fri, 01 Jan 2100 00:00:00 GMT") == 120
    assert after("Fri, 01 Jan 2010 00:00:00 GMT") == 0


# what a review found


def test_a_429_at_the_very_end_does_not_hang(script: Scripted) -> None:
    """The last request of all is told to wait when all other workers are gone."""
    last = requests(8)[-1].messages[1]["content"]
    seen: list[int] = []

    def fault(number: int, messages: list[dict[str, str]]) -> str | None:
        if messages[1]["content"] == last and not seen:
            seen.append(number)
            time.sleep(0.3)
            return "429"
        return None

    script.fault = fault
    replies: list[Reply] = []
    endpoint(script, timeout=5.0).ask(requests(8), lambda q, r: replies.append(r))
    assert [r.status for r in replies] == ["ok"] * 8


@pytest.mark.parametrize("concurrency", [1, 8])
def test_429_for_ever_comes_to_an_end(script: Scripted, concurrency: int) -> None:
    script.fault = lambda n, m: "429"
    judge = endpoint(script, concurrency=concurrency, attempts=3, first_wait=0.001)
    judge.config = replace(judge.config, attempts=3)
    with pytest.raises(JudgeStopped, match="attempt after attempt failed"):
        judge.ask(requests(400), lambda q, r: None)
    assert len(script.bodies) < 4 * (2 * concurrency + 8) + concurrency + 1


def test_limits_at_the_start_are_no_sign_of_what_it_can_do(script: Scripted) -> None:
    script.logprobs = True
    script.fault = lambda n, m: "429" if n < 4 else None
    judge = endpoint(script)
    judge.connect()
    assert judge.facts and judge.facts.probabilities
    assert judge.facts.structured_output == "json_schema"


def test_no_quota_is_no_limit_of_rates(script: Scripted) -> None:
    script.fault = lambda n, m: "quota"
    with pytest.raises(JudgeStopped, match="no credit left"):
        endpoint(script).ask(requests(5), lambda q, r: None)
    assert len(script.bodies) <= 8


@pytest.mark.parametrize("fault", ["bad gzip", "bad retry-after", "half a character"])
def test_no_server_causes_a_traceback(
    script: Scripted, where: Texts, tmp_path: Path, right: Interpretability, fault: str
) -> None:
    script.fault = once_each(fault) if fault != "half a character" else lambda n, m: fault
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    if fault != "half a character":
        assert found["coders"] == right["coders"]
    (tmp_path / "interp" / "simulated-loopback" / "latents.jsonl").read_text().encode()


def test_what_was_not_answered_at_all_writes_no_results(script: Scripted, where: Texts,
                                                        tmp_path: Path) -> None:  # fmt: skip
    of = planted.materials(tmp_path, few_words(where))
    interpret(of, endpoint(script))
    judge = endpoint(script)
    judge.model = "no-such-model"
    with pytest.raises(JudgeStopped, match="no model"):
        interpret(of, judge)
    folders = {p.name for p in (tmp_path / "interp").iterdir() if p.is_dir()}
    assert folders == {"simulated-loopback"}
    # And a judge that has nothing left to answer keeps what was found out about it.
    before = (tmp_path / "interp" / "simulated-loopback" / "interp.json").read_bytes()
    interpret(of, endpoint(script))
    assert (tmp_path / "interp" / "simulated-loopback" / "interp.json").read_bytes() == before
