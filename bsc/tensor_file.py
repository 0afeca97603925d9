"""Tensors in a safetensors file that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bsc.errors import UserError
from bsc.files import replacing

__all__ = ["write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], remedy: str = "") -> None:
    """Replace `path` by a file that holds `tensors`, in one step.

    Their bytes go to the disk from where they are: of tensors on the CPU that are contiguous no
    copy is made (one by safetensors before 0.8), of others one.

    Args:
        path: the file.
        tensors: by name.
        remedy: what to do if it cannot be written, a sentence for the message.

    Raises:
        UserError: the file cannot be written.
    """
    on_host = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            save_file(on_host, temporary)
            with suppress(PermissionError):  # of file systems without modes
                temporary.chmod(mode)  # safetensors makes files that nobody else may read
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}). {remedy}".rstrip()) from None
