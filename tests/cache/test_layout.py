from __future__ import annotations

import pytest

from bsc.cache.store.layout import MAX_DROPPED, MAX_SHARD_ROWS, Grid


@pytest.mark.parametrize(
    "rows", [1, 100, 2047, 2048, 5_000, 150_000, 655_360, 10**6, 10**7, 10**10]
)
@pytest.mark.parametrize("min_shards", [1, 16, 64])
def test_a_grid_leaves_out_at_most_one_percent(rows: int, min_shards: int) -> None:
    grid = Grid.for_rows(rows, min_shards=min_shards)
    assert 0 <= rows - grid.rows <= MAX_DROPPED * rows
    assert grid.shard_rows <= MAX_SHARD_ROWS
    assert grid.shards >= min(min_shards, rows)


def test_ten_billion_tokens_have_the_shards_of_the_design() -> None:
    assert Grid.for_rows(10_000_000_000, min_shards=16) == Grid(262_144, 4_096, 38_146)
