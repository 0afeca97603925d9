"""Documents that share much text are on one side of the split."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bsc.cache.model.sides import held_out_documents, is_text_held_out
from bsc.embedded.corpus import Document
from bsc.embedded.held_out import is_held_out
from bsc.hashing import run_hashes

WORDS = [f"word{i}" for i in range(5_000)]


def text(rng: random.Random, words: int = 400) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def shingles(of: str) -> set[bytes]:
    raw = of.encode()
    return {raw[i : i + 64] for i in range(len(raw) - 63)}


@pytest.mark.parametrize("replaced", [0.02, 0.2, 0.5])
def test_two_texts_agree_at_least_as_often_as_they_are_similar(replaced: float) -> None:
    rng = random.Random(0)
    together, similarity = [], []
    for _ in range(300):
        a = text(rng)
        cut = int(len(a) * (1 - replaced))
        b = a[:cut] + text(rng)[cut:]
        own, other = shingles(a), shingles(b)
        similarity.append(len(own & other) / len(own | other))
        together.append(is_text_held_out(a, 0.5) == is_text_held_out(b, 0.5))
    # Where the smallest shingle is another, half of the pairs still agree.
    expected = np.mean([s + (1 - s) / 2 for s in similarity])
    assert abs(np.mean(together) - expected) < 0.08
    assert np.mean(together) >= np.mean(similarity)


def test_the_share_held_out_is_the_one_asked_for_and_a_smaller_one_is_a_part_of_it() -> None:
    rng = random.Random(1)
    texts = [text(rng, 60) for _ in range(2_000)]
    wide = {t for t in texts if is_text_held_out(t, 0.2)}
    narrow = {t for t in texts if is_text_held_out(t, 0.05)}
    assert 0.17 < len(wide) / 2_000 < 0.23 and 0.035 < len(narrow) / 2_000 < 0.065
    assert narrow < wide
    assert not any(is_text_held_out(t, 0.0) for t in texts)


def test_short_and_odd_texts_have_a_side() -> None:
    for odd in ("a", "ab" * 31, "\ud800 a lone surrogate", "x" * 64, " " * 5_000):
        assert is_text_held_out(odd, 1.0) and not is_text_held_out(odd, 0.0)


def test_of_a_corpus_documents_that_share_text_with_training_are_not_held_out() -> None:
    rng = random.Random(2)
    names = [f"file{i}.py" for i in range(400)]
    held = [n for n in names if is_held_out(n, 0.05)]
    texts = {n: text(rng) for n in names}
    trained = next(n for n in names if n not in held)
    texts[held[0]] = texts[trained]  # a copy
    texts[held[1]] = texts[held[0]][:400] + texts[held[1]][400:]  # a tenth of it
    texts[held[2]] = texts[held[3]]  # a copy of another one that is held out
    documents = [Document(n, texts[n]) for n in names]
    found = {
        d.name for d, h in zip(documents, held_out_documents(documents, 0.05), strict=True) if h
    }
    assert found == set(held) - {held[0], held[1]}
    assert not any(held_out_documents(documents, 0.0))


def test_what_leaves_the_held_out_side_takes_its_copies_along() -> None:
    """B shares with training, C shares with B alone: C cannot stay when B goes."""
    rng = random.Random(3)
    names = [f"file{i}.py" for i in range(400)]
    a = next(n for n in names if not is_held_out(n, 0.05))
    b, c = [n for n in names if is_held_out(n, 0.05)][:2]
    texts = {n: text(rng) for n in (a, b, c)}
    half = len(texts[b]) // 2
    texts[b] = texts[a][:half] + texts[b][half:]
    texts[c] = texts[b][half:] + texts[c]
    documents = [Document(n, texts[n]) for n in (a, b, c)]
    assert held_out_documents(documents, 0.05) == [False] * 3


@pytest.mark.parametrize("width", [2, 16, 64])
def test_hashes_of_runs_are_those_of_the_definition(width: int) -> None:
    """And do not depend on where a long row of values is cut for the cache."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50_000, size=40_000)
    found = run_hashes(values, width)
    assert found.shape == (40_000 - width + 1,)

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for i in (0, 1, 32_767 - width, 32_767, 32_768, len(found) - 1):
        run = values[i : i + width].tolist()
        total = sum((v + 1) * pow(0x9E3779B97F4A7C15, j, 2**64) for j, v in enumerate(run[::-1]))
        assert int(found[i]) == mix(total % 2**64)
    assert run_hashes(values[: width - 1], width).shape == (0,)
