"""A sweep of every kind of coder, small, for tests of kills and of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsc.train.config import TrainConfig

__all__ = ["CODERS", "config"]

CODERS = (
    {"hookpoint": "layers.2.mlp", "code": ["binary", "continuous"], "k": 4, "n_latents": 64,
     "optimiser": ["adam", "signum"]},
    {"hookpoint": "layers.2.mlp", "code": "hybrid", "k": 6, "n_latents": 64, "optimiser": "muon",
     "auxk_alpha": 0.1},
    {"hookpoint": "layers.0.mlp", "site": "sae", "k": 4, "n_latents": 48, "select": "batch_topk",
     "optimiser": "signum_classic"},
    {"hookpoint": "layers.0.mlp", "site": "sae", "k": 4, "n_latents": 48, "select": "groupmax",
     "code": "binary", "surrogate": "gumbel", "decoder_norm": "unit", "amplitude": "learned"},
)  # fmt: skip


def config(store_path: Path, runs: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": store_path, "runs": runs, "batch_rows": 256, "micro_rows": 100, "tokens": 24_000,
        "log_every": 3, "checkpoint_every": 2, "dead_after": 2000, "coders": CODERS,
        "eval_rows": 512, "eval_every": 9,
    }  # fmt: skip
    return TrainConfig(**values | fields)
