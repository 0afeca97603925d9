"""Commands of stage 3: eval, examples, compare, report. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bsc.flags import AsJson, Check, Device, ModelNow, StoreNow, command, flag

if TYPE_CHECKING:
    from bsc.eval.browse.config import BrowseConfig
    from bsc.eval.config import EvalConfig

__all__ = ["add_commands"]


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    config: EvalConfig,
    on: Annotated[
        str | None,
        flag(
            "Another store of the same model: measure on its held-out rows, into RUN/on/NAME.",
            default="the store of the training",
        ),
    ] = None,
    no_probe: Annotated[
        bool, flag("Leave sparse probing out.", "Sparse probing", "--no-probe")
    ] = False,
    store: StoreNow = None,
    model: ModelNow = None,
    device: Device = None,
    check: Check = True,
    as_json: AsJson = False,
) -> None:
    """Measure every coder of a run on held-out documents and write RUN/eval.json.

    Goes on where it was when it is stopped and started again.
    """
    from bsc.errors import UserError
    from bsc.eval.elsewhere import run_on
    from bsc.eval.evaluate import evaluate as evaluate_run
    from bsc.eval.figures_table import figures_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    if no_probe:
        if "probes" in config.model_fields_set:
            raise UserError("--probe and --no-probe exclude each other: give one.")
        config = config.but(probes=())
    opened = Run.open(run)
    if on is not None:
        if store is not None:
            raise UserError("--on and --store: --on names the store already; give one.")
        opened = run_on(opened, on)
    result = evaluate_run(opened, config, store=store, model=model, device=device, check=check)
    if as_json:
        typer.echo(canonical_json(result.to_json()), nl=False)
    else:
        figures_table(result)


def examples(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    coder: Annotated[str, typer.Argument(help="Name of a coder, or a part of it.")],
    latent: Annotated[int, typer.Argument(help="Number of a latent.")],
    part: Annotated[str, flag("Documents: explain, test or all.")] = "all",
    per_stratum: Annotated[int, flag("Contexts of each tenth of its firings.")] = 1,
    store: StoreNow = None,
    model: ModelNow = None,
    as_json: AsJson = False,
) -> None:
    """Show contexts in which any latent of an evaluated coder fires, strongest first."""
    from bsc.eval.show import latent_examples, print_examples
    from bsc.files import canonical_json
    from bsc.train.run import Run

    found = latent_examples(
        Run.open(run), coder, latent, part=part, per_stratum=per_stratum, store=store, model=model
    )
    if as_json:
        for context in found.contexts:
            typer.echo(canonical_json(context.to_json(), indent=None), nl=False)
    else:
        print_examples(found)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    second: Annotated[
        Path,
        typer.Argument(help="Folder of another one; or the same, for its coders of several seeds."),
    ],
    pair: Annotated[
        list[str] | None,
        flag(
            "Coders to compare, FIRST=SECOND, by names or parts of them; several times.",
            default="those of one name, or alike but for the seed",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the coders of two runs: figures paired by document, and latents matched.

    "Latents alike" is the mean cosine of matched decoder rows.
    """
    from bsc.eval.compare import compare_runs
    from bsc.eval.figures_table import changes_table, comparison_table
    from bsc.eval.finetuned import finetuned_changes
    from bsc.files import canonical_json
    from bsc.train.run import Run

    runs = Run.open(first), Run.open(second)
    result, changed = compare_runs(*runs, pair or ()), finetuned_changes(*runs)
    if as_json:
        more = {"finetuned": changed.to_json()} if changed else {}
        typer.echo(canonical_json(result.to_json() | more), nl=False)
    else:
        comparison_table(result)
        if changed:
            typer.echo()
            changes_table(changed)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that were evaluated.")],
    out: Annotated[
        Path | None, flag("File to write.", default="report.html of the first run")
    ] = None,
    figures: Annotated[
        Path | None,
        flag("Folder for the figures as SVG and PDF and the numbers as CSV and JSON."),
    ] = None,
) -> None:
    """Write one static HTML page about one or several runs."""
    from bsc.eval.report.export import write_figures
    from bsc.eval.report.report import write_report
    from bsc.train.run import Run

    opened = [Run.open(r) for r in runs]
    typer.echo(str(write_report(opened, out)))
    if figures is not None:
        typer.echo(str(write_figures(opened, figures)))


def browse(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs that were evaluated.")],
    config: BrowseConfig,
    out: Annotated[Path | None, flag("Folder to write.", default="browse in the first run")] = None,
    live: Annotated[
        bool,
        flag("Serve the run on this machine: latents on a text of yours, and edits.", "Live"),
    ] = False,
    port: Annotated[int, flag("Port of --live.", "Live", default="a free one")] = 0,
    store: StoreNow = None,
    model: ModelNow = None,
    device: Device = None,
) -> None:
    """Write a folder of static pages about every latent: open its index.html in a browser.

    With --live: load the model and serve a page on which latents are turned off and set.
    """
    from bsc.errors import UserError
    from bsc.train.run import Run

    opened = [Run.open(r) for r in runs]
    if not live:
        if port:
            raise UserError("--port is for --live: pages in a folder need no server.")
        from bsc.eval.browse.browse import write_browser

        written = write_browser(opened, config, out, store=store, model=model, device=device)
        typer.echo(str(written.page))
        return
    if len(opened) > 1 or out is not None or config.model_fields_set - {"coders"}:
        raise UserError("--live serves one run and writes nothing: of the flags, --coders alone.")
    from bsc.eval.browse.live.server import serve

    chosen = {"store": store, "model": model, "device": device}
    serve(opened[0], typer.echo, port=port, coders=config.coders, **chosen)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    command(
        app,
        {"config": "bsc.eval.config:EvalConfig"},
        name="eval",
        epilog="Example: bsc eval runs/run --ce-tokens 1M",
    )(evaluate)
    app.command(epilog="Example: bsc examples runs/run binary-k32 17")(examples)
    app.command(epilog="Example: bsc compare runs/run runs/other")(compare)
    command(
        app,
        {"config": "bsc.eval.browse.config:BrowseConfig"},
        epilog="Example: bsc browse runs/run --coders '*k32*'",
    )(browse)
    app.command(epilog="Example: bsc report runs/run runs/other --out report.html")(report)
