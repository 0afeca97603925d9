"""What finetuning costs, and which learning rate is best.

    python benchmarks/bench_finetune.py sweep --run bsc-demo/runs/demo [--tokens 500000]
    python benchmarks/bench_finetune.py cost --run bsc-demo/runs/demo [--repeats 7]

sweep: finetunes coders of a run once for each setting (learning rate, tokens in a step, Adam's
beta1, weight of reconstruction), and prints their KL and FVU on the training documents that follow
those that they were finetuned on, and what share of the KL of the coders as they were is closed
there. The figures choose the defaults of `bsc.finetuning.schedule`; the test documents have no part
in them.

cost: seconds of a step of all coders of a run, beside what it cannot do without, in turns: one
forward pass of the model, and for each coder the passes forward and back of what comes after it,
the loss, and the coder itself, written in plain PyTorch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import stepper_of, tuned_coders
from bsc.finetuning.job import FinetuneJob, make_job
from bsc.finetuning.step import Stepper
from bsc.train.run import Run
from bsc.versions import versions

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BATCHES = (512, 2048)


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each setting and coder, the coders as they were first."""
    found: list[dict[str, Any]] = []
    before: dict[str, list[float]] = {}
    settings = itertools.product(
        args.optimisers, args.batches, args.rates, args.beta1, args.fvu_weights
    )
    for optimiser, batch, lr, beta1, weight in [(None, 0, 0.0, 0.0, 0.0), *settings]:
        config = FinetuneConfig(
            name="sweep", coders=tuple(args.coders), tokens=args.tokens, loss=args.loss,
            batch_tokens=batch or None, lr=lr or None, optimiser=optimiser or "adam",
            beta1=beta1, fvu_weight=weight,
        )  # fmt: skip
        for coder, (kl, fvu) in _later(args, config, train=optimiser is not None).items():
            first = before.setdefault(coder, [kl, fvu])
            line: dict[str, Any] = {
                "coder": coder.rpartition("/")[2], "optimiser": optimiser, "batch": batch,
                "lr": lr, "beta1": beta1, "fvu_weight": weight, "kl": round(kl, 5),
                "closed": round(1 - kl / first[0], 4), "fvu": round(fvu, 4),
                "fvu_change": round(fvu / first[1] - 1, 4),
            }  # fmt: skip
            found.append(line)
            print(f"| {' | '.join(str(v) for v in line.values())} |", file=sys.stderr, flush=True)
    return found


def _later(
    args: argparse.Namespace, config: FinetuneConfig, *, train: bool
) -> dict[str, tuple[float, float]]:
    """Mean KL and FVU by coder on the documents that follow those that it was finetuned on."""
    job = make_job(Run.open(args.run), config)
    coders = tuned_coders(job)
    stepper = stepper_of(job, coders)
    figures: dict[str, list[list[float]]] = {name: [] for name in coders}
    later = args.tokens + args.later
    tokens = step = 0
    for _, batch in job.text.batches(job.lm.tokenizer, job.batch_contexts):
        if tokens >= later:
            break
        measured = tokens >= args.tokens
        if measured:
            for coder in coders.values():
                # Measured from here on, not changed; a method has no other place to stand.
                coder.optimiser.step = lambda lr: None  # type: ignore[method-assign] # looked at
        if measured or train:
            stepper.step(batch, min(step, job.steps - 1), job.steps)
        if measured:
            for name, coder in coders.items():
                figures[name].append(coder.progress.last)
        tokens, step = tokens + batch.token_id.size, step + 1
    means = {name: np.mean(values, axis=0).tolist() for name, values in figures.items()}
    return {name: (kl, fvu) for name, (kl, fvu) in means.items()}


class Plain:
    """What a step cannot do without, in plain PyTorch, on contexts of one batch."""

    def __init__(self, job: FinetuneJob, stepper: Stepper, batch: Any) -> None:
        """Keep what the layers after the hookpoint are called with."""
        self.job, self.model = job, job.lm.model
        self.inputs = stepper._inputs(batch, slice(None))[0]
        hook = job.planned[0].hookpoint
        (self.layer,) = {int(p) for p in hook.split(".") if p.isdigit()}
        self.after = list(self.model.base_model.layers)[self.layer + 1 :]
        kept: dict[str, Any] = {}

        def keep_call(module: Any, args: Any, kwargs: Any) -> None:
            kept["hidden"], kept["kwargs"] = args[0], kwargs

        def keep_rows(module: Any, args: Any, output: Any) -> None:
            kept["x"], kept["y"] = args[0], output

        handles = [
            self.after[0].register_forward_pre_hook(keep_call, with_kwargs=True),
            self.model.base_model.get_submodule(hook).register_forward_hook(keep_rows),
        ]
        with torch.no_grad():
            self.model(**self.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        self.kwargs, self.x = kept["kwargs"], kept["x"].flatten(0, 1)
        self.rest = kept["hidden"] - kept["y"]
        self.target = self.inputs["input_ids"].roll(-1, 1).flatten()
        self.weights = []
        for planned in job.planned:
            tensors = job.coder(planned).to(self.model.device).tensors
            self.weights.append({n: t.clone().requires_grad_() for n, t in tensors.items()})

    def later(self, y: Tensor) -> Tensor:
        """Logits from what the hookpoint gives."""
        hidden = self.rest + y
        for layer in self.after:
            hidden = layer(hidden, **self.kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits: Tensor = self.model.lm_head(self.model.base_model.norm(hidden))
        return logits.flatten(0, 1)

    def coder(self, number: int) -> Tensor:
        """A TopK coder: a product, the k largest, a bag of decoder rows, a skip path."""
        config, w = self.job.planned[number].coder, self.weights[number]
        with torch.autocast(self.model.device.type, torch.bfloat16):
            pre = functional.linear(self.x, w["encoder.weight"], w["encoder.bias"])
        value, latent = pre.topk(config.k, dim=1)
        code = value.relu() if config.code == "continuous" else value.sigmoid()
        y = functional.embedding_bag(
            latent, w["W_dec"], per_sample_weights=code.float(), mode="sum"
        )
        with torch.autocast(self.model.device.type, torch.bfloat16):
            skip = functional.linear(self.x, w["W_skip"]) if "W_skip" in w else 0
        return (y + skip + w["b_dec"]).to(self.x.dtype).view_as(self.rest)

    def step(self, *, coders: bool = True, loss: bool = True) -> None:
        """A step without its optimiser."""
        with torch.no_grad():
            logits = self.model(**self.inputs, use_cache=False).logits.flatten(0, 1)
            clean = functional.log_softmax(logits.float(), dim=-1) if loss else logits
        for number in range(len(self.weights)):
            if coders:
                y = self.coder(number)
            else:
                y = self.rest.new_zeros(self.rest.shape[-1], requires_grad=True)
            logits = self.later(y)
            if loss:
                log_q = functional.log_softmax(logits.float(), dim=-1)
                functional.kl_div(log_q, clean, reduction="sum", log_target=True).backward()
            else:
                logits.backward(torch.ones_like(logits))
            for tensor in self.weights[number].values():
                tensor.grad = None


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each, in turns."""
    config = FinetuneConfig(
        name="cost", tokens=10**6, batch_tokens=args.tokens, coders=tuple(args.coders)
    )
    job = make_job(Run.open(args.run), config)
    coders = tuned_coders(job)
    stepper = stepper_of(job, coders)
    _, batch = next(job.text.batches(job.lm.tokenizer, job.batch_contexts))
    plain = Plain(job, stepper, batch)
    ways: dict[str, Callable[[], Any]] = {
        "step": lambda: stepper.step(batch, 0, 10**6),
        "plain, with coders and loss": plain.step,
        "plain, with loss": lambda: plain.step(coders=False),
        "plain, the model alone": lambda: plain.step(coders=False, loss=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if job.lm.model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: [a / b for a, b in zip(seconds["step"], own, strict=True)]
        for name, own in seconds.items()
    }
    for name, own in seconds.items():
        print(
            f"| {name} | {statistics.median(own):.3f} | {min(own):.3f} to {max(own):.3f} | "
            f"{statistics.median(ratios[name]):.2f} |",
            file=sys.stderr,
        )
    return {
        "coders": len(coders), "tokens": batch.token_id.size, "seconds": seconds,
        "ratio": {n: round(statistics.median(r), 3) for n, r in ratios.items()},
    }  # fmt: skip


def main() -> None:
    """Run what is asked for; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("sweep", "cost"))
    parser.add_argument("--run", type=Path, default=Path("bsc-demo/runs/demo"))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--coders", nargs="*", default=[])
    parser.add_argument("--optimisers", nargs="+", default=["adam"])
    parser.add_argument("--loss", default="kl")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--beta1", nargs="+", type=float, default=[0.7])
    parser.add_argument("--fvu-weights", nargs="+", type=float, default=[3.0])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--later", type=int, default=49_152, help="sweep: tokens to measure on")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    args.tokens = args.tokens or {"sweep": 500_000, "cost": 8_192}[args.what]
    result: Any = {"sweep": sweep, "cost": cost}[args.what](args)
    facts = {"threads": torch.get_num_threads(), "versions": versions()}
    print(json.dumps({"benchmark": f"finetune {args.what}", "result": result} | facts))


if __name__ == "__main__":
    main()
