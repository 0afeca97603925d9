"""How things are timed here: in turn, with what the machine can do measured beside them."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bsc.devices import product_dtype


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    runs: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each of several things, taken in turn after two rounds that do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            sync(device)
            started = time.perf_counter()
            run()
            sync(device)
            if i >= 2:
                found[name].append(1e3 * (time.perf_counter() - started))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": round(statistics.median(values), 3), "min": round(min(values), 3),
        "max": round(max(values), 3),
    }  # fmt: skip


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Of values that were taken in turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device can do: TFLOP/s of a large product as training takes it, GB/s of a copy."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = product_dtype("bf16", device)
    a = torch.randn((n, n), device=device).to(dtype)
    out = torch.empty_like(a)
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    ms = alternate(
        {"mm": lambda: torch.mm(a, a, out=out), "copy": lambda: target.copy_(source)}, device, 7
    )
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    return {
        f"tflops_{kind}": round(2 * n**3 / statistics.median(ms["mm"]) / 1e9, 2),
        "gb_per_s_copy": round(8 * len(source) / statistics.median(ms["copy"]) / 1e6, 1),
    }


def machine(device: torch.device) -> str:
    """What it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
