"""`bsc study --figures`: every plot as SVG and PDF, every estimate as a line of a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bsc.errors import UserError
from bsc.files import csv_text, write_atomically
from bsc.study.plots import drawable, forest_of
from bsc.study.results import ClaimResult, PartResult, Shown, StudyResult, VariantResult

__all__ = ["estimates_table", "write_figures"]


def estimates_table(result: StudyResult) -> list[dict[str, Any]]:
    """One line for every estimate of a study, those of its variants too."""
    return [
        line
        for claim in result.claims
        for number, part in enumerate(claim.parts, 1)
        for line in _lines(claim, number, part)
    ]


def _lines(claim: ClaimResult, number: int, part: PartResult) -> Iterator[dict[str, Any]]:
    ways: list[PartResult | VariantResult] = [part, *part.variants]
    for way in ways:
        variant = "" if isinstance(way, PartResult) else way.words
        for cell in way.cells:
            yield {
                "claim": claim.id,
                "claim_verdict": claim.verdict,
                "part": number,
                "words": part.words,
                "variant": variant,
                "contrast": way.contrast,
                "figure": way.figure,
                "weighted": way.weighted,
                "ratio": way.ratio,
                "bound": way.bound,
                "verdict": way.verdict,
            } | _numbers(cell)


def _numbers(cell: Shown) -> dict[str, Any]:
    low, high = cell.interval or (None, None)
    return {
        "value": cell.value,
        "low": low,
        "high": high,
        "first": cell.first,
        "against": cell.against,
        "decides": cell.decides,
        "seeds": cell.seeds,
        "units": cell.units,
        "error_seeds": cell.error_seeds,
        "error_units": cell.error_units,
        "pairs": cell.pairs,
        "left_out": cell.left_out,
        "outside": cell.outside,
    } | cell.where


def write_figures(result: StudyResult, folder: Path) -> Path:
    """Write a plot of each contrast as SVG and PDF, and estimates.csv, into a folder, which is made
    if need be.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for claim in result.claims:
            for number, part in enumerate(claim.parts, 1):
                if drawable(part):
                    forest_of(claim, number).save(folder)
        write_atomically(folder / "estimates.csv", csv_text(estimates_table(result)))
    except OSError as error:
        raise UserError(f"--figures {folder}: cannot be written ({error.strerror}).") from None
    return folder
