"""Which steps a claim waits for, and what `--only` of a claim runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bsc.study import study as study_module
from bsc.study.config import Claim, StudyStep
from bsc.study.folder import StudyFolder
from bsc.study.graph import Node
from bsc.study.needs import steps_of
from bsc.study.study import decided, open_study
from bsc.study.work import State

ROOT = Path(__file__).parents[2]


def step(name: str, command: Any, **fields: Any) -> StudyStep:
    return StudyStep(name=name, command=command, fields=fields)


STEPS = {
    s.name: s
    for s in (
        step("x", "train", store="a"),
        step("y", "train", store="a"),
        step("ex", "eval", run="x"),
        step("ey", "eval", run="y"),
        step("judged", "interp", run="ex", judge="vllm"),
        step("shuffled", "interp", run="ex", judge="vllm", explanations="shuffled"),
        step("scored", "interp", run="ex"),
        step("judged_y", "interp", run="ey", judge="vllm"),
    )
}


def claim(**given: Any) -> Claim:
    return Claim.model_validate({"id": "c", "words": "w", "coders": {"run": "x"}} | given)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"figure": "fvu"}, ["ex"]),
        ({"figure": "spike"}, ["ex"]),
        ({"figure": "fvu", "coders": {"code": "binary"}}, ["ex", "ey"]),
        ({"figure": "fvu", "coders": {"run": ["y", "x"]}}, ["ex", "ey"]),
        ({"figure": "fvu", "against": {"run": "y"}}, ["ex", "ey"]),
        ({"figure": "fvu", "against": {"code": "binary"}}, ["ex", "ey"]),
        # Scores without a judge come of a step without one, where there is one.
        ({"figure": "predictability"}, ["ex", "scored"]),
        ({"figure": "overlap", "coders": {"run": "y"}}, ["ey", "judged_y"]),
        ({"figure": "judge:fuzzing"}, ["ex", "judged", "shuffled"]),
        ({"figure": "judge:fuzzing", "judge": "judged"}, ["ex", "judged"]),
        ({"figure": "judge:fuzzing", "judge": "judged", "against": {"run": "x"},
          "against_judge": "shuffled"}, ["ex", "judged", "shuffled"]),
        ({"figure": "fvu", "against": {"run": "y"}, "against_figure": "predictability"},
         ["ex", "ey", "judged_y"]),
        ({"figure": "fvu", "variants": [{"words": "v", "figure": "predictability"}]},
         ["ex", "scored"]),
    ],
)  # fmt: skip
def test_a_claim_needs_what_measures_its_figures(
    given: Mapping[str, Any], needed: list[str]
) -> None:
    assert steps_of(claim(**given), STEPS) == needed


def test_only_a_claim_runs_what_it_needs() -> None:
    opened = open_study(ROOT / "studies" / "binary.toml", "demo", only=["C6"])
    assert list(opened.wanted) == ["acts", "tuning", "step", "arms", "arms_figures"]


def test_a_step_and_a_claim_of_one_name_are_both_meant(study_file: Path) -> None:
    study_file.write_text(study_file.read_text().replace('id = "lr"', 'id = "acts"'))
    assert list(open_study(study_file, only=["acts"]).wanted) == ["acts", "sweep", "figures"]


def test_a_claim_waits_for_its_own_steps_alone(
    tmp_path: Path, study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = '[interp.scores]\nrun = "figures"\n'
    other = '[[claims]]\nid = "p"\nwords = "w"\nfigure = "predictability"\ncoders = { lr = 1e-2 }\n'
    study_file.write_text(study_file.read_text().replace("[[claims]]", more + "[[claims]]") + other)
    opened = open_study(study_file, out=tmp_path / "out")

    def states(folder: StudyFolder, nodes: dict[str, Node]) -> dict[str, State]:
        return {name: State("waits" if name == "scores" else "done") for name in nodes}

    monkeypatch.setattr(study_module, "states_of", states)
    monkeypatch.setattr(study_module, "subjects_of", lambda step, run: [])
    by_id = {c.id: c for c in decided(opened).claims}
    assert (by_id["p"].verdict, by_id["p"].why) == ("not measured", "scores is not done")
    # Not waiting, though it has no coders here.
    assert by_id["lr"].verdict == "not decided" and "no field" in by_id["lr"].why
