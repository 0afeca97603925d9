"""A study: read, worked through, decided."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from bsc.errors import UserError
from bsc.study.config import Study, read_study
from bsc.study.folder import StudyFolder
from bsc.study.graph import Node, chosen_nodes, graph_of
from bsc.study.table import watched
from bsc.study.work import State, work

__all__ = ["OpenedStudy", "open_study", "run_study"]


class OpenedStudy(NamedTuple):
    """A study that was read and checked, and where it is."""

    file: Path
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
        only: names of steps; none: all.

    Raises:
        UserError: the file is not as it should be, or the folder cannot be one.
    """
    study = read_study(file, scale)
    nodes = graph_of(study, str(file))
    if not nodes:
        raise UserError(f"{file}: no steps. A study has at least [cache.NAME] and [train.NAME].")
    name = study.name if study.scale is None else f"{study.name}-{study.scale}"
    path = Path(name) if out is None else out
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: the folder of a study, but a file is there. Name another --out.")
    return OpenedStudy(file, study, nodes, chosen_nodes(nodes, only), StudyFolder(path, nodes))


def run_study(
    opened: OpenedStudy, launch: Sequence[str] = (), *, as_json: bool = False
) -> dict[str, State]:
    """Do the steps that are to be done."""
    with watched(opened.wanted, {}) as watch:
        return work(opened.folder, opened.wanted, launch, watch)
