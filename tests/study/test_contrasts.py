"""Which coder stands beside which, and what comes of it: on figures that are given."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsc.errors import ConfigError
from bsc.study.config import Claim, Contrast
from bsc.study.contrasts import cells_of
from bsc.study.estimates import Sums
from bsc.study.measures import Measures
from bsc.study.results import claim_result, rule_of
from bsc.study.subjects import Subject
from bsc.train.run import Run

SEEDS = (0, 1, 2)
KS = (8, 16, 32)


def subjects() -> list[Subject]:
    found = []
    grid = itertools.product(("sae", "skip_transcoder"), ("binary", "continuous"), KS, SEEDS)
    for site, code, k, seed in grid:
        name = f"{site}-{code}-k{k}-s{seed}"
        fields = {
            "run": "main", "name": name, "hookpoint": "layers.3.mlp", "site": site, "code": code,
            "k": k, "n_latents": 64, "seed": seed, "lr": 0.01, "group": None,
        }  # fmt: skip
        found.append(Subject(Run(Path("main")), name, fields))
    return found


class Given(Measures):
    """Figures by a rule: FVU of binary coders is 1 + seed / 10 more; their L0 is less than k."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        self.without = without

    def sums(self, subject: Subject, contrast: Contrast) -> Sums | None:
        if subject.name in self.without:
            return None
        f: Any = subject.fields
        binary = f["code"] == "binary"
        values = {
            "fvu": 10 - math.log2(f["k"]) + (1 + f["seed"] / 10) * binary,
            "l0": f["k"] * (0.75 if binary else 1.0),
            "dead": 0.0,
        }
        return Sums(np.array([values[contrast.figure]]), np.ones(1))


def contrast(**fields: Any) -> Contrast:
    given: dict[str, Any] = {
        "figure": "fvu", "coders": {"code": "binary"}, "against": {"code": "continuous"}
    }  # fmt: skip
    return Contrast.model_validate(given | fields)


def test_coders_of_one_site_k_and_seed_stand_beside_each_other() -> None:
    cells = cells_of(contrast(each=("site", "k")), subjects(), Given(), "claim")
    assert [(c.where["site"], c.where["k"]) for c in cells] == [
        (site, k) for site in ("sae", "skip_transcoder") for k in KS
    ]
    for cell in cells:
        assert cell.estimate is not None
        assert cell.estimate.mean == pytest.approx(1.1)
        assert cell.estimate.error == pytest.approx(0.1 / math.sqrt(3))
        assert (cell.pairs, len(cell.names)) == (1, 3)
        for first, against in cell.names:
            assert first.replace("binary", "continuous") == against


def test_without_each_all_pairs_of_a_seed_are_one_mean() -> None:
    (cell,) = cells_of(contrast(), subjects(), Given(), "claim")
    assert cell.pairs == 6
    assert cell.estimate is not None
    assert cell.estimate.mean == pytest.approx(1.1)
    assert cell.estimate.seeds == 3


def test_a_figure_by_itself() -> None:
    (cell,) = cells_of(
        contrast(coders={"code": "continuous", "k": 8}, against=None), subjects(), Given(), "claim"
    )
    assert cell.estimate is not None and cell.against is None
    assert cell.estimate.mean == pytest.approx(7)


def test_at_equal_l0_it_is_interpolated_over_the_logarithm() -> None:
    cells = cells_of(contrast(equal="l0", each=("k",)), subjects(), Given(), "claim")
    by_k = {c.where["k"]: c for c in cells}
    # The L0 of binary coders is 0.75 k; below the smallest k there is nothing to stand beside.
    assert by_k[8].estimate is None and (by_k[8].outside, by_k[8].left_out) == (2, 0)
    for k in (16, 32):
        made = by_k[k].estimate
        assert made is not None
        # FVU of a continuous coder of L0 x is 10 - log2(x).
        assert made.mean == pytest.approx(1.1 - math.log2(k) + math.log2(0.75 * k))


def test_a_pair_without_a_figure_in_one_seed_is_left_out_in_all() -> None:
    (cell,) = cells_of(contrast(), subjects(), Given(without=("sae-binary-k8-s1",)), "claim")
    assert (cell.pairs, cell.left_out) == (5, 1)
    assert not any("sae-binary-k8" in first for first, _ in cell.names)


def test_a_coder_without_a_partner_is_counted_and_decides_nothing() -> None:
    claim = a_claim(against={"code": "continuous", "k": [8, 16]}, match=["site", "k", "seed"],
                    each=["k"], above=0)  # fmt: skip
    result = claim_result(claim, subjects(), Given())
    by_k = {c.where["k"]: c for c in result.parts[0].cells}
    assert by_k["32"].value is None and by_k["32"].left_out == 2
    assert by_k["8"].value is not None
    assert result.verdict == "not decided"
    # One cell elsewhere is enough to say that a claim on all of them does not hold.
    assert claim_result(a_claim(below=0, each=["k"]), subjects(), Given()).verdict == (
        "does not hold"
    )


def test_a_mean_that_lacks_a_coder_of_one_seed_decides_nothing() -> None:
    without = Given(without=("sae-binary-k8-s1",))
    assert claim_result(a_claim(above=0.5), subjects(), without).verdict == "not decided"
    some = a_claim(above=0.5, some=True)
    assert claim_result(some, subjects(), without).verdict == "holds"
    assert claim_result(a_claim(below=0.5, some=True), subjects(), without).verdict == (
        "not decided"
    )


def test_several_coders_of_one_k_are_no_line_to_interpolate_on() -> None:
    two = [*subjects(), *(s._replace(fields={**s.fields, "lr": 0.1}) for s in subjects())]
    with pytest.raises(ConfigError, match="against: 2 coders could stand in one place"):
        cells_of(contrast(coders={"code": "binary", "lr": 0.1}, equal="l0"), two, Given(), "c")


def test_a_claim_that_waits_says_for_what() -> None:
    result = claim_result(a_claim(above=0), subjects(), Given(), ["figures", "scores"])
    assert (result.verdict, result.why) == ("not measured", "figures, scores are not done")
    assert not result.parts


def test_what_cannot_be_decided_says_why_and_leaves_the_others_alone() -> None:
    result = claim_result(a_claim(figure="dead", ratio=True, above=1), subjects(), Given())
    assert result.verdict == "not decided"
    assert "numbers that can be 0" in result.why


def test_nothing_left_is_not_decided() -> None:
    every = tuple(s.name for s in subjects() if s.fields["code"] == "binary")
    claim = Claim.model_validate(
        {"id": "a", "words": "w", "figure": "fvu", "coders": {"code": "binary"},
         "against": {"code": "continuous"}, "above": 0}
    )  # fmt: skip
    result = claim_result(claim, subjects(), Given(without=every))
    assert result.verdict == "not decided"
    assert result.parts[0].cells[0].value is None


def test_what_is_not_clear_is_refused() -> None:
    two = [*subjects(), *(s._replace(fields={**s.fields, "lr": 0.1}) for s in subjects())]
    with pytest.raises(ConfigError, match=r"2 coders could stand in one place.*differ in lr"):
        cells_of(contrast(coders={"code": "binary", "lr": 0.1}), two, Given(), "claim a")
    with pytest.raises(ConfigError, match=r"claim a: coders: coders have no field 'cod' \(did"):
        cells_of(contrast(coders={"cod": "binary"}), subjects(), Given(), "claim a")
    with pytest.raises(ConfigError, match=r"no coder is code = hybrid\. Of the study's coders"):
        cells_of(contrast(coders={"code": "hybrid"}), subjects(), Given(), "claim a")
    with pytest.raises(ConfigError, match="no coder has one to stand beside"):
        cells_of(
            contrast(coders={"code": "binary"}, against={"code": "continuous"}, match=("name",)),
            subjects(), Given(), "claim a",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="the ratio of dead is of numbers that can be 0"):
        cells_of(contrast(figure="dead", ratio=True), subjects(), Given(), "claim a")


def a_claim(**fields: Any) -> Claim:
    given = {"id": "a", "words": "w", "figure": "fvu", "coders": {"code": "binary"},
             "against": {"code": "continuous"}, "each": ["site"]}  # fmt: skip
    return Claim.model_validate(given | fields)


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [({"above": 0.5}, "holds"), ({"below": 0.5}, "does not hold"), ({"above": 1.1}, "not decided"),
     ({}, "shown")],
)  # fmt: skip
def test_the_verdict_of_a_claim(bound: dict[str, float], verdict: str) -> None:
    at_8 = {"words": "k 8", "coders": {"k": 8}, "match": ["site", "seed"], "against": {"k": 8}}
    claim = a_claim(**bound, variants=[at_8])
    result = claim_result(claim, subjects(), Given())
    assert result.verdict == verdict
    (part,) = result.parts
    assert [v.verdict for v in part.variants] == [verdict]
    assert [c.pairs for c in part.cells] == [3, 3]
    assert [c.pairs for c in part.variants[0].cells] == [1, 1]


def test_the_rule_depends_on_the_claim_alone() -> None:
    rule = rule_of(a_claim(above=0.5))
    assert "is above 0.5 for each site" in rule
    assert "fvu: code = binary less code = continuous" in rule
