"""A study: read, worked through, decided."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from bsc.errors import UserError
from bsc.study.config import Claim, Study, read_study
from bsc.study.definitions import definitions_of
from bsc.study.folder import StudyFolder
from bsc.study.graph import Node, chosen_nodes, graph_of
from bsc.study.measures import Measures, check_figure
from bsc.study.needs import runs_of, steps_of
from bsc.study.results import STUDY_VERSION, Done, StudyResult, claim_result
from bsc.study.subjects import Subject, subjects_of
from bsc.study.work import State, states_of
from bsc.typed import write_typed
from bsc.versions import versions

__all__ = ["OpenedStudy", "decided", "open_study", "write_result"]


class OpenedStudy(NamedTuple):
    """A study that was read and checked, and where it is."""

    file: Path
    sha256: str
    """Of the file, as it was read."""
    study: Study
    nodes: dict[str, Node]
    """Every step."""
    wanted: dict[str, Node]
    """The steps that were asked for, with what they need."""
    folder: StudyFolder


def open_study(
    file: Path, scale: str | None = None, out: Path | None = None, only: Collection[str] = ()
) -> OpenedStudy:
    """Read and check a study; nothing is written.

    Args:
        file: of the study.
        scale: one of its scales; None: its first.
        out: folder of the study; None: in the current folder, named after file and scale.
        only: names of steps and ids of claims; none: all.

    Raises:
        UserError: the file is not as it should be, or the folder cannot be one.
    """
    study = read_study(file, scale)
    nodes = graph_of(study, str(file))
    if not nodes:
        raise UserError(f"{file}: no steps. A study has at least [cache.NAME] and [train.NAME].")
    trained = [n for n, node in nodes.items() if node.step.command in ("train", "finetune")]
    for claim in study.claims:
        where = f"{file}: claim {claim.id}"
        for number, part in enumerate(claim.parts, 1):
            for one in (part, *(part.changed(v) for v in part.variants)):
                check_figure(one, f"{where}, part {number}")
        if odd := sorted(runs_of(claim) - set(trained)):
            raise UserError(
                f"{where}: run = {odd[0]!r}: no step of train or finetune is called so; there are "
                f"{', '.join(trained) or 'none'}."
            )
    name = study.name if study.scale is None else f"{study.name}-{study.scale}"
    path = Path(name) if out is None else out
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: the folder of a study, but a file is there. Name another --out.")
    steps = {name: node.step for name, node in nodes.items()}
    claims = {claim.id: steps_of(claim, steps) for claim in study.claims}
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return OpenedStudy(
        file, sha256, study, nodes, chosen_nodes(nodes, only, claims), StudyFolder(path, nodes)
    )


def decided(opened: OpenedStudy, states: Mapping[str, State] | None = None) -> StudyResult:
    """Every claim with its verdict, as far as what it needs is measured.

    Args:
        opened: the study.
        states: of its steps, where they are known; None: from what is on disk.

    Raises:
        UserError: a claim does not fit the coders that there are, or a file is damaged.
    """
    known = states_of(opened.folder, opened.nodes) | dict(states or {})
    subjects, measures, study = _subjects(opened, known), Measures(), opened.study
    steps = {name: node.step for name, node in opened.nodes.items()}

    def waiting(claim: Claim) -> list[str]:
        return [name for name in steps_of(claim, steps) if known[name].kind != "done"]

    return StudyResult(
        version=STUDY_VERSION,
        name=study.name,
        title=study.title,
        question=study.question,
        scale=study.scale,
        file_sha256=opened.sha256,
        claims=[claim_result(c, subjects, measures, waiting(c)) for c in study.claims],
        figures=definitions_of(study.claims),
        steps=[_done(node, known[name]) for name, node in opened.nodes.items()],
        versions=versions(),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _subjects(opened: OpenedStudy, states: Mapping[str, State]) -> list[Subject]:
    """Coders that were measured."""
    evaluated = (
        node.step.fields["run"]
        for name, node in opened.nodes.items()
        if node.step.command == "eval" and states[name].kind == "done"
    )
    return [one for run in evaluated for one in subjects_of(run, opened.folder.run(run))]


def _done(node: Node, state: State) -> Done:
    record = state.record
    return Done(
        step=node.name,
        command=record.command if record else node.step.command,
        digest=node.digest,
        state=state.kind,
        seconds=record.seconds if record else None,
        chosen=record.chosen if record and "chosen" in record else None,
    )


def write_result(opened: OpenedStudy, result: StudyResult) -> Sequence[Path]:
    """Write study.json and study.html into the folder of the study."""
    from bsc.study.page import write_study_page

    folder = opened.folder.path
    write_typed(folder / "study.json", result)
    write_study_page(result, folder / "study.html")
    return [folder / "study.json", folder / "study.html"]
