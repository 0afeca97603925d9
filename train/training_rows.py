"""Which rows a run reads, and the units that they are divided by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bsc.cache.store.kept import MOMENT_ROWS, kept_count, kept_moments
from bsc.cache.store.ring_room import SHARDS_AT_ONCE
from bsc.cache.store.split import Moments
from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError, StoreError
from bsc.tensor_file import write_tensors
from bsc.train.config import TrainConfig
from bsc.train.run_config import PlannedCoder

__all__ = [
    "Scale",
    "left_out_tokens",
    "load_moments",
    "measure_moments",
    "moment_shards",
    "open_bytes",
    "rows_of_a_pass",
    "save_moments",
]


def left_out_tokens(store: ActivationStore, config: TrainConfig) -> tuple[int, ...]:
    """Token ids whose rows a run does not read, in order."""
    special = store.attributes["model"]["special_token_ids"]
    named = {*config.without_tokens, *(special if config.without_special_tokens else ())}
    return tuple(sorted(named))


@dataclass(frozen=True)
class Scale:
    """Means and units of the two sides of a hookpoint, over the rows that a run reads."""

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


def rows_of_a_pass(store: ActivationStore, config: TrainConfig) -> int:
    """Training rows that a run reads before it reads one again (`kept_count`).

    Of a ring all that are to pass: what they are is not known before.

    Raises:
        StoreError: no row is left without the tokens that the run leaves out.
    """
    if store.ring is not None:
        return store.planned_rows
    return kept_count(store.train, left_out_tokens(store, config))


def open_bytes(store: ActivationStore, planned: Sequence[PlannedCoder]) -> int:
    """Bytes of the shards that training has open at a time: a group and the next one.

    Args:
        store: the rows.
        planned: the coders that are trained on them.
    """
    split, room = store.train, store.room
    at_once = SHARDS_AT_ONCE if room is None else room.shards_at_once
    sides = {f"{c.hookpoint}/{side}" for c in planned for side in (c.coder.side, "output")}
    of_one = sum(split.spec(name).shard_bytes(split.grid) for name in sides)
    return min(2 * at_once, split.grid.shards) * of_one


def moment_shards(store: ActivationStore, first: int) -> range:
    """The shards of a ring that means and units are taken from, by a run that begins at `first`.

    The first that it reads: whenever it is started they are the same.
    """
    assert store.room is not None
    wanted = -(-MOMENT_ROWS // store.train.grid.shard_rows)
    return range(first, first + min(wanted, store.room.shards_at_once))


def measure_moments(
    store: ActivationStore, config: TrainConfig, names: Iterable[str], shards: range | None = None
) -> dict[str, Moments]:
    """Means and variances of arrays over the rows that a run reads, by array.

    Args:
        store: the rows.
        config: which of them are left out.
        names: activation arrays.
        shards: that they are taken over; None: all of the store by its sums, or, where tokens are
            left out, shards from the first on until a million rows are kept.
    """
    left_out = left_out_tokens(store, config)
    return {name: kept_moments(store.train, name, left_out, shards) for name in names}


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Write moments to a file, for a run whose first rows will be gone."""
    tensors = {}
    for name, m in moments.items():
        rows = torch.tensor([m.rows], dtype=torch.float64)
        tensors[name] = torch.cat([rows, m.mean, m.variance])
    write_tensors(path, tensors)


def load_moments(path: Path) -> dict[str, Moments]:
    """What `save_moments` wrote.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        found = {}
        for name, values in load_file(path).items():
            mean, variance = values[1:].double().chunk(2)
            if values.ndim != 1 or len(mean) != len(variance) or not values.isfinite().all():
                raise ValueError(f"{name} is not as it should be")
            found[name] = Moments(int(values[0]), mean, variance)
        return found
    except (OSError, ValueError, IndexError, SafetensorError) as error:
        raise StoreError(
            f"{path}: cannot be read ({error}). Without the means of the rows that it began with "
            f"this run cannot go on; train again under another --name."
        ) from None
