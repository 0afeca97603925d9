"""Coders inside a running model, for users: what `bsc.splice` is.

    with bsc.splice(model, {"layers.3.mlp": coder}) as codes:
        model(**batch)
    codes["layers.3.mlp"].latent        # (batch, sequence, k)

Evaluation puts coders into a model by the same hooks (splice.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.cache.model.hookpoints import modules_of
from bsc.cache.model.kinds import base_of
from bsc.eval.passes.edits import Edit
from bsc.eval.passes.splice import Replacement
from bsc.eval.passes.splice import splice as splice_rows
from bsc.train.coders.coder import Code, SparseCoder
from bsc.train.coders.module import CoderModule

__all__ = ["splice"]


@contextmanager
def splice(
    model: torch.nn.Module,
    coders: Mapping[str, SparseCoder | CoderModule],
    *,
    edit: Edit | Mapping[str, Edit] | None = None,
    error: bool = False,
    tokens: Tensor | None = None,
) -> Iterator[dict[str, Code]]:
    """While the block runs, modules of a model give what coders make of their rows.

    Args:
        model: a model of transformers, with or without its head; or any module.
        coders: by hookpoint, relative to the model without its head: an SAE reads the module's
            output, a transcoder its input.
        edit: changes codes before they are decoded, all or by hookpoint (`bsc.edits`).
        error: adds what the unedited coder leaves out, so that the edit alone acts: without one the
            model is as it was.
        tokens: (batch, sequence) bool, where coders act; None: everywhere.

    Yields:
        A dict that every forward pass fills: by hookpoint the code of every row before the edit,
        (batch, sequence, k).

    Raises:
        ValueError: the model has no such module, or an edit is of another; in a forward pass, that
            `tokens` is not of its shape.
    """
    base = base_of(model)
    codes: dict[str, Code] = {}
    handles = []
    for name in coders:
        for module in modules_of(name):
            try:
                base.get_submodule(module)
            except AttributeError:
                raise ValueError(
                    f"{type(base).__name__} has no module {module!r}; `bsc modules` lists those of "
                    f"a model."
                ) from None
    edits = edit if isinstance(edit, Mapping) else dict.fromkeys(coders, edit)
    if strange := [name for name in edits if name not in coders]:
        raise ValueError(f"edit names {strange[0]!r}, where no coder is put.")
    replacements = {
        name: _replacement(name, coder, edits.get(name), error, codes)
        for name, coder in coders.items()
    }
    kept = None if tokens is None else ~tokens.reshape(-1).bool()
    with splice_rows(base, replacements, kept):
        try:
            for name in coders:
                target = base.get_submodule(modules_of(name)[1])
                handles.append(target.register_forward_hook(_shaped(name, codes)))
            yield codes
        finally:
            for handle in handles:
                handle.remove()


def _replacement(
    name: str, coder: SparseCoder | CoderModule, edit: Edit | None, error: bool,
    codes: dict[str, Code],
) -> Replacement:  # fmt: skip
    def replace(x: Tensor, y: Tensor) -> Tensor:
        nonlocal coder
        rows = y if coder.config.site == "sae" else x
        if isinstance(coder, SparseCoder) and coder.W_enc.device != rows.device:
            coder = coder.to(rows.device)
        code = codes[name] = coder.encode(rows)
        if error and edit is None:
            return y
        changed = coder.decode(code if edit is None else edit(code), rows)
        return y.to(changed.dtype) + (changed - coder.decode(code, rows)) if error else changed

    return replace


def _shaped(name: str, codes: dict[str, Code]) -> Any:
    """Codes in the shape of the module's output, once its rows have passed."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, (tuple, list)) else output
        code = codes[name]
        codes[name] = Code(*(t.reshape(*y.shape[:-1], t.shape[-1]) for t in code))

    return hook
