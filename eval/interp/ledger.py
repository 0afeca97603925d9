"""Every answer of every judge, kept: a file that is only ever appended to.

    RUN/interp/ledger.jsonl     one line for each answer, in the order in which they came

A line is written before anything is done with its answer, so whatever stops the process, nothing
that was paid for is asked again. The key of a question is a hash of the judge's model, the
parameters, the messages and the version of the prompts; another judge has other keys. Where a key
is there twice, the later line counts. Replies are kept as they came and read when scores are made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bsc.errors import StoreError
from bsc.eval.interp.judges.facts import Parameters
from bsc.eval.interp.judges.prompts import PROMPTS_VERSION, Request
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.passes.pieces import identity_of
from bsc.files import canonical_json
from bsc.records import parse_json

__all__ = ["Ledger", "key_of"]

_SYNC_EVERY = 1.0
"""Seconds between calls that make it survive a power cut, too; a kill it survives anyway."""


def key_of(model: str, parameters: Parameters, request: Request) -> str:
    """Key of a question.

    Args:
        model: of the judge.
        parameters: that decide its answer: temperature and the like.
        request: the question.
    """
    return identity_of(
        {
            "model": model,
            "parameters": parameters | {"max_tokens": request.max_tokens},
            "messages": list(request.messages),
            "prompts": PROMPTS_VERSION,
        }
    )


class Ledger:
    """The ledger of a run. To be used in a `with` block, by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Read which questions have an answer.

        Args:
            path: of the file; it may not be there yet.

        Raises:
            StoreError: a line in the middle is damaged.
        """
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._failed: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._read()
        self._synced = time.monotonic()

    def _read(self) -> None:
        self._file.seek(0)
        place, number = 0, 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                # Half a line of a process that was killed while it wrote.
                self._file.truncate(place)
                break
            try:
                entry = parse_json(line)
                self._note(str(entry["key"]), str(entry["status"]), place, len(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise StoreError(
                    f"{self.path}, line {number}: damaged ({error!r}). Remove that line; its "
                    f"question is asked again."
                ) from None
            place += len(line)
        self._end = place

    def _note(self, key: str, status: str, place: int, size: int) -> None:
        if status == "failed":
            if key not in self._places:
                self._failed.add(key)
            return
        self._failed.discard(key)
        self._places[key] = (place, size)

    def __contains__(self, key: str) -> bool:
        """Whether a question has an answer."""
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def failed(self, key: str) -> bool:
        """Whether a question was asked and never answered."""
        return key in self._failed

    def get(self, key: str) -> Reply | None:
        """The answer to a question, None where there is none."""
        if (place := self._places.get(key)) is None:
            return None
        entry = self._entry(*place)
        return Reply(**{name: entry[name] for name in Reply._fields if name in entry})

    def _entry(self, place: int, size: int) -> dict[str, Any]:
        return dict(parse_json(os.pread(self._file.fileno(), size, place)))

    def add(self, key: str, model: str, request: Request, reply: Reply) -> None:
        """Write an answer."""
        entry = {
            "key": key,
            "model": model,
            "kind": request.kind,
            "coder": request.coder,
            "latent": request.latent,
            "part": request.part,
            "prompts": PROMPTS_VERSION,
            **reply._asdict(),
        }
        line = canonical_json(entry, indent=None).encode("utf-8", "replace")
        self._file.write(line)
        self._file.flush()
        self._note(key, reply.status, self._end, len(line))
        self._end += len(line)
        if time.monotonic() - self._synced > _SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Make it survive a power cut."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def entries(self, model: str) -> Iterator[dict[str, Any]]:
        """Answers of one judge, in the order of the file."""
        for place, size in sorted(self._places.values()):
            entry = self._entry(place, size)
            if entry["model"] == model:
                yield entry

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *failure: object) -> None:
        self.sync()
        self._file.close()
