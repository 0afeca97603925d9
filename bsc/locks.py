"""Locks on files, which the kernel holds until a process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bsc.errors import StoreError

__all__ = ["FileLock", "HeldError", "holder", "lock_for_moments"]

_WAIT_SECONDS = 600.0
_LOOK_EVERY_SECONDS = 0.02


class HeldError(Exception):
    """Another process has the lock; its words say which."""


class FileLock:
    """A lock that this process has."""

    def __init__(self, path: Path, *, again: bool = True) -> None:
        """Take it, and write into the file who has it.

        Args:
            path: of the file, which is made if need be.
            again: whether to lock the new file where the old one was removed on the way.

        Raises:
            HeldError: another process has it.
            FileNotFoundError: the file was removed on the way.
            OSError: the file cannot be made or locked.
        """
        self.path = path
        self._descriptor = -1
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _locked(descriptor):
                    os.ftruncate(descriptor, 0)
                    words = f"process {os.getpid()} on {socket.gethostname()}\n"
                    os.write(descriptor, words.encode())
                    self._descriptor = descriptor
                    return
            finally:
                if self._descriptor < 0:
                    os.close(descriptor)
            if not again:
                raise FileNotFoundError(path)

    @property
    def descriptor(self) -> int:
        """Of the open file. A process that inherits it holds the lock too, until it ends."""
        return self._descriptor

    def release(self, *, remove: bool = False) -> None:
        """Let go; `remove` removes the file too."""
        if self._descriptor >= 0:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _locked(descriptor: int) -> bool:
    """Lock a file; False where it was removed before it was locked.

    Raises:
        HeldError: another process has the lock.
        OSError: the file cannot be locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise HeldError(_words(descriptor)) from None
    return os.fstat(descriptor).st_nlink > 0


def _words(descriptor: int) -> str:
    """Who has a lock, from its file."""
    return os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"


def holder(path: Path) -> str | None:
    """Who has the lock now; None where nobody has."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return _words(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_for_moments(path: Path) -> Iterator[None]:
    """Hold a lock that nobody holds for long, so that waiting for it is right.

    Raises:
        StoreError: another process has held it for ten minutes.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            lock = FileLock(path)
            break
        except HeldError:
            if time.monotonic() > deadline:
                raise StoreError(f"{path}: held by another process for ten minutes.") from None
            time.sleep(_LOOK_EVERY_SECONDS)
    try:
        yield
    finally:
        lock.release()
