"""Naming modules of a model, and taking their inputs and outputs in one forward pass."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bsc.errors import UserError, nearest

__all__ = ["RowTap", "expand_braces", "match_hookpoints"]


def expand_braces(pattern: str) -> list[str]:
    """Alternatives of a pattern with braces, as a shell expands them.

    >>> expand_braces("layers.{0,9}.mlp")
    ['layers.0.mlp', 'layers.9.mlp']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    options = [p.split(",") if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


def match_hookpoints(base: torch.nn.Module, patterns: list[str]) -> list[str]:
    """Names of the modules that the patterns mean, in the order of the model.

    Args:
        base: the model without its head; names are relative to it.
        patterns: names with ``*``, ``?``, ``[...]`` and ``{a,b}``. A star does not cross a dot:
            ``layers.*.mlp`` is every layer's MLP and nothing inside one.

    Raises:
        UserError: a pattern matches no module; the message names the nearest ones.
    """
    names = [n for n, _ in base.named_modules() if n]
    wanted: set[str] = set()
    for pattern in patterns:
        for one in expand_braces(pattern):
            found = [n for n in names if _matches(n, one)]
            if not found:
                raise UserError(
                    f"--hookpoints {pattern}: {one!r} matches no module of the model"
                    f"{nearest(one, names)}. Its modules begin with "
                    f"{', '.join(_examples(names))}."
                )
            wanted.update(found)
    return [n for n in names if n in wanted]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _examples(names: list[str]) -> list[str]:
    mlps = [n for n in names if n.rsplit(".", 1)[-1] in ("mlp", "feed_forward", "ffn", "fc1")]
    return (mlps or names)[:4]


def first_tensor(value: Any, name: str) -> torch.Tensor:
    """The activations in what a module takes or returns: a tensor, or the first of a tuple."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise UserError(
            f"--hookpoints: {name} takes or gives {type(value).__name__}, not a tensor. Choose a "
            f"module that maps one tensor to another, such as an MLP."
        )
    return value


class _Enough(Exception):
    """Every hookpoint has fired; the rest of the forward pass is not needed."""


class RowTap:
    """Takes the rows of hookpoints during a forward pass and stops it after the last one."""

    def __init__(self, base: torch.nn.Module, names: list[str]) -> None:
        """Prepare to tap the modules called `names` of `base`."""
        self.base, self.names = base, names

    @contextmanager
    def _hooks(self, taken: dict[str, torch.Tensor]) -> Iterator[None]:
        handles = []

        def tap(name: str) -> Any:
            def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                source = args or tuple(kwargs.values())
                for side, value in (("input", source), ("output", output)):
                    rows = first_tensor(value, name)
                    # A copy: some models add to a module's output in place later on.
                    taken[f"{name}/{side}"] = rows.to(torch.bfloat16, copy=True)
                if len(taken) == 2 * len(self.names):
                    raise _Enough

            return hook

        try:
            for name in self.names:
                module = self.base.get_submodule(name)
                handles.append(module.register_forward_hook(tap(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def rows(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of one batch of contexts.

        Args:
            token_ids: (contexts, length) integers, on the model's device, no padding.

        Returns:
            ``"<hookpoint>/input"`` and ``"<hookpoint>/output"``, each (contexts * length, width)
            bfloat16 in the order of the tokens. Another dtype of the model is rounded.

        Raises:
            UserError: a hookpoint does not fire, or gives no tensor of one row per token.
        """
        taken: dict[str, torch.Tensor] = {}
        with self._hooks(taken), contextlib.suppress(_Enough):
            self.base(input_ids=token_ids, use_cache=False)
        if missing := [n for n in self.names if f"{n}/output" not in taken]:
            raise UserError(
                f"--hookpoints: {', '.join(missing)} did not run in the model's forward pass."
            )
        rows = token_ids.numel()
        for name, value in taken.items():
            if value.shape[:-1] not in (token_ids.shape, (rows,)):
                raise UserError(
                    f"--hookpoints: {name} has shape {tuple(value.shape)}, not one row for each "
                    f"of the {tuple(token_ids.shape)} tokens."
                )
        return {n: v.reshape(rows, v.shape[-1]) for n, v in taken.items()}
