"""The command `bsc`: puts the commands of the stages together and reports users' mistakes.

Importing this module imports neither torch nor zarr: `bsc --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import bsc.cache.cli
import bsc.demo.cli
import bsc.eval.cli
import bsc.eval.interp.cli
import bsc.train.cli
from bsc.errors import UserError

__all__ = ["app", "main"]

app = typer.Typer(
    name="bsc",
    help="Cache a language model's activations once, train many sparse coders on them, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("bsc"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a mistake; works anywhere.")
    ] = False,
) -> None:
    """Cache a language model's activations once, train many sparse coders on them, measure."""


def info(
    path: Annotated[str, typer.Argument(help="Folder of a store or a run, or s3://bucket/path.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a store or a run is."""
    from bsc.describe import describe, render
    from bsc.files import canonical_json

    facts = describe(path)
    typer.echo(canonical_json(facts) if as_json else render(facts), nl=not as_json)


bsc.demo.cli.add_commands(app)
bsc.cache.cli.add_commands(app)
bsc.train.cli.add_commands(app)
bsc.eval.cli.add_commands(app)
bsc.eval.interp.cli.add_commands(app)
app.command()(info)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the entry point of `bsc`.

    Exits 0 on success, 1 when a check found something, 2 on a user's mistake, 130 on Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"], prog_name="bsc")
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        words = str(error)
        if debug or not ("allocate memory" in words or "out of memory" in words):
            raise
        typer.echo(
            f"error: not enough memory ({words.splitlines()[0].split('] ')[-1][:200]}). Fewer "
            f"coders or latents at a time, or smaller batches, need less.",
            err=True,
        )
        sys.exit(2)
    except OSError as error:
        if debug or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {where}{error.strerror}. Nothing that was finished is lost.", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
