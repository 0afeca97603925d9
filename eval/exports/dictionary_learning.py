"""SAEs as dictionary_learning reads them: `dictionary_learning.utils.load_dictionary(folder, ...)`.

    config.json     trainer: class of the dictionary, widths, k, model, layer
    ae.pt           encoder.weight [F, d], encoder.bias [F], decoder.weight [d, F], b_dec [d],
                    k and threshold, scalars

A top-k SAE is its AutoEncoderTopK, one with batch top-k its BatchTopKSAE, whose threshold is
compared strictly. Its dictionaries subtract b_dec from what they read, so transcoders are none.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from bsc.eval.exports.weights import CoderFormat, Origin, Reference, strict_threshold
from bsc.files import write_atomically, write_json
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
    threshold = torch.tensor(-1.0) if by_row else strict_threshold(t["select_threshold"])[0]
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
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    t = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)

    def run(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        pre = linear(x_Nd - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu()
        if trainer["dict_class"] == "BatchTopKSAE":
            code = pre * (pre > t["threshold"])
        else:
            top = pre.topk(int(t["k"]), dim=1)
            code = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        return code, linear(code, t["decoder.weight"]) + t["b_dec"]

    return run


DICTIONARY_LEARNING = CoderFormat(refusal, write, reference)
