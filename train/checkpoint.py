"""Checkpoints of a run: everything that decides how it goes on, safetensors and JSON alone.

checkpoint/latest.json     which folder counts, and the size and xxh3_128 of each of its files
checkpoint/<step>/state.json          cursor of the data, per coder its progress
checkpoint/<step>/<number>.safetensors    tensors of one coder

A checkpoint is written beside the last one and made durable, then `latest.json` is replaced, then
the last one is removed: at every instant a whole one counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bsc.errors import StoreError
from bsc.files import fsync_folder, make_durable_folder, write_json
from bsc.records import parse_json, read_record, write_record
from bsc.tensor_file import write_tensors

__all__ = [
    "CHECKPOINT_VERSION",
    "Checkpoint",
    "checkpoint_step",
    "load_checkpoint",
    "save_checkpoint",
]

CHECKPOINT_VERSION = 1
_LATEST, _STATE = "latest.json", "state.json"
_REMEDY = "The checkpoint before it counts: once there is room, --resume goes on from there."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that counts, whose files are those that were written."""

    folder: Path
    state: dict[str, Any]
    numbers: dict[str, int]
    """By the names of the coders which file is whose."""

    def coder(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Progress and tensors of a coder; None where there is none of that name.

        The tensors are mapped from the file. Copy them and let them go: for as long as they are
        held the file has its place on the disk, also after it was removed.

        Raises:
            StoreError: the file cannot be read.
        """
        number = self.numbers.get(name)
        if number is None:
            return None
        path = _tensors(self.folder, number)
        try:
            return self.state["coders"][number]["progress"], load_file(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be read ({error!r}).") from None


def _tensors(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], coders: Sequence[Mapping[str, Tensor]]
) -> None:
    """Write a checkpoint and let it count.

    Args:
        folder: of the run's checkpoints.
        step: steps that were taken.
        state: JSON.
        coders: tensors of each coder.
    """
    make_durable_folder(folder)
    name = f"{step:09d}"
    target = folder / name
    assert _counts(folder) != name, "the checkpoint that counts is never written over"
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed while it wrote
    target.mkdir()
    write_json(target / _STATE, state)
    for number, tensors in enumerate(coders):
        write_tensors(_tensors(target, number), tensors, _REMEDY)
    fsync_folder(folder)
    files = {p.name: [p.stat().st_size, _digest(p)] for p in sorted(target.iterdir())}
    write_record(
        folder / _LATEST,
        {"version": CHECKPOINT_VERSION, "folder": name, "coders": len(coders), "files": files},
    )
    for other in folder.iterdir():
        if other.is_dir() and other != target:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that counts; None where none was written.

    Raises:
        StoreError: it is damaged, cut short, or of another version.
    """
    path = folder / _LATEST
    if not path.exists():
        return None
    try:
        latest = read_record(
            path,
            "checkpoint",
            CHECKPOINT_VERSION,
            "It cannot be resumed; train the run again under another --name.",
        )
        name, files, count = latest["folder"], latest["files"], int(latest["coders"])
        if not str(name).isdigit():
            raise ValueError(f"folder {name!r}")
        target = folder / str(name)
        for file in (target / _STATE, *(_tensors(target, i) for i in range(count))):
            size, digest = files[file.name]
            if file.stat().st_size != size or _digest(file) != digest:
                raise StoreError(
                    f"{file}: damaged or cut short. This checkpoint cannot be resumed; "
                    f"train the run again under another --name."
                )
        state = parse_json((target / _STATE).read_bytes())
        if len(state["coders"]) != count:
            raise ValueError(f"{count} coders' tensors, {len(state['coders'])} coders")
        return Checkpoint(target, state, {c["name"]: i for i, c in enumerate(state["coders"])})
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"{folder}: the checkpoint cannot be read ({error!r}).") from None


def checkpoint_step(folder: Path) -> int:
    """Steps that the checkpoint in a folder has; 0 where there is none that can be read."""
    name = _counts(folder)
    return int(name) if name and name.isdigit() else 0


def _counts(folder: Path) -> str | None:
    """Folder that `latest.json` names, if it can be read."""
    try:
        return str(parse_json((folder / _LATEST).read_bytes())["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
