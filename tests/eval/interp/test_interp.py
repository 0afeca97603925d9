"""The whole of it with judges whose scores are known beforehand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsc.errors import UserError
from bsc.eval.interp.config import InterpConfig, Prices
from bsc.eval.interp.cost import Meter
from bsc.eval.interp.evidence import Texts
from bsc.eval.interp.interp import (
    cost_of,
    export_requests,
    import_replies,
    interpret,
    result_name,
)
from bsc.eval.interp.judges.judge import NamedJudge
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.scores import Interpretability
from bsc.records import write_record
from tests.eval.interp import planted
from tests.eval.interp.scripted import (
    Answer,
    Direct,
    always_yes,
    excerpts_of,
    kind_of,
    marked,
    rule,
    uniform,
)

WORDS = [*range(4, 40, 2)]


@pytest.fixture(scope="module")
def where() -> Texts:
    return planted.texts(documents=120, tokens=300)


def words(where: Texts, **config: Any) -> Material:
    """Latents of one word each."""
    own = InterpConfig(excerpt_tokens=16, latents=len(WORDS), **config)
    return planted.material(where, planted.word_masks(where, WORDS), own)


def mean(result: Interpretability, test: str, design: str = "unweighted") -> float:
    return float(result.coders["coder"].tests[test][design].mean)


def test_true_explanations_are_near_one_and_others_near_chance(
    where: Texts, tmp_path: Path
) -> None:
    """A judge that goes by a rule: it explains by the marked words, and looks for them."""
    found = {}
    for what in ("own", "shuffled", "blank"):
        of = planted.materials(tmp_path, words(where, explanations=what))
        found[what] = interpret(of, Direct(rule))
    for test in ("detection", "fuzzing"):
        assert mean(found["own"], test) > 0.98 and mean(found["own"], test, "weighted") > 0.98
        for control in ("shuffled", "blank"):
            assert abs(mean(found[control], test) - 0.5) < 0.04
    # No explanation is needed to find an intruder.
    assert mean(found["own"], "intruder") > 0.98
    assert mean(found["blank"], "intruder") == mean(found["own"], "intruder")
    # Each control stands in a folder of its own.
    folders = {p.name for p in (tmp_path / "interp").iterdir() if p.is_dir()}
    assert folders == {"simulated-judge", "simulated-judge+shuffled", "simulated-judge+blank"}


def simulated(where: Texts, tpr: float, fpr: float) -> Answer:
    """A judge that knows the truth, right as often as it should be, by a hash of the question."""
    words = {f"w{w}" for w in WORDS}

    def answer(kind: str, messages: list[dict[str, str]]) -> str:
        if kind == "explain":
            (word,) = {w for e in excerpts_of(messages) for w in marked(e)}
            return json.dumps({"explanation": word})
        word = json.loads(messages[1]["content"].split("\n")[0].removeprefix("Explanation: "))
        assert word in words
        answers = {}
        for i, excerpt in enumerate(excerpts_of(messages), 1):
            text = excerpt.replace("<<", "").replace(">>", "") + " "
            fires = f" {word} " in text
            answers[str(i)] = int(uniform("judge", kind, word, excerpt) < (tpr if fires else fpr))
        return json.dumps(answers)

    return answer


@pytest.mark.parametrize(("tpr", "fpr"), [(0.9, 0.1), (0.9, 0.5), (0.5, 0.5)])
def test_a_judge_of_known_rates_gets_the_scores_that_follow(
    where: Texts, tmp_path: Path, tpr: float, fpr: float
) -> None:
    of = planted.materials(tmp_path, words(where, tests=("detection", "fuzzing"), test_excerpts=40))
    result = interpret(of, Direct(simulated(where, tpr, fpr)))
    for test in ("detection", "fuzzing"):
        found = result["coders"]["coder"]["tests"][test]
        assert found["unweighted"]["mean"] == pytest.approx((tpr + 1 - fpr) / 2, abs=0.05)
        assert found["tpr"]["unweighted"]["mean"] == pytest.approx(tpr, abs=0.05)
        assert found["tnr"]["unweighted"]["mean"] == pytest.approx(1 - fpr, abs=0.05)
        # The mean of F1 is not F1 of the means; it is near it.
        f1 = 2 * tpr / (1 + tpr + fpr)
        assert found["f1"]["unweighted"]["mean"] == pytest.approx(f1, abs=0.05)
        low, high = found["unweighted"]["interval"]
        assert low < found["unweighted"]["mean"] < high
        assert found["unweighted"]["coverage"] == 1
    assert result["flags"] == [] and result["judge"]["simulated"]


def test_a_judge_that_always_says_yes_is_flagged_and_at_chance(
    where: Texts, tmp_path: Path
) -> None:
    result = interpret(planted.materials(tmp_path, words(where)), Direct(always_yes))
    for test in ("detection", "fuzzing"):
        assert mean(result, test) == 0.5
        assert result["coders"]["coder"]["tests"][test]["f1"]["unweighted"][
            "mean"
        ] == pytest.approx(2 / 3)
    assert sum("says yes to nearly everything" in f for f in result["flags"]) == 2


def test_nothing_is_asked_twice_and_another_judge_replaces_nothing(
    where: Texts, tmp_path: Path
) -> None:
    of = planted.materials(tmp_path, words(where))
    first, again, other = Direct(rule), Direct(rule), Direct(always_yes, "simulated-other")
    one = interpret(of, first)
    assert len(first.asked) > 100
    path = tmp_path / "interp" / "simulated-judge" / "interp.json"
    before = path.read_bytes()
    assert interpret(of, again) == one and again.asked == []
    interpret(of, other)
    assert len(other.asked) > 100 and path.read_bytes() == before
    # A larger sample asks for what is new alone; a new seed asks anew.
    more = planted.materials(tmp_path, words(where, test_excerpts=24))
    third = Direct(rule)
    interpret(more, third)
    assert not any(r.kind == "explain" for r in third.asked) and third.asked


def test_scores_are_made_from_the_ledger_alone(where: Texts, tmp_path: Path) -> None:
    of = planted.materials(tmp_path, words(where))
    interpret(of, Direct(rule))
    folder = tmp_path / "interp" / "simulated-judge"
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    interpret(of, Direct(rule))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    with (folder / "scores-fuzzing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(r["latent"]) for r in rows} == set(range(len(WORDS)))
    lines = [json.loads(line) for line in (folder / "latents.jsonl").open()]
    assert all(one["explanation"].startswith("fires on: w") for one in lines)
    assert len(lines[0]["explained_from"]) == 20
    question = lines[0]["tests"]["fuzzing"]["questions"][0]
    assert len(question["excerpts"]) == len(question["truth"]) == len(question["answers"]) == 5


def test_failures_never_become_scores(where: Texts, tmp_path: Path) -> None:
    """Some questions get nonsense for an answer, and some a refusal."""

    def answer(kind: str, messages: list[dict[str, str]]) -> str:
        if kind in ("explain", "intruder"):
            return rule(kind, messages)
        fate = uniform("fate", messages)
        if fate < 0.3:
            return "hm." if fate < 0.15 else "I'm sorry, but I can't."
        return rule(kind, messages)

    whole = interpret(planted.materials(tmp_path / "a", words(where)), Direct(rule))
    holed = interpret(planted.materials(tmp_path / "b", words(where)), Direct(answer))
    for test in ("detection", "fuzzing"):
        a, b = (r["coders"]["coder"]["tests"][test] for r in (whole, holed))
        assert abs(a["unweighted"]["mean"] - b["unweighted"]["mean"]) < 0.01
        asked = sum(b["answers"].values())
        assert 0.07 < b["answers"]["unparsable"] / asked < 0.25
        assert 0.07 < b["answers"]["refused"] / asked < 0.25
        low, high = b["unweighted"]["bounds"]
        assert low < 0.9 and high >= b["unweighted"]["mean"]
    assert any("unparsable" in f for f in holed["flags"])
    assert any("refused" in f for f in holed["flags"])


def test_frequent_latents_are_scored_by_tokens_and_restless_ones_not_at_all(
    where: Texts, tmp_path: Path
) -> None:
    ids = where.split_text.ids
    masks = [ids < 8, ids < 14, np.ones(len(ids), bool), ids == 30]
    config = InterpConfig(excerpt_tokens=16, latents=4, census_rate=0.1)
    of = planted.materials(tmp_path, planted.material(where, masks, config))

    result = interpret(of, Direct(rule))
    test = result["coders"]["coder"]["tests"]["fuzzing"]
    assert test["negatives"] == {"active": 2, "silent": 1}
    assert test["states"] == {"ok": 3, "unscorable": 1}
    detection = result["coders"]["coder"]["tests"]["detection"]
    assert detection["states"]["unscorable"] == 3
    assert detection["why_not"] == {"too few excerpts without a firing": 3}
    # What cannot be scored takes nearly all firings, and the bounds say so.
    assert detection["weighted"]["coverage"] < 0.05
    low, high = detection["weighted"]["bounds"]
    assert low < 0.05 and high > 0.95
    assert test["weighted"]["coverage"] < 0.7 < test["weighted"]["bounds"][1]
    by = {json.loads(line)["latent"]: json.loads(line) for line in
          (tmp_path / "interp" / "simulated-judge" / "latents.jsonl").open()}  # fmt: skip
    assert by[0]["tests"]["fuzzing"]["score"] > 0.7
    assert by[2]["tests"]["fuzzing"]["state"] == "unscorable"


def test_files_instead_of_an_endpoint(where: Texts, tmp_path: Path) -> None:
    """Two rounds: explanations, then tests; as a batch API returns them, and as people write."""
    of = planted.materials(tmp_path, words(where))
    requests, replies = tmp_path / "requests.jsonl", tmp_path / "replies.jsonl"
    for round_number in range(2):
        n, more = export_requests(of, "simulated-batch", requests)
        lines = [json.loads(line) for line in requests.open()]
        assert len(lines) == n and more == (round_number == 0)
        with replies.open("w") as file:
            for i, line in enumerate(lines):
                body = line["body"]
                assert body["model"] == "simulated-batch" and body["temperature"] == 0
                text = rule(kind_of(body["messages"]), body["messages"])
                reply: dict[str, Any] = {"custom_id": line["custom_id"]}
                if i % 2:
                    reply["reply"] = json.loads(text)
                else:
                    message = {"role": "assistant", "content": text}
                    value = {"choices": [{"message": message}], "usage": {"prompt_tokens": 9}}
                    reply["response"] = {"status_code": 200, "body": value}
                file.write(json.dumps(reply) + "\n")
        result = import_replies(of, "simulated-batch", replies)
    assert export_requests(of, "simulated-batch", requests) == (0, False)
    direct = interpret(planted.materials(tmp_path / "direct", words(where)), Direct(rule))
    assert result["coders"] == direct["coders"]
    replies.write_text('{"custom_id": "x", "reply": "1"}\n')
    with pytest.raises(UserError, match="none of its 1 lines answers a question"):
        import_replies(of, "simulated-batch", replies)
    replies.write_text('{"reply": "1"}\n')
    with pytest.raises(UserError, match="line 1: expected custom_id"):
        import_replies(of, "simulated-batch", replies)
    with pytest.raises(UserError, match="by way of files"):
        interpret(planted.materials(tmp_path / "c", words(where)), NamedJudge("nobody"))


def test_a_dry_run_counts_what_would_be_asked(where: Texts, tmp_path: Path) -> None:
    of = planted.materials(tmp_path, words(where))
    judge = Direct(rule)
    estimate = cost_of(of, judge)
    assert judge.asked == []
    interpret(of, judge)
    by_kind = {k: [r for r in judge.asked if r.kind == k] for k in estimate}
    assert {k: e.requests for k, e in estimate.items()} == {k: len(r) for k, r in by_kind.items()}
    for kind, one in estimate.items():
        characters = sum(r.characters for r in by_kind[kind])
        # An explanation that is not there yet is taken to be longer than these are.
        assert 0.95 < one.prompt_tokens / (characters / 4) < (1.1 if kind == "explain" else 1.3)
        assert 0.2 < one.shared_tokens / one.prompt_tokens < 1
    assert cost_of(of, judge) == {}


def test_a_budget_is_never_exceeded_and_can_be_raised(where: Texts, tmp_path: Path) -> None:
    of = planted.materials(tmp_path, words(where))
    prices = Prices(price_in=10, price_out=30, budget=0.2)

    class Dear(Direct):
        """Takes as many tokens as it may."""

        def ask(self, requests: Any, asked: Any) -> None:
            def counted(request: Request, reply: Any) -> None:
                asked(request, reply._replace(prompt_tokens=request.characters // 3,
                                              completion_tokens=request.max_tokens))  # fmt: skip

            super().ask(requests, counted)

    judge = Dear(rule)
    part = interpret(of, judge, prices)
    spent = prices.cost(part["usage"]["prompt_tokens"], 0, part["usage"]["completion_tokens"])
    assert 0.15 < spent <= 0.2
    states = part["coders"]["coder"]["tests"]["fuzzing"]["states"]
    assert states.get("not asked", 0) > 0
    n = len(judge.asked)
    interpret(of, judge, prices)
    assert len(judge.asked) == n  # what was spent before counts
    whole = interpret(of, judge, Prices(price_in=10, price_out=30, budget=100))
    assert len(judge.asked) > n and mean(whole, "fuzzing") > 0.98
    assert len({json.dumps(r.messages) for r in judge.asked}) == len(judge.asked)


def test_requests_under_way_count_against_the_budget() -> None:
    request = Request("fuzzing", "c", 1, 0, ({"role": "user", "content": "x" * 1_000},), 5, 100)
    prices = Prices(price_in=1_000, price_out=1_000, budget=4.0)
    meter = Meter(prices)
    # None of them is answered yet: about 1.1 each.
    assert len(list(meter.let_through(request._replace(part=i) for i in range(100)))) == 3
    assert meter.held_back and meter.spent == 0


def test_explanations_from_a_file(where: Texts, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f'coder,{i},"fires on: w{w}"' for i, w in enumerate(WORDS[:10])]
    path.write_text("\n".join(["coder,latent,explanation", *rows]))
    of = planted.materials(tmp_path, words(where, explanations=str(path)))
    judge = Direct(rule)
    result = interpret(of, judge)
    assert not any(r.kind == "explain" for r in judge.asked)
    assert mean(result, "fuzzing") > 0.98
    assert result["coders"]["coder"]["explanations"] == {"ok": 10, "not asked": len(WORDS) - 10}
    path.write_text("coder,latent\nx,1")
    with pytest.raises(UserError, match="needs coder, latent and explanation"):
        interpret(of, judge)


def test_names_of_results() -> None:
    usual = InterpConfig()
    assert result_name("m", InterpConfig(marks="strong", explanations="blank")) == "m+strong+blank"
    names = ["a/b", "a-b", "a:b", "../../etc", "...", "offline", "ledger.jsonl", "x" * 300,
             "x" * 299, "\u6a21" * 100]  # fmt: skip
    found = [result_name(n, usual) for n in names]
    found += [result_name("a-b", InterpConfig(explanations=e)) for e in ("blank", "x/b", "y/b")]
    assert len(set(found)) == len(found)
    for name in found:
        assert len(name) < 140 and not set(name) & set("/\\:") and name.strip(".")
        assert name not in ("offline", "ledger.jsonl")


@pytest.mark.parametrize("name", ["../x", "a/b", "offline", ""])
def test_a_name_stays_in_its_folder(where: Texts, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        interpret(planted.materials(tmp_path, words(where)), Direct(rule), name=name)


def test_materials_is_what_the_planted_one_stands_for() -> None:
    assert {"names", "run", "store", "config"} <= set(planted.Planted.__init__.__code__.co_names)
    assert hasattr(Materials, "__iter__")


def test_results_of_an_older_version_by_another_judge_are_not_replaced(
    where: Texts, tmp_path: Path
) -> None:
    folder = tmp_path / "interp" / "pilot"
    folder.mkdir(parents=True)
    write_record(folder / "interp.json", {"version": 1, "judge": {"model": "somebody"}})
    with pytest.raises(UserError, match="results of another judge are here, somebody"):
        interpret(planted.materials(tmp_path, words(where)), Direct(rule), name="pilot")
    assert "somebody" in (folder / "interp.json").read_text()
