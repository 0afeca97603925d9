"""Naming modules of a model, and taking their inputs and outputs in one forward pass."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bsc.errors import UserError, nearest

__all__ = ["RowTap", "expand_braces", "match_hookpoints", "modules_of"]


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
            ``layers.*.mlp`` is every layer's MLP and nothing inside one. ``a@b`` takes the input
            of a and the output of b, for an MLP that is two modules, as BERT's is.

    Raises:
        UserError: a pattern matches no module; the message names the nearest ones.
    """
    names = [n for n, _ in base.named_modules() if n]
    place = {name: i for i, name in enumerate(names)}
    wanted: set[str] = set()
    for pattern in patterns:
        for source, target in _pairs(pattern):
            inputs = _matching(names, source, pattern)
            if target is None:
                wanted.update(inputs)
                continue
            outputs = _matching(names, target, pattern)
            if len(inputs) != len(outputs):
                raise UserError(
                    f"--hookpoints {pattern}: {len(inputs)} modules before the @ and "
                    f"{len(outputs)} after it; each input needs its output."
                )
            wanted.update(f"{a}@{b}" for a, b in zip(inputs, outputs, strict=True))
    return sorted(wanted, key=lambda n: [place[m] for m in modules_of(n)])


def modules_of(hookpoint: str) -> tuple[str, str]:
    """The module whose input and the module whose output a hookpoint takes.

    >>> modules_of("layers.3.mlp")
    ('layers.3.mlp', 'layers.3.mlp')
    """
    source, _, target = hookpoint.partition("@")
    return source, target or source


def _pairs(pattern: str) -> list[tuple[str, str | None]]:
    """Alternatives of a pattern; of a pair the n-th before the @ goes with the n-th after it."""
    source, at, target = pattern.partition("@")
    sources = expand_braces(source)
    if not at:
        return [(one, None) for one in sources]
    targets = expand_braces(target)
    if len(targets) != len(sources):
        raise UserError(f"--hookpoints {pattern}: different numbers of alternatives in braces.")
    return list(zip(sources, targets, strict=True))


def _matching(names: list[str], one: str, pattern: str) -> list[str]:
    found = [n for n in names if _matches(n, one)]
    if not found:
        raise UserError(
            f"--hookpoints {pattern}: {one!r} matches no module of the model"
            f"{nearest(one, names)}. Its modules begin with {', '.join(_examples(names))}."
        )
    return found


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
        # Causal models would keep keys and values for generation; encoders know no such thing.
        takes = inspect.signature(base.forward).parameters
        keeps = any(p in takes for p in ("use_cache", "past_key_values", "kwargs"))
        self._options = {"use_cache": False} if keeps else {}

    @contextmanager
    def _hooks(self, taken: dict[str, torch.Tensor]) -> Iterator[None]:
        handles = []

        def take(key: str, value: Any) -> None:
            # A copy: some models add to a module's output in place later on.
            taken[key] = first_tensor(value, key).to(torch.bfloat16, copy=True)
            if len(taken) == 2 * len(self.names):
                raise _Enough

        def before(key: str) -> Any:
            def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
                take(key, args or tuple(kwargs.values()))

            return hook

        def after(key: str) -> Any:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                take(key, output)

            return hook

        try:
            for name in self.names:
                source, target = (self.base.get_submodule(m) for m in modules_of(name))
                handles += [
                    source.register_forward_pre_hook(before(f"{name}/input"), with_kwargs=True),
                    target.register_forward_hook(after(f"{name}/output")),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def try_out(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What `rows` gives, once the whole forward pass was seen to run each hookpoint once.

        Raises:
            UserError: one runs several times, as layers that share weights do; or as `rows`.
        """
        runs: dict[str, int] = dict.fromkeys(self.names, 0)
        handles = []

        def count(name: str) -> Any:
            def hook(*_: Any) -> None:
                runs[name] += 1

            return hook

        try:
            for name in self.names:
                target = self.base.get_submodule(modules_of(name)[1])
                handles.append(target.register_forward_hook(count(name)))
            self.base(**inputs, **self._options)
        finally:
            for handle in handles:
                handle.remove()
        for name, times in runs.items():
            if times > 1:
                raise UserError(
                    f"--hookpoints: {name} runs {times} times in one forward pass, so a token has "
                    f"no one row there. Choose modules that run once."
                )
        return self.rows(inputs)

    @torch.inference_mode()
    def rows(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Rows of one batch of contexts.

        Args:
            inputs: arguments of the forward pass (model/attention.py), on the model's device;
                ``input_ids`` is (contexts, length).

        Returns:
            ``"<hookpoint>/input"`` and ``"<hookpoint>/output"``, each (contexts * length, width)
            bfloat16 in the order of the tokens. Another dtype of the model is rounded.

        Raises:
            UserError: a hookpoint does not fire, or gives no tensor of one row per token.
        """
        taken: dict[str, torch.Tensor] = {}
        with self._hooks(taken), contextlib.suppress(_Enough):
            self.base(**inputs, **self._options)
        sides = [f"{n}/{side}" for n in self.names for side in ("input", "output")]
        if missing := [key for key in sides if key not in taken]:
            raise UserError(
                f"--hookpoints: {', '.join(missing)} did not run in the model's forward pass."
            )
        shape = inputs["input_ids"].shape
        rows = shape.numel()
        for name, value in taken.items():
            if value.shape[:-1] not in (shape, (rows,)):
                raise UserError(
                    f"--hookpoints: {name} has shape {tuple(value.shape)}, not one row for each "
                    f"of the {tuple(shape)} tokens."
                )
        return {n: v.reshape(rows, v.shape[-1]) for n, v in taken.items()}
