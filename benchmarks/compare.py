"""What does a benchmark say of this tree, and what of another commit, in the same minutes?

Machines are shared, so that figures of two days say nothing of two commits. This runs a script of
`benchmarks/` in turn in the tree it is in and in a checkout of the other commit (each with its own
code, in a process of its own), and prints of every figure that both have the medians and the ratio
of the pairs, median, smallest and largest. The last line is JSON.

    python benchmarks/compare.py b7aff8b --rounds 5 -- bench_train.py --parts step --quick
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent.parent


def run(tree: Path, command: list[str]) -> dict[str, float]:
    """Figures of one run of a benchmark with the code of a tree, by their place in its JSON."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    script, *options = command
    done = subprocess.run(
        [sys.executable, str(tree / "benchmarks" / script), *options],
        env=environment, cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} failed in {tree}:\n{done.stderr[-3000:]}")
    printed = json.loads(done.stdout.splitlines()[-1])
    return dict(figures("", printed.get("results", printed)))


def figures(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number of nested records; of a spread the median, and the smallest, which other work on
    the machine moves least."""
    if isinstance(value, dict):
        if "median" in value:
            yield place, float(value["median"])
            yield f"{place} min", float(value["min"])
            return
        for name, part in value.items():
            yield from figures(f"{place}.{name}" if place else name, part)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from figures(f"{place}[{i}]", part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, float(value)


def main() -> None:
    """Run both in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="the other commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("command", nargs="+", help="after --: a script of benchmarks/, its options")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"other": [], "this": []}
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git = ["git", "-C", str(HERE), "worktree"]
        add = [*git, "add", "--quiet", "--detach", str(other), args.commit]
        subprocess.run(add, check=True)
        try:
            for _ in range(args.rounds):
                found["other"].append(run(other, args.command))
                found["this"].append(run(HERE, args.command))
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    table = Table("figure", args.commit, "this tree", "ratio", "smallest", "largest")
    results = {}
    for place in found["this"][0]:
        pairs = [
            (a[place], b[place])
            for a, b in zip(found["other"], found["this"], strict=True)
            if a.get(place)
        ]
        if not pairs:
            continue
        ratios = [b / a for a, b in pairs]
        results[place] = {
            "other": statistics.median(a for a, _ in pairs),
            "this": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
        }  # fmt: skip
        table.add_row(place, *(f"{v:.3f}" for v in results[place].values()))
    Console(stderr=True, width=120).print(table)
    print(json.dumps({"against": args.commit, "command": args.command, "results": results}))


if __name__ == "__main__":
    main()
