"""Where a study is, as a table: each step with its state, its time and what is still to come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from bsc.formats import printable
from bsc.progress import console
from bsc.study.graph import Node
from bsc.study.results import StudyResult
from bsc.study.summary import Summary, claim_summary
from bsc.study.work import State, States, Watch

__all__ = ["said_of", "span", "steps_table", "verdicts_table", "watched"]


def span(seconds: float) -> str:
    """A time as people say it.

    >>> span(7.4), span(95), span(8000), span(400_000)
    ('7 s', '1.6 min', '2.2 h', '4.6 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86400:.1f} days"


def steps_table(
    nodes: Mapping[str, Node],
    states: States,
    expected: Mapping[str, float],
    since: Mapping[str, float] | None = None,
) -> Table:
    """The table.

    Args:
        nodes: steps.
        states: where each is.
        expected: seconds that each takes by the plan.
        since: when each began that runs here, by `time.monotonic`.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("step", "command", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("expected", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, node in nodes.items():
        state = states[name]
        began = (since or {}).get(name)
        took = ""
        if state.record:
            took = span(state.record.seconds)
        elif began is not None and state.kind == "runs":
            took = span(time.monotonic() - began)
        words = escape(printable(state.words)) if state.kind != "done" else ""
        style = {"failed": "red", "blocked": "yellow", "runs": "bold"}.get(state.kind)
        plan = span(expected[name]) if name in expected and not state.record else ""
        table.add_row(name, node.step.command, state.kind, took, plan, words, style=style)
    return table


def left(states: States, expected: Mapping[str, float], since: Mapping[str, float]) -> float:
    """Seconds that are still to come by the plan."""
    seconds = 0.0
    for name, state in states.items():
        if state.kind in ("waits", "runs"):
            spent = time.monotonic() - since[name] if name in since else 0.0
            seconds += max(0.0, expected.get(name, 0.0) - spent)
    return seconds


def said_of(states: States, expected: Mapping[str, float], since: Mapping[str, float]) -> str:
    """How many steps are done, and how long the others take."""
    done = sum(s.kind == "done" for s in states.values())
    words = f"{done} of {len(states)} steps done"
    to_come = left(states, expected, since)
    return f"{words}, about {span(to_come)} to go" if to_come else words


class _Shown:
    """What the live table shows; made anew whenever it is drawn, so that times go on."""

    def __init__(self, nodes: Mapping[str, Node], expected: Mapping[str, float]) -> None:
        self.nodes, self.expected = nodes, expected
        self.states = dict.fromkeys(nodes, State("waits"))  # until somebody has looked
        self.since: dict[str, float] = {}
        self.looked = False

    def __rich__(self) -> Table:
        table = steps_table(self.nodes, self.states, self.expected, self.since)
        table.caption = said_of(self.states, self.expected, self.since)
        return table


@contextmanager
def watched(nodes: Mapping[str, Node], expected: Mapping[str, float]) -> Iterator[Watch]:
    """Show where steps are while the block runs: a table on a terminal, else a line for each step
    that begins or ends."""
    shown = _Shown(nodes, expected)
    live = Live(shown, console=console, refresh_per_second=1, transient=True)

    def watch(states: States) -> None:
        for name, state in states.items():
            # What was done before this process began is no news.
            before = shown.states[name] if shown.looked else None
            if state.kind == "runs" and state.words == "here":
                shown.since.setdefault(name, time.monotonic())
            if console.is_terminal or (before and before.kind == state.kind):
                continue
            if state.kind == "runs":
                plan = f", about {span(expected[name])}" if name in expected else ""
                console.print(f"{name}: runs{plan}", markup=False)
            elif before and state.record:
                rest = said_of(states, expected, shown.since)
                took = span(state.record.seconds)
                console.print(f"{name}: done in {took}; {rest}", markup=False)
            elif state.kind in ("failed", "blocked"):
                console.print(f"{name}: {state.kind}: {printable(state.words)}", markup=False)
        shown.states, shown.looked = dict(states), True

    if console.is_terminal:
        with live:
            yield watch
    else:
        yield watch


def verdicts_table(result: StudyResult) -> Table:
    """Claims with their verdicts."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("claim", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("estimate", justify="right", no_wrap=True)
    table.add_column("95 % interval", no_wrap=True)
    table.add_column("of", overflow="fold", max_width=30)
    table.add_column("", overflow="fold")
    for claim in result.claims:
        of = claim_summary(claim) or Summary("", "")
        table.add_row(
            escape(printable(claim.id)),
            claim.verdict,
            of.value,
            of.interval,
            escape(printable(of.what)),
            escape(printable(claim.words)),
        )
    return table
