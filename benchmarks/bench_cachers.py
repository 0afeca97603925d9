"""Caching the same module of the same model on the same text: bsc, SAELens, and a plain loop.

Each tool runs in a fresh process, in turn, several times; seconds are those of the caching itself,
after imports and loading. What each stores and checks differs and is said beside the figures: bsc
stores input and output, the others the output alone. The last line is JSON.

    python benchmarks/bench_cachers.py --saelens-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bsc.embedded
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.embedded.corpus import documents
from bsc.versions import versions

HOOK, CONTEXT, BATCH = "layers.3.mlp", 256, 8_192
MODEL = Path(bsc.embedded.__path__[0]) / "model"
CHECKS = {
    "bsc": "hashes of chunks and files, sums, finite values; both sides, bfloat16, shuffled",
    "plain": "nothing; one side, bfloat16, in order",
    "SAELens": "nothing; one side, float32, in order",
}


def run_bsc(text: str, tokens: int, out: Path) -> dict[str, Any]:
    """Our capture."""
    result = capture(
        CaptureConfig(
            model=str(MODEL), store=out, text=TextSource(files=(text,), held_out=0.0),
            hookpoints=(HOOK,), tokens=tokens, context=CONTEXT, batch_tokens=BATCH,
        )
    )  # fmt: skip
    return {"rows": result.rows, "sides": 2, "bytes": result.bytes, "seconds": result.seconds}


@torch.inference_mode()
def run_plain(text: str, tokens: int, out: Path) -> dict[str, Any]:
    """Tokenise all, a hook, torch.save of every batch: what one writes in ten minutes."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(MODEL, dtype="auto").eval()
    seen: list[torch.Tensor] = []
    model.get_submodule(HOOK).register_forward_hook(lambda m, a, output: seen.append(output))
    out.mkdir()
    started = time.perf_counter()
    texts = [json.loads(line)["text"] for line in Path(text).read_text().splitlines()]
    ids = [i for one in tokenizer(texts)["input_ids"] for i in [0, *one]][:tokens]
    size = BATCH // CONTEXT
    contexts = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    rows = 0
    for number, batch in enumerate(contexts.split(size)):
        seen.clear()
        model(input_ids=batch, use_cache=False)
        torch.save(
            {"rows": seen[0].flatten(0, 1), "token_ids": batch.clone()}, out / f"{number}.pt"
        )
        rows += batch.numel()
    os.sync()
    seconds = time.perf_counter() - started
    size_on_disk = sum(p.stat().st_size for p in out.iterdir())
    return {"rows": rows, "sides": 1, "bytes": size_on_disk, "seconds": seconds}


def corpus(path: Path, tokens: int) -> None:
    """Documents of the standard library, a little more than are needed."""
    characters = 0
    with path.open("w") as file:
        for document in sorted(documents("stdlib")):
            text = document.text.encode("utf-8", "replace").decode()
            file.write(json.dumps({"text": text}) + "\n")
            characters += len(text)
            if characters > 6 * tokens:
                return


def main() -> None:
    """Run the tools in turn and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saelens-python", help="interpreter that has sae-lens")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, text, out = args.child
        run = {"bsc": run_bsc, "plain": run_plain}[tool]
        print(json.dumps({"tool": tool} | run(text, args.tokens, Path(out))))
        return
    here = Path(__file__)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as where:
        text = Path(where) / "corpus.jsonl"
        corpus(text, args.tokens)
        for i in range(args.repeats):
            for tool in ["bsc", "plain", *(["SAELens"] if args.saelens_python else [])]:
                out = str(Path(where) / f"{tool}-{i}")
                if tool == "SAELens":
                    command = [
                        args.saelens_python, str(here.parent / "peers/saelens_cache.py"),
                        "--model", str(MODEL), "--text", str(text), "--hook", HOOK, "--tokens",
                        str(args.tokens), "--context", str(CONTEXT), "--batch-tokens", str(BATCH),
                        "--out", out,
                    ]  # fmt: skip
                else:
                    command = [sys.executable, str(here), "--tokens", str(args.tokens),
                               "--child", tool, str(text), out]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                assert found["rows"] >= 0.98 * args.tokens, found
                results.setdefault(tool, []).append(found)
                print(tool, f"{found['rows'] / found['seconds']:,.0f} rows/s", file=sys.stderr)
    table = {}
    for tool, runs in results.items():
        rates = [r["rows"] / r["seconds"] for r in runs]
        last = runs[-1]
        table[tool] = {
            "rows_per_s": statistics.median(rates), "min": min(rates), "max": max(rates),
            "vectors_per_s": statistics.median(rates) * last["sides"],
            "bytes_per_vector": last["bytes"] / last["rows"] / last["sides"],
            "checks": CHECKS[tool],
        }  # fmt: skip
        print(f"{tool:10} {table[tool]}", file=sys.stderr)
    facts = {"versions": versions(), "cpus": os.cpu_count(), "tokens": args.tokens}
    print(json.dumps({"benchmark": "cachers", "results": table} | facts))


if __name__ == "__main__":
    main()
