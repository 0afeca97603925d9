"""Stage 2: one read of the store trains every coder of a sweep.

Coders that share hookpoint, site and number of latents form a bank; every bank sees every batch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor

from bsc.cache.store.loader import SHARDS_AT_ONCE, START, Cursor, Loader
from bsc.cache.store.ring import RingReader, reading
from bsc.cache.store.store import ActivationStore
from bsc.devices import keep_freed_memory
from bsc.errors import UserError
from bsc.files import make_folder
from bsc.progress import console
from bsc.train.bank_trainer import BankTrainer, Progress
from bsc.train.checkpoint import save_checkpoint
from bsc.train.config import TrainConfig
from bsc.train.job import Job, make_job
from bsc.train.live import training_view
from bsc.train.memory import group_banks
from bsc.train.metrics import MetricsWriter
from bsc.train.ranks import merge_parts
from bsc.train.run import Run, claim
from bsc.train.run_config import Completed, RunConfig
from bsc.train.stopping import asked_to_stop
from bsc.train.training_rows import left_out_tokens
from bsc.typed import combined, write_typed
from bsc.versions import versions

__all__ = ["CoderSummary", "run_job", "train_sweep"]

_CHECKPOINT_SECONDS = 600.0
_EVALUATIONS = 10


class CoderSummary(NamedTuple):
    """Training figures of a coder over the last logging interval: rows it had not seen before."""

    name: str
    fvu: float | None
    """None, as the next two, where the coder turned non-finite before the first interval."""
    l0: float | None
    dead: float | None
    frozen_at: int | None
    """Step at which it turned non-finite and was left alone; None: it did not."""
    held_out_fvu: float | None = None
    """On held-out rows, at the last evaluation; None: there was none."""
    stopped_at: int | None = None
    """Step after which it was done, by its `patience`; None: it trained to the end."""


def train_sweep(
    config: TrainConfig, where: str = "bsc train", *, rank: int = 0, world: int = 1
) -> tuple[Run, list[CoderSummary]]:
    """Train a sweep and write its run.

    Args:
        config: the run.
        where: what the config comes from, for messages.
        rank: of this process, where several share the coders of a run.
        world: number of processes.

    Returns:
        The run, and the last training figures of every coder of this process.

    Raises:
        UserError: the request cannot be carried out. Nothing is written then.
    """
    job = make_job(config, where, rank=rank, world=world)
    job.run.check_new(job.part)
    return run_job(job, None)


def run_job(
    job: Job, checkpoint: tuple[dict[str, Any], list[dict[str, Tensor]]] | None, *, new: bool = True
) -> tuple[Run, list[CoderSummary]]:
    """Train from a checkpoint, or from the beginning, to the end.

    Args:
        job: what.
        checkpoint: as `load_checkpoint` gives it.
        new: whether the folder is still to be made.
    """
    with ExitStack() as stack:
        ring = None
        if job.store.ring is not None:
            ring = stack.enter_context(reading(_join_ring(job.store, job.config)))
        elif not job.store.complete:
            console.print(f"{job.store.folder}: the capture of this store has not ended")
        if job.device.type == "cpu":
            keep_freed_memory()
        # Memory is taken before anything is written.
        banks = [
            BankTrainer(group, job.store, job.config, job.device, job.memory.micro_rows)
            for group in group_banks(job.mine)
        ]
        loop = _Loop(job, banks)
        if checkpoint is not None:
            loop.restore(*checkpoint)
        if new:
            make_folder(job.part, "run")
        stack.enter_context(claim(job.part))
        record = job.record()
        write_typed(job.part / "config.json", record)
        if job.world > 1:
            write_typed(job.run.config_path, record)
        # Figures of coders that are trained on would be of others.
        job.run.remove_figures()
        console.print(
            f"{job.run.folder}: {len(job.mine)} coders in {len(banks)} bank(s), {job.steps:,} "
            f"steps of {job.config.batch_rows:,} rows, "
            f"{job.steps * job.config.batch_rows / job.rows:.2f} passes"
            + (f"; from step {loop.step:,}" if loop.step else "")
        )
        summaries = loop.run(ring)
        about = {
            "store_id": job.store.store_id,
            "model": job.store.attributes["model"],
            "bsc": versions()["bsc"],
        }
        for bank in banks:
            for coder in bank.finish(about, loop.step):
                coder.save(job.run.coder_folder(str(coder.about["name"])))
        completed = Completed(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(loop.seconds, 1),
            rows=loop.step * job.config.batch_rows,
        )
        write_typed(job.part / "config.json", combined(RunConfig, record, completed=completed))
        if job.world > 1:
            merge_parts(job.run, job.world)
        if not job.config.keep_checkpoint:
            shutil.rmtree(job.part / "checkpoint", ignore_errors=True)
    order = {p.name: i for i, p in enumerate(job.planned)}
    return job.run, sorted(summaries, key=lambda s: order[s.name])


class _Loop:
    """Steps, metrics, evaluations and checkpoints of one process."""

    def __init__(self, job: Job, banks: list[BankTrainer]) -> None:
        self.job, self.banks = job, banks
        self.step = 0
        """Steps that were taken."""
        self.cursor = START
        self.seconds = 0.0
        """Seconds of training, those before a resume included."""
        self._metrics_bytes = 0
        self._saved_step: int | None = None
        self._waited = 0.0
        config = job.config
        self.names = tuple(dict.fromkeys(n for b in banks for n in (b.x_name, b.y_name)))
        self._held_out: dict[str, Tensor] | None = None
        every = config.eval_every
        if every is None:
            every = -(-job.steps // _EVALUATIONS)
        self._eval_every = -(-every // config.log_every) * config.log_every

    def _held_out_rows(self) -> dict[str, Tensor] | None:
        """Rows to evaluate on; None where the store has none, or none yet."""
        split = self.job.store.splits.get("held_out")
        if self._held_out is None and split is not None:
            split.refresh()
            if split.rows:
                loader = Loader(
                    split,
                    self.names,
                    batch_rows=min(self.job.config.eval_rows, split.rows),
                    seed=0,
                    drop_last=False,
                    without_tokens=left_out_tokens(self.job.store, self.job.config),
                )
                batches = loader.batches()
                first = next(batches)
                self._held_out = {n: t.clone() for n, t in zip(self.names, first, strict=True)}
                batches.close()  # type: ignore[attr-defined]
        return self._held_out

    def restore(self, state: dict[str, Any], tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Go to where a checkpoint was taken. Coders that it does not know begin there."""
        self.step, self.cursor = int(state["step"]), Cursor(*state["cursor"])
        self.seconds, self._waited = float(state["seconds"]), float(state["waited"])
        self._metrics_bytes = int(state["metrics_bytes"])
        self._saved_step = self.step
        known = {
            c["name"]: (c["progress"], t) for c, t in zip(state["coders"], tensors, strict=True)
        }
        for bank in self.banks:
            for c, coder in enumerate(bank.coders):
                if coder.name in known:
                    progress, mine = known[coder.name]
                    bank.load_state(c, mine, Progress(**progress))
                else:
                    bank.progress[c] = Progress(first_step=self.step)

    def save(self, writer: MetricsWriter) -> None:
        """Write a checkpoint, unless the one of this step is there."""
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        coders = [(b, c) for b in self.banks for c in range(len(b.coders))]
        state = {
            "step": self.step,
            "cursor": list(self.cursor),
            "seconds": self.seconds,
            "waited": self._waited,
            "metrics_bytes": writer.flush(),
            "coders": [
                {"name": b.coders[c].name, "progress": asdict(b.progress[c])} for b, c in coders
            ],
        }
        save_checkpoint(
            self.job.part / "checkpoint", self.step, state, [b.state(c) for b, c in coders]
        )

    def run(self, ring: RingReader | None) -> list[CoderSummary]:
        """Take the steps that are left; the last figures of every coder."""
        job, config = self.job, self.job.config
        cuda = job.device.type == "cuda"
        loader = Loader(
            job.store.train,
            self.names,
            batch_rows=config.batch_rows,
            seed=config.seed,
            without_tokens=left_out_tokens(job.store, config),
            # A ring must hold a group of shards and a window of the writer at the same time.
            shards_at_once=min(SHARDS_AT_ONCE, max(1, (job.store.ring or 64) // 2)),
            pinned=cuda,
            ahead=2 if cuda else 0,
        )
        source = loader.batches(self.cursor)
        if ring is not None:
            source = loader.ring_batches(ring, lambda: job.store.complete)
        label = f"train {len(job.mine)} coders"
        total = job.steps * config.batch_rows
        writer = MetricsWriter(
            job.part / "metrics.jsonl",
            keep_bytes=self._metrics_bytes,
            name=config.name,
            tensorboard=job.part / "tensorboard" if config.tensorboard else None,
            wandb=config.wandb,
        )
        with writer, asked_to_stop("bsc train --resume") as stop:
            with training_view(label, total, self.step * config.batch_rows) as view:
                view.figures.update(self._figures_before())
                started, saved = time.perf_counter() - self.seconds, time.perf_counter()
                before = time.perf_counter()
                waited = 0.0
                left = job.steps - self.step if self._active() else 0
                for tensors in islice(source, left):
                    waited += time.perf_counter() - before
                    self._waited += time.perf_counter() - before
                    self._step(dict(zip(self.names, tensors, strict=True)))
                    self.cursor = loader.cursor
                    self.seconds = time.perf_counter() - started
                    if self.step % config.log_every == 0 or self.step == job.steps:
                        for line in self._lines():
                            view.figures[line["coder"]] = line
                            writer.write(line)
                    view.advance(config.batch_rows, waited)
                    now = time.perf_counter()
                    due = (
                        self.step % config.checkpoint_every == 0
                        if config.checkpoint_every
                        else now - saved > _CHECKPOINT_SECONDS
                    )
                    if (due or stop.is_set()) and ring is None:
                        self.save(writer)
                        saved = time.perf_counter()
                    if stop.is_set() and self.step < job.steps:
                        raise KeyboardInterrupt
                    if not self._active():
                        break
                    before = time.perf_counter()
            if ring is None:
                self.save(writer)
            return self._summaries(view.figures)

    def _active(self) -> bool:
        return any(p.active for b in self.banks for p in b.progress)

    def _step(self, batch: dict[str, Tensor]) -> None:
        # Once for all banks. Each bank reads its losses from the device before the next batch is
        # taken, so a pinned buffer is not filled again while it is being copied from.
        device = self.job.device
        batch = {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}
        for bank in self.banks:
            for name in bank.step(batch, self.step, self.job.steps):
                console.print(f"{name}: not finite at step {self.step}; it is left as it was")
        self.step += 1

    def _lines(self) -> list[dict[str, Any]]:
        """Lines of metrics for the steps since the last ones."""
        common = {
            "step": self.step,
            "rows": self.step * self.job.config.batch_rows,
            "seconds": round(self.seconds, 2),
            "waiting_for_data": round(self._waited / max(self.seconds, 1e-9), 4),
        }
        due = self._eval_every and (
            self.step % self._eval_every == 0 or self.step == self.job.steps
        )
        rows = self._held_out_rows() if due else None
        lines = []
        for bank in self.banks:
            metrics = bank.take_metrics()
            held_out = bank.held_out(rows) if rows is not None else {}
            bank.stop_or_freeze(held_out, self.step)
            figures = {
                bank.coders[c].name: {"held_out_fvu": f.fvu, "held_out_l0": f.l0}
                for c, f in held_out.items()
                if isfinite(f.fvu)
            }
            lines += [common | line | figures.get(line["coder"], {}) for line in metrics]
            for coder, progress in zip(bank.coders, bank.progress, strict=True):
                if progress.frozen_at == self.step:
                    console.print(f"{coder.name}: not finite at step {self.step}; the others go on")
                if progress.stopped_at == self.step:
                    console.print(
                        f"{coder.name}: done at step {self.step}, its held-out FVU no longer falls"
                    )
        return lines

    def _figures_before(self) -> dict[str, dict[str, Any]]:
        """Last lines of every coder before a resume."""
        if not self._metrics_bytes:
            return {}
        part = Run(self.job.part)
        return {line["coder"]: line for line in part.metrics()}

    def _summaries(self, figures: Mapping[str, Mapping[str, Any]]) -> list[CoderSummary]:
        summaries = []
        for bank in self.banks:
            for coder, progress in zip(bank.coders, bank.progress, strict=True):
                f = figures.get(coder.name, {})
                summaries.append(
                    CoderSummary(
                        coder.name,
                        f.get("fvu"),
                        f.get("l0"),
                        f.get("dead"),
                        progress.frozen_at,
                        f.get("held_out_fvu"),
                        progress.stopped_at,
                    )
                )
        return summaries


def _join_ring(store: ActivationStore, config: TrainConfig) -> RingReader:
    """A place in the ring of a store, once enough rows are there to begin with.

    Raises:
        UserError: rows are to be read more often than they pass.
    """
    rows = store.planned_rows
    if config.tokens is not None and config.tokens > rows:
        raise UserError(
            f"--tokens {config.tokens}: {store.folder} is a ring, through which {rows:,} rows pass "
            f"once."
        )
    split = store.train
    ring = RingReader(store.folder, split.specs, split.grid, config.name)
    console.print(f"{store.folder}: reading the ring from shard {ring.next_shard} on")
    while split.rows < config.batch_rows and not store.complete:
        time.sleep(0.1)
        split.refresh()
    return ring
