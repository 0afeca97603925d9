"""What a run's config.json holds: its coders, its settings, its store."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Self

from pydantic import field_validator, model_validator

from bsc.config import Config
from bsc.train.coders.config import CoderConfig
from bsc.train.config import Decay, Optimiser, TrainConfig
from bsc.typed import Record

__all__ = [
    "RUN_VERSION",
    "TORCH_EPS",
    "Completed",
    "Finetuned",
    "FinetunedCoder",
    "PlannedCoder",
    "Pulled",
    "RunCoder",
    "RunConfig",
    "TrainedOn",
]

RUN_VERSION = 2
TORCH_EPS = 1e-8
"""Epsilon of Adam where nothing is said, in torch and in runs from before it was a setting."""
_LONGEST_NAME = 240
"""Bytes: what file systems take."""


class RunCoder(Config):
    """A coder of a run: what it is and where it belongs."""

    name: str
    """Folder of the coder inside the run's `coders`, unique in the run."""
    hookpoint: str
    group: str | None = None
    coder: CoderConfig
    seed: int = 0
    """Seed of its first weights; 0 where others trained it."""

    @field_validator("name", "hookpoint")
    @classmethod
    def _inside(cls, name: str) -> str:
        parts = PurePosixPath(name).parts
        odd = ".." in parts or name[:1] == "/" or not name.isprintable()
        if name and (odd or str(PurePosixPath(name)) != name or len(name.encode()) > _LONGEST_NAME):
            raise ValueError(f"{name!r:.80} is no name")
        return name

    @property
    def but_for_the_seed(self) -> Self:
        """What coders share that differ in their seed alone; of training elsewhere nothing is
        known, so such a coder shares it with none."""
        return self


class PlannedCoder(RunCoder):
    """A coder that is trained here, with nothing left open."""

    optimiser: Optimiser
    lr: float
    warmup: float
    decay: Decay
    clip_norm: float | None
    adam_eps: float | None
    """None: by the scale of the loss, or no Adam. In runs from before it was a setting torch's."""
    k_init: int
    temperature_init: float
    anneal: float
    patience: int | None
    seed: int

    @model_validator(mode="before")
    @classmethod
    def _older(cls, values: Any) -> Any:
        if isinstance(values, dict) and "adam_eps" not in values:
            adam = values.get("optimiser") in ("adam", "muon")
            return values | {"adam_eps": TORCH_EPS if adam else None}
        return values

    @property
    def but_for_the_seed(self) -> Self:
        """What coders share that differ in their seed alone."""
        return self.model_copy(update={"name": "", "seed": 0})


class FinetunedCoder(RunCoder):
    """A coder that was finetuned through the model (bsc.finetuning)."""

    parent: str
    """Name of the coder that it began as, in the run that `Finetuned.run` names."""
    parent_xxh3_128: str
    """Hash of that coder's tensors."""
    parent_kind: str = ""
    """Hash of what that coder shares with those that differ from it in their seed alone."""
    optimiser: Optimiser
    lr: float
    warmup: float
    decay: Decay
    beta1: float = 0.9
    """Of Adam."""
    clip_norm: float | None
    surrogate: str | None
    """Gradient of binary latents; None of continuous coders."""

    @property
    def but_for_the_seed(self) -> Self:
        """What coders share that differ in their seed alone."""
        own = {"name": "", "parent": "", "parent_xxh3_128": "", "seed": 0}
        return self.model_copy(update=own)


class Finetuned(Record):
    """What a run of finetuned coders began as. Where that was imported, so is this."""

    run: str
    """Where the run was whose coders they are."""
    loss: str
    sets: list[list[str]]
    """Coders that are spliced in together."""
    context: int
    """Tokens in a context at most."""
    config: dict[str, Any]
    """Its settings (bsc.finetuning.config)."""


class Completed(Record):
    """How a training ended."""

    at: str
    seconds: float
    rows: int
    """Rows that it was trained on."""


class TrainedOn(Record):
    """The store of the training, where figures are of another (bsc.eval.elsewhere)."""

    store: str
    store_id: str


class Pulled(Record):
    """Where a run came from that `bsc pull` fetched."""

    repository: str
    """owner/name on the hub."""
    commit: str


class RunConfig(Record):
    """What config.json holds: everything that decides the result, nothing left to defaults.

    Of a run that was not trained here what belongs to training is null.
    """

    version: int
    name: str
    store: str
    """Where the store was."""
    store_id: str
    model: dict[str, Any]
    """Identity of the model, as the store has it."""
    rows: int
    """Training rows of the store."""
    rows_of_a_pass: int | None = None
    """Those of them that are read; None: all, or not known."""
    steps: int | None
    batch_rows: int | None
    micro_rows: int | None
    seed: int | None
    normalise: str | None
    without_tokens: list[int]
    """Every token id whose rows are left out."""
    dead_after: int | None
    log_every: int | None
    device: str | None
    rank: int
    world: int
    assigned: dict[str, int]
    """Rank of every coder."""
    config: TrainConfig | None
    coders: list[PlannedCoder | FinetunedCoder | RunCoder]
    versions: dict[str, str]
    started_at: str
    completed: Completed | None = None
    """None: training has not ended."""
    trained_on: TrainedOn | None = None
    imported: bool = False
    """Whether its coders were trained elsewhere (bsc.eval.exports.importing)."""
    finetuned: Finetuned | None = None
    """What its coders were before, if they were finetuned (bsc.finetuning)."""
    pulled: Pulled | None = None
    """Where it came from, if not from this machine: then no checkpoint came with it."""

    @field_validator("coders")
    @classmethod
    def _named(cls, coders: list[RunCoder]) -> list[RunCoder]:
        names = [c.name for c in coders]
        if "" in names or len(set(names)) < len(names):
            raise ValueError("every coder should have a name of its own")
        if within := [n for n in names if any(str(p) in names for p in PurePosixPath(n).parents)]:
            raise ValueError(f"{within[0]!r:.80} lies in the folder of another coder")
        return coders

    def coder(self, name: str) -> RunCoder:
        """The coder of that name."""
        return next(c for c in self.coders if c.name == name)

    @property
    def planned(self) -> list[PlannedCoder]:
        """The coders that are trained here."""
        return [c for c in self.coders if isinstance(c, PlannedCoder)]

    @property
    def going_on(self) -> str:
        """Command that goes on with the run, but for the folder and its rank."""
        return "bsc finetune --resume" if self.finetuned else "bsc train --resume"

    @property
    def hookpoints(self) -> list[str]:
        """Hookpoints of the coders, in their order."""
        return list(dict.fromkeys(c.hookpoint for c in self.coders))
