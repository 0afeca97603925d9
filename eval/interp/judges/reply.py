"""What came of a question that a judge was asked."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Reply", "Status"]

Status = Literal["ok", "refused", "failed"]


class Reply(NamedTuple):
    """What came of a question."""

    status: Status
    """failed: there was no answer, and the question is asked again another time."""
    text: str = ""
    yes: list[list[float]] | None = None
    """[place in the text, probability of 1] of each answer, where the judge gives probabilities; of
    an intruder question the probabilities of the numbers."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    counted: bool = True
    """Whether the judge said how many tokens; else they are estimated."""
    attempts: int = 1
    seconds: float = 0.0
    error: str = ""
