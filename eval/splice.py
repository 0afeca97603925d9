"""Putting a coder, or an ablation, in the place of a module while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.cache.hookpoints import modules_of
from bsc.train.coders.coder import SparseCoder

__all__ = ["Replacement", "coder_replacement", "mean_replacement", "splice", "zero_replacement"]

Replacement = Callable[[Tensor, Tensor], Tensor]
"""Input and output rows of a module, (N, d_in) and (N, d_out), to rows that replace the output."""


def coder_replacement(coder: SparseCoder) -> Replacement:
    """What the coder makes of the module's output (SAE) or of its input (transcoders)."""
    if coder.config.site == "sae":
        return lambda x, y: coder(y)
    return lambda x, y: coder(x)


def zero_replacement(x: Tensor, y: Tensor) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(y)


def mean_replacement(mean: Tensor) -> Replacement:
    """Mean ablation: every row becomes `mean`, (d_out,)."""
    return lambda x, y: mean.expand_as(y)


@contextmanager
def splice(base: torch.nn.Module, replacements: dict[str, Replacement]) -> Iterator[None]:
    """While the block runs, replace the outputs of modules.

    Args:
        base: the model without its head; module names are relative to it.
        replacements: by hookpoint. A module that returns a tuple has its first element replaced.
            The new rows take the dtype of the old ones.
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
            rows = replace(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            new = rows.to(y.dtype).view_as(y)
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
