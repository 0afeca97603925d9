from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr

from bsc.cache.capture.commit import advance
from bsc.cache.capture.staging import Staging
from bsc.cache.store.folder import LocalFolder, open_folder
from bsc.cache.store.kinds import CODECS, Codec
from bsc.cache.store.layout import Grid, array_specs
from bsc.cache.store.manifest import read_array_json, windows
from bsc.cache.store.shard import ShardWriter
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from tests.cache.synthetic import GRID, HOOKS, files_of, make_store, numbers


@pytest.mark.parametrize("codec", CODECS)
def test_every_row_is_written_once_and_is_the_same_row_in_every_array(
    tmp_path: Path, codec: Codec
) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4, codec=codec)
    store = ActivationStore(tmp_path / "s")
    assert sorted(numbers(store, exact=codec != "int8")) == list(range(960))
    assert list(verify(tmp_path / "s")) == []


def test_the_scatter_mixes_every_block_over_the_window(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, GRID, window=10)
    ids = numbers(ActivationStore(tmp_path / "s")).reshape(10, 96)
    for shard in ids:  # about a tenth of each tenth of the text
        per_tenth = np.bincount(shard // 96, minlength=10)
        assert per_tenth.min() >= 6 and per_tenth.max() <= 14


def test_one_shard_at_a_time_keeps_the_order(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, GRID, window=1)
    assert numbers(ActivationStore(tmp_path / "s")).tolist() == list(range(960))


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_rows_give_the_same_bytes_whatever_else(tmp_path: Path, codec: Codec) -> None:
    for name in ("a", "b"):
        make_store(tmp_path / name, 960, GRID, window=4, codec=codec)
    assert len(files_of(tmp_path / "a")) > 50
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stop_after", [37, 400, 480, 800])
def test_an_abandoned_writer_is_gone_on_with_and_gives_the_same_files(
    tmp_path: Path, codec: Codec, stop_after: int
) -> None:
    make_store(tmp_path / "a", 960, GRID, window=4, codec=codec)
    make_store(tmp_path / "b", 960, GRID, window=4, codec=codec, stop_after=stop_after)
    assert files_of(tmp_path / "a") != files_of(tmp_path / "b")
    make_store(tmp_path / "b", 960, GRID, window=4, codec=codec)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.parametrize("codec", CODECS)
def test_text_that_ends_early_fills_whole_shards_and_drops_less_than_one(
    tmp_path: Path, codec: Codec
) -> None:
    dropped = make_store(tmp_path / "s", 500, GRID, window=10, codec=codec)
    store = ActivationStore(tmp_path / "s")
    assert store.train.shards == 5 and dropped == 20
    assert len(set(numbers(store, exact=codec != "int8"))) == 480
    assert list(verify(tmp_path / "s")) == []
    assert not list((tmp_path / "s").rglob("*.partial"))


@pytest.mark.parametrize("codec", CODECS)
def test_tensorstore_and_zarr_open_every_array_of_every_codec(tmp_path: Path, codec: Codec) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4, codec=codec)
    split = ActivationStore(tmp_path / "s").train
    group: Any = zarr.open_group(tmp_path / "s/data.zarr", mode="r")
    for name, spec in split.specs.items():
        where = f"file://{tmp_path}/s/data.zarr/{spec.path}/"
        by_ts = ts.open({"driver": "zarr3", "kvstore": where}).result().read().result()
        ours = np.concatenate([split.shard(name, i) for i in range(10)])
        assert np.asarray(by_ts).tobytes() == ours.tobytes(), name
        assert np.asarray(group[spec.path][:]).tobytes() == ours.tobytes(), name


@pytest.mark.parametrize("writers", [2, 3])
def test_several_writers_make_one_store_in_any_order(tmp_path: Path, writers: int) -> None:
    grid = Grid(96, 24, 12)
    share = 960 * 12 // 10 // writers
    roots = [tmp_path / name for name in ("a", "b")]
    for root, order in zip(roots, (range(writers), reversed(range(writers))), strict=True):
        for i, rank in enumerate(order):
            make_store(root, share, grid, window=2, rank=rank, writers=writers, first=1000 * rank)
            store = ActivationStore(root)
            assert list(verify(root)) == []
            assert store.complete == (i == writers - 1)
            # Without a gap there are only the first shards of the writers that come first.
            assert store.train.shards == 12 if store.complete else store.train.shards <= i + 1
    expected = sorted(1000 * r + i for r in range(writers) for i in range(share))
    assert sorted(numbers(ActivationStore(roots[0]))) == expected
    assert files_of(roots[0]) == files_of(roots[1])


def test_one_of_two_writers_is_gone_on_with_alone(tmp_path: Path) -> None:
    grid = Grid(96, 24, 12)
    for name in ("a", "b"):
        make_store(tmp_path / name, 576, grid, window=2, rank=0, writers=2)
    make_store(tmp_path / "a", 576, grid, window=2, rank=1, writers=2, first=1000)
    make_store(tmp_path / "b", 576, grid, window=2, rank=1, writers=2, first=1000, stop_after=300)
    assert 0 < ActivationStore(tmp_path / "b").train.shards < 12
    make_store(tmp_path / "b", 576, grid, window=2, rank=1, writers=2, first=1000)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_writer_whose_text_ends_early_leaves_no_gap_that_a_reader_could_see(
    tmp_path: Path,
) -> None:
    grid = Grid(96, 24, 12)
    make_store(tmp_path / "s", 200, grid, window=2, rank=1, writers=2, first=1000)
    make_store(tmp_path / "s", 576, grid, window=2, rank=0, writers=2)
    store = ActivationStore(tmp_path / "s")
    assert store.complete and store.train.shards == 5  # 0 1 2 3 4; 5 is the other's third
    assert list(verify(tmp_path / "s")) == []
    assert not (tmp_path / "s/data.zarr/tokens/token_id/c/6").exists()
    completed = json.loads((tmp_path / "s/provenance.json").read_text())["completed"]
    assert completed["dropped_rows"] == {"train": 8 + 3 * 96}


def test_moments_come_from_the_manifest_and_are_those_of_the_rows(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    split = ActivationStore(tmp_path / "s").train
    rows = torch.cat([split.tensor("layers.0.mlp/output", i).double() for i in range(10)])
    moments = split.moments("layers.0.mlp/output")
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-6, atol=1e-12)


def test_rows_that_are_not_finite_are_counted_and_left_out_of_the_moments(tmp_path: Path) -> None:
    def spoil(b: dict[str, torch.Tensor]) -> None:
        b["layers.0.mlp/output"][3, 1] = float("nan")

    make_store(tmp_path / "s", 960, GRID, window=4, size=480, edit=spoil)
    split = ActivationStore(tmp_path / "s").train
    rows = torch.cat([split.tensor("layers.0.mlp/output", i).double() for i in range(10)])
    assert split.non_finite == split.non_finite_rows("layers.0.mlp/output") == 2
    good = rows[rows.isfinite().all(1)]
    moments = split.moments("layers.0.mlp/output")
    assert moments.rows == 958
    torch.testing.assert_close(moments.mean, good.mean(0), rtol=1e-6, atol=0)


def test_shape_is_the_commit_pointer(tmp_path: Path) -> None:
    """A crash between the bumps of two shapes leaves the last window unseen, and is repaired."""
    make_store(tmp_path / "s", 960, GRID, window=4)
    before = files_of(tmp_path / "s")
    path = tmp_path / "s/data.zarr/tokens/position/zarr.json"
    whole = ActivationStore(tmp_path / "s").train.moments("layers.0.mlp/input")
    read = ActivationStore(tmp_path / "s").train
    _, attributes = read_array_json(read.folder, read.spec("tokens/position"))
    path.write_text(canonical_json(read.spec("tokens/position").zarr_json(864, GRID, attributes)))
    split = ActivationStore(tmp_path / "s").train
    assert split.rows == 864
    # The sums of an array are over its own rows, also while another is behind.
    assert torch.equal(split.moments("layers.0.mlp/input").mean, whole.mean)
    folder, specs = open_folder(tmp_path / "s"), array_specs(HOOKS, "train")
    assert advance(folder, "train", specs, GRID, writers=1, window=4) == 10
    (tmp_path / "s/store.lock").unlink()
    assert files_of(tmp_path / "s") == before


def test_commit_order_is_files_then_manifest_then_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    publish, write = LocalFolder.publish, LocalFolder.write

    def spy_publish(self: LocalFolder, key: str) -> None:
        publish(self, key)
        assert self.path(key).exists()
        steps.append(("shard", key))

    def spy_write(self: LocalFolder, key: str, data: bytes) -> None:
        write(self, key, data)
        kind = "manifest" if "manifest/train" in key else ""
        if key.endswith("zarr.json") and json.loads(data).get("shape", [0])[0]:
            kind = "shape"
        steps.append((kind, key))

    monkeypatch.setattr(LocalFolder, "publish", spy_publish)
    monkeypatch.setattr(LocalFolder, "write", spy_write)
    make_store(tmp_path / "s", 960, GRID, window=5)
    kinds = "".join(kind[:1] for kind, _ in steps if kind)
    # Two windows of five shards and six arrays: 30 shards, a manifest, six shapes.
    one = "s" * 30 + "m" + "s" * 6
    assert kinds == one * 2
    assert [len(list(windows(open_folder(tmp_path / "s"), "train", 0)))] == [2]


def test_a_gap_between_arrays_of_different_grids_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4)
    path = tmp_path / "s/data.zarr/tokens/position/zarr.json"
    path.write_text(path.read_text().replace("96", "48"))
    with pytest.raises(StoreError, match=r"shard sizes|metadata|hash"):
        ActivationStore(tmp_path / "s")


def test_a_full_disk_stops_the_capture_with_what_is_committed_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "a", 960, GRID, window=4)
    append = ShardWriter.append

    def full(self: ShardWriter, rows: Any) -> None:
        if self.shard >= 6:
            raise OSError(28, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(OSError, match="No space left"):
        make_store(tmp_path / "b", 960, GRID, window=4)
    assert not list((tmp_path / "b").rglob("*.partial"))
    assert ActivationStore(tmp_path / "b").train.shards == 3
    monkeypatch.undo()
    make_store(tmp_path / "b", 960, GRID, window=4)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_model_waits_for_the_disk_and_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ShardWriter.append
    inside = threading.Semaphore(0)
    held: list[int] = []
    slot = Staging.slot

    def slow(self: ShardWriter, rows: Any) -> None:
        time.sleep(0.002)
        append(self, rows)

    def watch(self: Staging) -> Any:
        got = slot(self)
        held.append(len(self._free))
        return got

    monkeypatch.setattr(ShardWriter, "append", slow)
    monkeypatch.setattr(Staging, "slot", watch)
    make_store(tmp_path / "s", 960, GRID, window=4)
    assert sorted(numbers(ActivationStore(tmp_path / "s"))) == list(range(960))
    assert min(held) == 0 and max(held) <= 1 and not inside.acquire(blocking=False)


def test_a_part_has_one_writer(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4, stop_after=300)
    folder = open_folder(tmp_path / "s")
    claim = folder.claim(0)
    with pytest.raises(UserError, match=r"process \d+ on .* is writing part 0 of this store"):
        folder.claim(0)
    folder.claim(1).release(remove=True)
    claim.release(remove=False)
    folder.claim(0).release(remove=True)


def test_a_slot_is_free_only_when_the_last_of_its_work_is_done() -> None:
    """Also when the first piece ends before the second is queued."""
    staging = Staging(2, torch.device("cpu"))
    slot, other = staging.slot(), staging.slot()
    gate = threading.Event()
    first, second = staging.submit([lambda: None, lambda: gate.wait(10)], slot)
    first.result()
    assert slot not in staging._free
    gate.set()
    second.result()
    staging.submit([lambda: None, lambda: None], other)
    assert {id(staging.slot()), id(staging.slot())} == {id(slot), id(other)}
    staging.close()


@pytest.mark.parametrize("codec", ["lz4", "int8"])
def test_the_snippets_in_a_store_of_another_codec_open_it(tmp_path: Path, codec: Codec) -> None:
    make_store(tmp_path / "s", 960, GRID, window=4, codec=codec)
    text = (tmp_path / "s/README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(snippets) == {"lz4": 3, "int8": 4}[codec]
    expected = ActivationStore(tmp_path / "s").train
    printed = []
    for snippet in snippets:
        code = snippet + "\nimport numpy as np; print(np.asarray(rows).astype('<f4')[:3].tolist())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path / "s", capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    stored = expected.shard("layers.0.mlp/input", 0)[:3].astype("<f4").tolist()
    assert printed[:3] == [stored] * 3
    if codec == "int8":
        rows = expected.tensor("layers.0.mlp/input", 0)[:3].float().numpy()
        assert np.allclose(printed[3], rows, rtol=1e-2)


def test_writers_that_start_and_end_together_make_one_whole_store(tmp_path: Path) -> None:
    grid = Grid(96, 24, 12)
    for trial in range(4):
        root = tmp_path / f"s{trial}"
        barrier = threading.Barrier(3)

        def work(rank: int, root: Path = root, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            make_store(root, 384, grid, window=2, rank=rank, writers=3, first=1000 * rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store = ActivationStore(root)
        assert store.complete and store.train.shards == 12 and list(verify(root)) == []
        assert sorted(numbers(store)) == sorted(1000 * r + i for r in range(3) for i in range(384))


def test_a_writer_that_ends_while_another_looks_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed is counted after the ends are read, under one lock."""
    grid = Grid(96, 24, 12)
    make_store(tmp_path / "s", 576, grid, window=2, rank=1, writers=2, first=1000)
    from bsc.cache.capture import commit

    order: list[str] = []
    for name in ("read_end", "_advance"):
        real = getattr(commit, name)

        def spy(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            order.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(commit, name, spy)
    make_store(tmp_path / "s", 576, grid, window=2, rank=0, writers=2)
    assert order[-3:] == ["read_end", "read_end", "_advance"]
