from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.cache.store.layout import Grid
from bsc.cache.store.shuffle import check_shuffle
from bsc.cache.store.store import ActivationStore
from tests.cache.synthetic import make_store

GRID = Grid(960, 480, 40)


def in_runs_of(length: int) -> object:
    def edit(b: dict[str, torch.Tensor]) -> None:
        b["tokens/doc_id"] = b["tokens/token_id"] // length

    return edit


@pytest.mark.parametrize(("window", "least", "most"), [(40, 0.9, 1.15), (1, 1.5, 10.0)])
def test_a_scattered_store_is_nearly_independent_and_one_in_order_is_not(
    tmp_path: Path, window: int, least: float, most: float
) -> None:
    make_store(
        tmp_path / "s", GRID.rows, GRID, window=window, size=512,
        edit=in_runs_of(200),  # type: ignore[arg-type]
    )  # fmt: skip
    store = ActivationStore(tmp_path / "s")
    found = check_shuffle(store, batch_rows=512)
    assert least < found.design_effect < most
    # Simulated: independent draws of the same documents.
    rng = np.random.default_rng(0)
    docs = store.train.tokens("doc_id")
    drawn = [len(np.unique(rng.choice(docs, 512))) for _ in range(100)]
    assert found.documents_if_independent == pytest.approx(np.mean(drawn), rel=0.02)
    assert (found.documents > 0.9 * np.mean(drawn)) == (window == 40)
    assert f"design effect {found.design_effect:.3f}, " in found.line()
