from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsc.cache.layout import MANIFEST, Grid, Hookpoint, store_attributes
from bsc.cache.store import ActivationStore
from bsc.cache.verify import verify
from bsc.cache.writer import StoreWriter, deal, window_sizes
from bsc.errors import StoreError
from bsc.files import write_json

HOOKS = (Hookpoint("layers.0.mlp", 4, 6),)


def blocks(rows: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Blocks whose every array says which row it is."""
    made = []
    for start in range(0, rows, size):
        number = torch.arange(start, min(start + size, rows))
        low, high = (number % 128).bfloat16(), (number // 128).bfloat16()
        x = torch.stack([low, high, low, high], dim=1)
        made.append(
            {
                "layers.0.mlp/input": x,
                "layers.0.mlp/output": torch.cat([x, -x[:, :2]], dim=1),
                "tokens/token_id": number,
                "tokens/doc_id": number // 10,
                "tokens/position": number % 10,
            }
        )
    return made


def make_store(root: Path, rows: int, grid: Grid, *, window: int, size: int = 37) -> int:
    identity = {
        "model": {}, "context": 10, "grids": {"train": {}}, "seed": 3, "window": window,
        "hookpoints": [{"name": h.name, "d_in": h.d_in, "d_out": h.d_out} for h in HOOKS],
    }  # fmt: skip
    root.mkdir()
    with StoreWriter(
        root, HOOKS, {"train": grid}, window=window, seed=3,
        attributes=store_attributes(identity), provenance={"capture": identity},
    ) as writer:  # fmt: skip
        for block in blocks(rows, size):
            writer.splits["train"].append(block)
        dropped = writer.splits["train"].finish()
        writer.complete({})
    return dropped


def numbers(store: ActivationStore) -> np.ndarray:
    """Row numbers as the token array has them, checked against every other array."""
    ids = store.train.tokens("token_id").astype(np.int64)
    x = torch.cat([store.train.tensor("layers.0.mlp/input", i) for i in range(store.train.shards)])
    y = torch.cat([store.train.tensor("layers.0.mlp/output", i) for i in range(store.train.shards)])
    assert np.array_equal((x[:, 0] + 128 * x[:, 1].float()).numpy(), ids)
    assert np.array_equal((-y[:, 4] - 128 * y[:, 5].float()).numpy(), ids)
    assert np.array_equal(store.train.tokens("doc_id"), ids // 10)
    assert np.array_equal(store.train.tokens("position"), ids % 10)
    return ids


def test_every_row_is_written_once_and_is_the_same_row_in_every_array(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    store = ActivationStore(tmp_path / "s")
    assert sorted(numbers(store)) == list(range(960))
    assert list(verify(tmp_path / "s")) == []


def test_the_scatter_mixes_every_block_over_the_window(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=10)
    ids = numbers(ActivationStore(tmp_path / "s")).reshape(10, 96)
    for shard in ids:  # about a tenth of each tenth of the text
        per_tenth = np.bincount(shard // 96, minlength=10)
        assert per_tenth.min() >= 6 and per_tenth.max() <= 14


def test_one_shard_at_a_time_keeps_the_order(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=1)
    assert numbers(ActivationStore(tmp_path / "s")).tolist() == list(range(960))


def test_the_same_rows_give_the_same_bytes_whatever_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_store(tmp_path / name, 960, Grid(96, 24, 10), window=4)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) > 50
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_text_that_ends_early_fills_whole_shards_and_drops_less_than_one(tmp_path: Path) -> None:
    dropped = make_store(tmp_path / "s", 500, Grid(96, 24, 10), window=10)
    store = ActivationStore(tmp_path / "s")
    assert store.train.shards == 5 and dropped == 20
    assert len(set(numbers(store))) == 480
    assert list(verify(tmp_path / "s")) == []
    assert not list((tmp_path / "s").rglob("*.partial"))


def test_moments_come_from_the_manifest_and_are_those_of_the_rows(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    split = ActivationStore(tmp_path / "s").train
    rows = torch.cat([split.tensor("layers.0.mlp/output", i).double() for i in range(10)])
    moments = split.moments("layers.0.mlp/output")
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, rows.var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_shape_is_the_commit_pointer(tmp_path: Path) -> None:
    """A crash between a shard's rename and the last bump of a shape leaves that shard unseen."""
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    path = tmp_path / "s/data.zarr/tokens/position/zarr.json"
    whole = ActivationStore(tmp_path / "s").train.moments("layers.0.mlp/input")
    path.write_text(path.read_text().replace("960", "864"))
    split = ActivationStore(tmp_path / "s").train
    assert split.rows == 864
    # The sums of an array are over its own rows, also while another is a shard behind.
    assert torch.equal(split.moments("layers.0.mlp/input").mean, whole.mean)


def test_commit_order_is_files_then_manifest_then_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(path: Path, value: dict[str, Any]) -> None:
        if value.get("shape", [0])[0]:
            shard = value["shape"][0] // 96 - 1
            name = path.parent.relative_to(tmp_path / "s/data.zarr").as_posix()
            lines = (tmp_path / "s" / MANIFEST).read_text().splitlines()
            in_manifest = any(f'"{name}"' in li and f'"shard": {shard}' in li for li in lines)
            at = path.parent / "c" / str(shard)
            files = [at, *at.rglob("*")]
            seen.append(in_manifest and any(f.is_file() for f in files))
        write_json(path, value)

    monkeypatch.setattr("bsc.cache.writer.write_json", spy)
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    assert len(seen) == 10 * 5 and all(seen)


def test_a_gap_between_arrays_of_different_grids_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 960, Grid(96, 24, 10), window=4)
    path = tmp_path / "s/data.zarr/tokens/position/zarr.json"
    path.write_text(path.read_text().replace("96", "48"))
    with pytest.raises(StoreError, match=r"shard sizes|metadata"):
        ActivationStore(tmp_path / "s")


@pytest.mark.parametrize(("shards", "window"), [(1, 64), (64, 64), (66, 64), (1000, 64), (10, 1)])
def test_windows_cover_all_shards_and_are_even(shards: int, window: int) -> None:
    sizes = window_sizes(shards, window)
    assert sum(sizes) == shards and max(sizes) <= window and max(sizes) - min(sizes) <= 1


def test_dealing_depends_on_seed_window_and_block() -> None:
    def first(**kwargs: int) -> Any:
        base = {"seed": 0, "window": 0, "block": 0} | kwargs
        return deal(100, 4, 0, **base)[0].tolist()

    assert first() == first()
    assert (
        len({tuple(first(**{k: 1})) for k in ("seed", "window", "block")} | {tuple(first())}) == 4
    )
