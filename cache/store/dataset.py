"""Rows of a store as a dataset of torch, for training loops that are not ours."""

from __future__ import annotations

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

    Ranks and workers read shards of their own, so that no row comes twice in an epoch. Rows are
    bfloat16, and a batch is a tuple of one tensor (batch_rows, width) for each array.
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
            drop_last: whether every rank gets as many shards, and whole batches alone, which
                training on several ranks needs; otherwise every row of the split comes.
            rank: of this process; None: that of torch.distributed, or 0.
            world: number of processes.

        Raises:
            StoreError: there is no such array.
            ConfigError: there are fewer shards than ranks, or rows than in a batch.
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
        if batch_rows < 1 or (drop_last and batch_rows > split.grid.shard_rows * split.shards):
            raise ConfigError(
                f"batch_rows={batch_rows}: should be 1 to {split.rows:,}, the rows of split "
                f"{split.split!r} of {split.where}."
            )
        self.split, self.names, self.batch_rows = split, tuple(names), batch_rows
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.without_tokens = tuple(without_tokens)
        self.epoch = 0

    def __repr__(self) -> str:
        order = f"shuffled, seed {self.seed}" if self.shuffle else "in order"
        rank = f", rank {self.rank} of {self.world}" if self.world > 1 else ""
        return (
            f"<RowDataset {self.split.where}: {', '.join(self.names)}, {self.batch_rows:,} of "
            f"{self.split.rows:,} rows at a time, {order}{rank}>"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, the same on every rank."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = get_worker_info()
        split, part = self.split, (0, 1)
        if worker is not None:  # mapped files and connections of another process are not used
            split, part = _opened(*_where(split)), (worker.id, worker.num_workers)
        loader = Loader(
            split, self.names, batch_rows=self.batch_rows, seed=self.seed,
            without_tokens=self.without_tokens, drop_last=self.drop_last,
            shards=self._shards(*part), shuffle=self.shuffle,
        )  # fmt: skip
        for batch in loader.epoch_batches(self.epoch):
            yield tuple(rows.clone() for rows in batch)  # the loader uses its own again

    def _shards(self, worker: int, workers: int) -> list[int]:
        """Shards of this rank and one of its workers in this epoch."""
        order = list(range(self.split.shards))
        if self.shuffle:
            order = shard_order(self.seed, self.epoch, self.split.shards)
        if self.drop_last:
            order = order[: len(order) // self.world * self.world]
        return order[self.rank :: self.world][worker::workers]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker that is started anew is given: where the store is."""
        return self.__dict__ | {"split": _where(self.split)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, split=_opened(*state["split"]))


def _where(split: StoreSplit) -> tuple[str, str, bool]:
    return split.folder.address, split.split, split.check


def _opened(address: str, split: str, check: bool) -> StoreSplit:
    store = ActivationStore(address, check=check)
    return store.train if split == "train" else store.held_out
