"""Finetuning the coders of a run through the model, into a new run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bsc.cache.store.kept import kept_moments
from bsc.config import parse_config
from bsc.devices import keep_freed_memory
from bsc.errors import ConfigError, StoreError, UserError
from bsc.files import make_folder
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.job import FinetuneJob, make_job
from bsc.finetuning.step import Stepper
from bsc.finetuning.text import Place
from bsc.finetuning.tuned_coder import FIGURES, Progress, TunedCoder
from bsc.prefetch import prefetched
from bsc.progress import console
from bsc.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bsc.train.live import Columns, training_view
from bsc.train.metrics import MetricsWriter
from bsc.train.run import Run, as_run, claim
from bsc.train.run_config import Completed, FinetunedCoder, RunConfig
from bsc.train.stopping import asked_to_stop
from bsc.train.training_rows import Scale
from bsc.typed import combined, write_typed

__all__ = [
    "FinetuneSummary",
    "finetune",
    "resume_finetune",
    "run_job",
    "stepper_of",
    "tuned_coders",
]

_CHECKPOINT_SECONDS = 600.0
_AHEAD = 2
"""Batches of contexts that are made before they are asked for."""
_COLUMNS: Columns = {
    "KL": ("kl", ".4f"), "CE": ("ce", ".4f"), "FVU": ("fvu", ".4f"), "L0": ("l0", ".1f"),
    "dead": ("dead", "%"), "lr": ("lr", ".2g"),
}  # fmt: skip
_FREE = frozenset({"name", "runs", "device", "checkpoint_every", "keep_checkpoint", "tensorboard",
                   "wandb"})  # fmt: skip
"""Settings that change nothing in the result."""


class FinetuneSummary(NamedTuple):
    """Figures of a coder over the last logging interval: text it had not seen before, in the first
    pass over it."""

    name: str
    frozen_at: int | None
    """Step at which it turned non-finite and was left alone; None: it did not."""
    kl: float | None = None
    """None, as what follows, where the coder turned non-finite before the first interval."""
    ce: float | None = None
    fvu: float | None = None
    l0: float | None = None
    dead: float | None = None


def finetune(
    run: Run | str | Path,
    config: FinetuneConfig | None = None,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    check: bool = True,
) -> tuple[Run, list[FinetuneSummary]]:
    """Finetune the coders of a run on the loss of the model that they are spliced into.

    Args:
        run: a run whose training has ended, or its folder.
        config: how; None: the defaults.
        store: where its store is now; None: where it was in training.
        model: where the model is now; None: where it was at the capture.
        check: whether shards are compared with the manifest when they are first read.

    Returns:
        The new run, and the last figures of every coder.

    Raises:
        UserError: the request cannot be carried out. Nothing is written then.
    """
    job = make_job(as_run(run), config or FinetuneConfig(), store=store, model=model, check=check)
    return run_job(job, None)


def resume_finetune(
    folder: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    check: bool = True,
) -> tuple[Run, list[FinetuneSummary]]:
    """Go on with a run of finetuning from its last checkpoint, or from the beginning.

    On a CPU with as many threads the result is the same bytes as that of a run that was never
    interrupted.

    Args:
        folder: of the run.
        changes: fields of `FinetuneConfig` that were given again. They must be those of the run,
            but for settings that change nothing in the result.
        store: where its store is now; None: where the run began with it.
        model: where the model is now; None: where it was.
        check: whether shards are compared with the manifest when they are first read.

    Raises:
        UserError: the run cannot be resumed, or not like this. Nothing is changed then.
    """
    run = Run(Path(folder).resolve())
    if not run.folder.is_dir():
        raise StoreError(f"{folder}: no such run. `bsc finetune RUN` makes one.")
    saved = run.config()
    if saved.finetuned is None:
        raise UserError(f"{folder}: not a run of finetuned coders; `{saved.going_on} {folder}`.")
    if saved.completed:
        raise UserError(f"{folder}: this run is complete. Finetune under another --name.")
    config = _same(saved, changes or {})
    if not Path(saved.finetuned.run).is_dir():
        raise StoreError(
            f"{folder}: began with the coders of {saved.finetuned.run}, which is not there any "
            f"more. Put that run back to go on."
        )
    parent = Run.open(saved.finetuned.run)
    job = make_job(
        parent, config, store=store or saved.store, model=model, check=check, run=run, saved=saved
    )
    return run_job(job, load_checkpoint(run.folder / "checkpoint"), new=False)


def _same(saved: RunConfig, changes: Mapping[str, Any]) -> FinetuneConfig:
    """The config of the run, with what is free to change.

    Raises:
        ConfigError: names what is different.
    """
    assert saved.finetuned is not None
    where = "bsc finetune --resume"
    begun = {"fvu_weight": 1.0, "beta1": 0.9} | saved.finetuned.config  # not in older runs
    old, new = (parse_config(FinetuneConfig, begun | c, where) for c in ({}, dict(changes)))
    for name in changes:
        a, b = getattr(old, name), getattr(new, name)
        if name not in _FREE and str(a) != str(b):
            raise ConfigError(
                f"{where}: {name} is {b}, but the run has {a}. A run goes on as it began; for "
                f"other settings finetune under another --name."
            )
    return new


def run_job(
    job: FinetuneJob,
    checkpoint: Checkpoint | None,
    *,
    new: bool = True,
) -> tuple[Run, list[FinetuneSummary]]:
    """Finetune from a checkpoint, or from the beginning, to the end.

    Args:
        job: what.
        checkpoint: as `load_checkpoint` gives it.
        new: whether the folder is still to be made.
    """
    with ExitStack() as stack:
        if job.lm.model.device.type == "cpu":
            keep_freed_memory()
        coders = tuned_coders(job)
        loop = _Loop(job, coders)
        if checkpoint is not None:
            loop.restore(checkpoint)
        batches = loop.batches()
        stack.callback(batches.close)
        if new:
            loop.first = next(batches)  # a text that gives nothing is told before anything is made
            if loop.first[0].epoch:
                console.print(
                    "the capture read the whole text, so the coders are finetuned on documents "
                    "that they were trained on"
                )
            make_folder(job.run.folder, "run")
        stack.enter_context(claim(job.run.folder))
        record = job.record()
        write_typed(job.run.config_path, record)
        job.run.remove_figures()
        console.print(
            f"{job.run.folder}: {len(coders)} coders in {len(job.sets)} set(s), {job.steps:,} "
            f"steps of {job.batch_tokens:,} tokens"
            + (f"; from step {loop.step:,}" if loop.step else "")
        )
        summaries = loop.run(batches)
        began = str(job.parent.folder.resolve())
        facts = {"finetuned_from": began, "finetune_loss": job.config.loss}
        for coder in coders.values():
            coder.finish(facts, loop.step).save(job.run.coder_folder(coder.planned.name))
        completed = Completed(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(loop.seconds, 1),
            rows=loop.tokens,
        )
        write_typed(job.run.config_path, combined(RunConfig, record, completed=completed))
        if not job.config.keep_checkpoint:
            shutil.rmtree(job.run.folder / "checkpoint", ignore_errors=True)
    return job.run, summaries


def tuned_coders(job: FinetuneJob) -> dict[str, TunedCoder]:
    """The coders of a job by name, loaded."""
    scales: dict[tuple[str, str], Scale] = {}

    def scale(planned: FinetunedCoder) -> Scale:
        hook, side = planned.hookpoint, planned.coder.side
        if (hook, side) not in scales:
            moments = [
                kept_moments(job.store.train, f"{hook}/{s}", job.without_tokens)
                for s in (side, "output")
            ]
            scales[hook, side] = Scale.of(hook, moments[0], moments[1], job.config.normalise)
        return scales[hook, side]

    device = job.lm.model.device
    return {p.name: TunedCoder(p, job.coder(p), scale(p), job.config, device) for p in job.planned}


def stepper_of(job: FinetuneJob, coders: Mapping[str, TunedCoder]) -> Stepper:
    """The model of a job with its coders."""
    return Stepper(
        job.lm,
        [[coders[name] for name in own] for own in job.sets],
        loss=job.config.loss,
        fvu_weight=job.config.fvu_weight,
        packing=job.text.packing,
        separation=job.separation,
        without_tokens=job.without_tokens,
        micro_contexts=job.memory.micro_contexts,
    )


class _Loop:
    """Steps, metrics and checkpoints."""

    def __init__(self, job: FinetuneJob, coders: Mapping[str, TunedCoder]) -> None:
        self.job, self.coders = job, list(coders.values())
        self.stepper = stepper_of(job, coders)
        self.step = 0
        """Steps that were taken."""
        self.tokens = 0
        """Of these steps, padding left out."""
        self.place: Place | None = None
        """Of the last batch."""
        self.seconds = 0.0
        self.first: tuple[Place, Any] | None = None
        """A batch that was taken already."""
        self._metrics_bytes = 0
        self._saved_step: int | None = None

    def batches(self) -> Any:
        """Batches that are still to be taken, with their places."""
        contexts = self.job.batch_contexts
        source = self.job.text.batches(self.job.lm.tokenizer, contexts, self.place)
        if self.step:
            next(source)  # the last one that was taken
        return prefetched(source, _AHEAD)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to where a checkpoint was taken."""
        state = checkpoint.state
        self.step, self.place = int(state["step"]), Place(*state["place"])
        self.tokens = int(state["tokens"])
        self.seconds, self._metrics_bytes = float(state["seconds"]), int(state["metrics_bytes"])
        self._saved_step = self.step
        for coder in self.coders:
            known = checkpoint.coder(coder.planned.name)
            if known is None:
                raise StoreError(
                    f"{self.job.run.folder}: no {coder.planned.name} in its checkpoint."
                )
            progress, mine = known
            coder.load_state(mine, Progress(**progress))

    def save(self, writer: MetricsWriter) -> None:
        """Write a checkpoint, unless the one of this step is there."""
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        state = {
            "step": self.step,
            "place": list(self.place or ()),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics_bytes": writer.flush(),
            "coders": [
                {"name": c.planned.name, "progress": asdict(c.progress)} for c in self.coders
            ],
        }
        folder = self.job.run.folder / "checkpoint"
        save_checkpoint(folder, self.step, state, [c.state() for c in self.coders])

    def run(self, batches: Any) -> list[FinetuneSummary]:
        """Take the steps that are left; the last figures of every coder."""
        job, config = self.job, self.job.config
        writer = MetricsWriter(
            job.run.metrics_path,
            keep_bytes=self._metrics_bytes,
            name=config.name,
            tensorboard=job.run.folder / "tensorboard" if config.tensorboard else None,
            wandb=config.wandb,
        )
        tokens = job.batch_tokens
        label = f"finetune {len(self.coders)} coders"
        with writer, asked_to_stop("bsc finetune --resume") as stop:
            view_ = training_view(label, job.steps * tokens, self.step * tokens, _COLUMNS)
            with view_ as view:
                if self._metrics_bytes:
                    view.figures.update({line["coder"]: line for line in job.run.metrics()})
                began, saved = time.perf_counter() - self.seconds, time.perf_counter()
                waited, before = 0.0, time.perf_counter()
                left = job.steps - self.step if self._active() else 0
                ahead = [self.first] if self.first else []
                for self.place, batch in islice(_chain(ahead, batches), left):
                    waited += time.perf_counter() - before
                    for name in self.stepper.step(batch, self.step, job.steps):
                        console.print(
                            f"{name}: not finite at step {self.step}; it is left as it was"
                        )
                    self.step += 1
                    self.tokens += len(batch.rows()["token_id"])
                    self.seconds = time.perf_counter() - began
                    if self.step % config.log_every == 0 or self.step == job.steps:
                        for line in self._lines():
                            view.figures[line["coder"]] = line
                            writer.write(line)
                    view.advance(tokens, waited)
                    now = time.perf_counter()
                    due = (
                        self.step % config.checkpoint_every == 0
                        if config.checkpoint_every
                        else now - saved > _CHECKPOINT_SECONDS
                    )
                    if due or stop.is_set():
                        self.save(writer)
                        saved = time.perf_counter()
                    if stop.is_set() and self.step < job.steps:
                        raise KeyboardInterrupt
                    if not self._active():
                        break
                    before = time.perf_counter()
            self.save(writer)
            return [self._summary(c, view.figures) for c in self.coders]

    def _active(self) -> bool:
        return any(c.progress.frozen_at is None for c in self.coders)

    def _lines(self) -> list[dict[str, Any]]:
        """Lines of metrics for the steps since the last ones."""
        lines = []
        for coder in self.coders:
            progress = coder.progress
            *sums, steps = progress.sums
            progress.sums = [0.0] * len(progress.sums)
            if progress.frozen_at is not None or not steps:
                continue
            lines.append(
                {
                    "coder": coder.planned.name,
                    "step": self.step,
                    "rows": self.tokens,
                    "seconds": round(self.seconds, 2),
                    "dead": coder.dead(self.job.config.dead_after),
                    "lr": progress.lr,
                    **{name: value / steps for name, value in zip(FIGURES, sums, strict=True)},
                }
            )
        return lines

    @staticmethod
    def _summary(coder: TunedCoder, figures: Mapping[str, Mapping[str, Any]]) -> FinetuneSummary:
        f = figures.get(coder.planned.name, {})
        known = {name: f.get(name) for name in (*FIGURES, "dead")}
        return FinetuneSummary(coder.planned.name, coder.progress.frozen_at, **known)


def _chain(first: Sequence[Any], rest: Any) -> Any:
    yield from first
    yield from rest
