"""A run on disk: what is where in its folder, written by training, read by evaluation.

config.json     the resolved config, versions, the identity of the store
metrics.jsonl   one line per coder and logging interval
checkpoint/     where training goes on from (bsc.train.checkpoint)
ranks/<rank>/   what each of several processes wrote: its config.json, metrics.jsonl, checkpoint/
coders/<hookpoint>/<coder>/   coder.safetensors, config.json, after evaluation firing.safetensors
eval.json       figures, after `bsc eval`
eval/           codes, sampled firings, sums by document, after `bsc eval` (bsc.eval.evaluate)
interp/         interpretability scores, and every answer of a judge, after `bsc interp`
report.html     after `bsc report`
browse/         pages of every latent, after `bsc browse`
on/<name>/      the run on another store, after `bsc eval --on` (bsc.eval.elsewhere)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bsc.errors import StoreError, UserError, nearest
from bsc.files import check_new_folder
from bsc.locks import FileLock, HeldError, holder
from bsc.records import parse_json, parse_record, read_file
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.naming import full_name, names_of
from bsc.train.run_config import RUN_VERSION, RunConfig
from bsc.typed import parse_typed

__all__ = [
    "Run",
    "as_run",
    "claim",
    "in_use",
]

_LOCK = ".lock"


_COPY = "Copy the run again from where it is whole, or train it again."


@lru_cache(maxsize=16)
def _parse_config(raw: bytes, path: Path) -> RunConfig:
    """The config of a run from its bytes. Once: of hundreds of coders it takes 30 ms, and a config
    is read for each of them.

    Raises:
        StoreError: they are of another version, damaged, or not of the form that they should have.
    """
    return parse_typed(RunConfig, parse_record(raw, path, RUN_VERSION, _COPY), path, _COPY)


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    def __repr__(self) -> str:
        try:
            config = self.config()
        except UserError:
            return f"<Run {self.folder}: none, or damaged>"
        state = "trained" if config.completed else "not finished"
        if self.eval_path.exists():
            state += ", evaluated"
        n, hooks = len(config.coders), ", ".join(config.hookpoints)
        return f"<Run {self.folder}: {n} coders at {hooks}; {state}>"

    @property
    def config_path(self) -> Path:
        """The resolved config; a run is complete once it is there with `"completed"`."""
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        """Training metrics."""
        return self.folder / "metrics.jsonl"

    @property
    def eval_path(self) -> Path:
        """Figures of the evaluation."""
        return self.folder / "eval.json"

    @property
    def eval_folder(self) -> Path:
        """What the evaluation leaves beside its figures."""
        return self.folder / "eval"

    @property
    def interp_folder(self) -> Path:
        """Interpretability scores, and the ledger of all answers that judges gave."""
        return self.folder / "interp"

    def remove_figures(self) -> None:
        """Remove all that was measured on the coders, for they change. What judges answered stays:
        it was paid for, and belongs to what was asked."""
        self.eval_path.unlink(missing_ok=True)
        shutil.rmtree(self.eval_folder, ignore_errors=True)
        for path in self.interp_folder.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
        for other in (self.folder / "on").glob("*"):  # on other stores (bsc.eval.elsewhere)
            Run(other).remove_figures()

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    @property
    def browse_folder(self) -> Path:
        """Pages of every latent, beside the report."""
        return self.folder / "browse"

    def part(self, rank: int, world: int) -> Path:
        """Folder of what one of `world` processes writes: the run's own where there is one."""
        return self.folder if world == 1 else self.folder / "ranks" / str(rank)

    def check_new(self, part: Path) -> None:
        """See that training can begin in `part` of this run's folder.

        Raises:
            UserError: something is there already.
        """
        if part.is_dir() and (holder := in_use(part)):
            raise UserError(
                f"{self.folder}: this run is being trained now ({holder}). Wait for it, stop it, "
                f"or give another --name."
            )
        interrupted = part / "config.json"
        if interrupted.exists() and not Run(part).config().completed:
            raise UserError(
                f"{self.folder}: a run that has not ended is here. Go on with it: "
                f"{Run(part).config().going_on} {self.folder}, as it was started; or give another "
                f"--name."
            )
        if self.config_path.exists() and (config := self.config()).completed:
            longer = (
                ""
                if config.finetuned
                else f"; or train it longer: {config.going_on} {self.folder} --tokens with more "
                f"than it had"
            )
            raise UserError(f"{self.folder}: a complete run is here. Give another --name{longer}.")
        if part.is_dir():
            files = list(part.iterdir())
            if files and all(p.name == _LOCK or p.name.endswith(".partial") for p in files):
                with claim(part):  # left by a process that was killed as it began
                    for p in files:
                        if p.name != _LOCK:
                            p.unlink()
        check_new_folder(part, "run")

    def coder_folder(self, name: str) -> Path:
        """Folder of the coder called `name`."""
        return self.folder / "coders" / name

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that training has written.

        Raises:
            StoreError: there is none, it is of another version, or training has not ended.
        """
        run = cls(Path(folder))
        if not run.folder.is_dir():
            siblings = run.folder.parent.iterdir() if run.folder.parent.is_dir() else ()
            names = [str(p) for p in siblings if p.is_dir()]
            known = Path("runs") / run.folder
            hint = f" (did you mean {known}?)" if known.is_dir() else nearest(str(folder), names)
            raise StoreError(f"{folder}: no such run{hint}. `bsc train` makes one.")
        config = run.config()
        if not config.completed:
            raise StoreError(
                f"{folder}: training of this run has not ended, or was interrupted. Go on with it: "
                f"{config.going_on} {folder}"
                + (f" --rank R --world {config.world}" if config.world > 1 else "")
            )
        return run

    def config(self) -> RunConfig:
        """The resolved config.

        Raises:
            StoreError: the folder is no run, its config is damaged or of another version.
        """
        if not self.config_path.exists() and (self.folder / "data.zarr").exists():
            raise StoreError(
                f"{self.folder}: an activation store, not a run. Name the folder of a run, such as "
                f"runs/run; `bsc train --store {self.folder}` makes one."
            )
        raw = read_file(self.config_path, "run", _COPY)
        return _parse_config(raw, self.config_path)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl.

        Raises:
            StoreError: the file is missing or damaged.
        """
        try:
            with self.metrics_path.open() as lines:
                yield from map(parse_json, lines)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.metrics_path}: cannot be read ({error}).") from None

    def coder_names(self) -> list[str]:
        """Names of the coders, in the order of the sweep."""
        return [c.name for c in self.config().coders]

    def full_name(self, name: str) -> str:
        """Name of the one coder that is called `name`, or has it as the end or a part of its name.

        Raises:
            UserError: there is none, or there are several; the message names them.
        """
        return full_name(name, self.coder_names(), self.folder)

    def names_of(self, wanted: Sequence[str]) -> list[str]:
        """Names of the coders that any of some names, parts of names or patterns means.

        Raises:
            UserError: a name is not that of one coder, or a pattern fits none.
        """
        return names_of(wanted, self.coder_names(), self.folder)

    def finite_names(self, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
        """`names_of` those that training left finite, and of those that it did not.

        Raises:
            UserError: none is finite; or as `names_of`.
        """
        chosen = self.names_of(wanted)
        broken = [
            n for n in chosen
            if SparseCoder.about_of(self.coder_folder(n)).get("frozen_at_step") is not None
        ]  # fmt: skip
        if len(broken) == len(chosen):
            raise UserError(f"{self.folder}: every chosen coder turned non-finite in training.")
        return [n for n in chosen if n not in broken], broken

    def coder(self, name: str) -> SparseCoder:
        """Load the coder called `name`, or the one that has it as a part of its name.

        Raises:
            UserError: there is no such coder, or several; or it is damaged.
        """
        name = self.full_name(name)
        folder = self.coder_folder(name)
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{self.folder}: coder {name!r} lies outside of the run.")
        return SparseCoder.load(folder)


def as_run(run: Run | str | Path) -> Run:
    """A run, opened if a folder is given.

    Raises:
        StoreError: as `Run.open`.
    """
    return run if isinstance(run, Run) else Run.open(run)


def in_use(folder: Path) -> str | None:
    """Who holds a run's folder now; None where nobody does."""
    return holder(folder / _LOCK)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder while the block runs.

    Raises:
        UserError: another process holds it.
    """
    try:
        lock = FileLock(folder / _LOCK)
    except HeldError as held:
        raise UserError(
            f"{folder}: this run is in use ({held}). Wait for it, or stop it."
        ) from None
    try:
        yield
    finally:
        lock.release(remove=True)
