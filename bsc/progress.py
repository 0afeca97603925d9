"""Progress on stderr: what is done, how fast, how long still.

One bar in the same form for every stage. Silent where stderr is no terminal, except for a line at
the start and the end of a stage, so that logs of batch jobs stay short.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["ESTIMATED_OVER", "Stage", "console", "format_bytes", "stage"]

ESTIMATED_OVER = 600.0
"""Seconds over which a bar takes the rate. With a step that takes longer there would be none."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


def format_bytes(n: float) -> str:
    """Bytes in decimal units, as disks are sold.

    >>> format_bytes(92.2e12)
    '92.2 TB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _amount(n: float, unit: str) -> str:
    """
    >>> _amount(1234567, "rows"), _amount(1234567, "bytes"), _amount(0.51, "requests")
    ('1,234,567 rows', '1.2 MB', '0.51 requests')
    """
    if unit == "bytes":
        return format_bytes(n)
    return f"{n:,.0f} {unit}" if n >= 10 or n == int(n) else f"{n:.2g} {unit}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_amount(speed, self.unit)}/s" if speed else f"- {self.unit}/s")


class Stage:
    """Handle of a running stage."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, note="")

    def advance(self, n: int, note: str = "") -> None:
        """`n` more units are done; `note` is shown beside the rate."""
        self._progress.update(self._task, advance=n, note=note)


@contextmanager
def stage(label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Stage]:
    """Show a bar while the block runs; afterwards one line with the time and the mean rate.

    Args:
        label: what is being done.
        total: units in all.
        unit: name of a unit, plural.
        done: units that were done before.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        _Rate(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=ESTIMATED_OVER,
    )
    started = time.perf_counter()
    with progress:
        handle = Stage(progress, label, total, done)
        yield handle
        now = progress.tasks[0].completed - done
    seconds = time.perf_counter() - started
    amount, rate = _amount(now, unit), _amount(now / max(seconds, 1e-9), unit)
    console.print(f"{label}: {amount} in {seconds:.1f} s ({rate}/s)", markup=False)
