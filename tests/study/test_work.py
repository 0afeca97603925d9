"""Which steps are done, and which are not: by a stand-in for the commands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bsc.errors import UserError
from bsc.locks import FileLock, HeldError
from bsc.study import folder as folder_module
from bsc.study import steps as steps_module
from bsc.study import work as work_module
from bsc.study.config import read_study
from bsc.study.folder import RECORD_VERSION, StepRecord, StudyFolder
from bsc.study.graph import Node, chosen_nodes, graph_of
from bsc.study.steps import FailedStep
from bsc.study.work import State, work

STUDY = """
title = "t"
[cache.a]
model = "demo"
[cache.b]
model = "demo"
seed = 1
[train.x]
store = "a"
[train.y]
store = "b"
[eval.ex]
run = "x"
[eval.ey]
run = "y"
"""


class Commands:
    """Stands in for the commands: a step makes a file, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.fails: set[str] = set()
        self.during: Callable[[str], None] = lambda name: None
        monkeypatch.setattr(work_module, "do_step", self.do)
        monkeypatch.setattr(folder_module.StudyFolder, "made", self.made)

    @staticmethod
    def made(folder: StudyFolder, node: Node) -> str | None:
        path = folder.path / "made" / node.label
        return path.read_text() if path.exists() else None

    def do(
        self, node: Node, folder: StudyFolder, lock: FileLock, launch: Sequence[str] = ()
    ) -> None:
        self.done.append(node.name)
        self.during(node.name)
        if node.name in self.fails:
            raise FailedStep("it broke")
        (folder.path / "made").mkdir(exist_ok=True)
        (folder.path / "made" / node.label).write_text(f"{node.label} {len(self.done)}")
        folder.write(
            node,
            StepRecord(
                version=RECORD_VERSION, step=node.name, digest=node.digest, command="x",
                made=self.made(folder, node) or "", needs=folder.needs(node), seconds=1.0,
                ended_at="now", versions={},
            ),
        )  # fmt: skip


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(monkeypatch)


def nodes_of(text: str, tmp_path: Path) -> dict[str, Node]:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return graph_of(read_study(path), "study.toml")


def kinds(states: dict[str, State]) -> dict[str, str]:
    return {name: state.kind for name, state in states.items()}


def test_each_step_comes_after_what_it_needs_and_is_done_once(
    commands: Commands, tmp_path: Path
) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)
    states = work(folder, nodes)
    assert set(kinds(states).values()) == {"done"}
    assert sorted(commands.done) == sorted(nodes)
    for name in nodes:
        assert all(commands.done.index(n) < commands.done.index(name) for n in nodes[name].needs)
    work(folder, nodes)
    assert len(commands.done) == len(nodes)


def test_a_failed_step_stops_what_needs_it_and_nothing_else(
    commands: Commands, tmp_path: Path
) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    commands.fails = {"x"}
    states = work(StudyFolder(tmp_path / "out", nodes), nodes)
    assert kinds(states) == {
        "a": "done", "b": "done", "x": "failed", "y": "done", "ex": "blocked", "ey": "done"
    }  # fmt: skip
    assert states["x"].words == "it broke"
    assert states["ex"].words == "needs x"
    commands.fails, before = set(), len(commands.done)
    assert set(kinds(work(StudyFolder(tmp_path / "out", nodes), nodes)).values()) == {"done"}
    assert commands.done[before:] == ["x", "ex"]


def test_a_change_redoes_what_depends_on_it_and_nothing_else(
    commands: Commands, tmp_path: Path
) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    work(StudyFolder(tmp_path / "out", nodes), nodes)
    before = len(commands.done)
    changed = nodes_of(STUDY.replace("seed = 1", "seed = 2"), tmp_path)
    work(StudyFolder(tmp_path / "out", changed), changed)
    assert commands.done[before:] == ["b", "y", "ey"]
    # What was made before is still there, and used when the change is taken back.
    before = len(commands.done)
    work(StudyFolder(tmp_path / "out", nodes), nodes)
    assert commands.done[before:] == []


def test_what_was_removed_or_exchanged_is_made_again(commands: Commands, tmp_path: Path) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)
    work(folder, nodes)
    before = len(commands.done)
    (folder.path / "made" / nodes["x"].label).write_text("another run")
    work(folder, nodes)
    assert commands.done[before:] == ["x", "ex"]
    before = len(commands.done)
    folder.record_path(nodes["ey"]).write_text("{}")
    work(folder, nodes)
    assert commands.done[before:] == ["ey"]


def test_several_processes_divide_the_steps(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "_LOOK_EVERY_SECONDS", 0.02)
    nodes = nodes_of(STUDY, tmp_path)
    meet = threading.Barrier(2, timeout=20)

    def together(name: str) -> None:
        if name in ("a", "b"):  # each is done by one of the two, at the same time
            meet.wait()

    commands.during = together
    workers = [
        threading.Thread(target=work, args=(StudyFolder(tmp_path / "out", nodes), nodes))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    assert sorted(commands.done) == sorted(nodes)


def test_a_step_that_somebody_holds_is_waited_for(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "_LOOK_EVERY_SECONDS", 0.02)
    nodes = nodes_of(STUDY, tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)
    folder.make()
    held = FileLock(folder.lock(nodes["a"]))
    seen: list[str] = []
    worker = threading.Thread(
        target=work,
        args=(folder, nodes),
        kwargs={"watch": lambda states: seen.append(states["a"].kind)},
    )
    worker.start()
    deadline = time.monotonic() + 20
    while "ey" not in commands.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert commands.done == ["b", "y", "ey"]
    assert set(seen) == {"runs"}
    held.release()
    worker.join(20)
    assert not worker.is_alive()
    assert sorted(commands.done) == sorted(nodes)


def test_who_loses_a_race_for_a_step_goes_on(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "_LOOK_EVERY_SECONDS", 0.01)
    lost: list[Path] = []

    def lock(path: Path) -> FileLock:
        if len(lost) < 2:  # another process took it since this one looked, and let it go
            lost.append(path)
            raise HeldError("another process")
        return FileLock(path)

    monkeypatch.setattr(work_module, "FileLock", lock)
    nodes = nodes_of(STUDY, tmp_path)
    states = work(StudyFolder(tmp_path / "out", nodes), nodes)
    assert len(lost) == 2
    assert set(kinds(states).values()) == {"done"}


def test_steps_that_measure_one_run_hold_one_lock(tmp_path: Path) -> None:
    nodes = nodes_of(STUDY + '[interp.s]\nrun = "ex"\n', tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)
    assert folder.lock(nodes["s"]) == folder.lock(nodes["ex"]) != folder.lock(nodes["ey"])


def test_what_changes_while_it_is_worked_on_fails_and_does_not_go_round(
    commands: Commands, tmp_path: Path
) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)

    def change(name: str) -> None:
        if name == "ey":  # somebody else measures x again
            (folder.path / "made" / nodes["ex"].label).write_text("other")

    commands.during = change
    states = work(folder, nodes)
    assert states["ex"].kind == "failed" and "changed by something else" in states["ex"].words
    assert commands.done.count("ex") == 1


def test_a_run_that_is_whole_gets_its_record_and_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill of the study alone: its command went on and ended."""
    nodes = nodes_of(STUDY + '[finetune.t]\nrun = "x"\n', tmp_path)
    folder = StudyFolder(tmp_path / "out", nodes)
    folder.make()
    called: list[str] = []
    monkeypatch.setattr(StudyFolder, "made", lambda self, node: f"made {node.name}")
    monkeypatch.setattr(steps_module, "_call", lambda node, *rest: called.append(node.name))
    for name in ("t", "x", "ex"):
        lock = FileLock(folder.lock(nodes[name]))
        steps_module.do_step(nodes[name], folder, lock)
        lock.release()
        assert folder.done(nodes[name]) is not None
    assert called == ["ex"]  # what measures may always be asked again


def test_only_some_steps_with_what_they_need(tmp_path: Path) -> None:
    nodes = nodes_of(STUDY, tmp_path)
    claims = {"C1": ["ex"], "C2": ["ex", "ey"]}
    assert list(chosen_nodes(nodes, ["ex"], claims)) == ["a", "x", "ex"]
    assert list(chosen_nodes(nodes, ["C1"], claims)) == ["a", "x", "ex"]
    assert list(chosen_nodes(nodes, ["C1", "ey"], claims)) == ["a", "b", "x", "y", "ex", "ey"]
    assert list(chosen_nodes(nodes, [], claims)) == list(nodes)
    with pytest.raises(
        UserError,
        match=r"--only ez: no such step or claim.*; steps are a, b, x, y, ex, ey, claims C1, C2",
    ):
        chosen_nodes(nodes, ["ez"], claims)


def test_two_evaluations_of_one_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\[eval.ez\] and \[eval.ex\] both measure x"):
        nodes_of(STUDY + '[eval.ez]\nrun = "x"\n', tmp_path)


def test_steps_that_score_one_run_draw_the_same_latents(tmp_path: Path) -> None:
    text = STUDY + '[interp.s]\nrun = "ex"\n[interp.j]\nrun = "ex"\njudge = "vllm"\n'
    assert "j" in nodes_of(text, tmp_path)
    with pytest.raises(UserError, match=r"interp.j\] and \[interp.s\] score one run.* latents"):
        nodes_of(text + "latents = 7\n", tmp_path)


def test_steps_that_need_each_other_are_refused(tmp_path: Path) -> None:
    text = STUDY + '[choose.c]\nruns = "z"\nfield = "lr"\n[train.z]\nstore = "a"\nchosen = "c"\n'
    with pytest.raises(UserError, match="steps need each other: "):
        nodes_of(text, tmp_path)
