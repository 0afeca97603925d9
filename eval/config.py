"""How much an evaluation measures. Imports neither torch nor zarr."""

from __future__ import annotations

from bsc.config import Config
from bsc.counts import parse_count
from bsc.options import option

__all__ = ["EMBEDDED", "EvalConfig"]

EMBEDDED = "stdlib"
"""Name of the embedded set of labelled texts: the standard library, by package."""

_MUCH, _ABLATION, _PROBING = "How much is measured", "Ablations", "Sparse probing"


class EvalConfig(Config):
    """How much is measured. What is measured does not depend on it."""

    ce_tokens: int = option(
        100_000, "Held-out tokens for the model's loss.", _MUCH, ge=1, parser=parse_count
    )
    rows: int | None = option(
        None, "Held-out rows for all else.", _MUCH, ge=1, parser=parse_count, shown="all"
    )
    ablation_bins: int = option(
        10, "Bins of latents that are turned off in turn; 0: none.", _ABLATION, ge=0
    )
    """Bins of equal firing mass."""
    ablation_tokens: int = option(
        8_192, "Held-out tokens for ablations.", _ABLATION, ge=1, parser=parse_count
    )
    ablation_score: str = option(
        "rate", "Order of latents: rate, or a .csv/.jsonl of coder, latent, score.", _ABLATION
    )
    ultra_ablations: int = option(
        4, "Latents above 10 % that are turned off one by one, per coder.", _ABLATION, ge=0
    )
    probes: tuple[str, ...] = option(
        (EMBEDDED,),
        "Labelled texts (.csv, .jsonl); several times.",
        _PROBING,
        flag="--probe",
        shown=EMBEDDED,
    )
    """Sets of labelled texts for sparse probing: ``"stdlib"`` or files."""
    probe_texts: int = option(
        2_000, "Labelled texts of a class at most.", _PROBING, ge=4, parser=parse_count
    )
