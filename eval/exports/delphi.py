"""The latent cache of delphi, so that delphi itself can explain and score a coder's latents.

    latents/<hookpoint>/<start>_<end>.safetensors   end inclusive
        locations    uint16 or uint32 [N, 3]: context, position, latent - start; in that order
        activations  float16 [N]: the value of a continuous latent, 1 of a binary one
        tokens       int64 [contexts, length]
    latents/<hookpoint>/config.json
    log/hookpoint_firing_counts.pt                  {hookpoint: int64 [F]}

As delphi does, values of at most 1e-5 are left out. A cache holds one coder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from bsc.errors import UserError
from bsc.eval.interp.material import Material, Materials
from bsc.eval.passes.batches import text_starts
from bsc.eval.passes.codes import LatentCode
from bsc.files import make_folder, write_atomically, write_json
from bsc.progress import stage

__all__ = ["write_delphi_cache"]

SMALLEST = 1e-5
FIRINGS_AT_ONCE = 1 << 24
"""Firings in a file at most, unless a single latent has more: 14 bytes each in memory."""
_LARGEST = float(np.finfo(np.float16).max)


def _contexts(materials: Materials, read: NDArray[np.bool_]) -> tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]
]:  # fmt: skip
    """Tokens (contexts, length), padded with 0, and of each row its context and position, -1 where
    it is in none."""
    store = materials.store
    split, length = store.held_out, store.context
    ids = split.tokens("token_id").astype(np.int64)
    last = int(np.flatnonzero(read)[-1]) + 1
    if store.packing == "none":
        position = split.tokens("position").astype(np.int64)
        starts = text_starts(split.tokens("doc_id")[:last], position[:last])
    else:
        starts = np.arange(0, last // length * length, length)
    context = np.searchsorted(starts, np.arange(len(ids)), side="right") - 1
    position = np.arange(len(ids)) - starts[context] if len(starts) else np.zeros_like(ids)
    inside = (context >= 0) & (position < length) & (np.arange(len(ids)) < last)
    context, position = np.where(inside, context, -1), np.where(inside, position, -1)
    tokens = np.zeros((len(starts), length), np.int64)
    tokens[context[inside], position[inside]] = ids[inside]
    return tokens, context, position


def _splits(code: LatentCode) -> Iterator[tuple[int, int]]:
    """Ranges of latents, [first, last), none without a firing."""
    first = 0
    for _, last in code.ranges(FIRINGS_AT_ONCE, 1 << 15):
        # delphi cannot read a file of no firings: such latents go with others.
        if code.offsets[last] > code.offsets[first] and (
            last == code.n_latents or code.offsets[-1] > code.offsets[last]
        ):
            yield first, last
            first = last
    if first < code.n_latents and code.offsets[-1] > code.offsets[first]:
        yield first, code.n_latents


def write_delphi_cache(materials: Materials, material: Material, folder: Path) -> Path:
    """Write the cache of one coder.

    Args:
        materials: of the run.
        material: of the coder.
        folder: a new or empty one.

    Returns:
        The folder.

    Raises:
        UserError: it cannot be a new folder, or the coder never fires.
    """
    hook = materials.hookpoint(material.coder)
    code = material.code
    if not code.offsets[-1]:
        raise UserError(f"{material.coder}: it has not fired, so there is nothing to write.")
    make_folder(folder, "delphi cache")
    tokens, context, position = _contexts(materials, materials.read[hook])
    place = folder / "latents" / hook
    place.mkdir(parents=True)
    (folder / "log").mkdir()
    counts = np.zeros(code.n_latents, np.int64)
    splits = list(_splits(code))
    with stage("delphi cache", len(splits), "files") as progress:
        for first, last in splits:
            here = slice(int(code.offsets[first]), int(code.offsets[last]))
            latent = np.repeat(np.arange(first, last), np.diff(code.offsets[first : last + 1]))
            row, value = code.row[here].astype(np.int64), code.margin[here]
            value = np.where(latent >= material.first_binary, np.float32(1), value)
            kept = (context[row] >= 0) & (np.abs(value) > SMALLEST)
            latent, row, value = latent[kept], row[kept], value[kept]
            order = np.lexsort((latent, row))
            latent, row, value = latent[order], row[order], value[order]
            counts += np.bincount(latent, minlength=code.n_latents)
            locations = np.stack([context[row], position[row], latent - first], axis=1)
            small = len(tokens) < 1 << 16 and last - first < 1 << 16
            arrays = {
                "locations": locations.astype(np.uint16 if small else np.uint32),
                "activations": np.clip(value, -_LARGEST, _LARGEST).astype(np.float16),
                "tokens": tokens,
            }
            write_atomically(place / f"{first}_{last - 1}.safetensors", save(arrays))
            progress.advance(1)
    torch.save({hook: torch.from_numpy(counts)}, folder / "log" / "hookpoint_firing_counts.pt")
    write_json(
        place / "config.json",
        {
            "dataset_repo": "bsc", "dataset_split": "held out", "dataset_name": "",
            "dataset_column": "text", "dataset_row": "text", "batch_size": 32,
            "ctx_len": materials.store.context, "cache_ctx_len": materials.store.context,
            "n_tokens": int(tokens.size), "n_splits": len(splits),
            "model_name": str(materials.store.attributes["model"]["name"]),
        },
    )  # fmt: skip
    return folder
