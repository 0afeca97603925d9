"""What one process is to train: a request, checked and decided before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bsc.cache.store.ring import first_kept, readers
from bsc.cache.store.ring_room import RingRoom
from bsc.cache.store.store import ActivationStore
from bsc.devices import available_bytes, pick_device
from bsc.errors import UserError
from bsc.progress import format_bytes
from bsc.train.config import TrainConfig
from bsc.train.memory import MemoryPlan, plan_memory
from bsc.train.metrics import check_targets
from bsc.train.ranks import divide
from bsc.train.run import Run
from bsc.train.run_config import RUN_VERSION, PlannedCoder, RunConfig
from bsc.train.schedule import comparable_steps
from bsc.train.sweep import expand, plan_coders
from bsc.train.team import teams_of
from bsc.train.training_rows import left_out_tokens, open_bytes, rows_of_a_pass
from bsc.versions import versions

__all__ = ["Job", "make_job", "run_length"]


@dataclass(frozen=True)
class Job:
    """What one process is to train, with everything decided."""

    config: TrainConfig
    store: ActivationStore
    planned: list[PlannedCoder]
    """Coders of the whole run."""
    mine: list[PlannedCoder]
    """Coders of this process."""
    run: Run
    rank: int
    world: int
    assigned: dict[str, int]
    """Rank of every coder of the run."""
    team: range
    """Ranks of the processes that share the rows of its coders; the first leads."""
    device: torch.device
    memory: MemoryPlan
    """Memory that the coders of this process take."""
    free: int
    """Bytes of memory that may be used."""
    rows: int
    """Training rows of the store."""
    rows_of_a_pass: int
    """Those of them that the run reads, each once."""
    steps: int

    @property
    def leads(self) -> bool:
        """Whether this process writes what its team trains."""
        return self.rank == self.team[0]

    @property
    def part(self) -> Path:
        """Folder of what the process that leads writes."""
        return self.run.part(self.team[0], self.world)

    def reader(self, rank: int) -> str:
        """What a process of this run is called among the readers of a ring."""
        return reader_name(self.config.name, rank, self.world)

    @property
    def reading_ranks(self) -> list[int]:
        """Ranks of the processes that have a place in a ring for this run."""
        return sorted(set(self.assigned.values()))

    def record(self) -> RunConfig:
        """Everything that decides the result, with nothing left to defaults."""
        config = self.config
        return RunConfig(
            version=RUN_VERSION,
            name=config.name,
            store=self.store.folder.address,
            store_id=self.store.store_id,
            model=self.store.attributes["model"],
            rows=self.rows,
            rows_of_a_pass=self.rows_of_a_pass,
            steps=self.steps,
            batch_rows=config.batch_rows,
            micro_rows=self.memory.micro_rows,
            seed=config.seed,
            normalise=config.normalise,
            without_tokens=list(left_out_tokens(self.store, config)),
            dead_after=config.dead_after,
            log_every=config.log_every,
            device=self.device.type,
            rank=self.rank,
            world=self.world,
            assigned=self.assigned,
            config=config.model_copy(update={"store": _absolute(config.store)}),
            coders=list(self.planned),
            versions=versions(),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _absolute(store: str | Path) -> str:
    """Where a store is, for a process that is started elsewhere."""
    return str(store) if "://" in str(store) else str(Path(store).resolve())


def make_job(
    config: TrainConfig,
    where: str,
    *,
    rank: int = 0,
    world: int = 1,
    planned: list[PlannedCoder] | None = None,
    micro_rows: int | None = None,
    run: Run | None = None,
    assigned: Mapping[str, int] | None = None,
    steps: int | None = None,
) -> Job:
    """Check a request and decide everything, without writing or allocating.

    Args:
        config: the run.
        where: what the config comes from, for messages.
        rank: of this process.
        world: number of processes.
        planned: the coders; None: those of the config.
        micro_rows: rows that are worked on at a time; None: the config's, or as many as fit.
        run: where it is; None: where the config says.
        assigned: ranks that coders have had from before.
        steps: that it was begun with; None: as its tokens give, or one pass over the rows.

    Raises:
        UserError: the request cannot be carried out.
    """
    store = ActivationStore(config.store, check=config.check)
    rows = store.train.rows if store.ring is None else store.planned_rows
    if planned is None:
        points = expand(config.coders, where, config.preset)
        planned = plan_coders(points, store, run_length(config, store))
    once = rows_of_a_pass(store, config)
    if steps is None:
        gone = 0 if store.ring is None else _rows_gone(store, reader_name(config.name, rank, world))
        steps = (config.tokens or once - gone) // config.batch_rows
    if store.ring is None and config.batch_rows > once:
        raise UserError(
            f"batch_rows: {config.batch_rows:,} rows in a batch, but {store.folder} holds {rows:,} "
            f"training rows{f', of which {once:,} are read' if once < rows else ''}. Choose a "
            f"smaller batch."
        )
    if steps < 1 and config.tokens is None:  # a ring whose rows have passed
        raise UserError(
            f"{store.folder}: fewer rows than one batch of {config.batch_rows:,} are still to pass "
            f"through this ring. Capture again, or give a smaller --batch-rows."
        )
    if steps < 1:
        raise UserError(
            f"--tokens {config.tokens}: fewer than one batch of {config.batch_rows:,} rows."
        )
    patient = next((p.name for p in planned if p.patience is not None), None)
    if patient is not None and config.eval_every == 0:
        raise UserError(f"{patient}: patience needs held-out evaluations, but eval_every is 0.")
    if (config.eval_every or patient is not None) and "held_out" not in store.splits:
        raise UserError(
            f"{store.folder}: this store has no held-out rows, which eval_every and patience need."
        )
    check_targets(tensorboard=config.tensorboard, wandb=config.wandb)
    if store.room is not None:
        _check_ring(store, store.room, config)
    shares, team = divide(planned, world, assigned or {}), range(rank, rank + 1)
    if world > len(planned):
        team = next(t for t in teams_of([p.coder for p in planned], world) if rank in t)
    mine = shares[team[0]]
    if config.batch_rows < len(team):
        raise UserError(
            f"batch_rows: {config.batch_rows} rows in a batch are fewer than the {len(team)} "
            f"processes that share them."
        )
    part_rows = -(-config.batch_rows // len(team))
    device = pick_device(config.device)
    free = available_bytes(device)
    if store.train.codec == "lz4":  # others are mapped: the system drops what it has no room for
        decoded, here = open_bytes(store, mine), available_bytes(torch.device("cpu"))
        if decoded > here:
            raise UserError(
                f"{store.folder}: the shards that are read at a time take {format_bytes(decoded)} "
                f"decoded, but {format_bytes(here)} may be used. Train on fewer hookpoints in a "
                f"process, or capture with another codec."
            )
        if device.type == "cpu":
            free -= decoded
    bounded = config.model_copy(
        update={"micro_rows": micro_rows or config.micro_rows, "batch_rows": part_rows}
    )
    return Job(
        config=config,
        store=store,
        planned=planned,
        mine=mine,
        run=run or Run(config.folder),
        rank=rank,
        world=world,
        assigned={c.name: r for r, share in enumerate(shares) for c in share},
        team=team,
        device=device,
        memory=plan_memory(mine, bounded, device, free),
        free=free,
        rows=rows,
        rows_of_a_pass=once,
        steps=steps,
    )


def run_length(config: TrainConfig, store: ActivationStore) -> float:
    """Length of a run as its default learning rates take it (`comparable_steps`).

    Of a ring with the rows that have passed, for its processes begin one after the other.
    """
    rows = config.tokens or rows_of_a_pass(store, config)
    return comparable_steps(rows // config.batch_rows, config.batch_rows)


def _check_ring(store: ActivationStore, room: RingRoom, config: TrainConfig) -> None:
    """See that a ring has room for the batches and checkpoints of a run.

    Raises:
        UserError: it would wait for itself; the message says what would do.
    """
    of_ring = f"a ring of {room.slots} shards of {room.shard_rows:,} rows"
    if config.batch_rows > room.batch_rows:
        raise UserError(
            f"batch_rows: {config.batch_rows:,} rows in a batch, but {store.folder} is {of_ring}, "
            f"written {room.window} at a time: batches have at most {room.batch_rows:,}. Give "
            f"--batch-rows {room.batch_rows}, or capture with a larger --ring."
        )
    rows = (config.checkpoint_every or 0) * config.batch_rows
    if not room.fits(rows):
        most = (room.most_shards - room.shards_at_once) * room.shard_rows // config.batch_rows
        steps = f"--checkpoint-every {most}" if most else "no --checkpoint-every"
        raise UserError(
            f"--checkpoint-every {config.checkpoint_every}: {rows:,} rows pass between two "
            f"checkpoints, but {store.folder} is {of_ring}, which has to keep them until the "
            f"second. Give {steps}, or capture with --ring {room.slots_for(rows)}."
        )


def reader_name(run: str, rank: int, world: int) -> str:
    """What a process of a run is called among the readers of a ring."""
    return run if world == 1 else f"{run}.{rank}"


def _rows_gone(store: ActivationStore, reader: str) -> int:
    """Rows that have passed through a ring before a run that begins now."""
    split = store.train
    for cursor in readers(store.folder):
        if cursor.reader == reader:
            return cursor.next_shard * split.grid.shard_rows
    kept = first_kept(store.folder, next(iter(split.specs.values())), split.shards)
    return kept * split.grid.shard_rows
