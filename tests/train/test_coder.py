from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bsc.errors import ConfigError, StoreError
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig


def make_coder(**fields: object) -> SparseCoder:
    config = CoderConfig(**{"k": 3, "n_latents": 12, "d_in": 6, "d_out": 6} | fields)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=g) for n, s in parameter_shapes(config).items()}
    return SparseCoder(config, tensors, about={"hookpoint": "layers.0.mlp"})


@pytest.mark.parametrize(
    ("site", "code"),
    itertools.product(("sae", "transcoder", "skip_transcoder"), ("binary", "continuous")),
)
def test_a_saved_coder_reloads_bit_for_bit(tmp_path: Path, site: str, code: str) -> None:
    coder = make_coder(site=site, code=code)
    coder.save(tmp_path / "c")
    again = SparseCoder.load(tmp_path / "c")
    assert again.config == coder.config and again.about == coder.about
    assert set(again.tensors) == set(coder.tensors)
    for name, t in coder.tensors.items():
        assert torch.equal(again.tensors[name].view(torch.int32), t.view(torch.int32))
    x = torch.randn(9, 6)
    assert torch.equal(again(x), coder(x))


def test_the_tensors_on_disk_have_the_names_and_shapes_of_the_design(tmp_path: Path) -> None:
    make_coder(site="skip_transcoder", code="binary", d_out=5).save(tmp_path)
    with safe_open(tmp_path / "coder.safetensors", "pt") as file:
        shapes = {k: tuple(file.get_tensor(k).shape) for k in file.keys()}  # noqa: SIM118
    assert shapes == {
        "encoder.weight": (12, 6), "encoder.bias": (12,), "W_dec": (12, 5), "b_dec": (5,),
        "W_skip": (5, 6), "log_threshold": (12,),
    }  # fmt: skip


def test_binary_codes_are_0_or_1_and_at_most_k_are_on() -> None:
    coder = make_coder(site="sae", code="binary")
    coder.b_enc.sub_(2)
    code = coder.encode(torch.randn(200, 6))
    assert set(code.value.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(code.value == 1, code.margin > 0)
    assert code.latent.shape == (200, 3)


def test_a_continuous_code_is_the_relu_of_the_largest_pre_activations() -> None:
    coder = make_coder(site="sae", code="continuous")
    x = torch.randn(50, 6)
    pre = (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc
    dense = torch.zeros(50, 12).scatter(1, coder.encode(x).latent, coder.encode(x).value)
    top = torch.zeros(50, 12).scatter(1, pre.topk(3).indices, 1.0)
    torch.testing.assert_close(dense, pre.relu() * top)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("missing", StoreError, "no coder here"),
        ("version", StoreError, "format version 99"),
        ("key", ConfigError, r"unknown key 'temperatur' .did you mean 'temperature'"),
        ("shape", StoreError, "should be"),
        ("weights", StoreError, "cannot be read"),
        ("json", StoreError, "not a coder's config"),
    ],
)
def test_a_damaged_coder_gets_one_message(
    tmp_path: Path, damage: str, error: type[Exception], message: str
) -> None:
    make_coder(site="sae", code="binary").save(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "weights":
        (tmp_path / "coder.safetensors").write_bytes(b"\x80\x04pickle")
    elif damage == "json":
        path.write_text("{")
    else:
        if damage == "version":
            saved["version"] = 99
        elif damage == "key":
            saved["coder"]["temperatur"] = 1.0
        else:
            saved["coder"]["n_latents"] = 13
        path.write_text(json.dumps(saved))
    with pytest.raises(error, match=message):
        SparseCoder.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 13}, "k=13 is more than n_latents=12"),
        ({"site": "sae", "d_in": 5}, "an SAE reconstructs what it reads"),
        ({"site": "transcoder", "decoder_norm": "unit"}, "decoder_norm='unit' is for SAEs"),
    ],
)
def test_impossible_coders_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_coder(**fields)
