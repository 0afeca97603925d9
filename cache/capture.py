"""Stage 1: run a model over text once and write the rows of its hookpoints to a store."""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bsc.cache.hookpoints import RowTap, match_hookpoints
from bsc.cache.layout import (
    FORMAT_VERSION,
    ArraySpec,
    Grid,
    Hookpoint,
    Split,
    array_specs,
    store_attributes,
    store_id_of,
)
from bsc.cache.models import LanguageModel, load_model, resolve_model
from bsc.cache.store import ActivationStore
from bsc.cache.text import TextSource, fingerprint, read_text
from bsc.cache.tokens import ContextBatch, context_batches
from bsc.cache.writer import StoreWriter
from bsc.devices import pick_device
from bsc.errors import StoreError, UserError
from bsc.files import check_new_folder, make_folder
from bsc.progress import console, format_bytes, stage
from bsc.versions import versions

__all__ = ["CaptureConfig", "CaptureResult", "capture", "default_hookpoints"]

WINDOW = 64
"""Shards that the training rows are scattered over at a time."""
MIN_SHARDS = 16
"""Of the training split: a scatter over fewer shuffles little."""
MAX_HELD_OUT_ROWS = 1 << 20
MAX_DEFAULT_CONTEXT = 2048
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
        return sum(g.shards * s.shard_bytes(g) for s, g in specs)

    def open_files(self, window: int) -> int:
        """Files that are written to at a time, at most: one per array and open shard."""
        arrays = len(array_specs(self.hookpoints, "train"))
        return arrays * (min(window, self.grids["train"].shards) + len(self.grids) - 1)


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
        f"{format_bytes(free)} free. What would fit: --tokens {max(1, fitting)}, fewer "
        f"--hookpoints ({len(plan.hookpoints)} now), or a --store on a larger disk."
    )


def _check_open_files(config: CaptureConfig, plan: _Plan) -> None:
    """Allow this process as many open files as the scatter needs.

    Raises:
        UserError: the system does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = plan.open_files(config.window) + 128  # libraries have some open, too
    if needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        window = config.window * max(0, hard - 256) // needed
        raise UserError(
            f"--hookpoints: scattering the rows of {len(plan.hookpoints)} hookpoints over "
            f"{config.window} shards needs {needed:,} open files, and this system allows {hard:,}. "
            f"--window {max(1, window)} would fit; so would fewer hookpoints at a time, or a "
            f"higher limit (ulimit -n)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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


def _check_numbers(config: CaptureConfig) -> None:
    for flag, value in (
        ("tokens", config.tokens),
        ("context", config.context),
        ("batch-tokens", config.batch_tokens),
        ("window", config.window),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: at least 1 is needed.")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: a number from 0 to 2^63 - 1 is needed.")
    if not 0 <= config.text.held_out < 1:
        raise UserError(f"--held-out {config.text.held_out}: a share from 0 to below 1 is needed.")
    if config.held_out_tokens and not config.text.held_out:
        raise UserError("--held-out 0 holds out no document, so --held-out-tokens has none.")


def capture(config: CaptureConfig) -> CaptureResult:
    """Run the model over the text and write the store.

    Shards appear as they are committed; an interrupted capture leaves a store of those that were.

    Raises:
        UserError: the request cannot be carried out, or the text fails on the way. Where nothing
            was committed nothing is left behind; else the store keeps what was.
    """
    _check_numbers(config)
    check_new_folder(config.store, "store")
    resolve_model(config.model)
    device = pick_device(config.device)
    lm = load_model(config.model, revision=config.revision, dtype=config.dtype, device=device)
    patterns = list(config.hookpoints) or list(default_hookpoints(lm.base))
    tap = RowTap(lm.base, match_hookpoints(lm.base, patterns))
    context = config.context or min(lm.context, MAX_DEFAULT_CONTEXT)
    if not 1 < context <= lm.context:
        raise UserError(
            f"--context {context}: the model takes contexts of 2 to {lm.context} tokens."
        )
    plan = _make_plan(config, tap, device)
    _check_disk(config, plan)
    _check_open_files(config, plan)
    console.print(
        f"{config.store}: {plan.grids['train'].rows:,} rows of {len(plan.hookpoints)} hookpoints "
        f"({', '.join(h.name for h in plan.hookpoints)}), {format_bytes(plan.bytes())} in "
        f"{plan.grids['train'].shards} shards"
    )
    batch_tokens = config.batch_tokens or BATCH_TOKENS.get(device.type, 8_192)
    batch = max(1, batch_tokens // context)
    batches = context_batches(
        read_text(config.text),
        lm.tokenizer,
        context=context,
        batch=batch,
        wanted={split: grid.rows for split, grid in plan.grids.items()},
    )
    identity = _identity(config, lm, plan, context, batch, device)
    store_id = store_id_of(identity)
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
            attributes=store_attributes(identity),
            provenance={
                "store_id": store_id,
                "capture": identity,
                "versions": versions(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
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
    except UserError as error:
        kept = _committed(config.store)
        if kept == 0:
            _remove(config.store, existed)
            raise
        raise UserError(
            f"{error} {config.store} keeps the {kept:,} rows that were committed before."
        ) from error
    except OSError as error:
        raise UserError(
            f"{config.store}: writing the store failed ({error.strerror or error}). The "
            f"{_committed(config.store):,} rows that were committed before are whole; `bsc verify` "
            f"checks them."
        ) from error
    return result


def _committed(store: Path) -> int:
    """Committed training rows of a store that is being written."""
    try:
        return ActivationStore(store).train.rows
    except StoreError:
        return 0


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
        try:
            for split, block in blocks:
                target = writer.splits.get(split)
                if target is not None and not target.full:
                    taken = target.append(block)
                    if split == "train":
                        written = sum(s.bytes for s in writer.splits.values())
                        progress.advance(taken, format_bytes(written))
        except UserError:  # the text failed: what it gave until then is good
            for split_writer in writer.splits.values():
                split_writer.finish()
            raise
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
    held_out = writer.splits.get("held_out")
    if held_out is not None and held_out.rows == 0:
        console.print(
            "no held-out rows: too few documents are held out to fill a shard, and `bsc eval` "
            "needs some. More text or a larger --held-out gives them."
        )
    if seen < wanted:
        console.print(
            f"the text ended after {seen:,} training tokens of {wanted:,} that were asked for"
        )
    return dropped


def _identity(
    config: CaptureConfig,
    lm: LanguageModel,
    plan: _Plan,
    context: int,
    batch: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the store, but for library versions."""
    return {
        "format_version": FORMAT_VERSION,
        "model": lm.identity(),
        "text": config.text.to_json() | {"fingerprint": fingerprint(config.text)},
        "hookpoints": [asdict(h) for h in plan.hookpoints],
        "grids": {split: asdict(grid) for split, grid in plan.grids.items()},
        "context": context,
        "tokens": config.tokens,
        "held_out_tokens": config.held_out_tokens,
        "seed": config.seed,
        "window": config.window,
        "batch_contexts": batch,
        "device": device.type,
    }
