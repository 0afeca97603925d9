"""Rows as a dataset of torch: every row once, whoever reads."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bsc.cache.store.dataset import RowDataset, _check_start
from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError, StoreError
from tests.cache.synthetic import GRID, make_store

HOOK = "layers.0.mlp"
SHARDS = 10


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows that say which one they are."""
    folder = tmp_path_factory.mktemp("numbered") / "acts"
    make_store(folder, SHARDS * GRID.shard_rows, GRID, window=2)
    return ActivationStore(folder)


def rows(batches: Sequence[tuple[torch.Tensor, ...]]) -> list[int]:
    """Numbers of the rows, of which both sides say the same."""
    x = torch.cat([batch[0].long() for batch in batches])
    y = torch.cat([batch[1].long() for batch in batches])
    assert torch.equal(x[:, :2], y[:, :2])
    return (x[:, 0] + 128 * x[:, 1]).tolist()


def test_an_epoch_has_every_row_once_in_another_order_each_time(numbered: ActivationStore) -> None:
    dataset = numbered.train.dataset(HOOK, batch_rows=32)
    first = rows(list(dataset))
    assert sorted(first) == list(range(numbered.train.rows)) != first
    assert rows(list(dataset)) == first
    dataset.set_epoch(1)
    second = rows(list(dataset))
    assert sorted(second) == sorted(first) and second != first
    batches = list(dataset)
    assert batches[0][0].dtype == torch.bfloat16 and batches[0][0].shape == (32, 4)
    assert batches[0][1].shape == (32, 6)
    assert len({batch[0].data_ptr() for batch in batches}) == len(batches), "they can be kept"


def test_in_the_order_of_the_store(numbered: ActivationStore) -> None:
    dataset = numbered.train.dataset(HOOK, batch_rows=50, shuffle=False, drop_last=False)
    stored = [
        tuple(numbered.train.tensor(f"{HOOK}/{side}", shard) for side in ("input", "output"))
        for shard in range(SHARDS)
    ]
    assert rows(list(dataset)) == rows(stored)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_shards_of_their_own(numbered: ActivationStore, context: str) -> None:
    dataset = numbered.train.dataset(HOOK, batch_rows=32, drop_last=False)
    loader = DataLoader(dataset, batch_size=None, num_workers=3, multiprocessing_context=context)
    assert sorted(rows(list(loader))) == list(range(numbered.train.rows))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_as_many_batches_and_no_row_in_common(
    numbered: ActivationStore, world: int
) -> None:
    each = [
        list(numbered.train.dataset(HOOK, batch_rows=32, rank=rank, world=world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in each}) == 1
    given = [row for batches in each for row in rows(batches)]
    assert len(set(given)) == len(given) == SHARDS // world * world * GRID.shard_rows
    whole = [
        row
        for rank in range(world)
        for row in rows(
            list(
                numbered.train.dataset(HOOK, batch_rows=32, rank=rank, world=world, drop_last=False)
            )
        )
    ]
    assert sorted(whole) == list(range(numbered.train.rows))


def test_one_side_left_out_tokens_and_a_copy(store: ActivationStore) -> None:
    ids = store.train.tokens("token_id")
    token = int(ids[0])
    dataset = store.train.dataset(
        "layers.2.mlp", batch_rows=64, sides=("output",), without_tokens=[token], drop_last=False
    )
    assert sum(len(y) for (y,) in dataset) == int((ids != token).sum())
    again: RowDataset = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(again, dataset, strict=True))
    assert "layers.2.mlp/output, 64 of" in repr(again)


def test_what_cannot_be_read_is_said_at_once(numbered: ActivationStore, tmp_path: Path) -> None:
    split = numbered.train
    with pytest.raises(StoreError, match=r"no array 'layers.9.mlp/input'"):
        split.dataset("layers.9.mlp", batch_rows=8)
    with pytest.raises(ConfigError, match=r"10 shards of split 'train'.* fewer than 11 ranks"):
        split.dataset(HOOK, batch_rows=8, rank=0, world=11)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        split.dataset(HOOK, batch_rows=8, rank=2, world=2)
    for batch_rows in (0, split.rows + 1):
        with pytest.raises(ConfigError, match="should be 1 to 960"):
            split.dataset(HOOK, batch_rows=batch_rows)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_stay_follow_the_epoch(numbered: ActivationStore) -> None:
    dataset = numbered.train.dataset(HOOK, batch_rows=32)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    first = rows(list(loader))
    dataset.set_epoch(1)
    second = rows(list(loader))
    assert second != first and second == rows(list(dataset))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_without_a_whole_batch_says_so(numbered: ActivationStore) -> None:
    dataset = numbered.train.dataset(HOOK, batch_rows=GRID.shard_rows * SHARDS // 2 + 1)
    assert len(list(dataset)) == 1
    with pytest.raises(ConfigError, match=r"each of 2 workers reads 480 rows or fewer, so no"):
        list(DataLoader(dataset, batch_size=None, num_workers=2))
    with pytest.raises(ConfigError, match=r"should be 1 to 480, the rows .* that a rank reads"):
        numbered.train.dataset(HOOK, batch_rows=481, rank=0, world=2)


def test_ranks_that_would_wait_for_each_other_are_refused(numbered: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="ranks would have different numbers of batches"):
        numbered.train.dataset(HOOK, batch_rows=8, rank=0, world=2, without_tokens=[1])


def test_forked_workers_do_not_read_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections do not outlive a fork: they would hang."""

    class ForkProcess: ...

    class SpawnProcess: ...

    for kind, refused in ((ForkProcess, True), (SpawnProcess, False)):
        monkeypatch.setattr(multiprocessing, "current_process", kind)
        _check_start("/a/folder")
        if refused:
            with pytest.raises(ConfigError, match="multiprocessing_context='spawn'"):
                _check_start("s3://bucket/acts")
        else:
            _check_start("s3://bucket/acts")
