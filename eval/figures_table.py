"""The table of figures that `bsc eval` and `bsc demo` print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bsc.formats import interval, percent

__all__ = ["comparison_table", "figures_table"]


def figures_table(evaluation: dict[str, Any], title: str | None = None) -> None:
    """Print FVU, L0, firing and loss of every coder on stdout."""
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("coder", no_wrap=True)
    columns = ("FVU", "L0", "bits", "dead", ">1 %", ">10 %", ">50 %", "delta CE", "95 % interval")
    for name in columns:
        table.add_column(name, justify="right")
    for name, f in evaluation["coders"].items():
        above = f["latents_above"]
        table.add_row(
            name,
            f"{f['fvu']:.4f}",
            f"{f['l0']:.1f}",
            f"{f['bits']:.0f}",
            percent(f["dead"] / f["latents"], 1),
            *(str(above[t]) for t in ("0.01", "0.1", "0.5")),
            f"{f['delta_ce']:.4f}",
            interval(f["delta_ce_interval"]),
        )
    # Wide enough for every name, also where stdout is no terminal.
    Console(highlight=False, width=200).print(table)


def comparison_table(comparison: dict[str, Any]) -> None:
    """Print the differences between the coders of two runs on stdout."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("coder", no_wrap=True)
    for name in ("FVU", "difference", "95 % interval", "delta CE", "difference", "95 % interval",
                 "latents alike"):  # fmt: skip
        table.add_column(name, justify="right")
    for entry in comparison["coders"]:
        same = entry["first"] == entry["second"]
        cells = []
        for figure in ("fvu", "delta_ce"):
            f = entry[figure]
            cells += [
                f"{f['first']:.4f} -> {f['second']:.4f}", f"{f['difference']:+.4f}",
                interval(f["interval"]),
            ]  # fmt: skip
        latents = entry.get("latents")
        alike = (
            f"{latents['cosine']:.2f} (chance {latents['cosine_chance']:.2f})" if latents else "-"
        )
        name = entry["first"] if same else f"{entry['first']} -> {entry['second']}"
        table.add_row(name, *cells, alike)
    console = Console(highlight=False, width=240)
    console.print(table)
    for mean in comparison["means"]:
        for figure in ("fvu", "delta_ce"):
            console.print(
                f"{mean['coders']} and its like, {mean['seeds']} seeds: mean difference of "
                f"{figure} {mean[figure]['difference']:+.4f}, 95 % interval over seeds "
                f"{interval(mean[figure]['interval'])}"
            )
    if not comparison["paired"]:
        console.print("Not on the same contexts, so differences of delta CE have no interval.")
