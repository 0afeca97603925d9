"""The table of figures that `bsc eval` and `bsc demo` print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["figures_table"]


def figures_table(evaluation: dict[str, Any], title: str | None = None) -> None:
    """Print FVU, L0, firing and loss of every coder on stdout."""
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("coder", no_wrap=True)
    for name in ("FVU", "L0", "dead", ">1 %", ">10 %", ">50 %", "delta CE", "95 % interval"):
        table.add_column(name, justify="right")
    for name, f in evaluation["coders"].items():
        low, high = f["delta_ce_interval"]
        above = f["latents_above"]
        table.add_row(
            name,
            f"{f['fvu']:.4f}",
            f"{f['l0']:.1f}",
            f"{f['dead'] / f['latents']:.1%}",
            *(str(above[t]) for t in ("0.01", "0.1", "0.5")),
            f"{f['delta_ce']:.4f}",
            f"{low:.4f} to {high:.4f}",
        )
    # Wide enough for every name, also where stdout is no terminal.
    Console(highlight=False, width=200).print(table)
