"""The command `bsc interp`. It parses, calls and prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bsc.flags import AsJson, ModelNow, StoreNow, command, flag

if TYPE_CHECKING:
    from bsc.eval.interp.config import InterpConfig, JudgeConfig, Prices

__all__ = ["add_commands"]


def interp(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    by: JudgeConfig,
    config: InterpConfig,
    prices: Prices,
    export: Annotated[
        Path | None, flag("JSONL file to write the requests to.", "The judge")
    ] = None,
    import_: Annotated[
        Path | None, flag("JSONL file to read the replies from.", "The judge", "--import")
    ] = None,
    name: Annotated[
        str | None,
        flag("Folder of the results in RUN/interp.", "The judge", default="the judge's name"),
    ] = None,
    dry_run: Annotated[
        bool, flag("Build every prompt, say what it costs, ask nothing.", "Cost", "--dry-run")
    ] = False,
    store: StoreNow = None,
    model: ModelNow = None,
    as_json: AsJson = False,
) -> None:
    """Score how well latents can be explained: by a judge, and without a language model.

    What was answered is kept in RUN/interp/ledger.jsonl; nothing is asked twice.
    """
    from bsc.eval.interp.interp import cost_of, export_requests, import_replies, interpret
    from bsc.eval.interp.judges.connection import is_endpoint
    from bsc.eval.interp.judges.judge import NamedJudge, open_judge
    from bsc.eval.interp.material import Materials
    from bsc.eval.interp.offline import offline_scores
    from bsc.eval.interp.scores_table import cost_table, interp_table, offline_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    files = {"--export": export, "--import": import_}
    asked_for_nothing = {"--name": name, "--budget": prices.budget}
    _check(by, config, [n for n, path in files.items() if path], dry_run, asked_for_nothing)
    if by.judge is not None and not is_endpoint(by.judge):
        config = config.but(items=1)  # answers of a local model are read off after the same prompt
    materials = Materials(Run.open(run), config, store=store, model=model)
    judge = NamedJudge(by.judge_model or "any judge") if by.judge is None else open_judge(by)
    if dry_run:
        cost_table(cost_of(materials, judge), prices, as_json=as_json)
        return
    if export is not None:
        n, more = export_requests(materials, judge.model, export)
        typer.echo(f"{export}: {n} requests{'; tests follow when they are answered' * more}")
        return
    offline = offline_scores(materials)
    judged = None
    if import_ is not None:
        judged = import_replies(materials, judge.model, import_, name=name)
    elif by.judge is not None:
        judged = interpret(materials, judge, prices, name=name)
    if as_json:
        result = {"offline": offline.to_json(), "judge": judged and judged.to_json()}
        typer.echo(canonical_json(result), nl=False)
        return
    offline_table(offline)
    if judged:
        interp_table(judged)


def _check(
    by: JudgeConfig,
    config: InterpConfig,
    files: list[str],
    dry_run: bool,
    for_a_judge: Mapping[str, object],
) -> None:
    """See that flags go together.

    Raises:
        UserError: they do not.
    """
    from bsc.errors import UserError

    if len(files) + (by.judge is not None) > 1:
        raise UserError(
            f"{' and '.join(files)}{' and --judge' if by.judge else ''}: give one of them."
        )
    if dry_run and files:
        raise UserError(f"--dry-run and {files[0]}: give one of them.")
    if by.judge is None and not files and not dry_run:
        given = {"--judge-model": by.judge_model, **for_a_judge}
        if config.explanations != "own":
            given["--explanations"] = config.explanations
        if named := [flag for flag, value in given.items() if value is not None]:
            raise UserError(f"{named[0]}: there is no judge; name one with --judge.")
    if files and not by.judge_model:
        raise UserError(f"{files[0]}: name the judge with --judge-model; its answers go by it.")


def add_commands(app: typer.Typer) -> None:
    """Put the command into the command line."""
    kinds = {"by": "JudgeConfig", "config": "InterpConfig", "prices": "Prices"}
    command(
        app,
        {name: f"bsc.eval.interp.config:{kind}" for name, kind in kinds.items()},
        epilog="Example: bsc interp runs/run --judge http://localhost:8000/v1 --coders '*k32*'",
    )(interp)
