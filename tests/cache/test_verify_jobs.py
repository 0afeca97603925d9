"""`verify` by several threads, and one that goes on where another was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bsc.cache.store import verify_shards
from bsc.cache.store.folder import open_folder
from bsc.cache.store.layout import Grid
from bsc.cache.store.manifest import read_window, write_window
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.cache.store.verify_journal import VerifyJournal, default_journal
from bsc.cache.store.verify_shards import ShardPool
from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.records import record_hash
from tests.cache.checking import checked, flip, made, read, shard, store
from tests.cache.synthetic import make_store

__all__ = ["made", "read", "store"]  # fixtures

WINDOWS = (2, 3, 2, 3)
"""Shards of each window; of six arrays."""


def stopped(store: Path, journal: Path, windows: int) -> None:
    """A process that is killed (really) while it writes the line of another window."""
    program = f"""
import os, signal
from bsc.cache.store import verify_journal
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
real, lines = verify_journal._line, []
def line(value):
    lines.append(value)
    if len(lines) == {windows} + 2:  # the first says which store it is
        os.write(kept._file.fileno(), real(value)[:40])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(value)
verify_journal._line = line
store = {str(store)!r}
kept = verify_journal.open_journal(verify_journal.Path({str(journal)!r}), ActivationStore(store))
list(verify(store, journal=kept))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def damaged(store: Path) -> None:
    flip(shard(store, 1))
    flip(shard(store, 7, "output"))
    shard(store, 5).unlink()
    shard(store, 8).write_bytes(b"short")
    (store / "data.zarr/notes.txt").write_text("x")
    (store / "data.zarr/layers.0.mlp/input/c/99").mkdir()
    shard(store, 99).write_text("x")
    manifest = store / "manifest/train/0-000001.jsonl"
    manifest.write_text(manifest.read_text()[:-10])


def test_problems_and_their_order_are_the_same_whatever_the_number_of_jobs(store: Path) -> None:
    damaged(store)
    one = list(verify(store, jobs=1))
    assert one == list(verify(store, jobs=3)) == list(verify(store))
    named = ["input/c/1/0: chunk 0", "output/c/7/0: chunk 0", "input/c/8/0: 5 bytes", "notes.txt",
             "input/c/99/0: does not", "0-000001.jsonl: cut or changed"]  # fmt: skip
    for words in named:
        assert sum(words in problem for problem in one) == 1, (words, one)
    assert any("input/c/4/0: committed, but the manifest has no line" in p for p in one)


def test_memory_does_not_grow_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_shards, "_BLOCK", 4096)
    peaks = []
    for shards in (48, 240):
        root = tmp_path / str(shards)
        make_store(root, shards * 8, Grid(8, 2, shards), window=4)
        assert list(verify(root, jobs=2)) == []  # what is made once
        found = []
        for _ in range(3):  # the interpreter's own tables grow by megabytes at some of them
            tracemalloc.start()
            assert list(verify(root, jobs=2)) == []
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        peaks.append(min(found))
    # Half a kilobyte for each of the 192 shards more, of six arrays: their numbers and stamps.
    assert peaks[1] - peaks[0] < 192 * 512, peaks


def test_a_slow_window_holds_nothing_back_and_order_is_kept(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        flip(shard(store, number))
    expected = list(verify(store, jobs=1))
    real = ShardPool._content
    later = threading.Event()

    def slow(self: ShardPool, key: str, *rest: Any) -> list[str]:
        if "input/c/0/" in key:
            assert later.wait(30), "nothing of the next window was begun"
        if "input/c/3/" in key:
            later.set()
        return real(self, key, *rest)

    monkeypatch.setattr(ShardPool, "_content", slow)
    assert list(verify(store, jobs=3)) == expected and len(expected) == 10


@pytest.mark.parametrize("windows", [0, 1, 3])
def test_a_killed_check_goes_on_and_reads_only_what_was_left(
    store: Path, tmp_path: Path, windows: int, read: list[str]
) -> None:
    flip(shard(store, 8))
    plain = list(verify(store))
    read.clear()
    journal = tmp_path / "kept.jsonl"
    stopped(store, journal, windows)
    lines = journal.read_text().splitlines()
    assert len(lines) == windows + 2 and len(lines[-1]) == 40  # half a line at the end
    problems, n_read, taken = checked(store, journal)
    left = sum(WINDOWS[windows:])  # the flipped shard lies in the last window
    assert problems == plain and len(plain) == 1
    assert len(read) == 6 * left == len(set(read))
    total = ActivationStore(store).bytes
    assert n_read + taken == total and taken == total * (10 - left) // 10


def test_without_a_repair_problems_come_again_and_with_one_only_they_are_read(
    store: Path, tmp_path: Path, read: list[str]
) -> None:
    journal = tmp_path / "kept.jsonl"
    flip(shard(store, 4))
    first, *_ = checked(store, journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["problems"] for line in lines[1:]] == [[], first, [], []]
    read.clear()
    assert checked(store, journal)[0] == first and len(read) == 18
    flip(shard(store, 4))
    read.clear()
    problems, n_read, taken = checked(store, journal)
    assert problems == [] and len(read) == 18 and n_read + taken == ActivationStore(store).bytes


def test_a_file_that_was_written_after_its_line_is_read_again(
    store: Path, tmp_path: Path, read: list[str]
) -> None:
    journal = tmp_path / "kept.jsonl"
    assert checked(store, journal)[0] == []
    read.clear()
    total = ActivationStore(store).bytes
    assert checked(store, journal) == ([], 0, total) and read == []
    path, status = shard(store, 9), shard(store, 9).stat()
    flip(path)  # of the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    problems, n_read, taken = checked(store, journal)
    assert len(problems) == 1 and str(path) in problems[0]
    # What the bar counted as done is taken back and counted anew.
    assert len(read) == 18 and n_read == 0 and taken == total * 7 // 10
    shard(store, 0).unlink()
    problems, *_ = checked(store, journal)
    assert problems == [f"{shard(store, 0)}: missing", *problems[1:]] and len(problems) == 2


def test_a_manifest_that_changed_is_compared_again(
    store: Path, tmp_path: Path, read: list[str]
) -> None:
    journal = tmp_path / "kept.jsonl"
    assert checked(store, journal)[0] == []
    folder = open_folder(store)
    window = read_window(folder, "train", 0, 0)
    assert window is not None
    first = replace(window.shards[0], xxh3_128="0" * 32)
    write_window(folder, replace(window, shards=(first, *window.shards[1:])))
    problems, *_ = checked(store, journal)
    assert len(problems) == 1 and "the footer is changed" in problems[0]


def test_sums_of_the_manifest_are_added_up_and_compared(store: Path) -> None:
    folder = open_folder(store)
    window = read_window(folder, "train", 0, 2)
    assert window is not None
    at = next(i for i, line in enumerate(window.shards) if line.sums is not None)
    sums = window.shards[at].sums
    assert sums is not None
    sums.sum[0] += 1
    write_window(folder, window)
    (problem,) = verify(store)
    assert problem.endswith("zarr.json: the channel sums are changed")


def test_half_a_line_at_the_end_is_dropped_however_long(
    store: Path, tmp_path: Path, read: list[str]
) -> None:
    journal = tmp_path / "kept.jsonl"
    checked(store, journal)
    whole = journal.read_bytes()
    cut = whole.index(b"\n", whole.index(b"\n") + 1) + 1  # one window is left
    journal.write_bytes(whole[:cut] + b'{"at": "' + b"x" * 99_999)
    read.clear()
    assert checked(store, journal)[0] == [] and len(read) == 6 * sum(WINDOWS[1:])
    assert len(journal.read_bytes()) == len(whole)
    read.clear()
    assert checked(store, journal)[0] == [] and read == []


def test_journals_that_are_not_of_this_store_are_refused_and_left(
    store: Path, tmp_path: Path
) -> None:
    opened = ActivationStore(store)
    journal = tmp_path / "kept.jsonl"
    checked(store, journal)
    other = shutil.copytree(store, tmp_path / "other")
    before = journal.read_bytes()
    with pytest.raises(UserError, match=r"the journal of another store, .*/s with the id \w{16}"):
        VerifyJournal(journal, ActivationStore(other))
    os.rename(store, tmp_path / "gone")
    os.rename(other, store)  # the same place and store, but files that nobody has read
    with pytest.raises(UserError, match="or of another copy of it"):
        VerifyJournal(journal, ActivationStore(store))
    assert journal.read_bytes() == before
    sealed_otherwise: dict[str, object] = {"form": "another", "version": 1}
    sealed_otherwise["xxh3_128"] = record_hash(sealed_otherwise)
    line = canonical_json(sealed_otherwise, indent=None).encode()
    for content in (line, b"notes of mine", b"\x00\xff" * 99_999, b'{"form": 1}\n', b"[]\n"):
        journal.write_bytes(content)
        with pytest.raises(UserError, match="not a journal of `bsc verify`"):
            VerifyJournal(journal, opened)
        assert journal.read_bytes() == content
    with pytest.raises(UserError, match="no journal can be kept here"):
        VerifyJournal(tmp_path, opened)
    with pytest.raises(UserError, match="no journal can be kept here"):
        VerifyJournal(tmp_path / "nowhere/kept.jsonl", opened)
    with pytest.raises(UserError, match="would be a foreign file"):
        VerifyJournal(store / "kept.jsonl", opened)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gone", "kept.jsonl", "s"]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(
    store: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "kept.jsonl"
    checked(store, journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(
        "".join([*lines[:2], lines[2].replace('"bytes": ', '"bytes": 1'), *lines[3:]])
    )
    with pytest.raises(
        StoreError, match=r"line 3: changed since it was written.* Remove that line"
    ):
        checked(store, journal)
    journal.write_text("".join([*lines[:2], *lines[3:]]))
    assert checked(store, journal)[0] == []


def test_two_processes_do_not_share_a_journal(store: Path, tmp_path: Path) -> None:
    journal = tmp_path / "kept.jsonl"
    with (
        VerifyJournal(journal, ActivationStore(store)),
        pytest.raises(UserError, match=rf"process {os.getpid()} on .* checks .* with this journal"),
    ):
        VerifyJournal(journal, ActivationStore(store))
    assert not journal.with_name("kept.jsonl.lock").exists()


Bsc = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bsc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Bsc:
    """The command line, with a home folder of its own: exit code, stdout and stderr."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        said = capfd.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_the_same_command_goes_on_after_ctrl_c(
    store: Path, bsc: Bsc, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    add = VerifyJournal.add

    def interrupted(self: VerifyJournal, split: Any, rank: int, window: int, **rest: Any) -> None:
        if window == 2:
            raise KeyboardInterrupt
        add(self, split, rank, window, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(VerifyJournal, "add", interrupted)
        code, _, said = bsc("verify", store, "--jobs", 1)
    assert code == 130 and "the same command goes on with the others." in said
    kept = default_journal(ActivationStore(store))
    assert len(kept.read_text().splitlines()) == 3
    read.clear()
    code, out, said = bsc("verify", store, "--jobs", 2)
    assert code == 0 and len(read) == 30, said
    assert "verify: goes on after" in said and str(kept) in said.replace("\n", "")
    assert "every byte is right (960 train rows); " in out and "were checked before" in out
    # All was right, so the next check reads everything.
    assert not kept.exists()
    read.clear()
    assert bsc("verify", store)[0] == 0 and len(read) == 60


def test_what_was_right_is_kept_for_the_check_after_a_repair(
    store: Path, bsc: Bsc, tmp_path: Path, read: list[str]
) -> None:
    flip(shard(store, 0))
    journal = tmp_path / "kept.jsonl"
    code, out, said = bsc("verify", store, "--journal", journal)
    assert code == 1 and "c/0/0: chunk 0" in out and "What is right is kept in" in said
    flip(shard(store, 0))
    read.clear()
    code, out, _ = bsc("verify", store, "--journal", journal, "--json")
    total = ActivationStore(store).bytes
    assert code == 0 and json.loads(out)["bytes_checked_before"] == total * 8 // 10
    assert len(read) == 12 and not journal.exists()


def test_mistakes_on_the_command_line_have_one_message(
    store: Path, bsc: Bsc, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("mine")
    for arguments, words in (
        (["--jobs", 0], "--jobs: should be at least 1, got 0."),
        (["--quick", "--journal", tmp_path / "j"], "--quick reads no rows"),
        (["--journal", text], "not a journal of `bsc verify`"),
    ):
        code, out, said = bsc("verify", store, *arguments)
        assert code == 2 and out == "" and said.count("error:") == 1 and words in said
    assert text.read_text() == "mine"


def test_a_home_that_cannot_be_written_only_means_that_nothing_is_kept(
    store: Path, bsc: Bsc, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    code, out, said = bsc("verify", store)
    assert code == 0 and "every byte is right" in out and "What is checked is not kept" in said
