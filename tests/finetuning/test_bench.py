"""The benchmark that chose the defaults measures what it says."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.bench_finetune import sweep
from bsc.train.run import Run


def test_every_setting_is_measured_on_the_same_documents(parents: Run) -> None:
    """Coders that a step leaves where they are have the figures of those that nobody finetuned,
    by whatever batches; those that learn are better on text that comes after theirs."""
    still, learning = 1e-30, 3e-3
    lines = sweep(
        argparse.Namespace(
            run=parents.folder, coders=["layers.0.mlp/*"], tokens=4_096, later=1_024, loss="kl",
            optimisers=["adam"], batches=[64, 128], rates=[still, learning], beta1=[0.7],
            fvu_weights=[3.0],
        )
    )  # fmt: skip
    assert len(lines) == 2 * 5 and [line["closed"] for line in lines[:2]] == [0, 0]
    before = {line["coder"]: line["kl"] for line in lines[:2]}
    for line in lines[2:]:
        same = line["kl"] == pytest.approx(before[line["coder"]], rel=1e-3)
        assert same == (line["lr"] == still), line
    learned = [line["closed"] for line in lines[2:] if line["lr"] == learning]
    assert len(learned) == 4 and sum(learned) / 4 > 0.01
