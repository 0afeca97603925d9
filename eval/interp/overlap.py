"""An intruder test that is answered by counting shared tokens, without any model.

Of five excerpts, in four of which a latent fires, the intruder is taken to be the one that shares
the least with the others: the marked tokens, and all tokens, each as a bag whose entries weigh what
they tell (inverse document frequency over the excerpts of the coder), compared by cosine. A latent
of one word or of one topic is told from silence by this; one of a meaning that many words can have
is not. It is a floor to hold the judge's intruder score against, never a score by a language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bsc.eval.interp.evidence import Excerpt, Texts

__all__ = ["overlap_answers", "token_weights"]

Bag = dict[int, float]


def token_weights(texts: Texts, excerpts: Iterable[Excerpt]) -> dict[int, float]:
    """log(excerpts / excerpts with the token), of every token of some excerpts."""
    seen: Counter[int] = Counter()
    n = 0
    for excerpt in excerpts:
        n += 1
        ids = texts.split_text.ids[excerpt.start : excerpt.start + excerpt.tokens]
        seen.update({int(i) for i in ids})
    return {token: float(np.log((n + 1) / count)) for token, count in seen.items()}


def _bags(texts: Texts, excerpt: Excerpt, weights: Mapping[int, float]) -> tuple[Bag, Bag]:
    """The marked tokens and all tokens of an excerpt, of length one each."""
    ids = [int(i) for i in texts.split_text.ids[excerpt.start : excerpt.start + excerpt.tokens]]
    return (_unit(Counter(ids[m] for m in excerpt.marks), weights), _unit(Counter(ids), weights))


def _unit(counts: Counter[int], weights: Mapping[int, float]) -> Bag:
    bag = {token: n * weights.get(token, 0.0) for token, n in counts.items()}
    length = float(np.sqrt(sum(v * v for v in bag.values())))
    return {token: v / length for token, v in bag.items()} if length else {}


def _cosine(a: Bag, b: Bag) -> float:
    if len(b) < len(a):
        a, b = b, a
    return sum(v * b[token] for token, v in a.items() if token in b)


def overlap_answers(
    texts: Texts, groups: Sequence[tuple[Sequence[Excerpt], int]], weights: Mapping[int, float]
) -> list[float]:
    """How right the choice is in each group: 1, 0, or a share where several excerpts tie.

    Args:
        texts: of the split.
        groups: excerpts, and which of them the intruder is.
        weights: of `token_weights`.
    """
    found = []
    for excerpts, intruder in groups:
        bags = [_bags(texts, w, weights) for w in excerpts]
        alike = [
            sum(
                _cosine(own[side], other[side])
                for j, other in enumerate(bags)
                if j != i
                for side in (0, 1)
            )
            for i, own in enumerate(bags)
        ]
        least = np.isclose(alike, min(alike), rtol=0, atol=1e-12)
        found.append(float(least[intruder] / least.sum()))
    return found
