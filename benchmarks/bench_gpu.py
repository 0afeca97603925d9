"""One command for a machine with a GPU: is bsc right on it, how fast beside its products, and why?

* machine: what the device can do (product, copy, launch).
* correct: a step of every kind of coder on the device against the same step in float64 on the CPU,
  whose gradients the tests hold to autograd.
* waits: a step with every wait of the host for the device as an error.
* step: steps, with and without optimiser, over the bare products, shape by shape, eager, compiled
  and (where nothing waits) as a CUDA graph; memory; what the device spends its time on.
* parts, uneven: those of bench_train.py.
* capture: a model of SmolLM2-135M's shape, bare, with its rows taken, and with them on the host.

Every finding is a line of JSON, written at once: what was measured stands when the command is cut
off. An experiment that fails is a finding too, and the command then ends with status 1. What no
longer fits into `--minutes` is left out and named. Needs torch, numpy, pydantic and safetensors,
for the capture transformers too; no zarr and no network.

    python benchmarks/bench_gpu.py --out findings.jsonl [--minutes 9] [--parts correct step]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, from anywhere

from benchmarks.bench_train import bare_products, bench_parts, bench_uneven, check, make_bank
from benchmarks.measure import alternate, ceilings, machine, ratio, spread, sync
from bsc.train.coders.bank import Bank, StepResult
from bsc.train.config import TrainConfig
from bsc.train.memory import plan_memory
from bsc.train.optim import CoderOptimiser
from bsc.train.run_config import PlannedCoder
from tests.cuda.scenarios import bank_of, configs, rows_of

Say = Callable[..., None]


class Session:
    """What is measured, on what, and what was found."""

    def __init__(self, device: torch.device, out: Path, minutes: float, tiny: bool) -> None:
        self.device, self.out, self.tiny = device, out, tiny
        self.failed = 0
        self._started, self._ends = time.perf_counter(), time.perf_counter() + 60 * minutes
        out.write_text("")

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU; without one every part runs on the CPU, to test this script."""
        return self.device.type == "cuda"

    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self._ends

    def say(self, part: str, **what: Any) -> None:
        """Write down a finding."""
        at = round(time.perf_counter() - self._started, 1)
        line = json.dumps({"part": part, "at_s": at, **what})
        with self.out.open("a") as out:
            out.write(line + "\n")
        print(line[:400], file=sys.stderr, flush=True)

    @contextmanager
    def attempt(self, part: str, what: str) -> Iterator[None]:
        """An experiment, whose failure is a finding."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            where = traceback.format_exc().strip().splitlines()[-5:]
            self.say(part, what=what, failed=f"{type(error).__name__}: {error}"[:500], where=where)
            if self.cuda:
                torch.cuda.empty_cache()


def bench_machine(s: Session) -> None:
    """Name, versions, ceilings, time of a launch."""
    with s.attempt("machine", "ceilings"):
        one = torch.ones(1, device=s.device)

        def launches() -> None:
            for _ in range(1000):
                one.add_(1)

        ms = alternate({"launches": launches}, s.device, 5)["launches"]
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
        found = {} if s.tiny else ceilings(s.device)
        s.say("machine", name=machine(s.device), **facts, **found, launch_us=spread(ms))


def bench_correct(s: Session) -> None:
    """Losses and gradients of every kind of coder in float64 and in bfloat16."""
    for name, config in configs():
        if s.over():
            s.say("correct", what="left out from here on: the time is up")
            return
        x, y = rows_of(config, torch.float64)
        for dtype, near in ((torch.float64, 1e-9), (torch.bfloat16, 0.08)):
            with s.attempt("correct", f"{name}, {dtype}"):
                plain = bank_of(config, "cpu", torch.float64)
                bank = bank_of(config, s.device, dtype)
                plain.generators = bank.generators = None  # noise would be another on a GPU
                expected = plain.step(x, y, micro_rows=32)
                got = bank.step(x.to(s.device), y.to(s.device), micro_rows=32)
                off = {"loss": _apart(got.loss, expected.loss)}
                # In bfloat16 near ties are selected otherwise: the losses alone are compared.
                if dtype == torch.float64:
                    off |= {
                        label: _apart(bank.gradients[label], gradient)
                        for label, gradient in plain.gradients.items()
                    }
                worst = max(off, key=lambda label: off[label])
                assert off[worst] < near, f"{worst} is off by {off[worst]:.2g}, allowed {near}"
                s.say("correct", what=name, dtype=str(dtype), worst=worst, off=off[worst])


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference over that of what is expected."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().norm().clamp(min=1e-30))


def bench_waits(s: Session) -> None:
    """Kinds whose step may not wait: those without batch top-k and AuxK (tests/cuda)."""
    for name, config in configs():
        if s.over():
            s.say("waits", what="left out from here on: the time is up")
            return
        if config.select == "batch_topk" or config.auxk_alpha:
            continue
        with s.attempt("waits", name):
            x, y = (t.to(s.device) for t in rows_of(config, torch.bfloat16))
            bank = bank_of(config, s.device, torch.bfloat16)
            bank.generators = None
            bank.step(x, y)  # buffers
            if s.cuda:
                sync(s.device)
                torch.cuda.set_sync_debug_mode("error")
            try:
                bank.step(x, y)
            finally:
                if s.cuda:
                    torch.cuda.set_sync_debug_mode("default")
            s.say("waits", what=name, waits=0)


def bench_step(s: Session) -> None:
    """Steps of the shapes that the cost of a GPU was estimated for."""
    shapes: list[tuple[Any, int, int, int, tuple[int, ...]]] = [
        ("sae", 576, 36864, 65536, (32,)),
        ("sae", 576, 36864, 65536, (16, 32, 64, 128)),
        ("skip_transcoder", 576, 36864, 65536, (32,)),
        ("sae", 2048, 131072, 8192, (32,)),
        ("sae", 192, 1536, 16384, (8, 16, 32, 64)),
    ]
    if s.tiny:
        shapes = [("sae", 32, 512, 256, (4, 8)), ("skip_transcoder", 32, 512, 256, (4,))]
    for site, d, n_latents, rows, ks in shapes:
        if s.over():
            s.say("step", what="left out from here on: the time is up")
            return
        shape = {"site": site, "d": d, "n_latents": n_latents, "rows": rows, "k": ks}
        with s.attempt("step", str(shape)):
            _steps(s, shape)
        if s.cuda:
            torch.cuda.empty_cache()


def _steps(s: Session, shape: dict[str, Any]) -> None:
    """Eager, compiled, with optimiser and as a graph, in turn."""
    site, n_latents, ks = shape["site"], shape["n_latents"], shape["k"]
    how: dict[str, Any] = {"rows": shape["rows"], "d": shape["d"]}
    bank, x, y = make_bank(site, n_latents, ks, s.device, **how)
    if shape["d"] == 576:
        check(bank, x[:2048], y[:2048])
    optimisers = [CoderOptimiser("adam", bank.trained(c), 1e-5) for c in range(len(ks))]

    def whole() -> None:
        step()
        for c, one in enumerate(optimisers):
            one.step(1e-5)
            bank.renormalise(c)

    # As many rows at a time as training would take: kernels of CUDA count in 32 bits.
    micro = min(shape["rows"], 1 << ((2**31 - 1) // n_latents).bit_length() - 1) if s.cuda else None
    step = partial(bank.step, x, y, micro_rows=micro)
    planned = _planned(bank, shape["rows"], micro, s.device)
    s.say("step", what="memory", **shape, planned_gb=planned, taken_gb=_peak(s, whole))
    runs: dict[str, Callable[[], object]] = {
        "products": bare_products(bank, x, micro or shape["rows"]),
        "eager": step,
        "with Adam": whole,
    }
    with s.attempt("step", f"compiled, {shape}"):
        other = make_bank(site, n_latents, ks, s.device, compiled=True, **(how | {"rows": 1}))[0]
        started = time.perf_counter()
        other.step(x, y, micro_rows=micro)
        sync(s.device)
        s.say("step", what="compiling", **shape, seconds=round(time.perf_counter() - started, 1))
        runs["compiled"] = partial(other.step, x, y, micro_rows=micro)
    if s.cuda:
        with s.attempt("step", f"graph, {shape}"):
            runs["graph"] = _graph(step)
        torch.cuda.reset_peak_memory_stats()
    ms = alternate(runs, s.device, 3 if s.tiny else 9)
    line: dict[str, Any] = {f"{name}_ms": spread(v) for name, v in ms.items()}
    line |= {
        f"{name}_over_products": ratio(v, ms["products"])
        for name, v in ms.items()
        if name != "products"
    }
    flops = 2 * shape["rows"] * n_latents * shape["d"] * len(ks)
    line["products_tflops"] = round(flops / statistics.median(ms["products"]) / 1e9, 2)
    if s.cuda:
        line["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    s.say("step", what="steps", **shape, **line)
    _profile(s, step, shape)


def _peak(s: Session, work: Callable[[], object]) -> float | None:
    """GB that a GPU holds at most during this work, with all that it holds already."""
    if not s.cuda:
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def _planned(bank: Bank, rows: int, micro_rows: int | None, device: torch.device) -> float:
    """GB that `bsc train --plan` would plan for a step of these rows, with Adam."""
    how: dict[str, Any] = {
        "optimiser": "adam", "lr": 1e-5, "warmup": 0.0, "decay": "none", "clip_norm": None,
        "adam_eps": None,
        "temperature_init": 1.0, "anneal": 0.0, "patience": None, "seed": 0, "hookpoint": "h",
    }  # fmt: skip
    coders = [
        PlannedCoder(name=str(i), coder=c, k_init=c.k, **how) for i, c in enumerate(bank.configs)
    ]
    config = TrainConfig(batch_rows=rows, micro_rows=micro_rows, eval_rows=1)
    return round(plan_memory(coders, config, device, 1 << 50).total / 1e9, 3)


def _graph(step: Callable[[], StepResult]) -> Callable[[], None]:
    """A step as a CUDA graph: what launches cost. Its result is that of the step before it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step().loss.clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    assert _apart(result.loss, expected) < 1e-6, "the graph gives another loss"
    return graph.replay


def _profile(s: Session, step: Callable[[], object], shape: dict[str, Any]) -> None:
    """The kernels that a step spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if s.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        step()
        sync(s.device)
    events = list(profiled.key_averages())
    if s.cuda:  # calls of the runtime are listed beside the kernels that they start
        events = [e for e in events if e.device_type.name == "CUDA"]
    name = "self_device_time_total" if s.cuda else "self_cpu_time_total"
    events.sort(key=lambda event: -getattr(event, name))
    top = [
        {"kernel": e.key[:90], "ms": round(getattr(e, name) / 1e3, 3), "calls": e.count}
        for e in events[:16]
    ]
    calls = sum(e.count for e in events)
    s.say("step", what="profile", **shape, launches=calls, top=top)


def bench_kernels(s: Session) -> None:
    """The parts of bench_train.py."""
    if s.tiny:
        s.say("kernels", what="left out: they have no small shapes")
        return
    for name, part in (("parts", bench_parts), ("uneven", bench_uneven)):
        if s.over():
            s.say("kernels", what="left out from here on: the time is up")
            return
        with s.attempt("kernels", name):
            for line in part(s.device, 5, True):
                s.say("kernels", what=name, **line)


def bench_capture(s: Session) -> None:
    """Tokens per second: bare, with rows taken, with their way to the host."""
    with s.attempt("capture", "SmolLM2-135M's shape"):
        from transformers import LlamaConfig, LlamaModel

        from bsc.cache.capture.staging import Staging
        from bsc.cache.model.attention import forward_inputs
        from bsc.cache.model.hookpoints import RowTap

        shape: dict[str, Any] = {
            "vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        }  # fmt: skip
        batch, context = 64, 1024
        if s.tiny:
            shape |= {"num_hidden_layers": 2, "vocab_size": 100}
            batch, context = 2, 32
        torch.manual_seed(0)
        make: Any = LlamaConfig
        model: Any = LlamaModel(make(**shape)).eval().requires_grad_(False)
        model = model.to(device=s.device, dtype=torch.bfloat16)
        n = shape["num_hidden_layers"]  # the last is among them, so that all layers run
        hooks = [f"layers.{i}.mlp" for i in sorted({0, n // 3, 2 * n // 3, n - 1})]
        ids = torch.randint(0, 100, (batch, context), device=s.device)
        position = torch.arange(context, device=s.device).repeat(batch, 1)
        inputs = forward_inputs(ids, position, packing="padded")
        order = torch.randperm(batch * context)
        tap, staging = RowTap(model, hooks), Staging(2, s.device)

        def taken() -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return tap.rows(inputs)

        def to_host() -> None:
            slot = staging.slot()
            for name, rows in taken().items():
                slot.fill(name, rows.reshape(-1, rows.shape[-1]), order)
            slot.filled()
            staging.submit([slot.wait], slot)  # beside the next batch, as the writing threads do

        def bare() -> None:
            with torch.no_grad():
                model(**inputs)

        try:
            runs: dict[str, Callable[[], object]] = {
                "bare": bare, "rows taken": taken, "to the host": to_host,
            }  # fmt: skip
            ms = alternate(runs, s.device, 3 if s.tiny else 7)
        finally:
            staging.close()
        s.say(
            "capture", tokens=batch * context, hookpoints=len(hooks),
            **{f"{name}_ms": spread(v) for name, v in ms.items()},
            **{f"{n}_over_bare": ratio(v, ms["bare"]) for n, v in ms.items() if n != "bare"},
        )  # fmt: skip


PARTS: dict[str, Callable[[Session], None]] = {
    "machine": bench_machine, "correct": bench_correct, "waits": bench_waits, "step": bench_step,
    "capture": bench_capture, "kernels": bench_kernels,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the number of failures decides the status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of findings, JSON lines")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test this script")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here (--device cpu --tiny tests the script without one)")
    warnings.filterwarnings("ignore", message=".*Synchronization debug mode.*")
    session = Session(torch.device(args.device), args.out, args.minutes, args.tiny)
    for name in args.parts:
        if session.over():
            session.say(name, what="left out: the time is up")
            continue
        PARTS[name](session)
    session.say("end", failed=session.failed)
    return 1 if session.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
