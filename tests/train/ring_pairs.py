"""Captures into a ring and training runs that read it, as real processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.train.config import TrainConfig
from bsc.train.resume import resume
from bsc.train.run import Run
from bsc.train.trainer import train_sweep

__all__ = ["Pair", "capture_config", "sweep_config"]


def capture_config(model: Path, root: Path, writers: int, **fields: Any) -> CaptureConfig:
    """16 shards of each writer through a ring of four."""
    values: dict[str, Any] = {
        "model": str(model), "store": root / "acts", "hookpoints": ("layers.1.mlp",),
        "text": TextSource(corpus="stdlib", held_out=0.2), "tokens": 24_000 * writers,
        "held_out_tokens": 640, "context": 32, "batch_tokens": 256, "ring": 4 * writers,
        "world": writers,
    }  # fmt: skip
    return CaptureConfig(**values | fields)


def sweep_config(root: Path, **fields: Any) -> TrainConfig:
    """A continuous and a binary coder, a hundred steps."""
    values: dict[str, Any] = {
        "store": root / "acts", "runs": root / "runs", "name": "run", "batch_rows": 250,
        "log_every": 10, "dead_after": 2000, "eval_every": 0,
        "coders": ({"code": ["continuous", "binary"], "k": 4, "n_latents": 64},),
    }  # fmt: skip
    return TrainConfig(**values | fields)


def _capture(config: CaptureConfig, rank: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    capture(config.model_copy(update={"rank": rank}))


def _train(config: TrainConfig) -> None:
    provenance = Path(config.store) / "provenance.json"
    while not provenance.exists():
        time.sleep(0.02)
    if (config.folder / "config.json").exists():
        if not Run(config.folder).config().completed:
            resume(config.folder)
    else:
        train_sweep(config)


class Pair:
    """The writers of a ring and the training run that reads it."""

    def __init__(self, capture_: CaptureConfig, sweep: TrainConfig) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bsc.train.resume", "bsc.cache.capture.capture"])
        self.works: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
            f"writer {rank}": (_capture, (capture_, rank)) for rank in range(capture_.world)
        }
        self.works["reader"] = (_train, (sweep,))
        self._context = context
        self.processes: dict[str, BaseProcess] = {}

    def start(self, *names: str) -> None:
        """Start some of them, in this order."""
        for name in names:
            target, args = self.works[name]
            self.processes[name] = self._context.Process(target=target, args=args)
            self.processes[name].start()

    def kill(self, *names: str) -> list[str]:
        """Those of some that were still running, and are killed now."""
        alive = [n for n in names if self.processes[n].exitcode is None]
        for name in alive:
            os.kill(self.processes[name].pid or 0, signal.SIGKILL)
        for name in alive:
            self.processes[name].join()
        return [n for n in alive if self.processes[n].exitcode == -signal.SIGKILL]

    @property
    def running(self) -> list[str]:
        """Those that have not ended."""
        return [n for n, p in self.processes.items() if p.exitcode is None]

    def failed(self) -> list[str]:
        """Those that ended with an error."""
        return [n for n, p in self.processes.items() if p.exitcode not in (None, 0, -9)]

    def finish(self, seconds: float = 300) -> None:
        """Wait until all have ended well."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        left = self.running
        self.kill(*left)
        assert not left, f"{left} did not end"
        assert not self.failed(), self.failed()
