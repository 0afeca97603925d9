"""The settings of "Binary Sparse Coding for Interpretability" by one name: `preset = "paper"`.

A preset stands in the place of the defaults: whatever a file or a flag says goes before it. Sources
are arXiv 2509.25596 and its authors' public code; docs/coders.md says where that code and this one
differ whatever the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Preset", "coder_defaults", "run_defaults"]

Preset = Literal["paper"]

_RUN: dict[str, Any] = {"normalise": "none", "batch_rows": 2**20}
_WARMUP_STEPS, _STEPS = 1_000, 10_000
"""Steps over which Adam's learning rate rises, of about so many."""
_ADAM_EPS = 1e-8
"""Torch's."""


def run_defaults(preset: str | None) -> dict[str, Any]:
    """Settings of a run that a preset gives.

    >>> run_defaults("paper")
    {'normalise': 'none', 'batch_rows': 1048576}
    """
    return dict(_RUN) if preset == "paper" else {}


def coder_defaults(preset: str | None, point: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a preset gives to a coder of the site, code and surrogate of `point`.

    SAEs have unit rows and no amplitudes, and 32 latents for each channel, the default of the
    authors' command line; transcoders 64. Binary and hybrid SAEs and Gumbel-softmax are trained by
    Signum, the others by Adam.

    >>> coder_defaults("paper", {"site": "sae", "code": "binary"})["optimiser"]
    'signum'
    >>> coder_defaults("paper", {"code": "continuous"})
    {'expansion': 64, 'optimiser': 'adam', 'lr': 'paper', 'warmup': 0.1, 'adam_eps': 1e-08}
    """
    if preset != "paper":
        return {}
    sae = point.get("site") == "sae"
    binary = point.get("code", "continuous") != "continuous"
    gumbel = binary and point.get("surrogate") == "gumbel"
    found: dict[str, Any] = {"expansion": 32 if sae else 64}
    if sae:
        found |= {"decoder_norm": "unit", "amplitude": "none"}
    if gumbel:
        found["gumbel_support"] = "full"
    optimiser = point.get("optimiser") or ("signum" if gumbel or (binary and sae) else "adam")
    found["optimiser"] = optimiser
    hybrid = point.get("code") == "hybrid"
    if optimiser in ("adam", "signum") and not hybrid and not (gumbel and optimiser == "adam"):
        found["lr"] = "paper"  # for others the paper has no rule, so ours holds
    if optimiser == "adam":
        found |= {"warmup": _WARMUP_STEPS / _STEPS, "adam_eps": _ADAM_EPS}
    return found
