"""Stage 2: one read of the store trains every coder of a sweep.

Coders that share hookpoint, site and number of latents form a bank; every bank sees every batch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime

import torch

from bsc.cache.store.loader import Cursor
from bsc.cache.store.ring_reader import RingReader, reading
from bsc.cache.store.split import Moments
from bsc.devices import keep_freed_memory, sum_in_float32
from bsc.errors import StoreError, UserError
from bsc.files import make_folder
from bsc.progress import console
from bsc.train.bank_trainer import BankTrainer
from bsc.train.checkpoint import Checkpoint
from bsc.train.config import TrainConfig
from bsc.train.job import Job, make_job
from bsc.train.loop import CoderSummary, Loop
from bsc.train.memory import group_banks
from bsc.train.ranks import merge_parts
from bsc.train.run import Run, claim
from bsc.train.run_config import Completed, RunConfig
from bsc.train.team import ALONE, Team, open_team, teams_of
from bsc.train.training_rows import (
    load_moments,
    measure_moments,
    moment_shards,
    save_moments,
)
from bsc.typed import combined, write_typed
from bsc.versions import versions

__all__ = ["CoderSummary", "run_job", "train_sweep"]

_MOMENTS = "moments.safetensors"
"""Of a run on a ring: means and variances of the rows that it began with."""
_POLL_SECONDS = 0.1


def train_sweep(
    config: TrainConfig, where: str = "bsc train", *, rank: int = 0, world: int = 1
) -> tuple[Run, list[CoderSummary]]:
    """Train a sweep and write its run.

    Args:
        config: the run.
        where: what the config comes from, for messages.
        rank: of this process, where several share the coders of a run.
        world: number of processes.

    Returns:
        The run, and the last training figures of every coder of this process.

    Raises:
        UserError: the request cannot be carried out. Nothing is written then.
    """
    job = make_job(config, where, rank=rank, world=world)
    if job.leads:
        job.run.check_new(job.part)
    return run_job(job, None)


def run_job(
    job: Job, checkpoint: Checkpoint | None, *, new: bool = True
) -> tuple[Run, list[CoderSummary]]:
    """Train from a checkpoint, or from the beginning, to the end.

    Args:
        job: what.
        checkpoint: as `load_checkpoint` gives it.
        new: whether the folder is still to be made.
    """
    with ExitStack() as stack:
        if not job.leads:
            stack.callback(setattr, console, "quiet", console.quiet)
            console.quiet = True
        if not new and job.leads:
            stack.enter_context(claim(job.part))
        team = _team(job, -1 if checkpoint is None else int(checkpoint.state["step"]))
        # A ring may have moved on while they were started.
        job = replace(job, steps=team.agree(job.steps)[0])
        ring = None
        if job.store.ring is not None and job.leads:
            wanted = None if checkpoint is None else Cursor(*checkpoint.state["cursor"]).group
            ring = stack.enter_context(reading(_join_ring(job, wanted, new=new)))
        elif job.store.ring is None and not job.store.complete:
            console.print(f"{job.store.folder}: the capture of this store has not ended")
        if job.device.type == "cpu":
            keep_freed_memory()
        else:
            sum_in_float32()
        first = ring.next_shard if ring else 0
        moments = _moments(job, team, first, going_on=checkpoint is not None)
        # Memory is taken before anything is written.
        banks = [
            BankTrainer(
                group, job.store, job.config, job.device, job.memory.micro_rows, moments, team
            )
            for group in group_banks(job.mine)
        ]
        loop = Loop(job, banks, team)
        if checkpoint is not None:
            loop.restore(checkpoint)
        if job.store.ring is not None:
            (first,) = team.agree(first)
            loop.begin_at(first)
            _wait_for(job, first + -(-job.config.batch_rows // job.store.train.grid.shard_rows))
        record = job.record()
        if job.leads:
            if new:
                make_folder(job.part, "run")
                stack.enter_context(claim(job.part))
            _begin(job, record, moments)
        console.print(
            f"{job.run.folder}: {len(job.mine)} coders in {len(banks)} bank(s), {job.steps:,} "
            f"steps of {job.config.batch_rows:,} rows, "
            f"{job.steps * job.config.batch_rows / job.rows_of_a_pass:.2f} passes"
            + (f"; {team.size} processes share the rows" if team.size > 1 else "")
            + (f"; from step {loop.step:,}" if loop.step else "")
        )
        summaries = loop.run(ring.passed if ring else None)
        if job.leads:
            _finish(job, record, banks, loop)
    order = {p.name: i for i, p in enumerate(job.planned)}
    return job.run, sorted(summaries, key=lambda s: order[s.name])


def _begin(job: Job, record: RunConfig, moments: Mapping[str, Moments]) -> None:
    """Write what is known before the first step."""
    write_typed(job.part / "config.json", record)  # first: it says that a run has begun here
    if job.world > 1:
        write_typed(job.run.config_path, record)
    if job.store.ring is not None:
        save_moments(job.part / _MOMENTS, moments)
    # Figures of coders that are trained on would be of others.
    job.run.remove_figures()


def _finish(job: Job, record: RunConfig, banks: list[BankTrainer], loop: Loop) -> None:
    """Write the coders, and that this process has ended."""
    about = {
        "store_id": job.store.store_id,
        "model": job.store.attributes["model"],
        "bsc": versions()["bsc"],
    }
    for bank in banks:
        for coder in bank.finish(about, loop.step):
            coder.save(job.run.coder_folder(str(coder.about["name"])))
            del coder  # before the next one is made
    completed = Completed(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(loop.seconds, 1),
        rows=loop.step * job.config.batch_rows,
    )
    write_typed(job.part / "config.json", combined(RunConfig, record, completed=completed))
    if job.world > 1:
        merge_parts(job.run, job.world)
    if not job.config.keep_checkpoint:
        shutil.rmtree(job.part / "checkpoint", ignore_errors=True)


def _team(job: Job, begun_at: int) -> Team:
    """This process among those that train its coder.

    Args:
        job: what is trained.
        begun_at: step of the checkpoint that it goes on from; -1: none.

    Raises:
        UserError: the others see another store or another run, or cannot be found.
    """
    if job.world <= len(job.planned):
        return ALONE
    teams = teams_of([p.coder for p in job.planned], job.world)
    team = open_team(teams, job.rank, job.device)
    (leads_at,) = team.agree(begun_at)
    if any(team.any(leads_at != begun_at)):
        raise UserError(
            f"{job.run.folder}: the processes of this run see different checkpoints of it (this "
            f"one of step {begun_at}, the first of step {leads_at}). --runs has to be a folder "
            f"that all of them share."
        )
    mine = (job.rows, job.memory.micro_rows)
    if any(team.any(team.agree(*mine) != mine)):
        raise UserError(
            f"{job.store.folder}: the processes of this run see a different number of rows or can "
            f"work on a different number at a time ({job.rows:,} rows here). Wait until the "
            f"capture has ended, give --micro-rows, or train on machines of one kind."
        )
    return team


def _moments(job: Job, team: Team, first: int, *, going_on: bool) -> dict[str, Moments]:
    """Means and variances of the rows that coders begin with, the same in a whole team.

    Args:
        job: what is trained.
        team: processes that share its rows.
        first: shard of a ring that this process may begin with.
        going_on: whether there is a checkpoint.
    """
    names = dict.fromkeys(f"{p.hookpoint}/{s}" for p in job.mine for s in (p.coder.side, "output"))
    shapes = job.store.train.specs
    if not team.leads:
        moments = {
            n: Moments(0, *torch.zeros((2, int(shapes[n].width or 0)), dtype=torch.float64))
            for n in names
        }
    elif job.store.ring is None:
        moments = measure_moments(job.store, job.config, names)
    elif going_on:
        moments = load_moments(job.part / _MOMENTS)
        if lacks := [n for n in names if n not in moments]:
            raise StoreError(f"{job.part / _MOMENTS}: has nothing of {lacks[0]}.")
    else:
        shards = moment_shards(job.store, first)
        _wait_for(job, shards.stop)
        there = range(first, min(shards.stop, job.store.train.shards))
        moments = measure_moments(job.store, job.config, names, there)
    for m in moments.values():
        team.hear(m.mean, m.variance)
    return moments


def _wait_for(job: Job, shards: int) -> None:
    """Wait until so many shards of a ring are committed, or no more will be."""
    split, told = job.store.train, False
    while True:
        over = job.store.complete  # asked first: what is committed afterwards is then seen
        split.refresh()
        if split.shards >= shards or over:
            return
        if not told:
            told = True
            console.print(f"{job.store.folder}: waiting for {shards:,} shards to be committed")
        time.sleep(_POLL_SECONDS)


def _join_ring(job: Job, wanted: int | None, *, new: bool) -> RingReader:
    """The place of this process in the ring of its store.

    Args:
        job: what is trained.
        wanted: first shard that its checkpoint goes on with; None: there is none.
        new: whether the run begins now.

    Raises:
        UserError: rows are to be read more often than they pass, or are gone.
    """
    rows, config = job.store.planned_rows, job.config
    if config.tokens is not None and config.tokens > rows:
        raise UserError(
            f"--tokens {config.tokens}: {job.store.folder} is a ring, through which {rows:,} rows "
            f"pass once."
        )
    split = job.store.train
    others = [rank for rank in job.reading_ranks if new and not _begun(job, rank)]
    ring = RingReader(
        job.store.folder,
        split.specs,
        split.grid,
        job.reader(job.rank),
        others=[job.reader(rank) for rank in others],
    )
    if wanted is not None and wanted < ring.next_shard:
        ring.close(leave=True)
        raise UserError(
            f"{job.run.folder}: its checkpoint goes on with shard {wanted} of {job.store.folder}, "
            f"but the ring begins with shard {ring.next_shard}: its place was dropped, and the "
            f"rows are gone. Train again under another --name."
        )
    room = job.store.room
    needs = room.checkpoint_rows if room is not None and room.shards > room.slots else 0
    console.print(
        f"{job.store.folder}: reading the ring from shard {ring.next_shard} on"
        + (f"; a checkpoint every {needs:,} rows at least, for its room" if needs else "")
    )
    return ring


def _begun(job: Job, rank: int) -> bool:
    """Whether another process of the run has written its part already."""
    return Run(job.run.part(rank, job.world)).config_path.exists()
