"""Several processes that share the coders of a run: who trains what, and making one run of it.

Processes do not talk to each other. Each reads the same store, trains its own coders and writes
into its own part of the run's folder, `ranks/<rank>`; coders go where they belong. The process that
ends last puts the metrics together and marks the run as complete. So it does not matter whether
they are started by torchrun or by a job array, nor when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bsc.errors import StoreError, UserError
from bsc.files import canonical_json, write_atomically
from bsc.locks import lock_for_moments
from bsc.train.memory import flops_per_row
from bsc.train.run import Run
from bsc.train.run_config import Completed, PlannedCoder, RunConfig
from bsc.typed import write_typed

__all__ = ["divide", "merge_parts"]

_SAME = (
    "version", "store_id", "rows", "batch_rows", "seed", "normalise", "without_tokens",
    "dead_after", "world",
)  # fmt: skip
"""What parts of one run must agree in."""


def divide(
    planned: Sequence[PlannedCoder], world: int, assigned: Mapping[str, int] | None = None
) -> list[list[PlannedCoder]]:
    """Coders of every rank: the costliest first, each to the rank with the least to do.

    Args:
        planned: the coders.
        world: number of ranks.
        assigned: ranks that coders have from before and keep, by name.

    Raises:
        UserError: there are fewer coders than ranks.
    """
    if world > len(planned):
        raise UserError(
            f"--world {world}: more processes than the {len(planned)} coders of this sweep."
        )
    assigned = assigned or {}
    shares: list[list[PlannedCoder]] = [[] for _ in range(world)]
    loads = [0.0] * world
    order = {p.name: i for i, p in enumerate(planned)}
    for coder in sorted(planned, key=lambda p: (p.name not in assigned, -flops_per_row(p.coder))):
        rank = assigned.get(coder.name, loads.index(min(loads)))
        shares[rank].append(coder)
        loads[rank] += flops_per_row(coder.coder)
    return [sorted(share, key=lambda p: order[p.name]) for share in shares]


def merge_parts(run: Run, world: int) -> bool:
    """Make one run of its parts, if all have ended and have the same coders and steps.

    Returns:
        Whether they had.

    Raises:
        StoreError: a part belongs to another run.
    """
    with lock_for_moments(run.folder / ".merge.lock"):
        records: list[RunConfig] = []
        for rank in range(world):
            part = Run(run.part(rank, world))
            if not part.config_path.exists() or not part.config().completed:
                return False
            records.append(part.config())
        for rank, record in enumerate(records):
            if differ := [k for k in _SAME if record[k] != records[0][k]]:
                raise StoreError(
                    f"{run.folder}: rank {rank} was trained with another {differ[0]} than rank 0, "
                    f"so their coders are not one run. Train again under another --name."
                )
        goals = [(r.steps, r.coders) for r in records]
        if any(goal != goals[0] for goal in goals):
            return False  # one was trained on, the others are to follow
        first = records[0]
        order = {c.name: i for i, c in enumerate(first.coders)}
        lines = [m for rank in range(world) for m in Run(run.part(rank, world)).metrics()]
        lines.sort(key=lambda m: (m["step"], order[m["coder"]]))
        text = "".join(canonical_json(m, indent=None) for m in lines)
        write_atomically(run.metrics_path, text)
        ended = [r.completed for r in records if r.completed]
        completed = Completed(
            at=max(e.at for e in ended),
            seconds=max(e.seconds for e in ended),
            rows=max(e.rows for e in ended),
        )
        began = min(r.started_at for r in records)
        whole = first.model_copy(update={"started_at": began, "completed": completed})
        write_typed(run.config_path, whole)
    return True
