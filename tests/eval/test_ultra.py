from __future__ import annotations

import numpy as np
import torch

from bsc.cache.store.store import ActivationStore
from bsc.eval.figures.ultra import (
    RowFacts,
    diagnose,
    explained_share,
    principal_components,
    ultra_latents,
)
from bsc.train.coders.config import CoderConfig
from tests.eval.planted import latent_code, zeros

N = 20_000


def planted() -> tuple[np.ndarray, RowFacts, np.ndarray]:
    """Five frequent latents: a position, a token, a coin, an axis' two ends; and a rare one."""
    rng = np.random.default_rng(0)
    position = np.tile(np.arange(40), N // 40)
    token = rng.choice(2_000, size=N, p=np.r_[[0.3], np.full(1_999, 0.7 / 1_999)])
    axis = rng.normal(size=N)
    dense = np.zeros((N, 6), np.float32)
    dense[:, 0] = position < 8
    dense[:, 1] = token == 0
    dense[:, 2] = rng.random(N) < 0.3
    dense[:, 3], dense[:, 4] = axis > 0.5, axis < -0.5
    dense[:, 5] = rng.random(N) < 0.01
    facts = RowFacts.of(token, position, [], np.ones(N, bool))
    return dense, facts, position


def test_planted_latents_are_found_out() -> None:
    dense, facts, _ = planted()
    coder = zeros(CoderConfig(site="sae", code="binary", k=2, n_latents=6, d_in=8, d_out=8))
    torch.manual_seed(0)
    coder.W_dec.normal_()
    coder.W_enc.normal_()
    for w in (coder.W_dec, coder.W_enc):
        w[4] = -2 * w[3]
    components = torch.eye(8)[:2]
    coder.W_dec[2] = torch.tensor([0, 3.0, 0, 0, 0, 0, 0, 0])
    counts = (dense != 0).sum(axis=0)
    latents = ultra_latents(counts, N)
    assert set(latents) == {0, 1, 2, 3, 4} and counts[latents[0]] == counts.max()
    found = {
        f["latent"]: f for f in diagnose(coder, latent_code(dense), facts, components, latents)
    }
    assert found[0]["what"] == "position" and found[0]["position_share"] > 0.99
    assert found[1]["what"] == "token" and found[1]["token_share"] > 0.99
    assert found[1]["token_entropy"] == 0 < found[1]["token_entropy_all"]
    assert found[2]["what"] == "principal component 2"
    assert found[3]["what"] == "antipode of latent 4" and found[4]["antipode"] == 3
    for other in (2, 3, 4):
        assert found[other]["position_share"] < 0.01 and found[other]["token_share"] < 0.01
    assert diagnose(coder, latent_code(dense), facts, components, np.empty(0, np.int64)) == []


def test_chance_explains_nothing_however_many_classes() -> None:
    """The bias of an entropy that is estimated from few rows of a class is taken off."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        classes = rng.integers(0, 500, size=5_000)
        fires = rng.random(5_000) < 0.3
        total = np.bincount(classes, minlength=500).astype(float)
        shares.append(
            explained_share(np.bincount(classes[fires], minlength=500).astype(float), total)
        )
    assert np.mean(shares) < 0.02  # 0.08 if it stayed
    assert explained_share(np.array([3.0, 3.0]), np.array([3.0, 3.0])) == 0  # it always fires


def test_rows_that_were_not_read_do_not_count() -> None:
    dense, facts, position = planted()
    read = position >= 8
    code = latent_code(dense * read[:, None])
    found = diagnose(
        zeros(CoderConfig(site="sae", code="binary", k=2, n_latents=6, d_in=8, d_out=8)),
        code, facts._replace(read=read), torch.eye(8)[:2], np.array([2]),
    )  # fmt: skip
    assert abs(found[0]["rate"] - 0.3) < 0.02 and found[0]["position_share"] < 0.01


def test_components_are_those_of_the_rows(store: ActivationStore) -> None:
    split, hook = store.held_out, "layers.2.mlp"
    y = torch.cat([split.tensor(f"{hook}/output", i) for i in range(split.shards)]).double()
    components, share = principal_components(split, hook)
    assert components.shape == (10, 32)
    centred = y - y.mean(0)
    assert torch.allclose(components @ components.T, torch.eye(10), atol=1e-5)
    explained = (centred @ components.double().T).square().sum() / centred.square().sum()
    assert abs(float(explained) - share) < 1e-6
    first = (centred @ components[0].double()).var()
    assert first >= (centred @ components[1].double()).var()
