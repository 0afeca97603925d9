from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bsc.eval.passes.batches
from bsc.cache.store.store import ActivationStore
from bsc.eval.figures.fidelity import fidelity_figures
from bsc.eval.passes.batches import document_numbers, piece_ranges
from bsc.eval.passes.codes import Codes
from bsc.eval.passes.controls import TOLERANCE, binarised, calibrate, quantised
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.row_pass import Sums, add_up, pass_over_rows
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run
from tests.eval.planted import Rows, identity, zeros

HOOK = "layers.2.mlp"


def measure(
    store: ActivationStore, coders: dict[str, SparseCoder], folder: Path, **options: Any
) -> tuple[dict[str, Sums], dict[str, Codes]]:
    """The pass over the held-out rows, values binarised and quantised where there are any."""
    split = store.held_out
    calibrations = {
        n: calibrate(c, store, HOOK, without_tokens=())
        for n, c in coders.items()
        if c.config.code != "binary"
    }
    pieces = Pieces.open(folder / "rows", sorted(coders))
    codes = {n: Pieces.open(folder / "codes" / n, n) for n in coders}
    document = document_numbers(split)
    list(pass_over_rows(coders, calibrations, split, HOOK, document=document, pieces=pieces,
                        codes=codes, **options))  # fmt: skip
    ranges = piece_ranges(split, options.get("max_rows"))
    sums = add_up(pieces, len(ranges), list(coders), int(document_numbers(split).max()) + 1)
    return sums, {n: Codes(codes[n], sums[n].counts) for n in coders}


def held_out(store: ActivationStore, side: str) -> torch.Tensor:
    split = store.held_out
    return torch.cat([split.tensor(f"{HOOK}/{side}", i) for i in range(split.shards)]).float()


def test_a_mean_predictor_has_fvu_1_whatever_the_offset_and_an_identity_has_0(
    store: ActivationStore, tmp_path: Path
) -> None:
    y = held_out(store, "output")
    mean = zeros(CoderConfig(site="transcoder", k=1, n_latents=4, d_in=32, d_out=32))
    mean.b_dec.copy_(y.double().mean(0))
    sums, _ = measure(store, {"mean": mean, "identity": identity(32)}, tmp_path)
    found = {n: fidelity_figures(s) for n, s in sums.items()}
    assert found["mean"]["fvu"] == pytest.approx(1.0, abs=1e-6)
    assert found["mean"]["fvu_gain"] == 0
    assert found["identity"]["fvu"] < 1e-12 and found["identity"]["fvu_median_channel"] < 1e-12
    assert found["identity"]["fvu_interval"][1] < 1e-12
    assert found["identity"]["fvu_skip_only"] > 1  # zeros are worse than the mean


def passed(rows: torch.Tensor, coder: SparseCoder, folder: Path) -> Sums:
    """The pass over rows in memory, four to a document."""
    split: Any = Rows(rows, np.arange(len(rows)) // 4)
    pieces, codes = Pieces.open(folder / "rows", 0), {"one": Pieces.open(folder / "codes", 0)}
    document = document_numbers(split)
    list(pass_over_rows({"one": coder}, {}, split, "h", document=document, pieces=pieces,
                        codes=codes))  # fmt: skip
    return add_up(pieces, 1, ["one"], int(document.max()) + 1)["one"]


@pytest.mark.parametrize("offset", [0.0, 5.0, 1000.0])
def test_a_mean_predictor_has_fvu_1_however_far_the_rows_are_from_zero(
    offset: float, tmp_path: Path
) -> None:
    """What SAEBench's explained variance gets wrong: at 5 deviations it says 0.92 explained."""
    torch.manual_seed(0)
    rows = torch.randn(400, 8) + offset
    mean = zeros(CoderConfig(site="transcoder", k=1, n_latents=4, d_in=8, d_out=8))
    mean.b_dec.copy_(rows.double().mean(dim=0))
    assert fidelity_figures(passed(rows, mean, tmp_path))["fvu"] == pytest.approx(1, abs=1e-5)


def test_the_order_of_rows_and_batches_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 8)
    coder = zeros(CoderConfig(site="sae", code="binary", k=3, n_latents=16, d_in=8, d_out=8))
    coder.W_enc.normal_()
    coder.W_dec.normal_()
    plain = passed(rows, coder, tmp_path / "a")
    monkeypatch.setattr(bsc.eval.passes.batches, "_VALUES_AT_ONCE", 16 * 7)
    permuted = passed(rows[torch.randperm(400)], coder, tmp_path / "b")
    assert np.array_equal(plain.counts, permuted.counts)
    a, b = fidelity_figures(plain), fidelity_figures(permuted)
    for figure in ("fvu", "fvu_median_channel", "fvu_skip_only", "l0"):
        assert a[figure] == pytest.approx(b[figure], rel=1e-6)


def test_figures_are_those_of_the_whole_split_at_once_whatever_the_pieces(
    store: ActivationStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All coders in one pass against each by itself on all rows; and every firing is saved."""
    coders = {n: run.coder(n) for n in run.coder_names()}
    y = held_out(store, "output")
    total = (y.double() - y.double().mean(0)).square()
    for piece, values in ((100, 64 * 77), (8192, 1 << 25)):
        monkeypatch.setattr(bsc.eval.passes.batches, "PIECE_ROWS", piece)
        monkeypatch.setattr(bsc.eval.passes.batches, "_VALUES_AT_ONCE", values)
        sums, codes = measure(store, coders, tmp_path / str(piece))
        for name, coder in coders.items():
            x = y if coder.config.site == "sae" else held_out(store, "input")
            code = coder.encode(x)
            residual = (y - coder.decode(code, x).double()).square()
            found = fidelity_figures(sums[name])
            assert found["rows"] == len(y)
            assert found["fvu"] == pytest.approx(float(residual.sum() / total.sum()), rel=1e-5)
            median = (residual.sum(0) / total.sum(0)).median()
            assert found["fvu_median_channel"] == pytest.approx(float(median), rel=0.05)
            on = code.value != 0
            assert found["l0"] == pytest.approx(float(on.sum() / len(y)), rel=1e-3)
            dense = torch.zeros(len(y), 64).scatter(1, code.latent, code.margin * on)
            counts = torch.from_numpy(sums[name].counts)
            assert (counts - (dense != 0).sum(0)).abs().max() <= 2  # near ties may round
            saved = torch.zeros(len(y), 64)
            for row, latent, margin in codes[name]:
                saved[row, latent] = torch.from_numpy(margin)
            differ = (saved - dense).abs() > 1e-3
            assert differ.sum() <= 8


def test_the_interval_of_fvu_is_about_that_of_resampled_contexts(
    store: ActivationStore, run: Run, tmp_path: Path
) -> None:
    coder = run.coder(run.coder_names()[0])
    sums, _ = measure(store, {"one": coder}, tmp_path)
    low, high = fidelity_figures(sums["one"])["fvu_interval"]
    error, total = (sums["one"].by_document[k] for k in ("coder", "total"))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(error), size=(4_000, len(error)))
    plain = np.quantile(error[drawn].sum(1) / total[drawn].sum(1), [0.025, 0.975])
    assert [low, high] == pytest.approx(plain, rel=0.03)
    assert low < fidelity_figures(sums["one"])["fvu"] < high


def test_an_interrupted_pass_goes_on_and_gives_the_same(
    store: ActivationStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bsc.eval.passes.batches, "PIECE_ROWS", 100)
    coders = {n: run.coder(n) for n in run.coder_names()[:2]}
    whole, _ = measure(store, coders, tmp_path / "whole")
    split = store.held_out
    pieces = Pieces.open(tmp_path / "cut" / "rows", sorted(coders))
    codes = {n: Pieces.open(tmp_path / "cut" / "codes" / n, n) for n in coders}
    work = pass_over_rows(coders, {}, split, HOOK, document=document_numbers(split), pieces=pieces,
                          codes=codes)  # fmt: skip
    next(work)
    work.close()
    assert pieces.done(0) and not pieces.done(1)
    first = (tmp_path / "cut" / "rows" / "00000.safetensors").stat().st_mtime_ns
    again, _ = measure(store, coders, tmp_path / "cut")
    assert (tmp_path / "cut" / "rows" / "00000.safetensors").stat().st_mtime_ns == first
    for name in coders:
        assert np.array_equal(again[name].counts, whole[name].counts)
        assert np.array_equal(again[name].by_document["coder"], whole[name].by_document["coder"])


def test_planted_firing_is_counted(store: ActivationStore, tmp_path: Path) -> None:
    """Latents that fire always, never, and on the rows where channel 0 is positive."""
    coder = zeros(
        CoderConfig(site="transcoder", code="binary", k=3, n_latents=5, d_in=32, d_out=32)
    )
    coder.log_threshold.fill_(-20.0)
    coder.b_enc.copy_(torch.tensor([100.0, -100.0, 0.0, -100.0, -100.0]))
    coder.W_enc[2, 0] = 1.0
    sums, _ = measure(store, {"planted": coder}, tmp_path)
    positive = int((held_out(store, "input")[:, 0] > 2e-9).sum())
    assert sums["planted"].counts.tolist() == [store.held_out.rows, 0, positive, 0, 0]


def test_rows_of_left_out_tokens_and_rows_above_the_limit_do_not_count(
    store: ActivationStore, run: Run, tmp_path: Path
) -> None:
    coder = run.coder(run.coder_names()[0])
    split = store.held_out
    ids = split.tokens("token_id")
    common = np.bincount(ids).argsort()[-4:].tolist()
    kept = torch.from_numpy(~np.isin(ids, common))
    sums, codes = measure(store, {"one": coder}, tmp_path / "a", without_tokens=common)
    found = fidelity_figures(sums["one"])
    assert found["rows"] == int(kept.sum()) < split.rows - 100
    x, y = held_out(store, coder.config.side)[kept], held_out(store, "output")[kept]
    expected = (y - coder(x)).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert found["fvu"] == pytest.approx(float(expected), rel=1e-4)
    assert not np.isin(ids[np.concatenate([f.row for f in codes["one"]])], common).any()
    few, _ = measure(store, {"one": coder}, tmp_path / "b", max_rows=150)
    assert few["one"].rows == 150
    # Their own mean, not that of the whole split.
    x, y = held_out(store, coder.config.side)[:150], held_out(store, "output")[:150]
    expected = (y - coder(x)).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert fidelity_figures(few["one"])["fvu"] == pytest.approx(float(expected), rel=1e-4)


def test_values_are_replaced_by_means_of_training_rows_and_by_steps(
    store: ActivationStore, run: Run, tmp_path: Path
) -> None:
    name = next(n for n in run.coder_names() if "skip_transcoder-continuous-k8" in n)
    coder = run.coder(name)
    found = calibrate(coder, store, HOOK, without_tokens=())
    split = store.train
    assert found.rows == split.rows
    x = torch.cat([split.tensor(f"{HOOK}/input", i) for i in range(split.shards)])
    code = coder.encode(x)
    for latent in range(64):
        values = code.value[(code.latent == latent) & (code.value != 0)]
        if len(values):
            assert float(found.mean_value[latent]) == pytest.approx(float(values.mean()), rel=1e-4)
    flat = binarised(coder, found, code)
    assert torch.equal(flat.value != 0, code.value != 0)
    on = flat.value != 0
    assert torch.equal(flat.value[on], found.mean_value[code.latent][on])
    rounded = quantised(coder, found, code)
    step = found.step[code.latent][on]
    assert ((rounded.value - code.value)[on].abs() <= step / 2 + 1e-5).all()
    # Quantising costs about what it was made to cost, and binarising more.
    sums, _ = measure(store, {"one": coder}, tmp_path)
    figures = fidelity_figures(sums["one"])
    added = figures["fvu_quantised"] / figures["fvu"] - 1
    assert TOLERANCE / 3 < added < TOLERANCE * 3
    assert figures["fvu_binarised"] > figures["fvu"]


def test_binary_latents_of_a_hybrid_keep_their_values(
    store: ActivationStore,
) -> None:
    coder = zeros(
        CoderConfig(site="transcoder", code="hybrid", k=4, n_latents=8, d_in=32, d_out=32)
    )
    torch.manual_seed(0)
    coder.W_enc.normal_()
    coder.W_dec.normal_()
    found = calibrate(coder, store, HOOK, without_tokens=())
    code = coder.encode(held_out(store, "input"))
    binary = (code.latent >= 4) & (code.value != 0)
    assert binary.any() and (binarised(coder, found, code).value[binary] == 1).all()
    assert (quantised(coder, found, code).value[binary] == 1).all()
