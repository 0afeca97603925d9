"""Stage 1: run a model over text once and write the rows of its hookpoints to a store."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.cache.capture.commit import advance, check_same, complete, create, split_start
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.plan import CapturePlan, check_disk, check_open_files
from bsc.cache.capture.source import NO_TEXT, Source, channel_scales, open_source, plan_of
from bsc.cache.capture.staging import Staging
from bsc.cache.capture.writer import SplitPart, SplitStart, SplitWriter
from bsc.cache.model.text import fingerprint, read_text
from bsc.cache.model.tokens import ContextBatch, context_batches
from bsc.cache.store.folder import StoreFolder, open_folder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import (
    DATA,
    FORMAT_VERSION,
    PROVENANCE,
    README,
    array_key,
    group_keys,
    store_attributes,
    store_id_of,
)
from bsc.cache.store.manifest import PartEnd, read_array_json, read_end, read_provenance, write_end
from bsc.cache.store.ring_writer import RingWriter
from bsc.errors import UserError
from bsc.prefetch import prefetched
from bsc.progress import console, format_bytes, stage
from bsc.versions import versions

__all__ = ["CaptureResult", "capture"]

_READ_AHEAD = 4
"""Batches that are tokenised before the model asks for them."""


class CaptureResult(NamedTuple):
    """What a store holds after a capture, over all its writers so far."""

    store: str
    store_id: str
    rows: int
    held_out_rows: int
    bytes: int
    """Written by this process."""
    seconds: float
    dropped: int
    """Rows of this process at the end of the text that filled no shard."""
    complete: bool
    """Whether every writer's part is finished."""


def capture(config: CaptureConfig) -> CaptureResult:
    """Run the model over the text and write the store, or go on with one that is there.

    Rows appear window by window. A capture that was killed goes on with the same config and gives
    the store that it would have given, file for file but for times in provenance.json.

    Raises:
        UserError: the request cannot be carried out, or the text fails on the way. Where nothing
            was committed nothing is left behind; else the store keeps what was.
    """
    folder = open_folder(config.store)
    if not folder.exists(PROVENANCE):
        folder.check_new()
    source = open_source(config)
    plan = plan_of(config, source.hookpoints, source.context, source.batch)
    identity = _identity(config, source, plan)
    check_open_files(plan)
    if folder.exists(PROVENANCE):
        check_same(folder, identity)
    else:
        check_disk(str(folder), plan, folder.free_bytes())
        scales = channel_scales(config, source) if config.codec == "int8" else {}
        create(
            folder,
            plan.arrays,
            store_attributes(identity),
            {
                "store_id": store_id_of(identity),
                "capture": identity,
                "versions": versions(),
                "device": _device_name(source.lm.model.device),
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            {name: {"channel_scale": scale.tolist()} for name, scale in scales.items()},
        )
    if read_end(folder, config.rank) is None:
        claim = folder.claim(config.rank)
        try:
            if read_end(folder, config.rank) is not None:  # by another process, meanwhile
                claim.release(remove=True)
                return _already(config, folder, plan, store_id_of(identity))
            # Another process may have made the store meanwhile; what it says is what holds.
            made = check_same(folder, identity)
            if made["versions"] != versions():
                console.print(
                    f"{folder}: begun with {made['versions']}, going on with {versions()}; rows "
                    f"may differ in their last bits from those of one version"
                )
            scales = {
                name: np.array(own["channel_scale"], np.float32)
                for name, own in made["array_attributes"].items()
            }
            result = _write(config, folder, source, plan, scales, store_id_of(identity))
        except KeyboardInterrupt:
            claim.release(remove=False)
            console.print(f"{folder}: interrupted; the same command goes on with what is committed")
            raise
        except BaseException:
            claim.release(remove=False)
            raise
        claim.release(remove=True)
        return result
    return _already(config, folder, plan, store_id_of(identity))


def _already(
    config: CaptureConfig, folder: StoreFolder, plan: CapturePlan, store_id: str
) -> CaptureResult:
    """What there is to say of a part that is finished; finishes the store where that is left."""
    started = time.perf_counter()
    completed = read_provenance(folder).get("completed")
    if completed is None:
        console.print(f"{folder}: part {config.rank} is finished already")
    else:
        console.print(f"{folder}: complete, finished already")
    try:
        folder.drop_leftovers(config.rank, _metadata(plan))
        return _result(config, folder, plan, store_id, started)
    except OSError as error:
        if completed is None or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    # A finished store on a disk that cannot be written: there is nothing left to write.
    rows = completed["rows"]
    return CaptureResult(
        store=str(folder),
        store_id=store_id,
        rows=rows["train"],
        held_out_rows=rows.get("held_out", 0),
        bytes=0,
        seconds=time.perf_counter() - started,
        dropped=0,
        complete=True,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _write(
    config: CaptureConfig,
    folder: StoreFolder,
    source: Source,
    plan: CapturePlan,
    scales: Mapping[str, NDArray[np.float32]],
    store_id: str,
) -> CaptureResult:
    """Write this process's part of the store."""
    started = time.perf_counter()
    folder.drop_leftovers(config.rank, _metadata(plan))
    starts = {
        split: split_start(folder, split, grid, config.rank, config.world, plan.windows[split])
        for split, grid in plan.grids.items()
    }
    done = {split: start.shards * plan.grids[split].shard_rows for split, start in starts.items()}
    first = config.world == 1
    console.print(
        f"{folder}: to hold {plan.grids['train'].rows:,} rows of {len(plan.hookpoints)} hookpoints "
        f"({', '.join(h.name for h in plan.hookpoints)}), {format_bytes(plan.bytes)} in "
        f"{plan.grids['train'].shards} shards"
        + ("" if first else f"; part {config.rank} of {config.world}")
        + (f"; going on after {done['train']:,} rows" if done["train"] else "")
    )
    with ExitStack() as stack:
        staging = Staging(len(plan.specs("train")), source.lm.model.device)
        writers = _writers(config, folder, plan, staging, scales, starts)
        for writer in writers.values():
            stack.callback(writer.abort)
        stack.callback(staging.close)  # first: nothing may write while shards are dropped
        batches = prefetched(
            context_batches(
                read_text(config.text, config.rank, config.world),
                source.lm.tokenizer,
                context=source.context,
                batch=source.batch,
                packing=config.packing,
                wanted={split: writer.owned_rows for split, writer in writers.items()},
                starts={split: start.point for split, start in starts.items()},
            ),
            _READ_AHEAD,
        )
        stack.callback(batches.close)
        try:
            dropped = _pump(config, batches, source, writers, _committed_bad(folder, plan))
        except UserError as error:
            kept = writers["train"].committed_rows
            if kept == 0 and config.world == 1:
                stack.close()
                folder.remove()
                raise
            raise UserError(
                f"{error} {folder} keeps the {kept:,} rows that were committed before; the same "
                f"command goes on from there."
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder}: writing the store failed ({error.strerror or error}). The "
                f"{writers['train'].committed_rows:,} rows that were committed before are whole; "
                f"the same command goes on from there once the cause is gone."
            ) from error
    train = writers["train"]
    write_end(
        folder,
        PartEnd(
            rank=config.rank,
            rows={split: writer.committed_rows for split, writer in writers.items()},
            dropped=dropped,
            text_ended=train.committed_rows < train.owned_rows,
        ),
    )
    written = sum(writer.bytes for writer in writers.values())
    return _result(config, folder, plan, store_id, started, written, sum(dropped.values()))


def _writers(
    config: CaptureConfig,
    folder: StoreFolder,
    plan: CapturePlan,
    staging: Staging,
    scales: Mapping[str, NDArray[np.float32]],
    starts: Mapping[Split, SplitStart],
) -> dict[Split, SplitWriter]:
    """The writers of this process, one for each split."""
    ring = None
    if plan.ring is not None:
        (specs, grid), part = plan.arrays["train"], (config.rank, config.world)
        ring = RingWriter(folder, specs, grid, plan.ring, *part)
    writers: dict[Split, SplitWriter] = {}
    for split, (specs, grid) in plan.arrays.items():
        window, world = plan.windows[split], config.world
        writers[split] = SplitWriter(
            folder,
            SplitPart(split, specs, grid, config.rank, world, window, config.seed),
            staging,
            channel_scales=scales,
            start=starts[split],
            on_commit=partial(advance, folder, split, specs, grid, writers=world, window=window),
            before_window=ring.wait_for_room if ring and split == "train" else None,
        )
    return writers


def _metadata(plan: CapturePlan) -> list[str]:
    """Keys of the files that are replaced while a store grows."""
    specs = [spec for specs, _ in plan.arrays.values() for spec in specs.values()]
    words = [PROVENANCE, README, f"{DATA}/zarr.json", *group_keys(specs)]
    return [*words, *(array_key(spec) for spec in specs)]


def _result(
    config: CaptureConfig,
    folder: StoreFolder,
    plan: CapturePlan,
    store_id: str,
    started: float,
    written: int = 0,
    dropped: int = 0,
) -> CaptureResult:
    """Finish the store if this was the last part, and say what it holds."""
    finished, committed = complete(folder, plan.arrays, plan.windows, writers=config.world)
    rows = {split: n * plan.grids[split].shard_rows for split, n in committed.items()}
    if finished and rows.get("held_out") == 0:
        console.print(
            "no held-out rows: too few documents are held out to fill a shard, and `bsc eval` "
            "needs some. More text or a larger --held-out gives them."
        )
    if not finished:
        console.print(f"{folder}: other parts are still to be written")
    return CaptureResult(
        store=str(folder),
        store_id=store_id,
        rows=rows["train"],
        held_out_rows=rows.get("held_out", 0),
        bytes=written,
        seconds=time.perf_counter() - started,
        dropped=dropped,
        complete=finished,
    )


def _pump(
    config: CaptureConfig,
    batches: Iterator[ContextBatch],
    source: Source,
    writers: dict[Split, SplitWriter],
    before: Mapping[tuple[Split, str], int],
) -> dict[str, int]:
    """Take every batch through the model to its writer; rows dropped at the end, by split."""
    train = writers["train"]
    with stage("capture", train.owned_rows, "tokens", done=train.rows) as progress:
        last = -1
        for batch in batches:
            writer = writers[batch.split]
            last = max(last, int(batch.doc_id.max()))
            if train.cut_short:
                break
            if writer.full:
                continue
            taken = writer.append(source.block(batch), batch.point)
            _check_finite(config, writers, before)
            if batch.split == "train":
                progress.advance(taken, format_bytes(sum(w.bytes for w in writers.values())))
        seen = train.rows
        if seen == 0 and config.world == 1:
            raise UserError(NO_TEXT)
        dropped: dict[str, int] = {s: writer.finish(last + 1) for s, writer in writers.items()}
        _check_finite(config, writers, before)
    if train.committed_rows == 0 and config.world == 1:
        raise UserError(
            f"the text ended after {seen:,} training tokens of {train.owned_rows:,} that were "
            f"asked for, and they fill no shard of {train.grid.shard_rows:,} rows. Ask for what "
            f"there is: --tokens {seen}"
        )
    if seen < train.owned_rows:
        console.print(
            f"the text ended after {seen:,} training tokens of {train.owned_rows:,} that were "
            f"asked for"
        )
    return dropped


def _committed_bad(folder: StoreFolder, plan: CapturePlan) -> dict[tuple[Split, str], int]:
    """By split and array: committed rows with values that are not finite, of all writers."""
    return {
        (split, name): int(read_array_json(folder, spec)[1]["non_finite_rows"])
        for split, (specs, _) in plan.arrays.items()
        for name, spec in specs.items()
        if spec.width is not None
    }


def _check_finite(
    config: CaptureConfig,
    writers: Mapping[Split, SplitWriter],
    before: Mapping[tuple[Split, str], int],
) -> None:
    """Stop a capture whose model overflows.

    Raises:
        UserError: more rows than are tolerated hold values that are not finite.
    """
    for writer in writers.values():
        tolerated = config.max_non_finite * writer.owned_rows
        for name, new in writer.bad_rows.items():
            bad = new + before.get((writer.split, name), 0)
            if bad > tolerated:
                raise UserError(
                    f"{name}: {bad:,} of {writer.rows:,} rows hold values that are not finite "
                    f"(NaN or inf); at most {config.max_non_finite:g} of the rows are tolerated. "
                    f"A model that overflows needs --dtype float32; --max-non-finite 1 keeps such "
                    f"rows, marked in the store, and training passes over them."
                )


def _identity(config: CaptureConfig, source: Source, plan: CapturePlan) -> dict[str, Any]:
    """Everything that decides the bytes of the store, but for library versions."""
    return source.separation.said() | {
        "format_version": FORMAT_VERSION,
        "model": source.lm.identity(),
        "text": config.text.to_json() | {"fingerprint": fingerprint(config.text)},
        "hookpoints": [asdict(h) for h in plan.hookpoints],
        "grids": {split: asdict(grid) for split, grid in plan.grids.items()},
        "codec": config.codec,
        "packing": config.packing,
        "context": source.context,
        "tokens": config.tokens,
        "held_out_tokens": config.held_out_tokens,
        "seed": config.seed,
        "window": plan.window,
        "writers": config.world,
        "ring": config.ring,
        "batch_contexts": source.batch,
        "device": source.lm.model.device.type,
    }
