"""Commands of stage 1: `bsc cache`, `bsc plan`, `bsc verify`, `bsc shuffle-check`.

They parse, call and print.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bsc.counts import parse_count
from bsc.flags import MACHINE, AsJson, Device, flag

if TYPE_CHECKING:
    from bsc.cache.capture.capture import CaptureConfig

__all__ = ["add_commands"]

_MODEL, _TEXT, _ROWS, _STORE = "Model", "Text", "What is captured", "How it is stored"

Model = Annotated[
    str, flag("'demo', a short name (SmolLM2-135M), a folder, or a hub id (owner/name).", _MODEL)
]
Revision = Annotated[str | None, flag("Revision of the model on the hub.", _MODEL)]
Dtype = Annotated[
    str, flag("Type of the model's arithmetic: auto, float32, bfloat16 or float16.", _MODEL)
]
RandomWeights = Annotated[
    int | None, flag("Seed of untrained weights instead of the model's: a control.", _MODEL)
]
Text = Annotated[
    list[str] | None,
    flag(
        "'stdlib', 'env', or files and folders (txt, jsonl, parquet, arrow); may be given several "
        "times.",
        _TEXT,
        default="what goes with the model",
    ),
]
Dataset = Annotated[str | None, flag("Dataset on the hub (owner/name).", _TEXT)]
DatasetConfig = Annotated[str | None, flag("Configuration of the dataset on the hub.", _TEXT)]
DatasetRevision = Annotated[str | None, flag("Revision of the dataset on the hub.", _TEXT)]
Split = Annotated[str, flag("Split of the dataset on the hub.", _TEXT)]
Column = Annotated[
    str, flag("Column that has text, chat messages (role and content) or token ids.", _TEXT)
]
HeldOut = Annotated[float, flag("Share of the documents that is held out from training.", _TEXT)]
Seed = Annotated[int, flag("Seed of the order of documents and rows.", _TEXT)]
Hookpoints = Annotated[
    list[str] | None,
    flag(
        "Module names relative to the base model, with * and {a,b}: 'layers.{0,9,18,27}.mlp'; a@b "
        "takes the input of a and the output of b. `bsc modules MODEL` lists what there is.",
        _ROWS,
        default="the MLPs at 0, 30, 60 and 90 % of the depth",
    ),
]
Tokens = Annotated[
    int, flag("Training tokens to capture: 500000, 10M, 1B.", _ROWS, parser=parse_count)
]
HeldOutTokens = Annotated[
    int | None,
    flag(
        "Tokens of held-out documents to capture.",
        _ROWS,
        parser=parse_count,
        default="the held-out share of --tokens, at most 1,048,576",
    ),
]
Context = Annotated[
    int | None, flag("Tokens in a context.", _ROWS, default="the model's, at most 2048")
]
PackingFlag = Annotated[
    str,
    flag(
        "masked: documents share contexts and do not see each other; joined: they do; none: a "
        "context per document.",
        _ROWS,
    ),
]
MaxNonFinite = Annotated[
    float, flag("Share of rows with NaN or inf above which to stop.", _ROWS, min=0, max=1)
]
CodecFlag = Annotated[
    str, flag("raw, lz4 (exact, about a quarter smaller) or int8 (half, FVU about 1e-4).", _STORE)
]
Window = Annotated[int, flag("Shards that rows are scattered over at a time.", _STORE)]
Ring = Annotated[
    int | None,
    flag(
        "Training shards on disk at most; the capture waits for training runs that read them at "
        "the same time.",
        _STORE,
        default="all of them stay",
    ),
]
BatchTokens = Annotated[int | None, flag("Tokens in a forward pass.", MACHINE, default="by device")]
Rank = Annotated[int | None, flag("Number of this process.", MACHINE, default="torchrun's, or 0")]
World = Annotated[
    int | None, flag("Processes that write the store.", MACHINE, default="torchrun's, or 1")
]


def _config(
    model: str, text: list[str] | None, dataset: str | None, dataset_config: str | None,
    dataset_revision: str | None, split: str, column: str, held_out: float, seed: int, dtype: str,
    **fields: Any,
) -> CaptureConfig:  # fmt: skip
    """The config of a capture from its flags."""
    from bsc.cache.capture.capture import CaptureConfig
    from bsc.cache.model.models import resolve_model
    from bsc.cache.model.text import TextSource, default_text, parse_text, resolve_dataset
    from bsc.errors import UserError

    if text and dataset:
        raise UserError("--text and --dataset exclude each other: give one.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16.")
    where: dict[str, Any]
    if dataset:
        where = {"dataset": dataset, "config_name": dataset_config, "split": split}
    elif text:
        where = parse_text(text)
    else:
        where = default_text(resolve_model(model), model)
    if "dataset" in where:
        where["revision"] = resolve_dataset(where["dataset"], dataset_revision)
    source = TextSource(**where, column=column, held_out=held_out, seed=seed)
    return CaptureConfig(model=model, text=source, dtype=dtype, seed=seed, **fields)


def cache(
    model: Model,
    store: Annotated[
        str, flag("Folder of the store, or s3://bucket/path; one begun is gone on with.", _STORE)
    ] = "acts",
    text: Text = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    column: Column = "text",
    hookpoints: Hookpoints = None,
    tokens: Tokens = 10_000_000,
    held_out: HeldOut = 0.05,
    held_out_tokens: HeldOutTokens = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    packing: PackingFlag = "masked",
    codec: CodecFlag = "raw",
    dataset_revision: DatasetRevision = None,
    window: Window = 64,
    ring: Ring = None,
    rank: Rank = None,
    world: World = None,
    max_non_finite: MaxNonFinite = 1e-6,
    revision: Revision = None,
    random_weights: RandomWeights = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run a model over text once and write inputs and outputs of its MLPs to a store.

    A capture that was killed goes on when the same command is given again.
    """
    from bsc.cache.capture.capture import capture
    from bsc.devices import rank_and_world
    from bsc.files import canonical_json
    from bsc.progress import format_bytes

    own_rank, of = rank_and_world(rank, world)
    config = _config(
        model, text, dataset, dataset_config, dataset_revision, split, column, held_out, seed,
        dtype, store=store, hookpoints=tuple(hookpoints or ()), tokens=tokens,
        held_out_tokens=held_out_tokens, context=context, batch_tokens=batch_tokens,
        packing=packing, codec=codec, rank=own_rank, world=of, ring=ring, window=window,
        max_non_finite=max_non_finite, revision=revision, device=device,
        random_weights=random_weights,
    )  # fmt: skip
    result = capture(config)
    if as_json:
        typer.echo(canonical_json(result._asdict()), nl=False)
    else:
        typer.echo(
            f"{result.store}: {result.rows:,} training rows, {result.held_out_rows:,} held-out "
            f"rows, {format_bytes(result.bytes)} written"
        )


def plan(
    model: Model,
    store: Annotated[str, flag("Where the store would be.", _STORE)] = "acts",
    text: Text = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    column: Column = "text",
    hookpoints: Hookpoints = None,
    tokens: Tokens = 10_000_000,
    held_out: HeldOut = 0.05,
    held_out_tokens: HeldOutTokens = None,
    context: Context = None,
    batch_tokens: BatchTokens = None,
    packing: PackingFlag = "masked",
    codec: CodecFlag = "raw",
    dataset_revision: DatasetRevision = None,
    window: Window = 64,
    ring: Ring = None,
    world: World = None,
    rate: Annotated[
        int | None,
        flag("Tokens per second of one process: 700k.", MACHINE, parser=parse_count),
    ] = None,
    probe: Annotated[
        bool,
        flag("Load the model, and measure its rate and that of the disk here.", MACHINE, "--probe"),
    ] = False,
    disk_rate: Annotated[
        int | None,
        flag(
            "Bytes per second that the disk takes: 2B.",
            MACHINE,
            parser=parse_count,
            default="1B, or what --probe measures",
        ),
    ] = None,
    free: Annotated[
        int | None,
        flag("Free bytes to plan for: 2T.", MACHINE, parser=parse_count, default="the disk's"),
    ] = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say what a capture comes to before it is started: bytes, shards, memory, hours.

    For a sweep: `bsc train --plan`.

    Takes the flags of `bsc cache`. Of the model only the config is needed, unless --probe is given.
    """
    from bsc.cache.capture.estimate import estimate
    from bsc.files import canonical_json

    config = _config(
        model, text or (None if dataset else ["stdlib"] if not probe else None), dataset,
        dataset_config, dataset_revision, split, column, held_out, seed, dtype, store=store,
        hookpoints=tuple(hookpoints or ()), tokens=tokens, held_out_tokens=held_out_tokens,
        context=context, batch_tokens=batch_tokens, packing=packing, codec=codec,
        world=world or 1, ring=ring, window=window, revision=revision, device=device,
    )  # fmt: skip
    made = estimate(config, rate=rate, probe=probe, disk_rate=disk_rate, free=free)
    typer.echo(canonical_json(made.to_json()) if as_json else "\n".join(made.lines()))


def modules(
    model: Annotated[
        str, typer.Argument(help="'demo', a short name (SmolLM2-135M), a folder, or a hub id.")
    ],
    every: Annotated[
        bool, flag("Modules through which no rows of activations go, too.", None, "--all")
    ] = False,
    revision: Annotated[str | None, flag("Revision of the model on the hub.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the modules of a model that can be hooked, with their widths.

    Needs the model's config alone. Names go into --hookpoints of `bsc cache`, with * for every
    layer or {0,9,18} for some.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from bsc.cache.model.architectures import list_modules
    from bsc.cache.model.models import load_architecture
    from bsc.files import canonical_json

    base, _ = load_architecture(model, revision=revision)
    found = [g for g in list_modules(base) if every or g.can_be_hooked]
    if as_json:
        typer.echo(canonical_json([asdict(g) for g in found]), nl=False)
        return
    table = Table("module", "class", "d_in", "d_out", "modules", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for g in found:
        widths = ["" if width is None else str(width) for width in (g.d_in, g.d_out)]
        name = f"{g.pattern}  (default)" if g.default else g.pattern
        table.add_row(name, g.kind, *widths, str(g.count), style="bold" if g.default else None)
    Console(highlight=False, width=160).print(table)


def verify(
    path: Annotated[str, typer.Argument(help="Folder of a store, or s3://bucket/path.")],
    quick: Annotated[
        bool, flag("Check everything but the rows: names, sizes, sums.", None, "--quick")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a store against its own record.

    Exits 0 when all is right, 1 when not: every problem is printed with the file it is in.
    """
    from bsc.cache.store.store import ActivationStore
    from bsc.cache.store.verify import verify as verify_store
    from bsc.errors import StoreError
    from bsc.files import canonical_json
    from bsc.formats import printable
    from bsc.progress import stage

    store = None
    with suppress(StoreError):  # what is wrong with it is the first thing that verify says
        store = ActivationStore(path)
    with stage("verify", store.bytes if store else 0, "bytes") as progress:
        problems = list(verify_store(path, on_bytes=progress.advance, quick=quick))
    complete = bool(not problems and store and store.complete)
    if as_json:
        facts = {"store": path, "complete": complete, "quick": quick, "problems": problems}
        typer.echo(canonical_json(facts), nl=False)
    elif problems or store is None:
        typer.echo("\n".join(printable(problem) for problem in problems))
    else:
        rows = ", ".join(f"{s.rows:,} {name} rows" for name, s in store.splits.items())
        checked = "names, sizes and sums are" if quick else "every byte is"
        state = "" if complete else "; its capture has not ended"
        typer.echo(f"{path}: {checked} right ({rows}){state}")
    raise typer.Exit(1 if problems else 0)


def shuffle_check(
    path: Annotated[str, typer.Argument(help="Folder of a store, or s3://bucket/path.")],
    batch_rows: Annotated[int, flag("Rows in a batch.", parser=parse_count)] = 8192,
    batches: Annotated[int, flag("Batches to look at.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure how well the batches of a store are shuffled.

    The design effect is the variance of a batch's mean over that of independent rows: 1 is a
    perfect shuffle, 2 means that a batch is worth half its rows.
    """
    from bsc.cache.store.shuffle import check_shuffle
    from bsc.cache.store.store import ActivationStore
    from bsc.files import canonical_json

    found = check_shuffle(ActivationStore(path), batch_rows=batch_rows, batches=batches)
    typer.echo(canonical_json(found.to_json()) if as_json else found.line(), nl=not as_json)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command(
        epilog="Example: bsc cache --model SmolLM2-135M --text papers/ --tokens 100M --store acts"
    )(cache)
    app.command(epilog="Example: bsc plan --model SmolLM2-135M --tokens 10B --probe")(plan)
    app.command(epilog="Example: bsc modules gpt2")(modules)
    app.command(epilog="Example: bsc verify acts --quick")(verify)
    app.command(epilog="Example: bsc shuffle-check acts")(shuffle_check)
