from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from bsc.cache.model.models import load_tokenizer
from bsc.cache.model.ngrams import token_ngrams
from bsc.cache.store.store import ActivationStore
from bsc.eval.figures.division import EXPLAIN, NEITHER, PARTS, TEST, divide
from bsc.eval.figures.examples import (
    PER_STRATUM,
    STRATA,
    choose_latents,
    sample,
)
from bsc.eval.figures.split_text import SplitText, token_strings
from bsc.eval.passes.codes import LatentCode
from tests.eval.planted import latent_code


def planted() -> tuple[np.ndarray, np.ndarray]:
    """A dense code of 4 latents over 40 documents of 100 rows; latent 2 never fires."""
    rng = np.random.default_rng(0)
    dense = (rng.exponential(size=(4_000, 4)) * (rng.random((4_000, 4)) < 0.4)).astype(np.float32)
    dense[:, 2] = 0
    dense[:, 3] = dense[:, 3] != 0  # a code of ties
    return dense, np.repeat(np.arange(40), 100)


def test_strata_are_tenths_of_a_latents_firings() -> None:
    dense, doc = planted()
    drawn = sample(latent_code(dense), parts(doc), per_stratum=1_000)
    # With room for all, every firing is drawn once.
    assert len(drawn.row) == (dense != 0).sum()
    for latent in (0, 1, 3):
        own = drawn.of(latent)
        sizes = np.bincount(own.stratum, minlength=STRATA)
        assert sizes.min() >= sizes.max() - 1
        assert np.array_equal(np.sort(own.row), np.flatnonzero(dense[:, latent]))
        assert np.array_equal(own.margin, dense[own.row, latent])
    own = drawn.of(0)
    borders = [(own.margin[own.stratum == s].min(), own.margin[own.stratum == s].max())
               for s in range(STRATA)]  # fmt: skip
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(borders))
    assert len(drawn.of(2).row) == 0


def test_ties_are_not_in_the_order_of_the_text() -> None:
    dense, doc = planted()
    own = sample(latent_code(dense), parts(doc), per_stratum=1_000).of(3)
    first, last = (own.row[own.stratum == s].mean() for s in (0, STRATA - 1))
    assert abs(first - last) < 600  # in the order of the text it would be 3,600


def test_a_stratum_is_drawn_uniformly() -> None:
    """Over many seeds every firing of a stratum comes up about as often."""
    rng = np.random.default_rng(0)
    dense = np.zeros((400, 1), np.float32)
    dense[:, 0] = 1 + rng.random(400)
    code, doc = latent_code(dense), np.arange(400)
    times = np.zeros(400)
    for seed in range(400):
        times[sample(code, parts(doc, seed), per_stratum=2, seed=seed).row] += 1
    # 40 firings a stratum, 2 of each part: a tenth of the time.
    assert times.mean() == pytest.approx(40, rel=0.02)
    assert times.std() < 1.5 * np.sqrt(40)


def parts(doc: np.ndarray, seed: int = 0) -> np.ndarray:
    """Documents without n-grams."""
    return divide(doc, np.zeros(len(doc), np.uint64), seed)


def test_documents_that_share_text_are_on_one_side_and_what_is_left_is_on_neither() -> None:
    """Copies with a changed end, and a paragraph that stands in many documents."""
    rng = np.random.default_rng(0)
    notice = rng.integers(1000, size=40)
    documents = []
    for _ in range(60):
        text = rng.integers(1000, size=300)
        text[100:140] = notice
        copy = text.copy()
        copy[280:] = rng.integers(1000, size=20)
        documents += [text, copy]
    ngrams = np.concatenate([token_ngrams(d) for d in documents])
    doc = np.repeat(np.arange(120), 300)
    part = divide(doc, ngrams).reshape(120, 300)
    explain = (part == EXPLAIN).any(1)
    assert 20 < explain.sum() < 100
    assert (explain[::2] == explain[1::2]).mean() > 0.75
    test = part[~explain]
    assert not (test == EXPLAIN).any() and (test[:, 100:140] == NEITHER).all()
    # No n-gram of a row to test on stands where explanations come from.
    inside = np.unique(ngrams[(part == EXPLAIN).ravel() & (ngrams > 0)])
    assert not np.isin(ngrams[(part == TEST).ravel()], inside).any()


def test_no_document_is_in_both_parts_and_draws_are_limited() -> None:
    dense, doc = planted()
    drawn = sample(latent_code(dense), parts(doc))
    explain = parts(doc) == EXPLAIN
    assert 10 < len(set(doc[explain])) < 30
    assert np.array_equal(drawn.part == PARTS.index("explain"), explain[drawn.row])
    documents = [set(doc[drawn.row[drawn.part == p]]) for p in (0, 1)]
    assert not documents[0] & documents[1]
    for latent in (0, 1, 3):
        own = drawn.of(latent)
        groups = np.bincount(own.stratum.astype(int) * 2 + own.part)
        assert groups.max() == PER_STRATUM
        assert set(drawn.of(latent, "test").part) == {1}


def test_the_sample_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, doc = planted()
    code = latent_code(dense)
    whole = sample(code, parts(doc))
    monkeypatch.setattr(LatentCode, "ranges", lambda self: ((i, i + 1) for i in range(4)))
    again = sample(code, parts(doc)).arrays()
    for name, values in whole.arrays().items():
        assert np.array_equal(values, again[name])


def test_latents_are_chosen_across_the_range_of_rates() -> None:
    counts = np.array([0, 5, 1000, 10, 100, 20, 50])
    assert choose_latents(counts, 3) == [2, 6, 3]
    assert choose_latents(np.zeros(5, np.int64), 3) == []


class Tokenizer:
    """One that drops a leading space, as that of Llama 2 does, with a character in three."""

    words = (
        *(w.encode() for w in ("\u2581the", "\u2581cat", "s", "\u2581sat")),
        b"\xe2", b"\x82", b"\xac",
    )  # fmt: skip

    def decode(self, ids: Sequence[int], **_: object) -> str:
        raw = b"".join(self.words[i] for i in ids)
        return raw.decode(errors="replace").replace("\u2581", " ").removeprefix(" ")


def test_tokens_are_decoded_with_what_is_before_them() -> None:
    split_text = SplitText.__new__(SplitText)
    split_text.tokenizer, split_text._alone, split_text._strings = Tokenizer(), {}, {}
    split_text.ids = np.array([3, 0, 1, 2, 4, 5, 6, 3], np.uint32)
    split_text.starts, split_text.ends = np.array([0, 1]), np.array([1, 8])
    pieces = split_text.marked(2, np.array([2, 6]), np.array([2.0, 3.0]))
    assert pieces == [
        ["the", None, False], [" cat", 2.0, True], ["s", None, False], ["\u20ac", 3.0, False],
        [" sat", None, False],
    ]  # fmt: skip
    assert split_text.runs(1, 6, {1, 2}) == [("the", False), (" cats", True), ("\u20ac", False)]
    assert split_text.each(0, 4) == ["sat", "the", " cat", "s"]  # of two texts


def test_bytes_that_never_become_a_character_are_shown_and_nothing_is_lost() -> None:
    for ids in ([0, 4], [4, 4, 0], [5] * 40 + [1], [4, 5, 6, 4, 5, 6, 1], [6, 0, 1]):
        strings = token_strings(Tokenizer(), ids)
        assert len(strings) == len(ids)
        assert "".join(strings) == Tokenizer().decode(ids)


def test_windows_end_with_the_document_and_mark_firing_tokens(store: ActivationStore) -> None:
    split = store.held_out
    split_text = SplitText(split, load_tokenizer(str(store.attributes["model"]["name"])))
    ids, doc = split.tokens("token_id"), split.tokens("doc_id")
    firing = np.arange(0, split.rows, 3).astype(np.uint32)
    margin = firing.astype(np.float32) + 1
    for row in (0, 3, 300, 33, split.rows - 1):
        low, high = split_text.around(row)
        assert low <= row < high and len(set(doc[low:high])) == 1
        pieces = split_text.marked(row, firing, margin)
        marked = [v for _, v, _ in pieces if v is not None]
        assert any(v == row + 1 and d for _, v, d in pieces) == (row % 3 == 0)
        assert marked == [i + 1 for i in range(low, high) if i % 3 == 0]
        text = split_text.tokenizer.decode([int(i) for i in ids[low:high]])
        assert "".join(p for p, *_ in pieces).replace("\ufffd", "") == text.replace("\ufffd", "")
