"""How much of the model's own speed is left when its rows are captured?

The bare pass is the same model on the same batches, cut after the last hookpoint in the same way,
with nothing taken from it. The capture is the whole of `bsc cache` after the model is loaded: text,
tokens, masks, rows, scatter, hashes, sums, fsync. Bare passes and captures alternate in one
process; the ratio is of rows per second. The last line is JSON.

    python benchmarks/bench_capture.py --model demo --tokens 262144
    python benchmarks/bench_capture.py --model smollm2-135m --tokens 8192 --context 512
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
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bsc.embedded
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.source import Source, open_source
from bsc.cache.model.hookpoints import modules_of
from bsc.cache.model.text import read_text
from bsc.cache.model.text_source import TextSource
from bsc.cache.model.tokens import ContextBatch, context_batches
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.embedded.corpus import documents
from bsc.versions import versions


class _Enough(Exception):
    """The last hookpoint has run."""


def smollm2_shape(folder: Path) -> Path:
    """A model of SmolLM2-135M's shape with random weights, and the embedded tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    embedded = Path(bsc.embedded.__path__[0]) / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded / name).read_bytes())
    return folder


def corpus(folder: Path, characters: int) -> Path:
    """Sources of the standard library as lines of JSON: text that is streamed, as a user's is."""
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for document in sorted(documents("stdlib")):
            text = document.text.encode("utf-8", "replace").decode()
            characters -= file.write(json.dumps({"text": text}) + "\n")
            if characters < 0:
                break
    return path


@torch.inference_mode()
def bare_pass(source: Source, batches: list[ContextBatch]) -> float:
    """Seconds of the forward passes alone, cut after the last hookpoint."""
    device = source.lm.model.device
    from bsc.cache.model.attention import forward_inputs

    inputs = [
        forward_inputs(
            torch.from_numpy(b.token_id.copy()).to(device),
            torch.from_numpy(b.position.copy()).to(device),
            packing=source.packing, separation=source.separation, dtype=source.lm.model.dtype,
        )
        for b in batches
    ]  # fmt: skip
    last = source.lm.base.get_submodule(modules_of(source.tap.names[-1])[1])

    def stop(*_: object) -> None:
        raise _Enough

    handle = last.register_forward_hook(stop)
    try:
        started = time.perf_counter()
        for given in inputs:
            try:
                source.lm.base(**given, use_cache=False)
            except _Enough:
                continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started
    finally:
        handle.remove()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Alternate bare passes and captures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, smollm2-135m, or a folder")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--packing", default="masked")
    parser.add_argument("--hookpoint", action="append", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to write to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as where:
        folder = Path(where)
        model, hooks = args.model, args.hookpoint
        if model == "smollm2-135m":
            model = str(smollm2_shape(folder / "model"))
            hooks = hooks or ["layers.{0,9,18,27}.mlp"]
        config = CaptureConfig(
            model=model, store=folder / "acts",
            text=TextSource(files=(str(corpus(folder, 8 * args.tokens)),), held_out=0.0),
            hookpoints=tuple(hooks or ["layers.3.mlp"]), tokens=args.tokens, context=args.context,
            packing=args.packing,
        )  # fmt: skip
        source = open_source(config)
        batches = list(
            context_batches(
                read_text(config.text), source.lm.tokenizer, context=source.context,
                batch=source.batch, wanted={"train": args.tokens}, packing=args.packing,
            )
        )  # fmt: skip
        n = source.batch * source.context
        assert args.tokens % n == 0, f"--tokens: a multiple of {n}, or a last batch is cut"
        batches = [b for b in batches if b.token_id.size == n][: args.tokens // n]
        bare, ours, size = [], [], 0
        for i in range(args.repeats + 1):
            seconds = bare_pass(source, batches)
            result = capture(config.but(store=folder / f"acts-{i}"))
            if i == 0:  # warms up
                assert list(verify(folder / "acts-0")) == []
                store = ActivationStore(folder / "acts-0")
                assert store.train.rows == result.rows > 0.98 * args.tokens
                size = result.bytes
                continue
            bare.append(len(batches) * n / seconds)
            ours.append(result.rows / result.seconds)
            print(f"bare {bare[-1]:,.0f} rows/s, capture {ours[-1]:,.0f} rows/s", file=sys.stderr)
    facts: dict[str, Any] = {
        "benchmark": "capture", "model": args.model, "tokens": args.tokens, "bytes": size,
        "context": source.context, "packing": args.packing, "hookpoints": source.tap.names,
        "bare_rows_per_s": spread(bare), "capture_rows_per_s": spread(ours),
        "ratio": spread([o / b for o, b in zip(ours, bare, strict=True)]),
        "versions": versions(), "cpus": os.cpu_count(), "machine": platform.processor(),
        "threads": torch.get_num_threads(), "device": str(source.lm.model.device),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
