"""Figures of a coder by name, as sums over documents or classes where it has them.

    fvu, kl, delta_ce                   over documents
    fvu_values_removed, delta_ce_values_removed   over documents, of codes with values
    fvu_quantised                       over documents: of the code whose size `bits` is
    probe                               accuracy of a probe on one latent, over classes;
                                        probe:ARM:LATENTS another one
    predictability, overlap             scores without a language model, over latents
    judge:TEST                          score by a judge
    latents_above:RATE, share_of_firings_above:RATE
    ultra:WORD                          latents above 10 % whose diagnosis has the word
    dead_share, non_finite, spike       share of latents that never fire; 1 where training ended in
                                        numbers that are not finite; largest ratio of a training FVU
                                        to the least before it, without the first tenth
    l0, bits, ...                       any other figure of a coder in eval.json

docs/evaluation.md and docs/interp.md define them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsc.array_file import read_arrays
from bsc.errors import ConfigError, StoreError, nearest
from bsc.eval.evaluation import CoderFigures, EvaluationFolder
from bsc.eval.figures.firing import firing_counts
from bsc.eval.finetuned import PROBE
from bsc.eval.interp.scores import InterpFolder, Interpretability, Offline
from bsc.eval.measured_rows import measured_rows
from bsc.study.config import Contrast
from bsc.study.estimates import Sums
from bsc.study.needs import OFFLINE
from bsc.study.subjects import Subject
from bsc.train.run import Run

__all__ = ["Measures", "check_figure", "units_of"]

_DOCUMENTS = {
    "fvu": ("squared_error", "squared_deviation"),
    "fvu_values_removed": ("squared_error_binarised", "squared_deviation"),
    "fvu_quantised": ("squared_error_quantised", "squared_deviation"),
    "kl": ("kl", None),
    "delta_ce": ("nats", None),
    "delta_ce_values_removed": ("nats_binarised", None),
}
_LATENTS = (*OFFLINE, "judge")
_TRAINING = ("non_finite", "spike")
_WITH_WORDS = ("probe", "judge", "latents_above", "share_of_firings_above", "ultra")
_OTHERS = ("dead_share",)
_SPIKE_FROM = 0.1
"""Share of the training after which spikes count: at first the loss does as it likes."""


def units_of(figure: str) -> str:
    """What a figure is a sum over, for people: ``"documents"``, ``"classes"`` or nothing."""
    name = figure.partition(":")[0]
    return "documents" if name in _DOCUMENTS else "classes" if name == "probe" else ""


def check_figure(contrast: Contrast, where: str) -> None:
    """See that there is such a figure, and that what is said of latents is said of their scores.

    Raises:
        ConfigError: it is none.
    """
    for figure in (contrast.figure, contrast.against_figure):
        if figure is not None:
            _check_one(figure, contrast, where)


def _check_one(figure: str, contrast: Contrast, where: str) -> None:
    name, _, word = figure.partition(":")
    plain = [n for n, f in CoderFigures.model_fields.items() if f.annotation in (int, float)]
    known = [*_DOCUMENTS, *_LATENTS, *_TRAINING, *_WITH_WORDS, *_OTHERS, *plain]
    if name not in known or (word and name not in _WITH_WORDS):
        raise ConfigError(
            f"{where}: figure: no figure {figure!r}{nearest(name, known)}; known are "
            f"{', '.join(dict.fromkeys(known))}."
        )
    if name in ("judge", "latents_above", "share_of_firings_above", "ultra") and not word:
        raise ConfigError(f"{where}: figure: {name} needs a word, such as {_EXAMPLES[name]!r}.")
    for option in ("weighted", "ranks", "rates", "unscored", "judge", "against_judge"):
        given = getattr(contrast, option)
        if given not in (None, False) and name not in _LATENTS:
            raise ConfigError(f"{where}: {option}: is for scores of latents, not for {name}.")
        if name != "predictability" and option in ("ranks", "rates", "unscored") and given:
            raise ConfigError(
                f"{where}: {option}: is for predictability, which every latent has; of {name} a "
                f"sample was drawn."
            )


_EXAMPLES = {
    "judge": "judge:fuzzing",
    "latents_above": "latents_above:0.1",
    "share_of_firings_above": "share_of_firings_above:0.1",
    "ultra": "ultra:antipode",
}


class _Measured:
    """What was measured on a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = EvaluationFolder(run)
        self.evaluation = self.folder.read()
        self.scores = InterpFolder(run)
        self._judged: dict[Path, Interpretability] = {}

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return read_arrays(self.folder.documents, self.folder.remedy)

    @cached_property
    def offline(self) -> Offline | None:
        return self.scores.read_offline()

    def judged(self, folder: Path) -> Interpretability:
        if folder not in self._judged:
            self._judged[folder] = self.scores.read(folder)
        return self._judged[folder]

    @cached_property
    def spikes(self) -> dict[str, float]:
        lines: dict[str, list[float]] = {}
        for line in self.run.metrics():
            value = line.get("fvu")
            if value is not None:
                lines.setdefault(line["coder"], []).append(float(value))
        found = {}
        for coder, values in lines.items():
            later = np.array(values[int(len(values) * _SPIKE_FROM) :])
            found[coder] = (
                float((later / np.minimum.accumulate(later)).max()) if len(later) else 1.0
            )
        return found


class Measures:
    """Figures of the coders of a study; files are read once."""

    def __init__(self) -> None:
        self._runs: dict[str, _Measured] = {}

    def _of(self, run: Run) -> _Measured:
        key = str(run.folder)
        if key not in self._runs:
            self._runs[key] = _Measured(run)
        return self._runs[key]

    def sums(self, subject: Subject, contrast: Contrast) -> Sums | None:
        """A figure of a coder; None where it has none: it turned non-finite, or no latent of it has
        a score.

        Raises:
            ConfigError: the code has no such figure, or it was not measured.
            StoreError: the run was not measured, or its files are damaged.
        """
        measured = self._of(subject.run)
        name, _, word = contrast.figure.partition(":")
        out = subject.name in measured.evaluation.left_out
        if name == "non_finite":
            return _one(float(out))
        if out or subject.name not in measured.evaluation.coders:
            return None
        if name == "spike":
            return _one(measured.spikes[subject.name])
        if name in _DOCUMENTS:
            return _over_documents(measured, subject.name, name)
        figures = measured.evaluation.coders[subject.name]
        plain: dict[str, Callable[[], float | int]] = {
            "dead_share": lambda: figures.dead / figures.latents,
            "latents_above": lambda: figures.latents_above[word],
            "share_of_firings_above": lambda: figures.share_of_firings_above[word],
            "ultra": lambda: sum(word in u.what for u in figures.ultra),
        }
        if name in plain:
            try:
                return _one(float(plain[name]()))
            except KeyError:
                known = ", ".join(figures.latents_above)
                raise ConfigError(f"{contrast.figure}: rates are counted above {known}.") from None
        if name == "probe":
            return _probe(measured, subject.name, word)
        if name in _LATENTS:
            return _score(measured, subject, contrast)
        value = getattr(figures, name)
        return None if value is None else _one(float(value))


def _one(value: float) -> Sums:
    return Sums(np.array([value]), np.ones(1))


def _over_documents(measured: _Measured, coder: str, name: str) -> Sums:
    arrays, (above, below) = measured.arrays, _DOCUMENTS[name]
    if name == "fvu_quantised" and f"{coder}/{above}" not in arrays:
        above = "squared_error"  # a binary code has nothing to round
    if f"{coder}/{above}" not in arrays:
        raise ConfigError(
            f"{name}: {coder} has none: its code has no values, or it was evaluated by an earlier "
            f"version of bsc. {measured.folder.remedy}"
        )
    values = arrays[f"{coder}/{above}"].astype(np.float64)
    if above.startswith("nats"):
        values = values - arrays["clean/nats"]
    weights = arrays["predicted" if below is None else f"{coder}/{below}"].astype(np.float64)
    rows = measured_rows(measured.run.config(), measured.evaluation)
    units = rows._replace(rows=0) if below is None else rows  # losses are of whole contexts
    return Sums(values, weights, f"documents of {units}")


def _probe(measured: _Measured, coder: str, word: str) -> Sums:
    arm, _, columns = word.partition(":") if word else (PROBE[0], "", PROBE[1])
    for name, probed in measured.evaluation.probing.items():
        found = probed.coders.get(coder, {}).get(arm, {}).get(columns or PROBE[1])
        if found is not None:
            classes = np.array([found.classes[c] for c in sorted(found.classes)])
            return Sums(classes, np.ones(len(classes)), f"classes of {name}")
    raise ConfigError(f"probe:{word}: {coder} was not probed so. {measured.folder.remedy}")


def _score(measured: _Measured, subject: Subject, contrast: Contrast) -> Sums | None:
    name, _, word = contrast.figure.partition(":")
    scores = measured.scores
    if name == "judge":
        there = [p for p in scores.judged() if contrast.judge in (None, p.name)]
        if len(there) != 1:
            names = ", ".join(p.name for p in scores.judged()) or "none"
            raise ConfigError(
                f"{contrast.figure}: `judge` should name one of the results by a judge of "
                f"{subject.run.folder}: {names}."
            )
        tests = measured.judged(there[0]).coders[subject.name].tests
        if word not in tests:
            raise ConfigError(f"{contrast.figure}: no such test; there are {', '.join(tests)}.")
        means = tests[word]
        chosen = means.weighted if contrast.weighted else means.unweighted
        return None if chosen.mean is None else _one(chosen.mean)
    offline = measured.offline
    if offline is None or subject.name not in offline.coders:
        raise StoreError(
            f"{contrast.figure}: {subject.name} was not scored. `bsc interp {subject.run.folder}`."
        )
    if name == "overlap":
        overlap = offline.coders[subject.name].overlap
        mean = (overlap.weighted if contrast.weighted else overlap.unweighted).mean
        return None if mean is None else _one(mean)
    counts = firing_counts(subject.run, subject.name)
    path = scores.offline / subject.name / "00000.safetensors"
    auc = read_arrays(path, f"`bsc interp {subject.run.folder}` writes it.")["auc"]
    rows = measured.evaluation.coders[subject.name].rows
    return mean_score(auc.astype(np.float64), counts, rows, contrast)


def mean_score(
    score: NDArray[np.float64], counts: NDArray[np.int64], rows: int, contrast: Contrast
) -> Sums | None:
    """Mean score over the latents that a contrast means; None where none of them has one.

    Args:
        score: (F,), NaN of latents without one.
        counts: (F,) firings.
        rows: that were encoded.
        contrast: says which latents, and how they count.
    """
    alive = np.flatnonzero(counts > 0)
    # The most frequent first; of one rate, by number.
    alive = alive[np.argsort(-counts[alive], kind="stable")]
    if contrast.ranks is not None:
        low, high = (round(share * len(alive)) for share in contrast.ranks)
        alive = alive[low:high]
    if contrast.rates is not None:
        rate = counts[alive] / rows
        alive = alive[(rate >= contrast.rates[0]) & (rate <= contrast.rates[1])]
    values = score[alive]
    if contrast.unscored is not None:
        values = np.where(np.isfinite(values), values, contrast.unscored)
    there = np.isfinite(values)
    weights = counts[alive].astype(np.float64) if contrast.weighted else np.ones(len(alive))
    if not there.any():
        return None
    total = weights[there].sum()
    return Sums(np.array([(weights[there] * values[there]).sum() / total]), np.ones(1))
