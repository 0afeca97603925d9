"""`bsc study --plan`: hours, bytes, devices and the price of a judge, before anything exists.

What each step comes to is in amounts.py; how long it takes is decided here, in this order:

- as long for a FLOP as the same command took for one in this study, where it was done;
- by `[hardware] tflops`, where the study says it;
- by a product of matrices that is timed here, and the share of its rate that each command reaches.

A capture takes as long as the slower of model and disk, and so does a training.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bsc.devices import pick_device, product_dtype
from bsc.files import canonical_json
from bsc.formats import printable
from bsc.progress import format_bytes
from bsc.study.amounts import Amount, Reckoned
from bsc.study.config import Hardware
from bsc.study.folder import StepRecord
from bsc.study.study import OpenedStudy
from bsc.study.table import span
from bsc.study.work import states_of

__all__ = ["EFFICIENCY", "START_SECONDS", "PlannedStep", "StudyPlan", "plan_study"]

START_SECONDS = 10.0
"""Of a process, to load its libraries, the model and the store; measured on two cores."""
EFFICIENCY = {"cache": 0.4, "train": 0.35, "finetune": 0.35, "eval": 0.4}
"""Share of the rate of a large product that a command is taken to reach, over all that it does: as
was seen with the embedded model on two cores, but for finetuning, which is taken to be like
training. Only within a factor of two or three on other machines, and for other models."""
_PRODUCT_WIDTH = {"cpu": 2048, "cuda": 8192}
_PRODUCT_SECONDS = 1.0
_ON_ONE_DEVICE = ("finetune", "eval")
"""Commands that one process does, however many devices there are."""


class PlannedStep(NamedTuple):
    """A step with what is still to come of it: nothing, where it is done."""

    name: str
    command: str
    what: str
    done: bool
    took: float | None
    """Seconds that it took, where it is done."""
    seconds: float
    rate: str
    """Where the time comes from: measured in this study, by a product, assumed."""
    flop: float
    bytes: int
    requests: int
    prompt_tokens: float
    answer_tokens: float
    price: float


@dataclass(frozen=True)
class StudyPlan:
    """What a study comes to."""

    steps: tuple[PlannedStep, ...]
    devices: int
    free: int
    """Bytes that are free where the study is to be."""
    assumptions: tuple[str, ...]
    """Sentences on what the figures rest on."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each step is still to take."""
        return {step.name: step.seconds for step in self.steps}

    @property
    def total(self) -> dict[str, float]:
        """Sums over the steps."""
        names = (
            "seconds", "flop", "bytes", "requests", "prompt_tokens", "answer_tokens", "price",
        )  # fmt: skip
        return {name: sum(getattr(step, name) for step in self.steps) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "steps": [step._asdict() for step in self.steps],
            "total": self.total,
            "devices": self.devices,
            "free_bytes": self.free,
            "assumptions": list(self.assumptions),
        }

    def lines(self) -> list[str]:
        """The totals, and what they rest on, for people."""
        total, done = self.total, sum(step.done for step in self.steps)
        fits = "it fits" if total["bytes"] <= self.free else "it does not fit"
        found = [
            f"steps   {len(self.steps)}, {done} of them done",
            f"time    {span(total['seconds'])} on {self.devices} device(s), "
            f"{total['flop']:.3g} FLOP",
            f"disk    {format_bytes(total['bytes'])}; {format_bytes(self.free)} free: {fits}",
        ]
        if total["requests"]:
            found.append(
                f"judge   {total['requests']:,.0f} requests, {total['prompt_tokens']:,.0f} tokens "
                f"of prompts, {total['answer_tokens']:,.0f} of answers, price "
                f"{total['price']:,.2f}"
            )
        return [*found, "", *self.assumptions]

    def show(self, *, as_json: bool) -> None:
        """Print it on stdout."""
        if as_json:
            typer.echo(canonical_json(self.to_json()), nl=False)
            return
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("step", "command", "what"):
            table.add_column(title, no_wrap=True)
        for title in ("time", "disk", "FLOP"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("by", no_wrap=True)
        for step in self.steps:
            cells = [f"done in {span(step.took or 0)}", "", "", ""]
            if not step.done:
                cells = [
                    span(step.seconds),
                    format_bytes(step.bytes) if step.bytes else "",
                    f"{step.flop:.2g}" if step.flop else "",
                    step.rate,
                ]
            table.add_row(step.name, step.command, escape(printable(step.what)), *cells)
        # Wide enough for every name, also where stdout is no terminal.
        console = Console(highlight=False, width=200)
        console.print(table)
        console.print()
        console.print("\n".join(self.lines()), markup=False, soft_wrap=True)


def plan_study(opened: OpenedStudy, reckoned: Reckoned) -> StudyPlan:
    """Say what the wanted steps of a study come to."""
    hardware = opened.study.hardware
    amounts = {name: reckoned.amounts[name] for name in opened.wanted}
    commands = {name: node.step.command for name, node in opened.wanted.items()}
    states = states_of(opened.folder, opened.wanted)
    records = {name: state.record for name, state in states.items() if state.record}
    rates = _Rates(hardware, _measured(amounts, commands, records))
    steps = []
    for name, amount in amounts.items():
        record = records.get(name)
        seconds, rate = (0.0, "") if record else rates.seconds(commands[name], amount)
        judge = None if record else amount.judge
        steps.append(
            PlannedStep(
                name=name,
                command=commands[name],
                what=amount.what,
                done=record is not None,
                took=record.seconds if record else None,
                seconds=seconds,
                rate=rate,
                flop=0.0 if record else amount.flop,
                bytes=0 if record else amount.bytes,
                requests=judge.requests if judge else 0,
                prompt_tokens=judge.prompt_tokens if judge else 0.0,
                answer_tokens=judge.answer_tokens if judge else 0.0,
                price=judge.price if judge else 0.0,
            )
        )
    to_come = {name: amounts[name] for name in amounts if name not in records}
    words = rates.words(to_come, commands)
    return StudyPlan(tuple(steps), hardware.devices, _free(opened.folder.path), tuple(words))


def _kind(command: str, amount: Amount) -> str:
    """What has a rate of its own."""
    return f"{command} with a judge" if amount.judge else command


def _units(amount: Amount) -> float:
    """What the time of a step grows with: requests, FLOP, or what is counted in time itself."""
    return amount.judge.requests if amount.judge else amount.flop or amount.core_seconds


def _measured(
    amounts: Mapping[str, Amount], commands: Mapping[str, str], records: Mapping[str, StepRecord]
) -> dict[str, float]:
    """Seconds for a unit of each kind of step that was done, but for what it takes to begin."""
    units: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, record in records.items():
        kind = _kind(commands[name], amounts[name])
        units[kind] = units.get(kind, 0.0) + _units(amounts[name])
        # A step that took little longer than it takes to begin says little; it took some time.
        worked = max(record.seconds - START_SECONDS, 0.1 * record.seconds)
        seconds[kind] = seconds.get(kind, 0.0) + worked
    return {kind: seconds[kind] / n for kind, n in units.items() if n}


class _Rates:
    """How long steps take."""

    def __init__(self, hardware: Hardware, measured: Mapping[str, float]) -> None:
        self.hardware, self.measured = hardware, measured
        self._product: float | None = None

    def seconds(self, command: str, amount: Amount) -> tuple[float, str]:
        """Time of a step, and where it comes from."""
        if not _units(amount):
            return 0.0, ""
        kind = _kind(command, amount)
        if kind in self.measured:
            return START_SECONDS + self.measured[kind] * _units(amount), "measured in this study"
        seconds = amount.core_seconds
        how = "assumed"
        if amount.judge:
            one = self.hardware.judge_seconds / amount.judge.at_once
            seconds += one * amount.judge.requests
        elif amount.flop:
            arithmetic = amount.flop / self.rate(command)
            disk = amount.through / self.hardware.disk_rate
            seconds += max(arithmetic, disk)
            how = "tflops" if self.hardware.tflops else "a product measured here"
            how = "disk" if disk > arithmetic else how
        return START_SECONDS + seconds, how

    def rate(self, command: str) -> float:
        """FLOP per second of all devices."""
        if self.hardware.tflops:
            return self.hardware.tflops * 1e12 * self.hardware.devices
        return self.product() * EFFICIENCY[command] * self.hardware.devices

    def product(self) -> float:
        """FLOP per second of a product here; timed once."""
        if self._product is None:
            self._product = _measure_product()
        return self._product

    def words(self, to_come: Mapping[str, Amount], commands: Mapping[str, str]) -> list[str]:
        """What the figures of steps that are to come rest on, in sentences."""
        hardware, found = self.hardware, []
        kinds = {_kind(commands[name], amount): amount for name, amount in to_come.items()}
        known = [kind for kind in kinds if kind in self.measured]
        if known:
            found.append(
                f"Time of {', '.join(known)}: as long for the same work as in the steps of this "
                f"study that are done."
            )
        reckoned = [kind for kind, a in kinds.items() if a.flop and kind not in known]
        divided = f", divided evenly among {hardware.devices}" if hardware.devices > 1 else ""
        if reckoned and hardware.tflops:
            found.append(
                f"Time of {', '.join(reckoned)}: at {hardware.tflops:g} TFLOP/s a device, which "
                f"[hardware] of the study assumes{divided}."
            )
        elif reckoned:
            shares = ", ".join(f"{kind} {100 * EFFICIENCY[kind]:.0f} %" for kind in reckoned)
            found.append(
                f"Time of {', '.join(reckoned)}: a large product reaches "
                f"{self.product() / 1e12:.2g} TFLOP/s here, measured, and of that are assumed: "
                f"{shares}{divided}."
            )
        if any(a.through for kind, a in kinds.items() if kind in reckoned):
            found.append(
                f"Captures write and trainings read {format_bytes(hardware.disk_rate)}/s, assumed; "
                f"a step takes as long as the slower of disk and arithmetic."
            )
        if reckoned:
            found.append(
                f"Arithmetic: two FLOP for each parameter of the model but embeddings, and "
                f"attention to whole contexts; of spliced passes from the hookpoint's layer on. "
                f"Each process takes {START_SECONDS:.0f} s to begin, assumed."
            )
        found += self._one_at_a_time(to_come, commands)
        if asked := [a.judge for a in to_come.values() if a.judge]:
            found.append(
                f"Judge: {sum(j.latents for j in asked):,} latents, every one that may be drawn, "
                f"tested in full; four characters a token; answers of usual length. "
                f"{hardware.judge_seconds:g} s an answer, {asked[0].at_once} at a time, assumed."
            )
        return found

    def _one_at_a_time(
        self, to_come: Mapping[str, Amount], commands: Mapping[str, str]
    ) -> list[str]:
        """How long the longest of the steps takes that cannot be divided."""
        alone = {
            name: self.hardware.devices * amount.flop / self.rate(commands[name])
            for name, amount in to_come.items()
            if commands[name] in _ON_ONE_DEVICE and commands[name] not in self.measured
        }
        name = max(alone, key=lambda n: alone[n], default="")
        if self.hardware.devices == 1 or not name or alone[name] < START_SECONDS:
            return []
        return [
            f"An evaluation or finetuning keeps one device busy, and several of them as many: "
            f"{name}, the longest, takes {span(alone[name])} however many there are."
        ]


def _measure_product() -> float:
    """FLOP per second of a product of two matrices, in the type that coders are multiplied in."""
    device = pick_device(None)
    n = _PRODUCT_WIDTH.get(device.type, 2048)
    a = torch.randn((n, n), device=device).to(product_dtype("bf16", device))
    b = a @ a  # the first one loads what it needs

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    times, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PRODUCT_SECONDS:
        torch.matmul(a, a, out=b)
        wait()
        times += 1
    return 2.0 * n**3 * times / (time.perf_counter() - started)


def _free(folder: Path) -> int:
    """Bytes free where a folder is, or is to be."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
