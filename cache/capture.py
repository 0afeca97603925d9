"""Stage 1: run a model over text once and write the rows of its hookpoints to a store."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bsc.cache.hookpoints import RowTap, match_hookpoints
from bsc.cache.layout import FORMAT_VERSION, ArraySpec, Grid, Hookpoint, Split, array_specs
from bsc.cache.models import LanguageModel, load_model, resolve_model
from bsc.cache.text import TextSource, read_text
from bsc.cache.tokens import ContextBatch, context_batches
from bsc.cache.writer import StoreWriter
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.files import canonical_json, check_new_folder, make_folder
from bsc.progress import console, format_bytes, stage
from bsc.versions import versions

__all__ = ["CaptureConfig", "CaptureResult", "capture", "default_hookpoints"]

WINDOW = 64
"""Shards that the training rows are scattered over at a time."""
MIN_SHARDS = 16
"""Of the training split: a scatter over fewer shuffles little."""
MAX_HELD_OUT_ROWS = 1 << 20
HELD_OUT_SHARDS = 64
BATCH_TOKENS = {"cpu": 8_192, "cuda": 65_536}
PAPER_LAYERS = (0.0, 0.3, 0.6, 0.9)
"""Depths of the MLPs that the paper takes: layers 0, 9, 18 and 27 of 30, or 0, 7, 14, 21 of 24."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What to capture and where to put it."""

    model: str
    """``"demo"``, a short name, a folder, or a hub id."""
    store: Path
    """Folder of the new store."""
    text: TextSource
    """Where the text comes from."""
    hookpoints: tuple[str, ...] = ()
    """Patterns of module names; empty: the MLPs at the paper's depths."""
    tokens: int = 10_000_000
    """Training rows to capture; at most 1 % fewer are."""
    held_out_tokens: int | None = None
    """Rows of held-out documents to capture; None: the held-out share of `tokens`, at most 2^20."""
    context: int | None = None
    """Tokens in a context; None: the model's longest, at most 2,048."""
    batch_tokens: int | None = None
    """Tokens in a forward pass; None: 8,192 on a CPU, 65,536 on a GPU."""
    revision: str | None = None
    """Of the model on the hub."""
    dtype: str = "auto"
    """Of the model's arithmetic; rows are stored as bfloat16 whatever it is."""
    device: str | None = None
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: a GPU where there is one."""
    seed: int = 0
    """Of the order of documents and of the scatter."""
    window: int = WINDOW
    """Shards that the rows are scattered over at a time."""


class CaptureResult(NamedTuple):
    """What a capture wrote."""

    store: Path
    store_id: str
    rows: int
    held_out_rows: int
    bytes: int
    seconds: float
    dropped: int
    """Rows at the end of the text that filled no shard."""


def default_hookpoints(base: torch.nn.Module) -> tuple[str, ...]:
    """The MLPs at the paper's depths: layers 0, 9, 18 and 27 of a model with 30.

    Raises:
        UserError: the model has no modules called ``layers.*.mlp``.
    """
    names = match_hookpoints(base, ["layers.*.mlp"])
    return tuple(dict.fromkeys(names[int(len(names) * depth)] for depth in PAPER_LAYERS))


@dataclass
class _Plan:
    """What a capture comes to, known before anything is written."""

    hookpoints: tuple[Hookpoint, ...]
    grids: dict[Split, Grid] = field(default_factory=dict)

    def bytes(self) -> int:
        specs: list[tuple[ArraySpec, Grid]] = [
            (spec, grid)
            for split, grid in self.grids.items()
            for spec in array_specs(self.hookpoints, split).values()
        ]
        return sum(g.shards * (g.shard_rows * s.row_bytes + 16 * g.chunks + 4) for s, g in specs)


def _make_plan(config: CaptureConfig, tap: RowTap, device: torch.device) -> _Plan:
    """Widths from a forward pass of a few tokens, and the grids."""
    rows = tap.rows(torch.zeros((1, 8), dtype=torch.int64, device=device))
    hooks = tuple(
        Hookpoint(n, rows[f"{n}/input"].shape[1], rows[f"{n}/output"].shape[1]) for n in tap.names
    )
    plan = _Plan(hooks, {"train": Grid.for_rows(config.tokens, min_shards=MIN_SHARDS)})
    held_out = config.held_out_tokens
    if held_out is None:
        held_out = min(math.ceil(config.tokens * config.text.held_out), MAX_HELD_OUT_ROWS)
    if held_out and config.text.held_out:
        plan.grids["held_out"] = Grid.for_rows(held_out, min_shards=HELD_OUT_SHARDS)
    return plan


def _check_disk(config: CaptureConfig, plan: _Plan) -> None:
    parent = config.store.absolute()
    while not parent.exists():
        parent = parent.parent
    free, needed = shutil.disk_usage(parent).free, plan.bytes()
    if needed < 0.98 * free:
        return
    fitting = int(config.tokens * 0.95 * free / needed)
    raise UserError(
        f"--store {config.store}: the store needs {format_bytes(needed)}, and the disk has "
        f"{format_bytes(free)} free. --tokens {fitting} would fit; so would fewer --hookpoints "
        f"({len(plan.hookpoints)} now), or a --store on a larger disk."
    )


def _blocks(
    batches: Iterator[ContextBatch], tap: RowTap, device: torch.device
) -> Iterator[tuple[Split, dict[str, torch.Tensor]]]:
    """Rows of each batch with their token arrays, on the device of the model."""
    for batch in batches:
        block = tap.rows(torch.from_numpy(batch.token_id).to(device))
        for name in ("token_id", "doc_id", "position"):
            values = torch.from_numpy(getattr(batch, name).reshape(-1).copy())
            block[f"tokens/{name}"] = values
        yield batch.split, block


def capture(config: CaptureConfig) -> CaptureResult:
    """Run the model over the text and write the store.

    Shards appear as they are committed; an interrupted capture leaves a store of those that were.

    Raises:
        UserError: the request cannot be carried out. Nothing is left behind.
    """
    if config.tokens < 1:
        raise UserError(f"--tokens {config.tokens}: at least 1 token is needed.")
    if not 0 <= config.text.held_out < 1:
        raise UserError(f"--held-out {config.text.held_out}: a share from 0 to below 1 is needed.")
    check_new_folder(config.store, "store")
    resolve_model(config.model)
    device = pick_device(config.device)
    lm = load_model(config.model, revision=config.revision, dtype=config.dtype, device=device)
    patterns = list(config.hookpoints) or list(default_hookpoints(lm.base))
    tap = RowTap(lm.base, match_hookpoints(lm.base, patterns))
    context = config.context or min(lm.context, 2048)
    if not 1 < context <= lm.context:
        raise UserError(
            f"--context {context}: the model takes contexts of 2 to {lm.context} tokens."
        )
    plan = _make_plan(config, tap, device)
    _check_disk(config, plan)
    console.print(
        f"{config.store}: {plan.grids['train'].rows:,} rows of {len(plan.hookpoints)} hookpoints "
        f"({', '.join(h.name for h in plan.hookpoints)}), {format_bytes(plan.bytes())} in "
        f"{plan.grids['train'].shards} shards"
    )
    batch_tokens = config.batch_tokens or BATCH_TOKENS.get(device.type, 8_192)
    batches = context_batches(
        read_text(config.text),
        lm.tokenizer,
        context=context,
        batch=max(1, batch_tokens // context),
        wanted={split: grid.rows for split, grid in plan.grids.items()},
    )
    identity = _identity(config, lm, plan, context)
    store_id = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    started = time.perf_counter()
    existed = config.store.exists()
    make_folder(config.store, "store")
    try:
        with StoreWriter(
            config.store,
            plan.hookpoints,
            plan.grids,
            window=config.window,
            seed=config.seed,
            attributes=_attributes(store_id, identity, plan),
            provenance={
                "store_id": store_id,
                "capture": identity,
                "versions": versions(),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        ) as writer:
            dropped = _write(writer, _blocks(batches, tap, device), plan)
            train, held_out = writer.splits["train"], writer.splits.get("held_out")
            result = CaptureResult(
                store=config.store,
                store_id=store_id,
                rows=train.rows,
                held_out_rows=held_out.rows if held_out else 0,
                bytes=sum(s.bytes for s in writer.splits.values()),
                seconds=time.perf_counter() - started,
                dropped=dropped,
            )
            writer.complete(
                {
                    "rows": result.rows,
                    "held_out_rows": result.held_out_rows,
                    "dropped_rows": dropped,
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "seconds": round(result.seconds, 1),
                }
            )
    except UserError:
        _remove(config.store, existed)
        raise
    except OSError as error:
        raise UserError(
            f"{config.store}: writing the store failed ({error.strerror or error}). What was "
            f"committed before is whole; `bsc verify` checks it."
        ) from error
    return result


def _remove(store: Path, existed: bool) -> None:
    """Take back a store that came to nothing."""
    shutil.rmtree(store)
    if existed:
        store.mkdir()


def _write(
    writer: StoreWriter, blocks: Iterator[tuple[Split, dict[str, torch.Tensor]]], plan: _Plan
) -> int:
    train = writer.splits["train"]
    wanted = plan.grids["train"].rows
    with stage("capture", wanted, "tokens") as progress:
        for split, block in blocks:
            target = writer.splits.get(split)
            if target is not None and not target.full:
                taken = target.append(block)
                if split == "train":
                    written = sum(s.bytes for s in writer.splits.values())
                    progress.advance(taken, format_bytes(written))
        seen = train.rows
        if seen == 0:
            raise UserError(
                "the text gives not one whole context of training tokens. Give more text, or a "
                "shorter --context."
            )
        dropped = sum(s.finish() for s in writer.splits.values())
    if train.committed == 0:
        raise UserError(
            f"the text ended after {seen:,} training tokens of {wanted:,} that were asked for, and "
            f"they fill no shard of {train.grid.shard_rows:,} rows. Ask for what there is: "
            f"--tokens {seen}"
        )
    if seen < wanted:
        console.print(
            f"the text ended after {seen:,} training tokens of {wanted:,} that were asked for"
        )
    return dropped


def _identity(
    config: CaptureConfig, lm: LanguageModel, plan: _Plan, context: int
) -> dict[str, Any]:
    """Everything that decides the bytes of the store."""
    return {
        "format_version": FORMAT_VERSION,
        "model": lm.identity(),
        "text": config.text.to_json(),
        "hookpoints": [asdict(h) for h in plan.hookpoints],
        "grids": {split: asdict(grid) for split, grid in plan.grids.items()},
        "context": context,
        "tokens": config.tokens,
        "held_out_tokens": config.held_out_tokens,
        "seed": config.seed,
        "window": config.window,
        "batch_tokens": config.batch_tokens,
    }


def _attributes(store_id: str, identity: dict[str, Any], plan: _Plan) -> dict[str, Any]:
    """What a reader needs, for the root group of data.zarr."""
    return {
        "version": FORMAT_VERSION,
        "store_id": store_id,
        "model": identity["model"],
        "hookpoints": identity["hookpoints"],
        "splits": list(plan.grids),
        "context": identity["context"],
        "scatter": {"seed": identity["seed"], "window": identity["window"]},
    }
