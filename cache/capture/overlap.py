"""How much of the held-out text stands word for word in the training rows of a store.

By the n-grams that lie beside the rows (model/ngrams.py). A held-out row is *seen* if one of the
16-token n-grams that it belongs to is that of a training row. Whether a longer run of tokens stands
in the training rows is bounded by it: then all of its n-grams do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bsc.cache.model.ngrams import NGRAM, Runs
from bsc.cache.store.layout import shard_key
from bsc.cache.store.ring import first_kept
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.progress import stage

__all__ = ["LONG_RUN", "Overlap", "measure_overlap", "seen_ngrams"]

LONG_RUN = 64
"""Tokens of a long run."""
_SLOTS_EACH = 32
"""Slots of the table for each known n-gram: one in 32 strangers needs a second look."""


class Overlap(NamedTuple):
    """What of the held-out split was seen in training."""

    seen: NDArray[np.bool_]
    """(rows of the held-out split,): the row belongs to an n-gram of a training row."""
    train_rows: int
    """Training rows that were looked at: all of them but in a ring, whose oldest are gone."""
    ngrams: int
    """Held-out n-grams, each as often as it stands there."""
    seen_ngrams: int
    long_runs: int
    """Runs of 64 held-out tokens of one document."""
    seen_long_runs: int
    """Those of which every n-gram is that of a training row: at least as many as stand in them."""

    def bits(self) -> bytes:
        """`seen` as bits, the first row lowest in the first byte: overlap.bin of a store."""
        return np.packbits(self.seen, bitorder="little").tobytes()

    def to_json(self) -> dict[str, Any]:
        """For provenance.json."""
        return {
            "train_rows": self.train_rows,
            "rows": len(self.seen),
            "seen_rows": int(self.seen.sum()),
            "ngram_tokens": NGRAM,
            "ngrams": self.ngrams,
            "seen_ngrams": self.seen_ngrams,
            "run_tokens": LONG_RUN,
            "runs": self.long_runs,
            "seen_runs": self.seen_long_runs,
            "xxh3_128": xxhash.xxh3_128_hexdigest(self.bits()),
        }


def seen_ngrams(
    known: NDArray[np.uint64],
    split: StoreSplit,
    shards: range,
    on_shard: Callable[[], None] = lambda: None,
) -> NDArray[np.bool_]:
    """Which n-grams stand in the rows of some shards, (n,).

    About 20 ns a row with a million n-grams known, on two cores, and 8 bytes a row from the disk.

    Args:
        known: n-grams, ascending, each once.
        split: whose rows are looked at.
        shards: of the split.
        on_shard: called after each that is still there.
    """
    slots = 1 << (max(1, len(known)) * _SLOTS_EACH - 1).bit_length()
    mask = np.uint64(slots - 1)
    table = np.zeros(slots, bool)
    table[known & mask] = True

    def hits(shard: int) -> NDArray[np.int64] | None:
        try:
            ngrams = split.shard("tokens/ngram", shard)
        except StoreError:
            if split.folder.exists(shard_key(split.spec("tokens/ngram"), shard)):
                raise
            return None  # a ring has moved past it
        likely = ngrams[table[ngrams & mask]]
        at = np.searchsorted(known, likely).clip(max=len(known) - 1)
        return np.unique(at[known[at] == likely])

    found = np.zeros(len(known), bool)
    if len(known):
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="overlap") as pool:
            for at in pool.map(hits, shards):
                if at is not None:
                    found[at] = True
                    on_shard()
    return found


def measure_overlap(store: ActivationStore) -> Overlap | None:
    """Compare the held-out rows of a store with its training rows; None where there are none.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    held_out = store.splits.get("held_out")
    if held_out is None or not held_out.rows:
        return None
    train = store.train
    kept = 0
    if store.ring is not None:
        kept = first_kept(store.folder, train.spec("tokens/ngram"), train.shards)
    if kept == train.shards:
        return None
    ngrams = held_out.tokens("ngram")
    known, place = np.unique(ngrams, return_inverse=True)
    size = train.grid.shard_rows
    with stage("overlap", (train.shards - kept) * size, "rows") as progress:
        looked_at: list[int] = []

        def note() -> None:
            looked_at.append(size)
            progress.advance(size)

        is_seen = seen_ngrams(known[known > 0], train, range(kept, train.shards), note)
    is_seen = np.concatenate([np.zeros(len(known) - len(is_seen), bool), is_seen])  # of 0: no
    ends_seen = is_seen[place]
    runs = Runs(held_out.tokens("doc_id"))
    # A run of 64 is seen where 64 - 15 n-grams in a row are, the last at its end.
    long_runs, seen_long_runs = runs.whole(ends_seen, LONG_RUN - NGRAM + 1, LONG_RUN)
    return Overlap(
        seen=runs.covered(ends_seen, NGRAM),
        train_rows=sum(looked_at) if (known > 0).any() else (train.shards - kept) * size,
        ngrams=int((ngrams > 0).sum()),
        seen_ngrams=int(ends_seen.sum()),
        long_runs=long_runs,
        seen_long_runs=seen_long_runs,
    )
