"""What the flags of all commands have in common. Imports the command line's library alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["AsJson", "Check", "Device", "ModelNow", "StoreNow", "flag"]

MACHINE = "Machine and output"


def flag(help_: str, panel: str | None = None, *names: str, default: str = "", **kind: Any) -> Any:
    """A flag of a command.

    Args:
        help_: a noun phrase and what else there is to know, in sentences.
        panel: heading under which `--help` lists it.
        names: its names on the command line; none: that of the parameter.
        default: what happens without the flag, where its default value does not say so.
        kind: as for `typer.Option`.
    """
    shown = default or True
    return typer.Option(*names, help=help_, rich_help_panel=panel, show_default=shown, **kind)


AsJson = Annotated[bool, flag("Print the result as JSON.", MACHINE, "--json")]
Check = Annotated[
    bool,
    flag(
        "Whether shards are compared with the store's manifest when they are first read.",
        MACHINE,
        "--check/--no-check",
    ),
]
Device = Annotated[
    str | None, flag("cpu, cuda or cuda:1.", MACHINE, default="a GPU where there is one")
]
StoreNow = Annotated[
    str | None, flag("Where the store is now.", MACHINE, default="where it was in training")
]
ModelNow = Annotated[
    str | None, flag("Where the model is now.", MACHINE, default="where it was at the capture")
]
