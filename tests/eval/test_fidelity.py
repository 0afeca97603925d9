from __future__ import annotations

import numpy as np
import pytest
import torch

from bsc.cache.store import ActivationStore
from bsc.eval.fidelity import measure
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run

HOOK = "layers.2.mlp"


def zeros(config: CoderConfig) -> SparseCoder:
    return SparseCoder(config, {n: torch.zeros(s) for n, s in parameter_shapes(config).items()})


def held_out(store: ActivationStore, side: str) -> torch.Tensor:
    split = store.held_out
    return torch.cat([split.tensor(f"{HOOK}/{side}", i) for i in range(split.shards)]).float()


def test_a_coder_that_gives_the_mean_row_has_fvu_1_and_an_identity_has_0(
    store: ActivationStore,
) -> None:
    y = held_out(store, "output")
    mean = zeros(CoderConfig(site="transcoder", k=1, n_latents=4, d_in=32, d_out=32))
    mean.b_dec.copy_(y.double().mean(0))
    assert measure(mean, store.held_out, HOOK).fvu == pytest.approx(1.0, abs=1e-6)
    # Every channel as a pair of latents, y+ and y-: k = 32 are enough for any row.
    identity = zeros(CoderConfig(site="sae", k=32, n_latents=64, d_in=32, d_out=32))
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    identity.W_enc.copy_(both)
    identity.W_dec.copy_(both)
    found = measure(identity, store.held_out, HOOK)
    assert found.fvu < 1e-12 and found.fvu_median_channel < 1e-12
    assert found.fvu_skip_only > 1  # zeros are worse than the mean


def test_figures_are_those_of_the_whole_split_at_once_whatever_the_batch(
    store: ActivationStore, run: Run
) -> None:
    for name in run.coder_names():
        coder = run.coder(name)
        y = held_out(store, "output")
        x = y if coder.config.site == "sae" else held_out(store, "input")
        code = coder.encode(x)
        y_hat = coder.decode(code, x).double()
        residual = (y - y_hat).square()
        total = (y.double() - y.double().mean(0)).square()
        for rows in (100, 8192):
            found = measure(coder, store.held_out, HOOK, batch_rows=rows)
            assert found.rows == len(y)
            assert found.fvu == pytest.approx(float(residual.sum() / total.sum()), rel=1e-5)
            on = code.value != 0
            assert found.l0 == pytest.approx(float(on.sum() / len(y)), rel=1e-3)
            dense = torch.zeros(len(y), 64).scatter(1, code.latent, on.float())
            assert (found.counts - dense.sum(0)).abs().max() <= 2  # near ties may round


def test_a_big_offset_of_the_rows_does_not_hide_the_error() -> None:
    """FVU subtracts the mean: what SAEBench's explained variance gets wrong."""
    rows = torch.randn(500, 4) + 1000
    total = (rows.double() - rows.double().mean(0)).square().sum()
    predicted = rows.double().mean(0).expand_as(rows)
    assert float((rows - predicted).square().sum() / total) == pytest.approx(1, abs=1e-6)


def test_counts_above_rates_and_dead_latents_are_those_that_were_planted(
    store: ActivationStore,
) -> None:
    """Latents that fire always, never, and on the rows where channel 0 is positive."""
    coder = zeros(
        CoderConfig(site="transcoder", code="binary", k=3, n_latents=5, d_in=32, d_out=32)
    )
    coder.log_threshold.fill_(-20.0)
    coder.b_enc.copy_(torch.tensor([100.0, -100.0, 0.0, -100.0, -100.0]))
    coder.W_enc[2, 0] = 1.0
    found = measure(coder, store.held_out, HOOK)
    positive = int((held_out(store, "input")[:, 0] > 2e-9).sum())
    assert found.counts.tolist() == [found.rows, 0, positive, 0, 0]
    figures = found.to_json()
    assert figures["dead"] == 3
    assert figures["latents_above"] == {
        "0.01": 2,
        "0.1": 2,
        "0.5": 2 if positive > found.rows / 2 else 1,
    }
    assert sum(figures["log10_rate_histogram"]["counts"]) == 2
    assert figures["share_of_firings_above"]["0.01"] == 1.0


def test_rows_of_left_out_tokens_do_not_count(store: ActivationStore, run: Run) -> None:
    coder = run.coder(run.coder_names()[0])
    split, hook = store.held_out, "layers.2.mlp"
    ids = split.tokens("token_id")
    common = np.bincount(ids).argsort()[-4:].tolist()
    kept = torch.from_numpy(~np.isin(ids, common))
    found = measure(coder, split, hook, without_tokens=common)
    assert found.rows == int(kept.sum()) < split.rows - 100
    x, y = (
        torch.cat([split.tensor(f"{hook}/{side}", i) for i in range(split.shards)])[kept].float()
        for side in (coder.config.side, "output")
    )
    mean = y.mean(dim=0)
    with torch.no_grad():
        expected = (y - coder(x)).square().sum() / (y - mean).square().sum()
    assert found.fvu == pytest.approx(float(expected), rel=1e-4)
