"""A ring never waits for itself: every size of it, played through."""

from __future__ import annotations

import pytest

from bsc.cache.store.ring_room import RingRoom


def ends(room: RingRoom, batch: int, every_rows: int | None = None) -> bool:
    """Whether a reader gets to the last whole batch.

    The writers open a window when it fits, the reader opens groups of shards, takes batches, and
    checkpoints when it has to; nothing else moves the place that it holds.
    """
    size, at_once = room.shard_rows, room.shards_at_once
    place = position = checkpoint = 0
    rows = room.shards * size
    while position + batch <= rows:
        committed = min(room.shards, (place + room.slots) // room.window * room.window)
        if place + room.slots >= room.shards:
            committed = room.shards
        opened = committed if committed == room.shards else committed // at_once * at_once
        if position + batch > opened * size:
            return False
        position += batch
        group = -(-position // size) - 1
        group = group // at_once * at_once
        due = group - place >= room.checkpoint_shards
        if every_rows is not None:
            due = position - checkpoint >= every_rows
        if due:
            place, checkpoint = group, position
    return True


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 6, 8, 13, 24])
def test_no_ring_waits_for_itself(slots: int) -> None:
    for window in range(1, slots // 2 + 1):
        room = RingRoom(slots, window, 150, 6)
        assert room.shards_at_once <= room.checkpoint_shards <= room.most_shards
        for batch in range(1, room.batch_rows + 1, 1 + room.batch_rows // 20):
            assert ends(room, batch), (window, batch)


def test_a_larger_batch_would_wait_for_ever() -> None:
    """What the bound is for: the play can fail."""
    room = RingRoom(8, 4, 500, 12)
    assert not ends(room, 8 * 12)


@pytest.mark.parametrize("slots", [8, 13, 24])
def test_an_interval_that_fits_is_reached(slots: int) -> None:
    for window in range(1, slots // 2 + 1):
        room = RingRoom(slots, window, 300, 6)
        for rows in range(1, room.most_shards * 6, 5):
            if room.fits(rows):
                assert ends(room, 1, rows), (window, rows)


def test_a_ring_that_holds_everything_needs_no_checkpoint() -> None:
    room = RingRoom(16, 4, 16, 12)
    assert room.most_shards == 16 and ends(room, 24)


@pytest.mark.parametrize(("window", "rows"), [(1, 100), (4, 1000), (64, 40_000), (8, 200)])
def test_the_slots_for_an_interval_are_enough(window: int, rows: int) -> None:
    room = RingRoom(2 * window, window, 10_000, 12)
    wider = room._replace(slots=room.slots_for(rows))
    assert wider.fits(rows) and not room._replace(slots=wider.slots - 8).fits(rows)
