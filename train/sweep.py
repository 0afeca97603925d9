"""What to train: a sweep of coders from a TOML file, from flags, or both.

A file has run settings at the top and one or more `[[coders]]` tables. In a table every field may
be a list: the table is then the grid of all combinations, each point one coder.

    tokens = 50_000_000

    [[coders]]
    code = ["binary", "continuous"]
    k = [16, 32, 64, 128]
    seed = [0, 1, 2]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from bsc.cache.layout import Hookpoint
from bsc.cache.store import ActivationStore
from bsc.config import Config, parse_config
from bsc.errors import ConfigError
from bsc.train.coders.config import CoderConfig
from bsc.train.optim import Optimiser, default_lr

__all__ = ["PlannedCoder", "SweepPoint", "TrainConfig", "expand", "plan_coders"]

DEFAULT_EXPANSION = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SweepPoint(Config):
    """One coder of a sweep, as a user writes it. What is left out gets the default shown."""

    hookpoint: str | None = None
    """Module whose rows it is trained on; None: one coder for each hookpoint of the store."""
    site: Literal["sae", "transcoder", "skip_transcoder"] = "skip_transcoder"
    select: Literal["topk"] = "topk"
    code: Literal["continuous", "binary"] = "continuous"
    surrogate: Literal["sigmoid"] = "sigmoid"
    temperature: float = Field(default=2.0, gt=0)
    threshold: Literal["learned", "fixed"] = "learned"
    threshold_init: float = Field(default=0.004, gt=0)
    k: int = Field(default=32, ge=1)
    n_latents: int | None = Field(default=None, ge=1)
    """Number of latents; None: 32 times the width of the output."""
    decoder_norm: Literal["unit", "free"] | None = None
    """None: unit for SAEs, free for transcoders."""
    optimiser: Optimiser = "adam"
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Learning rate; None: `default_lr` of the optimiser, the code and the number of latents."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the initial weights. Coders with one seed begin with the same encoder."""

    def coder_config(self, hook: Hookpoint) -> CoderConfig:
        """The maths of this point at a hookpoint.

        Raises:
            ConfigError: the point is not possible there, for example k > n_latents.
        """
        values = {f: getattr(self, f) for f in CoderConfig.model_fields if hasattr(self, f)}
        values["d_in"] = hook.d_out if self.site == "sae" else hook.d_in
        values["d_out"] = hook.d_out
        values["n_latents"] = self.n_latents or DEFAULT_EXPANSION * hook.d_out
        values["decoder_norm"] = self.decoder_norm or ("unit" if self.site == "sae" else "free")
        return parse_config(CoderConfig, values, f"coder at {hook.name}")


class TrainConfig(Config):
    """A training run: the settings that all its coders share, and the coders."""

    store: str | Path = "acts"
    """Folder of the activation store, or its address in object storage."""
    runs: Path = Path("runs")
    """Folder that holds runs."""
    name: str = "run"
    """Name of the run: its folder is runs/name."""
    tokens: int | None = Field(default=None, ge=1)
    """Rows to train on; None: every training row of the store once. More rows are more passes."""
    batch_rows: int = Field(default=2048, ge=1)
    """Rows per step."""
    without_special_tokens: bool = False
    """Leave out the rows of the tokenizer's special tokens, the begin-of-text token included."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of the rows, the same for all coders."""
    normalise: Literal["rms", "none"] = "rms"
    """rms: rows are divided by one number per side, the root mean square of their deviation from
    the mean row, so that step sizes mean the same for every module. Folded into the saved coder."""
    dead_after: int = Field(default=10_000_000, ge=1)
    """Rows without firing after which a latent counts as dead."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    device: str | None = None
    """cpu, cuda, cuda:1; None: a GPU where there is one."""
    coders: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)
    """Tables of `SweepPoint` fields; a list as a value is an axis of the table's grid."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"letters, digits, '.', '_' and '-' make a name, got {name!r}")
        return name

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.runs / self.name


class PlannedCoder(Config):
    """A coder that is about to be trained, with nothing left open."""

    name: str
    """Folder of the coder inside the run's `coders`, unique in the run."""
    hookpoint: str
    coder: CoderConfig
    optimiser: Optimiser
    lr: float
    seed: int


def expand(tables: Iterable[dict[str, Any]], where: str) -> list[SweepPoint]:
    """The points of all tables: within a table every combination of its lists.

    Raises:
        ConfigError: a table has an unknown key or a wrong value.

    >>> [(p.code, p.k) for p in expand([{"code": ["binary", "continuous"], "k": [8, 16]}], "test")]
    [('binary', 8), ('binary', 16), ('continuous', 8), ('continuous', 16)]
    """
    points: list[SweepPoint] = []
    for number, table in enumerate(tables, 1):
        axes = [v if isinstance(v, (list, tuple)) else [v] for v in table.values()]
        if empty := [k for k, axis in zip(table, axes, strict=True) if not axis]:
            raise ConfigError(f"{where}: coders table {number}: {empty[0]} is an empty list.")
        for values in itertools.product(*axes):
            fields = dict(zip(table, values, strict=True))
            points.append(parse_config(SweepPoint, fields, f"{where}: coders table {number}"))
    return list(dict.fromkeys(points))


def plan_coders(points: list[SweepPoint], store: ActivationStore) -> list[PlannedCoder]:
    """Coders with every default filled in, and names that tell them apart.

    Raises:
        ConfigError, StoreError: a point does not fit the store.
    """
    planned = []
    for point in points:
        hooks = [store.hookpoint(point.hookpoint)] if point.hookpoint else store.hookpoints
        for hook in hooks:
            config = point.coder_config(hook)
            lr = point.lr or default_lr(point.optimiser, point.code, config.n_latents)
            planned.append(
                PlannedCoder(
                    name="", hookpoint=hook.name, coder=config, optimiser=point.optimiser,
                    lr=lr, seed=point.seed,
                )
            )  # fmt: skip
    return _named(list(dict.fromkeys(planned)))


_ALWAYS_NAMED = ("site", "code", "k", "seed")


def _named(planned: list[PlannedCoder]) -> list[PlannedCoder]:
    """Name coders by site, code, k and seed, and by whatever else differs among their like."""

    def fields(p: PlannedCoder) -> dict[str, Any]:
        return p.coder.model_dump() | {"optimiser": p.optimiser, "lr": p.lr, "seed": p.seed}

    groups: dict[tuple[Any, ...], list[PlannedCoder]] = {}
    for p in planned:
        key = (p.hookpoint, *(fields(p)[f] for f in _ALWAYS_NAMED))
        groups.setdefault(key, []).append(p)
    named = []
    for p in planned:
        key = (p.hookpoint, *(fields(p)[f] for f in _ALWAYS_NAMED))
        mine = fields(p)
        differ = [
            f for f in mine
            if f not in _ALWAYS_NAMED and len({str(fields(o)[f]) for o in groups[key]}) > 1
        ]  # fmt: skip
        parts = [mine["site"], mine["code"], f"k{mine['k']}", f"s{mine['seed']}"]
        parts += [f"{f}={mine[f]}" for f in differ]
        named.append(p.model_copy(update={"name": f"{p.hookpoint}/{'-'.join(parts)}"}))
    names = [p.name for p in named]
    assert len(set(names)) == len(names)
    return named
