"""What does it cost at capture that held-out documents are chosen and compared by what they hold?

* capture: the embedded model over the standard library, as the demo does it, and over the same text
  as a stream (a file of JSON lines). What choosing sides, n-grams and the comparison at the end
  take, over the time of the capture: of the first two the time of the processor (they are worked
  out in a thread beside the model's), of the last the time that passes.
* difference: captures with all of it, and with documents held out by name, no n-grams and no
  comparison, in turn; the ratio of their times.
* parts: nanoseconds a byte of choosing sides, a token of n-grams, a training row of the comparison
  with a million held-out n-grams.

The last line is JSON.

    python -m benchmarks.bench_overlap [--repeats 3] [--tokens 655360]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bsc.cache.capture import commit
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.overlap import seen_ngrams
from bsc.cache.model import text, tokens
from bsc.cache.model.ngrams import token_ngrams
from bsc.cache.model.sides import is_text_held_out
from bsc.cache.model.text import parse_text
from bsc.cache.model.text_source import TextSource
from bsc.embedded.corpus import documents
from bsc.embedded.held_out import is_held_out
from bsc.versions import versions

PARTS = {
    "sides": [(text, "held_out_documents"), (text, "is_text_held_out")],
    "n-grams": [(tokens, "token_ngrams")],
    "comparison": [(commit, "measure_overlap")],
}


def timed_capture(root: Path, source: TextSource, n: int) -> dict[str, float]:
    """Seconds of a capture, and in the parts of it."""
    spent = dict.fromkeys(PARTS, 0.0)

    def counted(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter if part == "comparison" else time.thread_time

        def run(*args: Any, **how: Any) -> Any:
            started = clock()
            try:
                return work(*args, **how)
            finally:
                spent[part] += clock() - started

        return run

    patches = [
        patch.object(module, name, counted(part, getattr(module, name)))
        for part, places in PARTS.items()
        for module, name in places
    ]
    return {"capture": patched_capture(root, source, n, patches)} | spent


def patched_capture(root: Path, source: TextSource, n: int, patches: list[Any]) -> float:
    """Seconds of a capture while some functions are others."""
    for one in patches:
        one.start()
    try:
        started = time.perf_counter()
        capture(
            CaptureConfig(
                model="demo", store=root, text=source, hookpoints=("layers.3.mlp",), tokens=n,
                held_out_tokens=n // 10,
            )
        )  # fmt: skip
        return time.perf_counter() - started
    finally:
        for one in patches:
            one.stop()


def difference(repeats: int, n: int, folder: Path) -> dict[str, Any]:
    """Time of captures with all of it over that of captures without."""
    without = [
        patch.object(text, "held_out_documents",
                     lambda found, share: [is_held_out(d.name, share) for d in found]),
        patch.object(tokens, "token_ngrams", lambda ids: np.zeros(len(ids), np.uint64)),
        patch.object(commit, "measure_overlap", lambda store: None),
    ]  # fmt: skip
    source, ratios = TextSource(corpus="stdlib"), []
    for i in range(repeats):
        arms: list[tuple[str, list[Any]]] = [("with", []), ("without", without)]
        seconds = {
            name: patched_capture(folder / f"{name}{i}", source, n, patches)
            for name, patches in (arms if i % 2 else arms[::-1])
        }
        ratios.append(seconds["with"] / seconds["without"])
        print(seconds, file=sys.stderr, flush=True)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "all": [round(r, 4) for r in sorted(ratios)],
    }


def captures(repeats: int, n: int, folder: Path) -> dict[str, Any]:
    """Shares of the time of a capture, by text."""
    lines = folder / "stdlib.jsonl"
    lines.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents("stdlib")))
    sources = {
        "corpus": TextSource(corpus="stdlib"), "stream": TextSource(**parse_text([str(lines)])),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, source in sources.items():
        runs = [timed_capture(folder / f"{name}{i}", source, n) for i in range(repeats)]
        shares = {p: [r[p] / r["capture"] for r in runs] for p in PARTS}
        total = [sum(r[p] for p in PARTS) / r["capture"] for r in runs]
        found[name] = {
            "seconds": round(statistics.median(r["capture"] for r in runs), 2),
            "shares": {p: round(statistics.median(s), 5) for p, s in shares.items()},
            "all": [round(t, 5) for t in sorted(total)],
        }  # fmt: skip
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def nanoseconds(work: Callable[[], Any], units: int) -> float:
    """Of one unit, the median of five runs."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) / units * 1e9, 2)


def parts() -> dict[str, float]:
    """What each piece costs by itself."""
    rng = np.random.default_rng(0)
    page = "".join(d.text for d in documents("stdlib"))[:4_000_000]
    ids = rng.integers(50_000, size=1_000_000)
    known = np.unique(rng.integers(1, 2**63, size=1_048_576, dtype=np.uint64))
    shards = rng.integers(1, 2**63, size=(16, 262_144), dtype=np.uint64)
    split: Any = SimpleNamespace(shard=lambda name, i: shards[i])
    return {
        "sides, ns a byte": nanoseconds(lambda: is_text_held_out(page, 0.05), len(page.encode())),
        "n-grams, ns a token": nanoseconds(lambda: token_ngrams(ids), len(ids)),
        "comparison, ns a training row, all cores": nanoseconds(
            lambda: seen_ngrams(known, split, range(16)), shards.size
        ),
    }


def main() -> None:
    """Run both and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=655_360)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results = {
            "captures": captures(args.repeats, args.tokens, root),
            "difference": difference(2 * args.repeats, args.tokens, root),
            "parts": parts(),
        }
    facts = {"threads": torch.get_num_threads(), "versions": versions()}
    print(json.dumps({"benchmark": "overlap", "results": results} | facts))


if __name__ == "__main__":
    main()
