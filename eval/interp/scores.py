"""What `bsc interp` leaves on disk, with types; docs/interp.md defines the figures.

RUN/interp/<name>/interp.json      scores by a judge
RUN/interp/<name>/latents.jsonl    of each latent what was shown, the answers, the scores
RUN/interp/offline/offline.json    scores without a language model

Intervals are of 95 %, over latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import Interval
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.judges.facts import JudgeFacts, Parameters
from bsc.progress import console
from bsc.records import parse_json
from bsc.train.run import Run
from bsc.typed import Record, parse_typed, read_typed

__all__ = [
    "INTERP_VERSION",
    "OFFLINE_VERSION",
    "AllMeans",
    "Coverage",
    "InterpFolder",
    "Interpretability",
    "JudgedCoder",
    "JudgedLatent",
    "LatentScore",
    "Mean",
    "Offline",
    "OfflineCoder",
    "OverlapScores",
    "PredictabilityScores",
    "RatePoint",
    "SampledMean",
    "SampledMeans",
    "ShownQuestion",
    "TestScores",
    "Usage",
    "judged_latent",
    "judge_of",
    "judged_latents",
    "read_judged",
    "read_offline",
    "say_what_is_left_out",
]

INTERP_VERSION = 2
OFFLINE_VERSION = 2


class Mean(Record):
    """A mean over latents; None where none has a score."""

    mean: float | None
    interval: Interval


class AllMeans(Record):
    """Means over all latents that have a score, each counted once or by its firing rate."""

    unweighted: Mean
    weighted: Mean


class SampledMean(Mean):
    """A mean over the latents of a sample."""

    latents: int
    """Latents that were scored."""
    sd: float | None
    """Standard deviation between latents."""
    needed: int | None
    """Latents of each of two coders for a difference of 0.02."""
    coverage: float | None = None
    """Share of the population that has a score."""
    bounds: list[float] | None = None
    """What the mean would be, were all the rest wrong or right."""


class RatePoint(Record):
    """Score of all firings of latents up to a rate."""

    rate: float
    score: float
    interval: Interval
    share: float
    """Share of the firings of the population."""


class SampledMeans(Record):
    """Both means of one figure of a coder."""

    unweighted: SampledMean
    weighted: SampledMean
    curve: list[RatePoint] | None = None


class TestScores(SampledMeans):
    """One test of the latents of a coder."""

    __test__ = False  # no class of tests for pytest

    chance: float
    states: dict[str, int]
    """Latents by what came of them."""
    why_not: dict[str, int]
    """Latents without a score by the reason."""
    answers: dict[str, int]
    """Answers by what they were."""
    negatives: dict[str, int] | None = None
    """Fuzzing: latents by what they were tested against."""
    tpr: SampledMeans | None = None
    tnr: SampledMeans | None = None
    f1: SampledMeans | None = None
    auc: SampledMeans | None = None


class JudgedCoder(Record):
    """The scores of a coder by a judge."""

    latents: int
    settings: dict[str, Any]
    """What of the config decides the scores."""
    sampled: dict[str, int]
    """Latents of each sample."""
    census: int
    """Latents of the weighted sample that are in it for sure."""
    too_rare: dict[str, float]
    """Share of the population that fires too seldom to be drawn."""
    explanations: dict[str, int]
    """Latents by the state of their explanation."""
    tests: dict[str, TestScores]


class Usage(Record):
    """What a judge has answered so far."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Interpretability(Record):
    """What interp.json holds."""

    version: int
    prompts: int
    """Version of the prompts."""
    store_id: str
    judge: JudgeFacts
    parameters: Parameters
    """That decide an answer."""
    config: InterpConfig
    power: float
    """Power of the test that `needed` is for."""
    missing_share_for_bounds: float
    coders: dict[str, JudgedCoder]
    usage: Usage
    flags: list[str]
    """What makes the scores doubtful."""


class ShownQuestion(Record):
    """A question to a judge, and what it answered."""

    excerpts: list[list[list[str | bool]]]
    """Runs of each excerpt: text, and whether it is marked."""
    truth: list[int]
    answers: list[int | None]
    reply: str | None


class LatentScore(Record):
    """One test of a latent."""

    state: str
    """``"ok"``, or what kept it from a score."""
    why: str | None = None
    score: float | None
    low: float
    """What the score would be, were all excerpts without an answer judged wrongly."""
    high: float
    excerpts: int
    statuses: dict[str, int]
    """Answers by what they are."""
    noise: float | None = None
    """Standard error of the score from the number of excerpts."""
    accuracy: float | None = None
    tpr: float | None = None
    tnr: float | None = None
    balanced_accuracy: float | None = None
    f1: float | None = None
    auc: float | None = None
    negatives: str | None = None
    """Fuzzing: against ``"silent"`` or ``"active"`` excerpts."""
    questions: list[ShownQuestion] | None = None


class JudgedLatent(Record):
    """A line of latents.jsonl."""

    coder: str
    latent: int
    rate: float
    explanation: str | None
    explanation_state: str
    explained_from: list[list[list[str | bool]]]
    tests: dict[str, LatentScore]


class Coverage(Record):
    """Share of latents and of firings that have a score."""

    unweighted: float
    weighted: float


class PredictabilityScores(Record):
    """How well firing is predicted from n-grams, over all latents that have a score."""

    latents: int
    coverage: Coverage
    auc: AllMeans
    balanced_accuracy: AllMeans


class OverlapScores(SampledMeans):
    """The intruder test by shared tokens."""

    chance: float


class OfflineCoder(Record):
    """The scores of a coder without a language model."""

    settings: dict[str, Any]
    predictability: PredictabilityScores
    overlap: OverlapScores


class Offline(Record):
    """What offline.json holds."""

    version: int
    store_id: str
    coders: dict[str, OfflineCoder]


class InterpFolder:
    """Where the scores of a run are."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def offline(self) -> Path:
        """Folder of the scores without a language model."""
        return self.run.interp_folder / "offline"

    def judged(self) -> list[Path]:
        """Folders of the scores by judges."""
        return sorted(path.parent for path in self.run.interp_folder.glob("*/interp.json"))

    def read(self, folder: Path) -> Interpretability:
        """Scores by a judge.

        Raises:
            StoreError: they are damaged, or not of the run.
        """
        found = read_judged(folder, self._remedy(folder))
        self._check(folder / "interp.json", found.store_id)
        return found

    def read_offline(self) -> Offline | None:
        """Scores without a language model; None where there are none.

        Raises:
            StoreError: they are damaged, or not of the run.
        """
        path = self.offline / "offline.json"
        if not path.exists():
            return None
        found = read_offline(self.offline, self._remedy(self.offline))
        self._check(path, found.store_id)
        return found

    def _remedy(self, folder: Path) -> str:
        return (
            f"`bsc interp {self.run.folder}` makes it again and asks nothing that has an answer; "
            f"or remove {folder}."
        )

    def _check(self, path: Path, store_id: str) -> None:
        if store_id != self.run.config().store_id:
            raise StoreError(f"{path}: of another store than the run. {self._remedy(path.parent)}")


def read_judged(folder: Path, remedy: str = "") -> Interpretability:
    """Scores by a judge, of whatever run.

    Raises:
        StoreError: they are missing or damaged.
    """
    path = folder / "interp.json"
    return read_typed(Interpretability, path, "scores", INTERP_VERSION, remedy)


def judge_of(folder: Path) -> str | None:
    """Whose scores are in a folder, of whatever version; None: nobody's, or they are damaged."""
    try:
        return str(parse_json((folder / "interp.json").read_bytes())["judge"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def say_what_is_left_out(folder: Path, error: UserError) -> None:
    """Say that scores of other coders cannot be kept beside new ones."""
    if any(folder.glob("*.json")):
        console.print(
            f"{error} What it holds of other coders is not kept; score the run without --coders.",
            markup=False,
            highlight=False,
        )


def read_offline(folder: Path, remedy: str = "") -> Offline:
    """Scores without a language model, of whatever run.

    Raises:
        StoreError: they are missing or damaged.
    """
    return read_typed(Offline, folder / "offline.json", "scores", OFFLINE_VERSION, remedy)


def judged_latents(path: Path) -> Iterator[tuple[int, JudgedLatent]]:
    """Lines of latents.jsonl, each with its place in the file; not held in memory.

    Raises:
        StoreError: the file cannot be read, or a line is not of the form that it should have.
    """
    try:
        with path.open("rb") as file:
            place = 0
            for line in file:
                yield place, judged_latent(line, path)
                place += len(line)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read ({error.strerror}). Run `bsc interp` again."
        ) from None


def judged_latent(line: bytes, path: Path) -> JudgedLatent:
    """One line of latents.jsonl.

    Raises:
        StoreError: it is not of the form that it should have.
    """
    remedy = "Run `bsc interp` again."
    try:
        value = parse_json(line)
    except ValueError as error:
        raise StoreError(f"{path}: a line cannot be read as JSON ({error}). {remedy}") from None
    return parse_typed(JudgedLatent, value, path, remedy)
