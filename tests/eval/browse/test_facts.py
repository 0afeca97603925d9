"""What pages say of latents, against the same computed in the plainest way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bsc.eval.browse.firings import BINS, NO_TOKEN, TOKENS, firing_facts, position_edges
from bsc.eval.browse.logits import adds_to_the_stream, unembedding
from bsc.eval.browse.neighbours import NEAREST, NONE, by_decoder, by_firing, partners
from bsc.eval.figures.division import EXPLAIN
from bsc.eval.figures.examples import STRATA, sample
from tests.eval.planted import latent_code

ROWS, F = 700, 9


def planted(seed: int = 0, f: int = F) -> np.ndarray:
    """A code of f latents; latent 3 never fires, latent 4 in four rows, latent 5 in ties."""
    rng = np.random.default_rng(seed)
    dense = (rng.normal(size=(ROWS, f)) * (rng.random((ROWS, f)) < 0.3)).astype(np.float32)
    dense[:, 3] = 0
    dense[4:, 4] = 0
    dense[:4, 4] = 1, 2, 3, 4
    dense[:, 5] = dense[:, 5] != 0
    return dense


def test_facts_of_firings_are_those_of_the_definition() -> None:
    dense = planted()
    rng = np.random.default_rng(1)
    token = rng.integers(0, 40, ROWS).astype(np.uint32)
    position = np.arange(ROWS) % 50
    edges = position_edges(50)
    place = np.searchsorted(edges, position, side="right") - 1
    code = latent_code(dense)
    facts = firing_facts(code, token, place, len(edges) - 1)
    drawn = sample(code, np.full(ROWS, EXPLAIN, np.uint8), per_stratum=ROWS)
    for latent in range(F):
        rows = np.flatnonzero(dense[:, latent])
        margin = dense[rows, latent]
        if len(rows) == 0:
            assert not any(np.abs(x[latent]).sum() for x in facts if x is not facts.token)
            assert (facts.token[latent] == NO_TOKEN).all()
            continue
        assert facts.mean_margin[latent] == pytest.approx(margin.mean(), rel=1e-6)
        assert facts.histogram[latent].sum() == len(rows)
        # Borders part the strata that contexts are drawn from.
        own, borders = drawn.of(latent), facts.borders[latent]
        assert borders[STRATA] == margin.max()
        for stratum in range(STRATA):
            mine = own.margin[own.stratum == stratum]
            if len(rows) >= STRATA:
                assert mine.min() == borders[stratum]
        span = float(margin.max() - margin.min())
        if span > 0:
            bins = np.minimum(
                BINS - 1, ((margin - margin.min()) / np.float32(span) * BINS).astype(int)
            )
            assert np.array_equal(facts.histogram[latent], np.bincount(bins, minlength=BINS))
        kinds, counts = np.unique(token[rows], return_counts=True)
        best = sorted(
            zip(kinds.tolist(), counts.tolist(), strict=True), key=lambda kc: (-kc[1], kc[0])
        )
        mine = [
            (int(t), int(n))
            for t, n in zip(facts.token[latent], facts.token_firings[latent], strict=True)
            if t != NO_TOKEN
        ]
        assert mine == best[:TOKENS]
        by_hand = [int((place[rows] == p).sum()) for p in range(len(edges) - 1)]
        assert facts.positions[latent].tolist() == by_hand


def test_neighbours_by_decoder_and_by_firing() -> None:
    dense = planted()
    code = latent_code(dense)
    W = torch.randn(F, 6, generator=torch.Generator().manual_seed(0))
    alive = (dense != 0).any(axis=0)
    near, firing = by_decoder(W, alive), by_firing(code, ROWS)
    fires = dense != 0
    for latent in range(F):
        others = [i for i in range(F) if i != latent and alive[i]]
        cosines = {i: float(torch.cosine_similarity(W[latent], W[i], dim=0)) for i in others}
        best = sorted(others, key=lambda i: -cosines[i])[:NEAREST]
        assert near.latent[latent].tolist() == best
        assert np.allclose(near.likeness[latent], [cosines[i] for i in best], atol=1e-6)
        jaccard = {
            i: (fires[:, latent] & fires[:, i]).sum()
            / max(1, (fires[:, latent] | fires[:, i]).sum())
            for i in others
        }
        found = [i for i in firing.latent[latent].tolist() if i != NONE]
        for i, x in zip(found, firing.likeness[latent].tolist(), strict=False):
            assert x == pytest.approx(jaccard[i], abs=1e-6)
        least = min((jaccard[i] for i in found), default=0)
        assert all(jaccard[i] <= least + 1e-6 for i in others if i not in found)
        assert len(found) == min(NEAREST, sum(x > 0 for x in jaccard.values()))


def test_partners_are_the_most_similar_living_latents_of_the_other() -> None:
    a, b = planted(0), planted(1, F + 2)
    W_a, W_b = (
        torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (F, F + 2)
    )  # fmt: skip
    code_a, code_b = latent_code(a), latent_code(b)
    forth, back = partners(W_a, W_b, code_a, code_b), partners(W_b, W_a, code_b, code_a)
    alive = [i for i in range(F + 2) if (b[:, i] != 0).any()]
    for latent in range(F):
        rows = a[:, latent] != 0
        if not rows.any():
            assert forth.latent[latent] == NONE and not forth.mutual[latent]
            continue
        cosines = {i: float(torch.cosine_similarity(W_a[latent], W_b[i], dim=0)) for i in alive}
        partner = max(alive, key=lambda i: cosines[i])
        assert forth.latent[latent] == partner
        assert forth.cosine[latent] == pytest.approx(cosines[partner], abs=1e-6)
        assert forth.mutual[latent] == (back.latent[partner] == latent)
        theirs = b[:, partner] != 0
        assert forth.both[latent] == (rows & theirs).sum()
        assert forth.jaccard[latent] == pytest.approx((rows & theirs).sum() / (rows | theirs).sum())
        here = slice(code_a.offsets[latent], code_a.offsets[latent + 1])
        assert np.array_equal(forth.together[here], theirs[np.flatnonzero(rows)])


SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_key_value_heads": 1}
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL, **heads)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SMALL, **heads, head_dim=8)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    }


@pytest.mark.parametrize("kind", models())
def test_effects_on_logits_are_those_of_adding_the_row_before_the_final_norm(kind: str) -> None:
    """By the definition: what a small step along the row does to the logits when nothing but the
    length that the norm divides by is held."""
    model = models()[kind]
    norm = {
        "llama": lambda m: m.model.norm, "gemma2": lambda m: m.model.norm,
        "gpt2": lambda m: m.transformer.ln_f, "gpt_neox": lambda m: m.gpt_neox.final_layer_norm,
    }[kind](model)  # fmt: skip
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(torch.randn(16))
    rows = torch.randn(5, 16)
    path = unembedding(model)
    assert path is not None
    head = model.get_output_embeddings().weight.detach().double()
    gain = norm.weight.detach().double() + (1 if kind == "gemma2" else 0)
    centred = rows.double()
    if kind in ("gpt2", "gpt_neox"):
        centred = centred - centred.mean(dim=1, keepdim=True)
    direct = torch.einsum("vd,d,fd->fv", head, gain, centred)
    direct -= direct.mean(dim=1, keepdim=True)  # the same for all tokens: no probability changes
    assert torch.allclose(path.effects(rows).double(), direct, atol=1e-5)
    # The Jacobian of head(norm(x)) is that, less what the length changes by, over the length.
    x = torch.randn(16, dtype=torch.float64)
    norm64 = norm.double()
    jacobian = torch.autograd.functional.jacobian(lambda h: norm64(h[None, None])[0, 0], x)
    flat = x - x.mean() if kind in ("gpt2", "gpt_neox") else x
    length = flat.square().mean().sqrt()
    along = centred @ flat / flat.square().sum()
    by_hand = torch.einsum("vd,d,fd->fv", head, gain, centred - along[:, None] * flat) / length
    assert torch.allclose(rows.double() @ jacobian.T @ head.T, by_hand, atol=1e-4)

    found = path.largest(rows)
    order = direct.argsort(dim=1, descending=True)
    assert found.promoted.tolist() == order[:, :10].tolist()
    assert found.suppressed.tolist() == order.flip(1)[:, :10].tolist()
    assert np.allclose(found.promotion, direct.gather(1, order[:, :10]), atol=1e-5)


@pytest.mark.parametrize("kind", models())
def test_a_norm_between_the_module_and_the_stream_is_seen(kind: str) -> None:
    module = {"gpt2": "h.1.mlp", "gpt_neox": "layers.1.mlp"}.get(kind, "layers.1.mlp")
    assert adds_to_the_stream(models()[kind], module) == (kind != "gemma2")


def test_a_model_without_a_final_norm_has_no_direct_path() -> None:
    model = models()["llama"]
    model.model.norm = torch.nn.Identity()
    assert unembedding(model) is None
