"""Claims that no coder or figure of the study can decide are refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsc.errors import ConfigError
from bsc.study.amounts import reckon
from bsc.study.check import check_claims
from bsc.study.study import open_study

MISTAKES = [
    ("coders = { lr = 1e-2 }", "coders = { lrr = 1e-2 }", r"no field 'lrr' \(did you mean 'lr'"),
    ("coders = { lr = 1e-2 }", "coders = { lr = 3e-2 }", r"no coder is lr = 0\.03.*lr is 0\.001"),
    ("coders = { lr = 1e-2 }", 'coders = { k = "4" }', r"no coder is k = 4|k is 4"),
    ("coders = { lr = 1e-2 }", "coders = { k = 4 }", r"coders: 2 coders could stand in one place"),
    (
        "against = { lr = 1e-3 }",
        'against = { lr = 1e-3 }\nmatch = ["lr", "seed"]',
        "no coder has one to",
    ),
    ("against = { lr = 1e-3 }", 'against = { lr = 1e-3 }\neach = ["x"]', "no field 'x'"),
    ('figure = "fvu"', 'figure = "predictability"', r"sweep is not scored. Add a step: \[interp"),
    ('figure = "fvu"', 'figure = "judge:fuzzing"', "judge: should be a step of interp"),
    ('figure = "fvu"', 'figure = "probe"', r"\[eval.figures\] has no_probe"),
    ('figure = "fvu"', 'figure = "latents_above:0.3"', r"counted are 0\.01, 0\.1, 0\.5"),
    ("[eval.figures]", '[train.more]\nstore = "acts"\n[eval.figures]', None),
]


@pytest.mark.parametrize(("was", "now", "words"), MISTAKES)
def test_a_claim_that_cannot_be_decided(
    study_file: Path, was: str, now: str, words: str | None
) -> None:
    text = study_file.read_text()
    assert was in text
    study_file.write_text(text.replace(was, now, 1))
    opened = open_study(study_file)
    coders = reckon(opened).coders
    if words is None:
        check_claims(opened, coders)
        return
    with pytest.raises(ConfigError, match=words) as raised:
        check_claims(opened, coders)
    assert "\n" not in str(raised.value)
    assert "claim lr" in str(raised.value)


def test_a_run_that_is_not_measured_is_named(study_file: Path) -> None:
    text = study_file.read_text().replace("lr = 1e-2 }", 'lr = 1e-2, run = "more" }')
    study_file.write_text(
        text.replace("[eval.figures]", '[train.more]\nstore = "acts"\n[eval.figures]')
    )
    opened = open_study(study_file)
    with pytest.raises(ConfigError, match=r"run = 'more' is not measured. Add a step: \[eval.NAME"):
        check_claims(opened, reckon(opened).coders)


def test_what_is_chosen_on_the_way_is_not_looked_for(study_file: Path) -> None:
    text = study_file.read_text().replace('run = "sweep"', 'run = "main"')
    more = (
        '[choose.step]\nruns = "sweep"\nfield = "lr"\n[train.main]\nstore = "acts"\n'
        'chosen = "step"\ncoders = [{ k = 4, n_latents = 64, seed = [0, 1] }]\n[eval.figures]'
    )
    study_file.write_text(text.replace("[eval.figures]", more))
    opened = open_study(study_file)
    check_claims(opened, reckon(opened).coders)
