"""Command `bsc study`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsc.flags import AsJson, flag
from bsc.options import MACHINE, STEERING

__all__ = ["add_commands"]


def study(
    file: Annotated[Path, typer.Argument(help="TOML file of the study.")],
    scale: Annotated[
        str | None, flag("Scale of the study.", default="the first that the file has")
    ] = None,
    out: Annotated[
        Path | None, flag("Folder of the study.", default="named after the file and the scale")
    ] = None,
    only: Annotated[
        list[str] | None,
        flag(
            "Step to do or claim to decide, with what it needs; several times.",
            STEERING,
            default="all",
        ),
    ] = None,
    plan: Annotated[
        bool,
        flag("Only say what it comes to: steps, hours, bytes, price of a judge.", STEERING),
    ] = False,
    launch: Annotated[
        str | None,
        flag(
            "Words before bsc in captures and trainings: 'torchrun --standalone "
            "--nproc-per-node 8 --no-python'.",
            MACHINE,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        flag("Folder for the plots as SVG and PDF and the estimates as CSV.", STEERING),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a study: its captures, trainings and measurements, to a page of verdicts.

    What was done is kept: the same command goes on where it was. Several of them, on several
    machines that share the folder, divide the steps.
    """
    import shlex

    from rich.console import Console

    from bsc.errors import ConfigError, UserError
    from bsc.files import canonical_json
    from bsc.study.amounts import reckon
    from bsc.study.check import check_claims
    from bsc.study.plan import plan_study
    from bsc.study.study import decided, open_study, write_result
    from bsc.study.table import steps_table, verdicts_table, watched
    from bsc.study.work import work

    if plan and figures is not None:
        raise UserError("--plan and --figures exclude each other: a plan has no figures.")
    opened = open_study(file, scale, out, only or ())
    reckoned = None
    try:
        reckoned = reckon(opened)
    except ConfigError:
        raise
    except UserError:  # without a network the config of a model on the hub; what is there may run
        if plan:
            raise
    expected: dict[str, float] = {}
    if reckoned is not None:
        check_claims(opened, reckoned.coders)
        planned = plan_study(opened, reckoned)
        if plan:
            planned.show(as_json=as_json)
            return
        expected = planned.seconds
    with watched(opened.wanted, expected) as watch:
        states = work(opened.folder, opened.wanted, shlex.split(launch or ""), watch)
    result = decided(opened, states)
    written = write_result(opened, result)
    if as_json:
        typer.echo(canonical_json(result.to_json()), nl=False)
    else:
        console = Console(highlight=False, width=160)
        console.print(steps_table(opened.wanted, states, expected))
        if result.claims:
            console.print()
            console.print(verdicts_table(result))
        typer.echo(str(written[-1]))
    if figures is not None:
        from bsc.study.export import write_figures

        write_figures(result, figures)
    if any(state.kind in ("failed", "blocked") for state in states.values()):
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Put the command into the command line."""
    app.command(epilog="Example: bsc study studies/binary.toml --scale demo --plan")(study)
