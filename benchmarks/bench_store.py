"""How fast is the store beside the plain operation that it is made of?

* writer: rows into a store (scatter, hashes, sums, manifest, fsync) over a plain write and fsync of
  the same bytes to the same disk.
* loader: random batches from the page cache, rows per second of one core's time; and from the disk,
  over a sequential read of the same files.
* open: a store of 10 billion tokens, of sparse files and a generated manifest.
* memory: peak of a process that writes, and of one that reads, 1 x and 10 x the rows.

Each part checks what it times. Runs that are compared alternate; figures are medians with the
smallest and the largest. The last line is JSON.

    python benchmarks/bench_store.py --folder /tmp [--parts writer loader open memory]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsc.cache.capture.commit import advance, complete, create
from bsc.cache.capture.staging import Staging
from bsc.cache.capture.writer import SplitPart, SplitWriter
from bsc.cache.store.channel_sums import ChannelSums
from bsc.cache.store.folder import open_folder
from bsc.cache.store.layout import (
    Grid,
    Hookpoint,
    array_specs,
    shard_key,
    store_attributes,
    store_id_of,
)
from bsc.cache.store.loader import Loader
from bsc.cache.store.manifest import PartEnd, TextPoint, WindowRecord, write_end, write_window
from bsc.cache.store.scatter import window_sizes
from bsc.cache.store.shard import ShardRecord, index_bytes
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.versions import versions

D = 576
HOOKS = (Hookpoint("layers.0.mlp", D, D),)
NAMES = ("layers.0.mlp/input", "layers.0.mlp/output")
SPECS = array_specs(HOOKS, "train")
BLOCK = 8_192
EPOCHS = 3


def blocks(count: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of random rows."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        rows = torch.randn((BLOCK, D), generator=generator).bfloat16()
        number = torch.arange(i * BLOCK, (i + 1) * BLOCK, dtype=torch.int32)
        tokens = {f"tokens/{n}": number for n in ("token_id", "doc_id", "position")}
        tokens["tokens/ngram"] = number.long()
        made.append({NAMES[0]: rows, NAMES[1]: rows.flip(0), **tokens})
    return made


def identity(grid: Grid, window: int) -> dict[str, Any]:
    """Of a store without a model."""
    return {
        "model": {"special_token_ids": []}, "context": 1024, "packing": "joined", "codec": "raw",
        "grids": {"train": {"shard_rows": grid.shard_rows, "chunk_rows": grid.chunk_rows,
                            "shards": grid.shards}},
        "hookpoints": [{"name": h.name, "d_in": h.d_in, "d_out": h.d_out} for h in HOOKS],
        "seed": 0, "window": window, "writers": 1, "ring": None,
    }  # fmt: skip


def write_store(root: Path, grid: Grid, given: list[dict[str, torch.Tensor]], window: int) -> float:
    """Write a store of repeated blocks; seconds from the first row to the last commit."""
    folder, made = open_folder(root), identity(grid, window)
    create(folder, {"train": (SPECS, grid)}, store_attributes(made),
           {"capture": made, "store_id": store_id_of(made)}, {})  # fmt: skip
    staging = Staging(len(SPECS), torch.device("cpu"))
    writer = SplitWriter(
        folder, SplitPart("train", SPECS, grid, window=window), staging,
        on_commit=lambda: advance(folder, "train", SPECS, grid, writers=1, window=window),
    )  # fmt: skip
    started = time.perf_counter()
    at = 0
    while not writer.full:
        at += writer.append(given[at // BLOCK % len(given)], TextPoint(rows=at))
    writer.finish(at)
    seconds = time.perf_counter() - started
    staging.close()
    write_end(folder, PartEnd(0, {"train": grid.rows}, {"train": 0}, False))
    complete(folder, {"train": (SPECS, grid)}, {"train": window}, writers=1)
    return seconds


def plain_write(root: Path, grid: Grid, payload: memoryview) -> float:
    """The same bytes in as many files, by one write call after another, then fsync."""
    root.mkdir()
    started = time.perf_counter()
    for name, spec in SPECS.items():
        for shard in range(grid.shards):
            fd = os.open(root / f"{name.replace('/', '-')}-{shard}", os.O_CREAT | os.O_WRONLY)
            left = spec.shard_bytes(grid)
            while left:
                left -= os.write(fd, payload[: min(left, len(payload))])
            os.fsync(fd)
            os.close(fd)
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def bench_writer(folder: Path, repeats: int) -> dict[str, Any]:
    """Our writer and a plain one, in turn."""
    grid, given = Grid(16_384, 4_096, 64), blocks(4)
    payload = given[0][NAMES[0]].view(torch.int16).numpy().reshape(-1).view(np.uint8).data
    total = sum(s.shard_bytes(grid) for s in SPECS.values()) * grid.shards
    ours: list[float] = []
    plain: list[float] = []
    for i in range(repeats + 1):
        plain.append(plain_write(folder / "plain", grid, payload))
        shutil.rmtree(folder / "plain")
        os.sync()
        ours.append(write_store(folder / "ours", grid, given, 64))
        if i == 0:
            assert list(verify(folder / "ours")) == []
        shutil.rmtree(folder / "ours")
        os.sync()
    ours, plain = ours[1:], plain[1:]  # the first pair warms the disk's own caches
    ratios = [p / o for p, o in zip(plain, ours, strict=True)]
    return {
        "bytes": total,
        "ours_gb_per_s": spread([total / t / 1e9 for t in ours]),
        "plain_gb_per_s": spread([total / t / 1e9 for t in plain]),
        "ratio": spread(ratios),
    }


def drop_pages(root: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def bench_loader(folder: Path, repeats: int) -> dict[str, Any]:
    """Batches of one side from the page cache; both sides from the disk."""
    root, grid, batch = folder / "store", Grid(65_536, 4_096, 16), 8_192
    write_store(root, grid, blocks(4), 16)
    split = ActivationStore(root).train
    torch.set_num_threads(1)

    def epoch(names: tuple[str, ...]) -> tuple[int, float, float, float]:
        loader = Loader(split, names, batch_rows=batch, seed=0)
        wall, cpu = time.perf_counter(), time.process_time()
        rows, check = 0, 0.0
        for given in islice(loader.batches(), EPOCHS * grid.rows // batch):
            rows += len(given[0])
            check += float(given[0][0, 0])
        assert rows == EPOCHS * grid.rows and np.isfinite(check)
        return rows, time.perf_counter() - wall, time.process_time() - cpu, loader.waited

    def one_after_another() -> int:
        """Read every shard's rows from its start to its end; bytes."""
        scratch, total = bytearray(8 << 20), 0
        for name in NAMES:
            for shard in range(grid.shards):
                with (root / shard_key(SPECS[name], shard)).open("rb", buffering=0) as file:
                    while n := file.readinto(scratch):
                        total += n
        return total

    def bare() -> float:
        """Rows per second of index_select alone: random rows of four mapped shards."""
        tensors = [split.tensor(NAMES[0], s) for s in range(4)]
        for tensor in tensors:
            tensor.view(torch.int16)[:, ::64].sum()  # every page is there
        out, size = torch.empty((batch // 4, D), dtype=torch.bfloat16), grid.shard_rows
        drawn = [torch.randint(size, (batch // 4,)).sort().values for _ in range(4 * 32)]
        started = time.perf_counter()
        for i, rows in enumerate(drawn):
            torch.index_select(tensors[i % 4], 0, rows, out=out)
        return len(drawn) * batch // 4 / (time.perf_counter() - started)

    epoch(NAMES)
    ceiling = [bare() for _ in range(repeats)]
    warm, both = [epoch(NAMES[:1]) for _ in range(repeats)], [epoch(NAMES) for _ in range(repeats)]
    cold, sequential, size = [], [], 0
    for _ in range(repeats):
        drop_pages(root)
        before = time.perf_counter()
        size = one_after_another()
        sequential.append(time.perf_counter() - before)
        drop_pages(root)
        before = time.perf_counter()
        for _ in islice(
            Loader(split, NAMES, batch_rows=batch, seed=0).batches(), grid.rows // batch
        ):
            pass
        cold.append(time.perf_counter() - before)
    shutil.rmtree(root)
    return {
        "rows": grid.rows,
        "bare_index_select_rows_per_second": spread(ceiling),
        "warm_rows_per_cpu_second": spread([r / cpu for r, _, cpu, _ in warm]),
        "warm_rows_per_second": spread([r / wall for r, wall, _, _ in warm]),
        "warm_both_sides_rows_per_cpu_second": spread([r / cpu for r, _, cpu, _ in both]),
        "cold_gb_per_s": spread([size / t / 1e9 for t in cold]),
        "sequential_gb_per_s": spread([size / t / 1e9 for t in sequential]),
        "cold_ratio": spread([s / c for s, c in zip(sequential, cold, strict=True)]),
    }


def make_huge(root: Path) -> Grid:
    """A store of 10 billion tokens: every file there, rows that take no disk, a whole manifest."""
    grid, window = Grid.for_rows(10_000_000_000), 64
    folder, made = open_folder(root), identity(grid, window)
    create(folder, {"train": (SPECS, grid)}, store_attributes(made),
           {"capture": made, "store_id": store_id_of(made)}, {})  # fmt: skip
    sums = ChannelSums(D)
    sums.sum_sq += grid.shard_rows
    for spec in SPECS.values():
        footer = index_bytes([grid.chunk_rows * spec.row_bytes] * grid.chunks)
        size = spec.shard_bytes(grid)
        for shard in range(grid.shards):
            path = root / shard_key(spec, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_CREAT | os.O_WRONLY)
            os.ftruncate(fd, size - len(footer))
            os.pwrite(fd, footer, size - len(footer))
            os.close(fd)
    first = 0
    for number, n in enumerate(window_sizes(grid.shards, window)):
        records = tuple(
            ShardRecord(
                spec.path, shard, grid.shard_rows, spec.shard_bytes(grid), "0" * 32,
                ("0" * 16,) * grid.chunks, number, sums if spec.width else None,
            )
            for spec in SPECS.values()
            for shard in range(first, first + n)
        )  # fmt: skip
        write_window(folder, WindowRecord("train", 0, number, TextPoint(), records))
        first += n
    advance(folder, "train", SPECS, grid, writers=1, window=window)
    return grid


OPEN = """
import json, sys, time
import torch
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.loader import Loader
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
at = time.perf_counter()
store = ActivationStore(sys.argv[1])
rows = store.train.rows
moments = store.train.moments("layers.0.mlp/input")
opened = time.perf_counter() - at
after = peak()
loader = Loader(store.train, ("layers.0.mlp/input", "layers.0.mlp/output"), batch_rows=8192, seed=0)
at = time.perf_counter()
x, y = next(loader.batches())
first = time.perf_counter() - at
print(json.dumps({"rows": rows, "open_seconds": opened, "open_mb": (after - before) / 1024,
                  "first_batch_seconds": first}))
"""


def bench_open(folder: Path, repeats: int) -> dict[str, Any]:
    """Open a store of 10 billion tokens, and take one batch, in fresh processes."""
    root = folder / "huge"
    started = time.perf_counter()
    grid = make_huge(root)
    made = time.perf_counter() - started
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(root)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    assert all(f["rows"] == grid.rows for f in found)
    manifest = sum(p.stat().st_size for p in (root / "manifest").rglob("*") if p.is_file())
    shutil.rmtree(root)
    keys = ("open_seconds", "open_mb", "first_batch_seconds")
    return {
        "rows": grid.rows, "shards": grid.shards, "manifest_bytes": manifest,
        "seconds_to_generate": made,
    } | {k: spread([f[k] for f in found]) for k in keys}  # fmt: skip


def peak_of(part: str, folder: Path, shards: int) -> float:
    """Peak memory in MB of a fresh process that writes, or reads, a store of so many shards."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[4]); import bench_store; "
        "bench_store.memory_child(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, part, str(folder), str(shards), here],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def memory_child(part: str, folder: str, shards: int) -> None:
    """Write or read a store of shards of 8,192 rows and print the peak memory in MB."""
    grid, root = Grid(8_192, 4_096, shards), Path(folder) / f"memory-{shards}"
    if part == "write":
        write_store(root, grid, blocks(4), 16)
    else:
        loader = Loader(ActivationStore(root).train, NAMES, batch_rows=2_048, seed=0)
        for _ in islice(loader.batches(), grid.rows // 2_048):
            pass
    # Not ru_maxrss: a child begins with its parent's.
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def bench_memory(folder: Path, repeats: int) -> dict[str, Any]:
    """Peaks at 1 x and 10 x the rows."""
    found: dict[str, Any] = {}
    for part in ("write", "read"):
        small, large = (peak_of(part, folder, n) for n in (32, 320))
        found[part] = {"mb_1x": small, "mb_10x": large, "ratio": large / small}
    for n in (32, 320):
        shutil.rmtree(folder / f"memory-{n}")
    return found


CAPTURE = """
import sys
from pathlib import Path
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
capture(CaptureConfig(model="demo", store=sys.argv[1], text=TextSource(corpus="stdlib"),
                      hookpoints=("layers.3.mlp",), tokens=int(sys.argv[2]), context=256))
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
"""


def bench_capture_memory(folder: Path, repeats: int) -> dict[str, Any]:
    """Peak of a whole capture of the embedded model, 1 x and 10 x the tokens."""
    peaks = []
    for i, tokens in enumerate((163_840, 1_638_400)):
        done = subprocess.run(
            [sys.executable, "-c", CAPTURE, str(folder / f"capture-{i}"), str(tokens)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(float(done.stdout))
    return {"mb_1x": peaks[0], "mb_10x": peaks[1], "ratio": peaks[1] / peaks[0]}


PARTS = {
    "writer": bench_writer, "loader": bench_loader, "open": bench_open, "memory": bench_memory,
    "capture-memory": bench_capture_memory,
}  # fmt: skip


def main() -> None:
    """Run the parts and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk that is measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as where:
        for part in args.parts:
            results[part] = PARTS[part](Path(where), args.repeats)
            print(part, json.dumps(results[part], indent=1), file=sys.stderr)
    facts = {"versions": versions(), "cpus": os.cpu_count(), "machine": platform.processor()}
    print(json.dumps({"benchmark": "store", "results": results} | facts))


if __name__ == "__main__":
    main()
