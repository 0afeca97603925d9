"""Putting a coder, or an ablation, in the place of a module while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.cache.model.hookpoints import modules_of
from bsc.eval.passes.batches import rows_at_once
from bsc.train.coders.coder import Code, SparseCoder

__all__ = [
    "Edit",
    "Replacement",
    "coder_replacement",
    "mean_replacement",
    "splice",
    "zero_replacement",
]

Edit = Callable[[Code], Code]

Replacement = Callable[[Tensor, Tensor], Tensor]
"""Input and output rows of a module, (N, d_in) and (N, d_out), to rows that replace the output."""


def coder_replacement(coder: SparseCoder, edit: Edit | None = None) -> Replacement:
    """What the coder makes of the module's output (SAE) or of its input (transcoders).

    Args:
        coder: the coder.
        edit: changes the code before it is decoded, such as setting latents to 0.
    """

    def replace(x: Tensor, y: Tensor) -> Tensor:
        rows = y if coder.config.site == "sae" else x
        parts = []
        for part in rows.split(rows_at_once(coder.config.n_latents)):
            code = coder.encode(part)
            parts.append(coder.decode(code if edit is None else edit(code), part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return replace


def zero_replacement(x: Tensor, y: Tensor) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(y)


def mean_replacement(mean: Tensor) -> Replacement:
    """Mean ablation: every row becomes `mean`, (d_out,)."""
    return lambda x, y: mean.expand_as(y)


@contextmanager
def splice(
    base: torch.nn.Module, replacements: dict[str, Replacement], kept: Tensor | None = None
) -> Iterator[None]:
    """While the block runs, replace the outputs of modules.

    Args:
        base: the model without its head; module names are relative to it.
        replacements: by hookpoint. A module that returns a tuple has its first element replaced.
            The new rows take the dtype of the old ones. Rows that hold values that are not finite
            stay as they are, for no coder was trained on such rows.
        kept: (N,) bool, rows that stay as they are; None: none.
    """
    handles = []
    inputs: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            inputs[name] = (args or tuple(kwargs.values()))[0]

        return hook

    def after(name: str, replace: Replacement) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            x = inputs.pop(name)
            several = isinstance(output, (tuple, list))
            y = output[0] if several else output
            flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            stay = ~(flat_x.isfinite().all(dim=1) & flat_y.isfinite().all(dim=1))
            if kept is not None:
                if kept.shape != stay.shape:
                    raise ValueError(
                        f"{name}: {len(stay)} tokens pass, but {len(kept)} were said to stay or "
                        f"not."
                    )
                stay |= kept.to(stay.device)
            rows = replace(flat_x, flat_y).to(y.dtype)
            # Of a row that is not finite no gradient is wanted, nor the pass back that it takes.
            old = flat_y.detach() if kept is None else flat_y
            new = torch.where(stay.unsqueeze(1), old, rows).view_as(y)
            return type(output)((new, *output[1:])) if several else new

        return hook

    try:
        for name, replace in replacements.items():
            source, target = (base.get_submodule(m) for m in modules_of(name))
            handles += [
                source.register_forward_pre_hook(before(name), with_kwargs=True),
                target.register_forward_hook(after(name, replace)),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
