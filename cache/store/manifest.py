"""The manifest: what is committed, and where a killed capture goes on.

One file per committed window of each writer, written whole and atomically, so that a window is
committed or not and nothing has to be cut back after a crash. Its lines are the records of the
window's shards, all arrays; its last line sums the window up, says where in the text the next one
begins, and carries a hash of everything before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from bsc.cache.store.folder import PARTIAL, StoreFolder
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import MANIFEST, PROVENANCE, ArraySpec, array_key, end_key, window_key
from bsc.cache.store.shard import ShardRecord
from bsc.errors import StoreError
from bsc.files import canonical_json
from bsc.records import check_seal, parse_json, parse_object, record_hash

__all__ = [
    "PartEnd",
    "TextPoint",
    "WindowRecord",
    "committed_windows",
    "parse_array_json",
    "read_array_json",
    "read_end",
    "read_json",
    "read_provenance",
    "read_shard_hashes",
    "read_window",
    "write_end",
    "write_window",
]

# Keys of canonical JSON are in order: what is looked for stands first and last.
_LINE_START = re.compile(r'\{"array": ("(?:[^"\\]|\\.)*"), "bytes": (\d+), ')
_LINE_END = re.compile(r'"shard": (\d+), "window": \d+, "xxh3_128": "([0-9a-f]{32})"\}\n$')


@dataclass(frozen=True)
class TextPoint:
    """A place in a split's stream of rows at which a batch of the model begins, and rows after it.

    With the text and the settings of a capture it gives the rows that follow, exactly.
    """

    document: int = 0
    """First document of the batch."""
    offset: int = 0
    """Tokens of that document that came before the batch."""
    rows: int = 0
    """Rows of the split before the batch, of this writer."""
    skip: int = 0
    """Rows of the batch that belong to what came before."""


@dataclass(frozen=True)
class WindowRecord:
    """One committed window: its shards, and where the next window begins."""

    split: Split
    rank: int
    window: int
    next: TextPoint
    shards: tuple[ShardRecord, ...]
    dropped: int = 0
    """Rows that filled no shard, where the text ended in this window."""

    @property
    def shard_numbers(self) -> list[int]:
        """Its shards in order, each once."""
        return sorted({record.shard for record in self.shards})


@dataclass(frozen=True)
class PartEnd:
    """What one writer says when its part is finished."""

    rank: int
    rows: dict[str, int]
    """Committed rows by split."""
    dropped: dict[str, int]
    """Rows at the end of the text that filled no shard, by split."""
    text_ended: bool
    """Whether the text gave fewer training rows than were asked for."""


def _hashed(lines: list[str], last: dict[str, Any]) -> str:
    text = "".join(lines) + canonical_json(last, indent=None)
    digest = xxhash.xxh3_128_hexdigest(text.encode())
    return "".join(lines) + canonical_json(last | {"xxh3_128": digest}, indent=None)


def _checked(text: str, where: str) -> list[dict[str, Any]]:
    """The lines of a file that ends with a hash of itself.

    Raises:
        StoreError: the file is cut, changed or of another form.
    """
    lines, last = _checked_lines(text, where)
    try:
        return [*(parse_json(line) for line in lines), last]
    except ValueError as error:
        raise StoreError(f"{where}: cut or changed ({error})") from None


def _checked_lines(text: str, where: str) -> tuple[list[str], dict[str, Any]]:
    """The lines of such a file but the last, as they are, and the last without its hash.

    Raises:
        StoreError: as `_checked`.
    """
    lines = text.splitlines(keepends=True)
    try:
        last = parse_json(lines[-1])
        found = last.pop("xxh3_128")
        body = "".join(lines[:-1]) + canonical_json(last, indent=None)
        if xxhash.xxh3_128_hexdigest(body.encode()) != found or text != _hashed(lines[:-1], last):
            raise ValueError("its hash does not match")
        return lines[:-1], last
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where}: cut or changed ({error})") from None


def write_window(folder: StoreFolder, record: WindowRecord) -> None:
    """Commit a window whose shards are published."""
    lines = [canonical_json(shard.to_json(), indent=None) for shard in record.shards]
    last = {
        "split": record.split,
        "rank": record.rank,
        "window": record.window,
        "next": asdict(record.next),
        "dropped": record.dropped,
    }
    folder.write_text(window_key(record.split, record.rank, record.window), _hashed(lines, last))


def _text(folder: StoreFolder, key: str) -> str | None:
    """A file of the manifest, or None where it is not there.

    Raises:
        StoreError: it is not text.
    """
    try:
        return folder.read(key).decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise StoreError(f"{folder}/{key}: cut or changed ({error})") from None


def read_window(folder: StoreFolder, split: Split, rank: int, window: int) -> WindowRecord | None:
    """A committed window, or None where it is not committed.

    Raises:
        StoreError: the file is cut, changed or of another form.
    """
    key = window_key(split, rank, window)
    text = _text(folder, key)
    if text is None:
        return None
    *shards, last = _checked(text, f"{folder}/{key}")
    try:
        record = WindowRecord(
            split=last["split"],
            rank=int(last["rank"]),
            window=int(last["window"]),
            next=TextPoint(**last["next"]),
            shards=tuple(ShardRecord.from_json(line) for line in shards),
            dropped=int(last["dropped"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder}/{key}: not a manifest of bsc ({error!r})") from None
    if (record.split, record.rank, record.window) != (split, rank, window):
        raise StoreError(f"{folder}/{key}: the manifest of another window lies here")
    return record


def read_shard_hashes(
    folder: StoreFolder, split: Split, rank: int, window: int
) -> dict[tuple[str, int], tuple[int, str]]:
    """By path and number of each shard of a committed window its size and XXH3-128; none where the
    window is not committed.

    The hash of the file vouches for its lines, which hold thousands of sums each: only their two
    ends are read.

    Raises:
        StoreError: the file is cut, changed or of another form.
    """
    key = window_key(split, rank, window)
    text = _text(folder, key)
    if text is None:
        return {}
    lines, last = _checked_lines(text, f"{folder}/{key}")
    if (last.get("split"), last.get("rank"), last.get("window")) != (split, rank, window):
        raise StoreError(f"{folder}/{key}: the manifest of another window lies here")
    found = {}
    for line in lines:
        start, end = _LINE_START.match(line), _LINE_END.search(line, max(0, len(line) - 200))
        if start is None or end is None:
            raise StoreError(f"{folder}/{key}: not a manifest of bsc")
        found[str(parse_json(start[1])), int(end[1])] = (int(start[2]), end[2])
    return found


def windows(folder: StoreFolder, split: Split, rank: int) -> Iterator[WindowRecord]:
    """The committed windows of one writer, in order."""
    window = 0
    while (record := read_window(folder, split, rank, window)) is not None:
        yield record
        window += 1


def committed_windows(folder: StoreFolder, split: Split, writers: int) -> list[int]:
    """Number of committed windows of each writer."""
    counts = [0] * writers
    for key in folder.keys(f"{MANIFEST}/{split}"):
        rank = key.rsplit("/", 1)[-1].partition("-")[0]
        if not key.endswith(PARTIAL) and rank.isdigit() and int(rank) < writers:
            counts[int(rank)] += 1
    return counts


def write_end(folder: StoreFolder, end: PartEnd) -> None:
    """Say that a writer's part is finished."""
    folder.write_text(end_key(end.rank), _hashed([], asdict(end)))


def read_end(folder: StoreFolder, rank: int) -> PartEnd | None:
    """What a writer said when its part was finished, or None where it is not.

    Raises:
        StoreError: the file is cut, changed or of another form.
    """
    key = end_key(rank)
    try:
        (value,) = _checked(folder.read(key).decode(), f"{folder}/{key}")
        return PartEnd(**value)
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}/{key}: cut or changed ({error})") from None


def read_json(folder: StoreFolder, key: str, what: str) -> dict[str, Any]:
    """A file of a store that holds a JSON object; `what` it is, for the message.

    Raises:
        StoreError: it is missing, cannot be read, or holds something else.
    """
    try:
        raw = folder.read(key)
    except FileNotFoundError:
        raise StoreError(f"{folder}: no {what} here ({key} is missing).") from None
    except OSError as error:
        raise StoreError(f"{folder}/{key}: cannot be read ({error}).") from None
    return parse_object(raw, f"{folder}/{key}")


def read_provenance(folder: StoreFolder) -> dict[str, Any]:
    """How a store was made; what the capture found is under `completed` once it has ended.

    Raises:
        StoreError: it is missing, cannot be read, or was changed since it was written.
    """
    where = f"{folder}/{PROVENANCE}"
    made = check_seal(read_json(folder, PROVENANCE, "provenance"), where)
    if not isinstance(made.get("capture"), dict):
        raise StoreError(f"{where}: not the provenance of a store.")
    return made


def read_array_json(folder: StoreFolder, spec: ArraySpec) -> tuple[int, dict[str, Any]]:
    """Rows and attributes of an array, from its zarr.json.

    Raises:
        StoreError: as `read_json` and `parse_array_json`.
    """
    key = array_key(spec)
    return parse_array_json(read_json(folder, key, "array"), f"{folder}/{key}")


def parse_array_json(meta: dict[str, Any], where: str) -> tuple[int, dict[str, Any]]:
    """Rows and attributes of an array, from what is in its zarr.json.

    Raises:
        StoreError: it is not that of an array of a store, or was changed since it was written.
    """
    try:
        rows, attributes = int(meta["shape"][0]), dict(meta["attributes"])
        hashed = attributes.pop("xxh3_128")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(
            f"{where}: not the metadata of an array of a bsc store ({error!r})."
        ) from None
    if hashed != record_hash(meta | {"attributes": attributes}):
        raise StoreError(
            f"{where}: changed since it was written, or damaged: it does not have the hash that it "
            f"carries. Copy it again from where the store is whole."
        )
    return rows, attributes
