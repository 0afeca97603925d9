"""A store in object storage: one GET or one PUT per shard, through a bounded local cache.

Reading maps local copies of whole shards; the least recently used ones go when the cache is full (a
mapping outlives its file). Writing stages shards on the local disk and puts each when its window
ends. Credentials, endpoint and region come from the environment, as the provider's own tools read
them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import xxhash
from typing_extensions import override

from bsc.cache.store.folder import PARTIAL, Claim, StoreFolder, process_is_gone
from bsc.cache.store.layout import DATA, PROVENANCE
from bsc.counts import parse_count
from bsc.errors import StoreError, UserError
from bsc.progress import console, format_bytes

__all__ = ["RemoteFolder"]

CACHE_VARIABLE = "BSC_SHARD_CACHE"
CACHE_BYTES_VARIABLE = "BSC_SHARD_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 50_000_000_000
_SINGLE_PUT_BYTES = 5_000_000_000
"""What object stores take in one request."""
_FETCHES = 8
"""Shards that are got at a time: one connection is slower than what lies behind it."""
_STALE_LOCK_SECONDS = 120.0
_RETRY: Any = {
    "max_retries": 60,
    "retry_timeout": timedelta(minutes=5),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}
"""How long a service that answered before is waited for."""
_LOCK_WAIT_SECONDS = 600.0


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class RemoteFolder(StoreFolder):
    """A store below a prefix of a bucket."""

    def __init__(self, url: str) -> None:
        """Name the place; nothing is asked yet.

        Raises:
            UserError: the extra is not installed, or the address is not one.
        """
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{url}: reading object storage needs an extra: pip install 'bsc[s3]'."
            ) from None
        self.url = url.rstrip("/")
        self._obstore: Any = obstore
        options: dict[str, Any] = {}
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options["client_options"] = {"allow_http": True}
        try:
            self._quick: Any = obstore.store.from_url(self.url, **options)
            self._patient: Any = obstore.store.from_url(self.url, **options, retry_config=_RETRY)
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise UserError(f"{url}: not an address of object storage ({_first(error)}).") from None
        default = Path.home() / ".cache" / "bsc" / "shards"
        self._root = Path(os.environ.get(CACHE_VARIABLE) or default)
        self._place = self._root / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.cache_bytes = parse_count(
            os.environ.get(CACHE_BYTES_VARIABLE) or str(DEFAULT_CACHE_BYTES)
        )
        self._answered = False
        self._copies: Path | None = None
        self._told = False
        self._mutex = threading.Lock()

    def __str__(self) -> str:
        return self.url

    @property
    def _store(self) -> Any:
        """The client: once the service has answered, one that waits for it where it is gone.

        Before, its address is rather wrong.
        """
        return self._patient if self._answered else self._quick

    @contextlib.contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        """Turn what the client raises into what this module promises."""
        errors = self._obstore.exceptions
        try:
            yield
            self._answered = True
        except (FileNotFoundError, errors.NotFoundError):
            raise FileNotFoundError(f"{self.url}/{key}") from None
        except errors.AlreadyExistsError:
            raise FileExistsError(f"{self.url}/{key}") from None
        except (errors.BaseError, OSError) as error:
            said = _first(error)
            if "403 Forbidden" in str(error) or "401 Unauthorized" in str(error):
                raise StoreError(
                    f"{self.url}/{key}: the service refuses the credentials, or they may not do "
                    f"this. AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and "
                    f"AWS_ENDPOINT_URL say who asks and whom ({said[:120]})."
                ) from None
            raise StoreError(f"{self.url}/{key}: {said}") from None

    @override
    def missing(self) -> bool:
        return next(self.keys(), None) is None

    @override
    def read(self, key: str) -> bytes:
        with self._asking(key):
            return bytes(self._obstore.get(self._store, key).bytes())

    @override
    def size(self, key: str) -> int | None:
        try:
            with self._asking(key):
                return int(self._obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            return None

    @override
    def keys(self, prefix: str = "") -> Iterator[str]:
        with self._asking(prefix):
            for page in self._obstore.list(self._store, prefix or None):
                for entry in page:
                    yield str(entry["path"])

    @override
    def write(self, key: str, data: bytes) -> None:
        with self._asking(key):
            self._obstore.put(self._store, key, data)

    @override
    def check_new(self) -> None:
        there = set(self.keys())
        # A `create` that was killed, or one that runs now, is no hindrance.
        made = {k for k in there if k in ("README.md", "store.lock") or k.endswith("/zarr.json")}
        if there - made:
            raise UserError(
                f"{self.url}: something is there already, so no store can be started in it. Name "
                f"another place."
            )

    @override
    def drop_leftovers(self, rank: int, metadata: list[str]) -> None:
        """Puts are whole or nothing: there are none."""

    @override
    def remove(self) -> None:
        for key in list(self.keys()):
            self.delete(key)

    @override
    def create(self, files: Mapping[str, bytes]) -> None:
        if self.exists(PROVENANCE):
            return
        for key in sorted(files, key=lambda k: k == PROVENANCE):  # last: it says that all is there
            self.write(key, files[key])

    @override
    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._asking(key):
            self._obstore.delete(self._store, key)

    @override
    def local(self, key: str) -> Path:
        if self._copies is None:
            # Copies belong to the content of a store, not to its address.
            what = self.read(f"{DATA}/zarr.json") + self.read(PROVENANCE)
            self._copies = self._place / xxhash.xxh3_64_hexdigest(what)
        path = self._copies / key
        try:
            os.utime(path)  # used now
            return path
        except FileNotFoundError:
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")
        try:
            with self._asking(key), partial.open("wb") as file:
                answer = self._obstore.get(self._store, key)
                size = int(answer.meta["size"])
                self._make_room(size, partial)
                for part in answer.stream(min_chunk_size=8 << 20):
                    file.write(part)
                came = file.tell()
            if came != size:
                raise StoreError(f"{self.url}/{key}: the transfer broke off.")
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @override
    def fetch(self, keys: Sequence[str]) -> None:
        def one(key: str) -> Path | None:
            with contextlib.suppress(FileNotFoundError):
                return self.local(key)
            return None

        with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as pool:
            copies = list(pool.map(one, keys))
        if not self._told and any(path is not None and not path.exists() for path in copies):
            self._told = True
            console.print(
                f"{self.url}: the shards that are read at a time are more than the "
                f"{format_bytes(self.cache_bytes)} that their copies may take, so that they are "
                f"fetched twice. Set {CACHE_BYTES_VARIABLE} to twice as much or more."
            )

    @override
    def fresh(self, key: str) -> Path:
        if self._copies is not None:
            (self._copies / key).unlink(missing_ok=True)
        return self.local(key)

    def _make_room(self, size: int, partial: Path) -> None:
        """Remove the least recently used copies until `size` more bytes fit into the cache.

        The empty file `partial` gets that length at once: what else makes room counts it, in
        this process or another, before its bytes have come.
        """
        with self._mutex:
            files = []
            for path in self._root.glob("*/*/**/*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and "staging" not in path.parts:
                        status = path.stat()
                        files.append((status.st_mtime_ns, status.st_size, path))
            total = sum(bytes_ for _, bytes_, _ in files)
            for changed, bytes_, path in sorted(files):
                if total + size <= self.cache_bytes:
                    break
                if path.name.endswith(PARTIAL) and changed > (time.time() - 3600) * 1e9:
                    continue  # on its way
                path.unlink(missing_ok=True)
                total -= bytes_
            os.truncate(partial, size)

    @override
    def staging(self, key: str) -> Path:
        path = self._place / "staging" / (key + PARTIAL)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @override
    def discard(self, key: str) -> None:
        self.staging(key).unlink(missing_ok=True)

    @override
    def publish(self, key: str) -> None:
        path = self.staging(key)
        single = path.stat().st_size <= _SINGLE_PUT_BYTES
        with self._asking(key):
            self._obstore.put(self._store, key, path, use_multipart=not single)
        path.unlink()

    @override
    def free_bytes(self) -> int | None:
        return None

    @override
    def claim(self, rank: int) -> Claim:
        return _ObjectClaim(self, f"writer-{rank}.lock", rank)

    def create_object(self, key: str, data: bytes) -> None:
        """Put an object that is not there yet. What it holds should be of this call alone.

        Raises:
            FileExistsError: it is.
        """
        try:
            with self._asking(key):
                self._obstore.put(self._store, key, data, mode="create")
        except FileExistsError:
            # Put, but the answer got lost: the client then tried again, and found it there.
            with contextlib.suppress(FileNotFoundError):
                if self.read(key) == data:
                    return
            raise

    @override
    def age(self, key: str) -> float | None:
        try:
            with self._asking(key):
                made = self._obstore.head(self._store, key)["last_modified"]
        except FileNotFoundError:
            return None
        return time.time() - float(made.timestamp())

    @override
    def locked(self) -> AbstractContextManager[None]:
        return self._locked()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        key, deadline = "store.lock", time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                self.create_object(key, _only_this_time())
                break
            except FileExistsError:
                age = self.age(key)
                if age is not None and age > _STALE_LOCK_SECONDS:  # its process died in the block
                    self.delete(key)
                elif time.monotonic() > deadline:
                    raise StoreError(f"{self.url}/{key}: held for ten minutes.") from None
                else:
                    time.sleep(0.2)
        try:
            yield
        finally:
            self.delete(key)

    @override
    def drop_locks(self, writers: int) -> None:
        for rank in range(writers):
            self.delete(f"writer-{rank}.lock")
        shutil.rmtree(self._place / "staging", ignore_errors=True)


class _ObjectClaim(Claim):
    """An object that says which process writes a part. It outlives a process that is killed."""

    def __init__(self, folder: RemoteFolder, key: str, rank: int) -> None:
        self.folder, self.key = folder, key
        try:
            folder.create_object(key, _only_this_time())
        except FileExistsError:
            holder = folder.read(key).decode("utf-8", "replace")[:200]
            if not _gone(holder):
                raise UserError(
                    f"{folder}: {' '.join(holder.split()[:4])} is writing part {rank} of this "
                    f"store. Wait for it or stop it; if it is dead, delete {folder}/{key}."
                ) from None
            folder.write(key, _only_this_time())

    @override
    def release(self, *, remove: bool) -> None:
        self.folder.delete(self.key)


def _only_this_time() -> bytes:
    """Who this is, and a number that no other object has."""
    return f"{_this_process()} {uuid.uuid4().hex}".encode()


def _gone(holder: str) -> bool:
    """Whether the process that a claim names ran on this machine and does not any more."""
    words = holder.split()
    if len(words) < 4 or not words[1].isdigit():
        return False
    if int(words[1]) == os.getpid():
        return False
    return process_is_gone(int(words[1]), words[3])


def _first(error: BaseException) -> str:
    """First line of what a client says, without what it was asked with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
