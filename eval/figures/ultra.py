"""What the latents of ultra-high frequency are: those that fire on more than 10 % of the rows.

Such latents dominate anything that is weighted by firings, and dense latents of sparse coders
often have a plain meaning (Sun et al. 2025, arXiv:2506.15679): a position, a token, one end of an
axis. For each one it is measured how much of its firing the position or the token explains,
whether another latent points the opposite way, how much of its decoder row lies in the few
directions that the output varies most in, and what the model loses without it. Definitions:
docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.store.split import StoreSplit
from bsc.eval.evaluation import UltraLatent
from bsc.eval.figures.firing import ULTRA
from bsc.eval.figures.rate import binary_entropy
from bsc.eval.passes.batches import row_batches
from bsc.eval.passes.codes import LatentCode
from bsc.train.coders.coder import SparseCoder

__all__ = ["RowFacts", "diagnose", "explained_share", "principal_components", "ultra_latents"]

MAX_LATENTS = 64
"""Latents of a coder at most, the most frequent ones first."""
COMPONENTS = 10
COMMON_TOKENS = 512
COMPONENT_ROWS = 65_536

# What a diagnosis takes to be named; docs/evaluation.md repeats them.
EXPLAINED = 0.5
ANTIPODAL = -0.9
IN_COMPONENTS = 0.9


class RowFacts(NamedTuple):
    """What the rows of a split are, each (rows,)."""

    position: NDArray[np.int64]
    """log2 bucket of the position that the model sees: 0, 1, 2 to 3, 4 to 7 and so on."""
    token: NDArray[np.int64]
    """Rank of the token among the most common ones, the rest as one class."""
    special: NDArray[np.bool_]
    """Whether it is a special token of the model."""
    read: NDArray[np.bool_]
    """Whether the row was evaluated."""

    @classmethod
    def of(
        cls,
        token_id: NDArray[Any],
        position: NDArray[Any],
        special: list[int],
        read: NDArray[np.bool_],
    ) -> RowFacts:
        """Facts about rows from the token side of the store."""
        counts = np.bincount(token_id[read])
        common = np.argsort(-counts, kind="stable")[:COMMON_TOKENS]
        rank = np.full(max(len(counts), int(token_id.max()) + 1), COMMON_TOKENS)
        rank[common] = np.arange(len(common))
        bucket = np.frexp(position.astype(np.float64))[1]
        return cls(bucket.astype(np.int64), rank[token_id], np.isin(token_id, special), read)


def explained_share(fired: NDArray[np.float64], total: NDArray[np.float64]) -> float:
    """Share of the entropy of firing that a class explains: I(fires; class) / H(fires), 0 to 1.

    Args:
        fired: (classes,) rows of each class in which the latent fires.
        total: (classes,) rows of each class.

    The bias of entropies that are estimated from n rows is taken off (Miller and Madow: 1 / (2 n ln
    2) bits for each class in which the latent sometimes fires, less one).

    >>> explained_share(np.array([50.0, 0.0]), np.array([50.0, 50.0]))
    1.0
    """
    n = total.sum()
    entropy = float(binary_entropy(np.array([fired.sum() / n]))[0])
    if entropy == 0:
        return 0.0
    classes = total > 0
    rates = fired[classes] / total[classes]
    within = float((total[classes] / n * binary_entropy(rates)).sum())
    bias = max(0, int(((rates > 0) & (rates < 1)).sum()) - 1) / (2 * n * np.log(2))
    return float(max(0.0, entropy - within - bias) / entropy)


@torch.inference_mode()
def principal_components(
    split: StoreSplit,
    hookpoint: str,
    max_rows: int | None = None,
    without_tokens: Collection[int] = (),
) -> tuple[torch.Tensor, float]:
    """Directions in which a hookpoint's output varies most, (COMPONENTS, d_out), and their share.

    Over the first rows of the split; the share is that of the variance.
    """
    rows = min(split.rows if max_rows is None else max_rows, COMPONENT_ROWS)
    ys = [b.y.double() for b in row_batches(split, hookpoint, 4096, without_tokens, last=rows)]
    y = torch.cat(ys)
    covariance = (y - y.mean(dim=0)).T.cov(correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    n = min(COMPONENTS, len(values))
    share = float(values[-n:].sum() / values.sum().clamp(min=1e-300))
    return vectors[:, -n:].T.flip(0).float(), share


def ultra_latents(counts: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Latents with a firing rate above 10 %, the most frequent first, up to `MAX_LATENTS`."""
    found = np.flatnonzero(counts > ULTRA * rows)
    return found[np.argsort(-counts[found], kind="stable")][:MAX_LATENTS]


def diagnose(
    coder: SparseCoder,
    code: LatentCode,
    facts: RowFacts,
    components: torch.Tensor,
    latents: NDArray[np.int64],
) -> list[UltraLatent]:
    """What each of some frequent latents is.

    Args:
        coder: the coder, on any device.
        code: its firings by latent.
        facts: about the rows.
        components: of the output (`principal_components`).
        latents: which to look at.
    """
    if len(latents) == 0:
        return []
    chosen = torch.from_numpy(latents)
    decoder = torch.nn.functional.normalize(coder.W_dec.detach().cpu().float(), dim=1)
    encoder = torch.nn.functional.normalize(coder.W_enc.detach().cpu().float(), dim=1)
    cosines = decoder[chosen] @ decoder.T
    overlap = (decoder[chosen] @ components.T).square()
    n = int(facts.read.sum())
    classes = {"position": facts.position, "token": facts.token}
    totals = {k: np.bincount(v[facts.read]).astype(np.float64) for k, v in classes.items()}
    found = []
    for i, latent in enumerate(latents.tolist()):
        rows, _ = code.of(latent)
        fired = {
            k: np.bincount(v[rows], minlength=len(totals[k])).astype(np.float64)
            for k, v in classes.items()
        }
        antipode = int(cosines[i].argmin())
        one = UltraLatent(
            latent=latent,
            rate=len(rows) / n,
            position_share=explained_share(fired["position"], totals["position"]),
            token_share=explained_share(fired["token"], totals["token"]),
            special_share=float(facts.special[rows].mean()),
            token_entropy=_entropy(fired["token"]),
            token_entropy_all=_entropy(totals["token"]),
            antipode=antipode,
            decoder_cosine=float(cosines[i, antipode]),
            encoder_cosine=float(encoder[latent] @ encoder[antipode]),
            component_share=float(overlap[i].sum()),
            component=int(overlap[i].argmax()) + 1,
            what="",
        )
        found.append(one.model_copy(update={"what": _what(one)}))
    return found


def _entropy(counts: NDArray[np.float64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _what(latent: UltraLatent) -> str:
    """A diagnosis in words, the strongest explanation first."""
    words = []
    if latent.special_share > EXPLAINED:
        words.append("special tokens")
    if latent.position_share > EXPLAINED:
        words.append("position")
    if latent.token_share > EXPLAINED:
        words.append("token")
    if max(latent.decoder_cosine, latent.encoder_cosine) < ANTIPODAL:
        words.append(f"antipode of latent {latent.antipode}")
    if latent.component_share > IN_COMPONENTS:
        words.append(f"principal component {latent.component}")
    return ", ".join(words) or "none of these"
