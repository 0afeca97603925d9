"""`bsc demo`: the whole chain on the embedded model and text, offline, in about two minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.verify import verify
from bsc.errors import StoreError
from bsc.eval.browse.browse import write_browser
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import Evaluation
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.eval.interp.offline import offline_scores
from bsc.eval.report.links import BROWSER
from bsc.eval.report.report import write_report
from bsc.files import check_new_folder
from bsc.train.config import TrainConfig
from bsc.train.trainer import train_sweep

__all__ = ["DemoResult", "run_demo"]

T = TypeVar("T")

HOOKPOINT = "layers.3.mlp"
TOKENS = 655_360
HELD_OUT_TOKENS = 65_536
EVALUATION = EvalConfig(
    ce_tokens=65_536, ablation_bins=4, ablation_tokens=2_048, ultra_ablations=2, probe_texts=40
)
N_LATENTS = 1_536
LATENTS = 20
"""Latents of each coder that are drawn for the overlap score."""
KS = (8, 16, 32, 64)


class DemoResult(NamedTuple):
    """What the demo made and how long each stage took."""

    report: Path
    browser: Path
    evaluation: Evaluation
    seconds: dict[str, float]


def run_demo(out: Path) -> DemoResult:
    """Capture, verify, train, evaluate, score, browse and report into the folder `out`.

    Raises:
        UserError: `out` cannot be a new folder.
    """
    check_new_folder(out, "demo")
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - started
        return result

    acts = out / "acts"
    timed(
        "capture",
        lambda: capture(
            CaptureConfig(
                model="demo",
                store=acts,
                text=TextSource(corpus="stdlib"),
                hookpoints=(HOOKPOINT,),
                tokens=TOKENS,
                held_out_tokens=HELD_OUT_TOKENS,
            )
        ),
    )
    if problems := timed("verify", lambda: list(verify(acts))):
        raise StoreError("; ".join(problems))
    sweep = TrainConfig(
        store=acts,
        runs=out / "runs",
        name="demo",
        dead_after=200_000,
        log_every=5,
        coders=({"code": ["binary", "continuous"], "k": list(KS), "n_latents": N_LATENTS},),
    )
    run, _ = timed("train", lambda: train_sweep(sweep, "bsc demo"))
    evaluation = timed("evaluate", lambda: evaluate(run, EVALUATION))
    scoring = InterpConfig(latents=LATENTS)
    timed("interp", lambda: offline_scores(Materials(run, scoring, store=None, model=None)))
    browser = timed("browse", lambda: write_browser([run], out=out / BROWSER))
    report = timed("report", lambda: write_report([run], out / "report.html"))
    return DemoResult(report, browser.page, evaluation, seconds)
