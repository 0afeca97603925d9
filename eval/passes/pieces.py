"""Work that is done piece by piece and goes on after an interruption where it stopped.

A piece is one safetensors file, written in one step, so it is there whole or not at all. A folder
of pieces belongs to what decided their content: where that changed, they are thrown away.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bsc.array_file import read_arrays, write_arrays
from bsc.files import canonical_json, write_atomically

__all__ = ["Arrays", "Pieces", "identity_of"]

Arrays = dict[str, NDArray[Any]]
_IDENTITY = "identity.json"


def identity_of(value: Any) -> str:
    """Hash of what decides a result, any value that JSON can hold."""
    return hashlib.sha256(canonical_json(value, indent=None).encode()).hexdigest()


@dataclass(frozen=True)
class Pieces:
    """A folder of numbered pieces."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, identity: Any) -> Pieces:
        """The pieces in `folder` that belong to `identity`; others that are there are removed."""
        path, text = folder / _IDENTITY, canonical_json(identity)
        try:
            fits = path.read_bytes() == text.encode()
        except OSError:
            fits = False
        if not fits:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_atomically(path, text)
        for partial in folder.glob("*.partial"):
            partial.unlink()
        return cls(folder)

    def _path(self, piece: int) -> Path:
        return self.folder / f"{piece:05d}.safetensors"

    def done(self, piece: int) -> bool:
        """Whether a piece is there."""
        return self._path(piece).exists()

    def write(self, piece: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a piece whole."""
        write_arrays(self._path(piece), arrays)

    def read(self, piece: int) -> Arrays:
        """The arrays of a piece.

        Raises:
            StoreError: it is missing or damaged.
        """
        return read_arrays(self._path(piece), f"Remove {self.folder} and give the command again.")
