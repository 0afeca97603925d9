"""The loop of a training run: steps, metrics, evaluations and checkpoints of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from math import isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsc.cache.store.loader import START, Cursor, Loader
from bsc.cache.store.ring_room import SHARDS_AT_ONCE
from bsc.progress import console
from bsc.train.bank_trainer import BankTrainer, HeldOut, Progress
from bsc.train.checkpoint import Checkpoint, save_checkpoint
from bsc.train.job import Job
from bsc.train.live import TrainingView, training_view
from bsc.train.metrics import MetricsWriter
from bsc.train.run import Run
from bsc.train.stopping import asked_to_stop
from bsc.train.team import Team
from bsc.train.training_rows import left_out_tokens

__all__ = ["CoderSummary", "Loop", "Passed"]

_CHECKPOINT_SECONDS = 600.0
_SAVES = 20
"""Between two checkpoints there is so many times what writing one takes: large ones on slow storage
would otherwise be all that a run does."""
_EVALUATIONS = 10

Passed = Callable[[int], None]
"""Says that no shard of a ring before this one is needed again."""


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


class Loop:
    """Steps, metrics, evaluations and checkpoints of one process.

    Of a team every process takes the same steps; the one that leads decides what depends on time,
    and alone writes and is seen.
    """

    def __init__(self, job: Job, banks: list[BankTrainer], team: Team) -> None:
        """Begin before the first step.

        Args:
            job: what is trained.
            banks: its coders.
            team: processes that share their rows.
        """
        self.job, self.banks, self.team = job, banks, team
        self._room = job.store.room  # once: it comes from a file
        self.step = 0
        """Steps that were taken."""
        self.cursor = START
        self.seconds = 0.0
        """Seconds of training, those before a resume included."""
        self._metrics_bytes = 0
        self._saved_step: int | None = None
        self._saved_at = time.perf_counter()
        """When the last checkpoint was written."""
        self._save_seconds = 0.0
        """What it took."""
        self._held = 0
        """First shard of a ring that the last checkpoint needs."""
        self._waited = 0.0
        config = job.config
        self.names = tuple(dict.fromkeys(n for b in banks for n in (b.x_name, b.y_name)))
        self._held_out: dict[str, Tensor] | None = None
        every = config.eval_every
        if every is None:
            every = -(-job.steps // _EVALUATIONS)
        self._eval_every = -(-every // config.log_every) * config.log_every

    def _held_out_rows(self) -> dict[str, Tensor] | None:
        """Rows to evaluate on; None where the store has none, or none yet.

        Of a ring the first ones, once they are all there, so that it is the same rows whenever a
        run is started.
        """
        store = self.job.store
        split, ring = store.splits.get("held_out"), store.ring is not None
        if self._held_out is None and split is not None:
            split.refresh()
            wanted = min(self.job.config.eval_rows, store.rows_planned("held_out"))
            rows = min(wanted, split.rows)
            if rows and (not ring or rows == wanted or store.complete):
                loader = Loader(
                    split,
                    self.names,
                    batch_rows=rows,
                    seed=0,
                    drop_last=False,
                    shuffle=not ring,
                    without_tokens=left_out_tokens(self.job.store, self.job.config),
                )
                batches = loader.batches()
                first = next(batches)
                self._held_out = {n: t.clone() for n, t in zip(self.names, first, strict=True)}
                # A generator, which its type does not say.
                batches.close()  # type: ignore[attr-defined]
        return self._held_out

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint was taken. Coders that it does not know begin there."""
        state = checkpoint.state
        self.step, self.cursor = int(state["step"]), Cursor(*state["cursor"])
        self.seconds, self._waited = float(state["seconds"]), float(state["waited"])
        self._metrics_bytes = int(state["metrics_bytes"])
        self._saved_step = self.step
        for bank in self.banks:
            for c, coder in enumerate(bank.coders):
                if (known := checkpoint.coder(coder.name)) is not None:
                    progress, mine = known
                    bank.load_state(c, mine, Progress(**progress))
                else:
                    bank.progress[c] = Progress(first_step=self.step)

    def _save(self, writer: MetricsWriter | None) -> None:
        """Write a checkpoint, unless the one of this step is there."""
        began = time.perf_counter()
        self._save_what_is_new(writer)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - began

    def _save_what_is_new(self, writer: MetricsWriter | None) -> None:
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        coders = [(b, c) for b in self.banks for c in range(len(b.coders))]
        states = [b.state(c) for b, c in coders]
        self.team.check_same([t for s in states for t in s.values()], self.step)
        if writer is None:
            return
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
        save_checkpoint(self.job.part / "checkpoint", self.step, state, states)

    def _loader(self) -> Loader:
        job, room = self.job, self._room
        cuda = job.device.type == "cuda"
        return Loader(
            job.store.train,
            self.names,
            batch_rows=job.config.batch_rows,
            seed=job.config.seed,
            without_tokens=left_out_tokens(job.store, job.config),
            shards_at_once=SHARDS_AT_ONCE if room is None else room.shards_at_once,
            pinned=cuda,
            ahead=2 if cuda else 0,
            part=self.team.part(job.config.batch_rows),
        )

    def run(self, passed: Passed | None) -> list[CoderSummary]:
        """Take the steps that are left.

        Args:
            passed: told which shards of a ring are no longer needed, after each checkpoint; None:
                the store stays.

        Returns:
            The last figures of every coder.
        """
        job, config = self.job, self.job.config
        loader = self._loader()
        label = f"train {len(job.mine)} coders"
        total, done = job.steps * config.batch_rows, self.step * config.batch_rows
        with (
            self._writer() as writer,
            asked_to_stop("bsc train --resume") as stop,
            training_view(label, total, done) as view,
        ):
            view.figures.update(self._figures_before())
            self._saved_at = time.perf_counter()
            source = (
                loader.batches(self.cursor)
                if self._room is None
                else loader.ring_batches(self.cursor, lambda: job.store.complete, stop.is_set)
            )
            self._steps(loader, source, writer, view, stop.is_set, passed)
            self._checkpoint(writer, passed)
            return self._summaries(view.figures)

    def _writer(self) -> Any:
        """Where metrics go: nowhere from a process that does not lead."""
        config, part = self.job.config, self.job.part
        if not self.team.leads:
            return nullcontext()
        return MetricsWriter(
            part / "metrics.jsonl",
            keep_bytes=self._metrics_bytes,
            name=config.name,
            tensorboard=part / "tensorboard" if config.tensorboard else None,
            wandb=config.wandb,
        )

    def _steps(
        self,
        loader: Loader,
        source: Iterator[tuple[Tensor, ...]],
        writer: MetricsWriter | None,
        view: TrainingView,
        stopping: Callable[[], bool],
        passed: Passed | None,
    ) -> None:
        job, config = self.job, self.job.config
        started = time.perf_counter() - self.seconds
        before, waited = time.perf_counter(), 0.0
        for tensors in islice(source, job.steps - self.step if self._active() else 0):
            waited += time.perf_counter() - before
            self._waited += time.perf_counter() - before
            self._step(dict(zip(self.names, tensors, strict=True)))
            self.cursor = loader.cursor
            self.seconds = time.perf_counter() - started
            if self.step % config.log_every == 0 or self.step == job.steps:
                self._log(writer, view)
            view.advance(config.batch_rows, waited)
            stop, due = self.team.any(stopping(), self.team.leads and self._is_due(passed))
            if due or stop:
                self._checkpoint(writer, passed)
            if stop and self.step < job.steps:
                raise KeyboardInterrupt
            if not self._active():
                break
            before = time.perf_counter()
        if self.step < job.steps and self._active():
            self._ended_early(writer, view, stopping)

    def _ended_early(
        self, writer: MetricsWriter | None, view: TrainingView, stopping: Callable[[], bool]
    ) -> None:
        """What there is to do when a ring gives no more rows, though steps are left.

        Raises:
            KeyboardInterrupt: the process was asked to stop while it waited for rows.
        """
        if stopping():
            if self.team.size == 1:  # the others of a team may still wait
                self._save(writer)
            raise KeyboardInterrupt
        if self.step and self.step % self.job.config.log_every:
            self._log(writer, view, last=True)
        console.print(
            f"{self.job.store.folder}: the ring has ended after {self.step:,} of "
            f"{self.job.steps:,} steps, so learning rates and schedules did not come to their end"
        )

    def _log(self, writer: MetricsWriter | None, view: TrainingView, *, last: bool = False) -> None:
        for line in self._lines(last=last or self.step == self.job.steps):
            view.figures[line["coder"]] = line
            if writer is not None:
                writer.write(line)

    def _is_due(self, passed: Passed | None) -> bool:
        """Whether the time of a checkpoint has come, or a ring has no room for going on without."""
        every, room = self.job.config.checkpoint_every, self._room
        if room is not None and passed is not None:
            held = self.cursor.group - self._held
            step = -(-self.job.config.batch_rows // room.shard_rows) + room.shards_at_once
            if held >= room.checkpoint_shards and (not every or held + step > room.most_shards):
                return True
        if every:
            return self.step % every == 0
        pause = max(_CHECKPOINT_SECONDS, _SAVES * self._save_seconds)
        return time.perf_counter() - self._saved_at > pause

    def begin_at(self, shard: int) -> None:
        """Begin with this shard of a ring, where no checkpoint says where."""
        if self.cursor == START:
            self.cursor = Cursor(0, shard, 0)
        self._held = self.cursor.group

    def _checkpoint(self, writer: MetricsWriter | None, passed: Passed | None) -> None:
        self._save(writer)
        self._held = self.cursor.group
        if passed is not None:
            passed(self._held)

    def _active(self) -> bool:
        return any(p.active for b in self.banks for p in b.progress)

    def _step(self, batch: dict[str, Tensor]) -> None:
        # Once for all banks. Each bank reads its losses from the device before the next batch is
        # taken, so a pinned buffer is not filled again while it is being copied from.
        device, rows = self.job.device, self.job.config.batch_rows
        batch = {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}
        for bank in self.banks:
            for name in bank.step(batch, self.step, self.job.steps, rows):
                console.print(f"{name}: not finite at step {self.step}; it is left as it was")
        self.step += 1

    def _evaluated(self, bank: BankTrainer) -> dict[int, HeldOut]:
        """Held-out figures of the coders of a bank, by its place: those of the process that leads,
        where several have the coder."""
        rows = self._held_out_rows() if self.team.leads else None
        found = bank.held_out(rows) if rows is not None else {}
        if self.team.size > 1:
            mine = found.get(0)
            told = torch.tensor(mine or (nan, nan), dtype=torch.float64)
            said = torch.tensor([mine is not None])
            self.team.hear(told, said)
            found = {0: HeldOut(*told.tolist())} if said else {}
        return found

    def _lines(self, *, last: bool) -> list[dict[str, Any]]:
        """Lines of metrics for the steps since the last ones; `last`: no more will come."""
        common = {
            "step": self.step,
            "rows": self.step * self.job.config.batch_rows,
            "seconds": round(self.seconds, 2),
            "waiting_for_data": round(self._waited / max(self.seconds, 1e-9), 4),
        }
        due = self._eval_every and (self.step % self._eval_every == 0 or last)
        lines = []
        for bank in self.banks:
            metrics = bank.take_metrics()
            held_out = self._evaluated(bank) if due else {}
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
        if not self._metrics_bytes or not self.team.leads:
            return {}
        return {line["coder"]: line for line in Run(self.job.part).metrics()}

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
