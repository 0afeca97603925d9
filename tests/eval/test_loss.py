from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import bsc.eval.passes.context_pass
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.attention import BY_POSITIONS
from bsc.cache.model.models import LanguageModel, load_model
from bsc.cache.model.text_source import PACKINGS, TextSource
from bsc.cache.store.store import ActivationStore
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.figures.loss import added_loss, loss_sums
from bsc.eval.passes.context_pass import (
    CLEAN,
    LossSums,
    Variant,
    _divergence,
    joined,
    pass_over_contexts,
)
from bsc.eval.passes.contexts import Contexts, contexts_of
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.prefix import Prefix
from bsc.eval.passes.splice import coder_replacement, mean_replacement, splice, zero_replacement
from bsc.train.coders.config import CoderConfig
from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep
from tests.eval.planted import identity, planted_contexts, zeros

HOOK, LATER = "layers.1.mlp", "layers.2.mlp"


def sums(
    lm: LanguageModel, contexts: Contexts, variants: Mapping[str, Variant]
) -> dict[str, LossSums]:
    return joined(pass_over_contexts(lm, contexts, variants), contexts.documents)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lm(request: pytest.FixtureRequest, tiny_model: Path) -> LanguageModel:
    return load_model(str(tiny_model), dtype=request.param, with_head=True)


@pytest.fixture(scope="module")
def ids(store: ActivationStore) -> Contexts:
    return contexts_of(store, 512)


def test_contexts_are_whole_and_in_the_order_of_the_text(store: ActivationStore) -> None:
    contexts = contexts_of(store, 10**9)
    assert contexts.token_id.shape == (store.held_out.rows // 32, 32)
    tokens = store.held_out.tokens("token_id")[: contexts.token_id.size]
    assert np.array_equal(contexts.token_id.ravel(), tokens)
    assert len(contexts.first(100).token_id) == 3 and len(contexts.first(1).token_id) == 1


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
    nats = tokens = right = 0.0
    for ids, position, real in zip(*contexts[:3], strict=True):
        n = int(real.sum())
        starts = [0] if any_packing.packing == "joined" else np.flatnonzero(position[:n] == 0)
        for a, b in zip(starts, [*starts[1:], n], strict=True):
            if b - a < 2:
                continue
            piece = torch.from_numpy(ids[a:b]).unsqueeze(0)
            with torch.no_grad():
                out = model(input_ids=piece, labels=piece)
            nats += float(out.loss) * (b - a - 1)
            right += float((out.logits[0, :-1].argmax(-1) == piece[0, 1:]).sum())
            tokens += b - a - 1
    assert contexts.counts.sum() == tokens
    found = sums(lm, contexts, {})[CLEAN]
    assert found.nats.sum() / tokens == pytest.approx(nats / tokens, rel=1e-5)
    assert found.right.sum() == right and not found.kl.any()


def test_sums_are_by_document(lm: LanguageModel, ids: Contexts) -> None:
    """Also where a document goes on in the next context and the next batch."""
    found = sums(lm, ids, {})[CLEAN]
    assert ids.documents > 5 and found.nats.shape == (ids.documents,)
    inputs = ids.inputs(slice(None), lm)
    with torch.inference_mode():
        log_p = lm.model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    nats = -log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].double().numpy()
    for document in range(ids.documents):
        here = (ids.document == document) & ids.predicted
        assert ids.counts[document] == here.sum()
        assert found.nats[document] == pytest.approx(nats[here].sum(), rel=1e-5)
    assert ids.counts.sum() == ids.predicted.sum()
    # No document is predicted at its first token, for the model does not see what is before it.
    assert not ids.predicted[ids.position[:, 1:] == 0].any()


def test_rows_that_are_not_finite_or_kept_stay_as_they_are() -> None:
    base = torch.nn.Sequential(torch.nn.Identity())
    x = torch.ones(1, 4, 2)
    x[0, 1, 0] = torch.inf
    kept = torch.tensor([False, False, True, False])
    with splice(base, {"0": zero_replacement}, kept):
        rows = base(x)
    assert torch.equal(rows[0, 1:3], x[0, 1:3]) and not rows[0, [0, 3]].any()


def test_an_identity_coder_costs_exactly_nothing(lm: LanguageModel, ids: Contexts) -> None:
    found = sums(lm, ids, {"identity": {HOOK: coder_replacement(identity(32))}})
    assert all(np.array_equal(a, b) for a, b in zip(found["identity"], found[CLEAN], strict=True))


def test_a_coder_of_zeros_is_zero_ablation_and_it_costs_something(
    lm: LanguageModel, ids: Contexts
) -> None:
    coder = zeros(CoderConfig(site="skip_transcoder", k=1, n_latents=2, d_in=32, d_out=32))
    found = sums(
        lm, ids, {"zeros": {HOOK: coder_replacement(coder)}, "ablation": {HOOK: zero_replacement}}
    )
    assert np.array_equal(found["zeros"].nats, found["ablation"].nats)
    assert np.array_equal(found["zeros"].kl, found["ablation"].kl)
    assert not np.array_equal(found["zeros"].nats, found[CLEAN].nats)
    assert found["zeros"].kl.min() > 0


def test_kl_is_that_of_the_whole_distributions(lm: LanguageModel, ids: Contexts) -> None:
    part = ids.first(64)
    found = sums(lm, part, {"zero": {HOOK: zero_replacement}})["zero"]
    inputs = part.inputs(slice(None), lm)
    with torch.inference_mode():
        p = lm.model(**inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        with splice(lm.base, {HOOK: zero_replacement}):
            q = lm.model(**inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    counted = torch.from_numpy(part.predicted)
    kl = ((p.exp() * (p - q)).sum(-1) * counted).numpy()
    kl = np.bincount(part.document.ravel(), kl.ravel(), part.documents)
    assert found.kl == pytest.approx(kl, rel=1e-3)


def test_a_divergence_is_right_where_floats_are_at_their_limits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    other = logits + torch.randn(6, 500) * torch.logspace(-4, 2, 6).unsqueeze(1)
    p, q = (x.double().log_softmax(-1) for x in (logits, other))
    p32, q32 = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert torch.allclose(_divergence(p32, q32).double(), exact, rtol=1e-3)
    back = (q.exp() * (q - p)).sum(-1)
    assert torch.allclose(_divergence(q32, p32).double(), back, rtol=1e-3)
    assert not _divergence(p32, p32).any()


@pytest.mark.parametrize("hooks", [(HOOK,), (LATER,), (HOOK, LATER), ("layers.0.mlp",)])
def test_leaving_out_the_layers_before_a_splice_changes_not_a_bit(
    lm: LanguageModel, ids: Contexts, hooks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: dict[str, Variant] = {
        "zero": dict.fromkeys(hooks, zero_replacement),
        "mean": dict.fromkeys(hooks, mean_replacement(torch.linspace(-1, 1, 32))),
    }
    short = sums(lm, ids, variants)
    monkeypatch.setattr(Prefix, "recorded", lambda self: nullcontext())
    whole = sums(lm, ids, variants)
    for name in short:
        assert all(np.array_equal(a, b) for a, b in zip(short[name], whole[name], strict=True))


def test_layers_before_a_splice_run_once(lm: LanguageModel, ids: Contexts) -> None:
    runs = [0, 0, 0]
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
        for i, layer in enumerate(lm.model.model.layers)
    ]
    inner = [0]
    handles.append(
        lm.model.model.layers[0].mlp.register_forward_hook(
            lambda *_: inner.__setitem__(0, inner[0] + 1)
        )
    )
    sums(lm, ids, {str(i): {LATER: zero_replacement} for i in range(5)})
    for handle in handles:
        handle.remove()
    # The pass as it is, the trial with whole layers; the layers of the others are not computed.
    assert inner[0] == 2 and runs[2] == 1 + 2 + 5
    assert "forward" not in vars(lm.model.model.layers[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_another_family_with_layers_that_return_tuples(dtype: torch.dtype) -> None:
    """GPT-2's blocks; identity is free to the bit, and what is left out changes nothing."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=3, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.Module.to(model, dtype)
    lm = LanguageModel("gpt2", None, None, model, None)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, size=(4, 24))
    position = np.broadcast_to(np.arange(24), ids.shape).copy()
    ones = np.ones(ids.shape, bool)
    contexts = Contexts(ids, position, ones, ones[:, 1:], "joined", BY_POSITIONS,
                        np.arange(4)[:, None] + 0 * ids[:, 1:], ones[:, 1:])  # fmt: skip
    variants: dict[str, Variant] = {
        "identity": {"h.1.mlp": coder_replacement(identity(32))},
        "zero": {"h.1.mlp": zero_replacement},
    }
    found = sums(lm, contexts, variants)
    for name in ("nats", "right"):
        clean, same = (getattr(found[v], name) for v in (CLEAN, "identity"))
        assert np.array_equal(clean, same)
    assert not found["identity"].kl.any()
    with torch.inference_mode(), splice(lm.base, variants["zero"]):
        log_p = model(torch.from_numpy(ids), use_cache=False).logits[:, :-1].float().log_softmax(-1)
    nats = -log_p.gather(-1, torch.from_numpy(ids)[:, 1:, None])[..., 0].double().sum(1)
    assert found["zero"].nats == pytest.approx(nats.numpy(), rel=1e-5)


def test_a_model_whose_later_layers_look_back_runs_whole(
    lm: LanguageModel, ids: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that keeps something on the side, which left-out layers would not renew."""
    layers = lm.model.model.layers
    kept: dict[str, torch.Tensor] = {}
    noise = iter(torch.linspace(0.5, 5, 200))

    def keep(module: object, args: object, output: torch.Tensor) -> None:
        kept["scale"] = next(noise)

    handles = [
        layers[0].register_forward_hook(keep),
        layers[2].register_forward_hook(lambda m, a, out: out * kept["scale"]),
    ]
    tried: list[Prefix] = []
    real = Prefix.try_out

    def try_out(self: Prefix, *given: Any) -> None:
        tried.append(self)
        assert self.layers
        real(self, *given)

    monkeypatch.setattr(Prefix, "try_out", try_out)
    sums(lm, ids.first(32), {"zero": {HOOK: zero_replacement}})
    for handle in handles:
        handle.remove()
    (prefix,) = tried
    assert not prefix.layers and not prefix._parts


def test_what_comes_before_a_splice_within_its_layer_runs_once(
    lm: LanguageModel, ids: Contexts
) -> None:
    """The attention before it, and the module whose output is replaced."""
    layer = lm.model.model.layers[1]
    inner = {"self_attn": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
    runs = dict.fromkeys(inner, 0)
    handles = [
        module.register_forward_hook(lambda *_, n=name: runs.__setitem__(n, runs[n] + 1))
        for name, module in inner.items()
    ]
    sums(lm, ids, {str(i): {HOOK: zero_replacement} for i in range(5)})
    for handle in handles:
        handle.remove()
    assert runs == {"self_attn": 2, "mlp": 2}  # as it is, and the trial without leaving out


def test_an_interrupted_pass_goes_on(
    lm: LanguageModel, ids: Contexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bsc.eval.passes.context_pass, "_TOKENS_AT_ONCE", 96)
    variants: dict[str, Variant] = {"zero": {HOOK: zero_replacement}}
    whole = sums(lm, ids, variants)
    pieces = Pieces.open(tmp_path / "losses", "x")
    work = pass_over_contexts(lm, ids, variants, pieces)
    next(work)
    work.close()
    before = (tmp_path / "losses" / "00000.safetensors").stat().st_mtime_ns
    again = joined(pass_over_contexts(lm, ids, variants, pieces), ids.documents)
    assert (tmp_path / "losses" / "00000.safetensors").stat().st_mtime_ns == before
    for name in whole:
        assert all(np.array_equal(a, b) for a, b in zip(whole[name], again[name], strict=True))


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


def test_added_losses_are_paired() -> None:
    rng = np.random.default_rng(0)
    clean = rng.normal(300, 100, 100)
    none = np.zeros(100)
    contexts = planted_contexts(100, 100)
    changed = LossSums(clean + 10 + rng.normal(0, 1, 100), none, none, none)
    delta, interval = added_loss(changed, LossSums(clean, none, none, none), contexts)
    assert delta == pytest.approx(0.1, abs=0.01)
    # Contexts differ by 1 nat a token; what is added differs by a hundredth of that.
    assert interval is not None and interval[1] - interval[0] < 0.01


def test_no_group_holds_a_coder_whose_losses_are_not_finite(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was spliced with the others, so nothing is known of what they cost without it."""
    hooks = [f"layers.{i}.mlp" for i in range(3)]
    capture(
        CaptureConfig(
            model=str(tiny_model), store=tmp_path / "acts", hookpoints=tuple(hooks), tokens=2_000,
            held_out_tokens=600, context=32, text=TextSource(corpus="stdlib", held_out=0.3),
        )
    )  # fmt: skip
    run, _ = train_sweep(
        TrainConfig(
            store=tmp_path / "acts", runs=tmp_path, tokens=1_000, batch_rows=100,
            coders=({"k": 4, "n_latents": 32},),
        )
    )  # fmt: skip
    bad = run.coder_names()[1]

    def spoiled(*args: Any) -> Any:
        found = loss_sums(*args)
        assert any(name.startswith("together|") for name in found)
        for name in found:
            if name == bad or name.startswith("together|"):
                found[name].nats[:] = np.nan
        return found

    fast = EvalConfig(ce_tokens=256, ablation_bins=0, ultra_ablations=0, probes=())
    assert len(evaluate(run, fast).together) == 1
    monkeypatch.setattr("bsc.eval.evaluate.loss_sums", spoiled)
    found = evaluate(run, fast.but(ce_tokens=288))
    assert found.left_out == [bad] and found.together == {} and len(found.coders) == 2
