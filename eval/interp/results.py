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

from bsc.errors import UserError
from bsc.eval.interp.aggregate import MISSING, POWER, summary
from bsc.eval.interp.asking import Interpretation
from bsc.eval.interp.config import InterpConfig, Prices, TestKind
from bsc.eval.interp.cost import Meter
from bsc.eval.interp.evidence import Evidence
from bsc.eval.interp.judges.facts import JudgeFacts
from bsc.eval.interp.judges.prompts import PROMPTS_VERSION
from bsc.eval.interp.material import Material
from bsc.eval.interp.offline import LatentNumber, scores_csv
from bsc.eval.interp.questions import CHANCE, Question, read_answers, score
from bsc.eval.interp.scores import (
    INTERP_VERSION,
    Interpretability,
    JudgedCoder,
    JudgedLatent,
    LatentScore,
    SampledMeans,
    ShownQuestion,
    TestScores,
    Usage,
    judged_latents,
    read_judged,
    say_what_is_left_out,
)
from bsc.files import write_atomically
from bsc.formats import percent
from bsc.progress import stage
from bsc.typed import combined, write_typed

__all__ = ["write_results"]

_ALWAYS = 0.9
"""A judge that answers the same to more than this share of either side is flagged."""


Scores = dict[str, list[LatentNumber]]
"""Scores of latents by test, for the tables."""


def write_results(
    asked: Interpretation, facts: JudgeFacts | None, folder: Path
) -> Interpretability:
    """Score what is in the ledger and write it into a folder.

    Args:
        asked: the questions, and where their answers are.
        facts: about the judge; None: it was not asked what it can do.
        folder: of the results; what was there of the same judge is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = asked.materials.names
    before = _before(asked, folder)
    kept = before.coders if before else {}
    kept = {name: coder for name, coder in kept.items() if name not in names}
    scored: dict[str, JudgedCoder] = {}
    partial = folder / "latents.jsonl.partial"
    tables: Scores = {kind: [] for kind in asked.config.tests}
    with stage("score", len(names), "coders") as progress, partial.open("w") as file:
        if kept:
            for _, latent in judged_latents(folder / "latents.jsonl"):
                if latent.coder in kept:
                    _put(latent, file, tables)
        for material in asked.materials:
            tests: list[tuple[str, dict[str, LatentScore]]] = []
            of: list[int] = []
            for latent in _latents(asked, material):
                _put(latent, file, tables)
                of.append(latent.latent)
                tests.append((latent.explanation_state, _without_questions(latent)))
            scored[material.coder] = _figures(asked, material, of, tests)
            progress.advance(1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "latents.jsonl")
    for path in folder.glob("scores-*.csv"):
        if path.name not in {f"scores-{kind}.csv" for kind in tables}:
            path.unlink()  # of tests that no coder has now
    for kind, rows in tables.items():
        write_atomically(folder / f"scores-{kind}.csv", scores_csv(rows))
    every = kept | scored
    coders = {name: every[name] for name in asked.materials.every_name if name in every}
    # A judge that had nothing left to answer was not asked again what it can do.
    known = facts or JudgeFacts.of(asked.model)
    if before is not None:
        known = before.judge.model_copy(update={n: known[n] for n in known.model_fields_set})
    usage = Meter(Prices(), asked.ledger.entries(asked.model))
    result = Interpretability(
        version=INTERP_VERSION,
        prompts=PROMPTS_VERSION,
        store_id=asked.materials.store.store_id,
        judge=known,
        parameters=asked.parameters,
        config=asked.config,
        power=POWER,
        missing_share_for_bounds=MISSING,
        coders=coders,
        usage=Usage(
            requests=usage.requests,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
        ),
        flags=_flags(coders),
    )
    write_typed(folder / "interp.json", result)
    return result


def _before(asked: Interpretation, folder: Path) -> Interpretability | None:
    """An earlier scoring by this judge on this store; None where there is none to be used."""
    try:
        old = read_judged(folder)
    except UserError as error:
        if len(asked.materials.names) < len(asked.materials.every_name):
            say_what_is_left_out(folder, error)
        return None
    same = (old.judge.model, old.store_id) == (asked.model, asked.materials.store.store_id)
    return old if same else None


def settings_of(config: InterpConfig) -> dict[str, Any]:
    """What of a config decides the scores of a coder."""
    return config.model_dump(mode="json", exclude={"coders"})


def _put(latent: JudgedLatent, file: TextIO, tables: Scores) -> None:
    """Into the file, and its scores into the tables."""
    file.write(json.dumps(latent.to_json(), sort_keys=True) + "\n")
    for kind, one in latent.tests.items():
        if one.score is not None:
            row = LatentNumber(latent.coder, latent.latent, one.score)
            tables.setdefault(kind, []).append(row)


def _without_questions(latent: JudgedLatent) -> dict[str, LatentScore]:
    """The scores of a latent alone: of a run with hundreds of coders the rest is not held."""
    return {
        kind: LatentScore(**{n: one[n] for n in one.model_fields_set if n != "questions"})
        for kind, one in latent.tests.items()
    }


def _latents(asked: Interpretation, material: Material) -> Iterator[JudgedLatent]:
    explanations = asked.explanations(material)
    for latent in material.chosen.latents():
        evidence = material.evidence(latent)
        explanation, state = explanations.get(latent, (None, "unscorable"))
        tests = asked.tests(material, evidence, explanation)
        shown: dict[str, LatentScore] = {}
        for kind in asked.config.tests:
            if tests.get(kind):
                shown[kind] = _scored(asked, tests[kind], kind, evidence)
                continue
            why = evidence.why_not or (
                "too few excerpts without a firing" if kind in tests else "no explanation"
            )
            shown[kind] = LatentScore(
                state=state if why == "no explanation" else "unscorable",
                why=why,
                score=None,
                low=0.0,
                high=1.0,
                excerpts=0,
                statuses={},
            )
        yield JudgedLatent(
            coder=material.coder,
            latent=latent,
            rate=int(material.counts[latent]) / material.rows,
            explanation=explanation,
            explanation_state=state,
            explained_from=asked.explained_from(material, evidence),
            tests=shown,
        )


def _scored(
    asked: Interpretation, questions: list[Question], kind: TestKind, evidence: Evidence
) -> LatentScore:
    answers, shown = [], []
    for question in questions:
        key = asked.key(question.request)
        reply = asked.ledger.get(key)
        read = read_answers(question, reply, failed=asked.ledger.failed(key))
        answers += read
        one = ShownQuestion(
            excerpts=[[list(run) for run in e] for e in question.excerpts],
            truth=list(question.truth),
            answers=[a.answer for a in read],
            reply=None if reply is None else reply.text[:2_000],
        )
        shown.append(one)
    some: dict[str, Any] = {}
    if kind == "fuzzing":
        some["negatives"] = "active" if evidence.silent_token else "silent"
    return combined(LatentScore, score(answers, kind), questions=shown, **some)


def _figures(
    asked: Interpretation,
    material: Material,
    latents: list[int],
    tests: list[tuple[str, dict[str, LatentScore]]],
) -> JudgedCoder:
    """The scores of a coder.

    Args:
        asked: the questions.
        material: of the coder.
        latents: that were asked about.
        tests: the state of the explanation and the scores of each of them.
    """
    chosen = material.chosen
    scored = list(zip(latents, tests, strict=True))
    return JudgedCoder(
        latents=len(latents),
        settings=settings_of(asked.config),
        sampled={n: len(d.latent) for n, d in chosen._asdict().items()},
        census=int(chosen.weighted.census.sum()),
        too_rare={n: d.left_out for n, d in chosen._asdict().items()},
        explanations=dict(Counter(state for state, _ in tests)),
        tests={
            kind: _test(kind, material, {i: t[kind] for i, (_, t) in scored})
            for kind in asked.config.tests
        },
    )


def _test(kind: TestKind, material: Material, scores: Mapping[int, LatentScore]) -> TestScores:
    """One test of a coder."""

    def means(key: str) -> SampledMeans:
        return summary(scores, material.chosen, material.counts, material.rows, key)

    counts: Counter[str] = Counter()
    for one in scores.values():
        counts.update(one.statuses)
    some: dict[str, Any] = {
        extra: means(extra)
        for extra in ("tpr", "tnr", "f1", "auc")
        if any(extra in s for s in scores.values())
    }
    if kind == "fuzzing":
        some["negatives"] = dict(Counter(s.negatives for s in scores.values() if s.negatives))
    return combined(
        TestScores,
        means("score"),
        chance=CHANCE[kind],
        states=dict(Counter(s.state for s in scores.values())),
        why_not=dict(Counter(s.why for s in scores.values() if s.why is not None)),
        answers=dict(counts),
        **some,
    )


def _flags(coders: Mapping[str, JudgedCoder]) -> list[str]:
    """What makes a judge's scores doubtful."""
    found = []
    settings = [c.settings for c in coders.values()]
    if any(s != settings[0] for s in settings):
        differ = sorted({n for s in settings for n in s if s[n] != settings[0].get(n)})
        found.append(f"coders were scored with different settings: {', '.join(differ)}")
    for kind in ("detection", "fuzzing"):
        tests = [c.tests[kind] for c in coders.values() if kind in c.tests]
        rates = [(t.tpr.unweighted.mean, t.tnr.unweighted.mean) for t in tests if t.tpr and t.tnr]
        known = [(tpr, tnr) for tpr, tnr in rates if tpr is not None and tnr is not None]
        if not known:
            continue
        tpr, tnr = np.mean(known, axis=0)
        if 1 - tnr > _ALWAYS and tpr > _ALWAYS:
            found.append(
                f"{kind}: it says yes to nearly everything ({percent(1 - tnr)} of the excerpts "
                f"without a firing)"
            )
        elif tpr < 1 - _ALWAYS and tnr > _ALWAYS:
            found.append(
                f"{kind}: it says no to nearly everything ({percent(1 - tpr)} of the excerpts with "
                f"a firing)"
            )
    answers: Counter[str] = Counter()
    for coder in coders.values():
        for test in coder.tests.values():
            answers.update(test.answers)
    total = sum(answers.values())
    for state, n in sorted(answers.items()):
        if state != "ok" and n > MISSING * total:
            found.append(f"{percent(n / total, 1)} of the answers are {state}; see the bounds")
    return found
