"""What one process is to train: a request, checked and decided before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bsc.cache.store.store import ActivationStore
from bsc.devices import pick_device
from bsc.errors import UserError
from bsc.train.config import TrainConfig
from bsc.train.memory import MemoryPlan, available_bytes, plan_memory
from bsc.train.metrics import check_targets
from bsc.train.ranks import divide
from bsc.train.run import Run
from bsc.train.run_config import RUN_VERSION, PlannedCoder, RunConfig
from bsc.train.sweep import expand, plan_coders
from bsc.train.training_rows import left_out_tokens
from bsc.versions import versions

__all__ = ["Job", "make_job"]


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
    device: torch.device
    memory: MemoryPlan
    """Memory that the coders of this process take."""
    free: int
    """Bytes of memory that may be used."""
    rows: int
    """Training rows of the store."""
    steps: int

    @property
    def part(self) -> Path:
        """Folder of what this process alone writes."""
        return self.run.part(self.rank, self.world)

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

    Raises:
        UserError: the request cannot be carried out.
    """
    store = ActivationStore(config.store, check=config.check)
    if planned is None:
        planned = plan_coders(expand(config.coders, where, config.preset), store)
    rows = store.train.rows if store.ring is None else store.planned_rows
    if store.ring is not None and world > 1:
        raise UserError(f"{store.folder}: a ring is read by one process; leave --world out.")
    steps = (config.tokens or rows) // config.batch_rows
    if store.ring is None and config.batch_rows > rows:
        raise UserError(
            f"batch_rows: {config.batch_rows:,} rows in a batch, but {store.folder} holds {rows:,} "
            f"training rows. Choose a smaller batch."
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
    shares = divide(planned, world, assigned or {})
    mine = shares[rank]
    device = pick_device(config.device)
    free = available_bytes(device)
    bounded = config.model_copy(update={"micro_rows": micro_rows or config.micro_rows})
    return Job(
        config=config,
        store=store,
        planned=planned,
        mine=mine,
        run=run or Run(config.folder),
        rank=rank,
        world=world,
        assigned={c.name: r for r, share in enumerate(shares) for c in share},
        device=device,
        memory=plan_memory(mine, bounded, device, free),
        free=free,
        rows=rows,
        steps=steps,
    )
