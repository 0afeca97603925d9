from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.cache.store.kept import kept_moments
from bsc.cache.store.kinds import Codec
from bsc.cache.store.layout import Grid
from bsc.cache.store.loader import Cursor, Loader
from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError
from tests.cache.synthetic import make_store

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
    batches = [[t.clone() for t in b] for b in islice(loader.batches(), store.train.rows // batch)]
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


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("batch", [128, 1000])
def test_a_cursor_resumes_where_it_was(store: ActivationStore, ahead: int, batch: int) -> None:
    """Also in the middle of a group, and across the end of an epoch."""

    def loader() -> Loader:
        return Loader(store.train, NAMES, batch_rows=batch, seed=5, ahead=ahead)

    first = loader()
    whole, cursors = [], []
    for given in islice(first.batches(), 60):
        whole.append(given[0].clone())
        cursors.append(first.cursor)
    assert cursors[-1].epoch >= 1 and len({c.group for c in cursors}) > 2
    for cut in (1, 5, 17, 46, 47, 48):
        resumed = [b[0].clone() for b in islice(loader().batches(cursors[cut - 1]), 60 - cut)]
        assert all(torch.equal(a, b) for a, b in zip(whole[cut:], resumed, strict=True)), cut


def test_left_out_tokens_never_come_and_every_other_row_does(store: ActivationStore) -> None:
    ids = store.train.tokens("token_id")
    common = np.bincount(ids).argsort()[-3:].tolist()
    loader = Loader(
        store.train, NAMES[:1], batch_rows=64, seed=0, without_tokens=common, drop_last=False
    )
    given = []
    for batch in loader.batches():
        if loader.cursor.epoch == 1 and len(batch[0]) == 64:
            break
        given += keys(batch[0])
    rows = all_rows(store, NAMES[0])
    expected = keys(rows[torch.from_numpy(~np.isin(ids, common))])
    assert sorted(given) == sorted(expected) and len(expected) < len(ids) - 100


def test_rows_that_are_not_finite_are_passed_over(tmp_path: Path) -> None:
    def spoil(b: dict[str, torch.Tensor]) -> None:
        b["layers.0.mlp/output"][3, 1] = float("inf")

    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4, edit=spoil)
    split = ActivationStore(tmp_path / "s").train
    bad = split.non_finite_rows("layers.0.mlp/output")
    names = ("layers.0.mlp/input", "layers.0.mlp/output")
    loader = Loader(split, names, batch_rows=960, seed=0, drop_last=False)
    x, y = next(loader.batches())
    assert bad == 26 and len(x) == 960 - bad and y.isfinite().all()


@pytest.mark.parametrize("codec", ["lz4", "int8"])
def test_other_codecs_give_the_same_batches(tmp_path: Path, codec: Codec) -> None:
    def whole(b: dict[str, torch.Tensor]) -> None:  # int8 with scales of 1 keeps -127 to 127
        x = b["tokens/token_id"].unsqueeze(1) % 127 - 63
        x[:, 0] = 127
        for side, width in (("input", 4), ("output", 6)):
            b[f"layers.0.mlp/{side}"] = torch.cat(
                [torch.full_like(x, 127), x.expand(-1, width - 1)], dim=1
            ).bfloat16()

    given = []
    for kind in ("raw", codec):
        make_store(tmp_path / kind, 960, Grid(96, 24, 10), window=4, codec=kind, edit=whole)
        names = ("layers.0.mlp/input", "layers.0.mlp/output")
        loader = Loader(ActivationStore(tmp_path / kind).train, names, batch_rows=50, seed=0)
        given.append([torch.cat([*b], dim=1).clone() for b in islice(loader.batches(), 30)])
    assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))


def test_epochs_and_seeds_have_other_orders(store: ActivationStore) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        loader = Loader(store.train, NAMES, batch_rows=128, seed=seed)
        return next(loader.batches(Cursor(epoch, 0, 0)))[0].clone()

    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


def test_a_batch_larger_than_the_store_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="Choose a smaller batch"):
        Loader(store.train, NAMES, batch_rows=10**6, seed=0)


def test_a_pass_without_a_batch_is_refused_and_does_not_spin(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    split = ActivationStore(tmp_path / "s").train
    names = ("layers.0.mlp/input",)
    loader = Loader(split, names, batch_rows=960, seed=0, without_tokens=[5])
    with pytest.raises(ConfigError, match="fewer than 960 rows that are read"):
        next(loader.batches())


def test_moments_of_kept_rows_are_those_of_these_rows(store: ActivationStore) -> None:
    ids = store.train.tokens("token_id")
    common = np.bincount(ids).argsort()[-3:].tolist()
    kept = all_rows(store, NAMES[1])[torch.from_numpy(~np.isin(ids, common))].double()
    moments = kept_moments(store.train, NAMES[1], common)
    assert moments.rows == len(kept)
    torch.testing.assert_close(moments.mean, kept.mean(0))
    torch.testing.assert_close(moments.variance, kept.var(0, correction=0))
    assert kept_moments(store.train, NAMES[1], ()).rows == store.train.rows
