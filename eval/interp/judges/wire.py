"""What comes over the wire from a judge, read without trusting that anything is there."""

from __future__ import annotations

import email.utils
import math
import time
from typing import Any

import httpx

from bsc.eval.interp.judges.reply import Reply

__all__ = ["LONGEST_WAIT", "is_length", "reply_of", "retry_after", "whole"]

LONGEST_WAIT = 120.0
"""Seconds that a judge may ask to be left alone for."""
_TOO_LONG = ("context", "too long", "maximum", "max_tokens", "token limit", "exceed")


def reply_of(value: dict[str, Any]) -> Reply:
    """A response to a chat completion as a reply."""
    choice = value["choices"][0]
    message = choice["message"] if isinstance(choice["message"], dict) else {}
    text, refusal = message.get("content"), message.get("refusal")
    usage = value["usage"] if isinstance(value.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    refused = bool(refusal) or choice.get("finish_reason") == "content_filter"
    return Reply(
        "refused" if refused else "ok",
        text=whole(text if isinstance(text, str) else str(refusal or "")),
        yes=_probabilities(choice.get("logprobs")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        cached_tokens=_count(cached),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def whole(text: str) -> str:
    """A text without halves of characters, which no file and no request can hold."""
    return text.encode("utf-8", "replace").decode()


def is_length(error: str) -> bool:
    """Whether a judge complains of the length of one request."""
    return any(word in error.lower() for word in _TOO_LONG)


def _count(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 <= value < 1e9 else 0


def retry_after(headers: httpx.Headers) -> float | None:
    """What Retry-After says, in seconds."""
    text = headers.get("retry-after")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = email.utils.parsedate_tz(text)
            seconds = email.utils.mktime_tz(when) - time.time() if when else math.nan
        except (ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), LONGEST_WAIT) if math.isfinite(seconds) else None


def _probabilities(logprobs: Any) -> list[list[float]] | None:
    """[place in the text, probability of 1] of every token that is 0 or 1."""
    try:
        place, found = 0, []
        for token in logprobs["content"]:
            text = str(token["token"])
            if text.strip() in ("0", "1"):
                mass = {"0": 0.0, "1": 0.0}
                for other in token["top_logprobs"]:
                    if (digit := str(other["token"]).strip()) in mass:
                        mass[digit] += math.exp(min(0.0, float(other["logprob"])))
                if (total := mass["0"] + mass["1"]) > 0:
                    at = place + len(text) - len(text.lstrip())
                    found.append([at, round(mass["1"] / total, 6)])
            place += len(text)
        return found or None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
