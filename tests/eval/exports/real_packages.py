"""Runs in a process that sees the packages of other tools: loads what `bsc export` wrote with their
own code, and writes down codes and reconstructions.

    python real_packages.py FOLDER     cases.json and rows.safetensors in, found-*.safetensors out
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = tuple[torch.Tensor, torch.Tensor]


def sparsify(folder: Path, x: torch.Tensor) -> Tensors:
    """By `load_from_disk`, `encode` and `forward`."""
    from sparsify import SparseCoder

    coder: Any = SparseCoder.load_from_disk(folder)
    encoded = coder.encode(x)
    code = torch.zeros(len(x), coder.num_latents)
    code.scatter_(1, encoded.top_indices, encoded.top_acts)
    return code, coder(x).sae_out


def saelens(folder: Path, x: torch.Tensor) -> Tensors:
    """By `SAE.load_from_disk`, `encode` and `forward`."""
    wandb = types.ModuleType("wandb")  # which it imports for training
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.modules.setdefault("wandb", wandb)
    from sae_lens import SAE

    coder: Any = SAE.load_from_disk(str(folder))
    return coder.encode(x), coder(x)


def dictionary_learning(folder: Path, x: torch.Tensor) -> Tensors:
    """By `load_dictionary`, `encode` and `forward`."""
    from dictionary_learning.utils import load_dictionary

    coder: Any = load_dictionary(str(folder), device="cpu")[0]
    return coder.encode(x), coder(x)


def circuit_tracer(folder: Path, x: torch.Tensor) -> Tensors:
    """By the loader of one layer, `encode` and `decode`."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    paths = {0: str(folder / "layer_0.safetensors")}
    coder: Any = load_transcoder_set(paths, "bsc", "mlp.hook_in", "mlp.hook_out")[0]
    code = coder.encode(x)
    return code, coder.decode(code, x)


READERS: dict[str, Callable[[Path, torch.Tensor], Tensors]] = {
    "sparsify": sparsify, "saelens": saelens, "dictionary-learning": dictionary_learning,
    "circuit-tracer": circuit_tracer,
}  # fmt: skip


def main(folder: Path) -> None:
    """Every case by its own reader; a failure is written down."""
    x = load_file(folder / "rows.safetensors")["x"]
    failed = {}
    for case, format_ in json.loads((folder / "cases.json").read_text()).items():
        try:
            with torch.no_grad():
                code, y = READERS[format_](folder / case, x)
            save_file({"code": code.contiguous(), "y": y.contiguous()},
                      folder / f"found-{case}.safetensors")  # fmt: skip
        except Exception:
            failed[case] = traceback.format_exc()[-1500:]
    (folder / "failed.json").write_text(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
