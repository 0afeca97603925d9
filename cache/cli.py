"""Commands of stage 1: `bsc cache` and `bsc verify`. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.counts import parse_count

__all__ = ["add_commands"]


def cache(
    model: Annotated[
        str,
        typer.Option(
            help="'demo', a short name (SmolLM2-135M), a folder, or a hub id (owner/name)."
        ),
    ],
    store: Annotated[Path, typer.Option(help="Folder of the new store.")] = Path("acts"),
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="'stdlib', 'env', or files and folders (txt, jsonl, parquet, arrow); may be "
            "given several times. Default: what goes with the model."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset on the hub (owner/name).")] = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of the dataset on the hub.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset on the hub.")] = "train",
    column: Annotated[str, typer.Option(help="Column that has the text.")] = "text",
    hookpoints: Annotated[
        list[str] | None,
        typer.Option(
            help="Module names relative to the base model, with * and {a,b}: "
            "'layers.{0,9,18,27}.mlp'. Default: the MLPs at 0, 30, 60 and 90 % of the depth."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Training tokens to capture: 500000, 10M, 1B.", parser=parse_count)
    ] = 10_000_000,
    held_out: Annotated[
        float, typer.Option(help="Share of documents held out from training.")
    ] = 0.05,
    held_out_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of held-out documents to capture. Default: the same share of --tokens, at "
            "most 1,048,576.",
            parser=parse_count,
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens in a context. Default: the model's, at most 2048.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a forward pass. Default: by device.")
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Revision of the dataset on the hub.")
    ] = None,
    window: Annotated[
        int, typer.Option(help="Shards that rows are scattered over at a time.")
    ] = 64,
    revision: Annotated[str | None, typer.Option(help="Revision of the model on the hub.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the model's arithmetic: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if any.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of documents and rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a model over text once and write inputs and outputs of its MLPs to a store."""
    from bsc.cache.capture import CaptureConfig, capture
    from bsc.cache.models import resolve_model
    from bsc.cache.text import TextSource, default_text, parse_text, resolve_dataset
    from bsc.errors import UserError
    from bsc.files import canonical_json
    from bsc.progress import format_bytes

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
    result = capture(
        CaptureConfig(
            model=model,
            store=store,
            text=TextSource(**where, column=column, held_out=held_out, seed=seed),
            hookpoints=tuple(hookpoints or ()),
            tokens=tokens,
            held_out_tokens=held_out_tokens,
            context=context,
            batch_tokens=batch_tokens,
            revision=revision,
            dtype=dtype,
            device=device,
            seed=seed,
            window=window,
        )
    )
    if as_json:
        typer.echo(canonical_json(result._asdict() | {"store": str(result.store)}), nl=False)
    else:
        typer.echo(
            f"{result.store}: {result.rows:,} training rows, {result.held_out_rows:,} held-out "
            f"rows, {format_bytes(result.bytes)}"
        )


def verify(
    path: Annotated[Path, typer.Argument(help="Folder of a store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Check every byte of a store against its own record.

    Exits 0 when all is right, 1 when not: every problem is printed with the file it is in.
    """
    from bsc.cache.store import ActivationStore
    from bsc.cache.verify import verify as verify_store
    from bsc.files import canonical_json
    from bsc.progress import stage

    store = ActivationStore(path)
    with stage("verify", store.bytes, "bytes") as progress:
        problems = list(verify_store(path, on_bytes=progress.advance))
    if as_json:
        typer.echo(canonical_json({"store": str(path), "problems": problems}), nl=False)
    else:
        rows = ", ".join(f"{s.rows:,} {name} rows" for name, s in store.splits.items())
        typer.echo("\n".join(problems) or f"{path}: every byte is right ({rows})")
    raise typer.Exit(1 if problems else 0)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command()(cache)
    app.command()(verify)
