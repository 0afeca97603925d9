"""Running only the part of a model that a splice changes.

What runs before the first spliced hookpoint gives the same rows in every forward pass over the same
tokens: the layers before its layer, and in that layer the modules before it. Their outputs are kept
from the pass of the model as it is, and the passes with something spliced in begin there. Whether
that holds for a model (whose later layers may look back at earlier ones in their own ways) is not
assumed but tried: `try_out` compares bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from bsc.cache.model.hookpoints import modules_of
from bsc.eval.passes.splice import splice, zero_replacement

__all__ = ["Prefix"]

_LAYER = re.compile(r"(.*\.)?(\d+)(\..*)?$")


def _copied(output: Any) -> Any:
    """The output of a module with tensors of its own: what comes after may change them in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_copied(o) for o in output)
    return output


class Prefix:
    """What runs before the first of some hookpoints."""

    def __init__(self, base: torch.nn.Module, hookpoints: Iterable[str]) -> None:
        """Find the list of layers that holds every hookpoint.

        Args:
            base: the model without its head.
            hookpoints: names relative to it.
        """
        self.base, self.hookpoints = base, tuple(hookpoints)
        self.layers: list[torch.nn.Module] = []
        """Layers that need not run; empty where nothing can be left out."""
        self._layer: torch.nn.Module | None = None
        """The first layer that has to run, if parts of it need not."""
        self._hooks: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        """The hookpoints in it: modules whose input and whose output is taken."""
        self._kept: Any = None
        self._parts: dict[torch.nn.Module, Any] = {}
        """Outputs of the modules of `_layer` that need not run."""
        at: dict[str, int] = {}
        lists = set()
        for hook in self.hookpoints:
            for module in modules_of(hook):
                match = _LAYER.fullmatch(module)
                lists.add((match[1] or "") if match else "")
                at[hook] = min(at.get(hook, 1 << 60), int(match[2]) if match else 0)
        if len(lists) != 1:
            return
        name = lists.pop().removesuffix(".")
        holder = base.get_submodule(name) if name else None
        if isinstance(holder, torch.nn.ModuleList):
            first = min(at.values())
            self.layers, self._layer = list(holder)[:first], holder[first]
            inside = [modules_of(hook) for hook in self.hookpoints if at[hook] == first]
            self._hooks = [(base.get_submodule(a), base.get_submodule(b)) for a, b in inside]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is needed of the forward pass in the block."""
        self._kept, self._parts = None, {}
        begun = False

        def begin(module: Any, args: Any) -> None:
            nonlocal begun
            begun = True

        def keep(module: Any, args: Any, output: Any) -> None:
            self._kept = _copied(output)

        def keep_part(module: Any, args: Any, output: Any) -> None:
            if not begun or self._spliced(module):
                self._parts[module] = _copied(output)

        with ExitStack() as stack:
            if self.layers:
                stack.callback(self.layers[-1].register_forward_hook(keep).remove)
            if self._layer is not None:
                for source, _ in self._hooks:
                    stack.callback(source.register_forward_pre_hook(begin).remove)
                for part in {*self._layer.children(), *(m for h in self._hooks for m in h)}:
                    stack.callback(part.register_forward_hook(keep_part).remove)
            yield

    def _spliced(self, module: torch.nn.Module) -> bool:
        """Whether a module takes and gives what it did, and then has its output replaced: that
        of the one hookpoint of its layer."""
        return len(self._hooks) == 1 and self._hooks[0] == (module, module)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """While the block runs, modules give what was kept and compute nothing."""
        replaced = dict(self._parts)
        if self._kept is not None:
            replaced |= dict.fromkeys(self.layers, self._kept)
        try:
            for module, kept in replaced.items():
                module.forward = lambda *args, kept=kept, **kwargs: _copied(kept)
            yield
        finally:
            for module in replaced:
                del module.forward

    def try_out(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        """Leave out from now on only what changes not a bit of the logits of these tokens, which
        were recorded before.

        Args:
            model: with its head.
            inputs: of its forward pass.
        """
        with splice(self.base, dict.fromkeys(self.hookpoints, zero_replacement)):
            whole = model(**inputs, use_cache=False).logits
            while self._kept is not None or self._parts:
                with self.left_out():
                    if torch.equal(whole, model(**inputs, use_cache=False).logits):
                        return
                if self._parts:
                    self._layer, self._parts = None, {}
                else:
                    self.layers, self._kept = [], None
