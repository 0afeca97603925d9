"""Choosing where to compute, and which of several processes this is."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

import torch

from bsc.errors import UserError

__all__ = [
    "available_bytes",
    "keep_freed_memory",
    "multiplies_bfloat16",
    "pick_device",
    "product_dtype",
    "rank_and_world",
    "sum_in_float32",
]


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None means a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name is None and torch.cuda.is_available():
        # torchrun says which of the GPUs of a machine is this process's.
        mine, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if mine >= here:
            raise UserError(f"process {mine + 1} of this machine finds no GPU: there are {here}.")
        return torch.device("cuda", mine)
    if name is None:
        return torch.device("cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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


_SHARE = 0.9
"""Share of the free memory that a plan may use."""


def available_bytes(device: torch.device) -> int:
    """Memory that a run may plan with: 0.9 of what is free now."""
    if device.type == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                # Processes that torchrun starts on one machine share its memory.
                local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                return int(_SHARE * 1024 * int(line.split()[1])) // local
    return 2**62


def rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    """Rank and number of processes: from flags, else from torchrun's environment, else 0 of 1.

    Raises:
        UserError: one flag is given without the other.
    """
    if (rank is None) != (world is None):
        raise UserError("--rank and --world belong together: give both, or start with torchrun.")
    if rank is not None and world is not None:
        return rank, world
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


@cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return False


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are worth taking on a device.

    On a CPU without AVX-512 they take 9 to 53 times as long as those of float32:
    benchmarks/records/bfloat16_2core-epyc-avx2_2026-11-22.md.
    """
    return device.type != "cpu" or _cpu_multiplies_bfloat16()


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type that products of coders are taken in: float32 for ``"fp32"``, and where bfloat16 is too
    slow."""
    fast = precision == "bf16" and multiplies_bfloat16(device)
    return torch.bfloat16 if fast else torch.float32


def sum_in_float32() -> None:
    """Have products of half precision on a GPU summed in float32 to the end, as on a CPU.

    By default the sums of parts of a long product are added in half precision. Holds for the whole
    process.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def keep_freed_memory() -> None:
    """Tell glibc to keep memory that is freed for what comes next; elsewhere nothing.

    Tensors of some megabytes otherwise come as fresh pages from the system every time, whose first
    use costs as much as the arithmetic: a tenth of a training step on a CPU. Holds for the whole
    process.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(top_pad, 64 << 20)
