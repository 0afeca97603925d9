"""`bsc report`: one static HTML page about evaluated runs.

Readable without a script and without a network: style, plots and the script that sorts and
searches are inline, and the page's content security policy allows that one script and no request.
Text from corpora and configs is escaped by the template engine. The same inputs give the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
from markupsafe import Markup

from bsc.errors import UserError
from bsc.eval.evaluation import EvaluationFolder, ShownLatent
from bsc.eval.figures.examples import STRATA
from bsc.eval.figures.intervals import MIN_SAMPLE
from bsc.eval.report import plots
from bsc.eval.report.coders import ReportedCoder, read_coders, run_labels
from bsc.eval.report.drawing import COLOURS, Drawing
from bsc.eval.report.finetuned import ShownChange, before_and_after, read_changes
from bsc.eval.report.interp import Scored, read_interp
from bsc.eval.report.interp_plots import frequency_curves, scores
from bsc.eval.report.links import BROWSER, latent_page, shade
from bsc.eval.report.plots import Curve
from bsc.eval.report.summary import control_table, matched_tables, summary
from bsc.files import write_atomically
from bsc.formats import interval, percent, percent_interval, printable
from bsc.records import expected_form
from bsc.train.run import Run, as_run

__all__ = ["drawings", "environment_of", "render_report", "write_report"]

T = TypeVar("T")


ALL_LATENTS, ALL_ULTRA = 256, 1_024
"""Latents of all coders together whose contexts, and whose diagnoses, are on the page: it stays a
few megabytes with hundreds of coders. eval.json and the exported tables have all of them."""


def drawings(
    runs: Sequence[Run],
    rows: Sequence[ReportedCoder],
    interp: Sequence[Scored] = (),
    finetuned: Sequence[ShownChange] = (),
) -> dict[str, Drawing]:
    """Every figure of the page, by name."""
    k = "k, latents selected per token"
    codes = Curve("fvu", interval="fvu_interval")
    cost = Curve("delta_ce", interval="delta_ce_interval")
    without = Curve(
        "fvu_binarised",
        ("continuous", "hybrid"),
        "fvu_binarised_interval",
        "{code}, values removed",
        True,
    )
    cost_without = Curve(
        "delta_ce_binarised",
        ("continuous", "hybrid"),
        "delta_ce_binarised_interval",
        "{code}, values removed",
        True,
    )
    fvu, nats = "FVU (held out)", "delta CE, nats per token"
    found = [
        plots.curves("delta-ce-k", rows, lambda c: c.k, k, nats, [cost]),
        plots.curves("fvu-k", rows, lambda c: c.k, k, fvu, [codes]),
        plots.curves("fvu-l0", rows, lambda c: c.figures.l0, "L0", fvu, [codes]),
        plots.curves(
            "fvu-bits",
            rows,
            lambda c: c.figures.bits,
            "bits per token",
            fvu,
            [Curve("fvu_quantised")],
        ),
        plots.curves("delta-ce-l0", rows, lambda c: c.figures.l0, "L0", nats, [cost]),
        plots.curves(
            "delta-ce-bits", rows, lambda c: c.figures.bits, "bits per token", nats, [cost]
        ),
        plots.curves("fvu-control", rows, lambda c: c.k, k, fvu, [codes, without]),
        plots.curves("delta-ce-control", rows, lambda c: c.k, k, nats, [cost, cost_without]),
        plots.firing_histograms(rows),
        plots.training_curves(rows),
    ]
    if ablation := plots.ablations(rows):
        found.append(ablation)
    for i, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        for name, probed in EvaluationFolder(run).read().probing.items():
            found.append(plots.probing(f"{i}-{name}", probed, rows, label))
    for scored in interp:
        if any(one.coders for one in scored.sets):
            found += [scores(scored, rows), *frequency_curves(scored, rows)]
    found += map(before_and_after, finetuned)
    return {drawing.name: drawing for drawing in found}


class _MarkedContext(NamedTuple):
    """A context with a strength for each firing token."""

    stratum: int
    text: list[tuple[Any, ...]]
    """Piece, strength, margin, and whether the drawn firing is there."""


class _MarkedLatent(NamedTuple):
    """A latent with such contexts."""

    latent: int
    rate: float
    contexts: list[_MarkedContext]
    page: str | None
    """Where the browser has it."""


def _marked(
    row: ReportedCoder, examples: Sequence[ShownLatent], browser: Path | None
) -> list[_MarkedLatent]:
    """Examples with a strength for each firing token; of a binary code all are equal."""
    found = []
    for latent in examples:
        margins: list[Any] = [m for c in latent.contexts for _, m, _ in c.text if m is not None]
        largest = max(margins, default=1.0)
        graded = latent.latent < row.planned.coder.first_binary
        contexts = []
        for context in latent.contexts:
            text: list[tuple[Any, ...]] = []
            margin: Any
            for piece, margin, drawn in context.text:
                strength = 0 if margin is None else shade(margin, largest) if graded else 6
                text.append((piece, strength, margin, drawn))
            contexts.append(_MarkedContext(context.stratum + 1, text))
        page = f"coders/{row.slug}/{latent_page(latent.latent)}"
        there = browser is not None and (browser / page).exists()
        href = f"{BROWSER}/{page}" if there else None
        found.append(_MarkedLatent(latent.latent, latent.rate, contexts, href))
    return found


def _ablation_bars(rows: Sequence[ReportedCoder]) -> str:
    """What the bars of the ablation figure are, or why there are none."""
    having = [b for r in rows if r.figures.ablation for b in r.figures.ablation.bins]
    if any(b.delta_ce_interval for b in having):
        return "Bars are 95 % intervals over documents."
    return (
        f"There are no intervals: the tokens of the ablations are of fewer than {MIN_SAMPLE} "
        f"documents (--ablation-tokens takes more)."
    )


def _thinned(values: Sequence[T], n: int) -> list[T]:
    """At most n of them, from the first to the last."""
    if len(values) <= n:
        return list(values)
    return [values[round(i * (len(values) - 1) / max(1, n - 1))] for i in range(n)]


def environment_of(package: str) -> jinja2.Environment:
    """Templates of a package, with the filters that write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = interval
    environment.filters["percent_interval"] = percent_interval
    environment.filters["digits"] = lambda value, n=4: f"{value:.{n}f}"
    environment.filters["percent"] = percent
    environment.filters["whole"] = lambda value: f"{value:,}"
    return environment


def _rendered(**values: Any) -> str:
    try:
        return environment_of("bsc.eval.report").get_template("page.html.j2").render(**values)
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from None


def render_report(runs: Sequence[Run], browser: Path | None = None) -> str:
    """The page, as text.

    Args:
        runs: evaluated runs.
        browser: folder beside the page, of pages of latents (`bsc browse`) that it links to.

    Raises:
        UserError: a run is not evaluated, or its files are damaged.
    """
    if not runs:
        raise UserError("a report needs at least one run.")
    rows = read_coders(runs)
    folder = Path(__file__).parent
    latents = max(1, ALL_LATENTS // len(rows))
    script = (folder / "script.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    evaluations = [EvaluationFolder(run).read() for run in runs]
    folders = ", ".join(str(run.folder) for run in runs)
    with expected_form(
        f"eval.json, examples.json or the scores of {folders}",
        f"Evaluate the run again: bsc eval {runs[0].folder}.",
    ):
        interp = read_interp(runs, run_labels(runs), rows)
        finetuned = read_changes(runs, run_labels(runs), rows)
        page = _rendered(
            style=Markup((folder / "style.css").read_text()),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            colours=COLOURS,
            strata=STRATA,
            runs=[
                {"name": label, "config": run.config(), "evaluation": evaluation}
                for run, label, evaluation in zip(runs, run_labels(runs), evaluations, strict=True)
            ],
            rows=rows,
            anchors={(row.run, row.name): row.anchor for row in rows},
            several_runs=len(runs) > 1,
            summary=summary(rows),
            matched={by: matched_tables(rows, by) for by in ("l0", "bits")},
            control=control_table(rows),
            ablation_bars=_ablation_bars(rows),
            drawings=drawings(runs, rows, interp, finetuned),
            interp=interp,
            finetuned=finetuned,
            shown_ultra=max(4, ALL_ULTRA // len(rows)),
            browser=browser is not None and (browser / "index.html").exists(),
            examples=[
                (row, _marked(row, _thinned(row.examples, latents), browser)) for row in rows
            ],
        )
    return printable(page, lines=True)


def write_report(
    runs: Run | str | Path | Sequence[Run | str | Path], out: str | Path | None = None
) -> Path:
    """Write the page and say where.

    Args:
        runs: one or several evaluated runs, or their folders.
        out: file to write; None: report.html of the first run.

    Raises:
        UserError: a run is not evaluated, or the file cannot be written.
    """
    each = [runs] if isinstance(runs, (Run, str, Path)) else runs
    opened = [as_run(run) for run in each]
    if not opened:
        raise UserError("a report needs at least one run.")
    path = Path(out) if out else opened[0].report_path
    if not path.name or path.is_dir():
        raise UserError(f"--out {path}: name a file, for example {path / 'report.html'}.")
    page = render_report(opened, path.parent / BROWSER)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror}).") from None
    return path
