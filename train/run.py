"""A run on disk: what is where in its folder, written by training, read by evaluation.

config.json     the resolved config, versions, the identity of the store
metrics.jsonl   one line per coder and logging interval
coders/<hookpoint>/<coder>/   coder.safetensors, config.json, after evaluation firing.safetensors
eval.json       figures, after `bsc eval`
examples.json   contexts in which latents fire, after `bsc eval`
report.html     after `bsc report`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsc.errors import StoreError, nearest
from bsc.train.coders.coder import SparseCoder

__all__ = ["RUN_VERSION", "Run"]

RUN_VERSION = 1


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
    def report_path(self) -> Path:
        """The report."""
        return self.folder / "report.html"

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
                f"{folder}: training of this run has not ended, or was interrupted. Train it "
                f"again under another --name."
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
        expected = (RUN_VERSION, self.config()["store_id"])
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
