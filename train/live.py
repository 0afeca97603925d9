"""What a person sees of a training run: a bar, the rate, what it waits for, a table of coders."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bsc.formats import percent
from bsc.progress import ESTIMATED_OVER, console

__all__ = ["TRAINING", "Columns", "TrainingView", "training_view"]

_ROWS_SHOWN = 24
_REPORT_SECONDS = 600.0
"""Between two lines in a log."""
_DISK_BOUND = 0.1
"""Share of the time spent waiting for rows above which a run counts as bound by its data."""


Columns = Mapping[str, tuple[str, str]]
"""Columns of a table of coders: by title the field of metrics.jsonl and how it is written."""
TRAINING: Columns = {
    "FVU": ("fvu", ".4f"), "held out": ("held_out_fvu", ".4f"), "L0": ("l0", ".1f"),
    "dead": ("dead", "%"), "lr": ("lr", ".2g"),
}  # fmt: skip


class TrainingView:
    """Handle of a running view."""

    def __init__(self, label: str, total: int, done: int, columns: Columns = TRAINING) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(compact=True), console=console,
            speed_estimate_period=ESTIMATED_OVER,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done, note="")
        self._columns = columns
        self._done, self._started = done, time.perf_counter()
        self._waited = 0.0
        self._reported = self._started
        self.figures: dict[str, dict[str, Any]] = {}
        """Last figures of every coder."""

    @property
    def seconds(self) -> float:
        """Since the view was made."""
        return time.perf_counter() - self._started

    def advance(self, rows: int, waited: float) -> None:
        """`rows` more are done; `waited` seconds were spent waiting for rows in all."""
        self._waited = waited
        self._bar.update(self._task, advance=rows)
        self._bar.update(self._task, note=self.note())
        if not console.is_terminal and time.perf_counter() - self._reported > _REPORT_SECONDS:
            self._reported = time.perf_counter()
            console.print(self.line())

    def rows(self) -> float:
        """Rows that are done since the view was made."""
        return float(self._bar.tasks[0].completed - self._done)

    def note(self) -> str:
        """Rate, and what bounds it."""
        share = self._waited / max(self.seconds, 1e-9)
        bound = "disk-bound" if share > _DISK_BOUND else "compute-bound"
        rate = self.rows() / max(self.seconds, 1e-9)
        return f"{rate:,.0f} rows/s, {bound} ({percent(share)} waiting)"

    def line(self) -> str:
        """Where the run is, for logs."""
        task = self._bar.tasks[0]
        left = (task.total or 0) - task.completed
        hours = left / max(self.rows(), 1.0) * self.seconds / 3600
        values = [f["fvu"] for f in self.figures.values()]
        fvu = f", FVU {min(values):.4f} to {max(values):.4f}" if values else ""
        return (
            f"{task.description}: {task.percentage:.1f} %, {hours:.1f} h left, {self.note()}{fvu}"
        )

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("coder", no_wrap=True)
        for title in self._columns:
            table.add_column(title, justify="right")
        ranked = sorted(self.figures.items(), key=lambda item: item[1].get("fvu") or 9e9)
        for name, f in ranked[:_ROWS_SHOWN]:
            table.add_row(name, *(_cell(f, *column) for column in self._columns.values()))
        more = len(ranked) - _ROWS_SHOWN
        parts: list[Any] = [self._bar]
        if ranked:
            parts.append(table)
        if more > 0:
            parts.append(Text(f"and {more} more, of higher FVU"))
        return Group(*parts)


def _cell(f: Mapping[str, Any], field: str, form: str) -> str:
    value = f.get(field)
    if value is None:
        return ""
    return percent(value, 1) if form == "%" else format(value, form)


@contextmanager
def training_view(
    label: str, total: int, done: int = 0, columns: Columns = TRAINING
) -> Iterator[TrainingView]:
    """Show a run while the block trains; afterwards one line.

    Where stderr is no terminal there is that line, and one every ten minutes before it.

    Args:
        label: what is trained.
        total: rows in all.
        done: rows that were done before.
        columns: of the table of coders.
    """
    view = TrainingView(label, total, done, columns)
    if console.is_terminal:
        with Live(view, console=console, refresh_per_second=4, transient=True):
            yield view
    else:
        yield view
    console.print(f"{label}: {view.rows():,.0f} rows in {view.seconds:.1f} s ({view.note()})")
