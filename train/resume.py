"""Going on with a run: after a kill, with more tokens, or with more coders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config
from bsc.errors import ConfigError, StoreError, UserError, nearest
from bsc.progress import console
from bsc.train.checkpoint import load_checkpoint
from bsc.train.config import SweepPoint, TrainConfig
from bsc.train.job import Job, make_job, run_length
from bsc.train.loop import CoderSummary
from bsc.train.ranks import merge_parts, part_of
from bsc.train.run import Run
from bsc.train.run_config import TORCH_EPS, PlannedCoder, RunConfig
from bsc.train.sweep import expand, plan_coders
from bsc.train.trainer import run_job

__all__ = ["resume"]

_FREE = frozenset(
    {
        "check",
        "device",
        "checkpoint_every",
        "keep_checkpoint",
        "tensorboard",
        "wandb",
        "runs",
        "name",
        "store",
    }
)
"""Settings that change nothing in the result."""


def resume(
    folder: str | Path,
    changes: dict[str, Any] | None = None,
    *,
    where: str = "bsc train --resume",
    add_coders: bool = False,
    rank: int = 0,
    world: int = 1,
    ended: bool = False,
) -> tuple[Run, list[CoderSummary]]:
    """Go on with a run from its last checkpoint, or from the beginning where it has none.

    On a CPU with as many threads the result is the same bytes as that of a run that was never
    interrupted.

    Args:
        folder: of the run.
        changes: fields of `TrainConfig` that the user gave again. They must be those of the run,
            but for `tokens`, which may grow, and for settings that change nothing in the result.
        where: what the changes come from, for messages.
        add_coders: whether `changes["coders"]` are new ones, which begin where the run is.
        rank: of this process.
        world: number of processes, as it was.
        ended: whether a run that has ended is nothing to complain of.

    Returns:
        The run, and the last training figures of every coder of this process.

    Raises:
        UserError: the run cannot be resumed, or not like this. Nothing is changed then.
    """
    run = Run(Path(folder).resolve())
    record = _record(run, folder, part_of(run, rank, world), world)
    planned = record.planned
    changes = dict(changes or {})
    tables = changes.pop("coders", None)
    assert record.config is not None and record.steps is not None
    config = _same_but_tokens(record.config, changes, where)
    if tables is not None:
        points = expand(tables, where, config.preset)
        given = _as_begun(points, record, ActivationStore(config.store), record.config)
        planned = _added(planned, given) if add_coders else _same_coders(planned, given, where)
    job = make_job(
        config,
        where,
        rank=rank,
        world=world,
        planned=planned,
        micro_rows=record.micro_rows,
        run=run,
        assigned=record.assigned,
        steps=record.steps if config.tokens == record.config.tokens else None,
    )
    _check_store(job, record)
    if job.steps < record.steps:
        raise ConfigError(
            f"{where}: --tokens {config.tokens} are {job.steps:,} steps, but the run has "
            f"{record.steps:,}. A run goes on as it began; tokens may only grow."
        )
    checkpoint = load_checkpoint(job.part / "checkpoint")
    old = {c.name for c in record.coders}
    if checkpoint is not None:
        lost = {c.name for c in job.mine} & old - {*checkpoint.numbers}
        if lost:
            raise StoreError(f"{job.part}: its checkpoint has no coder {min(lost)}.")
    if record.completed:
        if checkpoint is None and not ended:
            raise UserError(f"{folder}: this run is complete, and its checkpoint was not kept.")
        over = job.store.ring is not None and job.steps == record.steps  # it gave all its rows
        if checkpoint is None or over or not _has_work(job, checkpoint.state):
            if world > 1 and not run.config().completed and merge_parts(run, world):
                return run, []
            if ended:
                console.print(f"{folder}: complete, ended already")
                return run, []
            raise UserError(
                f"{folder}: this run is complete. To train it longer give more --tokens than "
                f"{record.completed.rows:,}; coders that were done or not finite stay so."
            )
    return run_job(job, checkpoint, new=False)


def _record(run: Run, folder: str | Path, rank: int, world: int) -> RunConfig:
    """What this process began.

    Args:
        run: the run.
        folder: as the user called it.
        rank: of this process.
        world: number of processes.

    Raises:
        StoreError: there is no such run, or nothing of this rank.
    """
    if not run.folder.is_dir():
        near = Path("runs") / folder
        hint = f" (did you mean {near}?)" if near.is_dir() else ""
        raise StoreError(f"{folder}: no such run{hint}. `bsc train` makes one.")
    part = Run(run.part(rank, world))
    record = part.config() if part.config_path.exists() else None
    if record is not None and record.finetuned:
        raise UserError(f"{folder}: finetuned coders. Go on with `{record.going_on} {folder}`.")
    if record is not None and record.imported:
        raise UserError(
            f"{folder}: these coders were trained elsewhere (bsc import), so there is no training "
            f"to go on with."
        )
    if record is not None and record.pulled:
        raise UserError(
            f"{folder}: pulled from {record.pulled.repository}, and checkpoints are not published, "
            f"so there is nothing to go on from."
        )
    if record is None or (record.rank, record.world) != (rank, world):
        known = record or (run.config() if run.config_path.exists() else None)
        had = known.world if known else 1
        raise StoreError(
            f"{folder}: nothing of rank {rank} of {world} here; it was trained by "
            f"{had} process(es). Resume it as it was started, each with its --rank and --world."
        )
    return record


def _has_work(job: Job, state: dict[str, Any]) -> bool:
    """Whether a coder is there that still trains, and a step to train it."""
    ended = {
        c["name"]
        for c in state["coders"]
        if c["progress"]["frozen_at"] is not None or c["progress"]["stopped_at"] is not None
    }
    left = {c.name for c in job.mine} - ended
    return int(state["step"]) < job.steps and bool(left)


def _same_but_tokens(saved: TrainConfig, changes: dict[str, Any], where: str) -> TrainConfig:
    """The config of the run, with more tokens and what is free to change.

    Raises:
        ConfigError: names what is different.
    """
    wanted = parse_config(TrainConfig, saved.model_dump() | changes, where)
    update: dict[str, Any] = {}
    for name in changes:
        old, new = getattr(saved, name), getattr(wanted, name)
        # Whether tokens are enough is seen from the steps.
        if name in _FREE or (name == "tokens" and new is not None):
            update[name] = new
        elif str(old) != str(new):
            raise ConfigError(
                f"{where}: {name} is {new}, but the run has {old}. A run goes on as it began; for "
                f"other settings train a new run, under another --name."
            )
    return saved.model_copy(update=update)


def _as_begun(
    points: list[SweepPoint], record: RunConfig, store: ActivationStore, began: TrainConfig
) -> list[PlannedCoder]:
    """Coders of tables, as the run has those whose defaults were others when it began.

    It had torch's epsilon before `adam_eps` was a setting, and of Adam's binary coders the learning
    rate for as many steps as it was to have then.

    Args:
        points: of the tables.
        record: of the run.
        store: of the run.
        began: its config.
    """
    length = run_length(began, store)

    def key(coder: PlannedCoder, **but: Any) -> PlannedCoder:
        return coder.model_copy(update={"name": "", "adam_eps": None, **but})

    def rates(points: Iterable[SweepPoint], *, said: bool) -> set[PlannedCoder]:
        chosen = [p for p in points if (p.lr is not None) == said]
        return {key(c) for c in plan_coders(chosen, store, length)}

    unsaid = rates(points, said=False)
    said = rates(expand(began.coders, "the run's config.json", began.preset), said=True)

    def begun(coder: PlannedCoder) -> PlannedCoder:
        binary = coder.optimiser == "adam" and coder.coder.code == "binary"
        like = [
            c
            for c in record.planned
            if key(c, lr=0.0) == key(coder, lr=0.0)
            and (c.lr == coder.lr or (binary and key(coder) in unsaid and key(c) not in said))
            and (c.adam_eps == coder.adam_eps or (coder.adam_eps, c.adam_eps) == (None, TORCH_EPS))
        ]
        same = [c for c in like if c.lr == coder.lr] or like
        if len(same) != 1:  # it is new
            return coder
        return coder.model_copy(update={"lr": same[0].lr, "adam_eps": same[0].adam_eps})

    return [begun(c) for c in plan_coders(points, store, length)]


def _same_coders(
    planned: list[PlannedCoder], given: list[PlannedCoder], where: str
) -> list[PlannedCoder]:
    def bare(coders: list[PlannedCoder]) -> dict[PlannedCoder, str]:
        return {c.model_copy(update={"name": ""}): c.name for c in coders}

    old, new = bare(planned), bare(given)
    gone = [name for coder, name in old.items() if coder not in new]
    more = [name for coder, name in new.items() if coder not in old]
    if gone:
        raise ConfigError(
            f"{where}: the run has a coder {gone[0]}, which is not in these tables"
            f"{nearest(gone[0], more)}. A run goes on with the coders that it has."
        )
    if more:
        raise ConfigError(
            f"{where}: {more[0]} is not in the run. Give --add-coders to begin it where the run is."
        )
    return planned


def _added(planned: list[PlannedCoder], given: list[PlannedCoder]) -> list[PlannedCoder]:
    have = {c.model_copy(update={"name": ""}) for c in planned}
    new = [c for c in given if c.model_copy(update={"name": ""}) not in have]
    if not new:
        raise ConfigError("--add-coders: the run has all of these coders already.")
    names = {c.name for c in planned}
    if clash := [c.name for c in new if c.name in names]:
        raise ConfigError(
            f"--add-coders: the run has another coder called {clash[0]}. Give the new ones a group."
        )
    return planned + new


def _check_store(job: Job, record: RunConfig) -> None:
    store = job.store
    for what, now in (("store_id", store.store_id), ("rows", job.rows)):
        if record[what] != now:
            raise UserError(
                f"{store.folder}: {what} is {now}, but the run began with {record[what]}. It "
                f"can only go on with the rows that it began with."
            )
