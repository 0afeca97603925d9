"""Ten billion tokens of four hookpoints, played through the writer, ring, loader and manifest.

The numbers of shards, windows, manifest lines, sums and checkpoints are those of the real thing;
rows are not computed, and a shard has 16 of them instead of 262,144. What is measured is what could
grow with the number of shards: opening a store, committing a window, going on with a capture or a
training run, listing, and the memory of the process.

* ring: one writer, one reader with checkpoints, on a file system. A folder in memory (/dev/shm)
  leaves out the disk's own time, which does not grow.
* object: a store in object storage (a server on this machine), without a ring.

The last line is JSON.

    python -m benchmarks.bench_scale ring --folder /dev/shm/scale
    python -m benchmarks.bench_scale object --shards 2384 --hookpoints 1
    python -m benchmarks.bench_scale table          # what a real run comes to, from stated rates
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import machine
from bsc.cache.capture.commit import advance, complete, create, split_start
from bsc.cache.capture.staging import Staging
from bsc.cache.capture.writer import SplitPart, SplitWriter
from bsc.cache.store.folder import StoreFolder, open_folder
from bsc.cache.store.layout import Grid, Hookpoint, array_specs, store_attributes, store_id_of
from bsc.cache.store.loader import Cursor, Loader
from bsc.cache.store.manifest import PartEnd, TextPoint, committed_windows, write_end
from bsc.cache.store.ring import readers
from bsc.cache.store.ring_reader import RingReader
from bsc.cache.store.ring_status import ring_status
from bsc.cache.store.ring_writer import RingWriter
from bsc.cache.store.scatter import window_sizes
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.train.checkpoint import load_checkpoint, save_checkpoint
from bsc.versions import versions

WIDTH, ROWS, WINDOW, SLOTS = 576, 16, 64, 256
TOKENS = 10_000_000_000
POINTS = (1 / 16, 1 / 4, 1.0)
BUCKET = "scale"


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


class Played:
    """A store of many small shards, and what its parts take while it grows."""

    def __init__(
        self, where: str, shards: int, hookpoints: int, ring: int | None, rows: int = ROWS
    ) -> None:
        self.where = where
        self.folder: StoreFolder = open_folder(where)
        self.hooks = tuple(Hookpoint(f"layers.{i}.mlp", WIDTH, WIDTH) for i in range(hookpoints))
        self.specs = array_specs(self.hooks, "train")
        self.grid, self.ring, self.rows = Grid(rows, rows, shards), ring, rows
        identity = {
            "model": {"special_token_ids": [], "name": "none"}, "context": 1024,
            "packing": "joined", "codec": "raw", "grids": {"train": asdict(self.grid)},
            "hookpoints": [asdict(h) for h in self.hooks], "window": WINDOW, "writers": 1,
            "seed": 0, "ring": ring,
        }  # fmt: skip
        self.arrays: Any = {"train": (self.specs, self.grid)}
        create(
            self.folder, self.arrays, store_attributes(identity),
            {"capture": identity, "store_id": store_id_of(identity), "versions": versions()}, {},
        )  # fmt: skip
        self.commits: list[float] = []
        self.found: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def _advance(self) -> None:
        started = time.perf_counter()
        advance(self.folder, "train", self.specs, self.grid, writers=1, window=WINDOW)
        self.commits.append(time.perf_counter() - started)

    def write(self, at_window: Callable[[int], None] = lambda shards: None) -> None:
        """Write every shard, the same rows again and again."""
        generator = torch.Generator().manual_seed(0)
        size = WINDOW * self.rows
        rows = torch.randn((size, WIDTH), generator=generator).bfloat16()
        block = {n: rows for n, s in self.specs.items() if s.width is not None}
        number = torch.arange(size, dtype=torch.int32)
        for name, spec in self.specs.items():
            if spec.width is None:
                block[name] = number.long() if spec.dtype == "uint64" else number
        ring = None
        if self.ring is not None:
            ring = RingWriter(self.folder, self.specs, self.grid, self.ring)
        staging = Staging(len(self.specs), torch.device("cpu"))

        def before(shards: list[int]) -> bool:
            at_window(shards[0])
            self.go_on.wait()
            return ring is None or ring.wait_for_room(shards)

        writer = SplitWriter(
            self.folder, SplitPart("train", self.specs, self.grid, 0, 1, WINDOW, 0), staging,
            on_commit=self._advance, before_window=before,
        )  # fmt: skip
        done = 0
        for count in window_sizes(self.grid.shards, WINDOW):
            part = {name: values[: count * self.rows] for name, values in block.items()}
            writer.append(part, TextPoint(rows=done))
            done += count * self.rows
        writer.finish(done)
        staging.close()
        write_end(self.folder, PartEnd(0, {"train": done}, {"train": 0}, False))
        complete(self.folder, self.arrays, {"train": WINDOW}, writers=1)

    def measure(self, shards: int) -> dict[str, Any]:
        """What there is to measure while nobody writes."""
        folder = self.folder
        found: dict[str, Any] = {
            "shards": shards,
            "manifest_files": committed_windows(folder, "train", 1)[0],
            "resident_bytes": resident(),
            "seconds": {
                "open": timed(lambda: ActivationStore(self.where)),
                "commit": statistics.median(self.commits[-10:]),
                "capture goes on": timed(
                    partial(split_start, folder, "train", self.grid, 0, 1, WINDOW), 3
                ),
                "list the manifest": timed(lambda: committed_windows(folder, "train", 1)),
            },
        }
        if self.ring is not None:
            store = ActivationStore(self.where)
            found["seconds"] |= {
                "bsc ring": timed(lambda: ring_status(store)),
                "cursors": timed(lambda: readers(folder)),
            }
        return found


def play_ring(folder: Path, shards: int, hookpoints: int) -> dict[str, Any]:
    """A capture into a ring, and a run that reads it with checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    played = Played(str(folder / "acts"), shards, hookpoints, SLOTS)
    writer = threading.Thread(target=played.write, daemon=True)
    started = time.perf_counter()
    writer.start()
    store = ActivationStore(folder / "acts")
    room = store.room
    assert room is not None
    name = f"{played.hooks[0].name}/input"
    loader = Loader(
        store.train, (name,), batch_rows=4 * ROWS, seed=0, shards_at_once=room.shards_at_once,
        drop_last=False,
    )  # fmt: skip
    reader = RingReader(store.folder, played.specs, played.grid, "run")
    points = [max(2 * SLOTS, round(shards * p) - SLOTS) for p in POINTS]
    checkpoints, rows, places = 0, 0, []
    tensors = {"w": torch.zeros((64, 64))}
    state = {"coders": [{"name": "c", "progress": {}}]}
    for (batch,) in loader.ring_batches(Cursor(0, 0, 0), lambda: store.complete):
        rows += len(batch)
        at = loader.cursor
        if at.group - reader.next_shard >= room.checkpoint_shards:
            checkpoints += 1
            started_place = time.perf_counter()
            save_checkpoint(folder / "run", checkpoints, state | {"cursor": at}, [tensors])
            reader.passed(at.group)
            places.append(time.perf_counter() - started_place)
        if points and at.group >= points[0]:
            points.pop(0)
            played.go_on.clear()
            time.sleep(2.0)  # the window that is being written
            made = played.measure(ActivationStore(folder / "acts").train.shards)
            made["seconds"]["training goes on"] = timed(partial(_go_on, folder, played), 3)
            made["seconds"]["checkpoint moves the ring"] = statistics.median(places[-10:])
            played.found.append(made)
            print(json.dumps(made), flush=True)
            played.go_on.set()
    reader.close(leave=True)
    writer.join()
    manifest = sum(p.stat().st_size for p in (folder / "acts/manifest").rglob("*.jsonl"))
    return {
        "rows_once": rows == shards * ROWS, "checkpoints": checkpoints,
        "windows": len(played.commits),
        "seconds": round(time.perf_counter() - started, 1), "manifest_bytes": manifest,
        "points": played.found,
        "shards_left": len(list((folder / "acts/data.zarr/tokens/token_id/c").iterdir())),
    }  # fmt: skip


def _go_on(folder: Path, played: Played) -> None:
    """What a training run does that was killed: open, take its place up, load its checkpoint."""
    store = ActivationStore(folder / "acts")
    assert store.room is not None and not store.complete
    found = load_checkpoint(folder / "run")
    assert found is not None and found.coder("c") is not None
    ring = RingReader(store.folder, played.specs, played.grid, "again")
    ring.close(leave=True)


def play_object(work: Path, shards: int, hookpoints: int) -> dict[str, Any]:
    """The same into a bucket, all of which stays."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "BSC_SHARD_CACHE": str(work / "cache"),
    }  # fmt: skip
    boto3.resource(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
        aws_access_key_id="id", aws_secret_access_key="secret",
    ).create_bucket(Bucket=BUCKET)  # fmt: skip
    played = Played(f"s3://{BUCKET}/acts", shards, hookpoints, None)
    points = [round(shards * p) for p in POINTS[:-1]]

    def at_window(first: int) -> None:
        if points and first >= points[0]:
            points.pop(0)
            played.found.append(played.measure(first))
            print(json.dumps(played.found[-1]), flush=True)

    started = time.perf_counter()
    played.write(at_window)
    played.found.append(played.measure(shards))
    quick = time.perf_counter()
    problems = list(verify(played.where, quick=True))
    result = {
        "points": played.found, "windows": len(played.commits), "problems": problems,
        "verify_quick_seconds": round(time.perf_counter() - quick, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    server.stop()
    return result


class Site(NamedTuple):
    """Where a run takes place."""

    name: str
    capturing: int
    """GPUs that capture; the same ones train, in turn, where `training` is 0."""
    training: int
    nodes: int


class Rates(NamedTuple):
    """What a real run is reckoned with. Nothing of it was measured on a GPU."""

    tokens: float = 1e10
    hookpoints: int = 4
    width: int = 576
    coders: int = 32
    """Over all hookpoints, each of 18,432 latents with k 32."""
    forward: float = 740_000.0
    """Tokens a second of a GPU: 0.27 GFLOP a token at 200 TFLOP/s."""
    rows_of_a_coder: float = 65_536 / 13.7e-3
    """Rows a second of one coder on a GPU: 65,536 in 13.7 ms, by the bytes that a step moves."""
    written: float = 2e9
    """Bytes a second that a node writes to the shared file system."""
    read: float = 5e9
    """Bytes a second that a node reads from it, page cache left out."""
    shared: float = 40e9
    """Bytes a second that the file system gives and takes in all."""


SITES = (
    Site("one GPU", 1, 0, 1),
    Site("eight GPUs, one node", 2, 6, 1),
    Site("eight nodes of eight", 16, 48, 8),
)


def table(rates: Rates) -> str:
    """Hours and bytes of ten billion tokens, as a table in Markdown."""
    per_token = rates.hookpoints * 2 * rates.width * 2
    lines = [
        "| | model | writing | reading | training | together | bottleneck |",
        "|---|---|---|---|---|---|---|",
    ]
    for site in SITES:
        capturing, training = site.capturing, site.training or site.capturing
        writing_nodes = max(1, site.nodes * capturing // (capturing + site.training))
        reading_nodes = max(1, site.nodes - writing_nodes if site.nodes > 1 else 1)
        hours = {
            "model": rates.tokens / rates.forward / capturing,
            "writing": rates.tokens * per_token / min(rates.written * writing_nodes, rates.shared),
            # Each node reads every row once; its other processes find it in the page cache.
            "reading": rates.tokens
            * per_token
            / min(rates.read, rates.shared / max(1, reading_nodes)),
            "training": rates.tokens * rates.coders / rates.rows_of_a_coder / training,
        }
        hours = {name: seconds / 3600 for name, seconds in hours.items()}
        own = dict(hours)
        if not site.training:  # the model and the coders take turns
            own["model"] = own["training"] = hours["model"] + hours["training"]
        slowest = max(own, key=lambda name: own[name])
        cells = [f"{h:.1f} h" for h in (*hours.values(), own[slowest])]
        if not site.training and slowest == "model":
            slowest = "the GPU, which does both"
        lines.append(f"| {site.name} | {' | '.join(cells)} | {slowest} |")
    total = rates.tokens * per_token
    lines.append("")
    lines.append(f"{per_token:,} bytes a token, {total / 1e12:.0f} TB through the disk.")
    return "\n".join(lines)


def main() -> None:
    """Parse, play, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=["ring", "object", "table"])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/bsc-scale"))
    parser.add_argument("--shards", type=int, default=Grid.for_rows(TOKENS).shards)
    parser.add_argument("--hookpoints", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.part == "table":
        print(table(Rates()))
        return
    play = play_ring if arguments.part == "ring" else play_object
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        result = play(arguments.folder, arguments.shards, arguments.hookpoints)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(
        json.dumps(
            {
                "benchmark": f"scale {arguments.part}", "shards": arguments.shards,
                "hookpoints": arguments.hookpoints, "result": result,
                "machine": machine(torch.device("cpu")), "cores": os.cpu_count(),
                "system": platform.platform(), "versions": versions(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
