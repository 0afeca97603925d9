"""The table of coders that ends a run of finetuning."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from bsc.finetuning.finetune import FinetuneSummary
from bsc.formats import percent

__all__ = ["summary_table"]


def summary_table(summaries: Iterable[FinetuneSummary]) -> None:
    """Print the last figures of every coder on stdout."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("coder", no_wrap=True)
    for title in ("KL", "CE", "FVU", "L0", "dead"):
        table.add_column(title, justify="right")
    for s in summaries:
        if s.frozen_at is not None:
            table.add_row(s.name, f"not finite at step {s.frozen_at}", "", "", "", "")
        elif s.kl is None or s.ce is None or s.fvu is None or s.l0 is None or s.dead is None:
            table.add_row(s.name, "no figures", "", "", "", "")
        else:
            table.add_row(
                s.name, f"{s.kl:.4f}", f"{s.ce:.4f}", f"{s.fvu:.4f}", f"{s.l0:.1f}",
                percent(s.dead, 1),
            )  # fmt: skip
    # Wide enough for every name, also where stdout is no terminal.
    Console(highlight=False, width=200).print(table)
