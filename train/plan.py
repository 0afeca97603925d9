"""What a sweep comes to before it is started: coders, banks, memory, rows, hours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from bsc.cache.store.split import Moments
from bsc.progress import format_bytes
from bsc.train.bank_trainer import BankTrainer
from bsc.train.job import Job
from bsc.train.memory import flops_per_row, group_banks
from bsc.train.training_rows import open_bytes

__all__ = ["SweepPlan", "plan_sweep"]

_PROBE_STEPS = 3


@dataclass(frozen=True)
class SweepPlan:
    """The figures of a sweep, of this process where several share it."""

    coders: int
    banks: int
    rows: int
    passes: float
    steps: int
    batch_rows: int
    micro_rows: int
    memory: dict[str, int]
    """Bytes by purpose, and their total."""
    free: int
    """Bytes that may be used."""
    open_shards: int
    """Bytes of the shards that are open at a time."""
    decoded: bool
    """Whether those are in memory, decoded; else the system keeps them there while it has room."""
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    checkpoint_rows: int | None
    """Rows after which a ring has no room to go on without one; None: no ring."""
    flops_per_row: float
    rows_per_second: float | None
    """Measured here, without reading rows; None: not measured."""

    @property
    def hours(self) -> float | None:
        """At the measured rate."""
        return None if self.rows_per_second is None else self.rows / self.rows_per_second / 3600

    def to_json(self) -> dict[str, Any]:
        """The figures for machines."""
        return dict(self.__dict__) | {"hours": self.hours}

    def lines(self) -> list[str]:
        """The figures for people."""
        parts = ", ".join(f"{k} {format_bytes(v)}" for k, v in self.memory.items() if k != "total")
        lines = [
            f"coders      {self.coders} in {self.banks} bank(s)",
            f"rows        {self.rows:,} ({self.passes:.2f} passes), {self.steps:,} steps of "
            f"{self.batch_rows:,}, {self.micro_rows:,} at a time",
            f"memory      {format_bytes(self.memory['total'])} of {format_bytes(self.free)} "
            f"({parts})",
            f"shards      {format_bytes(self.open_shards)} open at a time beside that, "
            + ("decoded in memory" if self.decoded else "mapped: reads are quick while they fit"),
            f"checkpoint  {format_bytes(self.checkpoint)} on disk, twice while one is written"
            + (
                f"; every {self.checkpoint_rows:,} rows at least, for the ring"
                if self.checkpoint_rows
                else ""
            ),
            f"arithmetic  {self.flops_per_row / 1e9:.2f} GFLOP a row",
        ]
        if self.rows_per_second is not None and self.hours is not None:
            took = (
                f"{self.hours:.1f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"
            )
            lines.append(
                f"time        {took} at {self.rows_per_second:,.0f} rows/s, measured here without "
                f"reading the store"
            )
        return lines


def plan_sweep(job: Job, *, measure: bool = True) -> SweepPlan:
    """Say what a sweep comes to.

    Args:
        job: the sweep, with the coders of this process.
        measure: whether to make the banks and time some steps on random rows.
    """
    memory, config = job.memory, job.config
    parts = {
        name: getattr(memory, name)
        for name in ("weights", "optimisers", "products", "workspace", "batches")
    }
    return SweepPlan(
        coders=len(job.mine),
        banks=len(group_banks(job.mine)),
        rows=job.steps * config.batch_rows,
        passes=job.steps * config.batch_rows / job.rows_of_a_pass,
        steps=job.steps,
        batch_rows=config.batch_rows,
        micro_rows=memory.micro_rows,
        memory=parts | {"total": memory.total},
        free=job.free,
        open_shards=open_bytes(job.store, job.mine),
        decoded=job.store.train.codec == "lz4",
        checkpoint=memory.weights // 2 + memory.optimisers,
        checkpoint_rows=_checkpoint_rows(job),
        flops_per_row=sum(flops_per_row(c.coder) for c in job.mine),
        rows_per_second=_measure(job) if measure else None,
    )


def _checkpoint_rows(job: Job) -> int | None:
    """Rows between two checkpoints of a run on a ring, at most."""
    room = job.store.room
    if room is None or room.shards <= room.slots:
        return None
    return room.checkpoint_rows


def _measure(job: Job) -> float:
    """Rows per second of whole steps on random rows."""
    specs, moments = job.store.train.specs, None
    if job.store.train.rows == 0:  # of a capture that has just begun
        widths = {n: int(s.width) for n, s in specs.items() if s.width is not None}
        moments = {
            n: Moments(1, *torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, width))
            for n, width in widths.items()
        }
    banks = [
        BankTrainer(g, job.store, job.config, job.device, job.memory.micro_rows, moments)
        for g in group_banks(job.mine)
    ]
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, torch.Tensor] = {}
    for bank in banks:
        for name, width in ((bank.x_name, bank.bank.d_in), (bank.y_name, bank.bank.d_out)):
            if name not in batch:
                drawn = torch.randn((job.config.batch_rows, width), generator=generator)
                batch[name] = (drawn * bank.scale.y).bfloat16()
    seconds = []
    for step in range(_PROBE_STEPS + 1):
        started = time.perf_counter()
        for bank in banks:
            bank.step(batch, step, job.steps)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds.append(time.perf_counter() - started)
    return job.config.batch_rows / sorted(seconds[1:])[_PROBE_STEPS // 2]
