"""The commands `bsc export` and `bsc import`. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsc.flags import ModelNow, StoreNow, flag

__all__ = ["add_commands"]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    coders: Annotated[
        list[str], typer.Argument(help="Coders, by name, a part of one, or a pattern with *.")
    ],
    out: Annotated[Path, flag("New folder to write into.")],
    format_: Annotated[
        str,
        flag(
            "sparsify, sparsify-binary, saelens, dictionary-learning, circuit-tracer: the coders "
            "themselves. delphi, neuronpedia: what one coder does on the store, after `bsc eval`.",
            None,
            "--format",
        ),
    ],
    unit_rows: Annotated[
        bool, flag("Decoder rows of length 1, where all have one length; codes get it instead.")
    ] = False,
    explanations: Annotated[
        Path | None,
        flag("For neuronpedia: RUN/interp/<judge>/latents.jsonl.", default="none"),
    ] = None,
    creator: Annotated[str, flag("For neuronpedia: who publishes it.")] = "bsc",
    store: StoreNow = None,
    model: ModelNow = None,
) -> None:
    """Write coders, or what they do, in the formats of other tools.

    A coder that a format cannot hold exactly is refused. What is written is read back by the other
    tool's formula on rows of the store, and kept if it computes the same.
    """
    from bsc.errors import UserError, nearest
    from bsc.eval.exports.export import WEIGHT_FORMATS, chosen_coders, export_coders
    from bsc.train.run import Run

    formats = (*WEIGHT_FORMATS, "delphi", "neuronpedia")
    if format_ not in formats:
        raise UserError(
            f"--format {format_}: should be one of {', '.join(formats)}{nearest(format_, formats)}."
        )
    opened = Run.open(run)
    if format_ in WEIGHT_FORMATS:
        written = export_coders(opened, coders, format_, out, store=store, unit=unit_rows)
        for one in written["coders"].values():
            typer.echo(str(out / one["place"]))
        return
    names = chosen_coders(opened, coders)
    if len(names) > 1 or unit_rows:
        raise UserError(
            f"--format {format_} writes what one coder does, as it is: name one, without "
            f"--unit-rows. {len(names)} fit: {', '.join(names)}."
        )
    _write_firings(opened, names[0], out, format_, explanations, creator, store, model)


def _write_firings(
    run: object, name: str, out: Path, format_: str, explanations: Path | None, creator: str,
    store: str | None, model: str | None,
) -> None:  # fmt: skip
    from bsc.eval.exports.delphi import write_delphi_cache
    from bsc.eval.exports.neuronpedia import write_neuronpedia
    from bsc.eval.interp.config import InterpConfig
    from bsc.eval.interp.material import Materials
    from bsc.train.run import Run

    assert isinstance(run, Run)
    materials = Materials(run, InterpConfig(coders=(name,)), store=store, model=model)
    material = materials.of(materials.names[0])
    if format_ == "delphi":
        written = write_delphi_cache(materials, material, out)
    else:
        written = write_neuronpedia(
            materials, material, out, creator=creator, explanations=explanations
        )
    typer.echo(str(written))


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of coders, or with such folders in them; or hub://owner/name, with "
            "@revision and /path where need be."
        ),
    ],
    store: Annotated[str, flag("Store of the model that they are of.")],
    format_: Annotated[
        str,
        flag(
            "sparsify, saelens, dictionary-learning, circuit-tracer; auto: seen from the files.",
            None,
            "--format",
        ),
    ] = "auto",
    hookpoint: Annotated[
        str | None,
        flag(
            "Where all of them belong.",
            default="what a coder says, or the only hookpoint of the store",
        ),
    ] = None,
    name: Annotated[str, flag("Name of the run.")] = "imported",
    runs: Annotated[Path, flag("Folder of runs.")] = Path("runs"),
    same_model: Annotated[
        bool, flag("Takes coders that call the store's model by another name.")
    ] = False,
) -> None:
    """Make a run of coders that other tools trained, to be measured like any other.

    Every coder is checked on rows of the store against the other tool's formula.
    """
    from bsc.eval.exports.importing import import_coders

    run = import_coders(
        sources, store, format_=format_, hookpoint=hookpoint, name=name, runs=runs,
        same_model=same_model,
    )  # fmt: skip
    for coder in run.coder_names():
        typer.echo(coder)
    typer.echo(str(run.folder))


def add_commands(app: typer.Typer) -> None:
    """Put the commands into the command line."""
    app.command(
        "import", epilog="Example: bsc import their/layers.3.mlp --store acts --name theirs"
    )(import_)
    app.command(epilog="Example: bsc export runs/run '*-k32' --format sparsify --out sparsify")(
        export
    )
