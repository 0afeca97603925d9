"""How often the verdicts of a study are right, on simulated studies whose answer is known.

    python -m benchmarks.bench_verdicts [--studies 2000] [--json PATH]

A study has coders of three seeds, four pairs of each, on 28 documents of unequal length. Documents
differ in what they are, for all coders alike, and in what they make of the effect; so do seeds, and
every coder on every document. Of each spread: how often the interval holds an effect of 0, how
often a claim that is at its bound is said to hold and not to hold, and how often an effect of the
size that `resolution` gives is decided. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from bsc.study.config import Bound
from bsc.study.estimates import Estimate, Sums, decide, estimate, resolution

__all__ = ["SPREADS", "simulated"]

SEEDS, PAIRS, DOCUMENTS = 3, 4, 28
SPREADS = {
    "documents": {"of_document": 0.2, "of_seed": 0.0, "noise": 0.05},
    "seeds": {"of_document": 0.0, "of_seed": 0.05, "noise": 0.001},
    "both": {"of_document": 0.05, "of_seed": 0.05, "noise": 0.05},
}
"""Standard deviations of the effect over documents and over seeds, and of every figure."""


def simulated(
    rng: np.random.Generator, effect: float, *, of_document: float, of_seed: float, noise: float
) -> Estimate:
    """One contrast of a study."""
    weights = np.exp(rng.normal(0, 1, DOCUMENTS)) * 1000
    hard, change = rng.normal(0, 0.3, DOCUMENTS), rng.normal(0, of_document, DOCUMENTS)
    first: list[list[Sums]] = []
    against: list[list[Sums]] = []
    for _ in range(SEEDS):
        shift = rng.normal(0, of_seed)
        draws = rng.normal(0, noise, (2, PAIRS, DOCUMENTS))
        first.append([Sums(weights * (1 + hard + effect + change + shift + d), weights)
                      for d in draws[0]])  # fmt: skip
        against.append([Sums(weights * (1 + hard + d), weights) for d in draws[1]])
    return estimate(first, against)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng, above = np.random.default_rng(0), [Bound("above", 0.0)]
    found = {}
    for name, spread in SPREADS.items():
        null = [simulated(rng, 0.0, **spread) for _ in range(arguments.studies)]
        sizes = [r for e in null if (r := resolution(e)) is not None]
        effect = float(np.sqrt(np.mean(np.square(sizes))))
        real = [simulated(rng, effect, **spread) for _ in range(arguments.studies)]
        verdicts = [decide([e], above) for e in null]
        found[name] = {
            "coverage": float(np.mean([(i := e.interval()) and i[0] < 0 < i[1] for e in null])),
            "holds at the bound": verdicts.count("holds") / len(verdicts),
            "does not hold at the bound": verdicts.count("does not hold") / len(verdicts),
            "effect": effect,
            "decided": float(np.mean([decide([e], above) == "holds" for e in real])),
        }
        print(name, *(f"{key} {value:.3f}" for key, value in found[name].items()), sep="; ")
    result = {"studies": arguments.studies, "results": found}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
