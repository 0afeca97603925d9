"""Latents that are alike: in one coder by decoder row and by firing, and partners in another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional

from bsc.eval.passes.codes import LatentCode

__all__ = ["NEAREST", "NONE", "Near", "Partners", "by_decoder", "by_firing", "partners"]

NEAREST = 5
"""Latents that are named as near to each latent."""
NONE = -1
"""Instead of a latent, where there is none."""
_AT_ONCE = 1024
"""Latents that are compared with all others at a time."""


class Near(NamedTuple):
    """For each latent the nearest others, the nearest first."""

    latent: NDArray[np.int64]
    """(F, NEAREST), `NONE` where there are fewer."""
    likeness: NDArray[np.float32]
    """(F, NEAREST)."""


@torch.inference_mode()
def by_decoder(W_dec: Tensor, alive: NDArray[np.bool_]) -> Near:
    """By the cosine of decoder rows, (F, d), among latents that are alive."""
    rows = functional.normalize(W_dec.detach().cpu().float(), dim=1)
    dead = torch.from_numpy(~alive)
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        cosine = rows[start : start + _AT_ONCE] @ rows.T
        cosine[:, dead] = -torch.inf
        here = torch.arange(len(cosine))
        cosine[here, here + start] = -torch.inf
        found.append(cosine.topk(min(NEAREST, len(rows)), dim=1))
    likeness = torch.cat([f.values for f in found]).numpy()
    latent = torch.cat([f.indices for f in found]).numpy()
    return _near(latent, likeness, likeness > -np.inf)


def by_firing(code: LatentCode, rows: int) -> Near:
    """By the Jaccard index of firings: rows where both fire over rows where either does.

    Args:
        code: sorted by latent.
        rows: that were evaluated.
    """
    f, counts = code.n_latents, np.diff(code.offsets)
    ones = np.ones(len(code.row), np.int32)
    fires = csr_matrix((ones, code.row.astype(np.int32), code.offsets), shape=(f, rows))
    n = min(NEAREST, f)
    latent, likeness = np.zeros((f, n), np.int64), np.zeros((f, n), np.float32)
    by_row = fires.T.tocsr()
    for start in range(0, f, _AT_ONCE):
        last = min(f, start + _AT_ONCE)
        both = (fires[start:last] @ by_row).toarray().astype(np.float32)
        both[np.arange(last - start), np.arange(start, last)] = 0
        jaccard = both / np.maximum(1, counts[start:last, None] + counts - both)
        best = torch.from_numpy(jaccard).topk(n, dim=1)
        latent[start:last], likeness[start:last] = best.indices.numpy(), best.values.numpy()
    return _near(latent, likeness, likeness > 0)


def _near(
    latent: NDArray[np.int64], likeness: NDArray[np.float32], there: NDArray[np.bool_]
) -> Near:
    return Near(np.where(there, latent, NONE), np.where(there, likeness, np.float32(0)))


class Partners(NamedTuple):
    """For each latent of one coder the latent of another with the most similar decoder row."""

    latent: NDArray[np.int64]
    """(F,), `NONE` where either coder has no living latent for it."""
    cosine: NDArray[np.float32]
    """(F,) of the decoder rows."""
    mutual: NDArray[np.bool_]
    """(F,) whether it is the partner's partner too."""
    together: NDArray[np.bool_]
    """(M,) for each firing of the one coder whether the partner fires in the row."""
    both: NDArray[np.int64]
    """(F,) rows in which both fire."""
    jaccard: NDArray[np.float32]
    """(F,)."""


@torch.inference_mode()
def partners(W_a: Tensor, W_b: Tensor, a: LatentCode, b: LatentCode) -> Partners:
    """Partners of the latents of a coder in another of the same output.

    Args:
        W_a: (F_a, d) decoder rows.
        W_b: (F_b, d) those of the other.
        a: firings, sorted by latent.
        b: those of the other, in the same rows.
    """
    n_a, n_b = np.diff(a.offsets), np.diff(b.offsets)
    latent, cosine = _nearest(W_a, W_b, n_a > 0, n_b > 0)
    back, _ = _nearest(W_b, W_a, n_b > 0, n_a > 0)
    known = latent != NONE
    mutual = known & (back[np.where(known, latent, 0)] == np.arange(len(latent)))
    # Firings of b as one ascending list of numbers, in which those that a's would need are sought.
    key_b = np.repeat(np.arange(len(n_b)), n_b) << 32 | b.row
    wanted = np.repeat(latent, n_a) << 32 | a.row
    place = np.searchsorted(key_b, wanted).clip(max=max(0, len(key_b) - 1))
    together = np.zeros(len(wanted), np.bool_)
    if len(key_b):
        together = key_b[place] == wanted
    both = np.bincount(np.repeat(np.arange(len(n_a)), n_a)[together], minlength=len(n_a))
    either = n_a + np.where(known, n_b[np.where(known, latent, 0)], 0) - both
    jaccard = (both / np.maximum(1, either)).astype(np.float32)
    return Partners(latent, cosine, mutual, together, both, jaccard)


def _nearest(
    W_a: Tensor, W_b: Tensor, alive_a: NDArray[np.bool_], alive_b: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each living row of a the living row of b of the largest cosine, and the cosine."""
    latent = np.full(len(W_a), NONE, np.int64)
    cosine = np.zeros(len(W_a), np.float32)
    of_a, of_b = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    if not len(of_a) or not len(of_b):
        return latent, cosine
    a, b = (
        functional.normalize(w.detach().cpu().float()[torch.from_numpy(i)], dim=1)
        for w, i in ((W_a, of_a), (W_b, of_b))
    )
    best = [(rows @ b.T).max(dim=1) for rows in a.split(_AT_ONCE)]
    latent[of_a] = of_b[torch.cat([f.indices for f in best]).numpy()]
    cosine[of_a] = torch.cat([f.values for f in best]).numpy()
    return latent, cosine
