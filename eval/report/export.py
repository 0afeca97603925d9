"""`bsc report --figures`: every figure as SVG and PDF, all numbers as CSV and JSON, for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bsc.errors import UserError
from bsc.eval.evaluation import Evaluation, EvaluationFolder
from bsc.eval.report.coders import ReportedCoder, read_coders, run_labels
from bsc.eval.report.finetuned import ShownChange, read_changes
from bsc.eval.report.interp import Scored, read_interp
from bsc.eval.report.report import drawings
from bsc.eval.report.summary import matched_tables
from bsc.files import csv_text, write_atomically, write_json
from bsc.train.run import Run
from bsc.train.run_config import FinetunedCoder, PlannedCoder
from bsc.typed import Record

__all__ = ["coder_table", "write_figures"]


Line = dict[str, Any]
"""A line of a table: cells by column."""


def coder_table(rows: Sequence[ReportedCoder]) -> list[Line]:
    """One line per coder: what it is, and every figure that is a number or an interval."""
    found = []
    for row in rows:
        planned, coder = row.planned, row.planned.coder
        here = planned if isinstance(planned, (PlannedCoder, FinetunedCoder)) else None
        line: Line = {
            "run": row.run,
            "name": row.name,
            "hookpoint": planned.hookpoint,
            "site": coder.site,
            "select": coder.select,
            "code": coder.code,
            "k": coder.k,
            "seed": planned.seed,
            "n_latents": coder.n_latents,
            "optimiser": here and here.optimiser,
            "lr": here and here.lr,
            "parent": here.parent if isinstance(here, FinetunedCoder) else None,
        }
        left_out = ("ultra", "ablation", "log10_rate_histogram")
        found.append(line | _flat(row.figures, left_out=left_out))
    return found


def _ultra(rows: Sequence[ReportedCoder]) -> list[Line]:
    return [
        {"run": row.run, "coder": row.name} | _flat(latent)
        for row in rows
        for latent in row.figures.ultra
    ]


def _ablation(rows: Sequence[ReportedCoder]) -> list[Line]:
    return [
        {"run": row.run, "coder": row.name, "kind": kind, "bin": i} | _flat(one)
        for row in rows
        if (ablation := row.figures.ablation)
        for kind, bins in (("bins", ablation.bins), ("random", ablation.random))
        for i, one in enumerate(bins)
    ]


def _probing(evaluations: Mapping[str, Evaluation]) -> list[Line]:
    return [
        {"run": label, "set": name, "what": what, "arm": arm, "k": k}
        | _flat(one, left_out=("classes",))
        for label, evaluation in evaluations.items()
        for name, found in evaluation.probing.items()
        for what, arms in (found.coders | found.baselines).items()
        for arm, ks in arms.items()
        for k, one in ks.items()
    ]


def _stability(evaluations: Mapping[str, Evaluation]) -> list[Line]:
    return [
        {"run": label} | _flat(one)
        for label, evaluation in evaluations.items()
        for one in evaluation.stability
    ]


def _interp(found: Sequence[Scored]) -> list[Line]:
    return [
        {
            "run": scored.run,
            "judge": scored.name,
            "score": one.kind,
            "coder": coder,
            "latents_are": weighting,
            "chance": one.chance,
        }
        | _flat(mean)
        for scored in found
        for one in scored.sets
        for coder, means in one.coders.items()
        for weighting, mean in (("unweighted", means.unweighted), ("weighted", means.weighted))
    ]


def _finetuned(found: Sequence[ShownChange]) -> list[Line]:
    """A line for each coder and figure, before and after."""
    return [
        {"run": shown.after, "before": shown.before, "coder": change.coder, "figure": figure}
        | _flat(one)
        for shown in found
        for change in shown.changed.coders
        for figure, one in change.differences()
    ]


def _matched(rows: Sequence[ReportedCoder]) -> list[Line]:
    return [
        {
            "panel": table.panel,
            "run": table.run,
            "seed": table.seed,
            "matched_by": by,
            "at": line.at,
            "figure": figure,
            "other_code": table.other,
            "binary": one.binary,
            "other": one.other,
        }
        for by in ("l0", "bits")
        for table in matched_tables(rows, by)
        for line in table.lines
        for figure, one in (("fvu", line.fvu), ("delta_ce", line.delta_ce))
    ]


def _flat(value: Record, *, left_out: Sequence[str] = ()) -> Line:
    """Intervals as two columns, and small tables as one column for each entry."""
    flat: Line = {}
    for key, one in value.to_json().items():
        if key in left_out:
            continue
        if key.endswith("interval"):
            stem = key.removesuffix("interval")
            flat[f"{stem}low"], flat[f"{stem}high"] = one or ("", "")
        elif isinstance(one, dict):
            flat |= {f"{key}_{k}": v for k, v in one.items()}
        elif isinstance(one, list):
            flat |= {f"{key}_{i}": v for i, v in enumerate(one)}
        else:
            flat[key] = one
    return flat


def write_figures(runs: Sequence[Run], folder: Path) -> Path:
    """Write NAME.svg, NAME.pdf, TABLE.csv and figures.json into a folder, which is made if need be.

    Raises:
        UserError: a run is not evaluated, or the folder cannot be written.
    """
    rows = read_coders(runs)
    interp = read_interp(runs, run_labels(runs), rows)
    labels = run_labels(runs)
    finetuned = read_changes(runs, labels, rows)
    evaluations = {
        label: EvaluationFolder(run).read() for run, label in zip(runs, labels, strict=True)
    }
    tables = {
        "coders": coder_table(rows),
        "matched": _matched(rows),
        "ultra": _ultra(rows),
        "ablation": _ablation(rows),
        "probing": _probing(evaluations),
        "stability": _stability(evaluations),
        "interp": _interp(interp),
        "finetuned": _finetuned(finetuned),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings(runs, rows, interp, finetuned).values():
            drawing.save(folder)
        for name, lines in tables.items():
            if lines:
                write_atomically(folder / f"{name}.csv", csv_text(lines))
        write_json(folder / "figures.json", tables)
    except OSError as error:
        raise UserError(f"--figures {folder}: cannot be written ({error.strerror}).") from None
    return folder
