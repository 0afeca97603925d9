"""What the report shows of interpretability: scores by judges, and those without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bsc.errors import StoreError
from bsc.eval.interp.offline import OFFLINE_VERSION
from bsc.eval.interp.questions import CHANCE
from bsc.eval.interp.results import INTERP_VERSION
from bsc.eval.report.coders import CoderRow
from bsc.records import parse_json, read_record
from bsc.train.run import Run

__all__ = ["Scored", "ScoreSet", "read_interp"]

ALL_JUDGED = 48
"""Latents of all coders together whose questions and answers are on the page, for each judge."""
NAMES = {
    "detection": "detection, balanced accuracy",
    "fuzzing": "fuzzing, balanced accuracy",
    "intruder": "intruder, accuracy",
    "predictability": "predictability, AUC",
    "overlap": "overlap, accuracy",
}


class ScoreSet(NamedTuple):
    """One kind of score of the coders of a run."""

    kind: str
    chance: float
    coders: dict[str, dict[str, Any]]
    """By name: unweighted and weighted, each with mean and interval, perhaps coverage, bounds, and
    a curve."""

    @property
    def title(self) -> str:
        """What it is."""
        return NAMES[self.kind]


class Scored(NamedTuple):
    """The scores of a run by one judge, or without any."""

    run: str
    name: str
    """Folder of the results: the judge's name, or ``"offline"``."""
    anchor: str
    result: dict[str, Any]
    sets: list[ScoreSet]
    latents: list[tuple[CoderRow, list[dict[str, Any]]]]
    """Some latents of each coder, from the best to the worst score."""

    @property
    def judge(self) -> dict[str, Any] | None:
        """About the judge; None: there was none."""
        return self.result.get("judge")

    def caption(self, rows: Sequence[CoderRow]) -> str:
        """What the figure of the means shows, by how many k there are."""
        scored = {name for one in self.sets for name in one.coders}
        ks = {row.k for row in rows if row.run == self.run and row.name in scored}
        if len(ks) == 1:
            return (
                "Means over latents, full marks unweighted, open ones weighted by firing rate, "
                "with their 95 % intervals over latents."
            )
        return (
            "Means over latents against k: solid lines unweighted, dashed ones weighted by "
            "firing rate."
        )

    @property
    def heading(self) -> str:
        """What the scores are by."""
        if self.judge is None:
            return "Without a language model"
        said = "Simulated judge" if self.judge["simulated"] else "Judge"
        return f"{said} {self.judge['model']}"


def read_interp(
    runs: Sequence[Run], labels: Sequence[str], rows: Sequence[CoderRow]
) -> list[Scored]:
    """The scores of all runs, those of judges first.

    Raises:
        StoreError: files of results are damaged, or not of the run.
    """
    found: list[Scored] = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        own = {row.name: row for row in rows if row.run == label}
        folders = sorted(run.interp_folder.glob("*/interp.json"))
        for j, path in enumerate(folders):
            result = _read(path, run, INTERP_VERSION)
            names = [n for n in own if n in result["coders"]]
            kinds = list(dict.fromkeys(k for n in names for k in result["coders"][n]["tests"]))
            sets = [
                ScoreSet(kind, CHANCE[kind], {
                    n: result["coders"][n]["tests"][kind]
                    for n in names if kind in result["coders"][n]["tests"]
                })
                for kind in kinds
            ]  # fmt: skip
            latents = _latents(path.parent / "latents.jsonl", [own[n] for n in names])
            found.append(Scored(label, path.parent.name, f"interp-{i}-{j}", result, sets, latents))
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        path = run.interp_folder / "offline" / "offline.json"
        if path.exists():
            own = {row.name: row for row in rows if row.run == label}
            result = _read(path, run, OFFLINE_VERSION)
            coders = {n: result["coders"][n] for n in own if n in result["coders"]}
            sets = [
                ScoreSet("predictability", 0.5, {
                    n: c["predictability"]["auc"] | {"coverage": c["predictability"]["coverage"]}
                    for n, c in coders.items()
                }),
                ScoreSet("overlap", 0.2, {n: c["overlap"] for n, c in coders.items()}),
            ]  # fmt: skip
            found.append(Scored(label, "offline", f"offline-{i}", result, sets, []))
    return found


def _read(path: Path, run: Run, version: int) -> dict[str, Any]:
    remedy = (
        f"`bsc interp {run.folder}` makes it again and asks nothing that has an answer; or remove "
        f"{path.parent}."
    )
    result = read_record(path, "scores", version, remedy)
    if result.get("store_id") != run.config()["store_id"]:
        raise StoreError(f"{path}: of another store than the run. {remedy}")
    return result


def _latents(path: Path, rows: Sequence[CoderRow]) -> list[tuple[CoderRow, list[dict[str, Any]]]]:
    """Some latents of each coder, evenly from the best score to the worst; the file is not held in
    memory."""
    places: dict[str, list[tuple[float, int]]] = {row.name: [] for row in rows}
    found = []
    try:
        with path.open("rb") as file:
            place = 0
            for line in file:
                one = parse_json(line)
                scores = [t["score"] for t in one["tests"].values() if t["score"] is not None]
                if one["coder"] in places:
                    mean = sum(scores) / len(scores) if scores else -1.0
                    places[one["coder"]].append((mean, place))
                place += len(line)
            n = max(2, ALL_JUDGED // max(1, len(rows)))
            for row in rows:
                ranked = sorted(places[row.name], key=lambda p: (-p[0], p[1]))
                step = max(1, len(ranked) - 1) / max(1, min(n, len(ranked)) - 1)
                chosen = {round(i * step) for i in range(min(n, len(ranked)))}
                shown = []
                for i in sorted(chosen):
                    file.seek(ranked[i][1])
                    shown.append(parse_json(file.readline()))
                found.append((row, shown))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: cannot be read ({error!r}). Run `bsc interp` again.") from None
    return found
