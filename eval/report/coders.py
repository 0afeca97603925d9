"""What the report shows of each coder: its config, figures, training metrics and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsc.config import parse_config
from bsc.errors import StoreError, UserError
from bsc.files import canonical_json
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run

__all__ = ["CoderRow", "by_panel", "read_rows", "run_labels"]

ALL_CURVE_POINTS = 4_000
"""Of the training curves of all coders together."""


@dataclass(frozen=True)
class CoderRow:
    """One coder."""

    run: str
    name: str
    anchor: str
    """Its id on the page."""
    model: str
    """Which model, where it is not the trained one; else empty."""
    hookpoint: str
    site: str
    select: str
    code: str
    k: int
    seed: int
    optimiser: str
    lr: float
    n_latents: int
    first_binary: int
    """Latents from this one on are binary."""
    figures: dict[str, Any]
    """Of eval.json."""
    variant: str
    """What coders share that differ in k and seed alone: they are one line of a plot."""
    metrics: list[dict[str, Any]]
    """Of metrics.jsonl, thinned."""
    examples: list[dict[str, Any]]
    folder: str
    """Of its weights."""

    @property
    def label(self) -> str:
        """Short name within a panel."""
        return f"{self.code}, k = {self.k}"

    @property
    def panel(self) -> str:
        """What the coders of one panel share."""
        words = [self.hookpoint, self.site.replace("_", " "), f"{self.n_latents:,} latents"]
        return ", ".join([*words, self.model] if self.model else words)


def by_panel(rows: Sequence[CoderRow]) -> dict[str, list[CoderRow]]:
    """Rows grouped by hookpoint, site and width."""
    grouped: dict[str, list[CoderRow]] = {}
    for row in rows:
        grouped.setdefault(row.panel, []).append(row)
    return grouped


def run_labels(runs: Sequence[Run]) -> list[str]:
    """What runs are called on a page: the folder's name, with the folders above where names repeat.

    >>> from pathlib import Path
    >>> run_labels([Run(Path("a/run")), Run(Path("b/run")), Run(Path("b/other"))])
    ['a/run', 'b/run', 'other']
    """
    parts = [run.folder.resolve().parts for run in runs]
    labels = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(p[-depth:] == own[-depth:] for p in parts) > 1:
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels


def read_rows(runs: Sequence[Run]) -> list[CoderRow]:
    """The coders of evaluated runs, in the order of the page.

    Raises:
        UserError: a run is not evaluated, its files do not fit together, or there is no coder.
    """
    found: list[dict[str, Any]] = []
    points = max(20, ALL_CURVE_POINTS // sum(len(run.coder_names()) for run in runs))
    for run, label in zip(runs, run_labels(runs), strict=True):
        try:
            found += _rows_of(run, label, points)
        except (KeyError, TypeError, IndexError) as error:
            raise StoreError(
                f"{run.folder}: config.json, metrics.jsonl, eval.json and eval/examples.json do "
                f"not fit together ({error!r}). One of them was changed; evaluate the run again: "
                f"bsc eval {run.folder}"
            ) from None
    if not found:
        raise UserError("a report needs at least one coder; every coder of these was left out.")
    order = ("model", "hookpoint", "site", "n_latents", "code", "k", "seed", "run", "name")
    found.sort(key=lambda r: tuple(r[key] for key in order))
    return [CoderRow(**row, anchor=f"coder-{i}") for i, row in enumerate(found, 1)]


def _rows_of(run: Run, label: str, points: int) -> list[dict[str, Any]]:
    evaluation, config = run.evaluation(), run.config()
    figures = evaluation["coders"]
    examples = run.examples()
    curves = _curves(run, config["steps"], config["log_every"], points)
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
            {
                "run": label,
                "model": _untrained(config),
                "name": name,
                "folder": f"{label}/coders/{name}",
                "first_binary": parse_config(CoderConfig, coder, str(run.config_path)).first_binary,
                **{key: planned[key] for key in ("hookpoint", "seed", "optimiser", "lr")},
                **{key: coder[key] for key in ("site", "select", "code", "k", "n_latents")},
                "figures": figures[name],
                "variant": label + _without_k_and_seed(planned),
                "metrics": curves.get(name, []),
                "examples": examples.get(name, []),
            }
        )
    return rows


def _without_k_and_seed(planned: dict[str, Any]) -> str:
    varying = ("name", "seed", "k_init", "lr")
    own = {k: v for k, v in planned.items() if k not in (*varying, "coder")}
    coder = {k: v for k, v in planned["coder"].items() if k not in ("k", "k_binary")}
    # Learning rates that follow from k by a rule are no other variant; a sweep over them names it.
    return canonical_json([own, coder, planned["name"].split(f"-s{planned['seed']}")[-1]])


def _untrained(config: dict[str, Any]) -> str:
    seed = config["model"].get("random_weights")
    return "" if seed is None else f"untrained model (seed {seed})"


def _curves(run: Run, steps: int, log_every: int, points: int) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by coder, thinned to about `points` each."""
    keep = max(1, steps // log_every // points)
    curves: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics():
        if line["step"] // log_every % keep == 0 or line["step"] == steps:
            curves.setdefault(line["coder"], []).append({k: line[k] for k in ("rows", "fvu")})
    return curves
