"""Which rows the figures of a run are of, so that those of others are not taken for the same."""

from __future__ import annotations

from typing import NamedTuple

from bsc.eval.evaluation import Evaluation
from bsc.train.run_config import RunConfig

__all__ = ["MeasuredRows", "measured_rows"]


class MeasuredRows(NamedTuple):
    """What FVU, L0 and dead latents of two runs have to share to be compared."""

    store_id: str
    without_tokens: tuple[int, ...]
    """Rows of these are left out. In the model they stay as they are: losses depend on them too."""
    rows: int
    """The first so many of the others; losses are of contexts, whatever it is."""


def measured_rows(config: RunConfig, evaluation: Evaluation) -> MeasuredRows:
    """The rows of a run's figures."""
    rows = max((figures.rows for figures in evaluation.coders.values()), default=0)
    return MeasuredRows(evaluation.store_id, tuple(sorted(config.without_tokens)), rows)
