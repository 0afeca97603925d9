"""`bsc report`: one static HTML page about evaluated runs.

Readable without a script and without a network: style and plots are inline. Text from corpora and
configs is escaped by the template engine. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bsc.errors import StoreError, UserError
from bsc.eval.report.figures import (
    COLOURS,
    CoderRow,
    against_k,
    firing_histograms,
    training_curves,
)
from bsc.files import write_atomically
from bsc.train.run import Run

__all__ = ["render_report", "write_report"]

CURVE_POINTS = 500


def _rows(run: Run) -> list[CoderRow]:
    """Every coder of a run.

    Raises:
        StoreError: a file of the run is missing or damaged.
    """
    evaluation, config = run.evaluation(), run.config()
    figures = evaluation["coders"]
    try:
        examples = json.loads((run.folder / "examples.json").read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{run.folder}: examples.json cannot be read ({error}). `bsc eval {run.folder}` "
            f"writes it."
        ) from None
    curves = _curves(run, config["steps"], config["log_every"])
    rows = []
    for planned in config["coders"]:
        name, coder = planned["name"], planned["coder"]
        if name in evaluation["left_out"]:
            continue
        if name not in figures:
            raise StoreError(
                f"{run.eval_path}: no figures of coder {name}. Evaluate the run again: "
                f"bsc eval {run.folder}"
            )
        rows.append(
            CoderRow(
                run=run.folder.name,
                name=name,
                hookpoint=planned["hookpoint"],
                site=coder["site"],
                code=coder["code"],
                k=coder["k"],
                seed=planned["seed"],
                optimiser=planned["optimiser"],
                lr=planned["lr"],
                n_latents=coder["n_latents"],
                figures=figures[name],
                metrics=curves.get(name, []),
                examples=examples.get(name, []),
            )
        )
    return rows


def _span(values: Sequence[float], form: str) -> str:
    """First and last of figures along k, or the only one."""
    ends = [values[0]] if len(values) == 1 else [values[0], values[-1]]
    return " to ".join(format(v, form) for v in ends)


def _summary(rows: list[CoderRow]) -> list[str]:
    """What the figures say, in sentences with the numbers in them, one for each panel.

    Only of the k at which there is exactly one binary and one continuous coder of the first seed:
    where there are more, which two to compare is the reader's choice.
    """
    sentences = []
    for panel in dict.fromkeys(r.panel for r in rows):
        pairs: dict[int, dict[str, list[CoderRow]]] = {}
        for r in rows:
            if (r.panel, r.seed) == (panel, rows[0].seed):
                pairs.setdefault(r.k, {}).setdefault(r.code, []).append(r)
        ks = sorted(
            k
            for k, p in pairs.items()
            if all(len(p.get(code, [])) == 1 for code in ("binary", "continuous"))
        )
        if not ks:
            continue
        b, c = ([pairs[k][code][0].figures for k in ks] for code in ("binary", "continuous"))
        sentences.append(
            f"{panel}, k = {_span(ks, 'd')}: binary coders leave "
            f"{_span([f['fvu'] for f in b], '.1%')} of the variance unexplained, continuous ones "
            f"{_span([f['fvu'] for f in c], '.1%')}. Spliced into the model they cost "
            f"{_span([f['delta_ce'] for f in b], '.3f')} and "
            f"{_span([f['delta_ce'] for f in c], '.3f')} nats per token. Latents that fire on more "
            f"than 10 % of tokens: {_span([f['latents_above']['0.1'] for f in b], 'd')} and "
            f"{_span([f['latents_above']['0.1'] for f in c], 'd')}."
        )
    return sentences


def _curves(run: Run, steps: int, log_every: int) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by coder, thinned to about `CURVE_POINTS` points each."""
    keep = max(1, steps // log_every // CURVE_POINTS)
    curves: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics():
        if line["step"] // log_every % keep == 0 or line["step"] == steps:
            curves.setdefault(line["coder"], []).append({k: line[k] for k in ("rows", "fvu")})
    return curves


def _shade(value: float, largest: float) -> int:
    """Strength of a mark, 0 (silent) to 9 (the strongest of the latent's examples)."""
    return 0 if value == 0 else max(1, min(9, round(9 * value / largest)))


def _marked(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Examples with a strength for each token."""
    marked = []
    for latent in examples:
        largest = max((v for c in latent["contexts"] for _, v in c), default=1.0) or 1.0
        contexts = [
            [(text, _shade(value, largest), value) for text, value in context]
            for context in latent["contexts"]
        ]
        marked.append({**latent, "contexts": contexts})
    return marked


def render_report(runs: list[Run]) -> str:
    """The page, as text.

    Raises:
        UserError: a run is not evaluated, or its files are damaged.
    """
    if not runs:
        raise UserError("a report needs at least one run.")
    rows = []
    for run in runs:
        try:
            rows += _rows(run)
        except (KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"{run.folder}: config.json, metrics.jsonl, eval.json and examples.json do not fit "
                f"together ({error!r}). One of them was changed; evaluate the run again: bsc eval "
                f"{run.folder}"
            ) from None
    if not rows:
        raise UserError("a report needs at least one coder; every coder of these was left out.")
    rows.sort(key=lambda r: (r.hookpoint, r.site, r.n_latents, r.code, r.k, r.seed, r.run))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bsc.eval.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evaluations = [run.evaluation() for run in runs]
    style = (Path(__file__).parent / "style.css").read_text()
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        colours=COLOURS,
        runs=[
            {"name": run.folder.name, "config": run.config(), "evaluation": evaluation}
            for run, evaluation in zip(runs, evaluations, strict=True)
        ],
        rows=rows,
        several_runs=len(runs) > 1,
        summary=_summary(rows),
        fvu=against_k(rows, "fvu", "FVU (held out)"),
        delta_ce=against_k(
            rows, "delta_ce", "delta CE, nats per token", interval="delta_ce_interval"
        ),
        firing=firing_histograms(rows),
        curves=training_curves(rows),
        examples=[(row, _marked(row.examples)) for row in rows],
    )


def write_report(runs: list[Run], out: Path | None = None) -> Path:
    """Write the page and say where.

    Args:
        runs: evaluated runs.
        out: file to write; None: report.html of the first run.

    Raises:
        UserError: a run is not evaluated, or the file cannot be written.
    """
    path = out or runs[0].report_path
    if not path.name or path.is_dir():
        raise UserError(f"--out {path}: name a file, for example {path / 'report.html'}.")
    page = render_report(runs)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror}).") from None
    return path
