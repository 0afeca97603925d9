"""Coders as sparsify (eai-sparsify) reads them: `SparseCoder.load_from_disk(folder)`.

    cfg.json            what the coder is
    sae.safetensors     encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d],
                        W_skip [d, d]

The names and shapes are ours. Releases (1.3.3) know `topk` and `groupmax`; the branch `binary` of
its repository also `topk_binary`, with a tensor log_threshold [F]. A binary coder is never written
as `topk`: a release would read it without a word and give other reconstructions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from bsc.errors import UserError
from bsc.eval.exports.weights import (
    CoderFormat,
    Found,
    Origin,
    Reference,
    make_coder,
    read_weights,
    stated,
)
from bsc.files import write_json
from bsc.records import parse_object, read_file
from bsc.tensor_file import write_tensors
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig

__all__ = ["SPARSIFY", "SPARSIFY_BINARY"]


_PLACE = re.compile(r"(^|\.)\d+(\.|$)")
"""Names of modules of a layer: layers.3.mlp, h.3.mlp."""


def _refusal(config: CoderConfig) -> str | None:
    if config.code == "hybrid":
        return "sparsify has no coder with latents of two kinds; train the two codes apart"
    if config.select == "batch_topk":
        return (
            "sparsify selects k latents in every row and has no threshold for all; "
            "use --format saelens, or train with select = 'topk'"
        )
    if config.d_in != config.d_out:
        return f"sparsify has one width, and this coder maps {config.d_in} to {config.d_out}"
    return None


def refusal(config: CoderConfig) -> str | None:
    """For releases."""
    if config.code == "binary":
        return (
            "a release of sparsify has no binary latents; its branch `binary` has: "
            "use --format sparsify-binary"
        )
    return _refusal(config)


def binary_refusal(config: CoderConfig) -> str | None:
    """For the branch `binary`."""
    if config.code == "binary":
        if config.select == "groupmax":
            return "the branch reads binary latents with top-k alone; train with select = 'topk'"
        if config.always_on or not config.has_threshold:
            return (
                "in the branch a selected latent whose margin is not above 0 is off, here every "
                "selected one is on; train without exact_k and with threshold = 'learned' or "
                "'fixed'"
            )
    return _refusal(config)


def write(coder: SparseCoder, folder: Path, origin: Origin) -> None:
    """Write the two files."""
    config, tensors = coder.config, coder.tensors
    written: dict[str, Any] = {
        "activation": config.select, "expansion_factor": max(1, config.n_latents // config.d_in),
        "normalize_decoder": config.decoder_norm == "unit", "num_latents": config.n_latents,
        "k": config.k, "multi_topk": config.multi_topk, "d_in": config.d_in,
        "skip_connection": "W_skip" in tensors, "transcode": config.site != "sae",
    }  # fmt: skip
    if config.code == "binary":
        written |= {
            "activation": "topk_binary", "ste": config.surrogate,
            "ste_temperature": config.temperature, "tied_decoder": False, "matryoshka": False,
            "matryoshka_groups": 1,
        }  # fmt: skip
    arrays = {n: t.float().contiguous() for n, t in tensors.items()}
    write_tensors(folder / "sae.safetensors", arrays)
    write_json(folder / "cfg.json", written)


def reference(folder: Path) -> Reference:
    """sparsify's formula: relu before the selection, which is the k largest of a row, or the
    largest of each of k runs of latents."""
    cfg = json.loads((folder / "cfg.json").read_text())
    t = {n: a.float() for n, a in load_file(folder / "sae.safetensors").items()}
    k, transcode = cfg["k"], cfg.get("transcode")

    def run(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        rows = x_Nd if transcode else x_Nd - t["b_dec"]
        pre = linear(rows, t["encoder.weight"], t["encoder.bias"])
        code = torch.zeros_like(pre)
        if cfg.get("activation") == "groupmax":
            values, inside = pre.relu().unflatten(1, (k, -1)).max(dim=2)
            index = inside + torch.arange(0, pre.shape[1], pre.shape[1] // k)
        elif cfg.get("activation") == "topk_binary":
            values, index = (pre - t["log_threshold"].exp()).topk(k, dim=1)
            values = (values > 0).float()
        else:
            values, index = pre.relu().topk(k, dim=1)
        code.scatter_(1, index, values)
        y = code @ t["W_dec"] + t["b_dec"]
        return code, y + x_Nd @ t["W_skip"].T if "W_skip" in t else y

    return run


def read(folder: Path) -> Found:
    """A coder of a release or of the branch `binary`.

    Raises:
        UserError: it is damaged, or has latents that ours have not.
    """
    cfg_path, path = folder / "cfg.json", folder / "sae.safetensors"
    cfg = parse_object(read_file(cfg_path, "config of sparsify"), cfg_path)
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax", "topk_binary"):
        raise UserError(f"{folder}: activation {activation!r:.40} has no counterpart here.")
    for name in ("tied_decoder", "gram_lookup", "embed_skip"):
        if cfg.get(name):
            raise UserError(f"{folder}: {name} has no counterpart here.")
    fields: dict[str, Any] = {"code": "continuous", "select": "topk"}
    if activation == "groupmax":
        fields["select"] = "groupmax"
    if activation == "topk_binary":
        fields |= {
            "code": "binary", "surrogate": cfg.get("ste", "sigmoid"),
            "temperature": cfg.get("ste_temperature", 2.0),
        }  # fmt: skip
    tensors = read_weights(path)
    skip, transcode = bool(cfg.get("skip_connection")), bool(cfg.get("transcode"))
    if skip and not transcode:
        raise UserError(f"{folder}: an SAE with a skip path has no counterpart here.")
    site = "sae" if not transcode else "skip_transcoder" if skip else "transcoder"
    coder = make_coder(path, tensors, site=site, k=stated(cfg, "k", int, cfg_path), **fields)
    # Folders are called like the hookpoint, or the coders in one are.
    named = [n for n in (folder.name, folder.parent.name) if _PLACE.search(n)]
    return Found(coder, None, named[0] if named else None, path.name)


SPARSIFY = CoderFormat(refusal, write, reference, read)
SPARSIFY_BINARY = CoderFormat(binary_refusal, write, reference, read)
