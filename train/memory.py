"""What a sweep needs of a machine: banks, memory, arithmetic. Known before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

from bsc.devices import product_dtype
from bsc.errors import ConfigError
from bsc.progress import format_bytes
from bsc.train.coders import kernels, topk
from bsc.train.coders.bank import EXTRA_COLUMNS
from bsc.train.coders.coder import parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.config import TrainConfig
from bsc.train.optim import state_bytes
from bsc.train.run_config import PlannedCoder

__all__ = [
    "EVALUATION_ROWS",
    "MemoryPlan",
    "flops_per_row",
    "group_banks",
    "plan_memory",
]

_MICRO_ROWS = {"cpu": 8192, "cuda": 65536}
"""Rows that are worked on at a time where memory allows: more gain nothing."""
_LEAST_ROWS = 256
_COUNTED = 2**31
"""Pre-activations of a pass on CUDA are fewer: its kernels count them in 32 bits."""
_LIBRARIES = 64 << 20
"""What torch and its libraries take for themselves at their first products; measured."""
EVALUATION_ROWS = 256
"""Rows of an evaluation that are worked on at a time, in float32."""


def group_banks(planned: Sequence[PlannedCoder]) -> list[list[PlannedCoder]]:
    """Coders that share hookpoint, site and number of latents, together."""
    groups: dict[tuple[Any, ...], list[PlannedCoder]] = {}
    for coder in planned:
        key = (coder.hookpoint, coder.coder.site, coder.coder.n_latents)
        groups.setdefault(key, []).append(coder)
    return list(groups.values())


def flops_per_row(config: CoderConfig) -> float:
    """Multiplications and additions of a training step per row, the optimiser left out.

    2 F d_in for the encoder; 2 k d each for the decoder, its gradients and that of the encoder;
    6 d_in d_out for a skip path.
    """
    sparse = 2 * config.k * (3 * config.d_out + config.d_in)
    skip = 6 * config.d_in * config.d_out if config.site == "skip_transcoder" else 0
    return float(2 * config.n_latents * config.d_in + sparse + skip)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by what they are for."""

    weights: int
    """Parameters and gradients, float32."""
    optimisers: int
    products: int
    """The rounded copies of encoder and decoder that products are taken with."""
    workspace: int
    """Pre-activations, selections and sums of the rows that are worked on at a time."""
    batches: int
    """Rows of a batch, as read, and those for held-out evaluation."""
    micro_rows: int
    """Rows that are worked on at a time."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimisers + self.products + self.workspace + self.batches


class _Fixed(NamedTuple):
    """Bytes of a bank that do not depend on the rows that are worked on at a time."""

    weights: int
    optimisers: int
    products: int
    step: int
    """Workspace of a step."""
    between: int
    """Workspace between steps: of an evaluation, or of saving a coder."""


def _fixed(bank: Sequence[PlannedCoder], bytes_each: int, device: torch.device) -> _Fixed:
    first = bank[0].coder
    shapes = parameter_shapes(first.model_copy(update={"code": "continuous", "select": "topk"}))
    if any(c.coder.has_threshold for c in bank):
        shapes["log_threshold"] = (first.n_latents,)
    if any(c.coder.amplitude == "learned" for c in bank):
        shapes["amplitude"] = (first.n_latents,)
    parameters = sum(4 * prod(s) for s in shapes.values())
    n, latents = len(bank), first.n_latents
    weights = 2 * n * parameters + 8 * n * latents
    optimisers = sum(state_bytes(c.optimiser, shapes) for c in bank)
    columns = first.d_in + EXTRA_COLUMNS
    products = n * latents * (columns + first.d_out) * bytes_each
    sums = latents * (columns + first.d_out) * bytes_each
    if any(c.coder.decoder_norm == "unit" for c in bank):
        products += latents * 4 * n
    # Signs or steps of one coder's gradients; when coders are evaluated, a copy of one, and for
    # signum one of its weights; unit rows are copied twice on the way. When they are saved, on the
    # host, a copy and (safetensors before 0.8) the bytes of its file.
    step = max((parameters for c in bank if c.optimiser in ("signum_classic", "muon")), default=0)
    copies = 2 if any(c.optimiser == "signum" for c in bank) else 1
    wide = 4 if any(c.coder.select == "batch_topk" for c in bank) else 1
    evaluation = copies * parameters + EVALUATION_ROWS * latents * 4 * wide
    unit = any(c.coder.decoder_norm == "unit" for c in bank)
    copied = max(copies + unit, 2 if device.type == "cpu" else 0) * parameters
    between = max(evaluation, copied)
    return _Fixed(weights, optimisers, products, max(sums, step), between)


def _most_selected(coder: PlannedCoder) -> int:
    """Latents that are selected for a row, at most, AuxK's left out."""
    wide = coder.coder.multi_topk or coder.coder.surrogate == "gumbel"
    return max(coder.coder.k, coder.k_init) * (4 if wide else 1)


def _dead_selected(coder: PlannedCoder) -> int:
    """Dead latents that AuxK selects for a row, at most."""
    config = coder.coder
    wanted = config.auxk_k or max(1, config.d_out // 2)
    return min(wanted, config.n_latents) if config.auxk_alpha > 0 else 0


def _entries_of_row(coder: PlannedCoder) -> int:
    """Entries that a row has in a pass, at most."""
    return max(_most_selected(coder), _dead_selected(coder))


def _folded(coder: PlannedCoder) -> int:
    """Maxima that selection makes of a row, at most: with k, and with the most it selects."""
    config, most = coder.coder, _most_selected(coder)
    if config.select == "groupmax":
        return 0
    most *= 4 if config.select == "batch_topk" else 1
    return max(
        topk.folded_values(p.stop - p.start, max(1, round(p.k * k / config.k)))
        for p in config.parts
        for k in (config.k, most)
    )


def _row_bytes(coder: PlannedCoder, bytes_each: int, device: torch.device) -> int:
    """Workspace of one row beside its pre-activations, at the widest point of a pass."""
    config, most, dead = coder.coder, _most_selected(coder), _dead_selected(coder)
    pre = _folded(coder) * bytes_each
    if config.surrogate == "gumbel":
        pre += config.n_latents * (4 + 4 + bytes_each)
    if config.gumbel_support == "full":  # products and softmax of all latents, in float32
        pre += config.n_latents * (bytes_each + 4 * 4)
    if config.threshold == "newton":
        pre += config.n_latents * 4 * 4
    if config.auxk_alpha:
        pre += config.n_latents * bytes_each
    # Columns and values; of bfloat16 keys and their parts too, and what a GPU sorts with.
    each = 8 * (16 if bytes_each == 4 and device.type == "cpu" else 28)
    # Of batch top-k four times as many, which are sorted together over the rows.
    first = 4 * most * (each + 48) if config.select == "batch_topk" else most * each
    candidates = max(first, dead * each)
    entries = max(most, dead) * 64
    rows = (config.d_in + EXTRA_COLUMNS) * bytes_each + config.d_out * 4 * 4
    return pre + max(candidates, entries) + rows


def plan_memory(
    planned: Sequence[PlannedCoder], config: TrainConfig, device: torch.device, free: int
) -> MemoryPlan:
    """Memory of a sweep, with as many rows at a time as fit.

    Args:
        planned: the coders of this process.
        config: of the run.
        device: that they are trained on.
        free: bytes that may be used.

    Raises:
        ConfigError: it does not fit, however few rows are worked on at a time.
    """
    dtype = product_dtype(config.precision, device)
    bytes_each = dtype.itemsize
    banks = group_banks(planned)
    parts = [_fixed(bank, bytes_each, device) for bank in banks]
    weights, optimisers, products = (sum(p[i] for p in parts) for i in range(3))
    # Every bank keeps its buffers; what a pass makes on its way is freed before the next one.
    kept = sum(bank[0].coder.n_latents * bytes_each for bank in banks)
    passing = max(_row_bytes(c, bytes_each, device) for c in planned)
    step, between = max(p.step for p in parts), max(p.between for p in parts)
    widths = {
        (c.hookpoint, side): width
        for c in planned
        for side, width in ((c.coder.side, c.coder.d_in), ("output", c.coder.d_out))
    }
    copies = 1 if device.type == "cpu" else 2
    batches = copies * 2 * config.batch_rows * sum(widths.values())
    batches += 2 * config.eval_rows * sum(widths.values())

    def pieces(coder: PlannedCoder, rows: int) -> int:
        if device.type != "cuda":
            return 0
        width = max(coder.coder.d_in + EXTRA_COLUMNS, coder.coder.d_out)
        entries = rows * _entries_of_row(coder)
        return kernels.bytes_by_pieces(coder.coder.n_latents, width, entries, dtype)

    def countable(rows: int) -> bool:
        """Whether kernels of CUDA, which count in 32 bits, can take so many rows at a time."""
        entries = rows * max(map(_entries_of_row, planned))
        fits = rows * widest < _COUNTED and entries < kernels.MOST_ENTRIES
        return device.type != "cuda" or fits

    def plan(rows: int) -> MemoryPlan:
        a_pass = step + rows * passing + max(pieces(c, rows) for c in planned)
        work = _LIBRARIES + rows * kept + max(a_pass, between)
        return MemoryPlan(weights, optimisers, products, work, batches, rows)

    widest = max(c.coder.n_latents for c in planned)
    if config.micro_rows is not None:
        rows = min(config.micro_rows, config.batch_rows)
        if not countable(rows):
            most = max(map(_entries_of_row, planned))
            fewer = min((_COUNTED - 1) // widest, (kernels.MOST_ENTRIES - 1) // most)
            raise ConfigError(
                f"micro_rows: {rows:,} rows at a time have {rows * widest:,} pre-activations, of "
                f"which {rows * most:,} are selected; kernels of CUDA, which count in 32 bits, "
                f"take fewer than {_COUNTED:,} and {kernels.MOST_ENTRIES:,}. Give {fewer:,} or "
                f"fewer, or leave it out."
            )
        made = plan(rows)
    else:
        rows = min(_MICRO_ROWS.get(device.type, 8192), config.batch_rows)
        while not countable(rows) and rows > _LEAST_ROWS:
            rows //= 2
        while plan(rows).total > free and rows > _LEAST_ROWS:
            rows //= 2
        made = plan(rows)
    if made.total > free:
        raise ConfigError(
            f"{len(planned)} coders need {format_bytes(made.total)} of memory "
            f"({format_bytes(weights)} weights and gradients, {format_bytes(optimisers)} "
            f"optimisers, {format_bytes(products)} rounded copies, "
            f"{format_bytes(made.workspace + batches)} for rows), but {format_bytes(free)} may be "
            f"used on {device}. Train fewer coders or latents, give a smaller batch_rows or "
            f"micro_rows, or divide the sweep over processes (torchrun, or --rank and --world)."
        )
    return made
