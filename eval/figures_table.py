"""The table of figures that `bsc eval` and `bsc demo` print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bsc.eval.compare import Comparison, Difference
from bsc.eval.evaluation import Evaluation
from bsc.eval.finetuned import PROBE, Changed, Closed
from bsc.formats import interval, percent, percent_interval

__all__ = ["changes_table", "comparison_table", "figures_table"]


def figures_table(evaluation: Evaluation, title: str | None = None) -> None:
    """Print FVU, L0, firing and loss of every coder on stdout."""
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("coder", no_wrap=True)
    columns = ("FVU", "L0", "bits", "dead", ">1 %", ">10 %", ">50 %", "delta CE", "95 % interval")
    for name in columns:
        table.add_column(name, justify="right")
    for name, f in evaluation.coders.items():
        table.add_row(
            name,
            f"{f.fvu:.4f}",
            f"{f.l0:.1f}",
            f"{f.bits:.0f}",
            percent(f.dead / f.latents, 1),
            *(str(f.latents_above[t]) for t in ("0.01", "0.1", "0.5")),
            f"{f.delta_ce:.4f}",
            interval(f.delta_ce_interval),
        )
    # Wide enough for every name, also where stdout is no terminal.
    Console(highlight=False, width=200).print(table)


def comparison_table(comparison: Comparison) -> None:
    """Print the differences between the coders of two runs on stdout."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("coder", no_wrap=True)
    for name in (
        "FVU",
        "difference",
        "95 % interval",
        "delta CE",
        "difference",
        "95 % interval",
        "latents alike",
    ):
        table.add_column(name, justify="right")
    for one in comparison.coders:
        cells = []
        for figure in (one.fvu, one.delta_ce):
            cells += [
                f"{figure.first:.4f} -> {figure.second:.4f}",
                f"{figure.difference:+.4f}",
                interval(figure.interval),
            ]
        alike = "-"
        if latents := one.latents:
            alike = f"{latents.cosine:.2f} (chance {latents.cosine_chance:.2f})"
        same = one.first == one.second
        table.add_row(one.first if same else f"{one.first} -> {one.second}", *cells, alike)
    console = Console(highlight=False, width=240)
    console.print(table)
    for mean in comparison.means:
        for name, over_seeds in (("fvu", mean.fvu), ("delta_ce", mean.delta_ce)):
            console.print(
                f"{mean.coders} and its like, {mean.seeds} seeds: mean difference of "
                f"{name} {over_seeds.difference:+.4f}, 95 % interval over seeds "
                f"{interval(over_seeds.interval)}"
            )
    if not comparison.same_rows:
        console.print(
            "Not on the same rows (another store, --rows, or tokens that one run was trained "
            "without), so differences are not of the coders alone."
        )
    if not comparison.paired:
        console.print("Not on the same contexts, so differences of delta CE have no interval.")


def changes_table(changed: Changed) -> None:
    """Print what finetuning changed on stdout."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("finetuned", no_wrap=True)
    for name in (
        "delta CE closed", "95 % interval", "KL closed", "95 % interval", "L0", "> 10 %",
        "predictability", "probe, 1 latent", "encoder cosine", "decoder cosine", "Jaccard",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for one in changed.coders:
        first = next((p.accuracy for p in one.probes if (p.arm, p.columns) == PROBE), None)
        moved = one.moved
        table.add_row(
            one.coder,
            *_closed(one.delta_ce_closed),
            *_closed(one.kl_closed),
            _both(one.l0, ".1f"),
            _both(one.ultra, "d"),
            _both(one.predictability, ".3f"),
            _both(first, ".3f"),
            *(f"{q[1]:.3f}" if q else "-"
              for q in (moved.encoder_cosine, moved.decoder_cosine, moved.jaccard)),
        )  # fmt: skip
    Console(highlight=False, width=240).print(table)


def _closed(closed: Closed | None) -> tuple[str, str]:
    if closed is None:
        return "-", "-"
    return percent(closed.share), percent_interval(closed.interval, 0)


def _both(figure: Difference | None, form: str) -> str:
    if figure is None:
        return "-"
    return f"{figure.first:{form}} -> {figure.second:{form}}"
