"""Command of stage 2: `bsc train`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bsc.flags import AsJson, command, flag
from bsc.options import CODERS, MACHINE, STEERING

if TYPE_CHECKING:
    from bsc.train.loop import CoderSummary
    from bsc.train.run import Run

__all__ = ["add_commands"]


def _field(text: str) -> dict[str, Any]:
    """A field of a coders table as TOML: ``anneal = 0.2`` or ``temperature = [1.0, 2.0]``."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        name, given, value = text.partition("=")
        try:
            if not given:
                raise tomllib.TOMLDecodeError
            return tomllib.loads(f"{name} = '''{value.strip()}'''")
        except tomllib.TOMLDecodeError:
            raise ValueError(f"FIELD=VALUE, got {text!r}") from None


def train(
    values: dict[str, Any],
    coders: dict[str, Any],
    sweep: Annotated[
        Path | None, typer.Argument(help="TOML file of a sweep; flags go before what it says.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        flag(
            "Any other field of a coders table: --set clip_norm=1.",
            CODERS,
            "--set",
            parser=_field,
            metavar="FIELD=VALUE",
        ),
    ] = None,
    plan: Annotated[
        bool, flag("Only say what it comes to: memory, rows, hours.", STEERING, "--plan")
    ] = False,
    resume: Annotated[
        Path | None,
        flag("Run to go on with; --tokens may be more than it had.", STEERING),
    ] = None,
    continue_: Annotated[
        bool,
        flag(
            "Go on with the run if it has begun: for jobs that are started again.",
            STEERING,
            "--continue",
        ),
    ] = False,
    add_coders: Annotated[
        bool, flag("With --resume: train these coders too.", STEERING, "--add-coders")
    ] = False,
    rank: Annotated[
        int | None,
        flag("Number of this process.", MACHINE, default="torchrun's, or 0", min=0),
    ] = None,
    world: Annotated[
        int | None,
        flag("Processes that share the coders.", MACHINE, default="torchrun's, or 1", min=1),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train many coders at once on a store: every combination of the values given is one coder.

    A run that was stopped goes on with --resume RUN.
    """
    from bsc.config import parse_config
    from bsc.devices import rank_and_world
    from bsc.errors import UserError
    from bsc.files import canonical_json
    from bsc.train.config import TrainConfig
    from bsc.train.job import make_job
    from bsc.train.plan import plan_sweep
    from bsc.train.ranks import has_begun, leaders
    from bsc.train.resume import resume as resume_run
    from bsc.train.run import Run
    from bsc.train.trainer import train_sweep

    where = str(sweep) if sweep else "bsc train"
    tables = {name: list(given) for name, given in coders.items()}
    table: Any  # the parser has made one of the text
    for table in set_ or ():
        for field, value in table.items():
            added = value if isinstance(value, list) else [value]
            tables[field] = [*tables.get(field, []), *added]
    if resume is not None and continue_:
        raise UserError("--continue names a run by --name, --resume by its folder: give one.")
    whole = _sweep(sweep, values, tables, where, new=resume is None)
    at, of = rank_and_world(rank, world)
    if at >= of:
        raise UserError(f"--rank {at}: ranks of {of} processes go from 0 to {of - 1}.")
    if resume is None and add_coders:
        raise UserError("--add-coders belongs to --resume RUN.")
    if resume is not None and plan:
        raise UserError("--plan is for a new sweep; leave --resume out.")
    if resume is not None:
        done = resume_run(resume, whole, where=where, add_coders=add_coders, rank=at, world=of)
    else:
        config = parse_config(TrainConfig, whole, where)
        if plan:
            made = plan_sweep(make_job(config, where, rank=at, world=of))
            typer.echo(canonical_json(made.to_json()) if as_json else "\n".join(made.lines()))
            return
        begun = has_begun(Run(config.folder), at, of) if continue_ else False
        if begun:
            done = resume_run(config.folder, whole, where=where, rank=at, world=of, ended=True)
        else:
            done = train_sweep(config, where, rank=at, world=of)
    if at in leaders(done[0], of):  # the others of a team have nothing to say that it does not
        _say(*done, as_json=as_json)


def _sweep(
    file: Path | None, values: dict[str, Any], given: dict[str, list[Any]], where: str, *, new: bool
) -> dict[str, Any]:
    """Fields of a `TrainConfig` from a file and flags, which go before it.

    Args:
        file: of a sweep.
        values: fields that flags give.
        given: fields of every coders table that flags give.
        where: what the fields come from, for messages.
        new: whether this is no run to go on with, which has a name and coders already.
    """
    from bsc.config import parse_config, read_toml
    from bsc.errors import ConfigError
    from bsc.train.config import TrainConfig

    whole = read_toml(file) if file else {}
    if file and not whole:
        raise ConfigError(f"{file}: the file is empty. The README shows a sweep.")
    if file and new:
        whole.setdefault("name", file.stem)
    whole |= values
    if new or given:
        whole.setdefault("coders", [{"code": ["binary", "continuous"]}])
    if "coders" in whole:
        # Checked as a whole before tables are looked into.
        tables = parse_config(TrainConfig, {"coders": whole["coders"]}, where).coders
        whole["coders"] = tuple(t | given for t in tables)
    return whole


def _say(run: Run, summaries: list[CoderSummary], *, as_json: bool) -> None:
    """Print what came of a training; exit 1 if every coder turned non-finite."""
    from bsc.files import canonical_json
    from bsc.train.summary_table import summary_table

    if as_json:
        result = {"run": str(run.folder), "coders": [s._asdict() for s in summaries]}
        typer.echo(canonical_json(result), nl=False)
    else:
        if summaries:
            summary_table(summaries)
        typer.echo(str(run.folder))
    if summaries and all(s.frozen_at is not None for s in summaries):
        typer.echo(
            "every coder turned non-finite, so there is nothing to evaluate. A smaller --lr keeps "
            "them finite; so does the default.",
            err=True,
        )
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    command(
        app,
        {
            "values": "bsc.train.config:TrainConfig",
            "coders": "bsc.train.config:SweepPoint",
        },
        grids=("coders",),
        epilog="Example: bsc train --store acts --code binary --code continuous --k 16 --k 32",
    )(train)
