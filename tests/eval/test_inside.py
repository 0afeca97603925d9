"""`bsc.splice`: coders inside a running model, their codes, edits of them; docs/python.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import bsc
from bsc.eval.passes.splice import coder_replacement
from bsc.eval.passes.splice import splice as splice_rows
from bsc.train.coders.coder import Code, SparseCoder
from bsc.train.coders.module import CoderModule
from bsc.train.run import Run

HOOK = "layers.2.mlp"
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(5, 4000, (2, 9), generator=torch.Generator().manual_seed(1))


def coder_of(run: Run, ending: str) -> SparseCoder:
    return run.coder(next(n for n in run.coder_names() if n.endswith(ending)))


ENDINGS = ["sae-binary-k4-s0", "sae-continuous-k4-s0", "skip_transcoder-binary-k8-s0",
           "transcoder-continuous-k4-s0"]  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
@torch.no_grad()
def test_codes_are_those_of_the_rows_and_the_model_goes_on_with_them(
    ending: str, run: Run, model: Any, ids: torch.Tensor
) -> None:
    coder = coder_of(run, ending)
    plain = model(input_ids=ids).logits
    seen: dict[str, torch.Tensor] = {}

    def look(module: Any, args: Any, output: torch.Tensor) -> None:
        seen["x"], seen["y"] = args[0], output

    handle = model.base_model.get_submodule(HOOK).register_forward_hook(look)
    model(input_ids=ids)
    handle.remove()
    with bsc.splice(model, {HOOK: coder}) as codes:
        spliced = model(input_ids=ids).logits
    expected = coder.encode(seen["y" if coder.config.site == "sae" else "x"])
    code = codes[HOOK]
    assert code.latent.shape == (2, 9, coder.config.k)
    assert torch.equal(code.latent, expected.latent) and torch.equal(code.value, expected.value)
    with splice_rows(model.base_model, {HOOK: coder_replacement(coder)}):  # what `bsc eval` does
        assert torch.equal(model(input_ids=ids).logits, spliced)
    with bsc.splice(model, {HOOK: CoderModule(coder)}):
        torch.testing.assert_close(model(input_ids=ids).logits, spliced, rtol=0.02, atol=0.02)
    assert not torch.equal(spliced, plain)
    assert torch.equal(model(input_ids=ids).logits, plain), "nothing is left behind"


@torch.no_grad()
def test_with_the_error_only_the_edit_acts(run: Run, model: Any, ids: torch.Tensor) -> None:
    coder = coder_of(run, "skip_transcoder-binary-k8-s0")
    plain = model(input_ids=ids).logits
    with bsc.splice(model, {HOOK: coder}, error=True) as codes:
        assert torch.equal(model(input_ids=ids).logits, plain)
    on = codes[HOOK].latent[codes[HOOK].value != 0]
    silent = next(i for i in range(coder.config.n_latents) if i not in set(on.tolist()))
    for edit, acts in (
        (bsc.edits.off([silent]), False),
        (bsc.edits.off([int(on[0])]), True),
        (bsc.edits.set({silent: 0.0}), False),
        (bsc.edits.set({silent: 1.0}), True),
        (bsc.edits.only([int(on[0])]), True),
        (bsc.edits.only(range(coder.config.n_latents)), False),
    ):
        with bsc.splice(model, {HOOK: coder}, edit=edit, error=True):
            assert torch.equal(model(input_ids=ids).logits, plain) == (not acts)
    other = bsc.splice(model, {HOOK: coder}, edit={"layers.0.mlp": bsc.edits.off([1])})
    with (
        pytest.raises(ValueError, match=r"edit names 'layers.0.mlp', where no coder"),
        other,
    ):
        pass


@torch.no_grad()
def test_coders_act_on_the_tokens_that_are_named(run: Run, model: Any, ids: torch.Tensor) -> None:
    coder = coder_of(run, "sae-binary-k4-s0")
    plain = model(input_ids=ids).logits
    tokens = torch.zeros(2, 9, dtype=torch.bool)
    with bsc.splice(model, {HOOK: coder}, tokens=tokens):
        assert torch.equal(model(input_ids=ids).logits, plain)
    tokens[0, 5] = True  # of the last layer, so that no other row sees it
    with bsc.splice(model, {HOOK: coder}, tokens=tokens):
        changed = (model(input_ids=ids).logits != plain).any(dim=-1)
    assert torch.equal(changed, tokens)
    with (
        pytest.raises(ValueError, match="18 tokens pass, but 9 were said"),
        bsc.splice(model, {HOOK: coder}, tokens=tokens[0]),
    ):
        model(input_ids=ids)


def test_edits_are_of_the_code() -> None:
    code = Code(torch.tensor([[[3, 5], [1, 0]]]), torch.tensor([[[2.0, 4.0], [1.0, 0.0]]]),
                torch.zeros(1, 2, 2))  # fmt: skip
    dense = torch.zeros(1, 2, 8)

    def values(edited: Code) -> list[list[float]]:
        return dense.scatter_add(2, edited.latent, edited.value)[0].tolist()

    assert values(bsc.edits.off([5])(code))[0] == [0, 0, 0, 2, 0, 0, 0, 0]
    assert values(bsc.edits.only([5])(code))[0] == [0, 0, 0, 0, 0, 4, 0, 0]
    assert values(bsc.edits.set({5: 1.0, 7: 9.0})(code)) == [
        [0, 0, 0, 2, 0, 1, 0, 9], [0, 1, 0, 0, 0, 1, 0, 9]]  # fmt: skip
    assert values(code)[0] == [0, 0, 0, 2, 0, 4, 0, 0], "the code itself stays as it is"


def test_gradients_flow_through_a_model_into_a_coder(
    run: Run, model: Any, ids: torch.Tensor
) -> None:
    module = CoderModule(coder_of(run, "sae-binary-k4-s0"), surrogate="sigmoid")
    with bsc.splice(model, {HOOK: module}):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()


def test_another_architecture_and_a_module_that_is_not_there() -> None:
    torch.manual_seed(0)
    config: Any = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    gpt2 = GPT2LMHeadModel(config).eval()
    coder = SparseCoder(
        bsc.CoderConfig(site="sae", code="continuous", k=2, n_latents=4, d_in=16, d_out=16),
        {"encoder.weight": torch.randn(4, 16), "encoder.bias": torch.zeros(4),
         "W_dec": torch.randn(4, 16), "b_dec": torch.zeros(16)},
    )  # fmt: skip
    with torch.no_grad(), bsc.splice(gpt2, {"h.1.mlp": coder}) as codes:
        gpt2(input_ids=torch.arange(6).view(2, 3))
    assert codes["h.1.mlp"].latent.shape == (2, 3, 2)
    wrong = bsc.splice(gpt2, {"layers.1.mlp": coder})
    with pytest.raises(ValueError, match=r"GPT2Model has no module 'layers.1.mlp'"), wrong:
        pass


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_code_in_the_docs_runs(
    evaluated: Run, store_path: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On the small run of the tests."""
    text = (DOCS / "python.md").read_text()
    for name, place in (
        ('"bsc-demo/runs/demo"', repr(str(evaluated.folder))),
        ('"bsc-demo/acts"', repr(str(store_path))),
        ('Path(bsc.embedded.__path__[0]) / "model"', repr(str(tiny_model))),
        ("layers.3.mlp", HOOK),
        ("binary-k32", "skip_transcoder-binary-k8"),
    ):
        assert name in text, name
        text = text.replace(name, place)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
