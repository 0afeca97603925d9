"""What a run of finetuning comes to before it is started."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from bsc.finetuning.finetune import stepper_of, tuned_coders
from bsc.finetuning.job import FinetuneJob
from bsc.progress import format_bytes

__all__ = ["FinetunePlan", "plan_finetune"]


@dataclass(frozen=True)
class FinetunePlan:
    """The figures of a run."""

    coders: int
    sets: int
    tokens: int
    steps: int
    batch_tokens: int
    micro_tokens: int
    lr: dict[str, float]
    """By coder."""
    memory: dict[str, int]
    """Bytes beside the model by purpose, and their total."""
    free: int
    """Bytes that may be used."""
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    tokens_per_second: float
    """Measured here on a batch of the text, after one that was not timed."""

    @property
    def hours(self) -> float:
        """At the measured rate."""
        return self.tokens / self.tokens_per_second / 3600

    def to_json(self) -> dict[str, Any]:
        """The figures for machines."""
        return dict(self.__dict__) | {"hours": self.hours}

    def lines(self) -> list[str]:
        """The figures for people."""
        parts = ", ".join(f"{k} {format_bytes(v)}" for k, v in self.memory.items() if k != "total")
        took = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"
        rates = sorted(set(self.lr.values()))
        return [
            f"coders      {self.coders} in {self.sets} set(s), each a forward and a backward pass "
            f"from its first hookpoint on",
            f"tokens      {self.tokens:,}, {self.steps:,} steps of {self.batch_tokens:,}, "
            f"{self.micro_tokens:,} at a time",
            f"lr          {', '.join(f'{rate:g}' for rate in rates)}",
            f"memory      {format_bytes(self.memory['total'])} of {format_bytes(self.free)} beside "
            f"the model ({parts})",
            f"checkpoint  {format_bytes(self.checkpoint)} on disk, twice while one is written",
            f"time        {took} at {self.tokens_per_second:,.0f} tokens/s, measured here",
        ]


def plan_finetune(job: FinetuneJob) -> FinetunePlan:
    """Say what a run comes to; takes two steps of copies of the coders to know the rate.

    Raises:
        UserError: the text gives not one batch.
    """
    memory = job.memory
    parts = {name: getattr(memory, name) for name in ("weights", "optimisers", "acting", "passes")}
    stepper = stepper_of(job, tuned_coders(job))
    _, batch = next(job.text.batches(job.lm.tokenizer, job.batch_contexts))
    seconds = 0.0
    for step in range(2):
        began = time.perf_counter()
        stepper.step(batch, step, job.steps)
        seconds = time.perf_counter() - began
    return FinetunePlan(
        coders=len(job.planned),
        sets=len(job.sets),
        tokens=job.steps * job.batch_tokens,
        steps=job.steps,
        batch_tokens=job.batch_tokens,
        micro_tokens=memory.micro_contexts * job.text.context,
        lr={c.name: c.lr for c in job.planned},
        memory=parts | {"total": memory.total},
        free=job.free,
        checkpoint=memory.weights // 2 + memory.optimisers,
        tokens_per_second=batch.token_id.size / seconds,
    )
