"""That every figure of a study is defined where it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsc.study import measures
from bsc.study.config import read_study
from bsc.study.definitions import definition_of, definitions_of
from bsc.study.page import render_study
from tests.study.made_results import HOSTILE, claim, part, result

PAPER = Path(__file__).parents[2] / "studies" / "binary.toml"
UNDEFINED = definition_of("no such figure")


@pytest.mark.parametrize(
    "name",
    [*measures._DOCUMENTS, *measures._LATENTS, *measures._TRAINING, *measures._WITH_WORDS,
     *measures._OTHERS],
)  # fmt: skip
def test_every_figure_with_a_name_of_its_own_is_defined(name: str) -> None:
    assert definition_of(name) != UNDEFINED
    assert definition_of(f"{name}:x") != UNDEFINED


def test_those_of_the_study_of_the_paper_are() -> None:
    found = definitions_of(read_study(PAPER, "demo").claims)
    assert {"fvu", "fvu_values_removed", "predictability", "spike"} <= set(found)
    assert UNDEFINED not in found.values()
    assert not any("{" in words for words in found.values())


def test_the_page_has_them() -> None:
    without = result(claim("C", "holds", part()))
    shown = without.model_copy(
        update={
            "figures": {
                "fvu": definition_of("fvu"),
                f"ultra:{HOSTILE}": definition_of(f"ultra:{HOSTILE}"),
            }
        }
    )
    page = render_study(shown)
    assert "<code>fvu</code></dt><dd>Fraction of variance unexplained" in page
    assert "<script>" not in page and 'href="#figures"' in page
    assert 'href="#figures"' not in render_study(without)
