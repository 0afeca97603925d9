"""Coders of a run in the formats of other tools, each checked on rows of the store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.eval.exports import circuit_tracer
from bsc.eval.exports.dictionary_learning import DICTIONARY_LEARNING
from bsc.eval.exports.saelens import SAELENS
from bsc.eval.exports.sparsify import SPARSIFY, SPARSIFY_BINARY
from bsc.eval.exports.weights import (
    CoderFormat,
    Origin,
    Reference,
    check_written,
    unit_rows,
)
from bsc.eval.passes.setting import open_store
from bsc.files import make_folder, write_json
from bsc.progress import console
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run
from bsc.train.run_config import RunCoder
from bsc.versions import versions

__all__ = ["WEIGHT_FORMATS", "export_coders", "held_out_rows", "refusals"]

_FORMATS: dict[str, CoderFormat] = {
    "sparsify": SPARSIFY,
    "sparsify-binary": SPARSIFY_BINARY,
    "saelens": SAELENS,
    "dictionary-learning": DICTIONARY_LEARNING,
}
WEIGHT_FORMATS = (*_FORMATS, "circuit-tracer")
"""Formats of coders; the other exports are of what coders do on a store."""
_ROWS = 4096
"""Rows that every export is checked on."""


def export_coders(
    run: Run,
    wanted: Sequence[str],
    format_: str,
    out: Path,
    *,
    store: str | Path | None = None,
    unit: bool = False,
) -> dict[str, Any]:
    """Write coders into a new folder, and what was found when they were checked into export.json.

    Args:
        run: a trained run.
        wanted: names, parts of names or patterns.
        format_: one of `WEIGHT_FORMATS`.
        out: a folder that is new or empty.
        store: where the store is now; None: where it was in training.
        unit: whether decoder rows are given length 1, and the codes their lengths.

    Returns:
        What stands in export.json.

    Raises:
        UserError: the format cannot hold one of them exactly, or what was written does not compute
            the same; then nothing is left.
    """
    names, broken = run.finite_names(wanted)
    if broken:
        console.print(f"left out, for they turned non-finite in training: {', '.join(broken)}")
    planned = {c.name: c for c in run.config().coders}
    if refused := refusals(run, names, format_):
        raise _refusal(format_, names, refused)
    layers = (
        {}
        if format_ in _FORMATS
        else circuit_tracer.layers_of({n: planned[n].hookpoint for n in names})
    )
    opened = open_store(run, store)
    model = str(opened.attributes["model"]["name"])
    coders, lengths = {n: run.coder(n) for n in names}, dict.fromkeys(names, 1.0)
    for name in names if unit else ():
        coders[name], lengths[name] = unit_rows(coders[name])
    make_folder(out, "export")
    try:
        references: dict[str, tuple[str, Reference]] = {}
        if layers:
            circuit_tracer.write_set({i: coders[n] for i, n in layers.items()}, out, model)
            for layer, name in layers.items():
                place = f"layer_{layer}.safetensors"
                references[name] = place, circuit_tracer.reference(out, layer)
        for name in () if layers else names:
            place = _place(name, planned[name].hookpoint, names)
            folder = out / place
            folder.mkdir(parents=True)
            origin = Origin(
                model, planned[name].hookpoint, opened.context, tuple(run.config().without_tokens)
            )
            _FORMATS[format_].write(coders[name], folder, origin)
            references[name] = place, _FORMATS[format_].reference(folder)
        written = {
            "format": format_, "run": run.folder.name, "versions": versions(),
            "coders": {
                name: {
                    "place": place, "codes_times": lengths[name],
                    "checked": _checked(coders[name], name, reference, opened, planned[name]),
                }
                for name, (place, reference) in references.items()
            },
        }  # fmt: skip
        write_json(out / "export.json", written)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return written


def refusals(run: Run, names: Sequence[str], format_: str) -> dict[str, str]:
    """Why a format cannot hold coders, by the names of those that it cannot."""
    refusal = circuit_tracer.refusal if format_ not in _FORMATS else _FORMATS[format_].refusal
    configs = {c.name: c.coder for c in run.config().coders}
    found = {name: refusal(configs[name]) for name in names}
    return {name: reason for name, reason in found.items() if reason}


def _refusal(format_: str, names: Sequence[str], refused: dict[str, str]) -> UserError:
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"{', '.join(of)}: {reason}." for reason, of in reasons.items()]
    if others := [name for name in names if name not in refused]:
        lines.append(f"It can hold: {', '.join(others)}.")
    return UserError("\n".join([f"--format {format_} cannot hold this exactly.", *lines]))


def _place(name: str, hookpoint: str, names: Sequence[str]) -> str:
    """Folder of a coder: its hookpoint where it is the only one there, as sparsify has it."""
    alone = sum(n.startswith(f"{hookpoint}/") for n in names) == 1
    return hookpoint if alone and name.startswith(f"{hookpoint}/") else name


def held_out_rows(store: ActivationStore, hookpoint: str, side: str) -> torch.Tensor:
    """Rows that a coder is checked on, float32: the first of the held-out ones that are finite."""
    split, array = store.held_out, f"{hookpoint}/{side}"
    found: list[torch.Tensor] = []
    for (batch,) in split.batches((array,), _ROWS):
        found.append(batch[batch.isfinite().all(dim=1)])
        if sum(map(len, found)) >= _ROWS:
            break
    return torch.cat(found)[:_ROWS].float()


def _checked(
    coder: SparseCoder, name: str, reference: Reference, store: ActivationStore, planned: RunCoder
) -> dict[str, Any]:
    rows = held_out_rows(store, planned.hookpoint, planned.coder.side)
    try:
        return asdict(check_written(coder, reference, rows))
    except UserError as error:
        raise UserError(
            f"{name}: what was written does not compute the same, so nothing is kept: {error}."
        ) from None
