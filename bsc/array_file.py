"""Arrays in a safetensors file that carries the hash of what it holds.

A file with a changed byte opens like any other, and its numbers then end in a figure. Whoever reads
one of these meets an error instead. The hash is an xxh3_128 over the names, dtypes, shapes and
bytes of all arrays, in the order of their names; xxh3 reads at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bsc.errors import StoreError
from bsc.files import write_atomically

__all__ = ["array_hash", "read_arrays", "write_arrays"]

_KEY = "xxh3_128"


def array_hash(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash of named arrays, 32 hexadecimal digits.

    >>> array_hash({"a": np.zeros(2)}) == array_hash({"a": np.zeros((2, 1))})
    False
    """
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Replace `path` by a file that holds `arrays` and their hash, in one step."""
    contiguous = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
    write_atomically(path, save(contiguous, metadata={_KEY: array_hash(contiguous)}))


def read_arrays(path: Path, remedy: str) -> dict[str, NDArray[Any]]:
    """The arrays of a file that `write_arrays` wrote.

    Args:
        path: the file.
        remedy: what to do if it cannot be used, a sentence for the message.

    Raises:
        StoreError: it is missing, cannot be read, or does not hold what was written.
    """
    try:
        with safe_open(path, "np") as file:
            written = (file.metadata() or {}).get(_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}). {remedy}") from None
    if written != array_hash(arrays):
        raise StoreError(
            f"{path}: damaged, or written by another version of bsc: its content does not have "
            f"the hash that it carries. {remedy}"
        )
    return arrays
