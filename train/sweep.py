"""What to train: a sweep of coders from a TOML file, from flags, or both.

A file has run settings at the top and one or more `[[coders]]` tables. In a table every field may
be a list: the table is then the grid of all combinations, each point one coder.

    tokens = 50_000_000

    [[coders]]
    code = ["binary", "continuous"]
    k = [16, 32, 64, 128]
    seed = [0, 1, 2]

    [[coders]]
    group = "wide"              # its coders are named wide-...
    n_latents = 36_864
    k = 64
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bsc.cache.store.layout import Hookpoint
from bsc.cache.store.store import ActivationStore
from bsc.config import Config, parse_config
from bsc.errors import ConfigError
from bsc.train.coders.config import BINARY_ONLY, CoderConfig
from bsc.train.optim import Optimiser
from bsc.train.preset import Preset, coder_defaults, run_defaults
from bsc.train.schedule import Decay, default_decay, default_lr, default_warmup, paper_lr

__all__ = ["PlannedCoder", "SweepPoint", "TrainConfig", "expand", "left_out_tokens",
           "plan_coders"]  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SweepPoint(Config):
    """One coder of a sweep, as a user writes it. What is left out gets the default shown."""

    hookpoint: str | None = None
    """Module whose rows it is trained on; None: one coder for each hookpoint of the store."""
    group: str | None = None
    """Put before the names of a table's coders, to tell tables apart."""
    site: Literal["sae", "transcoder", "skip_transcoder"] = "skip_transcoder"
    select: Literal["topk", "groupmax", "batch_topk"] = "topk"
    code: Literal["continuous", "binary", "hybrid"] = "continuous"
    surrogate: Literal["sigmoid", "identity", "rectangle", "re", "gumbel"] = "sigmoid"
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Temperature of the surrogate; None: 2, and 0.5 for gumbel."""
    gumbel_support: Literal["top4", "full"] = "top4"
    threshold: Literal["learned", "fixed", "newton"] = "learned"
    threshold_init: float = Field(default=0.004, gt=0, allow_inf_nan=False)
    exact_k: bool = False
    k: int = Field(default=32, ge=1)
    k_binary: int | None = Field(default=None, ge=1)
    n_latents: int | None = Field(default=None, ge=1)
    """Number of latents; None: `expansion` times the width of the output."""
    expansion: int = Field(default=32, ge=1)
    """Latents for each channel of the output, where `n_latents` is not given."""
    n_binary: int | None = Field(default=None, ge=1)
    decoder_norm: Literal["unit", "free"] | None = None
    """None: unit for SAEs, free for transcoders."""
    amplitude: Literal["none", "learned"] | None = None
    """None: learned for binary and hybrid coders with unit rows, which cannot express how much a
    latent counts without it; else none."""
    auxk_alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    auxk_k: int | None = Field(default=None, ge=1)
    multi_topk: bool = False
    optimiser: Optimiser = "adam"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["paper"] | None = None
    """Learning rate; "paper": by the rules of the authors' code; None: by ours, from the optimiser,
    the code and the number of latents."""
    warmup: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the learning rate rises; None: 0.05, 0 for signum."""
    decay: Decay | None = None
    """How it falls afterwards: linear, none; None: linear, none for signum."""
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Length to which the gradients of the coder together are cut; None: not cut."""
    k_init: int | None = Field(default=None, ge=1)
    """First k; it goes linearly to k over `anneal` of the steps. None: k from the beginning."""
    temperature_init: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """First temperature; it goes linearly to the last one over `anneal` of the steps."""
    anneal: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps over which k and the temperature change, where they do."""
    patience: int | None = Field(default=None, ge=1)
    """Held-out evaluations in a row without an FVU 0.1 % lower, after which the coder is done.
    None: it trains to the end."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights. Coders with one seed begin with the same encoder."""

    @field_validator("group")
    @classmethod
    def _plain_group(cls, group: str | None) -> str | None:
        if group is not None and not _NAME.fullmatch(group):
            raise ValueError(f"letters, digits, '.', '_' and '-' make a name, got {group!r}")
        return group

    def coder_config(self, hook: Hookpoint) -> CoderConfig:
        """The maths of this point at a hookpoint.

        Raises:
            ConfigError: the point is not possible there, for example k > n_latents.
        """
        values = {f: getattr(self, f) for f in CoderConfig.model_fields if hasattr(self, f)}
        if self.code == "continuous":
            # What it does not read must not tell coders apart: a grid then has it once.
            values = {f: v for f, v in values.items() if f not in BINARY_ONLY}
        values["d_in"] = hook.d_out if self.site == "sae" else hook.d_in
        values["d_out"] = hook.d_out
        values["n_latents"] = self.n_latents or self.expansion * hook.d_out
        norm = self.decoder_norm or ("unit" if self.site == "sae" else "free")
        values["decoder_norm"] = norm
        learned = self.code != "continuous" and norm == "unit"
        values["amplitude"] = self.amplitude or ("learned" if learned else "none")
        return parse_config(CoderConfig, values, f"coder at {hook.name}")

    def planned(self, hook: Hookpoint) -> PlannedCoder:
        """The coder of this point at a hookpoint, with every default filled in but its name.

        Raises:
            ConfigError: the point is not possible there.
        """
        config = self.coder_config(hook)
        if self.k_init is not None and config.select == "groupmax":
            raise ConfigError("k_init: with select='groupmax' k is the number of groups, for good.")
        if self.k_init is not None and self.k_init > config.n_latents:
            raise ConfigError(f"k_init={self.k_init} is more than n_latents={config.n_latents}.")
        if self.lr == "paper":
            lr = paper_lr(self.optimiser, config.code, config.surrogate, config.n_latents)
        else:
            lr = self.lr or default_lr(self.optimiser, config.code, config.n_latents)
        binary = config.code != "continuous"
        return PlannedCoder(
            name="",
            hookpoint=hook.name,
            group=self.group,
            coder=config,
            optimiser=self.optimiser,
            lr=lr,
            warmup=default_warmup(self.optimiser) if self.warmup is None else self.warmup,
            decay=self.decay or default_decay(self.optimiser),
            clip_norm=self.clip_norm,
            k_init=self.k_init or config.k,
            temperature_init=(self.temperature_init if binary else None) or config.temperature,
            anneal=self.anneal,
            patience=self.patience,
            seed=self.seed,
        )


class PlannedCoder(Config):
    """A coder that is about to be trained, with nothing left open."""

    name: str
    """Folder of the coder inside the run's `coders`, unique in the run."""
    hookpoint: str
    group: str | None = None
    coder: CoderConfig
    optimiser: Optimiser
    lr: float
    warmup: float
    decay: Decay
    clip_norm: float | None
    k_init: int
    temperature_init: float
    anneal: float
    patience: int | None
    seed: int


class TrainConfig(Config):
    """A training run: the settings that all its coders share, and the coders."""

    store: str | Path = "acts"
    """Folder of the activation store, or its address in object storage."""
    runs: Path = Path("runs")
    """Folder that holds runs."""
    name: str = "run"
    """Name of the run: its folder is runs/name."""
    preset: Preset | None = None
    """"paper": every setting that is not given is the paper's, of the run and of its coders. None:
    our defaults."""
    tokens: int | None = Field(default=None, ge=1)
    """Rows to train on; None: every training row of the store once. More rows are more passes."""
    batch_rows: int = Field(default=2048, ge=1, le=2**24)
    """Rows per step."""
    micro_rows: int | None = Field(default=None, ge=1)
    """Rows that are worked on at a time; a step adds up the gradients of its batch. Bounds the
    memory, changes nothing but rounding (and batch top-k, which selects among these). None: as many
    as `bsc train --plan` says."""
    without_special_tokens: bool = False
    """Leave out the rows of the tokenizer's special tokens, the begin-of-text token included."""
    without_tokens: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Ids of further tokens whose rows are left out."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of the rows, the same for all coders."""
    normalise: Literal["rms", "none"] = "rms"
    """rms: rows are divided by one number per side, the root mean square of their deviation from
    the mean row, so that step sizes mean the same for every module. Folded into the saved coder."""
    dead_after: int = Field(default=10_000_000, ge=1)
    """Rows without firing after which a latent counts as dead."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = Field(default=None, ge=0)
    """Steps between evaluations on held-out rows; a multiple of log_every is taken. 0: never. None:
    ten in a run."""
    eval_rows: int = Field(default=4096, ge=1)
    """Held-out rows of such an evaluation: the first of the store's held-out split."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None: every ten minutes."""
    keep_checkpoint: bool = True
    """Whether the last checkpoint stays when the run has ended, to train on from it later."""
    check: bool = True
    """Whether shards are compared with the store's manifest when they are first read."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the products; parameters and sums are float32 either way. fp32 is the reference."""
    compile: bool = False
    """torch.compile what gains by it. The result differs by rounding alone."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run's folder."""
    wandb: str | None = None
    """Project at Weights & Biases that the metrics go to; None: none."""
    device: str | None = None
    """cpu, cuda, cuda:1; None: a GPU where there is one."""
    coders: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)
    """Tables of `SweepPoint` fields; a list as a value is an axis of the table's grid."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return run_defaults(values.get("preset")) | values
        return values

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


def expand(
    tables: Iterable[dict[str, Any]], where: str, preset: Preset | None = None
) -> list[SweepPoint]:
    """The points of all tables: within a table every combination of its lists.

    Args:
        tables: fields of `SweepPoint`, or lists of them.
        where: what the tables come from, for messages.
        preset: what stands in the place of the defaults (train/preset.py).

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
            fields = coder_defaults(preset, fields) | fields
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
        planned += [point.planned(hook) for hook in hooks]
    return _named(list(dict.fromkeys(planned)))


_LONGEST_NAME = 200
_ALWAYS_NAMED = ("group", "site", "code", "k", "seed")
_NEVER_NAMED = ("name", "hookpoint", "coder", "d_in", "d_out", *_ALWAYS_NAMED)


def _named(planned: list[PlannedCoder]) -> list[PlannedCoder]:
    """Name coders by group, site, code, k and seed, and by what else differs among their like.

    Raises:
        ConfigError: two coders would have one name.
    """

    def fields(p: PlannedCoder) -> dict[str, Any]:
        found = p.coder.model_dump() | p.model_dump()
        for first, last in (("k_init", "k"), ("temperature_init", "temperature")):
            if found[first] == found[last]:
                found[first] = None  # it does not change
        return found

    def key(mine: dict[str, Any]) -> tuple[Any, ...]:
        return (mine["hookpoint"], *(mine[f] for f in _ALWAYS_NAMED))

    every = [fields(p) for p in planned]
    seen: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for mine in every:
        values = seen.setdefault(key(mine), {})
        for f, v in mine.items():
            values.setdefault(f, set()).add(str(v))
    named = []
    for p, mine in zip(planned, every, strict=True):
        like = seen[key(mine)]
        parts = [mine["group"]] if mine["group"] else []
        parts += [mine["site"], mine["code"], f"k{mine['k']}", f"s{mine['seed']}"]
        parts += [f"{f}={mine[f]}" for f in mine if f not in _NEVER_NAMED and len(like[f]) > 1]
        named.append(p.model_copy(update={"name": f"{p.hookpoint}/{'-'.join(parts)}"}))
    names = [p.name for p in named]
    if long := [n for n in names if max(map(len, n.split("/"))) > _LONGEST_NAME]:
        raise ConfigError(
            f"a coder would be called {long[0]}, which is too long for a folder. Divide its table, "
            f"so that fewer fields differ in each, or give a shorter group."
        )
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"two coders would be called {twice[0]}. Give their tables a `group`.")
    return named


def left_out_tokens(store: ActivationStore, config: TrainConfig) -> tuple[int, ...]:
    """Token ids whose rows a run does not read, in order."""
    special = store.attributes["model"]["special_token_ids"]
    named = {*config.without_tokens, *(special if config.without_special_tokens else ())}
    return tuple(sorted(named))
