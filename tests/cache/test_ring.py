"""A store that passes through a bounded disk while it is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store import ring_reader, ring_writer
from bsc.cache.store.folder import StoreFolder, open_folder
from bsc.cache.store.layout import Grid, array_specs
from bsc.cache.store.loader import START, Cursor, Loader
from bsc.cache.store.ring import drop_reader, readers, write_cursor
from bsc.cache.store.ring_reader import RingReader, reading
from bsc.cache.store.ring_status import ring_status
from bsc.cache.store.ring_writer import RingWriter
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.errors import StoreError, UserError
from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from tests.cache.synthetic import HOOKS, make_store

SLOTS, WINDOW = 8, 4
GRID = Grid(24, 12, SLOTS * 20)
SPECS = array_specs(HOOKS, "train")


def shards_on_disk(root: Path) -> int:
    return len(list((root / "data.zarr/tokens/token_id/c").glob("[0-9]*")))


def write(root: Path, rows: int = GRID.rows) -> None:
    ring = RingWriter(open_folder(root), SPECS, GRID, SLOTS)
    make_store(
        root, rows, GRID, window=WINDOW, ring=SLOTS, size=50, before_window=ring.wait_for_room
    )


def read(root: Path, name: str, delay: float = 0.0) -> list[int]:
    """Every row that a reader gets, by the number that stands in it."""
    store = ActivationStore(root)
    split = store.train
    names = ("layers.0.mlp/input", "layers.0.mlp/output")
    loader = Loader(split, names, batch_rows=30, seed=0, shards_at_once=2, drop_last=False)
    got: list[int] = []
    with reading(RingReader(store.folder, split.specs, split.grid, name)) as ring:
        start = Cursor(0, ring.next_shard, 0)
        for x, y in loader.ring_batches(start, lambda: ActivationStore(root).complete):
            ring.passed(loader.cursor.group)  # as if there were a checkpoint at each batch
            numbers = (x[:, 0].float() + 128 * x[:, 1].float()).int()
            assert torch.equal(numbers, (-y[:, 4].float() - 128 * y[:, 5].float()).int())
            got += numbers.tolist()
            time.sleep(delay)
    return got


def test_twenty_rings_pass_and_every_reader_sees_every_row_once(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    write_thread = threading.Thread(target=write, args=(root,))
    write_thread.start()
    while not (root / "provenance.json").exists():
        time.sleep(0.01)
    results: dict[str, list[int]] = {}
    threads = [
        threading.Thread(target=lambda n=name, d=delay: results.update({n: read(root, n, d)}))
        for name, delay in (("fast", 0.0), ("slow", 0.01))
    ]
    for thread in threads:
        thread.start()
    most = 0
    while any(t.is_alive() for t in [write_thread, *threads]):
        most = max(most, shards_on_disk(root))
        time.sleep(0.01)
    write_thread.join()
    expected = Counter(range(GRID.rows))
    assert GRID.shards == 20 * SLOTS
    assert Counter(results["fast"]) == expected and Counter(results["slow"]) == expected
    assert WINDOW < most <= SLOTS
    # Both have left; what no reader needs any more is gone, and the rest is right.
    assert readers(open_folder(root)) == [] and shards_on_disk(root) < SLOTS
    assert list(verify(root)) == []


def settled(root: Path) -> int:
    """Committed shards once they have not changed for a second."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0 or last <= 0:
        now = ActivationStore(root).train.shards
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)
    return last


def test_the_writer_waits_for_the_slowest_reader(tmp_path: Path) -> None:
    root = tmp_path / "acts"
    thread = threading.Thread(target=write, args=(root,), daemon=True)
    thread.start()
    while not (root / "provenance.json").exists():
        time.sleep(0.01)
    store = ActivationStore(root)
    ring = RingReader(store.folder, SPECS, GRID, "stuck")
    before = settled(root)
    assert 0 < before <= SLOTS and thread.is_alive()
    ring.passed(4)
    deadline = time.monotonic() + 60
    while ActivationStore(root).train.shards < before + 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert settled(root) == before + 4
    assert not (root / "data.zarr/tokens/token_id/c/3").exists()
    ring.passed(GRID.shards)  # let it end
    ring.close(leave=True)
    last = RingReader(store.folder, SPECS, GRID, "drain")
    while thread.is_alive():
        last.passed(GRID.shards)
        time.sleep(0.05)
    last.close(leave=True)


def test_a_dead_reader_is_named_and_can_come_back_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "acts"
    make_store(root, GRID.rows, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=200)
    child = subprocess.run(
        [sys.executable, "-c", f"""
import os
from bsc.cache.store.folder import open_folder
from bsc.cache.store.ring_reader import RingReader
from tests.cache.test_ring import GRID, SPECS
ring = RingReader(open_folder({str(root)!r}), SPECS, GRID, "lost")
ring.passed(3)
os._exit(9)
"""],
        cwd=Path(__file__).parent.parent.parent, check=False,
    )  # fmt: skip
    assert child.returncode == 9
    folder = open_folder(root)
    (cursor,) = readers(folder)
    assert (cursor.reader, cursor.next_shard) == ("lost", 3) and cursor.is_dead()
    writer = RingWriter(folder, SPECS, GRID, SLOTS)
    thread = threading.Thread(target=writer.wait_for_room, args=([8, 9, 10, 11],), daemon=True)
    thread.start()
    said, deadline = "", time.monotonic() + 30
    while "holds the ring" not in said and time.monotonic() < deadline:
        time.sleep(0.05)
        said += capsys.readouterr().err.replace("\n", " ")
    assert f"reader lost (process {cursor.process} on " in said and "is gone and holds" in said
    assert "holds the ring at shard 3" in said and thread.is_alive()
    back = RingReader(folder, SPECS, GRID, "lost")
    assert back.next_shard == 3
    back.passed(4)
    thread.join(30)
    assert not thread.is_alive()
    back.close(leave=True)


def foreign(folder: StoreFolder, reader: str, beat: int) -> None:
    """The cursor of a process of another machine."""
    value = {"reader": reader, "next_shard": 0, "beat": beat, "process": 7, "host": "elsewhere"}
    folder.write(f"ring/{reader}.json", json.dumps(value).encode())


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_reader, "BEAT_SECONDS", 0.1)


@pytest.mark.usefixtures("quick_beats")
def test_two_processes_cannot_read_a_ring_under_one_name(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 200, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=100)
    folder = open_folder(tmp_path / "s")
    foreign(folder, "one", 1)
    stop = threading.Event()

    def beat() -> None:
        n = 1
        while not stop.wait(0.05):
            foreign(folder, "one", n := n + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"reader one \(process 7 on elsewhere\) reads this ring"):
        RingReader(folder, SPECS, GRID, "one")
    with pytest.raises(UserError, match=r"is reading now\. Stop that process first"):
        drop_reader(folder, "one", lambda seconds: time.sleep(0.2))
    stop.set()
    thread.join()
    # It was killed, and its job is started again on another machine.
    mine = RingReader(folder, SPECS, GRID, "one")
    assert mine.next_shard == 0
    mine.close(leave=True)


def test_a_reader_that_does_not_come_back_is_dropped(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 400, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=350)
    folder = open_folder(tmp_path / "s")
    alive = RingReader(folder, SPECS, GRID, "alive")
    alive.passed(4)
    foreign(folder, "lost", 5)
    os.utime(tmp_path / "s/ring/lost.json", (0, 0))
    status = ring_status(ActivationStore(tmp_path / "s"))
    assert [(r.name, r.next_shard, r.state) for r in status.readers] == [
        ("alive", 4, "alive"), ("lost", 0, "silent"),
    ]  # fmt: skip
    assert "--drop lost" in (status.waits_for() or "") and status.committed == 12
    with pytest.raises(UserError, match=r"no reader last. There are alive, lost"):
        drop_reader(folder, "last")
    assert drop_reader(folder, "lost", lambda seconds: None).next_shard == 0
    alive.passed(5)
    assert shards_on_disk(tmp_path / "s") == 12 - 5
    assert "reader alive" in (ring_status(ActivationStore(tmp_path / "s")).waits_for() or "")
    alive.passed(8)
    assert "part 0" in (ring_status(ActivationStore(tmp_path / "s")).waits_for() or "")
    alive.close(leave=True)


def test_readers_of_one_run_begin_at_one_shard(tmp_path: Path) -> None:
    """Whenever they are started: places are kept for those that are not there yet."""
    make_store(tmp_path / "s", 400, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=350)
    folder, names = open_folder(tmp_path / "s"), ["run.0", "run.1"]
    first = RingReader(folder, SPECS, GRID, "run.0", others=names)
    first.passed(6)
    assert (tmp_path / "s/data.zarr/tokens/token_id/c/0").exists()
    (states,) = {tuple(r.state for r in ring_status(ActivationStore(tmp_path / "s")).readers)}
    assert states == ("alive", "not started")
    second = RingReader(folder, SPECS, GRID, "run.1", others=names)
    assert second.next_shard == 0
    second.passed(6)
    second.close(leave=True)
    # One that is started again makes no place for one that has ended.
    first.close(leave=False)
    again = RingReader(folder, SPECS, GRID, "run.0", others=names)
    assert [c.reader for c in readers(folder)] == ["run.0"] and again.next_shard == 6
    again.close(leave=True)


def test_several_writers_and_a_text_that_ends_early(tmp_path: Path) -> None:
    """Three writers, real threads; the text of one ends after a quarter of its shards."""
    root, grid = tmp_path / "acts", Grid(24, 12, 60)
    rows = {0: 20 * 24, 1: 5 * 24 + 7, 2: 20 * 24}

    def write_part(rank: int) -> None:
        ring = RingWriter(open_folder(root), SPECS, grid, 12, rank=rank, writers=3)
        make_store(
            root, rows[rank], grid, window=2, ring=12, size=50, rank=rank, writers=3,
            first=1000 * rank, before_window=ring.wait_for_room,
        )  # fmt: skip

    threads = [threading.Thread(target=write_part, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    while not (root / "provenance.json").exists():
        time.sleep(0.01)
    got = read(root, "one")
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    # Shard 1 + 3 * 5 is the first that is missing.
    status = ring_status(ActivationStore(root))
    assert (status.ends_at, status.committed) == (16, 16)
    assert [w.state for w in status.writers] == ["finished"] * 3
    assert len(got) == len(set(got))
    assert Counter(n // 1000 for n in got) == {0: 6 * 24, 1: 5 * 24, 2: 5 * 24}
    assert list(verify(root)) == [] and ActivationStore(root).complete


def test_a_writer_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_writer, "SILENT_SECONDS", 0.2)
    root, grid = tmp_path / "acts", Grid(24, 12, 60)
    make_store(root, 480, grid, window=2, ring=12, size=50, writers=3, stop_after=200)
    writer = RingWriter(open_folder(root), SPECS, grid, 12, rank=0, writers=3)
    thread = threading.Thread(target=writer.wait_for_room, args=([12, 15],), daemon=True)
    thread.start()
    said, deadline = "", time.monotonic() + 30
    while "with --rank 1" not in said and time.monotonic() < deadline:
        time.sleep(0.05)
        said += capsys.readouterr().err.replace("\n", " ")
    assert "shard 1 is the next that readers need" in said
    last = RingReader(open_folder(root), SPECS, grid, "drain")
    last.passed(grid.shards)
    thread.join(30)
    assert not thread.is_alive()
    last.close(leave=True)


def test_a_beat_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ring_reader, "BEAT_SECONDS", 0.05)
    make_store(tmp_path / "s", 200, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=100)
    reader = RingReader(open_folder(tmp_path / "s"), SPECS, GRID, "one")
    real, left = write_cursor, [3]

    def full(*args: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr("bsc.cache.store.ring_reader.write_cursor", full)
    before = readers(reader.folder)[0].beat
    deadline = time.monotonic() + 20
    while readers(reader.folder)[0].beat < before + 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert readers(reader.folder)[0].beat >= before + 5 and left == [0]
    assert capsys.readouterr().err.count("No space left") == 1
    reader.close(leave=True)


def test_a_damaged_cursor_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 200, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=100)
    folder = open_folder(tmp_path / "s")
    with pytest.raises(UserError, match="needs a name of letters"):
        RingReader(folder, SPECS, GRID, "../x")
    good = {"reader": "x", "next_shard": 0, "beat": 1, "process": 1, "host": "h"}
    for wrong in ("[1", *({**good, **bad} for bad in (
        {"next_shard": "5"}, {"next_shard": 1.5}, {"beat": True}, {"host": 7}, {"reader": "y"},
        {"process": -1}, {"more": 1},
    ))):  # fmt: skip
        text = wrong if isinstance(wrong, str) else json.dumps(wrong)
        folder.write("ring/x.json", text.encode())
        with pytest.raises(StoreError, match=r"ring/x\.json: not the cursor of a reader"):
            readers(folder)


def test_a_capture_and_a_training_run_at_the_same_time(tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "acts"
    config = CaptureConfig(
        model=str(tiny_model), store=root, text=TextSource(corpus="stdlib", held_out=0.2),
        hookpoints=("layers.1.mlp",), tokens=40_000, held_out_tokens=500, context=32,
        batch_tokens=512, ring=6,
    )  # fmt: skip
    thread = threading.Thread(target=capture, args=(config,))
    thread.start()
    while not (root / "provenance.json").exists():
        time.sleep(0.01)
    sweep = TrainConfig(
        store=root, runs=tmp_path / "runs", name="live", batch_rows=250, log_every=1,
        coders=({"k": [4], "n_latents": 64},),
    )  # fmt: skip
    run, summaries = train_sweep(sweep)
    thread.join()
    store = ActivationStore(root)
    assert store.complete and store.train.rows == 40_000
    assert run.config()["completed"]["rows"] == 40_000
    assert len(summaries) == 1 and (summaries[0].fvu or 9) < 1
    assert shards_on_disk(root) < 6 and list(verify(root)) == []
    with pytest.raises(UserError, match="a ring, through which 40,000 rows pass once"):
        train_sweep(sweep.model_copy(update={"tokens": 50_000, "name": "more"}))


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_reader_that_stops_early_does_not_wait_for_shards(tmp_path: Path, ahead: int) -> None:
    root = tmp_path / "s"
    make_store(root, GRID.rows, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=250)
    store = ActivationStore(root)
    names = ("layers.0.mlp/input",)
    loader = Loader(store.train, names, batch_rows=24, seed=0, shards_at_once=2, ahead=ahead)
    ring = RingReader(store.folder, SPECS, GRID, "early")
    batches = loader.ring_batches(START, lambda: False)
    for _ in range(4 if ahead else 8):
        next(batches)
    started = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    ring.close(leave=True)
    assert time.monotonic() - started < 20


def test_rows_that_are_not_finite_do_not_come_out_of_a_ring(tmp_path: Path) -> None:
    """Also when they were committed after the reader began."""
    root = tmp_path / "s"

    def spoil(b: dict[str, torch.Tensor]) -> None:
        if int(b["tokens/token_id"][0]) >= 100:
            b["layers.0.mlp/output"][0, 0] = float("nan")

    make_store(root, GRID.rows, GRID, window=WINDOW, ring=SLOTS, size=50, stop_after=100)
    store = ActivationStore(root)
    loader = Loader(store.train, ("layers.0.mlp/output",), batch_rows=24, seed=0, drop_last=False)
    make_store(root, 600, GRID, window=WINDOW, ring=SLOTS, size=50, edit=spoil)
    with reading(RingReader(store.folder, SPECS, GRID, "late")):
        rows = torch.cat([b.clone() for (b,) in loader.ring_batches(START, lambda: True)])
    assert rows.isfinite().all() and len(rows) == 600 - 10
