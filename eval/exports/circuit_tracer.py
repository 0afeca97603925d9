"""Transcoders of all layers as circuit-tracer reads them: one folder, a local `transcoder_set`.

    config.yaml                 model, hooks
    layer_<i>.safetensors       W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d], W_skip [d, d],
                                activation_function.threshold [F], for every layer from 0 on

Its JumpReLU is pre 1[pre > threshold], without a relu, so no threshold may be below 0. Its release
(0.5.0) takes a top-k coder for a ReLU one without a word, and the version after it selects without
a relu: top-k coders are not written. Attribution goes through a latent with slope 1, which a binary
one does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from bsc.errors import StoreError, UserError
from bsc.eval.exports.weights import (
    Found,
    Reference,
    linear_threshold,
    make_coder,
    read_weights,
    strict_threshold,
)
from bsc.files import canonical_json, write_atomically
from bsc.records import read_file
from bsc.tensor_file import write_tensors
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig

__all__ = ["layers_of", "read", "reference", "refusal", "write_set"]


_HOOKS = ("mlp.hook_in", "mlp.hook_out")
"""Names of what our MLPs read and give."""


def refusal(config: CoderConfig) -> str | None:
    """Why circuit-tracer cannot hold such a coder."""
    if config.site == "sae":
        return "circuit-tracer has transcoders alone; use --format saelens or sparsify"
    if config.code != "continuous":
        return (
            f"circuit-tracer attributes through a latent's pre-activation, which the value of a "
            f"{config.code} latent is not"
        )
    if config.select != "batch_topk":
        return (
            "circuit-tracer's release takes a coder that selects k per row for one that selects "
            "nothing; train with select = 'batch_topk'"
        )
    if config.d_in != config.d_out:
        return f"circuit-tracer has one width; this coder maps {config.d_in} to {config.d_out}"
    return None


def layers_of(hookpoints: Mapping[str, str]) -> dict[int, str]:
    """Coder of every layer, from 0 on, given the hookpoint of each coder by its name.

    Raises:
        UserError: a coder is not at an MLP, a layer has two, or one is missing.
    """
    found: dict[int, str] = {}
    for name, hookpoint in hookpoints.items():
        place = re.fullmatch(r"(?:[^@]*\.)?(\d+)\.mlp", hookpoint)
        if place is None:
            raise UserError(f"{name}: circuit-tracer replaces MLPs; this one is at {hookpoint}.")
        layer = int(place.group(1))
        if layer in found:
            raise UserError(
                f"circuit-tracer has one coder for each layer, but {found[layer]} and {name} are "
                f"both of layer {layer}. Name one of them."
            )
        found[layer] = name
    missing = [i for i in range(max(found) + 1) if i not in found]
    if missing:
        raise UserError(
            f"circuit-tracer needs a coder for every layer from 0 on; none is named for layer "
            f"{', '.join(map(str, missing))}."
        )
    return dict(sorted(found.items()))


def write_set(coders: Mapping[int, SparseCoder], folder: Path, model: str) -> None:
    """Write coders of layers 0, 1, 2, ... into an empty folder.

    Raises:
        UserError: they have several widths.
    """
    widths = {(c.config.n_latents, c.config.d_in) for c in coders.values()}
    if len(widths) > 1:
        raise UserError(f"circuit-tracer has one width for all layers; found {sorted(widths)}.")
    for layer, coder in coders.items():
        t = coder.tensors
        threshold = strict_threshold(coder.thresholds()).clamp(min=0)
        arrays = {
            "W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": t["W_dec"], "b_dec": t["b_dec"],
            "activation_function.threshold": threshold,
        }  # fmt: skip
        if "W_skip" in t:
            arrays["W_skip"] = t["W_skip"]
        contiguous = {n: a.float().contiguous() for n, a in arrays.items()}
        write_tensors(folder / f"layer_{layer}.safetensors", contiguous)
    config = {
        "model_kind": "transcoder_set", "model_name": model, "scan": "bsc",
        "feature_input_hook": _HOOKS[0], "feature_output_hook": _HOOKS[1],
    }  # fmt: skip
    write_atomically(folder / "config.yaml", canonical_json(config))  # JSON is YAML


def reference(folder: Path, layer: int) -> Reference:
    """circuit-tracer's formula: pre where it is above the threshold."""
    t = {n: a.float() for n, a in load_file(folder / f"layer_{layer}.safetensors").items()}
    threshold = t.get("activation_function.threshold", torch.tensor(0.0))

    def run(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        pre = linear(x_Nd, t["W_enc"], t["b_enc"])
        code = torch.where(pre > threshold, pre, 0.0)
        y = code @ t["W_dec"] + t["b_dec"]
        return code, y + x_Nd @ t["W_skip"].T if "W_skip" in t else y

    return run


def read(folder: Path, layer: int) -> Found:
    """The transcoder of a layer, with ReLU or JumpReLU latents.

    Raises:
        UserError: it is damaged, or selects k latents in every row without a relu.
    """
    path = folder / f"layer_{layer}.safetensors"
    config = _config(folder / "config.yaml")
    activation = config.get("activation", "relu")
    if activation != "relu":
        shown = activation if isinstance(activation, str) else type(activation).__name__
        raise UserError(
            f"{folder}: activation {shown:.40}: circuit-tracer selects without a "
            f"relu, so that latents below 0 are on, which has no counterpart here."
        )
    t = read_weights(path)
    threshold = t.get("activation_function.threshold")
    if threshold is None:
        t["select_threshold"] = torch.tensor([torch.finfo(torch.float32).tiny])
    else:
        if bool((threshold < 0).any()):
            raise UserError(f"{path}: a threshold is below 0, where it has no relu and ours does.")
        same = bool((threshold == threshold[:1]).all())
        t["select_threshold"] = linear_threshold(threshold[:1] if same else threshold)
    ours = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    t = {ours.get(name, name): value for name, value in t.items()}
    site = "skip_transcoder" if "W_skip" in t else "transcoder"
    coder = make_coder(path, t, site=site, code="continuous", select="batch_topk", k=1)
    model = config.get("model_name")
    hooks = config.get("feature_input_hook"), config.get("feature_output_hook")
    # Of other hooks the rows are others: the user is asked where they belong.
    place = f"layers.{layer}.mlp" if hooks == _HOOKS else f"layer {layer}, {hooks!r:.80}"
    return Found(coder, model if isinstance(model, str) else None, place, path.name)


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(read_file(path, "config of circuit-tracer"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not YAML ({error!s:.200}).") from None
    if not isinstance(config, dict):
        raise StoreError(f"{path}: should hold fields by name.")
    return config
