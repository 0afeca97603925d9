from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from bsc.embedded.ngram import InterpolatedNgram

TOKENS = np.random.default_rng(0).integers(0, 5, 400)


def textbook(tokens: list[int], history: tuple[int, ...], word: int, vocab: int) -> float:
    """Interpolated Kneser-Ney by its definition, with dictionaries, slowly."""

    def counts(order: int, highest: int) -> Counter[tuple[int, ...]]:
        grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
        if order == highest:
            return Counter(grams)
        longer = {tuple(tokens[i : i + order + 1]) for i in range(len(tokens) - order)}
        return Counter(g[1:] for g in longer)

    highest = 3

    def p(history: tuple[int, ...]) -> float:
        order = len(history) + 1
        c = counts(order, highest)
        lower = 1 / vocab if order == 1 else p(history[1:])
        total = sum(v for g, v in c.items() if g[:-1] == history)
        if total == 0:
            return lower
        n = Counter(c.values())
        discount = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
        distinct = sum(1 for g in c if g[:-1] == history)
        own = max(c[(*history, word)] - discount, 0) / total
        return own + discount * distinct / total * lower

    return p(history)


def test_probabilities_are_those_of_the_definition() -> None:
    model = InterpolatedNgram(TOKENS, order=3, vocab=7)
    for history in ((1, 2), (4, 0), (6, 1), (6, 6)):
        for word in range(7):
            found = model.probabilities(np.array([*history, word]))[-1]
            assert found == pytest.approx(textbook(TOKENS.tolist(), history, word, 7), rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    model = InterpolatedNgram(TOKENS, order=4, vocab=7)
    for history in itertools.product(range(7), repeat=2):
        total = sum(model.probabilities(np.array([3, *history, w]))[-1] for w in range(7))
        assert total == pytest.approx(1, abs=1e-12)


def test_a_text_with_structure_is_predicted_better_than_by_chance() -> None:
    loop = np.array([0, 1, 2, 3] * 50)
    model = InterpolatedNgram(loop, order=3, vocab=4)
    assert model.nats(loop) / (len(loop) - 1) < 0.2 * math.log(4)
