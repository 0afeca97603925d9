"""The commands `bsc export`, `import`, `push` and `pull`. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bsc.flags import ModelNow, StoreNow, flag
from bsc.progress import console

if TYPE_CHECKING:
    from bsc.eval.exports.push import Upload

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
    creator: Annotated[str, flag("For neuronpedia: user there who publishes it.")] = "bsc",
    hub: Annotated[
        str | None,
        flag("For neuronpedia: owner/name where `bsc push` put the run.", default="no links"),
    ] = None,
    store: StoreNow = None,
    model: ModelNow = None,
) -> None:
    """Write coders, or what they do, in the formats of other tools.

    A coder that a format cannot hold exactly is refused. What is written is read back by the other
    tool's formula on rows of the store, and kept if it computes the same.
    """
    from bsc.errors import UserError, nearest
    from bsc.eval.exports.export import WEIGHT_FORMATS, export_coders
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
    names = opened.names_of(coders)
    if len(names) > 1 or unit_rows:
        raise UserError(
            f"--format {format_} writes what one coder does, as it is: name one, without "
            f"--unit-rows. {len(names)} fit: {', '.join(names)}."
        )
    _write_firings(opened, names[0], out, format_, explanations, creator, hub, store, model)


def _write_firings(
    run: object, name: str, out: Path, format_: str, explanations: Path | None, creator: str,
    hub: str | None, store: str | None, model: str | None,
) -> None:  # fmt: skip
    from bsc.eval.exports.delphi import write_delphi_cache
    from bsc.eval.exports.neuronpedia import write_neuronpedia
    from bsc.eval.interp.config import InterpConfig
    from bsc.eval.interp.material import Materials
    from bsc.hub import parse_address
    from bsc.train.run import Run

    assert isinstance(run, Run)
    materials = Materials(run, InterpConfig(coders=(name,)), store=store, model=model)
    material = materials.of(materials.names[0])
    if format_ == "delphi":
        written = write_delphi_cache(materials, material, out)
    else:
        written = write_neuronpedia(
            materials, material, out, creator=creator, explanations=explanations,
            repository=parse_address(hub).repo if hub else None, model=model,
        )  # fmt: skip
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
    without_special_tokens: Annotated[
        bool, flag("Leave out rows of special tokens, BOS included, where the run is measured.")
    ] = False,
    without_tokens: Annotated[
        list[int] | None,
        flag(
            "Ids of further tokens whose rows are left out; several times.",
            default="what the coders say",
        ),
    ] = None,
    all_tokens: Annotated[
        bool, flag("Measure the rows of every token, whatever the coders say.")
    ] = False,
) -> None:
    """Make a run of coders that other tools trained, to be measured like any other.

    Every coder is checked on rows of the store against the other tool's formula.
    """
    from bsc.errors import UserError
    from bsc.eval.exports.importing import import_coders

    if all_tokens and (without_special_tokens or without_tokens):
        raise UserError("--all-tokens and tokens to leave out exclude each other.")
    run = import_coders(
        sources, store, format_=format_, hookpoint=hookpoint, name=name, runs=runs,
        same_model=same_model, without_special_tokens=without_special_tokens,
        without_tokens=() if all_tokens else without_tokens,
    )  # fmt: skip
    if left_out := run.config().without_tokens:
        console.print(f"rows of the tokens {', '.join(map(str, left_out))} are left out")
    for coder in run.coder_names():
        typer.echo(coder)
    typer.echo(str(run.folder))


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hugging Face hub: a new one, or pushed before.")
    ],
    license_: Annotated[
        str | None,
        flag(
            "Licence of the weights, as the hub spells it: apache-2.0, mit, cc-by-4.0, other.",
            None,
            "--license",
            default="asked for",
        ),
    ] = None,
    coders: Annotated[
        list[str] | None,
        flag("Names, parts of names or patterns; several times.", default="all"),
    ] = None,
    also: Annotated[
        str | None,
        flag(
            "Formats of other tools, with commas: sparsify, sparsify-binary, saelens, "
            "dictionary-learning, circuit-tracer.",
            default="none",
        ),
    ] = None,
    layout: Annotated[
        str, flag("run, or sparsify: a folder for each hookpoint, as its load_many takes it.")
    ] = "run",
    private: Annotated[bool, flag("Make a private repository.")] = False,
    examples: Annotated[
        bool, flag("Publish the report's contexts too, which are text of the corpus.")
    ] = False,
    card: Annotated[
        str | None,
        flag("keep or replace a README.md that somebody wrote or edited.", default="refused"),
    ] = None,
    yes: Annotated[bool, flag("Upload without asking.", None, "--yes", "-y")] = False,
    dry_run: Annotated[bool, flag("Print the card and the files, and stop.")] = False,
    store: StoreNow = None,
) -> None:
    """Upload a run to the Hugging Face hub, with a model card.

    The list of files is shown first. Places on this machine are taken out of the records; text of
    the corpus, checkpoints and codes stay here.
    """
    import sys

    from bsc.errors import UserError
    from bsc.eval.exports.push import push_run
    from bsc.progress import format_bytes
    from bsc.train.run import Run

    asked = sys.stdin.isatty() and not yes
    if license_ is None and not (asked or dry_run):
        raise UserError(
            "--license: say under which licence the weights are published, as the hub spells it "
            "(apache-2.0, mit, cc-by-4.0, other, ...); it is not guessed."
        )
    if not (asked or yes or dry_run):
        raise UserError("--yes uploads without asking; --dry-run says what it would be.")
    opened = Run.open(run)
    if license_ is None:
        license_ = "other" if dry_run else typer.prompt("Licence of the weights").strip()

    def confirm(upload: Upload) -> bool:
        _show(upload)
        if dry_run:
            typer.echo(f"\n{upload.card}", nl=False)
            return False
        size = format_bytes(upload.bytes)
        return yes or typer.confirm(f"Upload {len(upload.files)} files, {size}?")

    commit = push_run(
        opened, repository, licence=license_, confirm=confirm, coders=coders or ["*"],
        also=[one.strip() for one in (also or "").split(",") if one.strip()],
        layout=layout, private=private, examples=examples, card=card, store=store,
    )  # fmt: skip
    if commit:
        typer.echo(f"hub://{repository.removeprefix('hub://')}@{commit}")


_LISTED = 60
"""Files that are listed one by one; of more, folders are."""


def _show(upload: Upload) -> None:
    """The list of what would be uploaded, on stderr."""
    from bsc.formats import printable
    from bsc.progress import format_bytes

    state = (
        f"{'new' if upload.new else 'there already'}, {'private' if upload.private else 'public'}"
    )
    typer.echo(f"{upload.repo} ({state}):", err=True)
    sizes: dict[str, list[int]] = {}
    for name, path in upload.files.items():
        folder = name.rpartition("/")[0]
        shown = f"{folder}/" if folder and len(upload.files) > _LISTED else name
        sizes.setdefault(shown, []).append(path.stat().st_size)
    for name, each in sizes.items():
        many = f"  ({len(each)} files)" if len(each) > 1 else ""
        typer.echo(f"  {format_bytes(sum(each)):>9}  {printable(name)}{many}", err=True)
    for name in upload.replaced:
        typer.echo(f"  {'replaced':>9}  {printable(name)}", err=True)
    for name in upload.removed:
        typer.echo(f"  {'removed':>9}  {printable(name)}", err=True)
    typer.echo(f"  {format_bytes(upload.bytes):>9}  in {len(upload.files)} files", err=True)
    for warning in upload.warnings:
        typer.echo(f"note: {printable(warning)}", err=True)


def pull(
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hugging Face hub, with @revision if need be.")
    ],
    out: Annotated[
        Path | None, flag("New folder of the run.", default="runs/ and the repository's name")
    ] = None,
) -> None:
    """Download a run that `bsc push` uploaded, checked file by file.

    Goes on where it was when it is stopped and started again.
    """
    from bsc.eval.exports.pull import pull_run

    run = pull_run(repository, out)
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
    app.command(
        epilog="Example: bsc push runs/run owner/name --license apache-2.0 --also sparsify"
    )(push)
    app.command(epilog="Example: bsc pull owner/name@main --out runs/theirs")(pull)
