from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bsc.eval.figures.stability
from bsc.cache.store.layout import Hookpoint
from bsc.eval.figures.stability import (
    comparable_pairs,
    firing_jaccard,
    match_latents,
    stability_figures,
)
from bsc.train.coders.config import CoderConfig
from bsc.train.config import SweepPoint
from bsc.train.run_config import PlannedCoder
from bsc.train.sweep import plan_coder
from tests.eval.planted import saved_codes, zeros

F, D = 60, 16
ALIVE = np.ones(F, bool)


def decoder(seed: int) -> torch.Tensor:
    return torch.randn(F, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("limit", [10_000, 10])
def test_a_permuted_copy_is_the_same_and_a_rotated_one_is_chance(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bsc.eval.figures.stability, "HUNGARIAN_LIMIT", limit)
    w = decoder(0)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    found = match_latents(w, 3 * w[order], ALIVE, ALIVE)  # lengths do not matter
    assert found.cosine.min() > 0.9999 and found.mmcs > 0.9999
    assert np.array_equal(order.numpy()[found.b], found.a) and len(found.a) == F
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    rotated = match_latents(w, w @ rotation, ALIVE, ALIVE)
    random = match_latents(w, decoder(9), ALIVE, ALIVE)
    assert abs(rotated.cosine.mean() - random.cosine.mean()) < 0.05 < 0.5
    assert found.method == ("hungarian" if limit > F else "mutual nearest")


def test_dead_latents_are_not_matched() -> None:
    w = decoder(0)
    alive = ALIVE.copy()
    alive[10:] = False
    found = match_latents(w, w, alive, ALIVE)
    assert np.array_equal(found.a, np.arange(10)) and np.array_equal(found.b, found.a)
    nobody = match_latents(w, w, np.zeros(F, bool), ALIVE)
    assert len(nobody.a) == 0


def test_figures_of_a_coder_with_itself_with_its_firings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random((400, F)) < 0.1).astype(np.float32)
    coder = zeros(CoderConfig(site="sae", code="binary", k=4, n_latents=F, d_in=D, d_out=D))
    coder.W_dec.copy_(decoder(0))
    counts = (dense != 0).sum(axis=0)
    codes = saved_codes(tmp_path / "a", dense)
    found = stability_figures(coder, coder, (counts, counts), (codes, codes))
    assert found["cosine"] == pytest.approx(1) and found["jaccard"] == 1
    assert found["share_above"] == {"0.7": 1.0, "0.9": 1.0}
    assert found["cosine_chance"] < 0.7
    assert stability_figures(coder, coder, (counts, counts))["jaccard"] is None


def test_the_jaccard_index_is_the_plain_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = (rng.random((300, F)) < 0.2).astype(np.float32)
    b = np.where(rng.random((300, F)) < 0.3, 1 - a, a).astype(np.float32)
    order = rng.permutation(F)
    matching = match_latents(decoder(0), decoder(0)[torch.from_numpy(order)], ALIVE, ALIVE)
    found = firing_jaccard(
        saved_codes(tmp_path / "a", a, 3), saved_codes(tmp_path / "b", b[:, order], 3), matching
    )
    both, either = ((a > 0) & (b > 0)).sum(0), ((a > 0) | (b > 0)).sum(0)
    assert np.allclose(found, (both / either)[matching.a])


def test_pairs_differ_in_one_thing() -> None:
    def planned(name: str, code: Any, k: int, seed: int, **changes: Any) -> PlannedCoder:
        point = SweepPoint(site="sae", code=code, k=k, n_latents=8, seed=seed, **changes)
        return plan_coder(point, Hookpoint("h", 4, 4)).model_copy(update={"name": name})

    coders = [
        planned("b0", "binary", 4, 0),
        planned("b1", "binary", 4, 1),
        planned("c0", "continuous", 4, 0),
        planned("other k", "continuous", 8, 0),
        planned("other lr", "binary", 4, 5, lr=0.2),
    ]
    assert sorted(comparable_pairs(coders)) == [("code", "b0", "c0"), ("seed", "b0", "b1")]
