"""Commands of stage 1: `bsc cache`, `bsc plan`, `bsc verify`, `bsc ring`, `bsc shuffle-check`.

They parse, call and print.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bsc.counts import parse_count
from bsc.flags import AsJson, command, flag
from bsc.options import MACHINE

if TYPE_CHECKING:
    from bsc.cache.capture.config import CaptureConfig

__all__ = ["add_commands"]

_CAPTURE = {"values": "bsc.cache.capture.config:CaptureConfig"}


def _config(values: dict[str, Any], command: str) -> CaptureConfig:
    """The config of a capture from flags."""
    from bsc.cache.capture.config import CaptureConfig
    from bsc.cache.model.text import choose_text
    from bsc.config import parse_config
    from bsc.devices import rank_and_world

    where = f"bsc {command}"
    seed = values.get("seed", 0)
    text = choose_text(values.pop("text", {}), values["model"], seed=seed, where=where)
    rank, world = rank_and_world(values.pop("rank", None), values.pop("world", None))
    given = {**values, "text": text, "rank": rank, "world": world}
    return parse_config(CaptureConfig, given, where)


def cache(values: dict[str, Any], as_json: AsJson = False) -> None:
    """Run a model over text once and write inputs and outputs of its MLPs to a store.

    A capture that was killed goes on when the same command is given again.
    """
    from bsc.cache.capture.capture import capture
    from bsc.files import canonical_json
    from bsc.progress import format_bytes

    result = capture(_config(values, "cache"))
    if as_json:
        typer.echo(canonical_json(result._asdict()), nl=False)
    else:
        typer.echo(
            f"{result.store}: {result.rows:,} training rows, {result.held_out_rows:,} held-out "
            f"rows, {format_bytes(result.bytes)} written"
        )


def plan(
    values: dict[str, Any],
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
    as_json: AsJson = False,
) -> None:
    """Say what a capture comes to before it is started: bytes, shards, memory, hours.

    For a sweep: `bsc train --plan`.

    Takes the flags of `bsc cache`. Of the model only the config is needed, unless --probe is given.
    """
    from bsc.cache.capture.estimate import estimate
    from bsc.files import canonical_json

    text = values.get("text", {})
    if not probe and not text.get("files") and not text.get("dataset"):
        values["text"] = {**text, "files": ("stdlib",)}  # it is not read
    if "world" in values:
        values.setdefault("rank", 0)
    config = _config(values, "plan")
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
    jobs: Annotated[
        int | None,
        flag("Shards that are checked at a time.", MACHINE, default="one per core, at most 8"),
    ] = None,
    journal: Annotated[
        Path | None,
        flag(
            "File that keeps what was checked, for going on. It goes when all is right.",
            MACHINE,
            default="one in ~/.cache/bsc/verify",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a store against its own record.

    A check that was stopped goes on when the same command is given again. After one that found
    something, the same command reads what was wrong or was changed since.

    Exits 0 when all is right, 1 when not: every problem is printed with the file it is in.
    """
    from bsc.cache.store.store import ActivationStore
    from bsc.cache.store.verify import verify as verify_store
    from bsc.cache.store.verify_journal import open_journal
    from bsc.errors import StoreError, UserError
    from bsc.files import canonical_json
    from bsc.formats import printable
    from bsc.progress import console, format_bytes, stage

    if quick and journal is not None:
        raise UserError("--quick reads no rows, so it keeps no journal: leave out --journal.")
    store = None
    with suppress(StoreError):  # what is wrong with it is the first thing that verify says
        store = ActivationStore(path)
    kept = open_journal(journal, store) if store and not quick else None
    with kept or nullcontext():
        done = kept.bytes if kept else 0
        if kept and done:
            console.print(
                f"verify: goes on after {format_bytes(done)} that were checked since {kept.began}; "
                f"remove {kept.path} to check them again",
                markup=False,
            )
        with stage("verify", store.bytes if store else 0, "bytes", done=done) as progress:
            problems = list(
                verify_store(path, progress.advance, quick=quick, jobs=jobs, journal=kept)
            )
        if kept and problems:
            console.print(
                f"What is right is kept in {kept.path}; the same command checks the rest again.",
                markup=False,
            )
        elif kept:
            kept.remove()
    complete = bool(not problems and store and store.complete)
    before = kept.taken if kept else 0
    if as_json:
        facts = {
            "store": path,
            "complete": complete,
            "quick": quick,
            "bytes_checked_before": before,
            "problems": problems,
        }
        typer.echo(canonical_json(facts), nl=False)
    elif problems or store is None:
        typer.echo("\n".join(printable(problem) for problem in problems))
    else:
        rows = ", ".join(f"{s.rows:,} {name} rows" for name, s in store.splits.items())
        checked = "names, sizes and sums are" if quick else "every byte is"
        state = "" if complete else "; its capture has not ended"
        since = f"; {format_bytes(before)} were checked before" if before else ""
        typer.echo(f"{path}: {checked} right ({rows}){since}{state}")
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


def ring(
    path: Annotated[str, typer.Argument(help="Folder of a store that is a ring.")],
    drop: Annotated[
        str | None,
        flag("Reader that does not come back, whose place is taken away.", metavar="NAME"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say who reads and writes a ring, where each is, and what it waits for.

    A training run keeps the shards that its last checkpoint needs, also when it was killed. --drop
    lets the ring go on without one that is not to be resumed.
    """
    from bsc.cache.store.ring import drop_reader
    from bsc.cache.store.ring_status import ring_status
    from bsc.cache.store.store import ActivationStore
    from bsc.errors import UserError
    from bsc.files import canonical_json
    from bsc.formats import printable

    store = ActivationStore(path)
    if drop is not None:
        if store.ring is None:
            raise UserError(f"--drop {drop}: {store.folder} is no ring.")
        was = drop_reader(store.folder, drop)
        typer.echo(
            f"{path}: {printable(was.who)} had its place at shard {was.next_shard}; dropped",
            err=True,
        )
    status = ring_status(store)
    typer.echo(
        canonical_json(status.to_json())
        if as_json
        else "\n".join(printable(line) for line in status.lines()),
        nl=not as_json,
    )


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    command(
        app,
        _CAPTURE,
        epilog="Example: bsc cache --model SmolLM2-135M --text papers/ --tokens 100M --store acts",
    )(cache)
    command(app, _CAPTURE, epilog="Example: bsc plan --model SmolLM2-135M --tokens 10B --probe")(
        plan
    )
    app.command(epilog="Example: bsc modules gpt2")(modules)
    app.command(epilog="Example: bsc verify acts --quick")(verify)
    app.command(epilog="Example: bsc ring acts")(ring)
    app.command(epilog="Example: bsc shuffle-check acts")(shuffle_check)
