"""Contexts in which latents fire, for a person to read.

Latents are taken across the range of firing rates, and for each latent firings uniformly at random
from the held-out rows, so that what is shown is what the latent usually does, not its best moments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bsc.cache.store import StoreSplit
from bsc.eval.fidelity import site_arrays
from bsc.train.coders.coder import SparseCoder

__all__ = ["collect_examples"]

LATENTS = 6
CONTEXTS = 6
BEFORE, AFTER = 16, 8
MIN_FIRINGS = 10


def choose_latents(counts: torch.Tensor, n: int) -> list[int]:
    """Latents at evenly spaced ranks of the firing rate, the most frequent first."""
    alive = torch.nonzero(counts >= MIN_FIRINGS).flatten()
    if len(alive) == 0:
        return []
    ranked = alive[counts[alive].argsort(descending=True, stable=True)]
    ranks = torch.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().long()
    return [int(i) for i in ranked[ranks].unique_consecutive()]


@torch.inference_mode()
def collect_examples(
    coder: SparseCoder,
    split: StoreSplit,
    hookpoint: str,
    counts: torch.Tensor,
    tokenizer: Any,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Examples of a few latents of a coder.

    Args:
        coder: the coder.
        split: rows in the order of the text, normally the held-out ones.
        hookpoint: module whose rows they are.
        counts: (F,), rows in which each latent fires in the split.
        tokenizer: of the model.
        seed: of the choice of contexts.

    Returns:
        One entry per latent: its number, its firing rate and its contexts. A context is a list of
        [text, code] pairs, code 0 where the latent is silent.
    """
    latents = choose_latents(counts, LATENTS)
    names = site_arrays(coder, hookpoint)
    values = np.zeros((split.rows, len(latents)), dtype=np.float32)
    wanted = torch.tensor(latents)
    at = 0
    for (x,) in split.batches(names[:1], 8192):
        code = coder.encode(x.to(coder.W_enc.device))
        value = code.value.cpu().float()
        hit = code.latent.cpu().unsqueeze(2) == wanted
        values[at : at + len(x)] = (hit * value.unsqueeze(2)).sum(dim=1).numpy()
        at += len(x)
    ids, position = split.tokens("token_id"), split.tokens("position")
    starts = np.flatnonzero((position == 0) | (np.arange(len(position)) == 0))
    ends = np.append(starts[1:], len(position))
    rng = np.random.Generator(np.random.Philox(key=seed))
    examples = []
    for column, latent in enumerate(latents):
        firing = np.flatnonzero(values[:, column])
        picked = rng.choice(firing, size=min(CONTEXTS, len(firing)), replace=False)
        contexts = []
        for row in sorted(picked, key=lambda r: (-values[r, column], r)):
            c = int(np.searchsorted(starts, row, side="right")) - 1
            low, high = max(starts[c], row - BEFORE), min(ends[c], row + AFTER + 1)
            contexts.append(
                [
                    [tokenizer.decode([int(ids[i])]), round(float(values[i, column]), 4)]
                    for i in range(low, high)
                ]
            )
        rate = int(counts[latent]) / split.rows
        examples.append({"latent": latent, "rate": rate, "contexts": contexts})
    return examples
