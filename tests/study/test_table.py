"""Where a study is, as people see it: on a terminal, and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bsc.study import table as table_module
from bsc.study.config import StudyStep
from bsc.study.folder import RECORD_VERSION, StepRecord
from bsc.study.graph import Node
from bsc.study.table import verdicts_table, watched
from bsc.study.work import State
from tests.study.made_results import every_kind

NODES = {
    name: Node(StudyStep(name=name, command="cache", fields={}), (), "0123abcd")
    for name in ("first", "second")
}
RECORD = StepRecord(
    version=RECORD_VERSION, step="first", digest="0123abcd", command="bsc cache", made="x",
    needs={}, seconds=95.0, ended_at="now", versions={},
)  # fmt: skip


def seen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    monkeypatch.setattr(table_module, "console", console)
    with watched(NODES, {"first": 60.0, "second": 600.0}) as watch:
        watch({"first": State("runs", "here"), "second": State("waits")})
        watch({"first": State("done", record=RECORD), "second": State("runs", "here")})
        watch({"first": State("done", record=RECORD), "second": State("failed", "[/x] \x1b[2J")})
    return out.getvalue()


def test_a_terminal_has_a_table_from_the_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = seen(monkeypatch, terminal=True)
    assert "first" in text and "expected" in text and "1.6 min" in text
    assert "[/x] \u241b[2J" in text  # what a command said neither acts nor is read as markup


def test_a_log_has_a_line_for_each_step_that_begins_or_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = seen(monkeypatch, terminal=False).splitlines()
    assert lines[0] == "first: runs, about 60 s"
    assert "first: done in 1.6 min; 1 of 2 steps done, about 10.0 min to go" in lines
    assert "second: runs, about 10.0 min" in lines
    assert "second: failed: [/x] \u241b[2J" in lines


def test_what_was_done_before_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(table_module, "console", Console(file=out, force_terminal=False))
    with watched(NODES, {}) as watch:
        watch({"first": State("done", record=RECORD), "second": State("waits")})
    assert out.getvalue() == ""


def test_verdicts_stand_beside_estimates_of_one_figure() -> None:
    out = io.StringIO()
    Console(file=out, width=160, highlight=False).print(verdicts_table(every_kind()))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    estimate = "1.21 to 1.31 intervals 1.16 to 1.36 ratio of fvu, 2 cells"
    assert f"more does not hold {estimate} The claim more is true." in lines
    assert "later not measured The claim later is true." in lines
