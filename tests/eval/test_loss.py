from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bsc.cache.capture import CaptureConfig, capture
from bsc.cache.models import LanguageModel, load_model
from bsc.cache.store import ActivationStore
from bsc.cache.text import TextSource
from bsc.cache.tokens import PACKINGS
from bsc.eval.loss import Contexts, context_losses, contexts_of, paired_difference
from bsc.eval.splice import coder_replacement, mean_replacement, splice, zero_replacement
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig

HOOK = "layers.1.mlp"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lm(request: pytest.FixtureRequest, tiny_model: Path) -> LanguageModel:
    return load_model(str(tiny_model), dtype=request.param, with_head=True)


@pytest.fixture(scope="module")
def ids(store: ActivationStore) -> Contexts:
    return contexts_of(store, 512)


def test_contexts_are_whole_and_in_the_order_of_the_text(store: ActivationStore) -> None:
    ids = contexts_of(store, 10**9).token_id
    assert ids.shape == (store.held_out.rows // 32, 32)
    assert np.array_equal(ids.ravel(), store.held_out.tokens("token_id")[: ids.size])


@pytest.fixture(scope="module", params=PACKINGS)
def any_packing(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    path = tmp_path_factory.mktemp("packing") / "acts"
    capture(
        CaptureConfig(
            model=str(tiny_model), store=path, text=TextSource(corpus="stdlib", held_out=0.5),
            hookpoints=(HOOK,), tokens=400, held_out_tokens=1_500, context=64, batch_tokens=512,
            packing=request.param, dtype="float32",
        )
    )  # fmt: skip
    return ActivationStore(path)


def test_the_loss_is_that_of_the_documents_one_at_a_time(
    any_packing: ActivationStore, tiny_model: Path
) -> None:
    """Of whole contexts where documents see each other."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    lm = load_model(str(tiny_model), dtype="float32", with_head=True)
    contexts = contexts_of(any_packing, 1_000)
    nats = tokens = 0.0
    for ids, position, real in zip(*contexts[:3], strict=True):
        n = int(real.sum())
        starts = [0] if any_packing.packing == "joined" else np.flatnonzero(position[:n] == 0)
        for a, b in zip(starts, [*starts[1:], n], strict=True):
            if b - a < 2:
                continue
            piece = torch.from_numpy(ids[a:b]).unsqueeze(0)
            with torch.no_grad():
                nats += float(model(input_ids=piece, labels=piece).loss) * (b - a - 1)
            tokens += b - a - 1
    assert contexts.counts.sum() == tokens
    assert context_losses(lm, contexts, {}).sum() / tokens == pytest.approx(nats / tokens, rel=1e-5)


def test_an_identity_coder_costs_exactly_nothing(lm: LanguageModel, ids: Contexts) -> None:
    config = CoderConfig(site="sae", k=32, n_latents=64, d_in=32, d_out=32)
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    tensors = {n: torch.zeros(s) for n, s in parameter_shapes(config).items()}
    tensors |= {"encoder.weight": both, "W_dec": both}
    replace = coder_replacement(SparseCoder(config, tensors))
    clean, spliced = context_losses(lm, ids, {}), context_losses(lm, ids, {HOOK: replace})
    assert np.array_equal(clean, spliced)


def test_a_coder_of_zeros_is_zero_ablation_and_it_costs_something(
    lm: LanguageModel, ids: Contexts
) -> None:
    config = CoderConfig(site="skip_transcoder", k=1, n_latents=2, d_in=32, d_out=32)
    coder = SparseCoder(config, {n: torch.zeros(s) for n, s in parameter_shapes(config).items()})
    by_coder = context_losses(lm, ids, {HOOK: coder_replacement(coder)})
    assert np.array_equal(by_coder, context_losses(lm, ids, {HOOK: zero_replacement}))
    assert not np.array_equal(by_coder, context_losses(lm, ids, {}))


def test_modules_that_return_tuples_can_be_replaced_and_hooks_are_removed() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return 2 * x, "kept"

    base = torch.nn.Sequential(Pair())
    x = torch.ones(2, 3, 4)
    with splice(base, {"0": mean_replacement(torch.arange(4.0))}):
        rows, rest = base(x)
    assert rest == "kept" and torch.equal(rows, torch.arange(4.0).expand(2, 3, 4))
    assert torch.equal(base(x)[0], 2 * x)


def test_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        clean = rng.normal(3, 1, 60)
        changed = clean + rng.normal(0.1, 0.2, 60)
        delta, (low, high) = paired_difference(changed, clean, np.ones(60, np.int64), seed=trial)
        assert low <= delta <= high
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 300 <= 0.98
