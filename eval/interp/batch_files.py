"""Requests and replies as files, for batch APIs and for people.

Requests are JSON lines as batch APIs take them: custom_id (the key in the ledger), method, url,
body. Replies are read as batch APIs return them (custom_id, response.body) or, of people, as lines
with custom_id and reply, the text that a judge would have written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bsc.errors import UserError
from bsc.eval.interp.asking import Interpretation
from bsc.eval.interp.judges.prompts import Request
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.judges.wire import reply_of, whole
from bsc.files import canonical_json, write_atomically
from bsc.records import parse_json

__all__ = ["read_replies", "write_requests"]

_MAX_TEXT = 1 << 20


def write_requests(path: Path, requests: Sequence[Request], asked: Interpretation) -> None:
    """Write requests, one in a line.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [
        canonical_json(
            {
                "custom_id": asked.key(request),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": asked.model,
                    "messages": list(request.messages),
                    "max_tokens": request.max_tokens,
                    **asked.parameters,
                },
            },
            indent=None,
        )
        for request in requests
    ]
    try:
        write_atomically(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--export {path}: cannot be written ({error.strerror}).") from None


def read_replies(path: Path) -> Iterator[tuple[str, Reply]]:
    """Keys and replies of a file.

    Raises:
        UserError: it cannot be read, or a line is not a reply.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield _reply(parse_json(line, halves=True))
                    except (
                        ValueError,
                        KeyError,
                        TypeError,
                        IndexError,
                        AttributeError,
                        OverflowError,
                        RecursionError,
                    ) as error:
                        raise UserError(
                            f"--import {path}, line {number}: expected custom_id, and "
                            f"response.body or reply ({error!r})."
                        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--import {path}: cannot be read ({error}).") from None


def _reply(line: dict[str, Any]) -> tuple[str, Reply]:
    key = str(line["custom_id"])
    if "reply" in line:
        said = line["reply"]
        text = said if isinstance(said, str) else "" if said is None else json.dumps(said)
        # Who left a line open has not answered.
        return key, Reply("ok", whole(text[-_MAX_TEXT:])) if text.strip() else Reply("failed")
    response = line["response"] if line.get("response") is not None else {}
    if line.get("error") or response.get("status_code", 200) != 200:
        why = line.get("error") or f"HTTP {response.get('status_code')}"
        return key, Reply("failed", error=str(why)[:300])
    reply = reply_of(response["body"])
    return key, reply._replace(text=reply.text[-_MAX_TEXT:])
