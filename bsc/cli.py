"""The command `bsc`: puts the commands of the stages together and reports users' mistakes.

Importing this module imports neither torch nor zarr: `bsc --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from typing import Annotated

import typer

import bsc.cache.cli
import bsc.demo.cli
import bsc.eval.cli
import bsc.eval.exports.cli
import bsc.eval.interp.cli
import bsc.finetuning.cli
import bsc.study.cli
import bsc.train.cli
from bsc.errors import UserError
from bsc.flags import AsJson
from bsc.formats import printable

__all__ = ["app", "main"]

app = typer.Typer(
    name="bsc",
    help="Cache a language model's activations once, train many sparse coders on them, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
    as_json: AsJson = False,
) -> None:
    """Say what a store or a run is."""
    from bsc.describe import describe, render
    from bsc.files import canonical_json

    facts = describe(path)
    typer.echo(
        canonical_json(facts) if as_json else printable(render(facts), lines=True), nl=not as_json
    )


bsc.demo.cli.add_commands(app)
bsc.cache.cli.add_commands(app)
bsc.train.cli.add_commands(app)
bsc.finetuning.cli.add_commands(app)
bsc.eval.cli.add_commands(app)
bsc.eval.interp.cli.add_commands(app)
bsc.eval.exports.cli.add_commands(app)
bsc.study.cli.add_commands(app)
app.command(epilog="Example: bsc info acts")(info)


# typer has a copy of click of its own, or click itself: by version.
_UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
_INTERRUPTED = 130
_GOES_ON = {
    "cache": "What is committed is kept; the same command goes on from there.",
    "verify": "Windows that were checked are kept; the same command goes on with the others.",
    "train": "bsc train --resume RUN goes on from the last checkpoint.",
    "finetune": "bsc finetune --resume RUN goes on from the last checkpoint.",
    "eval": "The same command goes on from there.",
    "study": "What was done is kept; the same command goes on from there.",
    "interp": "What was answered is kept; the same command goes on from there.",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the entry point of `bsc`.

    Exits 0 on success, 1 when a check found something, 2 on a user's mistake, 130 on Ctrl-C, 143 on
    SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    ended: list[int] = []

    def terminate(number: int, frame: object) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        code = _run([a for a in arguments if a != "--debug"], debug)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if code == _INTERRUPTED:
        command = next((a for a in arguments if not a.startswith("-")), "")
        tail = f" {_GOES_ON[command]}" if command in _GOES_ON else ""
        how = "stopped by SIGTERM." if ended else "interrupted."
        typer.echo(f"{how}{tail}", err=True)
        code = 128 + signal.SIGTERM if ended else code
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> int:
    """The exit code of a command; users' mistakes are printed."""
    try:
        code = app(arguments, prog_name="bsc", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        # Its type is known as an exception alone, by whichever click typer has.
        words = str(error.format_message()).rstrip(".\n ")  # type: ignore[attr-defined]
        of = "flags" if context and " " in context.command_path else "commands"
        hint = f" `{context.command_path} --help` lists the {of}." if context else ""
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(words, err=True)
        else:
            typer.echo(
                f"error: {printable(words)}{'' if words[-1:] == '?' else '.'}{hint}", err=True
            )
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {printable(str(error))}", err=True)
    except RuntimeError as error:
        words = str(error)
        if debug or not ("allocate memory" in words or "out of memory" in words):
            raise
        typer.echo(
            f"error: not enough memory ({words.splitlines()[0].split('] ')[-1][:200]}). Fewer "
            f"coders or latents at a time, or smaller batches, need less.",
            err=True,
        )
    except OSError as error:
        if debug or error.strerror is None:
            raise
        if error.errno == errno.EPIPE:  # `bsc ... | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for what Python flushes at its end
            return 1
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(
            f"error: {printable(where)}{error.strerror}. Nothing that was finished is lost.",
            err=True,
        )
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 2
