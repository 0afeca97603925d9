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
        flag("Name of a step to do, with what it needs; several times.", STEERING, default="all"),
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
    as_json: AsJson = False,
) -> None:
    """Run a study: its captures, trainings and measurements, to a page of verdicts.

    What was done is kept: the same command goes on where it was. Several of them, on several
    machines that share the folder, divide the steps.
    """
    import shlex

    from bsc.study.study import open_study, run_study

    opened = open_study(file, scale, out, only or ())
    if plan:
        from bsc.study.plan import plan_study

        made = plan_study(opened)
        made.show(as_json=as_json)
        return
    run_study(opened, shlex.split(launch or ""), as_json=as_json)


def add_commands(app: typer.Typer) -> None:
    """Put the command into the command line."""
    app.command(epilog="Example: bsc study studies/binary.toml --scale demo --plan")(study)
