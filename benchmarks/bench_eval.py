"""What does evaluating many coders cost beside the forward passes that it cannot do without?

Losses: 16 coders at one hookpoint, cross-entropy, KL and top-1 of each against the model as it is.
The measure is the forward passes alone: the model as it is once and with each coder spliced in,
every layer run each time, logits made and thrown away (`forwards`), and the same without any coder
(`bare`). Ours is the whole pass (`pass`). They alternate in one process.

Rows: the pass over held-out rows for 16 coders (FVU with its interval, values removed and
quantised, firings written to disk), against the products with their encoders in float32 alone.

    python -m benchmarks.bench_eval --model demo --tokens 16384
    python -m benchmarks.bench_eval --model smollm2-135m --tokens 2048 --context 512 --repeats 2

The last line is JSON. Weights of coders and of the second model are random: times do not depend on
them, and the sums of a pass are checked to be those of every coder by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_capture import smollm2_shape
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.attention import BY_POSITIONS
from bsc.cache.model.models import LanguageModel, load_model
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.devices import keep_freed_memory, pick_device
from bsc.eval.passes.batches import document_numbers
from bsc.eval.passes.context_pass import Variant, joined, pass_over_contexts
from bsc.eval.passes.contexts import Contexts
from bsc.eval.passes.controls import calibrate
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.row_pass import pass_over_rows
from bsc.eval.passes.splice import coder_replacement, splice
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.versions import versions


def coders_of(n: int, width: int, n_latents: int, device: torch.device) -> list[SparseCoder]:
    """Binary and continuous skip transcoders of k 8 to 64 with random weights."""
    found = []
    for i in range(n):
        config = CoderConfig(
            code="binary" if i % 2 else "continuous", k=(8, 16, 32, 64)[i // 2 % 4],
            n_latents=n_latents, d_in=width, d_out=width,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(i)
        tensors = {
            name: torch.randn(shape, generator=generator) * 0.05
            for name, shape in parameter_shapes(config).items()
        }
        found.append(SparseCoder(config, tensors).to(device))
    return found


def random_contexts(lm: LanguageModel, tokens: int, length: int) -> Contexts:
    """Contexts of random tokens."""
    n = tokens // length
    vocabulary = int(lm.model.config.vocab_size)
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(n, length))
    position = np.broadcast_to(np.arange(length), (n, length)).copy()
    ones = np.ones((n, length), bool)
    new = ones[:, 1:]
    return Contexts(ids, position, ones, new, "joined", BY_POSITIONS, position[:, 1:] * 0, new)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def forwards(lm: LanguageModel, contexts: Contexts, variants: list[Variant]) -> float:
    """Seconds of plain forward passes, one for each variant."""
    at_once = max(1, 8192 // contexts.token_id.shape[1])
    started = time.perf_counter()
    for start in range(0, len(contexts.token_id), at_once):
        inputs = contexts.inputs(slice(start, start + at_once), lm)
        for variant in variants:
            with splice(lm.base, variant):
                lm.model(**inputs, use_cache=False)
    synchronise(lm.model.device)
    return time.perf_counter() - started


def losses(lm: LanguageModel, contexts: Contexts, variants: dict[str, Variant]) -> float:
    """Seconds of our pass."""
    started = time.perf_counter()
    for _ in pass_over_contexts(lm, contexts, variants):
        pass
    return time.perf_counter() - started


@torch.inference_mode()
def encoder_products(store: ActivationStore, hook: str, coders: list[SparseCoder]) -> float:
    """Seconds of the products of every row with every encoder, into memory that is there."""
    split, device = store.held_out, coders[0].W_enc.device
    out = torch.empty(8192, coders[0].config.n_latents, device=device)
    started = time.perf_counter()
    for (x,) in split.batches((f"{hook}/input",), 8192):
        rows = x.to(device, torch.float32)
        for coder in coders:
            torch.mm(rows, coder.W_enc.T, out=out[: len(rows)])
    synchronise(device)
    return time.perf_counter() - started


def rows(store: ActivationStore, hook: str, coders: list[SparseCoder], folder: Path) -> float:
    """Seconds of our pass over the rows, calibration on training rows not included."""
    named = {str(i): coder for i, coder in enumerate(coders)}
    calibrations = {
        n: calibrate(c, store, hook, without_tokens=(), max_rows=8192)
        for n, c in named.items()
        if c.config.code == "continuous"
    }
    pieces = Pieces.open(folder / "rows", 0)
    codes = {n: Pieces.open(folder / "codes" / n, 0) for n in named}
    started = time.perf_counter()
    for _ in pass_over_rows(
        named,
        calibrations,
        store.held_out,
        hook,
        document=document_numbers(store.held_out),
        pieces=pieces,
        codes=codes,
    ):
        pass
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Alternate the passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo or smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--coders", type=int, default=16)
    parser.add_argument("--latents", type=int, default=None, help="default: 8 times the width")
    parser.add_argument("--layer", type=int, default=None, help="default: the middle one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32_768, help="held-out rows; 0: none")
    args = parser.parse_args()
    device = pick_device(None)
    if device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        model = str(smollm2_shape(folder / "m")) if args.model == "smollm2-135m" else args.model
        lm = load_model(model, device=device, with_head=True)
        width, layers = lm.model.config.hidden_size, lm.model.config.num_hidden_layers
        hook = f"layers.{layers // 2 if args.layer is None else args.layer}.mlp"
        n_latents = args.latents or 8 * width
        coders = coders_of(args.coders, width, n_latents, device)
        contexts = random_contexts(lm, args.tokens, args.context)
        variants: dict[str, Variant] = {
            str(i): {hook: coder_replacement(c)} for i, c in enumerate(coders)
        }
        # What is timed is right: a coder's sums do not depend on its company.
        few = contexts.first(4 * args.context)
        together = joined(pass_over_contexts(lm, few, variants), few.documents)
        alone = joined(pass_over_contexts(lm, few, {"3": variants["3"]}), few.documents)
        assert np.array_equal(together["3"].nats, alone["3"].nats)
        assert np.array_equal(together["3"].kl, alone["3"].kl)
        seconds: dict[str, list[float]] = {k: [] for k in ("bare", "forwards", "pass")}
        for i in range(args.repeats + 1):
            found = {
                "bare": forwards(lm, contexts, [{}] * (args.coders + 1)),
                "forwards": forwards(lm, contexts, [{}, *variants.values()]),
                "pass": losses(lm, contexts, variants),
            }
            for key, value in found.items():
                if i:  # the first warms up
                    seconds[key].append(value)
            print(i, {k: round(v, 2) for k, v in found.items()}, file=sys.stderr)
        by_rows: dict[str, list[float]] = {"products": [], "pass": []}
        if args.rows:
            text = TextSource(corpus="stdlib", held_out=0.5)
            capture(
                CaptureConfig(
                    model=model, store=folder / "acts", text=text, hookpoints=(hook,),
                    tokens=8_192, held_out_tokens=args.rows, context=args.context,
                )
            )  # fmt: skip
            store = ActivationStore(folder / "acts")
            for i in range(args.repeats + 1):
                products = encoder_products(store, hook, coders)
                ours = rows(store, hook, coders, folder / f"eval-{i}")
                if i:
                    by_rows["products"].append(products)
                    by_rows["pass"].append(ours)
                print(i, {"products": round(products, 2), "pass": round(ours, 2)}, file=sys.stderr)
    ratios = {
        "pass_over_forwards": [
            a / b for a, b in zip(seconds["pass"], seconds["forwards"], strict=True)
        ],
        "pass_over_bare": [a / b for a, b in zip(seconds["pass"], seconds["bare"], strict=True)],
        "rows_over_products": [
            a / b for a, b in zip(by_rows["pass"], by_rows["products"], strict=True)
        ],
    }
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ", 1)[-1].split("\n", 1)[0]
    print(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "settings": vars(args) | {"hookpoint": hook, "layers": layers, "width": width,
                                          "n_latents": n_latents},
                "seconds": {k: spread(v) for k, v in seconds.items()},
                "seconds_of_rows": {k: spread(v) for k, v in by_rows.items() if v},
                "ratios": {k: spread(v) for k, v in ratios.items() if v},
                "versions": versions(),
                "device": str(device),
                "machine": {"cpu": cpu, "cores": os.cpu_count(),
                            "python": platform.python_version()},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
