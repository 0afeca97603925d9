from __future__ import annotations

from itertools import islice

import pytest
import torch

from bsc.cache.loader import Cursor, Loader
from bsc.cache.store import ActivationStore
from bsc.errors import ConfigError

NAMES = ("layers.2.mlp/input", "layers.2.mlp/output")


def keys(rows: torch.Tensor) -> list[bytes]:
    return [r.numpy().tobytes() for r in rows.view(torch.int16)]


def all_rows(store: ActivationStore, name: str) -> torch.Tensor:
    return torch.cat([store.train.tensor(name, i) for i in range(store.train.shards)])


@pytest.mark.parametrize(("batch", "at_once"), [(100, 4), (333, 1), (64, 7)])
def test_an_epoch_gives_every_row_once_but_for_the_last_batch(
    store: ActivationStore, batch: int, at_once: int
) -> None:
    loader = Loader(store.train, NAMES, batch_rows=batch, seed=1, shards_at_once=at_once)
    batches = [[t.clone() for t in b] for b in islice(loader.batches(), loader.batches_per_epoch)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    pairs = {
        a + b
        for a, b in zip(
            keys(all_rows(store, NAMES[0])), keys(all_rows(store, NAMES[1])), strict=True
        )
    }
    given = [a + b for a, b in zip(keys(x), keys(y), strict=True)]
    assert set(given) <= pairs  # sides stay together
    assert len(given) == store.train.rows // batch * batch
    # Equal rows exist (equal contexts), so count them rather than compare sets.
    repeated = len(keys(all_rows(store, NAMES[0]))) - len(pairs)
    assert len(set(given)) >= len(given) - repeated


def test_a_cursor_resumes_where_it_was(store: ActivationStore) -> None:
    def take(start: Cursor, n: int) -> list[torch.Tensor]:
        loader = Loader(store.train, NAMES, batch_rows=128, seed=5)
        return [b[0].clone() for b in islice(loader.batches(start), n)]

    whole = take(Cursor(0, 0), 80)
    per_epoch = Loader(store.train, NAMES, batch_rows=128, seed=5).batches_per_epoch
    for cut in (1, 17, per_epoch, per_epoch + 3):
        resumed = take(Cursor(cut // per_epoch, cut % per_epoch), 80 - cut)
        assert all(torch.equal(a, b) for a, b in zip(whole[cut:], resumed, strict=True))


def test_epochs_and_seeds_have_other_orders(store: ActivationStore) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        loader = Loader(store.train, NAMES, batch_rows=128, seed=seed)
        return next(loader.batches(Cursor(epoch, 0)))[0].clone()

    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


def test_a_batch_larger_than_the_store_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="Choose a smaller batch"):
        Loader(store.train, NAMES, batch_rows=10**6, seed=0)
