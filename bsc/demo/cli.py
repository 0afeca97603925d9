"""Command `bsc demo`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_commands"]


def demo(
    out: Annotated[Path, typer.Option(help="New folder for what the demo makes.")] = Path(
        "bsc-demo"
    ),
) -> None:
    """Run the whole chain on the embedded model and text: offline, a few minutes on two cores."""
    from bsc.demo.chain import run_demo
    from bsc.eval.figures_table import figures_table

    result = run_demo(out)
    figures_table(result.evaluation, "Held-out figures")
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    typer.echo(f"\n{times}; {sum(result.seconds.values()):.0f} s in all")
    typer.echo(f"report: {result.report}")
    typer.echo(f"latents: {result.browser}")


def add_commands(app: typer.Typer) -> None:
    """Put the demo into the command line."""
    app.command()(demo)
