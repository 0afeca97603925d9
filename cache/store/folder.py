"""Where a store lies: a folder of a file system.

Everything that reads or writes a store goes through this: small files whole and atomically, shards
staged and then published. Keys are paths relative to the store, with slashes, on every system.
`cache/store/remote.py` has the same for object storage.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from typing_extensions import override

from bsc.cache.store.layout import DATA, MANIFEST, PROVENANCE, README
from bsc.errors import UserError
from bsc.files import check_new_folder, fsync_folder, make_durable_folder, write_atomically
from bsc.locks import FileLock, HeldError, lock_for_moments

__all__ = [
    "PARTIAL",
    "LocalFolder",
    "StoreFolder",
    "open_folder",
    "process_is_gone",
    "writer_lock",
]

PARTIAL = ".partial"
_STORE_LOCK = "store.lock"
_LOOKED_AT_SECONDS = 0.5
"""That a writer tries for its part: who looks whether it is written holds its lock for a moment."""


def writer_lock(rank: int) -> str:
    """The file whose lock the writer of a part holds."""
    return f"writer-{rank}.lock"


class StoreFolder(ABC):
    """The files of one store by key."""

    @abstractmethod
    def __str__(self) -> str:
        """How a person names this store, for messages."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Size of a file in bytes, or None where there is none."""

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys of all files below a folder, in no particular order."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Replace a file, atomically and durably."""

    @abstractmethod
    def check_new(self) -> None:
        """See that a store can be started here, without doing so.

        Raises:
            UserError: something else is there, or the place cannot be written.
        """

    @abstractmethod
    def drop_leftovers(self, rank: int, metadata: list[str]) -> None:
        """Remove temporary files that killed writers left.

        Args:
            rank: whose part this process holds.
            metadata: keys of files that are replaced under `locked`.
        """

    @abstractmethod
    def remove(self) -> None:
        """Take the whole store back."""

    @abstractmethod
    def create(self, files: Mapping[str, bytes]) -> None:
        """Make the store with these files, all at once; nothing happens where one is already.

        Raises:
            UserError: something else is there, or the place cannot be written.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""

    @abstractmethod
    def local(self, key: str) -> Path:
        """A local file with the content, for mapping.

        Raises:
            FileNotFoundError: there is none.
        """

    def fresh(self, key: str) -> Path:
        """`local`, but never a copy from before.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.local(key)

    @abstractmethod
    def fetch(self, keys: Sequence[str]) -> None:
        """Have the local files of several keys at hand, where they come from elsewhere.

        What is missing is left to `local` to say.
        """

    @abstractmethod
    def staging(self, key: str) -> Path:
        """A local file to write a shard to before it is published under `key`."""

    @abstractmethod
    def discard(self, key: str) -> None:
        """Remove a staged file; nothing happens where there is none."""

    @abstractmethod
    def publish(self, key: str) -> None:
        """Give a staged, synced file its name: it is there whole, or not at all."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Free space for staging and publishing, or None where there is no limit to see."""

    @abstractmethod
    def claim(self, rank: int) -> Claim:
        """Become the only writer of a rank's part.

        Raises:
            UserError: another process is.
        """

    @abstractmethod
    def locked(self) -> AbstractContextManager[None]:
        """A block in which no other writer changes metadata of the store."""

    @abstractmethod
    def drop_locks(self, writers: int) -> None:
        """Remove what `claim` and `locked` left, once the store is finished."""

    def missing(self) -> bool:
        """Whether nothing at all is there."""
        return False

    def age(self, key: str) -> float | None:
        """Seconds since a file was written, by this machine's clock; None where it is not known."""
        return None

    @property
    def address(self) -> str:
        """Where the store is, from anywhere on this machine."""
        return str(self)

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return self.size(key) is not None

    def write_text(self, key: str, text: str) -> None:
        """Replace a file by text."""
        self.write(key, text.encode())


class Claim:
    """That this process is the only writer of a part; `release` ends it."""

    def release(self, *, remove: bool) -> None:
        """End the claim; `remove` its trace when the part is finished."""


class LocalFolder(StoreFolder):
    """A store in a local or shared file system."""

    def __init__(self, root: Path) -> None:
        """Name the folder; it need not be there yet."""
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.root / key

    @property
    @override
    def address(self) -> str:
        return str(self.root.absolute())

    @override
    def missing(self) -> bool:
        return not self.root.is_dir()

    @override
    def age(self, key: str) -> float | None:
        try:
            return time.time() - self.path(key).stat().st_mtime
        except FileNotFoundError:
            return None

    @override
    def read(self, key: str) -> bytes:
        return self.path(key).read_bytes()

    @override
    def size(self, key: str) -> int | None:
        try:
            return self.path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    @override
    def keys(self, prefix: str = "") -> Iterator[str]:
        # rglob leaves links alone: what they lead to does not belong to the store
        for path in self.path(prefix).rglob("*"):
            if path.is_symlink() or path.is_file():
                yield PurePosixPath(path.relative_to(self.root)).as_posix()

    @override
    def write(self, key: str, data: bytes) -> None:
        path = self.path(key)
        make_durable_folder(path.parent)
        write_atomically(path, data)

    @override
    def check_new(self) -> None:
        if not self._half_made():
            check_new_folder(self.root, "store")

    def _half_made(self) -> bool:
        """Whether a `create` that was killed, or one that runs now, is all that is here."""
        names = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        known = {DATA, README, PROVENANCE, _STORE_LOCK}
        partial = {n for n in names if n.endswith(PARTIAL)}
        if not names or names - known - partial or not names & known:
            return False
        return not any((self.root / DATA).glob("**/c/*"))

    @override
    def drop_leftovers(self, rank: int, metadata: list[str]) -> None:
        with self.locked():
            for key in metadata:
                path = self.path(key)
                for leftover in path.parent.glob(f"{path.name}.*{PARTIAL}"):
                    leftover.unlink(missing_ok=True)
        manifest = self.path(MANIFEST)
        for pattern in (f"*/{rank}-*{PARTIAL}", f"end-{rank}.json*{PARTIAL}"):
            for leftover in manifest.glob(pattern):
                leftover.unlink(missing_ok=True)

    @override
    def remove(self) -> None:
        shutil.rmtree(self.root)

    @override
    def create(self, files: Mapping[str, bytes]) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self.locked():
                if not self.exists(PROVENANCE):
                    # Last: it says that the store is there.
                    for key in sorted(files, key=lambda k: k == PROVENANCE):
                        self.write(key, files[key])
        except OSError as error:
            raise UserError(
                f"{self.root}: the store cannot be written here ({error.strerror})."
            ) from None
        fsync_folder(self.root.resolve().parent)

    @override
    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    @override
    def local(self, key: str) -> Path:
        return self.path(key)

    @override
    def fetch(self, keys: Sequence[str]) -> None:
        """They are here."""

    @override
    def staging(self, key: str) -> Path:
        path = self.path(key)
        make_durable_folder(path.parent)
        return path.with_name(path.name + PARTIAL)

    @override
    def discard(self, key: str) -> None:
        path = self.path(key)
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)

    @override
    def publish(self, key: str) -> None:
        path = self.path(key)
        path.with_name(path.name + PARTIAL).rename(path)
        fsync_folder(path.parent)

    @override
    def free_bytes(self) -> int | None:
        parent = self.root.absolute()
        while not parent.exists():
            parent = parent.parent
        return shutil.disk_usage(parent).free

    @override
    def claim(self, rank: int) -> Claim:
        return _FileClaim(self.path(writer_lock(rank)), self, rank)

    @override
    def locked(self) -> AbstractContextManager[None]:
        return lock_for_moments(self.path(_STORE_LOCK))

    @override
    def drop_locks(self, writers: int) -> None:
        self.path(_STORE_LOCK).unlink(missing_ok=True)
        for rank in range(writers):
            self.path(writer_lock(rank)).unlink(missing_ok=True)


class _FileClaim(Claim):
    """A lock on a file."""

    def __init__(self, path: Path, store: LocalFolder, rank: int) -> None:
        deadline = time.monotonic() + _LOOKED_AT_SECONDS
        try:
            while True:
                try:
                    self._lock = FileLock(path, again=False)
                    return
                except HeldError as held:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"{store}: {held} is writing part {rank} of this store. Wait for it or "
                            f"stop it; two captures cannot write the same part."
                        ) from None
                    time.sleep(0.02)
        except FileNotFoundError:
            raise UserError(
                f"{store}: part {rank} was finished just now by another process."
            ) from None

    @override
    def release(self, *, remove: bool) -> None:
        self._lock.release(remove=remove)


def process_is_gone(process: int, host: str) -> bool:
    """Whether a process has surely ended; only this machine's processes can be asked."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def open_folder(where: str | Path) -> StoreFolder:
    """The folder that a name on the command line stands for.

    Args:
        where: a path, or ``s3://bucket/path``, ``gs://...``, ``az://...``.

    Raises:
        UserError: object storage is named and its extra is not installed.
    """
    text = str(where)
    if "://" in text:
        from bsc.cache.store.remote import RemoteFolder

        return RemoteFolder(text)
    return LocalFolder(Path(where))
