"""What the report shows of interpretability: scores by judges, and those without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bsc.eval.interp.config import TESTS
from bsc.eval.interp.judges.facts import JudgeFacts
from bsc.eval.interp.questions import CHANCE
from bsc.eval.interp.scores import (
    AllMeans,
    Coverage,
    InterpFolder,
    Interpretability,
    JudgedLatent,
    Offline,
    OfflineCoder,
    RatePoint,
    SampledMeans,
    judged_latent,
    judged_latents,
)
from bsc.eval.report.coders import ReportedCoder
from bsc.train.run import Run
from bsc.typed import combined

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


class PlainScores(AllMeans):
    """Means over all latents, with what share they are of."""

    coverage: Coverage


class ScoreSet(NamedTuple):
    """One kind of score of the coders of a run."""

    kind: str
    chance: float
    coders: dict[str, PlainScores | SampledMeans]
    """By name."""

    @property
    def title(self) -> str:
        """What it is."""
        return NAMES[self.kind]

    def curve(self, coder: str) -> list[RatePoint]:
        """Score of all firings of latents up to a rate; empty where there is none."""
        found = self.coders.get(coder)
        return (found.curve or []) if isinstance(found, SampledMeans) else []


class Scored(NamedTuple):
    """The scores of a run by one judge, or without any."""

    run: str
    name: str
    """Folder of the results: the judge's name, or ``"offline"``."""
    anchor: str
    result: Interpretability | Offline
    sets: list[ScoreSet]
    latents: list[tuple[ReportedCoder, list[JudgedLatent]]]
    """Some latents of each coder, from the best to the worst score."""

    @property
    def judge(self) -> JudgeFacts | None:
        """About the judge; None: there was none."""
        return self.result.judge if isinstance(self.result, Interpretability) else None

    def caption(self, rows: Sequence[ReportedCoder]) -> str:
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
        said = "Simulated judge" if self.judge.simulated else "Judge"
        return f"{said} {self.judge.model}"


def read_interp(
    runs: Sequence[Run], labels: Sequence[str], rows: Sequence[ReportedCoder]
) -> list[Scored]:
    """The scores of all runs, those of judges first.

    Raises:
        StoreError: files of results are damaged, or not of the run.
    """
    found: list[Scored] = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        own = {row.name: row for row in rows if row.run == label}
        for j, folder in enumerate(InterpFolder(run).judged()):
            result = InterpFolder(run).read(folder)
            coders = {n: result.coders[n] for n in own if n in result.coders}
            kinds = dict.fromkeys(kind for coder in coders.values() for kind in coder.tests)
            sets = [
                ScoreSet(
                    kind,
                    CHANCE[kind],
                    {n: c.tests[kind] for n, c in coders.items() if kind in c.tests},
                )
                for kind in TESTS
                if kind in kinds
            ]
            latents = _latents(folder / "latents.jsonl", [own[n] for n in coders])
            found.append(Scored(label, folder.name, f"interp-{i}-{j}", result, sets, latents))
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        offline = InterpFolder(run).read_offline()
        if offline is not None:
            names = [row.name for row in rows if row.run == label and row.name in offline.coders]
            scores = {n: offline.coders[n] for n in names}
            sets = [
                ScoreSet("predictability", 0.5, {n: _plain(c) for n, c in scores.items()}),
                ScoreSet("overlap", 0.2, {n: c.overlap for n, c in scores.items()}),
            ]
            found.append(Scored(label, "offline", f"offline-{i}", offline, sets, []))
    return found


def _plain(coder: OfflineCoder) -> PlainScores:
    scores = coder.predictability
    return combined(PlainScores, scores.auc, coverage=scores.coverage)


def _latents(
    path: Path, rows: Sequence[ReportedCoder]
) -> list[tuple[ReportedCoder, list[JudgedLatent]]]:
    """Some latents of each coder, evenly from the best score to the worst; the file is not held in
    memory."""
    places: dict[str, list[tuple[float, int]]] = {row.name: [] for row in rows}
    for place, one in judged_latents(path):
        scores = [t.score for t in one.tests.values() if t.score is not None]
        if one.coder in places:
            mean = sum(scores) / len(scores) if scores else -1.0
            places[one.coder].append((mean, place))
    n = max(2, ALL_JUDGED // max(1, len(rows)))
    found = []
    with path.open("rb") as file:
        for row in rows:
            ranked = sorted(places[row.name], key=lambda p: (-p[0], p[1]))
            step = max(1, len(ranked) - 1) / max(1, min(n, len(ranked)) - 1)
            chosen = {round(i * step) for i in range(min(n, len(ranked)))}
            shown = []
            for i in sorted(chosen):
                file.seek(ranked[i][1])
                shown.append(judged_latent(file.readline(), path))
            found.append((row, shown))
    return found
