"""Models that cannot be captured as they are get one sentence before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.attention import Separation
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.models import load_architecture, load_model
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError, UserError
from bsc.eval.passes.setting import matching_model, separation_in
from tests.conftest import EMBEDDED, make_model

_SHAPE: Any = {
    "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def saved(
    folder: Path,
    config: Any,
    kind: Any = transformers.AutoModel,
    dtype: torch.dtype = torch.float32,
) -> Path:
    torch.manual_seed(0)
    kind.from_config(config, dtype=dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    found, wanted = tensors(one), tensors(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def asked(model: Path, tmp_path: Path, **more: Any) -> CaptureConfig:
    fields: dict[str, Any] = {
        "model": str(model), "store": tmp_path / "acts", "tokens": 300, "held_out_tokens": 200,
        "text": TextSource(corpus="stdlib", held_out=0.5), "context": 32, "batch_tokens": 128,
    }  # fmt: skip
    return CaptureConfig(**fields | more)


def refused(model: Path, tmp_path: Path, says: str, **more: Any) -> None:
    with pytest.raises(UserError, match=says):
        capture(asked(model, tmp_path, **more))
    assert not (tmp_path / "acts").exists()


def test_weights_that_lack_something_are_refused(tmp_path: Path) -> None:
    """transformers fills in random numbers, other ones each time."""
    model = make_model(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, tmp_path, r"weights of .* lack layers\.1\.mlp\.down_proj\.weight, which")


def test_a_model_saved_without_its_head_is_captured_and_has_no_loss(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**_SHAPE, num_key_value_heads=1)
    model = saved(tmp_path / "m", config)
    capture(asked(model, tmp_path, hookpoints=("layers.1.mlp",)))
    with pytest.raises(UserError, match=r"lack lm_head\.weight.*with the head that predicts"):
        matching_model(ActivationStore(tmp_path / "acts"), None, torch.device("cpu"))


def test_an_encoder_and_a_decoder_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=4096
    )
    model = saved(tmp_path / "m", config)
    refused(model, tmp_path, "t5 has an encoder and a decoder")
    with pytest.raises(UserError, match="t5 has an encoder and a decoder"):
        load_architecture(str(model))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (transformers.LlamaConfig(**_SHAPE, num_key_value_heads=1), "rotary_emb.inv_freq"),
        (
            transformers.DeepseekV3Config(
                **_SHAPE, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
                kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            ),
            "layers.1.mlp.gate.e_score_correction_bias",
        ),
    ],
    ids=["llama", "deepseek"],
)  # fmt: skip
def test_what_a_model_keeps_in_float32_stays_in_float32(
    tmp_path: Path, config: Any, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies of rotary positions in bfloat16 are off by up to 0.2 %."""
    monkeypatch.setattr("bsc.cache.model.models.multiplies_bfloat16", lambda device: True)
    model = saved(tmp_path / "m", config, dtype=torch.bfloat16)
    truth = transformers.AutoModel.from_pretrained(model, dtype=torch.bfloat16)
    for dtype in ("auto", "bfloat16"):
        base = load_model(str(model), dtype=dtype).base
        assert base.dtype == torch.bfloat16
        assert tensors(base)[kept].dtype == torch.float32
        assert_same(base, truth)


@pytest.mark.parametrize("named", [True, False], ids=["dtype in config", "dtype of weights"])
@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma3TextConfig(**_SHAPE, num_key_value_heads=1, head_dim=16),
        transformers.XGLMConfig(
            vocab_size=4096, d_model=32, num_layers=2, attention_heads=2, ffn_dim=48,
            max_position_embeddings=64,
        ),
    ],
    ids=["gemma3", "xglm"],
)  # fmt: skip
def test_float32_for_a_checkpoint_in_bfloat16_is_float32_throughout(
    tmp_path: Path, config: Any, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model works out when it is made, scales and positions, is of the type it is made in.

    `bsc eval` loads the model of a store in the type that the store names: it has to be the same.
    """
    monkeypatch.setattr("bsc.cache.model.models.multiplies_bfloat16", lambda device: False)
    model = saved(tmp_path / "m", config, dtype=torch.bfloat16)
    if not named:
        said = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({k: said[k] for k in said if k != "dtype"}))
    base, wanted = (load_model(str(model), dtype=d).base for d in ("auto", "float32"))
    assert base.dtype == torch.float32
    assert_same(base, wanted)


def test_layers_that_share_their_weights_are_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", transformers.AlbertConfig(**_SHAPE, embedding_size=16))
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    pair = f"{layer}.ffn@{layer}.ffn_output"
    refused(model, tmp_path, "runs 2 times in one forward pass", hookpoints=(pair,))


def test_positions_that_begin_behind_padding_are_fewer(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**_SHAPE | {"max_position_embeddings": 34}, pad_token_id=1)
    model = saved(tmp_path / "m", config)
    assert load_model(str(model)).context == load_architecture(str(model))[1] == 32
    refused(model, tmp_path, "contexts of 2 to 32 tokens", context=34)
    capture(asked(model, tmp_path, context=None))
    assert ActivationStore(tmp_path / "acts").context == 32


def test_a_context_that_the_model_fails_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the config says of its length."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=4096, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = saved(tmp_path / "m", config)
    monkeypatch.setattr("bsc.cache.model.models.longest_context", lambda *_: 64)
    refused(model, tmp_path, "--context 64: the model fails on a context of 64 tokens", context=64)


def test_longrope_is_captured_up_to_where_its_positions_change(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8, "original_max_position_embeddings": 16, "factor": 4.0,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **_SHAPE, num_key_value_heads=1, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters=rope,
    )  # fmt: skip
    model = saved(tmp_path / "m", config)
    assert load_model(str(model)).context == 16
    refused(model, tmp_path, "contexts of 2 to 16 tokens")


@pytest.mark.parametrize("packing", ["masked", "none"])
def test_what_sees_ahead_has_no_loss_of_next_tokens(tmp_path: Path, packing: str) -> None:
    model = saved(
        tmp_path / "m", transformers.BertConfig(**_SHAPE), transformers.AutoModelForMaskedLM
    )
    capture(asked(model, tmp_path, packing=packing))
    with pytest.raises(UserError, match="see what comes after them, so there is no loss"):
        matching_model(ActivationStore(tmp_path / "acts"), None, torch.device("cpu"))


def test_a_model_without_a_head_in_transformers_has_no_loss(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=64, vocab_size=4096
    )
    with pytest.raises(UserError, match="no head for distilbert that predicts the next token"):
        load_model(str(saved(tmp_path / "m", config)), with_head=True)


def test_llama_4_has_its_layers_below_the_head(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **_SHAPE, num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        interleave_moe_layer_step=2, intermediate_size_mlp=32, pad_token_id=0,
    )  # fmt: skip
    model = saved(tmp_path / "m", config, transformers.AutoModelForCausalLM)
    ids = {"input_ids": torch.arange(8).unsqueeze(0)}
    alone, headed = (
        RowTap(load_model(str(model), with_head=h).base, ["layers.1.feed_forward"]).rows(ids)
        for h in (False, True)
    )
    assert all(alone[name].equal(headed[name]) for name in alone)


def test_a_config_of_images_and_text_is_read(tmp_path: Path) -> None:
    """Hookpoints of the part that reads text, and a head that predicts tokens."""
    text = {**_SHAPE, "num_key_value_heads": 1, "head_dim": 16, "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": 28, "patch_size": 14,
        "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=4000,
        boi_token_index=4001, eoi_token_index=4002,
    )  # fmt: skip
    model = saved(tmp_path / "m", config, transformers.AutoModelForImageTextToText)
    assert json.loads((model / "config.json").read_text())["model_type"] == "gemma3"
    capture(asked(model, tmp_path))
    store = ActivationStore(tmp_path / "acts")
    assert store.hookpoints[0].name == "language_model.layers.0.mlp"
    untrained = load_model(str(model), random_weights=1)
    assert type(untrained.base) is type(load_model(str(model)).base)
    lm = matching_model(store, None, torch.device("cpu"))
    assert lm.model(input_ids=torch.arange(8).unsqueeze(0)).logits.shape == (1, 8, 4096)


def test_a_store_says_how_documents_were_kept_apart_and_is_held_to_it(tmp_path: Path) -> None:
    shape = {k: v for k, v in _SHAPE.items() if k != "intermediate_size"}
    config = transformers.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, init_std=0.15)
    model = saved(tmp_path / "m", config, transformers.AutoModelForCausalLM)
    capture(asked(model, tmp_path))
    store = ActivationStore(tmp_path / "acts")
    assert store.attributes["separation"] == {"mask": "causal", "window": None, "first": 0}
    lm = matching_model(store, None, torch.device("cpu"))
    hooks = [h.name for h in store.hookpoints]
    assert separation_in(store, lm, hooks) == Separation("causal")
    del store.attributes["separation"]  # of a version that took another mask
    with pytest.raises(StoreError, match=r"kept apart otherwise.*Capture it again"):
        separation_in(store, lm, hooks)
