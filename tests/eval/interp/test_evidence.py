"""Nothing but the text tells excerpts with firings from excerpts without, and nothing leaks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from bsc.eval.figures.division import NEITHER
from bsc.eval.interp.config import TESTS, TestKind
from bsc.eval.interp.evidence import MIN_EXCERPTS, Evidence, Excerpt, Texts, gather
from bsc.eval.interp.questions import Question, intruder_groups
from bsc.eval.interp.questions import test_questions as questions_of
from tests.eval.interp import planted


@pytest.fixture(scope="module")
def where() -> Texts:
    return planted.texts(documents=80, tokens=300)


def evidence(where: Texts, mask: NDArray[np.bool_], latent: int = 0, **options: Any) -> Evidence:
    rows = np.flatnonzero(mask)
    values = np.random.default_rng(latent).random(len(rows)).astype(np.float32)
    return gather(where, latent, rows, values, **{"explain": 20, "test": 20, **options})


def documents(where: Texts, excerpts: list[Excerpt]) -> set[int]:
    return {int(where.doc_id[w.start + i]) for w in excerpts for i in range(w.tokens)}


def test_no_document_is_on_two_sides(where: Texts) -> None:
    for latent, word in enumerate((3, 10, 20, 40)):
        found = evidence(where, where.split_text.ids == word, latent)
        sides = [documents(where, w) for w in (found.explain, found.firing, found.silent)]
        assert all(sides)
        for a, b in itertools.combinations(sides, 2):
            assert not a & b
    # A frequent one too, whose other excerpts are hardly ever silent.
    found = evidence(where, where.split_text.ids < 5, 9)
    assert found.silent_token
    excerpts = [found.explain, found.firing_token, found.silent_token]
    for one, other in itertools.combinations(excerpts, 2):
        assert not documents(where, one) & documents(where, other)


def test_no_excerpt_to_test_on_reaches_into_text_that_stands_on_both_sides() -> None:
    where = planted.texts(documents=80, tokens=300, shared=60)
    both = where.split_text.part == NEITHER
    assert 0.02 < both.mean() < 0.2
    for latent, word in enumerate((3, 10, 20, 40)):
        found = evidence(where, where.split_text.ids == word, latent)
        excerpts = [*found.firing, *found.silent, *found.firing_token, *found.silent_token]
        assert len(excerpts) > 10
        assert not any(both[w.start : w.start + w.tokens].any() for w in excerpts)
        # What it is explained from may hold the passage: it is in no excerpt to test on.
        assert all(where.explain[w.start : w.start + w.tokens].all() for w in found.explain)


def test_a_document_is_on_either_side_for_different_latents(where: Texts) -> None:
    rows = np.flatnonzero(where.test)
    sides = np.array([where.for_firing(rows, latent) for latent in range(40)])
    assert sides.mean(axis=0).min() > 0.2 and sides.mean(axis=0).max() < 0.8


def test_silent_excerpts_are_silent_and_the_others_are_not(where: Texts) -> None:
    mask = where.split_text.ids == 12
    found = evidence(where, mask)
    for firing, silent in zip(found.firing, found.silent, strict=True):
        here = mask[firing.start : firing.start + firing.tokens]
        assert tuple(np.flatnonzero(here)) == firing.marks  # every firing token is marked
        assert not mask[silent.start : silent.start + silent.tokens].any()
        assert (silent.tokens, silent.marks) == (firing.tokens, firing.marks)
    for excerpts in (found.explain, found.firing, found.silent):
        spans = sorted((w.start, w.start + w.tokens) for w in excerpts)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_tokens_of_frequent_latents(where: Texts) -> None:
    mask = where.split_text.ids < 6
    found = evidence(where, mask)
    assert len(found.silent) < 10 and len(found.firing_token) >= MIN_EXCERPTS
    assert len({w.start for w in found.silent_token}) > len(found.silent_token) / 2
    for firing, silent in zip(found.firing_token, found.silent_token, strict=True):
        assert len(firing.marks) == 1 and firing.marks == silent.marks
        assert mask[firing.start + firing.marks[0]] and not mask[silent.start + silent.marks[0]]
        assert mask[silent.start : silent.start + silent.tokens].any()  # an active excerpt
    assert len({w.start + w.marks[0] for w in found.silent_token}) == len(found.silent_token)


def test_a_latent_that_never_rests_is_unscorable(where: Texts) -> None:
    found = evidence(where, np.ones(len(where.read), bool))
    assert found.silent == [] and found.silent_token == []
    assert questions_of(where, "c", found, "x", "fuzzing", items=5, seed=0) == []
    assert questions_of(where, "c", found, "x", "detection", items=5, seed=0) == []


def test_a_rare_latent_says_why_it_cannot_be_scored(where: Texts) -> None:
    mask = np.zeros(len(where.read), bool)
    mask[np.flatnonzero(where.explain)[:3]] = True
    assert evidence(where, mask).why_not == "too few excerpts to explain from"
    mask[:] = where.explain & (where.split_text.ids == 3)
    assert evidence(where, mask).why_not == "too few excerpts to test on"


def test_weak_firings_are_unmarked_only_where_that_was_asked_for(where: Texts) -> None:
    mask = where.split_text.ids == 2
    every = evidence(where, mask)
    strong = evidence(where, mask, marking="strong", graded=True)
    binary = evidence(where, mask, marking="strong", graded=False)
    marks = [sum(len(w.marks) for w in e.firing) for e in (every, strong, binary)]
    assert marks[1] < marks[0] == marks[2]
    assert [w.marks for w in strong.silent] == [w.marks for w in strong.firing]


def test_excerpts_end_where_the_evaluation_did() -> None:
    where = planted.texts()
    read = np.zeros(len(where.read), bool)
    read[:5_000] = True
    short = Texts(where.split_text, read, length=16, seed=0)
    mask = (where.split_text.ids == 3) & read
    found = evidence(short, mask)
    for w in (*found.explain, *found.firing, *found.silent):
        assert w.start + w.tokens <= 5_000


def test_texts_shorter_than_an_excerpt_have_negatives_as_short() -> None:
    where = planted.texts(documents=600, tokens=9)
    found = evidence(where, where.split_text.ids == 4)
    assert {w.tokens for w in found.firing} == {9} == {w.tokens for w in found.silent}


def test_the_firing_is_anywhere_in_its_excerpt(where: Texts) -> None:
    places = []
    for latent in range(40):
        mask = np.zeros(len(where.read), bool)
        mask[np.random.default_rng(latent).choice(len(mask), 150, replace=False)] = True
        places += [m for w in evidence(where, mask, latent).firing for m in w.marks]
    counts = np.bincount(places, minlength=16)
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.5 * counts.mean()


def formatting(question: Question, i: int) -> list[float]:
    """What a judge sees of an excerpt that reads no word: marks, lengths, order, repeats."""
    excerpts = question.excerpts
    flags = [m for text, m in excerpts[i] for _ in text.split()]
    marks = np.flatnonzero(flags)
    same = [tuple(m for text, m in e for _ in text.split()) for e in excerpts]
    gaps = np.diff(marks)
    first, last, middle = (float(f(marks)) if len(marks) else -1 for f in (min, max, np.mean))
    return [
        len(flags), len(marks), first, last, middle,
        float(gaps.min()) if len(gaps) else -1, len(excerpts[i]), i, len(excerpts),
        same.count(same[i]), float(np.mean(same[i])),
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [200, 40, 9])
def test_edges_of_texts_tell_nothing(tokens: int) -> None:
    """Excerpts are moved inside of their texts, and the silent ones are as often at an edge."""
    where = planted.texts(documents=24_000 // tokens, tokens=tokens)
    edges: dict[bool, list[tuple[bool, bool]]] = {True: [], False: []}
    for latent in range(30):
        mask = np.random.default_rng(latent).random(len(where.read)) < 0.02
        found = evidence(where, mask, latent)
        assert len(found.firing) >= 15
        for fires, excerpts in ((True, found.firing), (False, found.silent)):
            for w in excerpts:
                at_start = w.start == where.text_start[w.start]
                at_end = w.start + w.tokens == where.text_end[w.start]
                edges[fires].append((bool(at_start), bool(at_end)))
    assert edges[True] == edges[False] and 0 < np.mean(edges[True]) <= 1


def test_a_latent_of_the_first_token_can_be_scored() -> None:
    """Every excerpt at the beginning of a text has a firing, so silent ones are elsewhere."""
    where = planted.texts(documents=400, tokens=60)
    mask = where.split_text.position == 0
    found = evidence(where, mask)
    assert len(found.silent) >= 15
    assert all(w.start == where.text_start[w.start] for w in found.firing)


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_a_judge_that_sees_only_formatting_is_at_chance(where: Texts, kind: TestKind) -> None:
    """Each cue alone, and a classifier of all of them, trained on other latents."""
    from sklearn.ensemble import RandomForestClassifier

    x: list[list[float]] = []
    y: list[int] = []
    latent_of: list[int] = []
    rng = np.random.default_rng(0)
    for latent in range(120):
        # Runs of several tokens, so that marks have a form that could tell.
        begins = rng.random(len(where.read)) < 0.01 * rng.random()
        mask = begins.copy()
        for _ in range(int(rng.integers(0, 4))):
            mask[1:] |= begins[:-1]
            begins = np.concatenate([[False], begins[:-1]])
        found = evidence(where, mask, latent)
        if found.why_not or not found.silent:
            continue
        for question in questions_of(where, "c", found, "x", kind, items=5, seed=0):
            for i, fires in enumerate(question.truth):
                x.append(formatting(question, i))
                y.append(fires)
                latent_of.append(latent)
    cues, truth, of = np.array(x), np.array(y), np.array(latent_of)
    assert len(truth) > 1_500
    for cue in cues.T:
        auc = mannwhitneyu(cue[truth == 1], cue[truth == 0]).statistic / (
            (truth == 1).sum() * (truth == 0).sum()
        )
        assert abs(auc - 0.5) < 0.05
    train = of % 2 == 0
    forest = RandomForestClassifier(200, min_samples_leaf=5, random_state=0, n_jobs=1)
    p = forest.fit(cues[train], truth[train]).predict_proba(cues[~train])[:, 1]
    t = truth[~train]
    auc = mannwhitneyu(p[t == 1], p[t == 0]).statistic / ((t == 1).sum() * (t == 0).sum())
    assert abs(auc - 0.5) < 0.06


def test_the_artifact_test_can_fail(where: Texts) -> None:
    """Marks at one fixed place, as another tool has them, would be found out."""
    found = evidence(where, where.split_text.ids == 5)
    fixed = [w._replace(marks=(8,) * min(1, len(w.marks))) for w in found.silent]
    positions = [w.marks[0] for w in found.firing], [w.marks[0] for w in fixed]
    u = mannwhitneyu(
        np.abs(np.array(positions[0]) - 8), np.abs(np.array(positions[1]) - 8)
    ).statistic
    assert u / (len(positions[0]) * len(positions[1])) > 0.8


def test_an_intruder_looks_like_one_of_the_others(where: Texts) -> None:
    """It has the length, the edges and the marks of the excerpt that it replaces."""
    for word in (8, 15, 30):
        found = evidence(where, where.split_text.ids == word, word)
        forms = {(w.tokens, w.marks) for w in found.firing}
        for excerpts, place in intruder_groups(found, np.random.default_rng(word)):
            assert (excerpts[place].tokens, excerpts[place].marks) in forms
            replaced = found.firing[found.silent.index(excerpts[place])]
            assert replaced not in excerpts and len({w.start for w in excerpts}) == 5
            group = {w.stratum for i, w in enumerate(excerpts) if i != place}
            assert min(group) - 1 <= replaced.stratum <= max(group) + 1
            strata = [w.stratum for i, w in enumerate(excerpts) if i != place]
            assert max(strata) - min(strata) <= 3
        asked = questions_of(where, "c", found, "", "intruder", items=5, seed=0)
        assert len(asked) >= 3
        for question in asked:
            number = question.truth[0]
            word_there = [f"w{word} " in "".join(t for t, _ in e) + " " for e in question.excerpts]
            assert word_there == [i != number for i in range(1, 6)]


def test_the_same_questions_every_time(where: Texts) -> None:
    for kind in TESTS:
        asked = [
            questions_of(where, "c", evidence(where, where.split_text.ids == 9), "x", kind, items=5,
                         seed=3)
            for _ in range(2)
        ]  # fmt: skip
        assert asked[0] == asked[1]
