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
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsc.errors import StoreError, UserError, nearest
from bsc.files import check_new_folder
from bsc.train.coders.coder import SparseCoder

__all__ = ["EVAL_VERSION", "RUN_VERSION", "Run", "claim", "waiting_lock"]

RUN_VERSION = 1
EVAL_VERSION = 3
_LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

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

    @property
    def examples_path(self) -> Path:
        """Contexts in which latents fire."""
        return self.eval_folder / "examples.json"

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def part(self, rank: int, world: int) -> Path:
        """Folder of what one of `world` processes writes: the run's own where there is one."""
        return self.folder if world == 1 else self.folder / "ranks" / str(rank)

    def check_new(self, part: Path) -> None:
        """See that training can begin in `part` of this run's folder.

        Raises:
            UserError: something is there already.
        """
        interrupted = part / "config.json"
        if interrupted.exists() and "completed" not in Run(part).config():
            raise UserError(
                f"{self.folder}: a run that has not ended is here. Go on with it: bsc train "
                f"--resume {self.folder}, as it was started; or give another --name."
            )
        if part != self.folder and self.config_path.exists() and "completed" in self.config():
            raise UserError(f"{self.folder}: a complete run is here. Give another --name.")
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
            raise StoreError(
                f"{folder}: no such run{nearest(str(folder), names)}. `bsc train` makes one."
            )
        config = run.config()
        if config.get("version") != RUN_VERSION:
            raise StoreError(
                f"{folder}: a run of format version {config.get('version')}; this bsc reads "
                f"{RUN_VERSION}."
            )
        if "completed" not in config:
            raise StoreError(
                f"{folder}: training of this run has not ended, or was interrupted. Go on with it: "
                f"bsc train --resume {folder}"
                + (f" --rank R --world {config['world']}" if config.get("world", 1) > 1 else "")
            )
        return run

    def config(self) -> dict[str, Any]:
        """The resolved config.

        Raises:
            StoreError: the folder is no run, or its config is damaged.
        """
        return self._json(self.config_path, "run")

    def evaluation(self) -> dict[str, Any]:
        """Figures of the evaluation.

        Raises:
            StoreError: the run has not been evaluated, or the file is damaged.
        """
        if not self.eval_path.exists():
            raise StoreError(f"{self.folder}: not evaluated yet. Run `bsc eval {self.folder}`.")
        found = self._json(self.eval_path, "evaluation")
        expected = (EVAL_VERSION, self.config()["store_id"])
        if (found.get("version"), found.get("store_id")) != expected:
            raise StoreError(
                f"{self.eval_path}: of another version of bsc, or of another store than the run. "
                f"Evaluate again: bsc eval {self.folder}"
            )
        return found

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl.

        Raises:
            StoreError: the file is missing or damaged.
        """
        try:
            with self.metrics_path.open() as lines:
                yield from map(json.loads, lines)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.metrics_path}: cannot be read ({error}).") from None

    def coder_names(self) -> list[str]:
        """Names of the coders, in the order of the sweep."""
        return [str(c["name"]) for c in self.config()["coders"]]

    def coder(self, name: str) -> SparseCoder:
        """Load the coder called `name`.

        Raises:
            StoreError: there is no such coder, or it is damaged.
        """
        if name not in self.coder_names():
            raise StoreError(
                f"{self.folder}: no coder {name!r}{nearest(name, self.coder_names())}."
            )
        folder = self.coder_folder(name)
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise StoreError(f"{self.folder}: coder {name!r} lies outside of the run.")
        return SparseCoder.load(folder)

    def _json(self, path: Path, what: str) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise StoreError(f"{self.folder}: no {what} here ({path.name} is missing).") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read as JSON ({error}).") from None
        if not isinstance(value, dict):
            raise StoreError(f"{path}: expected a JSON object, found {type(value).__name__}.")
        return value


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run's folder while the block runs; the kernel lets go when the process ends, however.

    Raises:
        UserError: another process holds it.
    """
    path = folder / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            raise UserError(
                f"{folder}: this run is in use ({holder or 'another process'}). Wait for it, or "
                f"stop it."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def waiting_lock(folder: Path) -> Iterator[None]:
    """Hold a lock that is held for moments, waiting for it."""
    descriptor = os.open(folder / ".merge.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
