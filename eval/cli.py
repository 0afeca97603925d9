"""Commands of stage 3: eval, examples, compare, report. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.counts import parse_count
from bsc.flags import AsJson, Check, Device, ModelNow, StoreNow, flag

__all__ = ["add_commands"]

_MUCH, _ABLATION, _PROBING = "How much is measured", "Ablations", "Sparse probing"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    store: StoreNow = None,
    on: Annotated[
        str | None,
        flag(
            "Another store of the same model: measure on its held-out rows, into RUN/on/NAME.",
            default="the store of the training",
        ),
    ] = None,
    model: ModelNow = None,
    ce_tokens: Annotated[
        int, flag("Held-out tokens for the model's loss.", _MUCH, parser=parse_count)
    ] = 100_000,
    rows: Annotated[
        int | None,
        flag("Held-out rows for all else.", _MUCH, parser=parse_count, default="all"),
    ] = None,
    ablation_bins: Annotated[
        int, flag("Bins of latents that are turned off in turn; 0: none.", _ABLATION)
    ] = 10,
    ablation_tokens: Annotated[
        int, flag("Held-out tokens for ablations.", _ABLATION, parser=parse_count)
    ] = 8_192,
    ablation_score: Annotated[
        str, flag("Order of latents: rate, or a .csv/.jsonl of coder, latent, score.", _ABLATION)
    ] = "rate",
    ultra_ablations: Annotated[
        int, flag("Latents above 10 % that are turned off one by one, per coder.", _ABLATION)
    ] = 4,
    probe: Annotated[
        list[str] | None,
        flag("Labelled texts (.csv, .jsonl); several times.", _PROBING, default="stdlib"),
    ] = None,
    no_probe: Annotated[bool, flag("Leave sparse probing out.", _PROBING, "--no-probe")] = False,
    probe_texts: Annotated[
        int, flag("Labelled texts of a class at most.", _PROBING, parser=parse_count)
    ] = 2_000,
    device: Device = None,
    check: Check = True,
    as_json: AsJson = False,
) -> None:
    """Measure every coder of a run on held-out documents and write RUN/eval.json.

    Goes on where it was when it is stopped and started again.
    """
    from bsc.config import parse_config
    from bsc.errors import UserError
    from bsc.eval.elsewhere import run_on
    from bsc.eval.evaluate import EvalConfig
    from bsc.eval.evaluate import evaluate as evaluate_run
    from bsc.eval.figures_table import figures_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    values: dict[str, Any] = {
        "ce_tokens": ce_tokens, "rows": rows, "ablation_bins": ablation_bins,
        "ablation_tokens": ablation_tokens, "ablation_score": ablation_score,
        "ultra_ablations": ultra_ablations, "probe_texts": probe_texts,
    }  # fmt: skip
    if probe or no_probe:
        values["probes"] = tuple(probe or ())
    config = parse_config(EvalConfig, values, "bsc eval")
    opened = Run.open(run)
    if on is not None:
        if store is not None:
            raise UserError("--on and --store: --on names the store already; give one.")
        opened = run_on(opened, on)
    result = evaluate_run(opened, config, store=store, model=model, device=device, check=check)
    if as_json:
        typer.echo(canonical_json(result), nl=False)
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
        for context in found["contexts"]:
            typer.echo(canonical_json(context, indent=None), nl=False)
    else:
        print_examples(found)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    second: Annotated[
        Path,
        typer.Argument(help="Folder of another one; or the same, for its coders of several seeds."),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare the coders of two runs: figures paired by document, and latents matched.

    Coders of one name are a pair. "Latents alike" is the mean cosine of matched decoder rows.
    """
    from bsc.eval.compare import compare_runs
    from bsc.eval.figures_table import comparison_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    result = compare_runs(Run.open(first), Run.open(second))
    if as_json:
        typer.echo(canonical_json(result), nl=False)
    else:
        comparison_table(result)


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


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command("eval", epilog="Example: bsc eval runs/run --ce-tokens 1M")(evaluate)
    app.command(epilog="Example: bsc examples runs/run binary-k32 17")(examples)
    app.command(epilog="Example: bsc compare runs/run runs/other")(compare)
    app.command(epilog="Example: bsc report runs/run runs/other --out report.html")(report)
