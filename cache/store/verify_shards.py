"""Checking shards against the manifest, several at a time, with problems in the order of the store.

Threads do it: reading and hashing release the lock of the interpreter. A thread holds one block of
a file, and a few windows of the manifest are open at a time, whatever the size of the store.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import xxhash

from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import ArraySpec, shard_key
from bsc.cache.store.ring import first_kept
from bsc.cache.store.shard import ShardRecord, read_index
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify_files import StoreFiles
from bsc.cache.store.verify_journal import VerifyJournal
from bsc.errors import StoreError, UserError

__all__ = ["ShardPool", "WindowShards", "default_jobs"]

_BLOCK = 1 << 20
"""Bytes that are read and hashed at a time. They stay in a core's own cache, and are enough for
the interpreter's work between them not to be seen."""
_MOST_JOBS = 8
_LOOK_EVERY_SECONDS = 0.1
_AHEAD = 4
"""Shards for each thread that wait behind the window whose problems are due next."""


def default_jobs() -> int:
    """Shards to check at a time: one for each core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_JOBS, cores or 1))


@dataclass(frozen=True)
class WindowShards:
    """The shards of one window of the manifest that are to be checked."""

    split: Split
    rank: int
    window: int
    shards: list[tuple[ArraySpec, ShardRecord]]

    @property
    def bytes(self) -> int:
        """Size of its files, by the manifest."""
        return sum(record.bytes for _, record in self.shards)

    def state(self, files: StoreFiles) -> str:
        """Hash of what the manifest says of the shards and of the stamps of their files.

        Empty where a file was not there when the check began: then nobody can say later whether
        the file that was checked is the one that is there.
        """
        digest = xxhash.xxh3_128()
        for spec, record in self.shards:
            stamp = files.stamp(spec, record.shard)
            if stamp is None:
                return ""
            facts = (record.rows, record.bytes, record.xxh3_128, *record.chunk_xxh3_64, stamp)
            digest.update(f"{shard_key(spec, record.shard)} {facts}\n".encode())
        return digest.hexdigest()


@dataclass
class _Started:
    """A window on its way."""

    window: WindowShards
    state: str
    results: list[Future[list[str]]]


class ShardPool:
    """Threads that check shards. To be used in a `with` block."""

    def __init__(
        self,
        store: ActivationStore,
        files: StoreFiles,
        on_bytes: Callable[[int], None],
        *,
        quick: bool,
        jobs: int | None,
        journal: VerifyJournal | None,
    ) -> None:
        """Start no thread yet.

        Args:
            store: whose shards are checked.
            files: that it had when the check began.
            on_bytes: called, in the thread that takes the problems, with the number of bytes
                checked since the last call.
            quick: check sizes and indices, and not the rows.
            jobs: shards that are checked at a time; None: `default_jobs`.
            journal: windows that were found right before, and where to note those that are now.

        Raises:
            UserError: `jobs` is less than 1.
        """
        if jobs is not None and jobs < 1:
            raise UserError(f"--jobs: should be at least 1, got {jobs}.")
        self.folder, self.ring, self.splits = store.folder, store.ring, store.splits
        self.files, self.on_bytes, self.quick, self.journal = files, on_bytes, quick, journal
        self.jobs = jobs or default_jobs()
        self._threads = ThreadPoolExecutor(self.jobs, thread_name_prefix="verify")
        self._of_thread = threading.local()
        self._stopped = threading.Event()
        self._mutex = threading.Lock()
        self._bytes = 0

    def __enter__(self) -> ShardPool:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)

    def problems(self, items: Iterable[str | WindowShards]) -> Iterator[str]:
        """Problems that are known, as they are, and in the place of each window its own.

        The order is that of the items, whatever the number of threads.
        """
        waiting: deque[str | _Started] = deque()
        behind = 0  # shards of all windows that wait but the first
        for item in items:
            self._tell()
            started = item if isinstance(item, str) else self._start(item)
            if started is None:
                continue
            waiting.append(started)
            behind += _shards(started) if len(waiting) > 1 else 0
            while len(waiting) > 1 and behind >= _AHEAD * self.jobs:
                yield from self._end(waiting.popleft())
                behind -= _shards(waiting[0])
        while waiting:
            yield from self._end(waiting.popleft())
        self._tell()

    def _start(self, window: WindowShards) -> _Started | None:
        """Begin with a window; None where nothing is left to do for it."""
        state = ""
        if self.journal is not None:
            state = window.state(self.files)
            known = self.journal.get(window.split, window.rank, window.window)
            if known is not None and known.state == state:
                self.journal.take(known)
                return None
            if known is not None:
                self.on_bytes(-known.bytes)
        split = self.splits[window.split]
        run = self._threads.submit
        return _Started(window, state, [run(self._shard, split, *s) for s in window.shards])

    def _end(self, item: str | _Started) -> Iterator[str]:
        """The problems of a window that was begun, once all of its shards are checked."""
        if isinstance(item, str):
            yield item
            return
        found = []
        for result in item.results:
            while not result.done():
                wait((result,), _LOOK_EVERY_SECONDS)
                self._tell()
            found += result.result()
        if self.journal is not None and item.state:
            window = item.window
            place = (window.split, window.rank, window.window)
            self.journal.add(*place, state=item.state, bytes_=window.bytes, problems=found)
        yield from found

    def _tell(self) -> None:
        """Say how many bytes were checked."""
        with self._mutex:
            n, self._bytes = self._bytes, 0
        if n:
            self.on_bytes(n)

    def _count(self, n: int) -> None:
        with self._mutex:
            self._bytes += n

    def _shard(self, split: StoreSplit, spec: ArraySpec, record: ShardRecord) -> list[str]:
        """The problems of one shard, in a thread of the pool."""
        grid, key = split.grid, shard_key(spec, record.shard)
        where = f"{self.folder}/{key}"
        found = []
        if record.rows != grid.shard_rows:
            found.append(f"{where}: the manifest says {record.rows} rows")
        try:
            size = self.folder.size(key)
            if size is None:
                if not self._passed(record.shard, split):
                    found.append(f"{where}: missing")
            elif size != record.bytes or (not spec.lz4 and size != spec.shard_bytes(grid)):
                found.append(f"{where}: {size:,} bytes, expected {record.bytes:,}")
            elif not self._stopped.is_set():
                found += self._content(key, size, split, record)
        except StoreError as error:
            if not self._passed(record.shard, split):
                found.append(str(error))
        except OSError as error:
            if not self._passed(record.shard, split):
                found.append(f"{where}: cannot be read ({error.strerror or error})")
        return found

    def _passed(self, shard: int, split: StoreSplit) -> bool:
        """Whether a ring has moved past a shard since the check began."""
        first = next(iter(split.specs.values()))
        ring = self.ring is not None and split.split == "train"
        return ring and shard < first_kept(self.folder, first, split.shards)

    def _content(self, key: str, size: int, split: StoreSplit, record: ShardRecord) -> list[str]:
        """The problems of what a shard holds."""
        while True:
            path = self.folder.fresh(key)
            try:
                with path.open("rb", buffering=0) as file:
                    index = read_index(path, split.grid.chunks)
                    lengths = index[:, 1].astype(np.int64)
                    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
                    dense = np.array_equal(index[:, 0].astype(np.int64), starts)
                    where = f"{self.folder}/{key}"
                    if not dense or int(lengths.sum()) + index.nbytes + 4 != size:
                        return [f"{where}: the chunks are not in order and without gaps"]
                    if self.quick:
                        self._count(size)
                        return []
                    return self._rows(file, where, lengths.tolist(), split, record)
            except (StoreError, FileNotFoundError):
                # A copy of an object makes room for others, also before it is opened.
                if path.exists() or self.folder.size(key) is None:
                    raise

    def _rows(
        self,
        file: io.FileIO,
        where: str,
        lengths: list[int],
        split: StoreSplit,
        record: ShardRecord,
    ) -> list[str]:
        """The problems of the rows: every byte is read once and hashed twice."""
        if not hasattr(self._of_thread, "block"):
            self._of_thread.block = memoryview(bytearray(_BLOCK))
        block: memoryview = self._of_thread.block
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        whole, digest = xxhash.xxh3_128(), xxhash.xxh3_64()
        right: list[bool] = []
        """Of every chunk that was read to its end."""
        left = lengths[0]
        while n := file.readinto(block):
            if self._stopped.is_set():
                return []
            whole.update(block[:n])
            at = 0
            while at < n and len(right) < len(lengths):
                part = min(left, n - at)
                digest.update(block[at : at + part])
                at, left = at + part, left - part
                if left == 0:
                    expected = record.chunk_xxh3_64[len(right) : len(right) + 1]
                    right.append(expected == (digest.hexdigest(),))
                    digest.reset()
                    left = lengths[len(right)] if len(right) < len(lengths) else 0
            self._count(n)
        rows = split.grid.chunk_rows
        right += [False] * (len(lengths) - len(right))
        found = [
            f"{where}: chunk {c} (rows {c * rows} to {c * rows + rows - 1}) is changed"
            for c, is_right in enumerate(right)
            if not is_right
        ]
        if whole.hexdigest() != record.xxh3_128 and not found:
            found.append(f"{where}: the footer is changed")
        return found


def _shards(item: str | _Started) -> int:
    return 0 if isinstance(item, str) else len(item.results)
