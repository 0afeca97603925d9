"""What `bsc study --figures` writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bsc.errors import UserError
from bsc.study.export import write_figures
from tests.study.made_results import every_kind


def test_every_plot_and_every_estimate_is_written(tmp_path: Path) -> None:
    found = every_kind()
    folder = write_figures(found, tmp_path / "paper" / "figures")
    plots = {"less-1", "more-1", "open-1", "figures-1"}  # what has an estimate
    assert {p.name for p in folder.iterdir()} == {"estimates.csv"} | {
        f"forest-{name}.{form}" for name in plots for form in ("svg", "pdf")
    }
    with (folder / "estimates.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    cells = [
        cell
        for claim in found.claims
        for part in claim.parts
        for cell in (*part.cells, *(c for v in part.variants for c in v.cells))
    ]
    assert [line["value"] for line in lines] == [
        "" if c.value is None else str(c.value) for c in cells
    ]
    first = lines[0]
    assert (first["claim"], first["part"], first["variant"]) == ("less", "1", "")
    assert (first["verdict"], first["bound"], first["k"]) == ("holds", "below 0", "8")
    assert float(first["low"]) < float(first["value"]) < float(first["high"])
    assert [line["variant"] for line in lines[1:3]] == ["by the loss", "at equal bits \u6f22"]
    assert [line["figure"] for line in lines[:3]] == ["fvu", "delta_ce", "fvu"]


def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    once, twice = (write_figures(every_kind(), tmp_path / name) for name in ("a", "b"))
    for path in once.iterdir():
        assert path.read_bytes() == (twice / path.name).read_bytes(), path.name


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--figures .*file.*cannot be written"):
        write_figures(every_kind(), tmp_path / "file")
