"""Whole studies by the command line: a user's own, with kills; the paper's, in small."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

OWN = """
title = "Does the larger step leave less unexplained?"

[cache.acts]
model = "{model}"
text = ["stdlib"]
held_out = 0.2
hookpoints = ["layers.2.mlp"]
tokens = "12k"
held_out_tokens = 2048
context = 32

[train.sweep]
store = "acts"
batch_rows = 256
coders = [{{ code = "continuous", k = 4, n_latents = 64, lr = [1e-5, 1e-2], seed = [0, 1, 2] }}]

[eval.figures]
run = "sweep"
ce_tokens = 512
ablation_bins = 0
no_probe = true

[[claims]]
id = "lr"
words = "The larger step leaves less unexplained."
figure = "fvu"
coders = {{ lr = 1e-2 }}
against = {{ lr = 1e-5 }}
below = 0
"""


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bsc", "study", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with begin(folder, *arguments) as process:
        out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def verdicts(path: Path) -> Any:
    """What study.json says of the claims: no times, no digests."""
    return json.loads(path.read_text())["claims"]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (None, (), "no such file"),
        ("title = 3", (), "title"),
        ('title = "t"', (), "no steps"),
        (
            'title = "t"\n[cache.a]\nmodel = "demo"',
            ("--only", "b"),
            "--only b: no such step or claim",
        ),
        ('title = "t"\n[cache.a]\nmodel = "demo"', ("--scale", "b"), "has no such scale"),
        ('title = "t"\n[cache.a]\nmodel = "demo"', ("--out", "s.toml"), "a file is there"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, text: str | None, arguments: tuple[str, ...], words: str
) -> None:
    if text is not None:
        (tmp_path / "s.toml").write_text(text)
    done = study(tmp_path, "s.toml", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ([] if text is None else ["s.toml"])


@pytest.mark.slow
def test_a_users_own_study_killed_at_random_gives_the_same_verdicts(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "own.toml").write_text(OWN.format(model=tiny_model))
    whole = study(tmp_path, "own.toml", "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    expected = verdicts(tmp_path / "whole" / "study.json")
    assert expected[0]["verdict"] == "holds"
    assert "holds" in whole.stdout
    assert "<title>" in (tmp_path / "whole" / "study.html").read_text()

    rng = np.random.default_rng(0)
    kills = 0
    while True:
        process = begin(tmp_path, "own.toml", "--out", "killed")
        try:
            process.communicate(timeout=float(rng.uniform(4, 12)) if kills < 6 else 1800)
            break
        except subprocess.TimeoutExpired:
            if kills % 2:  # the study alone, so that its command goes on; or both
                os.kill(process.pid, signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert process.returncode == 0
    assert kills
    assert verdicts(tmp_path / "killed" / "study.json") == expected

    # All is there: nothing is done again.
    logs = {p: p.read_bytes() for p in (tmp_path / "whole" / "logs").iterdir()}
    again = study(tmp_path, "own.toml", "--out", "whole", "--json")
    assert json.loads(again.stdout)["claims"] == expected
    assert {p: p.read_bytes() for p in (tmp_path / "whole" / "logs").iterdir()} == logs


@pytest.mark.slow
def test_ctrl_c_stops_the_command_too_and_says_what_goes_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "own.toml").write_text(OWN.format(model=tiny_model))
    process = begin(tmp_path, "own.toml", "--out", "out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("logs/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    # Nobody holds the step any more.
    done = study(tmp_path, "own.toml", "--out", "out", "--only", "acts")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_step_that_fails_is_named_with_its_log(tmp_path: Path, tiny_model: Path) -> None:
    text = OWN.format(model=tiny_model).replace("layers.2.mlp", "layers.7.mlp")
    (tmp_path / "own.toml").write_text(text)
    done = study(tmp_path, "own.toml")
    assert done.returncode == 1
    assert "acts: failed: " in done.stderr and "layers.7.mlp" in done.stderr
    (log,) = (tmp_path / "own" / "logs").iterdir()
    assert str(log.relative_to(tmp_path)) in done.stderr
    (claim,) = verdicts(tmp_path / "own" / "study.json")
    assert claim["verdict"] == "not measured"
    assert "figures is not done" in claim["why"]


@pytest.mark.slow
def test_the_study_of_the_paper_goes_through_every_step_in_small(
    tmp_path: Path, tiny_model: Path
) -> None:
    text = (ROOT / "studies" / "binary.toml").read_text()
    text = text.replace('model = "demo"', f'model = "{tiny_model}"')
    text = text.replace("layers.1.mlp", "layers.0.mlp").replace("layers.3.mlp", "layers.2.mlp")
    text = text.replace(
        'model = "$model"', 'model = "$model"\ntext = ["stdlib"]\nheld_out = 0.2\ncontext = 32'
    )
    (tmp_path / "binary.toml").write_text(text)
    done = study(tmp_path, "binary.toml", "--scale", "tiny")
    assert done.returncode == 0, done.stderr
    claims = verdicts(tmp_path / "binary-tiny" / "study.json")
    assert {c["id"] for c in claims} >= {f"C{i}" for i in range(1, 10)}
    for claim in claims:
        bounds = [part["bound"] for part in claim["parts"] if part["bound"]]
        known = ("holds", "does not hold", "not decided") if bounds else ("shown",)
        assert claim["verdict"] in known, claim
        assert claim["rule"].startswith("Holds if " if bounds else "Nothing is claimed")
        assert all(part["cells"] for part in claim["parts"])
    steps = json.loads((tmp_path / "binary-tiny" / "study.json").read_text())["steps"]
    assert {s["state"] for s in steps} == {"done"}
    chosen = next(s["chosen"] for s in steps if s["step"] == "step")
    assert {(arm["group"], arm["site"], arm["code"]) for arm in chosen} >= {
        (None, "sae", "binary"), ("gumbel", "skip_transcoder", "binary")
    }  # fmt: skip
