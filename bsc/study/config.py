"""A study as a user writes it: a TOML file of steps and claims. Imports neither torch nor zarr.

A step is a table `[COMMAND.NAME]`; its keys are the flags of that command (of `train` those of a
sweep's file), and where a command takes the folder of a store or a run, the name of the step that
makes it. A table of cache with `path` alone is a store that was captured before.
A claim is a table `[[claims]]`. docs/study.md has both in full.

    [cache.acts]
    model = "demo"
    tokens = 200_000

    [train.sweep]
    store = "acts"
    coders = [{ code = "continuous", lr = [1e-3, 1e-2], seed = [0, 1, 2] }]

    [eval.figures]
    run = "sweep"

    [[claims]]
    id = "lr"
    words = "The larger step leaves less unexplained."
    figure = "fvu"
    coders = { lr = 1e-2 }
    against = { lr = 1e-3 }
    below = 0

What differs by scale stands in `[scales.NAME]` under a name of its own, and `"$name"` in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from bsc.config import Config, parse_config, read_toml
from bsc.errors import ConfigError, nearest
from bsc.train.config import plain_name

__all__ = [
    "COMMANDS",
    "Bound",
    "Claim",
    "Command",
    "Part",
    "Study",
    "StudyStep",
    "Variant",
    "read_study",
]

Command = Literal["cache", "train", "choose", "finetune", "eval", "interp"]
COMMANDS: tuple[Command, ...] = ("cache", "train", "choose", "finetune", "eval", "interp")
Selection = dict[str, Any]
"""Fields of coders and what they are; a list means any of its values. `run` is a step."""

_CONTRAST = (
    "figure", "against_figure", "coders", "against", "each", "match", "equal", "ratio", "above",
    "below", "within", "weighted", "ranks", "rates", "unscored", "judge", "against_judge",
)  # fmt: skip


class Bound(NamedTuple):
    """What is claimed of an estimate: that it is above, below, or within a value of 0; of a ratio,
    that neither side is more than 1 + the value times the other."""

    kind: Literal["above", "below", "within"]
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


class StudyStep(Config):
    """One command of a study."""

    name: str
    command: Command
    fields: dict[str, Any]
    """Its flags, but for those that the study gives."""


class Contrast(Config):
    """A figure of some coders, less that of others that are like them."""

    figure: str
    """A figure of bsc/study/measures.py, for example ``"fvu"``."""
    against_figure: str | None = None
    """The figure of what it is compared with, where that is another one, such as
    ``"fvu_values_removed"``."""
    coders: Selection
    against: Selection | None = None
    """None: the figure itself, not a difference."""
    each: tuple[str, ...] = ()
    """Fields of coders; each combination of their values is decided for itself."""
    match: tuple[str, ...] | None = None
    """Fields that the two coders of a pair share. None: hookpoint, site, k, n_latents and seed, but
    for those that `coders` or `against` name."""
    equal: Literal["l0", "bits"] | None = None
    """Against the point of equal L0 or bits on the straight line between coders that differ in k,
    over the logarithm, instead of against the coder of the same k."""
    ratio: bool = False
    """Whether it is the ratio of the two that is meant, not their difference."""
    above: float | None = None
    """The claim: it is above this."""
    below: float | None = None
    """The claim: it is below this."""
    within: float | None = Field(default=None, gt=0)
    """The claim: it is at most this far from 0, or, of a ratio, from 1 in either direction."""
    weighted: bool = False
    """Scores of latents: whether each counts by its firings."""
    ranks: tuple[float, float] | None = None
    """Scores of latents: of those from one to another share of all latents that fire, the most
    frequent first. [0, 0.01] are the most frequent hundredth."""
    rates: tuple[float, float] | None = None
    """Scores of latents: of those that fire on so large a share of the rows."""
    unscored: float | None = None
    """Scores of latents: what a latent that fires and has no score counts as. None: left out."""
    judge: str | None = None
    """Scores of latents by a judge: the step that asked it, or None for the only one."""
    against_judge: str | None = None
    """The same of what it is compared with, where that is another one."""

    @model_validator(mode="after")
    def _bounds(self) -> Contrast:
        given = [n for n in ("above", "below", "within") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other")
        if self.ratio and self.against is None:
            raise ValueError("a ratio needs `against`")
        if self.equal and self.against is None:
            raise ValueError("`equal` needs `against`")
        if self.within is not None and self.against is None:
            raise ValueError("`within` needs `against`")
        for side in (self.coders, self.against or {}):
            runs = side.get("run", "")
            many = runs if isinstance(runs, list) else [runs]
            if not all(isinstance(run, str) for run in many):
                raise ValueError(f"run: the name of a step, or a list of them, got {runs!r:.80}")
        for name in ("ranks", "rates"):
            ends = getattr(self, name)
            if ends is not None and not 0 <= ends[0] < ends[1] <= 1:
                raise ValueError(f"{name}: two shares from 0 to 1, got {list(ends)}")
        return self

    @property
    def bound(self) -> Bound | None:
        """What is claimed; None: nothing, the figure is only shown."""
        kinds: tuple[Literal["above", "below", "within"], ...] = ("above", "below", "within")
        given = [Bound(k, v) for k in kinds if (v := getattr(self, k)) is not None]
        return given[0] if given else None


class Variant(Config):
    """The same contrast in another way, to see whether the verdict holds."""

    words: str
    changes: dict[str, Any]


class Part(Contrast):
    """A contrast that a claim is decided by, or that is shown beside it."""

    words: str = ""
    variants: tuple[Variant, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _changes(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("variants"), list):
            values = dict(values)
            values["variants"] = [
                {"words": v.get("words", ""), "changes": {k: v[k] for k in v if k != "words"}}
                if isinstance(v, dict) and "changes" not in v
                else v
                for v in values["variants"]
            ]
        return values

    def changed(self, variant: Variant) -> Part:
        """The contrast of a variant; what it says of coders is added to what the part says.

        Raises:
            ConfigError: it changes what is no field, or to what is none of its values.
        """
        values = {n: getattr(self, n) for n in _CONTRAST}
        for name, value in variant.changes.items():
            if name in ("coders", "against") and isinstance(value, dict):
                value = (values[name] or {}) | value
            values[name] = value
        return parse_config(Part, values, f"variant {variant.words!r}")


class Claim(Config):
    """What the study is to decide."""

    id: str
    words: str
    """The claim, a sentence."""
    note: str = ""
    """What is to be known beside the verdict, such as what stands in for what."""
    some: bool = False
    """Whether one of its decided contrasts is enough, instead of all."""
    parts: tuple[Part, ...] = Field(min_length=1)

    _id = field_validator("id")(plain_name)

    @model_validator(mode="before")
    @classmethod
    def _one_part(cls, values: Any) -> Any:
        """A claim of one part may have its fields."""
        if isinstance(values, dict) and "parts" not in values:
            own = {k: v for k, v in values.items() if k not in ("id", "words", "note", "some")}
            values = {k: v for k, v in values.items() if k not in own} | {"parts": [own]}
        if isinstance(values, dict) and isinstance(values.get("parts"), list):
            where = f"claim {values.get('id', '?')}"
            values = values | {
                "parts": [p if isinstance(p, Part) else parse_config(Part, p, where)
                          for p in values["parts"]]
            }  # fmt: skip
        return values


class Hardware(Config):
    """What a plan reckons with where nothing was measured; every number is an assumption."""

    devices: int = Field(default=1, ge=1)
    """GPUs, or machines, that work at the same time."""
    tflops: float | None = Field(default=None, gt=0)
    """Of one of them in practice. None: what this machine does."""
    price_in: float = Field(default=0.0, ge=0)
    """Of a judge: price of a million tokens of prompts."""
    price_out: float = Field(default=0.0, ge=0)
    judge_seconds: float = Field(default=1.0, gt=0)
    """For an answer of a judge, while as many others are under way as `concurrency` says."""
    disk_rate: float = Field(default=1e9, gt=0)
    """Bytes per second that the disk takes from captures, and gives to trainings."""
    architectures: dict[str, str] = Field(default={})
    """By a model's name a folder with its config.json, for a plan where the hub cannot be reached.
    """


class Study(Config):
    """A study at one scale."""

    name: str
    title: str
    question: str = ""
    scale: str | None
    steps: tuple[StudyStep, ...]
    claims: tuple[Claim, ...]
    hardware: Hardware


_Tables = dict[str, dict[str, Any]]


class _File(Config):
    """The keys of the file."""

    title: str
    question: str = ""
    scales: _Tables = Field(default={})
    cache: _Tables = Field(default={})
    train: _Tables = Field(default={})
    choose: _Tables = Field(default={})
    finetune: _Tables = Field(default={})
    eval: _Tables = Field(default={})
    interp: _Tables = Field(default={})
    claims: tuple[dict[str, Any], ...] = ()
    hardware: dict[str, Any] = Field(default={})


def read_study(path: Path, scale: str | None = None) -> Study:
    """The study in a file, at one of its scales.

    Args:
        path: of the file.
        scale: one of its `[scales]`; None: the first, where it has some.

    Raises:
        ConfigError: it cannot be read, or a key, a scale or the name of a step is wrong.
    """
    file = parse_config(_File, read_toml(path), str(path))
    for name in (path.stem, *file.scales):
        try:
            plain_name(name)
        except ValueError as error:
            what = "its name is that of its folder" if name == path.stem else f"[scales.{name!r}]"
            raise ConfigError(f"{path}: {what}: {error}") from None
    if scale is not None and scale not in file.scales:
        known = ", ".join(file.scales) or "none; leave --scale out"
        raise ConfigError(
            f"--scale {scale}: {path} has no such scale{nearest(scale, file.scales)}; "
            f"it has {known}."
        )
    scale = scale or next(iter(file.scales), None)
    values = dict(file.scales[scale]) if scale else {}
    own = values.pop("hardware", {})
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: [scales.{scale}.hardware]: should be a table, got {own!r:.80}")
    hardware = file.hardware | own
    steps: list[StudyStep] = []
    for command in COMMANDS:
        for name, table in getattr(file, command).items():
            where = f"{path}: [{command}.{name}]"
            if not _here(table, scale, file.scales, where):
                continue
            if name in (s.name for s in steps):
                raise ConfigError(f"{where}: two steps are called {name}; give one another name.")
            try:
                plain_name(name)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from None
            fields = _filled({k: v for k, v in table.items() if k != "scales"}, values, where)
            steps.append(StudyStep(name=name, command=command, fields=fields))
    claims = []
    for number, table in enumerate(file.claims, 1):
        where = f"{path}: claim {table.get('id', number)}"
        if _here(table, scale, file.scales, where):
            table = dict(table)
            if isinstance(table.get("parts"), list):
                table["parts"] = [
                    _but_scales(p)
                    for p in table["parts"]
                    if not isinstance(p, dict) or _here(p, scale, file.scales, where)
                ]
            filled = _filled(_but_scales(table), values, where)
            claims.append(parse_config(Claim, filled, where))
    ids = [c.id for c in claims]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise ConfigError(f"{path}: two claims have the id {twice}.")
    return Study(
        name=path.stem,
        title=file.title,
        question=file.question,
        scale=scale,
        steps=tuple(steps),
        claims=tuple(claims),
        hardware=parse_config(
            Hardware, _filled(hardware, values, f"{path}: [hardware]"), f"{path}: [hardware]"
        ),
    )


def _but_scales(table: Any) -> Any:
    return {k: v for k, v in table.items() if k != "scales"} if isinstance(table, dict) else table


def _here(table: dict[str, Any], scale: str | None, known: Any, where: str) -> bool:
    """Whether a table belongs to the scale: `scales` lists those that it is for.

    Raises:
        ConfigError: it lists what is no scale.
    """
    wanted = table.get("scales")
    if wanted is None:
        return True
    names = wanted if isinstance(wanted, list) else [wanted]
    odd = [str(name) for name in names if str(name) not in known]
    if odd or not isinstance(wanted, list):
        raise ConfigError(
            f"{where}: scales: should be a list of {', '.join(known) or 'none'}, got "
            f"{wanted!r:.80}{nearest(odd[0], known) if odd else ''}"
        )
    return scale in wanted


def _filled(value: Any, values: dict[str, Any], where: str) -> Any:
    """A value with what the scale says in the place of ``"$name"``.

    Raises:
        ConfigError: the scale does not say it.
    """
    if isinstance(value, dict):
        return {name: _filled(one, values, where) for name, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, values, where) for one in value]
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in values:
            raise ConfigError(
                f"{where}: {value}: no such value in [scales]{nearest(value[1:], values)}; it has "
                f"{', '.join(values) or 'none'}."
            )
        return values[value[1:]]
    return value
