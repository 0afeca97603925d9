"""What a check of a store has done, kept outside of the store: a check that was stopped goes on.

    ~/.cache/bsc/verify/<hash>.jsonl    or the file of `--journal`

One JSON line for each window of the manifest whose shards were all checked, after a first line that
says of which store. Lines are appended whole, and each has a hash of itself; half a line at the end
is that of a process that was killed, and is dropped. A window that has a line is not read again
while the manifest and the size and time of every file are as they were, unless it had problems.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from bsc.cache.store.folder import LocalFolder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import DATA
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json, write_atomically
from bsc.locks import FileLock, HeldError
from bsc.progress import console
from bsc.records import check_seal, parse_object, record_hash

__all__ = ["CheckedWindow", "VerifyJournal", "default_journal", "open_journal"]

_FORM = "journal of bsc verify"
_VERSION = 1
_SYNC_EVERY = 1.0
"""Seconds between calls that make it survive a power cut, too; a kill it survives anyway."""
_MOST_LINE = 1 << 16
"""Bytes of the first line at most: what a file of another kind is read to find out."""


class CheckedWindow(NamedTuple):
    """What the journal says of a window."""

    state: str
    """Hash of what the manifest and the files were; empty where a problem was found."""
    bytes: int
    """Of its shards that do not have to be read again."""


class VerifyJournal:
    """The journal of the checks of one store. To be used in a `with` block."""

    def __init__(self, path: Path, store: ActivationStore) -> None:
        """Read which windows were checked, or begin a journal where there is none.

        Args:
            path: of the file; it may not be there yet, or be empty.
            store: that is checked.

        Raises:
            UserError: the file is something else, or of another store; it lies in the store; it
                cannot be written; another process uses it.
            StoreError: a line in the middle is damaged.
        """
        self.path = path
        self.taken = 0
        """Bytes that were not read, since the journal has their windows."""
        self._windows: dict[tuple[str, int, int], CheckedWindow] = {}
        of = _of(store)
        if isinstance(store.folder, LocalFolder) and path.resolve().is_relative_to(
            store.folder.root.resolve()
        ):
            raise UserError(
                f"{path}: a journal in the store would be a foreign file there. Name a file "
                f"outside of {store.folder} with --journal."
            )
        try:
            self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        except HeldError as held:
            raise UserError(
                f"{path}: {held} checks {store.folder} with this journal. Wait for it or stop it, "
                f"or name another file with --journal."
            ) from None
        except OSError as error:
            raise _not_writable(path, error) from None
        try:
            self._open(of)
        except OSError as error:
            self._lock.release(remove=True)
            raise _not_writable(path, error) from None
        except BaseException:
            self._lock.release(remove=True)
            raise

    def _open(self, of: dict[str, Any]) -> None:
        first = _first_line(self.path) if self.path.exists() else None
        if first is None:
            first = {"form": _FORM, "version": _VERSION, **of, "began": _now()}
            write_atomically(self.path, _line(first))
        if first.get("version") != _VERSION:
            raise UserError(
                f"{self.path}: a journal of another version of bsc ({first.get('version')!r:.20}). "
                f"Name another file with --journal, or remove this one."
            )
        if {key: first.get(key) for key in of} != of:
            raise UserError(
                f"{self.path}: the journal of another store, {first.get('store')} with the id "
                f"{first.get('store_id')}, or of another copy of it. Name another file with "
                f"--journal, or remove this one to check {of['store']} from its beginning."
            )
        self.began = str(first.get("began"))
        """When the first of the checks that it keeps began."""
        self._file = self.path.open("r+b", buffering=0)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            place = len(file.readline())
            for number, line in enumerate(file, 2):
                if not line.endswith(b"\n"):
                    # Half a line of a process that was killed while it wrote.
                    self._file.truncate(place)
                    break
                remedy = "Remove that line; its window is checked again."
                where = f"{self.path}, line {number}"
                entry = check_seal(parse_object(line, where, remedy), where, remedy)
                try:
                    key = (str(entry["split"]), int(entry["rank"]), int(entry["window"]))
                    right = not entry["problems"]
                    checked = CheckedWindow(str(entry["state"]), int(entry["bytes"]))
                except (KeyError, TypeError, ValueError) as error:
                    raise StoreError(
                        f"{where}: not of the form that it should have ({error!r}). {remedy}"
                    ) from None
                self._windows[key] = checked if right else CheckedWindow("", 0)
                place += len(line)
        self._file.seek(place)

    @property
    def bytes(self) -> int:
        """Bytes of the windows that were found right."""
        return sum(window.bytes for window in self._windows.values())

    def get(self, split: Split, rank: int, window: int) -> CheckedWindow | None:
        """What was noted of a window; None where it was not checked, or had a problem."""
        known = self._windows.get((split, rank, window))
        return known if known is not None and known.state else None

    def take(self, known: CheckedWindow) -> None:
        """Note that a window is not read again."""
        self.taken += known.bytes

    def add(
        self, split: Split, rank: int, window: int, *, state: str, bytes_: int, problems: list[str]
    ) -> None:
        """Write that a window was checked.

        Args:
            split: of the window.
            rank: of its writer.
            window: its number.
            state: hash of what the manifest says of it and of its files, as they were before they
                were read.
            bytes_: size of its files.
            problems: that were found in it.

        Raises:
            OSError: the disk is full or fails.
        """
        entry = {
            "split": split,
            "rank": rank,
            "window": window,
            "state": state,
            "bytes": bytes_,
            "problems": [_unicode(problem) for problem in problems],
            "at": _now(),
        }
        line = memoryview(_line(entry))
        while line:
            line = line[self._file.write(line) :]
        self._windows[split, rank, window] = CheckedWindow("" if problems else state, bytes_)
        if time.monotonic() - self._synced > _SYNC_EVERY:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def remove(self) -> None:
        """Remove the file: everything was found right, and the next check begins anew."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> VerifyJournal:
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            self._sync()
        finally:
            self._file.close()
            self._lock.release(remove=True)


def default_journal(store: ActivationStore) -> Path:
    """Where the journal of a store is kept: a file of its own in the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    name = hashlib.sha256(canonical_json(_of(store)).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "bsc" / "verify" / f"{name}.jsonl"


def open_journal(path: Path | None, store: ActivationStore) -> VerifyJournal | None:
    """The journal of a store.

    Args:
        path: of the file; None: `default_journal`.
        store: that is checked.

    Returns:
        None where the default one cannot be written, which is said on stderr.

    Raises:
        UserError: as `VerifyJournal`.
    """
    if path is not None:
        return VerifyJournal(path, store)
    try:
        path = default_journal(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{path.parent} cannot be written")
    except (OSError, RuntimeError) as error:
        console.print(
            f"What is checked is not kept ({error}): a check that is stopped begins anew. "
            f"--journal names a file to keep it in.",
            markup=False,
        )
        return None
    return VerifyJournal(path, store)


def _of(store: ActivationStore) -> dict[str, Any]:
    """Which store a journal is of, and which copy: another one has to be read itself."""
    folder = store.folder
    inode = folder.path(DATA).stat().st_ino if isinstance(folder, LocalFolder) else 0
    return {"store": _unicode(folder.address), "store_id": store.store_id, "inode": inode}


def _line(value: dict[str, Any]) -> bytes:
    return canonical_json(value | {"xxh3_128": record_hash(value)}, indent=None).encode()


def _unicode(text: str) -> str:
    """Text with a path in it that JSON can hold: names of files may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _first_line(path: Path) -> dict[str, Any] | None:
    """The first line of a journal; None where the file is empty.

    Raises:
        UserError: it is no journal.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        line = file.readline(_MOST_LINE)
    if not line:
        return None
    try:
        first = check_seal(parse_object(line, path), path)
        if first.get("form") != _FORM or not line.endswith(b"\n"):
            raise StoreError("another form")
    except StoreError:
        raise UserError(
            f"{path}: not a journal of `bsc verify`. Name another file with --journal; this one is "
            f"left as it is."
        ) from None
    return first


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: no journal can be kept here ({error.strerror}). Name a file that you may write "
        f"to with --journal."
    )
