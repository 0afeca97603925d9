"""`bsc plan`: what a capture would come to, from the model's config alone or a measured probe."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.plan import CapturePlan, what_fits
from bsc.cache.capture.source import batch_contexts, context_length, open_source, plan_of
from bsc.cache.model.architectures import default_hookpoints
from bsc.cache.model.attention import Separation, forward_inputs
from bsc.cache.model.hookpoints import RowTap, match_hookpoints
from bsc.cache.model.models import load_architecture
from bsc.cache.model.text import read_text
from bsc.cache.model.tokens import context_batches
from bsc.cache.store.folder import open_folder
from bsc.cache.store.layout import Hookpoint
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.progress import format_bytes

__all__ = ["Estimate", "estimate"]

PROBE_BATCHES = 3
"""Forward passes that are timed, after one that is not."""
PROBE_BYTES = 1 << 28
"""Bytes that the write test writes."""
ASSUMED_DISK_RATE = 1e9
"""Bytes per second that a disk is taken to write where nobody measured: a local NVMe drive, or a
cluster's file system from one node, for hours on end."""


@dataclass(frozen=True)
class Estimate:
    """A plan with what is known of the disk and of the time."""

    plan: CapturePlan
    free: int | None
    """Free bytes where the store is to be; None where no limit can be seen."""
    rate: float | None
    """Tokens per second of one process; None: not measured."""
    disk_rate: float
    """Bytes per second that the disk takes, from all processes."""
    disk_measured: bool
    """Whether that was measured or given, rather than assumed."""
    fits: bool
    options: tuple[str, ...]
    """Flags each of which would make it fit, where it does not."""

    @property
    def model_hours(self) -> float | None:
        """Time of the forward passes, of all processes at once; None: not measured."""
        if not self.rate:
            return None
        return self._rows / self.rate / self.plan.writers / 3600

    @property
    def disk_hours(self) -> float:
        """Time in which the disk takes every row."""
        return self._bytes_through / self.disk_rate / 3600

    @property
    def hours(self) -> float | None:
        """Time of the capture: of the slower of model and disk, which work at the same time."""
        return None if self.model_hours is None else max(self.model_hours, self.disk_hours)

    @property
    def needed_disk_rate(self) -> float | None:
        """Bytes per second that the disk has to take for the model not to wait."""
        return None if not self.model_hours else self._bytes_through / self.model_hours / 3600

    @property
    def _rows(self) -> int:
        return sum(grid.rows for grid in self.plan.grids.values())

    @property
    def _bytes_through(self) -> int:
        """Bytes that are written, also where a ring keeps few of them."""
        return sum(
            grid.shards * spec.shard_bytes(grid)
            for split, grid in self.plan.grids.items()
            for spec in self.plan.specs(split).values()
        )

    def to_json(self) -> dict[str, Any]:
        """The estimate for machines."""
        return self.plan.to_json() | {
            "free_bytes": self.free,
            "fits": self.fits,
            "options": list(self.options),
            "tokens_per_second": self.rate,
            "hours": self.hours,
            "model_hours": self.model_hours,
            "disk_hours": self.disk_hours,
            "disk_bytes_per_second": self.disk_rate,
            "disk_measured": self.disk_measured,
            "needed_disk_bytes_per_second": self.needed_disk_rate,
        }

    def _time_lines(self) -> list[str]:
        """How long it takes, what that depends on, and which of the two is slower."""
        disk = f"{format_bytes(self.disk_rate)}/s" + ("" if self.disk_measured else " assumed")
        how = "" if self.disk_measured else "; --probe measures it, --disk-rate says it"
        if self.model_hours is None or self.needed_disk_rate is None:
            return [
                "time       of the model unknown: --probe measures it, --rate TOKENS_PER_SECOND "
                "says it",
                f"           of the disk {_hours(self.disk_hours)} at {disk}{how}",
            ]
        slower = "the disk" if self.disk_hours > self.model_hours else "the model"
        return [
            f"time       {_hours(max(self.model_hours, self.disk_hours))}; the bottleneck is "
            f"{slower}",
            f"           model {_hours(self.model_hours)} at {self.rate:,.0f} tokens/s a process",
            f"           disk {_hours(self.disk_hours)} at {disk}{how}; the model alone would need "
            f"{format_bytes(self.needed_disk_rate)}/s",
        ]

    def lines(self) -> list[str]:
        """The estimate for people."""
        plan, train = self.plan, self.plan.grids["train"]
        out = [f"{'hookpoint':32} {'d_in':>6} {'d_out':>6} {'bytes':>10}"]
        for hook, size in zip(plan.hookpoints, plan.bytes_by_hookpoint().values(), strict=True):
            out.append(f"{hook.name:32} {hook.d_in:6} {hook.d_out:6} {format_bytes(size):>10}")
        held_out = plan.grids.get("held_out")
        out += [
            "",
            f"rows       {train.rows:,} for training"
            + (f", {held_out.rows:,} held out" if held_out else ""),
            f"store      {format_bytes(plan.bytes)} in {train.shards:,} shards of "
            f"{train.shard_rows:,} rows an array, codec {plan.codec}"
            + (f", {plan.ring} shards at a time" if plan.ring else ""),
            f"memory     {format_bytes(plan.memory())} beside the model, {plan.open_files():,} "
            f"open files" + (" for each process" if plan.writers > 1 else ""),
        ]
        if plan.room is not None:
            out.append(
                f"ring       a training run writes a checkpoint every "
                f"{plan.room.checkpoint_rows:,} rows ({plan.room.checkpoint_shards} shards) at "
                f"least, in batches of at most {plan.room.batch_rows:,} rows"
            )
        out += self._time_lines()
        if self.free is not None:
            out.append(
                f"disk       {format_bytes(self.free)} free: "
                + ("it fits" if self.fits else "it does not fit")
            )
        if self.options:
            out += ["", "Any of these would fit:", *(f"  {option}" for option in self.options)]
        elif not self.fits:
            out += ["", "Nothing but a larger disk would hold it."]
        return out


def estimate(
    config: CaptureConfig,
    *,
    rate: float | None = None,
    probe: bool = False,
    disk_rate: float | None = None,
    free: int | None = None,
) -> Estimate:
    """Plan a capture without writing anything that stays.

    Args:
        config: of the capture.
        rate: tokens per second of one process, where it is known.
        probe: load the model and measure its rate and that of the disk on this machine.
        disk_rate: bytes per second that the disk takes, where it is known.
        free: bytes free, instead of asking the disk.

    Raises:
        UserError: the model or its hookpoints are not as they are asked for.
    """
    if probe:
        rate = rate or _measure(config)
        disk_rate = disk_rate or _measure_disk(config.store)
    hooks, longest = _shapes(config)
    device = pick_device(config.device)
    context = context_length(config.context, longest)
    batch = batch_contexts(config, context, device)
    plan = plan_of(config, hooks, context, batch)
    available = open_folder(config.store).free_bytes() if free is None else free
    options = () if available is None else tuple(what_fits(plan, available))
    fits = available is None or plan.bytes <= 0.98 * available
    return Estimate(
        plan,
        available,
        rate,
        disk_rate or ASSUMED_DISK_RATE,
        disk_rate is not None,
        fits,
        () if fits else options,
    )


def _shapes(config: CaptureConfig) -> tuple[tuple[Hookpoint, ...], int]:
    """Hookpoints with their widths, and the longest context, without loading weights."""
    base, longest = load_architecture(config.model, revision=config.revision)
    names = match_hookpoints(base, list(config.hookpoints) or list(default_hookpoints(base)))
    tap = RowTap(base, names)
    ids = torch.zeros((1, 8), dtype=torch.int64, device="meta")
    try:
        # With a mask of its own nothing in the model asks for values, which meta tensors lack.
        given = forward_inputs(
            ids, ids, packing="masked", separation=Separation("both"), dtype=torch.bfloat16
        )
        rows = tap.rows(given)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"--model {config.model}: its widths cannot be found without its weights "
            f"({str(error).splitlines()[0]})."
        ) from error
    return tuple(
        Hookpoint(n, rows[f"{n}/input"].shape[1], rows[f"{n}/output"].shape[1]) for n in names
    ), longest


def _measure(config: CaptureConfig) -> float:
    """Tokens per second of the model on this machine, with its hooks, without the disk."""
    source = open_source(config)
    batches = context_batches(
        read_text(config.text),
        source.lm.tokenizer,
        context=source.context,
        batch=source.batch,
        wanted={"train": (PROBE_BATCHES + 1) * source.batch * source.context},
        packing=config.packing,
    )
    tokens, seconds = 0, 0.0
    for i, batch in enumerate(islice(batches, PROBE_BATCHES + 1)):
        before = time.perf_counter()
        block = source.block(batch)
        next(iter(block.values()))[0, 0].item()  # waits for the device
        if i:
            tokens += len(block["tokens/token_id"])
            seconds += time.perf_counter() - before
    if not tokens:
        raise UserError("--probe: the text gives fewer than two batches; give --rate instead.")
    return tokens / seconds


def _measure_disk(store: str | Path) -> float | None:
    """Bytes per second that the disk of a store takes, from a file that is removed again; None of
    object storage."""
    if "://" in str(store):
        return None
    folder = Path(store)
    while not folder.is_dir():
        folder = folder.parent
    block = np.random.default_rng(0).bytes(1 << 24)  # nothing that a file system could squeeze
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            before = time.perf_counter()
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return PROBE_BYTES / (time.perf_counter() - before)
    except OSError as error:
        raise UserError(
            f"--store {store}: the disk cannot be tried ({error.strerror}); give --disk-rate "
            f"instead of --probe, or a folder that you may write to."
        ) from None


def _hours(hours: float) -> str:
    """
    >>> _hours(0.01), _hours(3.84), _hours(300)
    ('36 s', '3.8 hours', '12.5 days')
    """
    if hours < 0.1:
        return f"{hours * 3600:.0f} s"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
