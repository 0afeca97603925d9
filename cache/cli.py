"""Commands of stage 1: `bsc cache`, `bsc plan`, `bsc verify`, `bsc shuffle-check`.

They parse, call and print.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bsc.counts import parse_count

if TYPE_CHECKING:
    from bsc.cache.capture import CaptureConfig

__all__ = ["add_commands"]

Model = Annotated[
    str,
    typer.Option(help="'demo', a short name (SmolLM2-135M), a folder, or a hub id (owner/name)."),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        help="'stdlib', 'env', or files and folders (txt, jsonl, parquet, arrow); may be given "
        "several times. Default: what goes with the model."
    ),
]
Dataset = Annotated[str | None, typer.Option(help="Dataset on the hub (owner/name).")]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of the dataset on the hub.")]
DatasetRevision = Annotated[str | None, typer.Option(help="Revision of the dataset on the hub.")]
Split = Annotated[str, typer.Option(help="Split of the dataset on the hub.")]
Column = Annotated[str, typer.Option(help="Column that has the text.")]
Hookpoints = Annotated[
    list[str] | None,
    typer.Option(
        help="Module names relative to the base model, with * and {a,b}: 'layers.{0,9,18,27}.mlp'; "
        "a@b takes the input of a and the output of b. Default: the MLPs at 0, 30, 60 and 90 % of "
        "the depth."
    ),
]
Tokens = Annotated[
    int, typer.Option(help="Training tokens to capture: 500000, 10M, 1B.", parser=parse_count)
]
HeldOut = Annotated[float, typer.Option(help="Share of documents held out from training.")]
HeldOutTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of held-out documents to capture. Default: the same share of --tokens, at "
        "most 1,048,576.",
        parser=parse_count,
    ),
]
Context = Annotated[
    int | None, typer.Option(help="Tokens in a context. Default: the model's, at most 2048.")
]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens in a forward pass. Default: by device.")
]
PackingFlag = Annotated[
    str,
    typer.Option(
        help="masked: documents share contexts and do not see each other; joined: they do; none: a "
        "context per document."
    ),
]
CodecFlag = Annotated[
    str,
    typer.Option(help="raw, lz4 (exact, about a quarter smaller), int8 (half, FVU about 1e-4)."),
]
Ring = Annotated[
    int | None,
    typer.Option(
        help="Keep at most so many training shards on disk, and wait for training runs that read "
        "them at the same time."
    ),
]
Window = Annotated[int, typer.Option(help="Shards that rows are scattered over at a time.")]
World = Annotated[
    int | None, typer.Option(help="Processes that write the store. Default: torchrun's.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of the model on the hub.")]
RandomWeights = Annotated[
    int | None, typer.Option(help="Seed of untrained weights instead of the model's: a control.")
]
Dtype = Annotated[
    str, typer.Option(help="Of the model's arithmetic: auto, float32, bfloat16, float16.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if any.")]
Seed = Annotated[int, typer.Option(help="Of the order of documents and rows.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _config(
    model: str, text: list[str] | None, dataset: str | None, dataset_config: str | None,
    dataset_revision: str | None, split: str, column: str, held_out: float, seed: int, dtype: str,
    **fields: Any,
) -> CaptureConfig:  # fmt: skip
    """The config of a capture from its flags."""
    from bsc.cache.capture import CaptureConfig
    from bsc.cache.models import resolve_model
    from bsc.cache.text import TextSource, default_text, parse_text, resolve_dataset
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
        str, typer.Option(help="Folder of the store, or s3://bucket/path; goes on with one begun.")
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
    rank: Annotated[
        int | None, typer.Option(help="Which of the processes this is. Default: torchrun's.")
    ] = None,
    world: World = None,
    max_non_finite: Annotated[
        float, typer.Option(help="Share of rows with NaN or inf above which to stop.")
    ] = 1e-6,
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
    from bsc.cache.capture import capture
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
    store: Annotated[str, typer.Option(help="Where the store would be.")] = "acts",
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
        float | None, typer.Option(help="Tokens per second of one process, for the hours.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure the rate here.")
    ] = False,
    free: Annotated[
        int | None,
        typer.Option(help="Free bytes to plan for: 2T. Default: the disk's.", parser=parse_count),
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
    from bsc.cache.estimate import estimate
    from bsc.files import canonical_json

    config = _config(
        model, text or (None if dataset else ["stdlib"] if not probe else None), dataset,
        dataset_config, dataset_revision, split, column, held_out, seed, dtype, store=store,
        hookpoints=tuple(hookpoints or ()), tokens=tokens, held_out_tokens=held_out_tokens,
        context=context, batch_tokens=batch_tokens, packing=packing, codec=codec,
        world=world or 1, ring=ring, window=window, revision=revision, device=device,
    )  # fmt: skip
    made = estimate(config, rate=rate, probe=probe, free=free)
    typer.echo(canonical_json(made.to_json()) if as_json else "\n".join(made.lines()))


def verify(
    path: Annotated[str, typer.Argument(help="Folder of a store, or s3://bucket/path.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Check everything but the rows: names, sizes, sums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Check every byte of a store against its own record.

    Exits 0 when all is right, 1 when not: every problem is printed with the file it is in.
    """
    from bsc.cache.store import ActivationStore
    from bsc.cache.verify import verify as verify_store
    from bsc.errors import StoreError
    from bsc.files import canonical_json
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
        typer.echo("\n".join(problems))
    else:
        rows = ", ".join(f"{s.rows:,} {name} rows" for name, s in store.splits.items())
        checked = "names, sizes and sums are" if quick else "every byte is"
        state = "" if complete else "; its capture has not ended"
        typer.echo(f"{path}: {checked} right ({rows}){state}")
    raise typer.Exit(1 if problems else 0)


def shuffle_check(
    path: Annotated[str, typer.Argument(help="Folder of a store, or s3://bucket/path.")],
    batch_rows: Annotated[int, typer.Option(help="Rows in a batch.", parser=parse_count)] = 8192,
    batches: Annotated[int, typer.Option(help="Batches to look at.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure how well the batches of a store are shuffled.

    The design effect is the variance of a batch's mean over that of independent rows: 1 is a
    perfect shuffle, 2 means that a batch is worth half its rows.
    """
    from bsc.cache.shuffle import check_shuffle
    from bsc.cache.store import ActivationStore
    from bsc.files import canonical_json

    found = check_shuffle(ActivationStore(path), batch_rows=batch_rows, batches=batches)
    typer.echo(canonical_json(found.to_json()) if as_json else found.line(), nl=not as_json)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command()(cache)
    app.command()(plan)
    app.command()(verify)
    app.command(name="shuffle-check")(shuffle_check)
