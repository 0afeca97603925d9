"""Rows of a store as a dataset of torch, for training loops that are not ours."""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from bsc.cache.store.loader import Loader, shard_order
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError

__all__ = ["RowDataset"]


class RowDataset(IterableDataset[tuple[torch.Tensor, ...]]):
    """Batches of rows, an epoch at each iteration; for `DataLoader(dataset, batch_size=None)`.

    Ranks and workers read shards of their own, so that no row comes twice in an epoch; the batches
    of several workers come in turn. Rows are bfloat16, and a batch is a tuple of one tensor
    (batch_rows, width) for each array. Workers of a store on object storage are started by spawn.
    """

    def __init__(
        self,
        split: StoreSplit,
        names: Sequence[str],
        *,
        batch_rows: int,
        shuffle: bool = True,
        seed: int = 0,
        without_tokens: Collection[int] = (),
        drop_last: bool = True,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        """Prepare to read; opens no shard.

        Args:
            split: rows to read.
            names: arrays, for example ``("layers.3.mlp/input", "layers.3.mlp/output")``.
            batch_rows: rows in a batch.
            shuffle: whether shards, and rows of several shards at a time, come in random order;
                otherwise in the order of the store.
            seed: of the order.
            without_tokens: token ids whose rows are left out.
            drop_last: whether every rank gets as many shards and as many batches, all of them
                whole, which training on several ranks needs: the last rows of every worker are left
                out. Otherwise every row of the split comes.
            rank: of this process; None: that of torch.distributed, or 0.
            world: number of processes.

        Raises:
            StoreError: there is no such array.
            ConfigError: there are fewer shards than ranks, fewer rows of a rank than in a batch, or
                ranks would have different numbers of batches.
        """
        for name in names:
            split.spec(name)
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if together else 0
        self.world = (
            world if world is not None else torch.distributed.get_world_size() if together else 1
        )
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank {self.rank} of {self.world}: ranks count from 0.")
        if split.shards < self.world:
            raise ConfigError(
                f"{split.where}: {split.shards} shards of split {split.split!r} are fewer than "
                f"{self.world} ranks, and each reads shards of its own."
            )
        rows = split.shards // self.world * split.grid.shard_rows
        if batch_rows < 1 or (drop_last and batch_rows > rows):
            raise ConfigError(
                f"batch_rows={batch_rows}: should be 1 to {rows:,}, the rows of split "
                f"{split.split!r} of {split.where} that a rank reads."
            )
        if without_tokens and drop_last and self.world > 1:
            raise ConfigError(
                "without_tokens: ranks would have different numbers of batches, and the one with "
                "most would wait for the others. Give drop_last=False and join the ranks at the "
                "end, or leave rows out after reading."
            )
        self.split, self.names, self.batch_rows = split, tuple(names), batch_rows
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.without_tokens = tuple(without_tokens)
        # Shared with workers that stay from one epoch to the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __repr__(self) -> str:
        order = f"shuffled, seed {self.seed}" if self.shuffle else "in order"
        rank = f", rank {self.rank} of {self.world}" if self.world > 1 else ""
        return (
            f"<RowDataset {self.split.where}: {', '.join(self.names)}, {self.batch_rows:,} of "
            f"{self.split.rows:,} rows at a time, {order}{rank}>"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, the same on every rank."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker, epoch = get_worker_info(), int(self._epoch)
        split, part = self.split, (0, 1)
        if worker is not None:  # mapped files and connections of another process are not used
            _check_start(split.folder.address)
            split, part = _opened(*_where(split)), (worker.id, worker.num_workers)
        shards = self._shards(epoch, *part)
        rows = len(shards) * split.grid.shard_rows
        if self.drop_last and 0 < rows < self.batch_rows:
            raise ConfigError(
                f"batch_rows={self.batch_rows}: each of {part[1]} workers reads {rows:,} rows or "
                f"fewer, so no batch. Choose fewer workers, a smaller batch or drop_last=False."
            )
        loader = Loader(
            split, self.names, batch_rows=self.batch_rows, seed=self.seed,
            without_tokens=self.without_tokens, drop_last=self.drop_last,
            shards=shards, shuffle=self.shuffle,
        )  # fmt: skip
        for batch in loader.epoch_batches(epoch):
            yield tuple(rows.clone() for rows in batch)  # the loader uses its own again

    def _shards(self, epoch: int, worker: int, workers: int) -> list[int]:
        """Shards of this rank and one of its workers in this epoch."""
        order = list(range(self.split.shards))
        if self.shuffle:
            order = shard_order(self.seed, epoch, self.split.shards)
        if self.drop_last:
            order = order[: len(order) // self.world * self.world]
        return order[self.rank :: self.world][worker::workers]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that is started anew is given: where the store is."""
        return self.__dict__ | {"split": _where(self.split)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, split=_opened(*state["split"]))


def _check_start(address: str) -> None:
    """See that a worker can read the store.

    Raises:
        ConfigError: it was forked, and connections to object storage do not outlive that.
    """
    kind = type(multiprocessing.current_process()).__name__
    forked = kind == "ForkProcess" or (
        kind == "Process" and multiprocessing.get_start_method() == "fork"
    )
    if "://" in address and forked:
        raise ConfigError(
            f"{address}: workers that are forked cannot read object storage. Give DataLoader "
            f"multiprocessing_context='spawn'."
        )


def _where(split: StoreSplit) -> tuple[str, str, bool]:
    return split.folder.address, split.split, split.check


def _opened(address: str, split: str, check: bool) -> StoreSplit:
    store = ActivationStore(address, check=check)
    return store.train if split == "train" else store.held_out
