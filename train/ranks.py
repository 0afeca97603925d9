"""Several processes that share the coders of a run: who trains what, and making one run of it.

Processes do not talk to each other. Each reads the same store, trains its own coders and writes
into its own part of the run's folder, `ranks/<rank>`; coders go where they belong. The process that
ends last puts the metrics together and marks the run as complete. So it does not matter whether
they are started by torchrun or by a job array, nor when.
"""

from __future__ import annotations

import heapq
import resource
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from bsc.errors import StoreError, UserError
from bsc.files import canonical_json, write_atomically
from bsc.locks import lock_for_moments
from bsc.train.memory import flops_per_row
from bsc.train.run import Run
from bsc.train.run_config import Completed, PlannedCoder, RunConfig
from bsc.train.team import teams_of
from bsc.typed import write_typed

__all__ = ["divide", "has_begun", "leaders", "merge_parts", "part_of"]

_SAME = (
    "version", "store_id", "rows", "batch_rows", "seed", "normalise", "without_tokens",
    "dead_after", "world",
)  # fmt: skip
"""What parts of one run must agree in."""


def divide(
    planned: Sequence[PlannedCoder], world: int, assigned: Mapping[str, int] | None = None
) -> list[list[PlannedCoder]]:
    """Coders of every rank: the costliest first, each to the rank with the least to do.

    Among coders that cost the same those of one hookpoint go to ranks that follow each other, so
    that a rank reads few arrays of the store. Where there are more ranks than coders each coder has
    a team of them (bsc.train.team), of whose ranks the first has it here, and the others nothing.

    Args:
        planned: the coders.
        world: number of ranks.
        assigned: ranks that coders have from before and keep, by name.

    Raises:
        UserError: coders are to be divided in another way than before.
    """
    assigned = assigned or {}
    shares: list[list[PlannedCoder]] = [[] for _ in range(world)]
    if assigned and world > len(assigned) and len(planned) > len(assigned):
        raise UserError(
            f"--add-coders: {world} processes share the rows of {len(assigned)} coders, and would "
            f"be divided in another way with {len(planned)}. Such a run keeps the coders that it "
            f"has; train the new ones in a run of their own."
        )
    if world > len(planned):
        for coder, team in zip(planned, teams_of([p.coder for p in planned], world), strict=True):
            shares[team[0]].append(coder)
        return shares
    loads = [0.0] * world
    order = {p.name: i for i, p in enumerate(planned)}
    alike: dict[float, tuple[list[int], list[PlannedCoder]]] = {}
    """By cost: ranks that get a coder of it, each as often, and the coders."""
    for coder in sorted(planned, key=lambda p: (p.name not in assigned, -flops_per_row(p.coder))):
        cost = flops_per_row(coder.coder)
        if coder.name in assigned:
            rank = assigned[coder.name]
            shares[rank].append(coder)
        else:
            rank = loads.index(min(loads))
            ranks, coders = alike.setdefault(cost, ([], []))
            ranks.append(rank)
            coders.append(coder)
        loads[rank] += cost
    for ranks, coders in alike.values():
        coders.sort(key=lambda p: (p.hookpoint, order[p.name]))
        for rank, coder in zip(sorted(ranks), coders, strict=True):
            shares[rank].append(coder)
    return [sorted(share, key=lambda p: order[p.name]) for share in shares]


def leaders(run: Run, world: int) -> list[int]:
    """Ranks of a run that write a part of it: all, or with more ranks than coders the first of each
    coder's.

    Raises:
        StoreError: the run's config is damaged.
    """
    if world > 1 and run.config_path.exists():
        record = run.config()
        if record.world == world > len(record.coders):
            return sorted(set(record.assigned.values()))
    return list(range(world))


def part_of(run: Run, rank: int, world: int) -> int:
    """Rank whose part of a run this process trains: its own, or that of the first of its team."""
    return max((r for r in leaders(run, world) if r <= rank), default=rank)


def has_begun(run: Run, rank: int, world: int) -> bool:
    """Whether the part of a run that this process trains was begun."""
    return Run(run.part(part_of(run, rank, world), world)).config_path.exists()


def _allow_open_files(files: int) -> None:
    """Allow this process so many more open files, as far as the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = files + 128  # libraries have some open, too
    if soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def merge_parts(run: Run, world: int) -> bool:
    """Make one run of its parts, if all have ended and have the same coders and steps.

    Returns:
        Whether they had.

    Raises:
        StoreError: a part belongs to another run.
    """
    with lock_for_moments(run.folder / ".merge.lock"):
        records: dict[int, RunConfig] = {}
        for rank in leaders(run, world):
            part = Run(run.part(rank, world))
            if not part.config_path.exists() or not part.config().completed:
                return False
            records[rank] = part.config()
        first = next(iter(records.values()))
        for rank, record in records.items():
            if differ := [k for k in _SAME if record[k] != first[k]]:
                raise StoreError(
                    f"{run.folder}: rank {rank} was trained with another {differ[0]} than rank 0, "
                    f"so their coders are not one run. Train again under another --name."
                )
        goals = [(r.steps, r.coders) for r in records.values()]
        if any(goal != goals[0] for goal in goals):
            return False  # one was trained on, the others are to follow
        order = {c.name: i for i, c in enumerate(first.coders)}
        # Each is by step; line by line, for those of a long run are gigabytes.
        _allow_open_files(len(records))
        parts = [Run(run.part(rank, world)).metrics() for rank in records]
        by_step = itemgetter("step")
        steps = groupby(heapq.merge(*parts, key=by_step), key=by_step)
        lines = (m for _, of in steps for m in sorted(of, key=lambda m: order[m["coder"]]))
        write_atomically(run.metrics_path, (canonical_json(m, indent=None) for m in lines))
        ended = [r.completed for r in records.values() if r.completed]
        completed = Completed(
            at=max(e.at for e in ended),
            seconds=max(e.seconds for e in ended),
            rows=max(e.rows for e in ended),
        )
        began = min(r.started_at for r in records.values())
        whole = first.model_copy(update={"started_at": began, "completed": completed})
        write_typed(run.config_path, whole)
    return True
