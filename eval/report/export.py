"""`bsc report --figures`: every figure as SVG and PDF, all numbers as CSV and JSON, for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsc.errors import UserError
from bsc.eval.report.coders import CoderRow, read_rows, run_labels
from bsc.eval.report.interp import Scored, read_interp
from bsc.eval.report.report import drawings
from bsc.eval.report.summary import matched_tables
from bsc.files import write_atomically, write_json
from bsc.train.run import Run

__all__ = ["coder_table", "write_figures"]


def coder_table(rows: Sequence[CoderRow]) -> list[dict[str, Any]]:
    """One line per coder: what it is, and every figure that is a number or an interval."""
    found = []
    for row in rows:
        line: dict[str, Any] = {
            key: getattr(row, key)
            for key in ("run", "name", "hookpoint", "site", "select", "code", "k", "seed",
                        "n_latents", "optimiser", "lr")
        }  # fmt: skip
        for key, value in row.figures.items():
            if key.endswith("_interval"):
                low, high = value or ("", "")
                line[key.removesuffix("interval") + "low"] = low
                line[key.removesuffix("interval") + "high"] = high
            elif key in ("latents_above", "share_of_firings_above"):
                line |= {f"{key}_{t}": v for t, v in value.items()}
            elif isinstance(value, (int, float)):
                line[key] = value
        found.append(line)
    return found


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    """Lines of one table; a column for every key that any of them has."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _ultra(rows: Sequence[CoderRow]) -> list[dict[str, Any]]:
    return [
        {"run": row.run, "coder": row.name} | _flat(latent)
        for row in rows
        for latent in row.figures["ultra"]
    ]


def _ablation(rows: Sequence[CoderRow]) -> list[dict[str, Any]]:
    return [
        {"run": row.run, "coder": row.name, "kind": kind, "bin": i} | _flat(one)
        for row in rows
        for kind in ("bins", "random")
        for i, one in enumerate(row.figures.get("ablation", {}).get(kind, []))
    ]


def _probing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {"run": label, "set": name, "what": what, "arm": arm, "k": k}
        | _flat({key: one[key] for key in ("accuracy", "interval")})
        for run, label in zip(runs, run_labels(runs), strict=True)
        for name, found in run.evaluation().get("probing", {}).items()
        for what, arms in (found["coders"] | found["baselines"]).items()
        for arm, ks in arms.items()
        for k, one in ks.items()
    ]


def _stability(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {"run": label} | _flat(one)
        for run, label in zip(runs, run_labels(runs), strict=True)
        for one in run.evaluation().get("stability", [])
    ]


def _interp(found: Sequence[Scored]) -> list[dict[str, Any]]:
    return [
        {"run": scored.run, "judge": scored.name, "score": one.kind, "coder": coder,
         "latents_are": weighting, "chance": one.chance}
        | _flat({k: v for k, v in figures[weighting].items() if k != "curve"})
        for scored in found
        for one in scored.sets
        for coder, figures in one.coders.items()
        for weighting in ("unweighted", "weighted")
        if weighting in figures
    ]  # fmt: skip


def _matched(rows: Sequence[CoderRow]) -> list[dict[str, Any]]:
    return [
        {"panel": table["panel"], "run": table["run"], "seed": table["seed"], "matched_by": by,
         "at": line["at"], "figure": figure, "other_code": table["other"],
         "binary": line[figure]["binary"], "other": line[figure]["other"]}
        for by in ("l0", "bits")
        for table in matched_tables(rows, by)
        for line in table["lines"]
        for figure in ("fvu", "delta_ce")
    ]  # fmt: skip


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """Intervals as two columns, and small tables as one column for each entry."""
    flat: dict[str, Any] = {}
    for key, one in value.items():
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
    rows = read_rows(runs)
    interp = read_interp(runs, run_labels(runs), rows)
    tables = {
        "coders": coder_table(rows), "matched": _matched(rows), "ultra": _ultra(rows),
        "ablation": _ablation(rows), "probing": _probing(runs), "stability": _stability(runs),
        "interp": _interp(interp),
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings(runs, rows, interp).values():
            drawing.save(folder)
        for name, lines in tables.items():
            if lines:
                write_atomically(folder / f"{name}.csv", _csv(lines))
        write_json(folder / "figures.json", tables)
    except OSError as error:
        raise UserError(f"--figures {folder}: cannot be written ({error.strerror}).") from None
    return folder
