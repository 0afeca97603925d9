"""What the loop writes, shows and decides on its way."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.progress import console
from bsc.train import live, loop
from bsc.train.bank_trainer import BankTrainer
from bsc.train.checkpoint import save_checkpoint
from bsc.train.config import TrainConfig
from bsc.train.metrics import MetricsWriter
from bsc.train.trainer import train_sweep


def config(store_path: Path, runs: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": store_path, "runs": runs, "batch_rows": 256, "tokens": 5_120, "log_every": 2,
        "coders": ({"hookpoint": "layers.2.mlp", "code": ["binary", "continuous"], "k": 4,
                    "n_latents": 64},),
    }  # fmt: skip
    return TrainConfig(**values | fields)


def test_held_out_rows_are_evaluated_every_so_often(store_path: Path, tmp_path: Path) -> None:
    run, summaries = train_sweep(config(store_path, tmp_path, eval_every=5, eval_rows=700))
    name = run.coder_names()[0]
    at = {m["step"]: m["held_out_fvu"] for m in run.metrics()
          if m["coder"] == name and "held_out_fvu" in m}  # fmt: skip
    assert list(at) == [6, 12, 18, 20]  # every 6: a multiple of log_every; and the end
    assert at[20] < min(1, at[6]) and summaries[0].held_out_fvu == at[20]
    # The figure is that of the coder as it is saved.
    store_rows = _held_out_rows(store_path, 700)
    coder = run.coder(name)
    x, y = (t.float() for t in store_rows)
    fvu = (y - coder(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert abs(float(fvu) - at[20]) < 1e-3


def _held_out_rows(store_path: Path, n: int) -> tuple[torch.Tensor, ...]:
    from bsc.cache.store.loader import Loader

    names = ("layers.2.mlp/input", "layers.2.mlp/output")
    loader = Loader(ActivationStore(store_path).held_out, names, batch_rows=n, seed=0)
    return tuple(t.clone() for t in next(loader.batches()))


def test_a_coder_that_no_longer_improves_is_done_and_named(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = (
        {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "lr": 1e-9, "patience": 2},
        {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "lr": 1e-2, "patience": 2},
    )
    run, summaries = train_sweep(config(store_path, tmp_path, eval_every=2, coders=tables))
    assert [s.stopped_at for s in summaries] == [6, None]  # best at 2, then two without a gain
    assert "done at step 6" in capsys.readouterr().err
    rows = [run.coder(n).about["rows"] for n in run.coder_names()]
    assert rows == [6 * 256, 20 * 256]
    assert {m["step"] for m in run.metrics() if m["coder"] == summaries[0].name} == {2, 4, 6}


def test_a_run_ends_when_all_its_coders_are_done(store_path: Path, tmp_path: Path) -> None:
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "lr": 1e-9, "patience": 1}
    run, _ = train_sweep(config(store_path, tmp_path, eval_every=2, coders=(table,)))
    assert run.config()["completed"]["rows"] == 4 * 256


def test_k_and_temperature_follow_their_schedule(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"hookpoint": "layers.2.mlp", "code": "binary", "k": 4, "n_latents": 64, "k_init": 12,
             "temperature_init": 4.0, "anneal": 0.5}  # fmt: skip
    seen = []
    real = BankTrainer._schedule

    def look(self: BankTrainer, *args: Any) -> None:
        real(self, *args)
        seen.append((self.bank.k[0], self.bank.temperature[0]))

    monkeypatch.setattr(BankTrainer, "_schedule", look)
    run, _ = train_sweep(config(store_path, tmp_path, coders=(table,)))
    assert seen[0] == (12, 4.0) and seen[5] == (8, 3.0) and set(seen[10:]) == {(4, 2.0)}
    coder = run.coder(run.coder_names()[0])
    assert coder.config.k == 4
    l0 = [m["l0"] for m in run.metrics()]
    assert l0[0] > 8 and l0[-1] <= 4


def test_auxk_sees_latents_that_did_not_fire_for_dead_after_rows(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"hookpoint": "layers.2.mlp", "k": 2, "n_latents": 640, "auxk_alpha": 0.1}
    masks = []
    real = BankTrainer._schedule

    def look(self: BankTrainer, *args: Any) -> None:
        real(self, *args)
        assert self.bank.dead is not None
        masks.append((self.bank.dead.clone(), self.last_fired.clone(), self.progress[0].rows))

    monkeypatch.setattr(BankTrainer, "_schedule", look)
    train_sweep(config(store_path, tmp_path, coders=(table,), dead_after=1024))
    assert not any(m.any() for m, _, _ in masks[:4]) and masks[-1][0].any()
    for dead, fired, rows in masks:
        assert torch.equal(dead, rows - fired >= 1024)


def test_fp32_is_near_bf16(store_path: Path, tmp_path: Path) -> None:
    figures = {
        one.precision: [s.held_out_fvu for s in train_sweep(one)[1]]
        for precision in ("bf16", "fp32")
        for one in [config(store_path, tmp_path, name=precision, precision=precision)]
    }
    for a, b in zip(figures["bf16"], figures["fp32"], strict=True):
        assert a is not None and b is not None and abs(a / b - 1) < 0.02, figures


def test_the_table_shows_every_coder_and_what_the_run_waits_for() -> None:
    view = live.TrainingView("train 3 coders", 1000, 0)
    for i in range(30):
        view.figures[f"layers.0.mlp/c{i}"] = {
            "fvu": i / 100, "l0": 4.0, "dead": 0.25, "lr": 0.001,
            "held_out_fvu": 0.5 if i == 2 else None,
        }  # fmt: skip
    view.advance(500, waited=view.seconds)
    out = io.StringIO()
    Console(file=out, width=160).print(view)
    text = out.getvalue()
    assert "layers.0.mlp/c2 " in text and "0.5000" in text and "25.0 %" in text
    assert " 0 rows/s" not in text
    assert "and 6 more" in text and "disk-bound" in text and "500" not in text.splitlines()[1]
    assert view.line().startswith("train 3 coders: 50.0 %, 0.0 h left, ")
    assert view.line().endswith("FVU 0.0000 to 0.2900")
    quick = live.TrainingView("train", 1000, 0)
    quick.advance(10, waited=0.0)
    assert "compute-bound (0 % waiting)" in quick.note()


def test_tensorboard_and_wandb_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **how: Any) -> Any:
        if name in ("torch.utils.tensorboard", "wandb"):
            raise ImportError(name)
        return real(name, *args, **how)

    monkeypatch.setattr(builtins, "__import__", missing)
    for how, message in (
        ({"tensorboard": tmp_path}, r"pip install 'bsc.tensorboard.'"),
        ({"wandb": "p"}, r"pip install 'bsc.wandb.'"),
    ):
        with pytest.raises(UserError, match=message):
            MetricsWriter(tmp_path / "m.jsonl", **how)


def test_tensorboard_gets_the_figures(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a stand-in for its writer: the package is not needed for anything else."""
    import sys
    import types

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, key: str, value: float, step: int) -> None:
            written.append((key, value, step))

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            written.append(("closed", 0.0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run, _ = train_sweep(config(store_path, tmp_path, tensorboard=True))
    name = run.coder_names()[0]
    fvu = [(v, s) for k, v, s in written if k == f"{name}/fvu"]
    assert fvu == [(m["fvu"], m["step"]) for m in run.metrics() if m["coder"] == name]
    assert written[-1][0] == "closed"


def test_a_store_without_held_out_rows_is_trained_on_without_evaluation(
    tiny_model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "acts"
    capture(
        CaptureConfig(
            model=str(tiny_model), store=store, text=TextSource(corpus="stdlib", held_out=0.0),
            hookpoints=("layers.2.mlp",), tokens=3_000, context=32, batch_tokens=512,
        )
    )  # fmt: skip
    assert "held_out" not in ActivationStore(store).splits
    run, summaries = train_sweep(config(store, tmp_path))
    assert [s.held_out_fvu for s in summaries] == [None, None]
    assert not any("held_out_fvu" in m for m in run.metrics())
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "patience": 2}
    for fields in ({"eval_every": 5}, {"coders": (table,)}):
        with pytest.raises(UserError, match="has no held-out rows, which eval_every and patience"):
            train_sweep(config(store, tmp_path, name="other", **fields))
    with pytest.raises(UserError, match="patience needs held-out evaluations"):
        train_sweep(config(store, tmp_path, name="other", eval_every=0, coders=(table,)))
    assert not (tmp_path / "other").exists()


def test_weights_that_overflow_leave_the_other_coders_alone(
    store_path: Path, tmp_path: Path
) -> None:
    base = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64}
    tables = (base | {"lr": 1e38, "group": "a"}, base | {"group": "b"})
    run, summaries = train_sweep(config(store_path, tmp_path, coders=tables, eval_every=2))
    assert summaries[0].frozen_at is not None and summaries[1].frozen_at is None
    assert summaries[1].held_out_fvu is not None and summaries[1].held_out_fvu < 1
    assert run.coder(run.coder_names()[0]).about["frozen_at_step"] is not None
    # One row has no variance to explain: no figure, and no mistake.
    _, (one,) = train_sweep(config(store_path, tmp_path, name="one", coders=(base,), eval_rows=1))
    assert one.held_out_fvu is None


def test_what_is_not_installed_is_said_before_anything_is_written(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb: not installed"):
        train_sweep(config(store_path, tmp_path, wandb="project"))
    assert not (tmp_path / "run").exists()


def test_checkpoints_leave_time_for_training(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing one takes longer than what is between two, the next step would not be one."""
    clock = [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            clock[0] += 30
            return clock[0]

    saved = []

    def slow(folder: Path, step: int, *what: Any) -> None:
        clock[0] += 900
        saved.append(step)
        save_checkpoint(folder, step, *what)

    monkeypatch.setattr(loop, "time", Clock)
    monkeypatch.setattr(loop, "save_checkpoint", slow)
    train_sweep(config(store_path, tmp_path))
    assert len(saved) == 2 and saved[-1] == 20, "one by the clock, one at the end"


def test_the_time_that_is_left_is_known_where_a_step_takes_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console, "get_time", lambda: clock[0])
    view = live.TrainingView("train", 1000, 0)
    for _ in range(4):
        clock[0] += 90
        view.advance(10, 0.0)
    (task,) = view._bar.tasks
    view._bar.start_task(task.id)
    assert task.time_remaining is not None
