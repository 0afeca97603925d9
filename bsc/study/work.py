"""Working through the steps of a study: what can be done next, until nothing can.

Several processes may work on one study at the same time, as the jobs of an array do: each takes the
next step that nobody holds. They share nothing but the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from bsc.locks import FileLock, HeldError, holder
from bsc.study.folder import StepRecord, StudyFolder
from bsc.study.graph import Node
from bsc.study.steps import FailedStep, do_step

__all__ = ["State", "Watch", "states_of", "work"]

_LOOK_EVERY_SECONDS = 2.0
Kind = Literal["done", "waits", "runs", "failed", "blocked"]


class State(NamedTuple):
    """Where a step is."""

    kind: Kind
    words: str = ""
    """Who works on it, why it failed, or what it waits for."""
    record: StepRecord | None = None


States = Mapping[str, State]
Watch = Callable[[States], None]


def states_of(folder: StudyFolder, nodes: Mapping[str, Node]) -> dict[str, State]:
    """Where every step is, from what is on disk."""
    states: dict[str, State] = {}
    for name, node in nodes.items():
        record = folder.done(node) if all(states[n].record for n in node.needs) else None
        if record is not None:
            states[name] = State("done", record=record)
        elif all(states[n].record for n in node.needs) and (who := holder(folder.lock(node))):
            states[name] = State("runs", who)
        else:
            states[name] = State("waits")
    return states


def work(
    folder: StudyFolder,
    nodes: Mapping[str, Node],
    launch: Sequence[str] = (),
    watch: Watch = lambda states: None,
) -> dict[str, State]:
    """Do every step that can be done.

    Args:
        folder: of the study.
        nodes: steps to do, each after what it needs, with all that they need.
        launch: words before `bsc` in the command lines of captures and trainings.
        watch: is told whenever the state of a step changes.

    Returns:
        Where each step is in the end: done, failed, or blocked by one that failed.
    """
    folder.make()
    failed: dict[str, str] = {}
    did: set[str] = set()
    while True:
        states = states_of(folder, nodes)
        for name, words in failed.items():
            states[name] = State("failed", words)
        for name, node in nodes.items():
            stops = [n for n in node.needs if states[n].kind in ("failed", "blocked")]
            if states[name].kind == "waits" and stops:
                states[name] = State("blocked", f"needs {', '.join(stops)}")
        watch(states)
        ready = [
            n
            for name, n in nodes.items()
            if states[name].kind == "waits" and all(states[x].kind == "done" for x in n.needs)
        ]
        if any(_take(node, folder, launch, states, watch, failed, did) for node in ready):
            continue
        if not ready and not any(s.kind == "runs" for s in states.values()):
            return states
        time.sleep(_LOOK_EVERY_SECONDS)


def _take(
    node: Node,
    folder: StudyFolder,
    launch: Sequence[str],
    states: dict[str, State],
    watch: Watch,
    failed: dict[str, str],
    did: set[str],
) -> bool:
    """Do a step unless somebody else does; whether anything came of it."""
    try:
        lock = FileLock(folder.lock(node))
    except HeldError:
        return False
    try:
        if folder.done(node) is None:  # by somebody else, since this one looked
            if node.name in did:
                raise FailedStep(
                    "done, and then changed by something else, such as the same study with other "
                    "settings at the same time"
                )
            did.add(node.name)
            states[node.name] = State("runs", "here")
            watch(states)
            do_step(node, folder, lock, launch)
    except FailedStep as error:
        failed[node.name] = str(error)
    finally:
        lock.release()
    return True
