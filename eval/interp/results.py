"""Figures of a run's latents by one judge, made from the ledger alone: to score again asks nothing.

RUN/interp/<name>/interp.json         figures
RUN/interp/<name>/latents.jsonl       of each latent what was shown, the answers, the scores
RUN/interp/<name>/scores-<test>.csv   coder, latent, score; `bsc eval --ablation-score` reads it
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bsc.eval.interp.aggregate import MISSING, POWER, summary
from bsc.eval.interp.asking import Interpretation
from bsc.eval.interp.config import Prices
from bsc.eval.interp.cost import Meter
from bsc.eval.interp.judges.prompts import PROMPTS_VERSION
from bsc.eval.interp.material import Material
from bsc.eval.interp.offline import scores_csv
from bsc.eval.interp.questions import CHANCE, Question, read_answers, score
from bsc.files import write_atomically
from bsc.formats import percent
from bsc.progress import stage
from bsc.records import parse_json, read_record, write_record

__all__ = ["INTERP_VERSION", "is_simulated", "write_results"]

INTERP_VERSION = 1
_ALWAYS = 0.9
"""A judge that answers the same to more than this share of either side is flagged."""


def write_results(asked: Interpretation, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Score what is in the ledger and write it into a folder.

    Args:
        asked: the questions, and where their answers are.
        facts: about the judge.
        folder: of the results; what was there of the same judge is replaced.

    Returns:
        What interp.json holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = asked.materials.names
    before = _of_other_coders(asked, folder)
    coders: dict[str, Any] = {}
    partial = folder / "latents.jsonl.partial"
    tables: dict[str, list[dict[str, Any]]] = {kind: [] for kind in asked.config.tests}
    with stage("score", len(names), "coders") as progress, partial.open("w") as file:
        for latent in _lines_of(folder / "latents.jsonl", before.get("coders", {})):
            _put(latent, file, tables)
        for material in asked.materials:
            latents = []
            for latent in _latents(asked, material):
                _put(latent, file, tables)
                for test in latent["tests"].values():
                    test.pop("questions", None)
                latents.append(latent)
            coders[material.coder] = _figures(asked, material, latents)
            progress.advance(1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "latents.jsonl")
    for path in folder.glob("scores-*.csv"):
        if path.name not in {f"scores-{kind}.csv" for kind in tables}:
            path.unlink()  # of tests that no coder has now
    for kind, rows in tables.items():
        write_atomically(folder / f"scores-{kind}.csv", scores_csv(rows))
    coders = before.get("coders", {}) | coders
    coders = {name: coders[name] for name in asked.materials.every_name if name in coders}
    # A judge that had nothing left to answer was not asked again what it can do.
    facts = {**before.get("judge", {}), **facts}
    usage = Meter(Prices(), asked.ledger.entries(asked.model))
    result = {
        "version": INTERP_VERSION,
        "prompts": PROMPTS_VERSION,
        "store_id": asked.materials.store.store_id,
        "judge": {**facts, "model": asked.model, "simulated": is_simulated(asked.model)},
        "parameters": asked.parameters,
        "config": asked.config.model_dump(mode="json"),
        "power": POWER,
        "missing_share_for_bounds": MISSING,
        "coders": coders,
        "usage": {
            "requests": usage.requests, "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached, "completion_tokens": usage.completion,
        },
        "flags": _flags(coders),
    }  # fmt: skip
    write_record(folder / "interp.json", result)
    return result


def _of_other_coders(asked: Interpretation, folder: Path) -> dict[str, Any]:
    """What an earlier scoring by this judge has of coders that are not scored now; and what is
    known of the judge."""
    try:
        old = read_record(folder / "interp.json", "scores", INTERP_VERSION)
        if (old["judge"]["model"], old["store_id"]) != (
            asked.model, asked.materials.store.store_id,
        ):  # fmt: skip
            return {}
        kept = {n: c for n, c in old["coders"].items() if n not in asked.materials.names}
        return {"judge": old["judge"], "coders": kept}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config decides the scores of a coder."""
    return {name: value for name, value in config.items() if name != "coders"}


def _lines_of(path: Path, coders: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Latents of some coders, from the file of an earlier scoring."""
    if coders:
        with path.open() as file:
            for line in file:
                latent: dict[str, Any] = parse_json(line)
                if latent["coder"] in coders:
                    yield latent


def _put(latent: dict[str, Any], file: TextIO, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Into the file, and its scores into the tables."""
    file.write(json.dumps(latent, sort_keys=True) + "\n")
    for kind, one in latent["tests"].items():
        if one["score"] is not None:
            row = {"coder": latent["coder"], "latent": latent["latent"], "score": one["score"]}
            tables.setdefault(kind, []).append(row)


def _latents(asked: Interpretation, material: Material) -> Iterator[dict[str, Any]]:
    explanations = asked.explanations(material)
    for latent in material.chosen.latents():
        evidence = material.evidence(latent)
        explanation, state = explanations.get(latent, (None, "unscorable"))
        tests = asked.tests(material, evidence, explanation)
        shown = {}
        for kind in asked.config.tests:
            if tests.get(kind):
                shown[kind] = _scored(asked, tests[kind], kind)
                if kind == "fuzzing":
                    shown[kind]["negatives"] = "active" if evidence.silent_token else "silent"
            else:
                why = evidence.why_not or (
                    "too few windows without a firing" if kind in tests else "no explanation"
                )
                shown[kind] = {
                    "state": state if why == "no explanation" else "unscorable", "why": why,
                    "score": None, "low": 0.0, "high": 1.0, "excerpts": 0, "statuses": {},
                }  # fmt: skip
        yield {
            "coder": material.coder, "latent": latent,
            "rate": int(material.counts[latent]) / material.rows,
            "explanation": explanation, "explanation_state": state,
            "explained_from": asked.explained_from(material, evidence), "tests": shown,
        }  # fmt: skip


def _scored(asked: Interpretation, questions: list[Question], kind: Any) -> dict[str, Any]:
    answers, shown = [], []
    for question in questions:
        key = asked.key(question.request)
        reply = asked.ledger.get(key)
        read = read_answers(question, reply, failed=asked.ledger.failed(key))
        answers += read
        shown.append(
            {
                "excerpts": [[list(run) for run in e] for e in question.excerpts],
                "truth": list(question.truth),
                "answers": [a.answer for a in read],
                "reply": None if reply is None else reply.text[:2_000],
            }
        )
    return score(answers, kind) | {"questions": shown}


def _figures(
    asked: Interpretation, material: Material, latents: list[dict[str, Any]]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "latents": len(latents),
        "settings": settings_of(asked.config.model_dump(mode="json")),
        "sampled": {n: len(d.latent) for n, d in material.chosen._asdict().items()},
        "census": int(material.chosen.weighted.census.sum()),
        "too_rare": {n: d.left_out for n, d in material.chosen._asdict().items()},
        "explanations": dict(Counter(one["explanation_state"] for one in latents)),
        "tests": {},
    }
    for kind in asked.config.tests:
        scores = {one["latent"]: one["tests"][kind] for one in latents}
        counts: Counter[str] = Counter()
        for one in scores.values():
            counts.update(one["statuses"])
        test: dict[str, Any] = {
            "chance": CHANCE[kind],
            "states": dict(Counter(s["state"] for s in scores.values())),
            "why_not": dict(Counter(s["why"] for s in scores.values() if "why" in s)),
            "answers": dict(counts),
            **summary(scores, material.chosen, material.counts, material.rows, "score"),
        }
        if kind == "fuzzing":
            test["negatives"] = dict(
                Counter(s["negatives"] for s in scores.values() if "negatives" in s)
            )
        for extra in ("tpr", "tnr", "f1", "auc"):
            if any(extra in s for s in scores.values()):
                test[extra] = summary(
                    scores, material.chosen, material.counts, material.rows, extra
                )
        found["tests"][kind] = test
    return found


def is_simulated(model: str) -> bool:
    """Whether a judge says of itself, by its name, that it is none: ``simulated-...``."""
    return model.lower().startswith("simulated")


def _flags(coders: Mapping[str, Any]) -> list[str]:
    """What makes a judge's scores doubtful."""
    found = []
    settings = [c["settings"] for c in coders.values()]
    if any(s != settings[0] for s in settings):
        differ = sorted({n for s in settings for n in s if s[n] != settings[0].get(n)})
        found.append(f"coders were scored with different settings: {', '.join(differ)}")
    for kind in ("detection", "fuzzing"):
        rates = [
            [c["tests"][kind][side]["unweighted"]["mean"] for side in ("tpr", "tnr")]
            for c in coders.values()
            if "tpr" in c["tests"].get(kind, {})
        ]
        known = [(tpr, tnr) for tpr, tnr in rates if tpr is not None and tnr is not None]
        if not known:
            continue
        tpr, tnr = np.mean(known, axis=0)
        if 1 - tnr > _ALWAYS and tpr > _ALWAYS:
            found.append(f"{kind}: it says yes to nearly everything ({percent(1 - tnr)} of the "
                         f"windows without a firing)")  # fmt: skip
        elif tpr < 1 - _ALWAYS and tnr > _ALWAYS:
            found.append(f"{kind}: it says no to nearly everything ({percent(1 - tpr)} of the "
                         f"windows with a firing)")  # fmt: skip
    answers: Counter[str] = Counter()
    for coder in coders.values():
        for test in coder["tests"].values():
            answers.update(test["answers"])
    total = sum(answers.values())
    for state, n in sorted(answers.items()):
        if state != "ok" and n > MISSING * total:
            found.append(f"{percent(n / total, 1)} of the answers are {state}; see the bounds")
    return found
