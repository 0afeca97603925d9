from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bsc.errors import ConfigError, StoreError
from bsc.records import write_record
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
        ("json", StoreError, "cannot be read as JSON"),
        ("about", StoreError, "not a coder's config"),
        ("byte", StoreError, "damaged or exchanged: the tensors do not have the hash"),
        ("no hash", StoreError, "not a coder's config .it has no 'tensors_xxh3_128'"),
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
    elif damage == "byte":
        weights = tmp_path / "coder.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-3] ^= 1
        weights.write_bytes(raw)
    elif damage == "json":
        path.write_text("{")
    else:
        if damage == "version":
            saved["version"] = 99
        elif damage == "about":
            saved["about"] = None
        elif damage == "no hash":
            del saved["tensors_xxh3_128"]
        elif damage == "key":
            saved["coder"]["temperatur"] = 1.0
        else:
            saved["coder"]["n_latents"] = 13
        write_record(path, saved)
    with pytest.raises(error, match=message):
        SparseCoder.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("encoder.weight", float("nan")), ("encoder.bias", float("inf")), ("W_dec", -float("inf"))],
)
def test_values_that_are_not_finite_are_refused_unless_training_ended_so(
    tmp_path: Path, name: str, value: float
) -> None:
    coder = make_coder(site="sae", code="binary")
    coder.tensors[name].view(-1)[3] = value
    coder.save(tmp_path / "a")  # with the hash of what it holds
    with pytest.raises(StoreError, match=rf"a/coder.safetensors: {name} hold values that are not"):
        SparseCoder.load(tmp_path / "a")
    coder.about["frozen_at_step"] = 7
    coder.save(tmp_path / "b")  # it is named and left out by whoever reads the run
    assert SparseCoder.load(tmp_path / "b").about["frozen_at_step"] == 7


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bool])
def test_tensors_of_another_dtype_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    coder = make_coder(site="sae", code="continuous")
    coder.save(tmp_path)
    changed = coder.tensors | {"W_dec": coder.W_dec.to(dtype)}
    save_file(changed, tmp_path / "coder.safetensors")
    with pytest.raises(StoreError, match="should all be float32, found"):
        SparseCoder.load(tmp_path)


def test_a_coder_of_version_1_has_no_hash_and_still_loads(tmp_path: Path) -> None:
    coder = make_coder(site="sae", code="binary")
    coder.save(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["tensors_xxh3_128"]
    path.write_text(json.dumps(saved | {"version": 1}))
    assert torch.equal(SparseCoder.load(tmp_path).W_dec, coder.W_dec)


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


@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.parametrize("code", ["binary", "continuous"])
def test_a_code_as_a_matrix(code: str) -> None:
    coder = make_coder(site="sae", code=code)
    coder.b_enc.sub_(4.0)  # so that some selected latents are off
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
    encoded = coder.encode(x)
    matrix = coder.csr(encoded)
    dense = torch.zeros(20, 12).scatter(1, encoded.latent.view(20, 3), encoded.value.view(20, 3))
    assert matrix.shape == (20, 12) and matrix.nnz == int((dense != 0).sum()) < 60
    assert (matrix.toarray() == dense.numpy()).all()
    as_torch = torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices),
        torch.from_numpy(matrix.data), matrix.shape,
    )  # fmt: skip
    summed = (as_torch @ coder.W_dec).view(4, 5, 6)
    torch.testing.assert_close(summed, coder.latent_sum(encoded))
