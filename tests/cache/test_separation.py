"""Rows of packed documents are those of each document alone, whatever the model; or it is refused.

The truth is the model itself on a document by itself, given nothing but its token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from bsc.cache.model.attention import BY_POSITIONS, Separation, forward_inputs
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.kinds import first_position
from bsc.cache.model.separation import document_separation, looks_ahead
from bsc.errors import UserError

WINDOW = 8
CPU = torch.device("cpu")
_SHAPE: Any = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
_MLP: Any = {"intermediate_size": 48}
_GROUPED: Any = {**_SHAPE, **_MLP, "num_key_value_heads": 1}
_OPT: Any = {k: v for k, v in _SHAPE.items() if k != "initializer_range"}
_CASES: dict[str, tuple[Any, str, Separation]] = {
    "llama": (lambda: transformers.LlamaConfig(**_GROUPED), "layers.{}.mlp", BY_POSITIONS),
    "gpt2": (
        lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=128),
        "h.{}.mlp",
        BY_POSITIONS,
    ),
    "mistral": (
        lambda: transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW),
        "layers.{}.mlp",
        BY_POSITIONS,
    ),
    "opt": (
        lambda: transformers.OPTConfig(
            **_OPT, ffn_dim=48, word_embed_proj_dim=32, init_std=0.15
        ),
        "decoder.layers.{}.fc1",
        Separation("causal"),
    ),
    "falcon": (
        lambda: transformers.FalconConfig(**_SHAPE), "h.{}.mlp", Separation("causal"),
    ),
    "gpt-oss": (
        lambda: transformers.GptOssConfig(
            **_GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
            sliding_window=WINDOW,
        ),
        "layers.{}.mlp",
        Separation("causal", WINDOW),
    ),
    "bert": (
        lambda: transformers.BertConfig(**_SHAPE, **_MLP),
        "encoder.layer.{}.intermediate",
        Separation("both"),
    ),
    "roberta": (
        lambda: transformers.RobertaConfig(**{**_SHAPE, **_MLP, "pad_token_id": 1}),
        "encoder.layer.{}.intermediate",
        Separation("both", first=2),
    ),
    "modernbert": (
        lambda: transformers.ModernBertConfig(
            **_SHAPE, **_MLP, local_attention=2 * WINDOW, cls_token_id=0, sep_token_id=0
        ),
        "layers.{}.mlp",
        Separation("both", WINDOW),
    ),
}  # fmt: skip


def build(name: str) -> tuple[torch.nn.Module, str]:
    torch.manual_seed(0)
    config, hook, _ = _CASES[name]
    model: torch.nn.Module = transformers.AutoModel.from_config(config(), dtype=torch.float32)
    return model.eval(), hook


def found_for(model: Any, tap: RowTap, dtype: torch.dtype = torch.float32) -> Separation:
    return document_separation(
        tap.rows, vocabulary=128, dtype=dtype, device=CPU, context=60,
        window=getattr(model.config, "sliding_window", None),
        first=first_position(model),
    )  # fmt: skip


@pytest.mark.parametrize("name", _CASES)
def test_packed_documents_have_the_rows_that_they_have_alone(name: str) -> None:
    if not hasattr(transformers, type(_CASES[name][0]()).__name__):  # pragma: no cover
        pytest.skip("this version of transformers has no such model")
    model, hook = build(name)
    tap = RowTap(model, [hook.format(i) for i in range(3)])
    separation = found_for(model, tap)
    assert separation == _CASES[name][2]
    lengths = [5, 3 * WINDOW, 1, 2 * WINDOW]
    ids = torch.randint(2, 128, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = tap.rows(forward_inputs(ids, position, packing="masked", separation=separation))
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, stop in pairwise(ends):
        alone = tap.rows({"input_ids": ids[:, start:stop]})
        for key, rows in alone.items():
            apart = (rows.float() - packed[key][start:stop].float()).norm(dim=1)
            assert (apart <= 0.01 * rows.float().norm(dim=1)).all(), (key, start)


def test_a_mask_is_of_documents_and_what_comes_before() -> None:
    ids, position = torch.zeros((1, 5), dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1]])

    def allowed(separation: Separation) -> Any:
        inputs = forward_inputs(ids, position, packing="masked", separation=separation)
        assert inputs["position_ids"].tolist() == (position + separation.first).tolist()
        masks = inputs["attention_mask"]
        if isinstance(masks, dict):
            return {kind: (mask[0, 0] == 0).int().tolist() for kind, mask in masks.items()}
        return (masks[0, 0] == 0).int().tolist()

    both = [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2
    before = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    near = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    beside = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert allowed(Separation("both", first=2)) == both
    assert allowed(Separation("causal")) == before
    windows = {"full_attention": before, "sliding_attention": near}
    assert allowed(Separation("causal", 2)) == windows
    assert allowed(Separation("both", 1)) == {"full_attention": both, "sliding_attention": beside}


class Averaging(torch.nn.Module):
    """Lets every token see every other one, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = torch.nn.Embedding(64, 4), torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        return self.mlp(x + x.mean(dim=1, keepdim=True))  # type: ignore[no-any-return]


def test_a_model_that_mixes_documents_is_refused() -> None:
    with pytest.raises(UserError, match=r"--packing masked: this model lets a token see other"):
        document_separation(
            RowTap(Averaging(), ["mlp"]).rows, vocabulary=64, dtype=torch.float32, device=CPU
        )


def test_documents_apart_with_other_rows_than_alone_are_refused() -> None:
    """A window that nobody names: its layers get a mask that is too wide."""
    model, hook = build("gpt-oss")
    tap = RowTap(model, [hook.format(1)])
    long = {"vocabulary": 128, "dtype": torch.float32, "device": CPU, "context": 60}

    def rows(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        if isinstance(inputs.get("attention_mask"), dict):
            raise TypeError("one mask")
        return tap.rows(inputs)

    with pytest.raises(UserError, match=r"differ from those of the documents alone, by \d+ % of"):
        document_separation(rows, window=WINDOW, **long)  # type: ignore[arg-type]


def test_a_mask_that_does_nothing_is_found_out() -> None:
    """The probe fails for a model that is simply not told where documents begin."""
    model, hook = build("llama")
    tap = RowTap(model, [hook.format(2)])

    def deaf(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        return tap.rows({"input_ids": inputs["input_ids"]})

    with pytest.raises(UserError, match="--packing masked"):
        document_separation(deaf, vocabulary=128, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(("name", "ahead"), [("llama", False), ("opt", False), ("bert", True)])
def test_a_model_that_sees_what_comes_after_is_known(name: str, ahead: bool) -> None:
    model, hook = build(name)
    tap = RowTap(model, [hook.format(i) for i in range(3)])
    assert looks_ahead(tap.rows, vocabulary=128, device=CPU) is ahead


@pytest.mark.parametrize("name", _CASES)
def test_half_precision_finds_the_same(name: str) -> None:
    model, hook = build(name)
    model = model.bfloat16()
    tap = RowTap(model, [hook.format(i) for i in range(3)])
    assert found_for(model, tap, torch.bfloat16) == _CASES[name][2]


def test_a_machine_without_memory_is_not_a_model_without_masks() -> None:
    model, hook = build("opt")
    tap = RowTap(model, [hook.format(0)])

    def rows(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        if "position_ids" in inputs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tap.rows(inputs)

    with pytest.raises(torch.OutOfMemoryError):
        document_separation(rows, vocabulary=128, dtype=torch.float32, device=CPU)
