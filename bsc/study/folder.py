"""The folder of a study: what each step made, and the record that it was made.

stores/<step>-<digest>/          activation stores
runs/<step>-<digest>/            runs, with what was measured on them
records/<step>-<digest>.json     that a step is done: its command, its time, what it made
logs/<step>-<digest>.log         what its command said
study.json, study.html           verdicts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.eval.interp.scores import InterpFolder
from bsc.study.commands import path_of_store
from bsc.study.graph import Node
from bsc.train.run import Run
from bsc.typed import Record, read_typed, write_typed

__all__ = ["RECORD_VERSION", "StepRecord", "StudyFolder"]

RECORD_VERSION = 1


class StepRecord(Record):
    """That a step was done."""

    version: int
    step: str
    digest: str
    command: str
    """The command line, with places relative to the folder of the study."""
    made: str
    """What tells what it made from anything else: the id of a store, or the hash of a file."""
    needs: dict[str, str]
    """What `made` was of the steps that it needs."""
    seconds: float
    """Of all the times that it was worked on."""
    ended_at: str
    versions: dict[str, str]
    chosen: list[dict[str, Any]] | None = None
    """Of `choose`: a value for each arm, with the figures that it was chosen by."""


class StudyFolder:
    """Where a study is."""

    def __init__(self, path: Path, nodes: dict[str, Node]) -> None:
        self.path, self.nodes = path, nodes

    def record_path(self, node: Node) -> Path:
        """File that says that a step is done."""
        return self.path / "records" / f"{node.label}.json"

    def log(self, node: Node) -> Path:
        """What the command of a step said."""
        return self.path / "logs" / f"{node.label}.log"

    def lock(self, node: Node) -> Path:
        """Held by whoever works on a step, or on another that measures the same run."""
        label = node.label
        if node.step.command in ("eval", "interp"):
            label = f"{self.run(node.name).folder.name}-measured"
        return self.path / "records" / f".{label}.lock"

    def store(self, name: str) -> Path | str:
        """Store that a step captured, or names."""
        node = self.nodes[name]
        return path_of_store(node.step) or self.path / "stores" / node.label

    def run(self, name: str) -> Run:
        """The run that a step trained or finetuned, or that it measured."""
        node = self.nodes[name]
        while node.step.command in ("eval", "interp"):
            node = self.nodes[node.step.fields["run"]]
        return Run(self.path / "runs" / node.label)

    def made(self, node: Node) -> str | None:
        """What tells what a step made from anything else; None: it is not there, or not whole."""
        command = node.step.command
        if command == "choose":  # the record is what it made
            return ",".join(self.needs(node).values())
        if command == "cache":
            try:
                store = ActivationStore(self.store(node.name))
                return store.store_id if store.complete else None
            except StoreError:
                return None
        run = self.run(node.name)
        if command in ("train", "finetune"):
            try:
                whole = run.config_path.exists() and run.config().completed is not None
            except StoreError:
                return None
            return _hash(run.config_path) if whole else None
        if command == "eval":
            return _hash(run.eval_path)
        if node.step.fields.get("judge"):
            return _hash(run.interp_folder / node.name / "interp.json")
        return _hash(InterpFolder(run).offline / "offline.json")

    def done(self, node: Node) -> StepRecord | None:
        """The record of a step whose work is there as it was left; None: it is to be done."""
        path = self.record_path(node)
        if not path.exists():
            return None
        try:
            record = read_typed(StepRecord, path, "record of a step", RECORD_VERSION)
        except StoreError:
            return None
        same = record.made == self.made(node) and record.needs == self.needs(node)
        return record if same else None

    def needs(self, node: Node) -> dict[str, str]:
        """What the steps that a step needs have made."""
        found = {name: self.made(self.nodes[name]) for name in node.needs}
        return {name: made for name, made in found.items() if made is not None}

    def write(self, node: Node, record: StepRecord) -> None:
        """Say that a step is done."""
        write_typed(self.record_path(node), record)

    def make(self) -> None:
        """The folders, where they are not there yet."""
        for name in ("stores", "runs", "records", "logs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)


def _hash(path: Path) -> str | None:
    return xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.exists() else None
