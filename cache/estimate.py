"""`bsc plan`: what a capture would come to, from the model's config alone or a measured probe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from bsc.cache.attention import forward_inputs
from bsc.cache.folder import open_folder
from bsc.cache.hookpoints import RowTap, match_hookpoints
from bsc.cache.layout import Hookpoint
from bsc.cache.models import load_architecture
from bsc.cache.plan import CapturePlan, plan_capture, what_fits
from bsc.cache.source import (
    MAX_DEFAULT_CONTEXT,
    CaptureConfig,
    batch_contexts,
    default_hookpoints,
    open_source,
)
from bsc.cache.text import read_text
from bsc.cache.tokens import context_batches
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.progress import format_bytes

__all__ = ["Estimate", "estimate"]

PROBE_BATCHES = 3
"""Forward passes that are timed, after one that is not."""


@dataclass(frozen=True)
class Estimate:
    """A plan with what is known of the disk and of the time."""

    plan: CapturePlan
    free: int | None
    """Free bytes where the store is to be; None where no limit can be seen."""
    rate: float | None
    """Tokens per second of one process; None: not measured."""
    fits: bool
    options: tuple[str, ...]
    """Flags each of which would make it fit, where it does not."""

    @property
    def hours(self) -> float | None:
        """Time of the capture with all its processes at once."""
        if not self.rate:
            return None
        rows = sum(grid.rows for grid in self.plan.grids.values())
        return rows / self.rate / self.plan.writers / 3600

    def to_json(self) -> dict[str, Any]:
        """The estimate for machines."""
        return self.plan.to_json() | {
            "free_bytes": self.free, "fits": self.fits, "options": list(self.options),
            "tokens_per_second": self.rate, "hours": self.hours,
        }  # fmt: skip

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
        if self.hours is not None:
            out.append(f"time       {self.hours:.1f} hours at {self.rate:,.0f} tokens/s a process")
        else:
            out.append("time       unknown: --probe measures it, --rate TOKENS_PER_SECOND says it")
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
    free: int | None = None,
) -> Estimate:
    """Plan a capture without writing anything.

    Args:
        config: of the capture.
        rate: tokens per second of one process, where it is known.
        probe: load the model and measure the rate on this machine.
        free: bytes free, instead of asking the disk.

    Raises:
        UserError: the model or its hookpoints are not as they are asked for.
    """
    if probe:
        rate = _measure(config)
    hooks, longest = _shapes(config)
    device = pick_device(config.device)
    context = config.context or min(longest, MAX_DEFAULT_CONTEXT)
    batch = batch_contexts(config, context, device)
    plan = plan_capture(
        hooks, tokens=config.tokens, held_out=config.text.held_out,
        held_out_tokens=config.held_out_tokens, context=context, batch_rows=batch * context,
        codec=config.codec, window=config.window, writers=config.world, ring=config.ring,
    )  # fmt: skip
    available = open_folder(config.store).free_bytes() if free is None else free
    options = () if available is None else tuple(what_fits(plan, available))
    fits = available is None or plan.bytes <= 0.98 * available
    return Estimate(plan, available, rate, fits, () if fits else options)


def _shapes(config: CaptureConfig) -> tuple[tuple[Hookpoint, ...], int]:
    """Hookpoints with their widths, and the longest context, without loading weights."""
    base, longest = load_architecture(config.model, revision=config.revision)
    names = match_hookpoints(base, list(config.hookpoints) or list(default_hookpoints(base)))
    tap = RowTap(base, names)
    ids = torch.zeros((1, 8), dtype=torch.int64, device="meta")
    try:
        # With a mask of its own nothing in the model asks for values, which meta tensors lack.
        given = forward_inputs(ids, ids, packing="masked", separation="mask")
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
        read_text(config.text), source.lm.tokenizer, context=source.context, batch=source.batch,
        wanted={"train": (PROBE_BATCHES + 1) * source.batch * source.context},
        packing=config.packing,
    )  # fmt: skip
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
