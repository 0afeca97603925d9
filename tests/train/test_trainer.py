from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsc.cache.store.loader import Cursor
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError, UserError
from bsc.records import write_record
from bsc.train.bank_trainer import BankTrainer
from bsc.train.checkpoint import load_checkpoint
from bsc.train.coders.bank import Bank
from bsc.train.config import TrainConfig
from bsc.train.job import make_job
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.raw import raw


def config(store_path: Path, runs: Path, **fields: object) -> TrainConfig:
    values: dict[str, object] = {
        "store": store_path, "runs": runs, "batch_rows": 256, "tokens": 12_000,
        "coders": ({"hookpoint": "layers.2.mlp", "code": ["binary", "continuous"], "k": 4,
                    "n_latents": 64},),
    }  # fmt: skip
    return TrainConfig(**values | fields)  # type: ignore[arg-type]


def test_a_run_holds_what_it_should_and_training_helps(run: Run) -> None:
    assert {p.name for p in run.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "coders", "checkpoint",
    }  # fmt: skip
    names = run.coder_names()
    assert len(names) == 8
    metrics = list(run.metrics())
    for name in names:
        curve = [m["fvu"] for m in metrics if m["coder"] == name]
        assert curve[-1] < curve[0] and curve[-1] < 1, (name, curve)
        coder = run.coder(name)
        assert coder.about["rows"] == 46 * 256 and coder.about["hookpoint"] == "layers.2.mlp"
        assert {p.name for p in run.coder_folder(name).iterdir()} == {
            "coder.safetensors", "config.json",
        }  # fmt: skip


def test_saved_coders_have_the_fvu_that_training_says(run: Run, store: ActivationStore) -> None:
    """On the training rows, in the units of the store: scaling is folded in rightly."""
    x, y = (
        torch.cat([store.train.tensor(f"layers.2.mlp/{s}", i) for i in range(store.train.shards)])
        for s in ("input", "output")
    )
    y = y.float()
    last = {m["coder"]: m["fvu"] for m in run.metrics()}
    for name in run.coder_names():
        coder = run.coder(name)
        y_hat = coder(y if coder.config.site == "sae" else x)
        fvu = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        assert abs(fvu.item() - last[name]) < 0.08 + 0.1 * last[name], (name, fvu, last[name])


def test_the_same_config_gives_the_same_bytes_on_a_cpu(store_path: Path, tmp_path: Path) -> None:
    runs = [train_sweep(config(store_path, tmp_path, name=n))[0] for n in ("a", "b")]
    for name in runs[0].coder_names():
        a, b = ((r.coder_folder(name) / "coder.safetensors").read_bytes() for r in runs)
        assert a == b
    assert _curves(runs[0]) == _curves(runs[1])


def _curves(run: Run) -> list[tuple[str, float, float]]:
    return [(m["coder"], m["fvu"], m["l0"]) for m in run.metrics()]


def test_a_coder_does_not_depend_on_the_company_it_trains_in(
    store_path: Path, tmp_path: Path
) -> None:
    together, _ = train_sweep(config(store_path, tmp_path, name="together"))
    alone, _ = train_sweep(
        config(store_path, tmp_path, name="alone",
               coders=({"hookpoint": "layers.2.mlp", "code": "binary", "k": 4, "n_latents": 64},))
    )  # fmt: skip
    (name,) = alone.coder_names()
    a, b = together.coder(name), alone.coder(name)
    for tensor in a.tensors:
        # GEMMs of other shapes round differently; selections of near ties follow.
        torch.testing.assert_close(a.tensors[tensor], b.tensors[tensor], rtol=0.05, atol=0.02)


def test_unit_decoders_have_rows_of_one_length_unless_they_have_amplitudes(
    store_path: Path, tmp_path: Path
) -> None:
    table = {"hookpoint": "layers.2.mlp", "site": "sae", "k": 8, "n_latents": 64}
    kinds = {"code": ["binary", "continuous"], "amplitude": ["none", "learned"]}
    run, _ = train_sweep(config(store_path, tmp_path, coders=(table | kinds,)))
    moments = ActivationStore(store_path).train.moments("layers.2.mlp/output")
    scale = (moments.total_variance / 32) ** 0.5
    found = set()
    for coder in map(run.coder, run.coder_names()):
        norms = coder.W_dec.norm(dim=1)
        of_one_length = bool(((norms - scale).abs() < 1e-3 * scale).all())
        assert of_one_length == (coder.config.amplitude == "none")
        found.add((coder.config.code, coder.config.amplitude))
    assert len(found) == 4


@pytest.mark.parametrize("optimiser", ["adam", "signum", "signum_classic", "muon"])
def test_unit_rows_stay_of_length_1_in_training_whatever_the_optimiser(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    """Longer rows would turn by less at each step."""
    lengths: list[torch.Tensor] = []
    plain = BankTrainer.step

    def look(self: BankTrainer, *args: Any) -> list[str]:
        frozen = plain(self, *args)
        lengths.append(self.bank.parameters["W_dec"].norm(dim=2).detach().clone())
        return frozen

    monkeypatch.setattr(BankTrainer, "step", look)
    table = {"hookpoint": "layers.2.mlp", "site": "sae", "k": 8, "n_latents": 64, "lr": 0.01,
             "optimiser": optimiser, "code": ["binary", "continuous"]}  # fmt: skip
    train_sweep(config(store_path, tmp_path, coders=(table,)))
    assert len(lengths) > 5
    for norms in lengths:
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=0)


def test_signum_with_unit_rows_evaluates_what_it_trained(store_path: Path, tmp_path: Path) -> None:
    """The mean of unit vectors is shorter than one: exported rows must be renormalised."""
    run, summaries = train_sweep(
        config(store_path, tmp_path, coders=({
            "hookpoint": "layers.2.mlp", "site": "sae", "optimiser": "signum", "k": 8,
            "n_latents": 64, "lr": 0.01,
        },))
    )  # fmt: skip
    (name,) = run.coder_names()
    store = ActivationStore(store_path)
    y = torch.cat(
        [store.train.tensor("layers.2.mlp/output", i) for i in range(store.train.shards)]
    ).float()
    fvu = (y - run.coder(name)(y)).square().sum() / (y - y.mean(0)).square().sum()
    trained = summaries[0].fvu
    assert trained is not None and fvu < trained + 0.1


def test_a_coder_that_turns_non_finite_is_named_and_the_others_go_on(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bank.step
    calls = []

    def poison(self: Bank, x: torch.Tensor, y: torch.Tensor, **how: Any) -> object:
        result = real(self, x, y, **how)
        calls.append(1)
        if len(calls) == 10:
            result.loss[0] = float("nan")
            self.gradients["W_dec"][0] = float("nan")
        return result

    monkeypatch.setattr(Bank, "step", poison)
    run, summaries = train_sweep(config(store_path, tmp_path))
    assert [s.frozen_at for s in summaries] == [9, None]
    frozen, other = (run.coder(n) for n in run.coder_names())
    assert frozen.about["frozen_at_step"] == 9
    assert all(t.isfinite().all() for c in (frozen, other) for t in c.tensors.values())
    assert summaries[1].fvu is not None and summaries[1].fvu < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tokens": 100}, "fewer than one batch"), ({"batch_rows": 10**7}, "Choose a smaller batch"),
     ({"store": Path("nowhere")}, "no such folder")],
)  # fmt: skip
def test_impossible_runs_are_refused_and_leave_nothing(
    store_path: Path, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_sweep(config(store_path, tmp_path / "runs", **fields))
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_run_is_not_taken_for_a_finished_one(run: Run, tmp_path: Path) -> None:
    record = raw(run.config_path)
    del record["completed"]
    (tmp_path / "coders").mkdir()
    write_record(tmp_path / "config.json", record)
    with pytest.raises(StoreError, match="has not ended"):
        Run.open(tmp_path)


def test_a_coder_outside_of_the_run_is_not_loaded(run: Run, tmp_path: Path) -> None:
    record = raw(run.config_path)
    record["coders"][0]["name"] = "../../elsewhere"
    write_record(tmp_path / "config.json", record)
    with pytest.raises(StoreError, match="is no name"):
        Run.open(tmp_path).coder("../../elsewhere")


def test_rows_that_are_all_the_same_are_refused(store_path: Path, tmp_path: Path) -> None:
    from bsc.cache.store.split import Moments
    from bsc.train.training_rows import Scale

    flat = Moments(10, torch.ones(4).double(), torch.zeros(4).double())
    some = Moments(10, torch.ones(4).double(), torch.ones(4).double())
    for x, y in ((flat, some), (some, flat)):
        for normalise in ("rms", "none"):
            if normalise == "none" and y is some:
                continue  # constant inputs can be trained on, to no use
            with pytest.raises(UserError, match=r"layers\.0\.mlp: its rows are all the same"):
                Scale.of("layers.0.mlp", x, y, normalise)


@pytest.mark.parametrize("looked_at", [1 << 20, 1000])
def test_a_run_of_no_length_reads_every_row_that_is_not_left_out_once_at_most(
    store_path: Path, tmp_path: Path, looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where their number is an estimate from some shards."""
    monkeypatch.setattr("bsc.cache.store.kept.MOMENT_ROWS", looked_at)
    store = ActivationStore(store_path)
    common = np.bincount(store.train.tokens("token_id")).argsort()[-3:]
    kept = int((~np.isin(store.train.tokens("token_id"), common)).sum())
    assert kept < 0.95 * store.train.rows
    asked = config(
        store_path, tmp_path, tokens=None, batch_rows=64, eval_every=0,
        coders=({"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 32},),
        without_tokens=tuple(int(i) for i in common),
    )  # fmt: skip
    job = make_job(asked, "test")
    least = kept if looked_at > store.train.rows else 0.9 * kept
    assert least <= job.rows_of_a_pass <= kept and job.steps == job.rows_of_a_pass // 64
    run, _ = train_sweep(asked)
    checkpoint = load_checkpoint(run.folder / "checkpoint")
    assert checkpoint is not None and checkpoint.state["step"] == job.steps
    assert Cursor(*checkpoint.state["cursor"]).epoch == 0
