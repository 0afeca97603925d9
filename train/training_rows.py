"""Which rows a run reads, and the units that they are divided by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bsc.cache.store.split import Moments
from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError
from bsc.train.config import TrainConfig

__all__ = ["Scale", "left_out_tokens"]


def left_out_tokens(store: ActivationStore, config: TrainConfig) -> tuple[int, ...]:
    """Token ids whose rows a run does not read, in order."""
    special = store.attributes["model"]["special_token_ids"]
    named = {*config.without_tokens, *(special if config.without_special_tokens else ())}
    return tuple(sorted(named))


@dataclass(frozen=True)
class Scale:
    """Means and units of the two sides of a hookpoint, from the sums of the store."""

    x: float
    y: float
    mean_x: Tensor
    mean_y: Tensor
    variance_y: float
    """Total variance of the targets in their unit: what errors are divided by."""

    @classmethod
    def of(cls, hook: str, x: Moments, y: Moments, normalise: str) -> Scale:
        """From the moments of the two arrays; units are 1 unless `normalise` is ``"rms"``.

        Raises:
            ConfigError: the rows are all the same.
        """
        units = [
            (m.total_variance / len(m.mean)) ** 0.5 if normalise == "rms" else 1.0 for m in (x, y)
        ]
        if not all(units) or y.total_variance == 0:
            raise ConfigError(f"{hook}: its rows are all the same, so nothing can be learned.")
        return cls(
            units[0],
            units[1],
            x.mean / units[0],
            y.mean / units[1],
            y.total_variance / units[1] ** 2,
        )
