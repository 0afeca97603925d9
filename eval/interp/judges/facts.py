"""What is known of a judge."""

from __future__ import annotations

from bsc.typed import Record

__all__ = ["JudgeFacts", "Parameters", "is_simulated"]

Parameters = dict[str, str | int]
"""What decides a judge's answers, part of the key of each."""


def is_simulated(model: str) -> bool:
    """Whether a judge says of itself, by its name, that it is none: ``simulated-...``."""
    return model.lower().startswith("simulated")


class JudgeFacts(Record):
    """Who answered; what it can do, where it was asked."""

    model: str
    simulated: bool
    """Whether it says of itself that it is no judge."""
    by: str | None = None
    """``"files"``: the answers were imported."""
    echoed_model: str | None = None
    """What it calls itself."""
    repeatable: bool | None = None
    """Whether it said the same when it was asked again."""
    probabilities: bool | None = None
    structured_output: str | None = None
    known_answers_right: str | None = None

    @classmethod
    def of(cls, model: str, **more: str | bool | None) -> JudgeFacts:
        """Facts about the judge of a name."""
        return cls.model_validate({"model": model, "simulated": is_simulated(model), **more})
