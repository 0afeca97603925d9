"""The questions of each test about a latent, and what they say when answered.

Detection: does the latent fire anywhere in this excerpt? Fuzzing: are the marked tokens ones on
which it fires? Intruder: in which one of five marked excerpts does it not fire? Excerpts with and
without firings are shuffled together before they are cut into requests, so a request may hold any
number of either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from bsc.eval.interp.config import TestKind
from bsc.eval.interp.evidence import MIN_EXCERPTS, Evidence, Excerpt, Texts
from bsc.eval.interp.judges.prompts import (
    Request,
    answers_in,
    explain_request,
    intruder_request,
    is_refusal,
    test_request,
)
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.scores import LatentScore

__all__ = [
    "INTRUDER_EXCERPTS",
    "Answered",
    "Question",
    "explain_question",
    "intruder_groups",
    "question_rng",
    "read_answers",
    "score",
    "test_questions",
]

INTRUDER_EXCERPTS = 5
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "intruder": 1 / INTRUDER_EXCERPTS}
_SALT: dict[TestKind, int] = {"detection": 1, "fuzzing": 2, "intruder": 3}


class Question(NamedTuple):
    """A request with what it shows and what is true."""

    request: Request
    excerpts: tuple[tuple[tuple[str, bool], ...], ...]
    truth: tuple[int, ...]
    """1 for each excerpt in which the latent fires, else 0; for an intruder question its number
    alone."""


class Answered(NamedTuple):
    """An answer to one excerpt, or to one intruder question."""

    truth: int
    answer: int | None
    """None: there is none."""
    status: str
    """ok, unparsable, refused, failed or not asked."""
    yes: float | None = None
    """Probability of 1, where the judge gives one."""


def _runs(texts: Texts, excerpt: Excerpt) -> tuple[tuple[str, bool], ...]:
    return tuple(texts.split_text.runs(excerpt.start, excerpt.tokens, excerpt.marks))


def explain_question(texts: Texts, coder: str, evidence: Evidence, seed: int) -> Question:
    """Ask for an explanation. The order of the excerpts says nothing about their strength."""
    rng = np.random.Generator(np.random.Philox(key=[seed, evidence.latent]))
    order = rng.permutation(len(evidence.explain))
    shown = tuple(_runs(texts, evidence.explain[i]) for i in order)
    return Question(explain_request(coder, evidence.latent, shown), shown, ())


def test_questions(
    texts: Texts,
    coder: str,
    evidence: Evidence,
    explanation: str,
    kind: TestKind,
    *,
    items: int,
    seed: int,
) -> list[Question]:
    """The questions of one test.

    Args:
        texts: of the split.
        coder: its name.
        evidence: excerpts of the latent.
        explanation: what its excerpts are judged by; the intruder test needs none.
        kind: of test.
        items: excerpts in one request.
        seed: of the order.

    Returns:
        None at all where the latent is unscorable by this test.
    """
    latent = evidence.latent
    rng = question_rng(seed, latent, kind)
    firing, silent = _both_sides(evidence, kind)
    if min(len(firing), len(silent)) < MIN_EXCERPTS:
        return []
    if kind == "intruder":
        found = []
        for part, (excerpts, place) in enumerate(intruder_groups(evidence, rng)):
            shown = tuple(_runs(texts, w) for w in excerpts)
            request = intruder_request(coder, latent, part, shown)
            found.append(Question(request, shown, (place + 1,)))
        return found
    excerpts = [*firing, *silent]
    truth = [1] * len(firing) + [0] * len(silent)
    order = rng.permutation(len(excerpts))
    found = []
    for part, start in enumerate(range(0, len(order), items)):
        here = order[start : start + items]
        shown = tuple(_runs(texts, excerpts[i]) for i in here)
        request = test_request(kind, coder, latent, part, explanation, shown)
        found.append(Question(request, shown, tuple(truth[i] for i in here)))
    return found


def question_rng(seed: int, latent: int, kind: TestKind) -> np.random.Generator:
    """What the questions of a test about a latent are shuffled by."""
    return np.random.Generator(np.random.Philox(key=[seed, latent << 8 | _SALT[kind]]))


def _both_sides(evidence: Evidence, kind: TestKind) -> tuple[list[Excerpt], list[Excerpt]]:
    if kind == "fuzzing" and evidence.silent_token:
        return evidence.firing_token, evidence.silent_token
    return evidence.firing, evidence.silent


def intruder_groups(
    evidence: Evidence, rng: np.random.Generator
) -> list[tuple[list[Excerpt], int]]:
    """Five excerpts of like strength, one of them replaced by its silent partner, and which one.

    The partner has the marks, the length and the edges of the one that it replaces, so the five
    look like any five excerpts in which the latent fires.

    Args:
        evidence: excerpts of the latent.
        rng: for the choice of the one, and of the order.
    """
    firing, silent, size = evidence.firing, evidence.silent, INTRUDER_EXCERPTS
    order = sorted(range(len(silent)), key=lambda i: (firing[i].stratum, i))
    found = []
    for start in range(0, len(order) - size + 1, size):
        group = [order[start + int(i)] for i in rng.permutation(size)]
        place = int(rng.integers(size))
        excerpts = [firing[i] for i in group]
        excerpts[place] = silent[group[place]]
        found.append((excerpts, place))
    return found


def read_answers(question: Question, reply: Reply | None, *, failed: bool) -> list[Answered]:
    """What a reply says about each excerpt.

    Args:
        question: that was asked.
        reply: None: there is none.
        failed: whether it was asked in vain.
    """
    truth = question.truth
    if reply is None:
        return [Answered(t, None, "failed" if failed else "not asked") for t in truth]
    if reply.status == "refused" or is_refusal(reply.text):
        return [Answered(t, None, "refused") for t in truth]
    kind, items = question.request.kind, question.request.items
    answers = answers_in(reply.text, kind, items)
    yes: list[float | None] = [None] * len(truth)
    if kind != "intruder" and reply.yes is not None and None not in answers:
        yes = _probabilities(reply, len(truth))
    return [
        Answered(t, a, "unparsable" if a is None else "ok", p)
        for t, a, p in zip(truth, answers, yes, strict=True)
    ]


_KEYED = re.compile(r'"(\d{1,3})"\s*:\s*"?([01])')


def _probabilities(reply: Reply, n: int) -> list[float | None]:
    """Probability of 1 for each excerpt, by the key before a digit, or by the order of a list."""
    at = {int(place): p for place, p in reply.yes or []}
    keyed = {int(m[1]): at.get(m.start(2)) for m in _KEYED.finditer(reply.text)}
    if keyed:
        return [keyed.get(i) for i in range(1, n + 1)]
    digits = [
        p
        for place, p in sorted(at.items())
        if reply.text[:place].rstrip().endswith(("[", ",")) or n == 1
    ]
    return list(digits) if len(digits) == n else [None] * n


def score(answers: Sequence[Answered], kind: TestKind) -> LatentScore:
    """Figures of one latent by one test.

    TPR and TNR are shares of the excerpts that were answered; balanced accuracy is their mean. F1
    is that of a test with as many excerpts of either kind: 2 TPR / (1 + TPR + FPR). AUC is over
    probabilities, where the judge gives them.

    Returns:
        With the figures of the test where the state is ok; else the state is what most excerpts
        without an answer are.
    """
    statuses = Counter(a.status for a in answers)
    sides = (
        [answers] if kind == "intruder" else [[a for a in answers if a.truth == t] for t in (1, 0)]
    )
    right, missing, rates = [], [], []
    for side in sides:
        answered = [a for a in side if a.answer is not None]
        right.append(sum(a.answer == a.truth for a in answered))
        missing.append(len(side) - len(answered))
        # Less than half of a side tells nothing that is worth a score.
        rates.append(right[-1] / len(answered) if 2 * len(answered) >= max(1, len(side)) else None)
    low = np.mean([r / len(s) if s else 0.0 for r, s in zip(right, sides, strict=True)])
    high = np.mean(
        [(r + m) / len(s) if s else 1.0 for r, m, s in zip(right, missing, sides, strict=True)]
    )
    found: dict[str, Any] = {
        "statuses": dict(sorted(statuses.items())),
        "excerpts": len(answers),
        "low": float(low),
        "high": float(high),
    }
    known = [float(r) for r in rates if r is not None]
    if len(known) < len(rates):
        worst = Counter({s: n for s, n in statuses.items() if s != "ok"}).most_common(1)
        return LatentScore(state=worst[0][0] if worst else "unparsable", score=None, **found)
    value = float(np.mean(known))
    found |= {"state": "ok", "score": value, "noise": _noise(right, missing, sides)}
    if kind == "intruder":
        return LatentScore(accuracy=value, **found)
    tpr, tnr = known
    found |= {
        "tpr": tpr,
        "tnr": tnr,
        "balanced_accuracy": value,
        "f1": 2 * tpr / (1 + tpr + (1 - tnr)) if tpr else 0.0,
    }
    positive = [a.yes for a in sides[0] if a.yes is not None]
    negative = [a.yes for a in sides[1] if a.yes is not None]
    if len(positive) + len(negative) == sum(a.answer is not None for a in answers):
        u = stats.mannwhitneyu(positive, negative).statistic
        found["auc"] = float(u / (len(positive) * len(negative)))
    return LatentScore(**found)


def _noise(right: Sequence[int], missing: Sequence[int], sides: Sequence[Sequence[Any]]) -> float:
    """Standard error of the score from the number of excerpts, by smoothed shares."""
    variances = []
    for r, m, side in zip(right, missing, sides, strict=True):
        n = len(side) - m
        p = (r + 1) / (n + 2)
        variances.append(p * (1 - p) / (n + 2))
    return float(np.sqrt(np.sum(variances)) / len(sides))
