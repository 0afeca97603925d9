"""Does finetuning turn the order of binary and continuous coders at sparse probing, and why?

    python benchmarks/bench_finetuned.py --run bsc-demo/runs/seeds --out bsc-demo/runs

Takes an evaluated run of binary and continuous coders of several k and seeds. Finetunes all of
them, and as a control the continuous ones with their values removed: coders whose latents are 1
where they fire, with each latent's mean value in its decoder row, so binary in every respect but
how they were trained. Evaluates each run and prints, by code and k, means over seeds before and
after: delta CE, KL, FVU, probing accuracy on one latent and on five, how many of the gaps were
closed. Intervals over seeds are Student's t of the paired differences. Steps that are there
already are not repeated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from bsc.cache.store.store import ActivationStore
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import Evaluation, EvaluationFolder
from bsc.eval.passes.controls import calibrate
from bsc.eval.report.drawing import COLOURS
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune, resume_finetune
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.run import Run
from bsc.train.run_config import Completed, RunCoder, RunConfig
from bsc.typed import write_typed
from bsc.versions import versions

MEASURED = EvalConfig(ce_tokens=65_536, ablation_bins=0, ultra_ablations=0)
Read = Callable[[Evaluation, str], float]
FIGURES: dict[str, Read] = {
    "delta CE": lambda e, n: e.coders[n].delta_ce,
    "KL": lambda e, n: e.coders[n].kl,
    "FVU": lambda e, n: e.coders[n].fvu,
    "L0": lambda e, n: e.coders[n].l0,
    "> 10 %": lambda e, n: e.coders[n].latents_above["0.1"],
    "probe 1": lambda e, n: e.probing["stdlib"].coders[n]["sae_bench"]["1"].accuracy,
    "probe 5": lambda e, n: e.probing["stdlib"].coders[n]["sae_bench"]["5"].accuracy,
    "probe max 1": lambda e, n: e.probing["stdlib"].coders[n]["max"]["1"].accuracy,
}


def values_removed(parents: Run, folder: Path) -> Run:
    """A run of the continuous coders whose values were replaced by each latent's mean."""
    run = Run(folder)
    if run.config_path.exists():
        return run
    config = parents.config()
    store = ActivationStore(config.store)
    coders = []
    for planned in config.coders:
        if planned.coder.code != "continuous":
            continue
        coder = parents.coder(planned.name)
        mean = calibrate(
            coder, store, planned.hookpoint, without_tokens=config.without_tokens
        ).mean_value
        fields = planned.coder.model_dump() | {
            "code": "binary", "threshold": "fixed", "surrogate": "sigmoid", "temperature": 2.0,
        }  # fmt: skip
        tensors = dict(coder.tensors) | {
            "W_dec": coder.W_dec * mean.unsqueeze(1),
            "log_threshold": torch.full((coder.config.n_latents,), float(np.log(1e-6))),
        }
        name = planned.name.replace("-continuous-", "-removed-")
        made = SparseCoder(CoderConfig.model_validate(fields), tensors, about=coder.about)
        made.about |= {"name": name}
        made.save(run.coder_folder(name))
        coders.append(
            RunCoder(name=name, hookpoint=planned.hookpoint, coder=made.config, seed=planned.seed)
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fields = config.to_json() | {
        "name": folder.name, "config": None, "coders": coders, "imported": True,
        "completed": Completed(at=now, seconds=0.0, rows=0),
    }  # fmt: skip
    run.metrics_path.write_text("")
    write_typed(run.config_path, RunConfig(**fields))
    return run


def finetuned(parents: Run, folder: Path, config: FinetuneConfig) -> Run:
    """The finetuned run, made or gone on with."""
    run = Run(folder)
    if not run.config_path.exists():
        given = config.model_copy(update={"name": folder.name, "runs": folder.parent})
        return finetune(parents, given)[0]
    return run if run.config().completed else resume_finetune(folder)[0]


def evaluated(run: Run) -> Evaluation:
    """Its figures, measured if need be."""
    return EvaluationFolder(run).read() if run.eval_path.exists() else evaluate(run, MEASURED)


def t_interval(values: Sequence[float]) -> list[float]:
    """95 % interval of a mean over seeds."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return [float("nan"), float("nan")]
    reach = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return [mean - reach, mean + reach]


def by_k(run: Run, code: str) -> dict[int, list[str]]:
    """Names of the coders of a code by k, in the order of their seeds."""
    found: dict[int, list[str]] = {}
    for planned in sorted(run.config().coders, key=lambda c: c.seed):
        if f"-{code}-" in planned.name:
            found.setdefault(planned.coder.k, []).append(planned.name)
    return dict(sorted(found.items()))


def table(before: Run, after: Run, code: str) -> list[dict[str, Any]]:
    """A line for each k and figure."""
    a, b = evaluated(before), evaluated(after)
    lines = []
    for k, names in by_k(after, code).items():
        for figure, read in FIGURES.items():
            pairs = [(read(a, n), read(b, n)) for n in names]
            changes = [y - x for x, y in pairs]
            line: dict[str, Any] = {
                "code": code, "k": k, "figure": figure, "seeds": len(names),
                "before": float(np.mean([x for x, _ in pairs])),
                "after": float(np.mean([y for _, y in pairs])),
                "change": float(np.mean(changes)), "interval": t_interval(changes),
            }  # fmt: skip
            if figure in ("delta CE", "KL"):
                closed = [1 - y / x for x, y in pairs]
                line |= {"closed": float(np.mean(closed)), "closed_interval": t_interval(closed)}
            lines.append(line)
    return lines


def order(runs: dict[str, Run], first: str, second: str) -> list[dict[str, Any]]:
    """Probing accuracy of one code less that of another, paired by k and seed, over all of them.

    The interval is over seeds, of each seed's mean over k.
    """
    found = []
    for stage in ("before", "after"):
        one, other = (
            (runs[f"{code} {stage}"], by_k(runs[f"{code} {stage}"], code))
            for code in (first, second)
        )
        figures = evaluated(one[0]), evaluated(other[0])
        for figure in ("probe 1", "probe 5", "probe max 1"):
            read = FIGURES[figure]
            differences = np.array(
                [
                    [read(figures[0], x) - read(figures[1], y) for x, y in zip(a, b, strict=True)]
                    for a, b in zip(one[1].values(), other[1].values(), strict=True)
                ]
            )
            found.append(
                {
                    "stage": stage, "figure": figure, "less": f"{first} - {second}",
                    "difference": float(differences.mean()),
                    "by_k": dict(zip(one[1], differences.mean(axis=1).tolist(), strict=True)),
                    "interval": t_interval(differences.mean(axis=0).tolist()),
                }
            )  # fmt: skip
    return found


def drawn(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """A figure of probing and delta CE before and after, by code and k; bars over seeds."""
    named = {"binary": "binary", "continuous": "continuous", "removed": "values removed"}
    colours = COLOURS | {"removed": "#7a7f87"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels = ("probe 1", "probe 5", "delta CE")
    words = ("accuracy, 1 latent", "accuracy, 5 latents", "delta CE, nats")
    for axis, what, label in zip(axes, panels, words, strict=True):
        for code in dict.fromkeys(line["code"] for line in lines):
            own = [x for x in lines if x["code"] == code and x["figure"] == what]
            places = np.arange(len(own)) + 0.18 * (list(named).index(code) - 1)
            for place, x in zip(places, own, strict=True):
                axis.annotate(
                    "", (place, x["after"]), (place, x["before"]),
                    arrowprops={"arrowstyle": "->", "color": colours[code], "lw": 1.5},
                )  # fmt: skip
            before = [x["before"] for x in own]
            axis.plot(places, before, "o", color=colours[code], ms=4, label=named[code])
            reach = [(x["interval"][1] - x["interval"][0]) / 2 for x in own]
            after = [x["after"] for x in own]
            axis.errorbar(places, after, reach, fmt="none", color=colours[code], alpha=0.35)
        axis.set_xticks(range(len(own)), [f"k = {x['k']}" for x in own])
        axis.set_ylabel(label)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make what is not there, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--loss", default="kl+fvu")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--without-control", action="store_true")
    parser.add_argument("--figure", type=Path, help="PNG of before and after.")
    args = parser.parse_args()
    config = FinetuneConfig(
        tokens=args.tokens, batch_tokens=args.batch_tokens, loss=args.loss, lr=args.lr
    )
    parents, tag = Run.open(args.run), args.loss.replace("+", "-")
    evaluated(parents)
    after = finetuned(parents, args.out / f"{args.run.name}-{tag}", config)
    evaluated(after)
    runs = {
        f"{code} {stage}": run
        for stage, run in (("before", parents), ("after", after))
        for code in ("binary", "continuous")
    }
    if not args.without_control:
        bare = values_removed(parents, args.out / f"{args.run.name}-removed")
        evaluated(bare)
        control = finetuned(bare, args.out / f"{args.run.name}-removed-{tag}", config)
        evaluated(control)
        runs |= {"removed before": bare, "removed after": control}
    codes = list(dict.fromkeys(name.split()[0] for name in runs))
    lines = [
        line
        for code in codes
        for line in table(runs[f"{code} before"], runs[f"{code} after"], code)
    ]
    orders = order(runs, "binary", "continuous")
    if "removed" in codes:
        orders += order(runs, "binary", "removed") + order(runs, "removed", "continuous")
    for line in [*lines, *orders]:
        values = " | ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in line.values())
        print(f"| {values} |", file=sys.stderr)
    if args.figure:
        drawn(lines, args.figure)
    facts = {"tokens": args.tokens, "loss": args.loss, "versions": versions()}
    print(json.dumps({"benchmark": "finetuned", "changes": lines, "order": orders} | facts))


if __name__ == "__main__":
    main()
