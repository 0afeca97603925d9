"""Command `bsc finetune`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bsc.flags import AsJson, Check, ModelNow, StoreNow, command, flag
from bsc.options import STEERING

if TYPE_CHECKING:
    from bsc.finetuning.finetune import FinetuneSummary
    from bsc.train.run import Run

__all__ = ["add_commands"]


def finetune(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run; with --resume that of the run to go on with.")
    ],
    values: dict[str, Any],
    plan: Annotated[
        bool, flag("Only say what it comes to: memory, tokens, hours.", STEERING, "--plan")
    ] = False,
    resume: Annotated[
        bool, flag("Go on with RUN, which bsc finetune began.", STEERING, "--resume")
    ] = False,
    store: StoreNow = None,
    model: ModelNow = None,
    check: Check = True,
    as_json: AsJson = False,
) -> None:
    """Train the coders of a run further, on the loss of the model that they are spliced into.

    Reads the training documents of the store's own text again, never a held-out one, and makes a
    new run. `bsc eval` measures it and `bsc compare RUN NEW` shows what changed.
    """
    from bsc.config import parse_config
    from bsc.devices import rank_and_world
    from bsc.errors import UserError
    from bsc.files import canonical_json
    from bsc.finetuning.config import FinetuneConfig
    from bsc.finetuning.finetune import finetune as finetune_run
    from bsc.finetuning.finetune import resume_finetune
    from bsc.finetuning.job import make_job
    from bsc.finetuning.plan import plan_finetune
    from bsc.train.run import Run

    if rank_and_world(None, None)[1] > 1:
        raise UserError(
            "bsc finetune is one process. Several share the work as runs of their own, each with "
            "some of the coders (--coders) and a --name."
        )
    if resume:
        if plan:
            raise UserError("--plan is for a new run; leave --resume out.")
        done = resume_finetune(run, values, store=store, model=model, check=check)
        _say(*done, as_json=as_json)
        return
    opened, config = Run.open(run), parse_config(FinetuneConfig, values, "bsc finetune")
    if plan:
        made = plan_finetune(make_job(opened, config, store=store, model=model, check=check))
        typer.echo(canonical_json(made.to_json()) if as_json else "\n".join(made.lines()))
        return
    done = finetune_run(opened, config, store=store, model=model, check=check)
    _say(*done, as_json=as_json)


def _say(run: Run, summaries: list[FinetuneSummary], *, as_json: bool) -> None:
    """Print what came of it; exit 1 if every coder turned non-finite."""
    from bsc.files import canonical_json
    from bsc.finetuning.summary_table import summary_table

    if as_json:
        result = {"run": str(run.folder), "coders": [s._asdict() for s in summaries]}
        typer.echo(canonical_json(result), nl=False)
    else:
        summary_table(summaries)
        typer.echo(str(run.folder))
    if all(s.frozen_at is not None for s in summaries):
        typer.echo(
            "every coder turned non-finite, so there is nothing to evaluate. A smaller --lr keeps "
            "them finite.",
            err=True,
        )
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Put finetuning into the command line."""
    command(
        app,
        {"values": "bsc.finetuning.config:FinetuneConfig"},
        epilog="Example: bsc finetune runs/run --tokens 10M --coders '*k32*'",
    )(finetune)
