"""Locks on files: one holder, who is named, and none left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsc.locks import FileLock, HeldError, holder, lock_for_moments


def test_one_holder_who_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert holder(path) is None
    lock = FileLock(path)
    code = f"""
from pathlib import Path
from bsc.locks import FileLock, HeldError, holder
try:
    FileLock(Path({str(path)!r}))
except HeldError as error:
    print(error, "|", holder(Path({str(path)!r})))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split(" | ")[0].startswith(f"process {os.getpid()} on ")
    assert said.stdout.split(" | ")[1].strip() == said.stdout.split(" | ")[0]
    lock.release(remove=True)
    assert not path.exists() and holder(path) is None
    FileLock(path).release()


def test_a_file_that_was_removed_on_the_way_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would have a lock each, one of a file that is gone."""
    path = tmp_path / ".lock"
    opened = os.open
    removed: list[bool] = []

    def gone(*given: object) -> int:
        descriptor = opened(*given)  # type: ignore[arg-type]
        if not removed:
            os.unlink(path)
            removed.append(True)
        return descriptor

    monkeypatch.setattr("bsc.locks.os.open", gone)
    with pytest.raises(FileNotFoundError):
        FileLock(path, again=False)
    removed.clear()
    lock = FileLock(path)
    monkeypatch.undo()
    assert path.exists()
    with pytest.raises(HeldError):
        FileLock(path)
    lock.release()


@pytest.mark.parametrize("fault", ["write", "ftruncate"])
def test_a_lock_that_could_not_be_signed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"bsc.locks.os.{fault}", full)
    with pytest.raises(OSError, match="No space"):
        FileLock(tmp_path / ".lock")
    monkeypatch.undo()
    FileLock(tmp_path / ".lock").release()


def test_no_permission_to_lock_means_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("bsc.locks.fcntl.flock", refused)
    with pytest.raises(HeldError):
        FileLock(tmp_path / ".lock")


def test_a_lock_for_moments_is_let_go_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "merge.lock"
    with pytest.raises(ZeroDivisionError), lock_for_moments(path):
        raise ZeroDivisionError
    with lock_for_moments(path):
        pass
