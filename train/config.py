"""What to train, as a user writes it: a TOML file, flags, or both. Imports neither torch nor zarr.

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

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from bsc.config import Config
from bsc.counts import parse_count
from bsc.options import CODERS, MACHINE, STEERING, option
from bsc.train.coders.config import CoderChoices
from bsc.train.preset import Preset, run_defaults

__all__ = [
    "OPTIMISERS",
    "Decay",
    "Optimiser",
    "SweepPoint",
    "TrainConfig",
    "parse_lr",
    "plain_name",
]

Optimiser = Literal["adam", "signum", "signum_classic", "muon"]
OPTIMISERS: tuple[Optimiser, ...] = get_args(Optimiser)
Decay = Literal["linear", "none"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RUN, _TRAINING = "The run", "Training"


def parse_lr(text: str) -> float | str:
    """A learning rate as a user writes it.

    Raises:
        ValueError: it is none.

    >>> parse_lr("1e-3"), parse_lr("paper")
    (0.001, 'paper')
    """
    try:
        return text if text == "paper" else float(text)
    except ValueError:
        raise ValueError(f"a number or 'paper', got {text!r}") from None


def plain_name(name: str | None) -> str | None:
    """A name that can be that of a folder.

    Raises:
        ValueError: it cannot.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ValueError(f"letters, digits, '.', '_' and '-' make a name, got {name!r}")
    return name


class SweepPoint(CoderChoices):
    """One coder of a sweep, as a user writes it. What is left out gets the default shown."""

    hookpoint: str | None = option(None, "Hookpoints of the store.", CODERS, shown="every one")
    """Module whose rows it is trained on; None: one coder for each hookpoint of the store."""
    group: str | None = None
    """Put before the names of a table's coders, to tell tables apart."""
    expansion: int = Field(default=32, ge=1)
    """Latents for each channel of the output, where `n_latents` is not given."""
    optimiser: Optimiser = option("adam", "adam, signum, signum_classic, muon.", CODERS)
    lr: Annotated[float, Field(gt=0)] | Literal["paper"] | None = option(
        None,
        "Learning rate, or 'paper'.",
        CODERS,
        shown="by optimiser and code",
        parser=parse_lr,
        metavar="FLOAT",
    )
    """Learning rate; "paper": by the rules of the authors' code; None: by ours, from the optimiser,
    the code and the number of latents."""
    warmup: float | None = Field(default=None, ge=0, le=1)
    """Share of the steps over which the learning rate rises; None: 0.05, 0 for signum."""
    decay: Decay | None = None
    """How it falls afterwards: linear, none; None: linear, none for signum."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Length to which the gradients of the coder together are cut; None: not cut."""
    adam_eps: float | None = Field(default=None, gt=0)
    """Epsilon of Adam, of Muon's for vectors too, which is added to the size of a gradient; None:
    1e-6 / (rows in a step * total variance). Gradients get smaller as batches and modules get
    larger, so that a constant would in the end be all of that size."""
    k_init: int | None = Field(default=None, ge=1)
    """First k; it goes linearly to k over `anneal` of the steps. None: k from the beginning."""
    temperature_init: float | None = Field(default=None, gt=0)
    """First temperature; it goes linearly to the last one over `anneal` of the steps."""
    anneal: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps over which k and the temperature change, where they do."""
    patience: int | None = Field(default=None, ge=1)
    """Held-out evaluations in a row without an FVU 0.1 % lower, after which the coder is done.
    None: it trains to the end."""
    seed: int = option(0, "Seed of the initial weights.", CODERS, ge=0, lt=2**63)
    """Coders with one seed begin with the same encoder."""

    _group = field_validator("group")(plain_name)


class TrainConfig(Config):
    """A training run: the settings that all its coders share, and the coders."""

    store: str | Path = option("acts", "Folder of the activation store, or s3://bucket/path.", _RUN)
    name: str = option("run", "Name of the run.", _RUN, shown="that of the file, or 'run'")
    """Its folder is runs/name."""
    runs: Path = option(Path("runs"), "Folder of runs.", _RUN)
    preset: Preset | None = option(
        None, "'paper': every setting that is not given is the paper's.", _RUN, shown="ours"
    )
    """This goes for the run and for its coders."""
    tokens: int | None = option(
        None, "Rows to train on.", _TRAINING, ge=1, shown="each once", parser=parse_count
    )
    """More rows than the run reads are more passes."""
    batch_rows: int = option(2048, "Rows in a step.", _TRAINING, ge=1, le=2**24, parser=parse_count)
    micro_rows: int | None = option(
        None,
        "Rows worked on at a time.",
        _TRAINING,
        ge=1,
        shown="what memory allows",
        parser=parse_count,
    )
    """A step adds up the gradients of its batch. Bounds the memory, changes nothing but rounding
    (and batch top-k, which selects among these, and `rate_penalty`, which counts among them). None:
    as many as `bsc train --plan` says."""
    seed: int = option(
        0, "Seed of the order of the rows.", _TRAINING, ge=0, lt=2**63, flag="--data-seed"
    )
    """The same order for all coders."""
    without_special_tokens: bool = option(
        False, "Leave out rows of special tokens, BOS included.", _TRAINING
    )
    without_tokens: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = option(
        (), "Ids of further tokens whose rows are left out; several times.", _TRAINING
    )
    normalise: Literal["rms", "none"] = "rms"
    """rms: rows are divided by one number per side, the root mean square of their deviation from
    the mean row, so that step sizes mean the same for every module. Folded into the saved coder."""
    dead_after: int = option(
        10_000_000,
        "Rows without firing that make a latent dead.",
        _TRAINING,
        ge=1,
        parser=parse_count,
    )
    log_every: int = Field(default=20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | None = option(
        None,
        "Steps between held-out evaluations, 0: never.",
        _TRAINING,
        ge=0,
        shown="10 in a run",
    )
    """A multiple of log_every is taken."""
    eval_rows: int = Field(default=4096, ge=1)
    """Held-out rows of such an evaluation: drawn once, the same every time; of a ring the first."""
    check: bool = option(
        True,
        "Whether shards are compared with the store's manifest when they are first read.",
        _TRAINING,
        flag="--check/--no-check",
    )
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the products. Parameters and sums are float32 either way; fp32 is the
    reference."""
    compile: bool = option(False, "torch.compile what gains by it.", _TRAINING)
    """The result differs by rounding alone."""
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints.", STEERING, ge=1, shown="every ten minutes"
    )
    keep_checkpoint: bool = option(
        True,
        "Whether the last one is kept when the run has ended.",
        STEERING,
        flag="--keep-checkpoint/--no-keep-checkpoint",
    )
    """It can be trained on from later."""
    tensorboard: bool = option(
        False, "Write TensorBoard files too.", STEERING, flag="--tensorboard/--no-tensorboard"
    )
    wandb: str | None = option(None, "Project at Weights & Biases.", STEERING)
    device: str | None = option(
        None, "cpu, cuda or cuda:1.", MACHINE, shown="a GPU where there is one"
    )
    coders: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)
    """Tables of `SweepPoint` fields; a list as a value is an axis of the table's grid."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return run_defaults(values.get("preset")) | values
        return values

    _name = field_validator("name")(plain_name)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.runs / self.name
