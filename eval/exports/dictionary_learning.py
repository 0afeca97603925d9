"""SAEs as dictionary_learning reads them: `dictionary_learning.utils.load_dictionary(folder, ...)`.

    config.json     trainer: class of the dictionary, widths, k, model, layer
    ae.pt           encoder.weight [F, d], encoder.bias [F], decoder.weight [d, F], b_dec [d],
                    k and threshold, scalars

A top-k SAE is its AutoEncoderTopK, one with batch top-k its BatchTopKSAE, whose threshold is
compared strictly. Its dictionaries subtract b_dec from what they read, so transcoders are none. Its
loader gives the decoder rows of an AutoEncoder (ReLU) length 1, and the codes their lengths.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bsc.errors import StoreError, UserError
from bsc.eval.exports.weights import (
    CoderFormat,
    Found,
    Origin,
    Reference,
    linear_threshold,
    make_coder,
    strict_threshold,
)
from bsc.files import write_atomically, write_json
from bsc.records import parse_object, read_file
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig

__all__ = ["DICTIONARY_LEARNING"]


def refusal(config: CoderConfig) -> str | None:
    """Why dictionary_learning cannot hold such a coder."""
    if config.site != "sae":
        return (
            "dictionary_learning has SAEs alone: it subtracts b_dec from what is encoded; use "
            "--format sparsify, or saelens for batch top-k"
        )
    if config.code != "continuous":
        return (
            f"dictionary_learning has no {config.code} latents; use --format sparsify-binary for "
            f"binary coders with top-k"
        )
    if config.select == "groupmax":
        return "dictionary_learning has no groupmax; use --format sparsify"
    return None


def write(coder: SparseCoder, folder: Path, origin: Origin) -> None:
    """Write the two files."""
    config, t = coder.config, coder.tensors
    by_row = config.select == "topk"
    if not by_row and float(coder.thresholds().amin()) != float(coder.thresholds().amax()):
        raise UserError(
            "dictionary_learning has one threshold for all latents, and this coder one for each; "
            "use --format saelens."
        )
    threshold = torch.tensor(-1.0) if by_row else strict_threshold(coder.thresholds()[0])
    arrays = {
        "encoder.weight": coder.W_enc, "encoder.bias": coder.b_enc,
        "decoder.weight": t["W_dec"].T, "b_dec": t["b_dec"],
    }  # fmt: skip
    saved = {n: a.detach().float().contiguous().clone() for n, a in arrays.items()}
    saved |= {"k": torch.tensor(config.k, dtype=torch.int32), "threshold": threshold.clone()}
    file = io.BytesIO()
    torch.save(saved, file)
    name = "AutoEncoderTopK" if by_row else "BatchTopKSAE"
    layer = re.search(r"\d+", origin.hookpoint)
    trainer = {
        "trainer_class": "TopKTrainer" if by_row else "BatchTopKTrainer", "dict_class": name,
        "activation_dim": config.d_in, "dict_size": config.n_latents, "k": config.k,
        "layer": int(layer.group()) if layer else None, "lm_name": origin.model,
        "submodule_name": origin.hookpoint, "device": "cpu", "lr": 0.0, "steps": 0,
        "wandb_name": name,
    }  # fmt: skip
    write_atomically(folder / "ae.pt", file.getvalue())
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {}})


def reference(folder: Path) -> Reference:
    """Its formula: relu, then the k largest of a row, or what is above the threshold."""
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    saved = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    t = {n: a.float() for n, a in saved.items()}
    b_dec = t["b_dec"] if "b_dec" in t else t["bias"]
    if kind == "AutoEncoder":
        norm = t["decoder.weight"].norm(dim=0)
        t["decoder.weight"] = t["decoder.weight"] / norm
        t["encoder.weight"] = t["encoder.weight"] * norm[:, None]
        t["encoder.bias"] = t["encoder.bias"] * norm

    def run(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        code = linear(x_Nd - b_dec, t["encoder.weight"], t["encoder.bias"]).relu()
        if kind == "BatchTopKSAE":
            code = code * (code > t["threshold"])
        elif kind == "AutoEncoderTopK":
            top = code.topk(int(t["k"]), dim=1)
            code = torch.zeros_like(code).scatter(1, top.indices, top.values)
        return code, linear(code, t["decoder.weight"]) + b_dec

    return run


def read(folder: Path) -> Found:
    """An AutoEncoderTopK, a BatchTopKSAE or an AutoEncoder (ReLU).

    Raises:
        UserError: it is damaged, holds anything but tensors, or is of another class.
    """
    config_path, path = folder / "config.json", folder / "ae.pt"
    config = parse_object(read_file(config_path, "config of dictionary_learning"), config_path)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    kind = trainer.get("dict_class")
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder"):
        raise UserError(f"{folder}: dict_class {kind!r:.40} has no counterpart here.")
    saved = _tensors(path)
    t = {n: a.float() for n, a in saved.items()}
    if "decoder.weight" not in t or ("b_dec" not in t and "bias" not in t):
        raise StoreError(f"{path}: no decoder here; it has {', '.join(sorted(t))}.")
    fields: dict[str, Any] = {"select": "batch_topk", "k": 1}
    if kind == "AutoEncoder":  # how many latents are on is measured
        t["select_threshold"] = torch.tensor([torch.finfo(torch.float32).tiny])
    elif "k" not in t or t["k"].numel() != 1:
        raise StoreError(f"{path}: no k here, which an {kind} has.")
    else:
        fields["k"] = int(t["k"])
    if kind == "AutoEncoderTopK":
        fields["select"] = "topk"
    if kind == "BatchTopKSAE":
        threshold = t.get("threshold", torch.tensor(-1.0)).reshape(-1)
        if len(threshold) != 1 or float(threshold) < 0:
            raise UserError(
                f"{folder}: its threshold was never set, so that what is on depends on the batch."
            )
        t["select_threshold"] = linear_threshold(threshold)
    t |= {"W_dec": t["decoder.weight"].T, "b_dec": t["b_dec"] if "b_dec" in t else t["bias"]}
    if kind == "AutoEncoder":  # as its loader does
        length = t["W_dec"].norm(dim=1, keepdim=True)
        if not bool((length > 0).all()):
            raise UserError(
                f"{folder}: a decoder row of length 0, which dictionary_learning cannot load."
            )
        t["W_dec"] = t["W_dec"] / length
        t["encoder.weight"] = t["encoder.weight"] * length
        t["encoder.bias"] = t["encoder.bias"] * length.squeeze(1)
    coder = make_coder(path, t, site="sae", code="continuous", **fields)
    model, hook = trainer.get("lm_name"), trainer.get("submodule_name")
    return Found(
        coder, model if isinstance(model, str) else None, hook if isinstance(hook, str) else None,
        path.name,
    )  # fmt: skip


def _tensors(path: Path) -> dict[str, Tensor]:
    """A state dict, and nothing that could run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing.") from None
    except Exception as error:  # whatever a damaged or hostile pickle makes of the reader
        first = next(iter(str(error).splitlines()), repr(error))
        raise StoreError(f"{path}: not a file of tensors alone ({first:.200}).") from None
    if not isinstance(saved, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in saved.items()
    ):
        raise StoreError(f"{path}: should hold tensors by name.")
    if odd := [n for n, t in saved.items() if t.layout != torch.strided or t.is_complex()]:
        raise StoreError(f"{path}: {', '.join(odd)} should be dense and real.")
    if bad := [n for n, t in saved.items() if not bool(t.isfinite().all())]:
        raise StoreError(f"{path}: {', '.join(bad)} hold values that are not finite (NaN or inf).")
    return saved


DICTIONARY_LEARNING = CoderFormat(refusal, write, reference, read)
