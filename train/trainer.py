"""Stage 2: one read of the store trains every coder of a sweep.

Coders that share hookpoint, site and number of latents form a bank; every bank sees every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsc.cache.kept import kept_moments
from bsc.cache.loader import SHARDS_AT_ONCE, Loader
from bsc.cache.ring import RingReader, reading
from bsc.cache.store import ActivationStore, Moments
from bsc.devices import pick_device
from bsc.errors import ConfigError, UserError
from bsc.files import canonical_json, check_new_folder, make_folder, write_json
from bsc.progress import console, stage
from bsc.train.coders.bank import Bank, StepResult
from bsc.train.coders.coder import SparseCoder
from bsc.train.optim import ScheduleFreeSignSGD, make_optimiser
from bsc.train.run import RUN_VERSION, Run
from bsc.train.sweep import PlannedCoder, TrainConfig, expand, plan_coders
from bsc.versions import versions

__all__ = ["CoderSummary", "train"]

WARMUP_SHARE = 0.05
"""Share of the steps over which Adam's learning rate rises; then it falls linearly to 0."""


class CoderSummary(NamedTuple):
    """Training figures of a coder over the last logging intervals: rows it had not seen before."""

    name: str
    fvu: float | None
    """None, as the next two, where the coder turned non-finite before the first interval."""
    l0: float | None
    dead: float | None
    frozen_at: int | None
    """Step at which it turned non-finite and was left alone; None: it did not."""


def adam_scale(step: int, steps: int) -> float:
    """Factor of Adam's learning rate at a step: linear warm-up, then linear decay.

    >>> [round(adam_scale(s, 100), 2) for s in (0, 4, 5, 99)]
    [0.2, 1.0, 1.0, 0.01]
    """
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def left_out_tokens(store: ActivationStore, config: TrainConfig) -> tuple[int, ...]:
    """Token ids whose rows a run does not read."""
    if not config.without_special_tokens:
        return ()
    return tuple(store.attributes["model"]["special_token_ids"])


@dataclass(frozen=True)
class _Scale:
    """Means and units of the two sides of a hookpoint, from the sums of the store."""

    x: float
    y: float
    mean_x: Tensor
    mean_y: Tensor
    variance_y: float

    @classmethod
    def of(cls, hook: str, x: Moments, y: Moments, normalise: str) -> _Scale:
        units = [
            (m.total_variance / len(m.mean)) ** 0.5 if normalise == "rms" else 1.0 for m in (x, y)
        ]
        if not all(units) or y.total_variance == 0:
            raise ConfigError(f"{hook}: its rows are all the same, so nothing can be learned.")
        return cls(
            units[0], units[1], x.mean / units[0], y.mean / units[1],
            y.total_variance / units[1] ** 2,
        )  # fmt: skip


class _BankTrainer:
    """A bank with its optimisers and counters."""

    def __init__(
        self, coders: list[PlannedCoder], store: ActivationStore, config: TrainConfig,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.coders, self.device, self.dead_after = coders, device, config.dead_after
        hook, first = coders[0].hookpoint, coders[0].coder
        self.x_name, self.y_name = f"{hook}/{first.side}", f"{hook}/output"
        left_out = left_out_tokens(store, config)
        moments = [kept_moments(store.train, n, left_out) for n in (self.x_name, self.y_name)]
        self.scale = _Scale.of(hook, moments[0], moments[1], config.normalise)
        self.bank = Bank(
            [c.coder for c in coders], total_variance=self.scale.variance_y, device=device
        )
        self.bank.initialise([c.seed for c in coders], self.scale.mean_x, self.scale.mean_y)
        self.optimisers = []
        for c, coder in enumerate(coders):
            slices = []
            for name in self.bank.names(c):
                part = self.bank.parameters[name][c].requires_grad_()
                part.grad = self.bank.gradients[name][c]
                slices.append(part)
            self.optimisers.append(make_optimiser(coder.optimiser, slices, coder.lr))
        n = len(coders)
        self.frozen_at: list[int | None] = [None] * n
        self.rows = 0
        self.last_fired = torch.zeros((n, self.bank.n_latents), dtype=torch.int64, device=device)
        self._sums = torch.zeros((2, n), dtype=torch.float64, device=device)
        self._steps = 0

    def step(self, batch: dict[str, Tensor], step: int, steps: int) -> None:
        """Train every coder that is still finite on one batch."""
        y = batch[self.y_name].to(self.device, non_blocking=True).float().div_(self.scale.y)
        x = y
        if self.x_name != self.y_name:
            x = batch[self.x_name].to(self.device, non_blocking=True).float().div_(self.scale.x)
        result = self.bank.step(x, y)
        self._count(result, len(x))
        finite = self._finite(result.loss)
        for c, (coder, optimiser) in enumerate(zip(self.coders, self.optimisers, strict=True)):
            if self.frozen_at[c] is None and not finite[c]:
                self.frozen_at[c] = step
                console.print(f"{coder.name}: not finite at step {step}; it is left as it was")
            if self.frozen_at[c] is not None:
                continue
            if coder.optimiser == "adam":
                for group in optimiser.param_groups:
                    group["lr"] = coder.lr * adam_scale(step, steps)
            optimiser.step()
            if coder.optimiser == "adam":
                self.bank.renormalise(c)

    def _finite(self, loss: Tensor) -> list[bool]:
        """Which coders have a finite loss and finite gradients."""
        finite = loss.isfinite()
        for gradient in self.bank.gradients.values():
            finite &= gradient.flatten(1).sum(dim=1).isfinite()
        return [bool(f) for f in finite.tolist()]

    def _count(self, result: StepResult, rows: int) -> None:
        self.rows += rows
        self.last_fired.masked_fill_(result.fired, self.rows)
        self._sums += torch.stack([result.loss, result.l0]).double()
        self._steps += 1

    def take_metrics(self) -> list[dict[str, Any]]:
        """Means since the last call, one line per coder."""
        fvu, l0 = (self._sums / self._steps).tolist()
        dead = ((self.rows - self.last_fired) >= min(self.dead_after, self.rows)).double()
        shares = dead.mean(dim=1).tolist()
        self._sums.zero_()
        self._steps = 0
        return [
            {"coder": coder.name, "fvu": f, "l0": a, "dead": d}
            for coder, f, a, d, frozen in zip(
                self.coders, fvu, l0, shares, self.frozen_at, strict=True
            )
            if frozen is None
        ]

    def finish(self, about: dict[str, Any]) -> list[SparseCoder]:
        """The trained coders in the units of the store."""
        trained = []
        for c, (coder, optimiser) in enumerate(zip(self.coders, self.optimisers, strict=True)):
            if isinstance(optimiser, ScheduleFreeSignSGD):
                optimiser.finish()
            facts = about | {
                "name": coder.name, "hookpoint": coder.hookpoint, "optimiser": coder.optimiser,
                "lr": coder.lr, "seed": coder.seed, "rows": self.rows,
                "frozen_at_step": self.frozen_at[c],
            }  # fmt: skip
            exported = self.bank.export(c, facts)
            trained.append(exported.in_units(x=self.scale.x, y=self.scale.y))
        return trained


def _banks(
    planned: list[PlannedCoder], store: ActivationStore, config: TrainConfig, device: torch.device
) -> list[_BankTrainer]:
    groups: dict[tuple[Any, ...], list[PlannedCoder]] = {}
    for coder in planned:
        groups.setdefault(
            (coder.hookpoint, coder.coder.site, coder.coder.n_latents), []
        ).append(coder)  # fmt: skip
    return [_BankTrainer(group, store, config, device) for group in groups.values()]


def train(config: TrainConfig, where: str = "bsc train") -> tuple[Run, list[CoderSummary]]:
    """Train a sweep and write its run.

    Args:
        config: the run.
        where: what the config comes from, for messages.

    Returns:
        The run, and the last training figures of every coder.

    Raises:
        UserError: the request cannot be carried out. Nothing is written then.
    """
    store = ActivationStore(config.store)
    planned = plan_coders(expand(config.coders, where), store)
    run = Run(config.folder)
    check_new_folder(run.folder, "run")
    if not store.complete and store.ring is None:
        console.print(f"{store.folder}: the capture of this store has not ended")
    device = pick_device(config.device)
    with ExitStack() as stack:
        ring = None
        if store.ring is not None:
            ring = stack.enter_context(reading(_join_ring(store, config)))
        return _train(config, store, planned, run, device, ring)


def _join_ring(store: ActivationStore, config: TrainConfig) -> RingReader:
    """A place in the ring of a store, once enough rows are there to begin with.

    Raises:
        UserError: rows are to be read more often than they pass.
    """
    rows = store.planned_rows
    if config.tokens is not None and config.tokens > rows:
        raise UserError(
            f"--tokens {config.tokens}: {store.folder} is a ring, through which {rows:,} rows pass "
            f"once."
        )
    split = store.train
    ring = RingReader(store.folder, split.specs, split.grid, config.name)
    console.print(f"{store.folder}: reading the ring from shard {ring.next_shard} on")
    while split.rows < config.batch_rows and not store.complete:
        time.sleep(0.1)
        split.refresh()
    return ring


def _ended(store: ActivationStore) -> Callable[[], bool]:
    return lambda: store.complete


def _train(
    config: TrainConfig, store: ActivationStore, planned: list[PlannedCoder], run: Run,
    device: torch.device, ring: RingReader | None,
) -> tuple[Run, list[CoderSummary]]:  # fmt: skip
    banks = _banks(planned, store, config, device)
    names = tuple(dict.fromkeys(n for b in banks for n in (b.x_name, b.y_name)))
    loader = Loader(
        store.train, names, batch_rows=config.batch_rows, seed=config.seed,
        without_tokens=left_out_tokens(store, config),
        # A ring must hold a group of shards and a window of the writer at the same time.
        shards_at_once=min(SHARDS_AT_ONCE, max(1, (store.ring or 64) // 2)),
        pinned=device.type == "cuda", ahead=2 if device.type == "cuda" else 0,
    )  # fmt: skip
    rows = store.train.rows if ring is None else store.planned_rows
    steps = (config.tokens or rows) // config.batch_rows
    if steps < 1:
        raise UserError(
            f"--tokens {config.tokens}: fewer than one batch of {config.batch_rows:,} rows."
        )
    record = _resolved(config, planned, store, rows, steps, device)
    make_folder(run.folder, "run")
    write_json(run.config_path, record)
    console.print(
        f"{run.folder}: {len(planned)} coders in {len(banks)} bank(s), {steps:,} steps of "
        f"{config.batch_rows:,} rows, {steps * config.batch_rows / rows:.2f} passes"
    )
    started = time.perf_counter()
    source = loader.batches() if ring is None else loader.ring_batches(ring, _ended(store))
    done, summaries = _loop(run, config, banks, source, names, steps)
    about = {"store_id": store.store_id, "model": store.attributes["model"],
             "bsc": versions()["bsc"]}  # fmt: skip
    for bank in banks:
        for coder in bank.finish(about):
            coder.save(run.coder_folder(str(coder.about["name"])))
    completed = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": done * config.batch_rows,
    }
    write_json(run.config_path, record | {"completed": completed})
    order = {p.name: i for i, p in enumerate(planned)}
    return run, sorted(summaries, key=lambda s: order[s.name])


def _loop(
    run: Run, config: TrainConfig, banks: list[_BankTrainer],
    batches: Iterator[tuple[Tensor, ...]], names: tuple[str, ...], steps: int,
) -> tuple[int, list[CoderSummary]]:  # fmt: skip
    """Train on up to `steps` batches; steps taken, and the last figures of every coder."""
    waited = 0.0
    step = -1
    last: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    label = f"train {sum(len(b.coders) for b in banks)} coders"
    with (
        run.metrics_path.open("w") as lines,
        stage(label, steps * config.batch_rows, "rows") as progress,
    ):
        before = time.perf_counter()
        for step, tensors in enumerate(islice(batches, steps)):
            waited += time.perf_counter() - before
            batch = dict(zip(names, tensors, strict=True))
            for bank in banks:
                bank.step(batch, step, steps)
            note = ""
            if (step + 1) % config.log_every == 0 or step + 1 == steps:
                seconds = time.perf_counter() - started
                common = {
                    "step": step + 1,
                    "rows": (step + 1) * config.batch_rows,
                    "seconds": round(seconds, 2),
                    "waiting_for_data": round(waited / seconds, 4),
                }
                for bank in banks:
                    for metrics in bank.take_metrics():
                        last[metrics["coder"]] = metrics
                        lines.write(canonical_json(common | metrics, indent=None))
                lines.flush()
                values = [m["fvu"] for m in last.values()]
                note = f"FVU {min(values):.3f} to {max(values):.3f}" if values else ""
            progress.advance(config.batch_rows, note)
            before = time.perf_counter()
    nothing = dict.fromkeys(("fvu", "l0", "dead"))
    summaries = []
    for bank in banks:
        for coder, frozen in zip(bank.coders, bank.frozen_at, strict=True):
            m = last.get(coder.name, nothing)
            summaries.append(CoderSummary(coder.name, m["fvu"], m["l0"], m["dead"], frozen))
    return step + 1, summaries


def _resolved(
    config: TrainConfig, planned: list[PlannedCoder], store: ActivationStore, rows: int,
    steps: int, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides the result, with nothing left to defaults."""
    return {
        "version": RUN_VERSION,
        "name": config.name,
        "store": store.folder.address,
        "store_id": store.store_id,
        "model": store.attributes["model"],
        "rows": rows,
        "steps": steps,
        "batch_rows": config.batch_rows,
        "seed": config.seed,
        "normalise": config.normalise,
        "without_special_tokens": config.without_special_tokens,
        "dead_after": config.dead_after,
        "log_every": config.log_every,
        "device": device.type,
        "coders": [p.model_dump() for p in planned],
        "versions": versions(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
