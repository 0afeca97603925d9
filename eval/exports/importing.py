"""Coders that other tools trained, as a run that evaluation takes like any other.

The format is seen from the files of a folder. Every coder is checked on rows of the store: what it
computes here has to be what the other tool's formula makes of the same file.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError, UserError, nearest
from bsc.eval.exports import circuit_tracer
from bsc.eval.exports.dictionary_learning import DICTIONARY_LEARNING
from bsc.eval.exports.export import held_out_rows
from bsc.eval.exports.fetch import fetch
from bsc.eval.exports.saelens import SAELENS
from bsc.eval.exports.sparsify import SPARSIFY
from bsc.eval.exports.weights import CoderFormat, Found, Reference, check_written
from bsc.files import check_new_folder, write_atomically
from bsc.hub import SCHEME, sha256_of
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run, claim
from bsc.train.run_config import RUN_VERSION, Completed, RunCoder, RunConfig
from bsc.typed import write_typed
from bsc.versions import versions

__all__ = ["READABLE", "import_coders"]

_MARKS: dict[str, tuple[tuple[str, ...], CoderFormat | None]] = {
    "sparsify": (("cfg.json", "sae.safetensors"), SPARSIFY),
    "saelens": (("cfg.json", "sae_weights.safetensors"), SAELENS),
    "dictionary-learning": (("config.json", "ae.pt"), DICTIONARY_LEARNING),
    "circuit-tracer": (("config.yaml", "layer_0.safetensors"), None),
}
"""Files by which a folder is known."""
READABLE = tuple(_MARKS)
_DEPTH = 4
"""Folders below a source that are looked into."""
_TRAINING = ("optimiser", "lr", "seed", "rows", "frozen_at_step", "stopped_at_step")
"""What a coder says of its training; null here."""
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


class _Read(NamedTuple):
    """A coder of a source, with all that is to be known of it."""

    format_: str
    folder: Path
    found: Found
    reference: Reference


def import_coders(
    sources: Sequence[str | Path],
    store: str | Path,
    *,
    format_: str = "auto",
    hookpoint: str | None = None,
    name: str = "imported",
    runs: str | Path = "runs",
    same_model: bool = False,
    without_special_tokens: bool = False,
    without_tokens: Collection[int] | None = None,
) -> Run:
    """Make a run of coders that other tools wrote.

    Args:
        sources: folders of coders, or with folders of coders in them, or their address on the hub
            (fetch.py).
        store: of the model that they are of.
        format_: ``"auto"`` or one of `READABLE`.
        hookpoint: of all of them; None: the one that a coder states, or the only one of the store.
        name: of the run.
        runs: folder of runs.
        same_model: takes a coder that states another model's name, since it is called differently.
        without_special_tokens: whether rows of special tokens are left out wherever the run is
            measured, since the coders were trained without them.
        without_tokens: ids of further such tokens; none of them, ``()``: whatever the coders say
            every row is measured. None: what they say, unless special tokens are left out.

    Returns:
        The run, whose coders are in the units of the store's rows.

    Raises:
        UserError: there is no coder, one is damaged or has no counterpart here, or it does not
            belong to the store.
    """
    if format_ != "auto" and format_ not in READABLE:
        raise UserError(
            f"--format {format_}: should be auto or one of {', '.join(READABLE)}"
            f"{nearest(format_, READABLE)}."
        )
    if strange := [i for i in without_tokens or () if not 0 <= i < 1 << 32]:
        raise UserError(f"--without-tokens {strange[0]}: should be the id of a token.")
    opened = ActivationStore(store)
    opened.held_out  # noqa: B018 - raises, with what to do, where there are none
    found = _coders(sources, opened, format_, hookpoint, same_model=same_model)
    special = opened.attributes["model"]["special_token_ids"]
    given = {*(without_tokens or ()), *(special if without_special_tokens else ())}
    as_said = without_tokens is None and not without_special_tokens
    return _write(Run(Path(runs) / name), found, opened, None if as_said else sorted(given))


def _coders(
    sources: Sequence[str | Path], opened: ActivationStore, format_: str, hookpoint: str | None, *,
    same_model: bool,
) -> Iterator[SparseCoder]:  # fmt: skip
    """The coders of all sources, one at a time, each checked, with what is known of it."""
    taken: set[str] = set()
    for source in sources:
        on_hub = fetch(str(source)) if str(source).startswith(SCHEME) else None
        for one in _read(on_hub.folder if on_hub else Path(source), format_, str(source)):
            hook = _hookpoint(one, opened, hookpoint)
            _check_model(one, opened, same=same_model)
            _check_widths(one, opened, hook)
            coder = one.found.coder
            rows = held_out_rows(opened, hook, coder.config.side)
            try:
                with _as_damage(one.folder):
                    checked = check_written(coder, one.reference, rows)
            except StoreError:
                raise
            except UserError as error:
                raise UserError(
                    f"{one.folder}: what was read does not compute the same as {one.format_}: "
                    f"{error}. Please report it."
                ) from None
            label = _label(one, hook, taken)
            taken.add(label)
            about: dict[str, Any] = {
                "name": label, "hookpoint": hook, "model": opened.attributes["model"]["name"],
                **dict.fromkeys(_TRAINING),
                "imported": {
                    "format": one.format_, "file": one.found.file,
                    "source": str(source) if on_hub else str(one.folder),
                    "revision": on_hub.commit if on_hub else None,
                    "sha256": sha256_of(one.folder / one.found.file), "model": one.found.model,
                    "checked": asdict(checked),
                    "without_tokens": _left_out(one.found, opened),
                },
            }  # fmt: skip
            yield SparseCoder(coder.config, coder.tensors, about=about)


def _left_out(found: Found, store: ActivationStore) -> list[int] | None:
    """Ids of tokens that a coder says it was trained without; None: it says nothing."""
    said = found.without_tokens
    ids = store.attributes["model"]["special_token_ids"] if said == "special" else said
    return None if ids is None else sorted(ids)


def _read(source: Path, format_: str, named: str) -> Iterator[_Read]:
    """Coders below a folder, in the order of their names; `named`: as the user called it."""
    if not source.is_dir():
        raise UserError(f"{named}: no such folder. A repository on the hub is {SCHEME}owner/name.")
    some = False
    for folder in _folders(source, _DEPTH):
        for name, (files, one) in _MARKS.items():
            if format_ not in ("auto", name) or not all((folder / f).is_file() for f in files):
                continue
            some = True
            if one is not None:
                with _as_damage(folder):
                    read = _Read(name, folder, one.read(folder), one.reference(folder))
                yield read
                continue
            layer = 0
            while (folder / f"layer_{layer}.safetensors").is_file():
                with _as_damage(folder):
                    found = circuit_tracer.read(folder, layer)
                    read = _Read(name, folder, found, circuit_tracer.reference(folder, layer))
                yield read
                layer += 1
    if not some:
        marks = "; ".join(f"{name}: {', '.join(files)}" for name, (files, _) in _MARKS.items())
        raise UserError(
            f"{named}: no coder of {'any known format' if format_ == 'auto' else format_} here. "
            f"A folder should hold these files: {marks}."
        )


@contextmanager
def _as_damage(folder: Path) -> Iterator[None]:
    """What torch makes of tensors that do not go together, as one message."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, RecursionError) as error:
        first = next(iter(str(error).splitlines()), repr(error))
        raise StoreError(
            f"{folder}: its files do not go together ({type(error).__name__}: {first:.200})."
        ) from None


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink():
                yield from _folders(child, depth - 1)


def _hookpoint(one: _Read, store: ActivationStore, wanted: str | None) -> str:
    names = [h.name for h in store.hookpoints]
    stated = one.found.hookpoint
    if wanted is not None:
        hook = wanted
    elif stated is not None and stated in names:
        hook = stated
    elif stated is None and len(names) == 1:
        hook = names[0]
    else:  # what is stated, and is not here, may be the name of another place
        raise UserError(
            f"{one.folder}: says {stated!r:.80} of where it belongs, and the store has "
            f"{', '.join(names)}. Give --hookpoint."
        )
    return store.hookpoint(hook).name


def _check_model(one: _Read, store: ActivationStore, *, same: bool) -> None:
    def bare(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())

    stated, own = one.found.model, str(store.attributes["model"]["name"])
    if same or not stated or bare(stated) == bare(own):
        return
    raise UserError(
        f"{one.folder}: a coder of {stated:.120}, but {store.folder} was captured from {own}. "
        f"Import it with a store of its own model; where the two are one model under two names, "
        f"give --same-model."
    )


def _check_widths(one: _Read, store: ActivationStore, hook: str) -> None:
    config, at = one.found.coder.config, store.hookpoint(hook)
    d_in = at.d_out if config.side == "output" else at.d_in
    if (config.d_in, config.d_out) != (d_in, at.d_out):
        raise UserError(
            f"{one.folder}: maps rows of width {config.d_in} to {config.d_out}, but {hook} of "
            f"{store.folder} has {d_in} and {at.d_out}: a coder of another model or place."
        )


def _label(one: _Read, hook: str, taken: set[str]) -> str:
    place = one.folder if one.folder.name != hook else one.folder.parent
    plain = _NAME.sub("-", place.name).strip("-.") or one.format_
    label, number = f"{hook}/{one.format_}-{plain}", 2
    while label in taken:
        label, number = f"{hook}/{one.format_}-{plain}-{number}", number + 1
    return label


def _write(
    run: Run, coders: Iterator[SparseCoder], store: ActivationStore, left_out: list[int] | None
) -> Run:
    """Save coders as they come; the config last, without which it is no run.

    `left_out` has the tokens whose rows are left out, None: those that the coders name.
    """
    check_new_folder(run.folder, "run")
    first = next(coders, None)  # before anything is made: most mistakes are of every coder
    if first is None:
        raise UserError("an import needs at least one source.")
    made = [f for f in (run.folder, run.folder.parent) if not f.exists()]
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with claim(run.folder):  # which nobody else has begun to fill
            try:
                planned = []
                named: dict[str, list[int]] = {}
                for coder in itertools.chain([first], coders):
                    name, hook = coder.about["name"], coder.about["hookpoint"]
                    coder.save(run.coder_folder(name))
                    planned.append(RunCoder(name=name, hookpoint=hook, coder=coder.config))
                    if (said := coder.about["imported"]["without_tokens"]) is not None:
                        named[name] = said
                write_atomically(run.metrics_path, "")
                left_out = _agreed(named) if left_out is None else left_out
                write_typed(run.config_path, _config(run, planned, store, left_out))
            except BaseException:
                shutil.rmtree(run.folder / "coders", ignore_errors=True)
                run.metrics_path.unlink(missing_ok=True)
                raise
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty: somebody else's
                folder.rmdir()
        raise
    return run


def _agreed(named: Mapping[str, list[int]]) -> list[int]:
    """The tokens that every coder which names any was trained without.

    Raises:
        UserError: they name others.
    """
    (first, ids), *others = [*named.items()] or [("", [])]
    for name, said in others:
        if said != ids:
            raise UserError(
                f"{first} was trained without the tokens {ids or 'none'}, and {name} without "
                f"{said or 'none'}. A run is measured on one choice of rows: import them as two, "
                f"or say which, with --without-tokens, --without-special-tokens or --all-tokens."
            )
    return ids


def _config(
    run: Run, coders: list[RunCoder], store: ActivationStore, left_out: list[int]
) -> RunConfig:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    address = store.folder.address
    return RunConfig(
        version=RUN_VERSION, name=run.folder.name,
        store=address if "://" in address else str(Path(address).resolve()),
        store_id=store.store_id, model=store.attributes["model"], rows=store.train.rows, steps=None,
        batch_rows=None, micro_rows=None, seed=None, normalise=None, without_tokens=left_out,
        dead_after=None, log_every=None, device=None, rank=0, world=1, assigned={}, config=None,
        coders=list(coders), versions=versions(), started_at=now,
        completed=Completed(at=now, seconds=0.0, rows=0), imported=True,
    )  # fmt: skip
