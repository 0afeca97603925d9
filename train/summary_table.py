"""The table of coders that ends a training run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from bsc.formats import percent
from bsc.train.loop import CoderSummary

__all__ = ["summary_table"]


def summary_table(summaries: Iterable[CoderSummary]) -> None:
    """Print the last training figures of every coder on stdout."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("coder", no_wrap=True)
    for title in ("FVU (train)", "FVU (held out)", "L0", "dead"):
        table.add_column(title, justify="right")
    for s in summaries:
        if s.frozen_at is not None:
            table.add_row(s.name, f"not finite at step {s.frozen_at}", "", "", "")
        elif s.fvu is None or s.l0 is None or s.dead is None:
            table.add_row(s.name, "no figures", "", "", "")
        else:
            held_out = "" if s.held_out_fvu is None else f"{s.held_out_fvu:.4f}"
            table.add_row(s.name, f"{s.fvu:.4f}", held_out, f"{s.l0:.1f}", percent(s.dead, 1))
    # Wide enough for every name, also where stdout is no terminal.
    Console(highlight=False, width=200).print(table)
