"""Processes that train one coder together: each has a part of every batch, gradients are summed.

They begin with the same weights and take the same steps, so each has the coder as it is. The first
of a team leads: it decides what depends on time, evaluates, and alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bsc.errors import StoreError, UserError
from bsc.train.coders.config import CoderConfig
from bsc.train.memory import flops_per_row

__all__ = ["ALONE", "Team", "open_team", "teams_of"]

_SMALL = 1 << 16
"""Values of a tensor that is summed together with others."""
_PATIENCE = timedelta(days=1)
"""That a process waits for the others, who may wait for rows."""


def teams_of(coders: Sequence[CoderConfig], world: int) -> list[range]:
    """Ranks of the team of each coder, where there are more processes than coders.

    Every coder has one; each further process goes to the team with the most to do for each of its
    processes.
    """
    sizes = [1] * len(coders)
    loads = [flops_per_row(c) for c in coders]
    for _ in range(world - len(coders)):
        each = [load / size for load, size in zip(loads, sizes, strict=True)]
        sizes[each.index(max(each))] += 1
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class Team:
    """This process among those that train its coder."""

    ranks: range
    """Of the processes of the team."""
    rank: int
    """Of this process."""
    group: Any = None
    """Of torch.distributed."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)

    @property
    def place(self) -> int:
        """Number of this process in the team."""
        return self.ranks.index(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == self.ranks[0]

    def part(self, rows: int) -> range:
        """The rows of a batch that are this process's."""
        return range(rows * self.place // self.size, rows * (self.place + 1) // self.size)

    def add_up(self, *tensors: Tensor) -> None:
        """Put the sum over the team into each tensor, the same bits in every process."""
        if self.size == 1:
            return
        small = [t for t in tensors if t.numel() < _SMALL]
        for tensor in tensors:
            if tensor.numel() >= _SMALL:
                dist.all_reduce(tensor, group=self.group)
        if small:  # at once: each exchange takes longer than what it carries
            flat = torch.cat([t.reshape(-1).double() for t in small])
            dist.all_reduce(flat, group=self.group)
            for tensor, total in zip(small, flat.split([t.numel() for t in small]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def largest(self, *tensors: Tensor) -> None:
        """Put the largest value over the team into each place of each tensor."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def hear(self, *tensors: Tensor) -> None:
        """Put into each tensor what it is in the process that leads."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=self.ranks[0], group=self.group)

    def agree(self, *values: int) -> tuple[int, ...]:
        """The numbers of the process that leads."""
        told = torch.tensor(values, dtype=torch.int64)
        self.hear(told)
        return tuple(told.tolist())

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of the flags some process has."""
        if self.size == 1:
            return flags
        said = torch.tensor(flags, dtype=torch.int32)
        self.largest(said)
        return tuple(bool(n) for n in said.tolist())

    def check_same(self, tensors: Sequence[Tensor], step: int) -> None:
        """See that every process has the same coder, by sums of its bits.

        Raises:
            StoreError: they have drifted apart.
        """
        if self.size == 1:
            return
        mine = [
            int(t.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)) for t in tensors
        ]
        theirs = self.agree(*mine)
        if any(self.any(tuple(mine) != theirs)):
            raise StoreError(
                f"the processes {self.ranks[0]} to {self.ranks[-1]} of this run have different "
                f"weights after step {step}, though they took the same steps: their machines or "
                f"versions of torch compute differently. Go on from the checkpoint before "
                f"(`bsc train --resume`) on machines of one kind."
            )


ALONE = Team(range(1), 0)
"""A process that shares its coders with none."""


def open_team(teams: Sequence[range], rank: int, device: torch.device) -> Team:
    """Join the team of this process; all processes of all teams have to.

    Args:
        teams: ranks of each.
        rank: of this process.
        device: where its coder is.

    Raises:
        UserError: torchrun did not start this process, so it cannot find the others.
    """
    needed = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    if lacks := [name for name in needed if name not in os.environ]:
        raise UserError(
            f"--world {teams[-1].stop}: more processes than the {len(teams)} coders of this sweep "
            f"share the rows of each coder, and have to find each other, but {lacks[0]} is not "
            f"set. Start them with torchrun, or give no more processes than coders."
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    groups = [dist.new_group(list(ranks), timeout=_PATIENCE) for ranks in teams]
    found = next(i for i, ranks in enumerate(teams) if rank in ranks)
    return Team(teams[found], rank, groups[found])
