"""Studies to test with."""

from __future__ import annotations

from pathlib import Path

import pytest

LR = """
title = "Does the larger step leave less unexplained?"

[cache.acts]
model = "demo"
hookpoints = ["layers.3.mlp"]
tokens = "20k"
held_out_tokens = 8192

[train.sweep]
store = "acts"
coders = [{ code = "continuous", k = 4, n_latents = 64, lr = [1e-3, 1e-2], seed = [0, 1, 2] }]

[eval.figures]
run = "sweep"
ce_tokens = 1024
ablation_bins = 0
no_probe = true

[[claims]]
id = "lr"
words = "The larger step leaves less unexplained."
figure = "fvu"
coders = { lr = 1e-2 }
against = { lr = 1e-3 }
below = 0
"""
"""A study of a user's own."""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    path = tmp_path / "lr.toml"
    path.write_text(LR)
    return path
