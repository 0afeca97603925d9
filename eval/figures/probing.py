"""Sparse probing: how much of a labelled class a few latents tell.

SAEBench's recipe (Karvonen et al. 2025, arXiv:2503.09532): for each class one against the rest,
balanced; a text's features are the mean of its tokens' codes; the k latents with the largest
absolute difference of class means on the training texts; a logistic regression on them (L2, C = 1,
features as they are); accuracy on test texts; mean over classes. The same on the raw channels is
the baseline.

Unscaled features make the strength of the regularisation depend on a latent's scale, which would
set binary and continuous codes apart for no reason. So a second arm standardises features by the
training texts and, for means, chooses C by cross-validation; it also takes the maximum over tokens
and the last token. Multiplying latents by constants changes nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from bsc.errors import UserError
from bsc.eval.evaluation import Accuracy, Probes, Probing
from bsc.eval.figures.intervals import value_interval
from bsc.eval.figures.labelled import LabelledTexts
from bsc.eval.figures.pooling import POOLINGS, Features, pooled_codes
from bsc.eval.passes.setting import Setting
from bsc.progress import stage

__all__ = [
    "KS",
    "ProbeSplit",
    "class_splits",
    "probe",
    "probing_figures",
]

KS = (1, 2, 5)
LENGTH = 128
"""Tokens of a text that are read."""
MAX_TRAIN, MAX_TEST = 2_000, 500
"""Texts of a class on each side of a split, and as many of the other classes."""
_CS = (0.1, 1.0, 10.0)
_TEST_SHARE = 0.3


class ProbeSplit(NamedTuple):
    """Texts of one class and of the others, balanced: indices into the set, and 0 or 1."""

    train: NDArray[np.int64]
    train_label: NDArray[np.int64]
    test: NDArray[np.int64]
    test_label: NDArray[np.int64]


def class_splits(
    labelled: LabelledTexts, *, max_train: int = MAX_TRAIN, max_test: int = MAX_TEST, seed: int = 0
) -> dict[str, ProbeSplit]:
    """One-against-the-rest splits of every class.

    A group of texts, whatever their labels, is on one side for every class. Others are drawn evenly
    from the other classes.
    """
    labels, groups = np.array(labelled.labels), np.array(labelled.groups)
    rng = np.random.Generator(np.random.Philox(key=seed))
    side = _test_side(labels, groups, rng)
    splits = {}
    for label in labelled.classes:
        parts = []
        for on_test, most in ((False, max_train), (True, max_test)):
            positive = rng.permutation(np.flatnonzero((labels == label) & (side == on_test)))
            others = [
                rng.permutation(np.flatnonzero((labels == o) & (side == on_test)))
                for o in labelled.classes
                if o != label
            ]
            # Round after round one of each other class, until there are enough.
            longest = max(len(o) for o in others)
            negative = np.array([o[i] for i in range(longest) for o in others if i < len(o)])
            n = min(most, len(positive), len(negative))
            parts += [np.concatenate([positive[:n], negative[:n]]), np.repeat([1, 0], n)]
        splits[label] = ProbeSplit(*parts)
    return splits


def _test_side(
    labels: NDArray[np.str_], groups: NDArray[np.str_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which texts are tested on: whole groups, about `_TEST_SHARE` of every class.

    Raises:
        UserError: a class cannot be on both sides, for all its texts are of one group.
    """
    names, group = np.unique(groups, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    size = np.zeros((len(names), len(classes)), np.int64)
    np.add.at(size, (group, label), 1)
    total, test = size.sum(axis=0), np.zeros(len(classes), np.int64)
    chosen = np.zeros(len(names), bool)
    for g in rng.permutation(len(names)):
        wanted = (size[g] > 0) & (test < _TEST_SHARE * total)
        if wanted.any() and (test + size[g] <= (_TEST_SHARE + 0.1) * total).all():
            chosen[g] = True
            test += size[g]
    for c in np.flatnonzero(test == 0):  # its groups are all large: the smallest one
        own = np.flatnonzero((size[:, c] > 0) & (size[:, c] < total[c]))
        own = own[((test + size[own]) < total).all(axis=1)]
        if len(own) == 0:
            raise UserError(
                f"--probe: the texts of label {classes[c]!r} are of too few groups to train on "
                f"some and to test on others."
            )
        g = own[np.argmin(size[own, c])]
        chosen[g] = True
        test += size[g]
    return chosen[group]


def _moments(x: sparse.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = np.asarray(x.mean(axis=0)).ravel()
    square = np.asarray(x.multiply(x).mean(axis=0)).ravel()
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _fit(
    x: sparse.csr_matrix, split: ProbeSplit, k: int | None, *, scaled: bool, choose: bool
) -> float:
    """Test accuracy of a probe on the k best columns of the training texts, or on all of them."""
    train, label = x[split.train], split.train_label
    positive, negative = train[label == 1], train[label == 0]
    difference = np.abs(_moments(positive)[0] - _moments(negative)[0])
    mean, deviation = _moments(train)
    if scaled:
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.where(deviation > 1e-12, difference / deviation, 0.0)
    best = np.argsort(-difference, kind="stable")[: x.shape[1] if k is None else k]
    a, b = (np.asarray(m[:, best].todense()) for m in (train, x[split.test]))
    if scaled:
        safe = np.where(deviation[best] > 1e-12, deviation[best], 1.0)
        a, b = (a - mean[best]) / safe, (b - mean[best]) / safe
    strength = _best_strength(a, label) if choose and len(label) >= 12 else 1.0
    return _accuracy(a, label, b, split.test_label, strength)


def _accuracy(
    train: NDArray[np.float64],
    train_label: NDArray[np.int64],
    test: NDArray[np.float64],
    test_label: NDArray[np.int64],
    strength: float,
) -> float:
    # The inputs are our own: checking them takes longer than fitting them.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        regression = LogisticRegression(C=strength, max_iter=1000, solver="newton-cholesky")
        return float(regression.fit(train, train_label).score(test, test_label))


def _best_strength(x: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """C with the best accuracy in three folds of the training texts; of equal ones the smallest."""
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(x, label))
    scores = [
        np.mean([_accuracy(x[a], label[a], x[b], label[b], strength) for a, b in folds])
        for strength in _CS
    ]
    return _CS[int(np.argmax(scores))]


def probe(features: Features, splits: Mapping[str, ProbeSplit], *, full: bool = False) -> Probes:
    """Accuracies of probes on one set of features, mean over classes.

    Args:
        features: by pooling.
        splits: by class.
        full: also a probe on all columns (standardised means, C by cross-validation).

    Returns:
        By arm, ``"sae_bench"`` (means as they are, C = 1) and ``"mean"``, ``"max"``, ``"last"``
        (standardised): by k the accuracy, its interval over classes (None below eight of them) and
        the accuracy of each class.
    """
    arms: Probes = {}
    plan = [("sae_bench", "mean", False, False)]
    plan += [(pooling, pooling, True, pooling == "mean") for pooling in POOLINGS]
    for arm, pooling, scaled, choose in plan:
        ks: list[int | None] = [*KS, *([None] if full and arm == "mean" else [])]
        for k in ks:
            by_class = {
                label: _fit(features[pooling], split, k, scaled=scaled, choose=choose)
                for label, split in splits.items()
            }
            values = np.array(list(by_class.values()))
            arms.setdefault(arm, {})["all" if k is None else str(k)] = Accuracy(
                accuracy=float(values.mean()),
                interval=value_interval(values),
                classes=by_class,
            )
    return arms


def probing_figures(
    setting: Setting, sets: Sequence[LabelledTexts], max_texts: int
) -> dict[str, Probing]:
    """Sparse probing on every labelled set."""
    found = {}
    for labelled in sets:
        chosen = at_most(labelled, max_texts)
        splits = class_splits(chosen)
        coders = {n: (setting.hookpoint(n), c) for n, c in setting.coders.items()}
        with stage(f"probe {labelled.name}", len(coders) + 1, "coders") as progress:
            length = min(LENGTH, setting.store.context, setting.lm.context)
            features, channels = pooled_codes(
                setting.lm, chosen.texts, coders,
                without_tokens=setting.without_tokens, length=length,
            )  # fmt: skip
            progress.advance(1)
            accuracies = {}
            for name, own in features.items():
                accuracies[name] = probe(own, splits)
                progress.advance(1, name)
            baselines = {side: probe(own, splits, full=True) for side, own in channels.items()}
        found[labelled.name] = Probing(
            classes=chosen.classes,
            texts=len(chosen.texts),
            tokens=length,
            train=[f(len(s.train) for s in splits.values()) for f in (min, max)],
            test=[f(len(s.test) for s in splits.values()) for f in (min, max)],
            coders=accuracies,
            baselines=baselines,
        )
    return found


def at_most(labelled: LabelledTexts, n: int) -> LabelledTexts:
    """At most n texts of each class, evenly from all of its texts."""
    kept: list[int] = []
    labels = np.array(labelled.labels)
    for label in labelled.classes:
        own = np.flatnonzero(labels == label)
        kept += own[np.linspace(0, len(own) - 1, min(n, len(own))).round().astype(int)].tolist()
    return LabelledTexts(
        labelled.name,
        *([column[i] for i in sorted(kept)] for column in labelled[1:]),
    )
