"""Choosing where to compute."""

from __future__ import annotations

import torch

from bsc.errors import UserError

__all__ = ["pick_device"]


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None means a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} devices are not supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--device {name}: cannot be used here ({reason}). Give cpu, or cuda where torch sees "
            f"a GPU."
        ) from None
    return device
