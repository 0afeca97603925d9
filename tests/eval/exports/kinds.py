"""Coders of every kind with random weights, and which formats hold them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bsc.eval.exports import circuit_tracer, export
from bsc.eval.exports.weights import Origin, Reference
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig

WIDTH, LATENTS, K = 24, 96, 6

CODES: dict[str, dict[str, Any]] = {
    "top-k": {},
    "groupmax": {"select": "groupmax"},
    "batch top-k": {"select": "batch_topk"},
    "binary": {"code": "binary"},
    "binary, re": {"code": "binary", "surrogate": "re", "threshold": "fixed"},
    "binary groupmax": {"code": "binary", "select": "groupmax"},
    "binary batch top-k": {"code": "binary", "select": "batch_topk"},
    "binary, exactly k": {"code": "binary", "exact_k": True},
    "newton": {"code": "binary", "threshold": "newton"},
    "gumbel": {"code": "binary", "surrogate": "gumbel", "select": "groupmax"},
    "hybrid": {"code": "hybrid"},
}
SITES = ("sae", "transcoder", "skip_transcoder")
EVERYWHERE = {(site, code) for site in SITES for code in ("top-k", "groupmax")}
BATCH = {(site, "batch top-k") for site in SITES}
HELD: dict[str, set[tuple[str, str]]] = {
    "sparsify": EVERYWHERE,
    "sparsify-binary": EVERYWHERE
    | {(site, code) for site in SITES for code in ("binary", "binary, re")},
    "saelens": {("sae", "top-k")} | BATCH,
    "dictionary-learning": {("sae", "top-k"), ("sae", "batch top-k")},
    "circuit-tracer": BATCH - {("sae", "batch top-k")},
}
"""Kinds, a site and a code, that a format holds exactly; it refuses all others."""


def kinds() -> Iterator[tuple[str, str, CoderConfig]]:
    """Site, name of the code, config."""
    for site in SITES:
        for name, fields in CODES.items():
            widths = {"d_in": WIDTH, "d_out": WIDTH, "n_latents": LATENTS}
            yield (
                site,
                name,
                CoderConfig.model_validate(
                    {"site": site, "code": "continuous", "k": K, **widths, **fields}
                ),
            )


def random_coder(config: CoderConfig, seed: int = 0) -> SparseCoder:
    """Of which some latents of most rows are below 0 or below their threshold."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }
    tensors["encoder.bias"] -= 8.0
    if "log_threshold" in tensors:
        tensors["log_threshold"] *= 0.5
    if "select_threshold" in tensors:
        tensors["select_threshold"] = tensors["select_threshold"].abs() + 1.0
    return SparseCoder(config, tensors)


def rows(n: int = 300) -> torch.Tensor:
    """Rows to encode."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(7))


ORIGIN = Origin("a/model", "layers.0.mlp", 64)


def written(format_: str, coder: SparseCoder, folder: Path) -> Reference:
    """Write a coder in a format, and say what the other tool makes of it."""
    folder.mkdir(parents=True)
    if format_ == "circuit-tracer":
        circuit_tracer.write_set({0: coder}, folder, ORIGIN.model)
        return circuit_tracer.reference(folder, 0)
    one = export._FORMATS[format_]
    one.write(coder, folder, ORIGIN)
    return one.reference(folder)
