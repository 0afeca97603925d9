"""Commands of stage 3: `bsc eval` and `bsc report`. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsc.counts import parse_count

__all__ = ["add_commands"]


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    store: Annotated[
        Path | None, typer.Option(help="Where the store is now.  [default: as in training]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now.  [default: as at the capture]")
    ] = None,
    ce_tokens: Annotated[
        int, typer.Option(help="Held-out tokens for the model's loss.", parser=parse_count)
    ] = 100_000,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: a GPU if any]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure every coder of a run on held-out documents and write RUN/eval.json."""
    from bsc.eval.evaluate import evaluate as evaluate_run
    from bsc.eval.table import figures_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    result = evaluate_run(
        Run.open(run), store=store, model=model, ce_tokens=ce_tokens, device=device
    )
    if as_json:
        typer.echo(canonical_json(result), nl=False)
    else:
        figures_table(result)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that were evaluated.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write.  [default: RUN/report.html of the first]")
    ] = None,
) -> None:
    """Write one static HTML page about one or several runs."""
    from bsc.eval.report.report import write_report
    from bsc.train.run import Run

    typer.echo(str(write_report([Run.open(r) for r in runs], out)))


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command("eval")(evaluate)
    app.command()(report)
