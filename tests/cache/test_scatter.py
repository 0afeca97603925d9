"""Which shards and places rows are dealt to."""

from __future__ import annotations

from typing import Any

import pytest

from bsc.cache.store.scatter import deal, window_sizes


@pytest.mark.parametrize(("shards", "window"), [(1, 64), (64, 64), (66, 64), (1000, 64), (10, 1)])
def test_windows_cover_all_shards_and_are_even(shards: int, window: int) -> None:
    sizes = window_sizes(shards, window)
    assert sum(sizes) == shards and max(sizes) <= window and max(sizes) - min(sizes) <= 1


def test_dealing_depends_on_seed_writer_window_and_block() -> None:
    def first(**kwargs: int) -> Any:
        base = {"seed": 0, "rank": 0, "window": 0, "block": 0} | kwargs
        return deal(100, 4, 0, **base)[0].tolist()

    keys = ("seed", "rank", "window", "block")
    assert first() == first()
    assert len({tuple(first(**{k: 1})) for k in keys} | {tuple(first())}) == 5
