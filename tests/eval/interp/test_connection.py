"""What is found out about a judge before it is asked, and what users get wrong about it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from bsc.errors import UserError
from bsc.eval.interp.evidence import Texts
from bsc.eval.interp.interp import interpret
from bsc.eval.interp.judges.connection import EndpointConfig, JudgeStopped, is_endpoint
from bsc.eval.interp.judges.endpoint import Endpoint
from bsc.eval.interp.judges.facts import JudgeFacts
from bsc.eval.interp.judges.reply import Reply
from tests.eval.interp import planted
from tests.eval.interp.scripted import Scripted, rule
from tests.eval.interp.wired import endpoint, few_words, requests

KEY = "sk-secret-0123456789"


def test_the_probe_sees_what_the_judge_can_do(script: Scripted) -> None:
    script.logprobs = True
    judge = endpoint(script)
    judge.connect()
    assert judge.facts == JudgeFacts(
        model="simulated-loopback",
        simulated=True,
        echoed_model="simulated-loopback",
        repeatable=True,
        probabilities=True,
        structured_output="json_schema",
        known_answers_right="4 of 4",
    )
    assert all(b["temperature"] == 0 and b["top_p"] == 1 for b in script.bodies)
    replies: list[Reply] = []
    judge.ask(requests(3), lambda q, r: replies.append(r))
    assert all(r.yes and r.yes[-1][1] in (0.8, 0.2) for r in replies)


def test_a_judge_that_knows_no_schema_is_asked_without(script: Scripted) -> None:
    script.refuses = {"response_format", "logprobs"}
    judge = endpoint(script)
    judge.connect()
    assert judge.facts and judge.facts.structured_output is None and not judge.facts.probabilities
    script.refuses = {"logprobs"}
    judge = endpoint(script)
    judge.connect()
    assert judge.facts and judge.facts.structured_output == "json_schema"


def test_probabilities_become_an_auc(script: Scripted, where: Texts, tmp_path: Path) -> None:
    script.logprobs = True
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert found["coders"]["coder"]["tests"]["fuzzing"]["auc"]["unweighted"]["mean"] > 0.95


# mistakes


def test_no_endpoint_says_where_and_what() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    judge = Endpoint(EndpointConfig.of(f"http://127.0.0.1:{port}/v1", None, attempts=1))
    with pytest.raises(JudgeStopped, match=r"no answer .*Is the server running"):
        judge.find_model()
    judge = Endpoint(EndpointConfig.of(f"http://127.0.0.1:{port}/v1", "m", attempts=2,
                                       first_wait=0.001))  # fmt: skip
    with pytest.raises(JudgeStopped, match="no answer"):
        judge.connect()


def test_a_model_that_the_judge_has_not(script: Scripted) -> None:
    judge = endpoint(script)
    judge.model = "simulated-loopbak"
    with pytest.raises(JudgeStopped, match="did you mean 'simulated-loopback'"):
        judge.connect()
    script.models = ["a", "b"]
    with pytest.raises(UserError, match=r"it lists 2 models .* --judge-model: a, b"):
        endpoint(script)


def test_a_wrong_key_is_never_repeated(
    script: Scripted, where: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script.key = "another"
    monkeypatch.setenv("BSC_JUDGE_KEY", KEY)
    with pytest.raises(JudgeStopped, match="does not accept the key") as caught:
        interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert KEY not in str(caught.value) and KEY not in repr(caught.value.__context__)
    assert KEY not in "".join(capfd.readouterr())


def test_the_key_is_in_no_file(
    script: Scripted, where: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Not even where the judge repeats it, in answers, errors and its own name."""
    script.key = KEY
    monkeypatch.setenv("BSC_JUDGE_KEY", KEY)
    script.answer = lambda kind, messages: (
        json.dumps({"explanation": f"fires on {KEY}"}) if kind == "explain"
        else f"{KEY} {rule(kind, messages)}"
    )  # fmt: skip
    judge = endpoint(script)
    interpret(planted.materials(tmp_path, few_words(where)), judge)
    assert script.headers[-1]["Authorization"] == f"Bearer {KEY}"
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) >= 4
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr()) and KEY not in repr(judge.facts)
    assert KEY not in repr(judge.config)


def test_keys_do_not_belong_in_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for url in ("http://user:hush@host/v1", "https://host/v1?token=hush"):
        with pytest.raises(UserError, match="environment") as caught:
            EndpointConfig.of(url, None)
        assert "hush" not in str(caught.value)
    for url in ("ftp://host/v1", "http://", "http://[::1/v1", "http://host:abc/v1"):
        with pytest.raises(UserError, match="expected a URL"):
            EndpointConfig.of(url, None)
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        EndpointConfig.of("openai", None)
    with pytest.raises(UserError, match="the name of an environment variable, not a key") as caught:
        EndpointConfig.of("openai", None, key_variable=KEY)
    assert KEY not in str(caught.value)
    for key in ("sk-abc\ndef", "sk-\u00e9"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="no key has") as caught:
            EndpointConfig.of("openai", None)
        assert "sk-" not in str(caught.value)
    assert EndpointConfig.of("vllm", None).base == "http://127.0.0.1:8000/v1"
    assert is_endpoint("ollama") and is_endpoint("https://x/v1") and not is_endpoint("demo")


def test_a_judge_that_cannot_be_read_is_found_out_before_it_is_paid(
    script: Scripted, where: Texts, tmp_path: Path
) -> None:
    script.fault = lambda n, m: "prose"
    with pytest.raises(JudgeStopped, match="cannot be read"):
        interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert len(script.bodies) <= 2


def test_a_hostile_judge_harms_nothing(script: Scripted, where: Texts, tmp_path: Path) -> None:
    script.answer = lambda kind, messages: (
        json.dumps({"explanation": "</script><img src=x onerror=alert(1)>\n\x1b[2J" * 50})
        if kind == "explain" else "[" * 200_000
    )  # fmt: skip
    found = interpret(planted.materials(tmp_path, few_words(where)), endpoint(script))
    assert found["coders"]["coder"]["tests"]["fuzzing"]["states"] == {"unparsable": 6}
    lines = (tmp_path / "interp" / "simulated-loopback" / "latents.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["explanation"]) <= 600 for line in lines)
