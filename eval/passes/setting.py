"""What an evaluation works with: the run's coders, its store, and the model of the capture."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bsc.cache.model.attention import BY_POSITIONS, Separation
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.models import LanguageModel, load_model
from bsc.cache.model.separation import looks_ahead, separation_of
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.devices import available_bytes, pick_device
from bsc.errors import StoreError, UserError
from bsc.eval.passes.contexts import contexts_of
from bsc.progress import console, format_bytes
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.run import Run

__all__ = [
    "Setting",
    "check_widths",
    "matching_model",
    "open_setting",
    "open_store",
    "separation_in",
]


_SAME_ROWS = 0.01
"""Relative squared difference below which rows are of one model, rounding and codecs allowed."""


@dataclass(frozen=True)
class Setting:
    """Everything that was opened, and found to belong together."""

    run: Run
    store: ActivationStore
    lm: LanguageModel
    coders: dict[str, SparseCoder]
    """By name, on the device; without those that turned non-finite in training."""
    left_out: list[str]
    separation: Separation
    without_tokens: tuple[int, ...]
    """Token ids whose rows are left out, as they were in training."""

    @property
    def split(self) -> StoreSplit:
        """Held-out rows."""
        return self.store.held_out

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints of the coders, in their order."""
        return list(dict.fromkeys(str(c.about["hookpoint"]) for c in self.coders.values()))

    def hookpoint(self, name: str) -> str:
        """Hookpoint of a coder."""
        return str(self.coders[name].about["hookpoint"])

    def coders_at(self, hookpoint: str) -> dict[str, SparseCoder]:
        """The coders of a hookpoint by name."""
        return {n: c for n, c in self.coders.items() if self.hookpoint(n) == hookpoint}


def matching_model(store: ActivationStore, name: str | None, device: torch.device) -> LanguageModel:
    """The model that the store was captured from, with its head.

    Raises:
        StoreError: the model of that name has other weights now.
        UserError: its tokens see what comes after them, so it has no loss of next tokens.
    """
    saved = store.attributes["model"]
    lm = load_model(
        name or str(saved["name"]),
        revision=saved["revision"],
        dtype=str(saved["dtype"]),
        device=device,
        with_head=True,
        random_weights=saved.get("random_weights"),
    )
    found = lm.identity()
    keys = ["revision", "weights_sha256"]
    if found["weights_sha256"] and not saved["weights_sha256"]:
        # A copy in a folder of a model that came from the hub: its rows will tell.
        keys = []
        _check_rows(store, lm)
    for key in keys:
        if found[key] != saved[key]:
            raise StoreError(
                f"{store.folder}: captured from {saved['name']} with {key} {saved[key]}, but that "
                f"model now has {found[key]}. Name the model of the capture with --model."
            )
    if looks_ahead(
        RowTap(lm.base, [h.name for h in store.hookpoints]).rows,
        vocabulary=lm.vocabulary,
        device=device,
    ):
        raise UserError(
            f"{store.folder}: captured from {saved['name']}, whose tokens see what comes after "
            f"them, so there is no loss of next tokens to measure. `bsc train` gives FVU on "
            f"held-out rows of such a model."
        )
    return lm


def _check_rows(store: ActivationStore, lm: LanguageModel) -> None:
    """See that a model gives the rows of the store.

    Raises:
        StoreError: it does not.
    """
    hooks = [h.name for h in store.hookpoints]
    contexts = contexts_of(store, 1, separation_in(store, lm, hooks))
    n = int(contexts.real[0].sum())
    rows = RowTap(lm.base, hooks).rows(contexts.inputs(slice(0, 1), lm))
    for hook in hooks:
        saved = store.held_out.shard_rows(f"{hook}/output", 0)
        ours = rows[f"{hook}/output"][:n].cpu().double()
        theirs = saved.part(0, min(n, store.held_out.grid.shard_rows)).double()
        difference = (ours[: len(theirs)] - theirs).square().sum() / theirs.square().sum()
        if not difference < _SAME_ROWS:
            raise StoreError(
                f"{store.folder}: captured from {store.attributes['model']['name']}, and the model "
                f"in {lm.name} gives other rows at {hook}: it is not a copy of it."
            )


def open_store(run: Run, store: str | Path | None, *, check: bool = True) -> ActivationStore:
    """The store that a run was trained on.

    Args:
        run: the run.
        store: where the store is now; None: where it was in training.
        check: whether shards are compared with the manifest when they are first read.

    Raises:
        StoreError: it is not there, or is another one.
    """
    config = run.config()
    if store is None and "://" not in config.store and not Path(config.store).exists():
        raise StoreError(
            f"{run.folder}: trained on store {config.store}, which is not there"
            f"{'' if config.pulled else ' any more'}. Say where it is with --store, or measure on "
            f"another of the same model with --on. `bsc report` and `bsc compare` work without it "
            f"on runs that were evaluated before."
        )
    opened = ActivationStore(store or config.store, check=check)
    if opened.store_id != config.store_id:
        raise StoreError(
            f"{opened.folder}: this is store {opened.store_id}, but run {run.folder} was trained "
            f"on store {config.store_id}. Name that one with --store; or, if this is one of the "
            f"same model, measure on it with --on."
        )
    opened.own_split = config.trained_on is None and not config.imported
    return opened


def open_setting(
    run: Run, *, store: str | Path | None, model: str | None, device: str | None, check: bool = True
) -> Setting:
    """Open everything that an evaluation of `run` needs.

    Raises:
        UserError: the store, its held-out rows or the model are not there or not the same.
    """
    opened = open_store(run, store, check=check)
    opened.held_out  # noqa: B018 - says so where there are no held-out rows, before a model is loaded
    on = pick_device(device)
    lm = matching_model(opened, model, on)
    _check_memory(run, on)
    coders: dict[str, SparseCoder] = {}
    left_out = []
    for name in run.coder_names():
        coder = run.coder(name)
        if coder.about["frozen_at_step"] is not None:
            left_out.append(name)
            console.print(
                f"{name}: left out, it turned non-finite at step {coder.about['frozen_at_step']} "
                f"of its training"
            )
        else:
            check_widths(opened, name, coder)
            coders[name] = coder.to(on)
    separation = separation_in(opened, lm, run.config().hookpoints)
    without = tuple(run.config().without_tokens)
    return Setting(run, opened, lm, coders, left_out, separation, without)


def _check_memory(run: Run, device: torch.device) -> None:
    """See that all coders of a run fit on a GPU, before the first is loaded.

    On a CPU they are mapped, and the system drops what it has no room for.

    Raises:
        UserError: they do not.
    """
    if device.type == "cpu":
        return
    shapes = [parameter_shapes(c.coder).values() for c in run.config().coders]
    needed = sum(4 * prod(shape) for of in shapes for shape in of)
    free = available_bytes(device)
    if needed > free:
        raise UserError(
            f"{run.folder}: its {len(shapes)} coders take {format_bytes(needed)}, but "
            f"{format_bytes(free)} may be used on {device}. Measure them where there is more, or "
            f"with --device cpu."
        )


def separation_in(store: ActivationStore, lm: LanguageModel, hookpoints: list[str]) -> Separation:
    """How the model keeps the documents of a context of this store apart.

    Raises:
        UserError: it does not, though the store was captured so.
        StoreError: it was captured otherwise, by an older version.
    """
    if store.packing != "masked":
        return BY_POSITIONS
    found = separation_of(lm, hookpoints, store.context)
    saved = Separation(**store.attributes.get("separation", {}))
    if found != saved:
        raise StoreError(
            f"{store.folder}: documents of a context were kept apart otherwise than this model "
            f"keeps them apart ({saved}, here {found}), so its rows are not those of the "
            f"documents alone. Capture it again."
        )
    return found


def check_widths(store: ActivationStore, name: str, coder: SparseCoder) -> None:
    """See that a coder takes and gives rows of the width that its hookpoint has.

    Raises:
        StoreError: it does not.
    """
    hook: Any = store.hookpoint(str(coder.about["hookpoint"]))
    found = (coder.config.d_in, coder.config.d_out)
    expected = (hook.d_out if coder.config.site == "sae" else hook.d_in, hook.d_out)
    if found != expected:
        raise StoreError(
            f"coder {name} maps {found[0]} channels to {found[1]}, but {hook.name} of store "
            f"{store.folder} has {expected[0]} and {expected[1]}: it is a coder of another model."
        )
