"""The command `bsc export`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsc.flags import ModelNow, StoreNow, flag

__all__ = ["add_commands"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    coder: Annotated[str, typer.Argument(help="Name of a coder, or a part of it.")],
    out: Annotated[Path, flag("New folder to write into.")],
    format_: Annotated[str, flag("delphi or neuronpedia.", None, "--format")] = "delphi",
    explanations: Annotated[
        Path | None,
        flag("For neuronpedia: RUN/interp/<judge>/latents.jsonl.", default="none"),
    ] = None,
    creator: Annotated[str, flag("For neuronpedia: who publishes it.")] = "bsc",
    store: StoreNow = None,
    model: ModelNow = None,
) -> None:
    """Write a coder's firings as delphi's cache or as Neuronpedia's upload format."""
    from bsc.errors import UserError, nearest
    from bsc.eval.exports.delphi import write_delphi_cache
    from bsc.eval.exports.neuronpedia import write_neuronpedia
    from bsc.eval.interp.config import InterpConfig
    from bsc.eval.interp.material import Materials
    from bsc.train.run import Run

    formats = ("delphi", "neuronpedia")
    if format_ not in formats:
        raise UserError(
            f"--format {format_}: should be {' or '.join(formats)}{nearest(format_, formats)}."
        )
    materials = Materials(Run.open(run), InterpConfig(coders=(coder,)), store=store, model=model)
    material = materials.of(materials.names[0])
    if format_ == "delphi":
        written = write_delphi_cache(materials, material, out)
    else:
        written = write_neuronpedia(
            materials, material, out, creator=creator, explanations=explanations
        )
    typer.echo(str(written))


def add_commands(app: typer.Typer) -> None:
    """Put the command into the command line."""
    app.command(epilog="Example: bsc export runs/run binary-k32 --format neuronpedia --out upload")(
        export
    )
