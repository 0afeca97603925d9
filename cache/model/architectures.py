"""What of a model can be hooked: its MLPs by the names that transformers gives them, and a list of
all modules with their widths."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch

from bsc.cache.model.attention import Separation, forward_inputs
from bsc.cache.model.hookpoints import match_hookpoints, modules_of
from bsc.errors import UserError

__all__ = ["MLPS", "ModuleGroup", "default_hookpoints", "list_modules", "warn_of_residual"]

MLPS = {
    "language_model.layers.*.mlp": "Qwen-VL, Gemma 3, LLaVA and other models of images and text",
    "layers.*.mlp": "Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OLMo, GPT-NeoX, ModernBERT",
    "h.*.mlp": "GPT-2, GPT-Neo, GPT-J, Falcon",
    "h.*.mlp.dense_h_to_4h@h.*.mlp.dense_4h_to_h": "Bloom",
    "decoder.layers.*.fc1@decoder.layers.*.fc2": "OPT",
    "encoder.layer.*.intermediate@encoder.layer.*.output.dense": "BERT, RoBERTa, ELECTRA, DeBERTa",
    "transformer.layer.*.ffn": "DistilBERT",
    "blocks.*.ffn": "DBRX",
    "blocks.*.ffn.up_proj@blocks.*.ffn.down_proj": "MPT",
    "layers.*.block_sparse_moe": "Granite MoE",
    "layers.*.feed_forward": "Jamba",
    "layers.*.fc1@layers.*.fc2": "XGLM, BioGPT",
    "blocks.*.feed_forward": "RWKV",
}
"""The MLP of every layer, by architecture: the module, or the two modules of which the first takes
its input and the second gives its output."""
PAPER_DEPTHS = (0.0, 0.3, 0.6, 0.9)
"""Depths of the MLPs that the paper takes: layers 0, 9, 18 and 27 of 30, or 0, 7, 14, 21 of 24."""
_LIKELY = re.compile(r"(mlp|ffn?|feed_forward|mixer|moe|expert|dense)[^.]*$", re.I)


def default_hookpoints(base: torch.nn.Module) -> tuple[str, ...]:
    """The MLPs at the paper's depths: layers 0, 9, 18 and 27 of a model with 30.

    Raises:
        UserError: no name of an MLP that is known fits; the message has a value to paste.
    """
    for pattern in MLPS:
        found = _found(base, pattern)
        if found:
            return tuple(dict.fromkeys(found[int(len(found) * depth)] for depth in PAPER_DEPTHS))
    groups = [g for g in _groups(base) if g.count > 1 and g.pattern.count(".*.") == 1]
    likely = [g for g in groups if _LIKELY.search(g.pattern)] or groups
    if not likely:
        raise UserError(
            f"--hookpoints: {type(base).__name__} has no layers by a name that is known, so there "
            f"is no default. `bsc modules MODEL` lists its modules."
        )
    best = min(likely, key=lambda g: g.pattern.count("."))
    n = best.count
    layers = ",".join(str(i) for i in dict.fromkeys(int(n * depth) for depth in PAPER_DEPTHS))
    example = best.pattern.replace("*", f"{{{layers}}}", 1)
    raise UserError(
        f"--hookpoints: {type(base).__name__} has no MLPs by a name that is known, so there is no "
        f"default. Name modules, for example --hookpoints '{example}'. `bsc modules MODEL` lists "
        f"all of them with their widths."
    )


def _found(base: torch.nn.Module, pattern: str) -> list[str]:
    """Hookpoints of a pattern whose modules give what an MLP gives and no more."""
    try:
        found = match_hookpoints(base, [pattern])
    except UserError:
        return []
    return [n for n in found if not _adds_residual(base.get_submodule(modules_of(n)[1]))]


def _adds_residual(module: torch.nn.Module) -> bool:
    """Whether a module is given the residual stream to add it to what it gives, as Bloom's is."""
    return "residual" in inspect.signature(module.forward).parameters


def warn_of_residual(base: torch.nn.Module, hookpoints: list[str]) -> str | None:
    """What to say of a hookpoint whose output is more than an MLP's; None where there is nothing.

    BERT's module `output` adds the residual stream and normalises; Bloom's `mlp` adds it.
    """
    for name in hookpoints:
        source, target = modules_of(name)
        if _adds_residual(base.get_submodule(target)):
            return (
                f"{name}: the output of {target} is after the residual stream was added, which is "
                f"more than the MLP gives. Name the modules inside it: --hookpoints 'FIRST@LAST'."
            )
        inside = dict(base.get_submodule(target).named_children())
        norms = [n for n, m in inside.items() if "norm" in type(m).__name__.lower()]
        linear = [n for n, m in inside.items() if isinstance(m, torch.nn.Linear)]
        if source != target and norms and len(linear) == 1:
            return (
                f"{name}: the output of {target} is after the residual stream was added and "
                f"{norms[0]} applied, which is more than the MLP gives. The MLP alone is "
                f"--hookpoints '{source}@{target}.{linear[0]}'."
            )
    return None


@dataclass
class ModuleGroup:
    """Modules whose names differ in numbers alone."""

    pattern: str
    """Their names with ``*`` for the numbers."""
    kind: str
    """Class of the modules."""
    count: int
    d_in: int | None = None
    """Width of what they take; None: not a tensor of rows, or not known without weights."""
    d_out: int | None = None
    """Width of what they give."""
    default: bool = False
    """Whether the default takes its hookpoints from here."""

    @property
    def can_be_hooked(self) -> bool:
        """Whether rows go in and rows come out."""
        return self.d_in is not None and self.d_out is not None


def _groups(base: torch.nn.Module) -> list[ModuleGroup]:
    found: dict[tuple[str, str], ModuleGroup] = {}
    for name, module in base.named_modules():
        if not name or isinstance(module, torch.nn.ModuleList):
            continue
        key = _key(name, module)
        found.setdefault(key, ModuleGroup(*key, 0)).count += 1
    return list(found.values())


def _key(name: str, module: torch.nn.Module) -> tuple[str, str]:
    """What the modules of a group have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), type(module).__name__


def list_modules(base: torch.nn.Module) -> list[ModuleGroup]:
    """All modules of a model without weights (on the device meta), in its order.

    Args:
        base: the model without its head.
    """
    groups = {(g.pattern, g.kind): g for g in _groups(base)}
    handles = []

    def note(group: ModuleGroup) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            group.d_in = _width(args or tuple(kwargs.values()))
            group.d_out = _width(output)

        return hook

    for name, module in base.named_modules():
        if group := groups.get(_key(name, module)):
            handles.append(module.register_forward_hook(note(group), with_kwargs=True))
    ids, mask = torch.zeros((1, 8), dtype=torch.int64, device="meta"), Separation("both")
    for inputs in (
        forward_inputs(ids, ids, packing="masked", separation=mask, dtype=torch.bfloat16),
        {"input_ids": ids},
    ):  # fmt: skip
        try:
            with torch.no_grad():
                base(**inputs)
            break
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
            # What some architectures raise on arguments that they do not take, or on values that
            # tensors without weights lack: widths that were not reached stay unknown.
            continue
    for handle in handles:
        handle.remove()
    for pattern in MLPS:
        if _found(base, pattern):
            for group in groups.values():
                group.default = group.pattern in pattern.split("@")
            break
    return list(groups.values())


def _width(value: Any) -> int | None:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.dtype.is_floating_point:
        return int(value.shape[-1])
    return None
