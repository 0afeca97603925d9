"""The embedded model is what its card says."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bsc.cache.model.models import load_model
from bsc.embedded.corpus import documents
from bsc.embedded.held_out import is_held_out
from bsc.embedded.recipe import ARCHITECTURE, encode, held_out_nats
from tests.conftest import EMBEDDED

CARD = (EMBEDDED / "README.md").read_text()


def figures(corpus: str) -> list[float]:
    """Of the card's row for a held-out text: model nats, model bits, 5-gram nats, 5-gram bits."""
    row = next(line for line in CARD.splitlines() if line.startswith(f"| `{corpus}`"))
    return [float(x) for x in re.findall(r"\d+\.\d+", row)]


def test_files_are_small_bf16_and_safe() -> None:
    names = {p.name for p in EMBEDDED.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) < 10e6
    with safe_open(EMBEDDED / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_card_says_what_the_model_is_and_it_beats_the_5_gram_model() -> None:
    lm = load_model("demo", with_head=True)
    parameters = sum(p.numel() for p in lm.model.parameters())
    assert f"{parameters:,} parameters" in CARD
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        assert getattr(lm.model.config, key) == ARCHITECTURE[key]
    seen = int(re.search(r"Training tokens seen \| ([\d,]+)", CARD)[1].replace(",", ""))  # type: ignore[index]
    assert seen >= 40_000_000
    for corpus in ("env", "stdlib"):
        nats, bits, ngram_nats, ngram_bits = figures(corpus)
        assert nats < 0.93 * ngram_nats and bits < 0.93 * ngram_bits


@pytest.mark.slow
def test_the_loss_of_the_card_is_the_loss_of_the_weights() -> None:
    """On all held-out files of `stdlib`; another Python has them in another version."""
    lm = load_model("demo", dtype="float32", with_head=True)
    held_out = [d for d in documents("stdlib") if is_held_out(d.name)]
    tokens = encode(lm.tokenizer.backend_tokenizer, held_out)
    nats = held_out_nats(lm.model, tokens) / (len(tokens) - 1)
    assert nats == pytest.approx(figures("stdlib")[0], rel=0.05)


def test_held_out_loss_predicts_every_token_but_the_first_once() -> None:
    """A model that is uniform over its words must lose log V on each of them."""

    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            logits = torch.zeros(*input_ids.shape, 4096)
            return type("Out", (), {"logits": logits})

    for n in (2, 100, 129, 256, 257, 1000):
        nats = held_out_nats(Uniform(), np.zeros(n, np.uint16))  # type: ignore[arg-type]
        assert nats == pytest.approx((n - 1) * math.log(4096), rel=1e-6), n
