"""Running only the part of a model that a splice changes.

Layers before the first spliced hookpoint give the same rows in every forward pass over the same
tokens. Their last output is kept from the pass of the model as it is, and the passes with
something spliced in begin there. Whether that holds for a model (whose later layers may look back
at earlier ones in their own ways) is not assumed but tried: `works` compares bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.cache.model.hookpoints import modules_of

__all__ = ["Prefix"]

_LAYER = re.compile(r"(.*\.)?(\d+)(\..*)?$")


def _copied(output: Any) -> Any:
    """The output of a layer with tensors of its own: what comes after may change them in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_copied(o) for o in output)
    return output


class Prefix:
    """The layers before the first of some hookpoints."""

    def __init__(self, base: torch.nn.Module, hookpoints: Iterable[str]) -> None:
        """Find the list of layers that holds every hookpoint.

        Args:
            base: the model without its head.
            hookpoints: names relative to it.
        """
        self.layers: list[torch.nn.Module] = []
        """Layers that need not run; empty where nothing can be left out."""
        self._kept: Any = None
        found = set()
        for module in (m for hook in hookpoints for m in modules_of(hook)):
            match = _LAYER.fullmatch(module)
            found.add((match[1] or "", int(match[2])) if match else ("", 0))
        lists = {name for name, _ in found}
        if len(lists) != 1:
            return
        name = lists.pop().removesuffix(".")
        holder = base.get_submodule(name) if name else None
        if isinstance(holder, torch.nn.ModuleList):
            self.layers = list(holder)[: min(index for _, index in found)]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the last layer's output of the forward pass in the block."""
        if not self.layers:
            yield
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            self._kept = _copied(output)

        handle = self.layers[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """While the block runs, layers give what was kept and compute nothing."""
        if self._kept is None:
            yield
            return
        try:
            for layer in self.layers:
                layer.forward = lambda *args, **kwargs: _copied(self._kept)
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def drop(self) -> None:
        """Leave nothing out from now on."""
        self.layers, self._kept = [], None
