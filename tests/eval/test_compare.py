from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.eval.compare import compare_runs
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.report.coders import by_panel, read_coders
from bsc.eval.report.report import render_report
from bsc.study.config import Contrast
from bsc.study.measures import Measures
from bsc.study.subjects import subjects_of
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.eval.interp.command import main_ok
from tests.raw import raw

CODER = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 32}
FAST = EvalConfig(ce_tokens=512, ablation_bins=0, ultra_ablations=0, probes=())


@pytest.fixture(scope="module")
def seeds(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path_factory.mktemp("seeds"), tokens=6_000, batch_rows=256,
            coders=(CODER | {"code": ["binary", "continuous"], "seed": [0, 1]},),
        )
    )  # fmt: skip
    evaluate(run, FAST)
    return run


def test_a_run_with_itself_differs_in_nothing(evaluated: Run, evaluated_copy: Run) -> None:
    found = compare_runs(evaluated, evaluated_copy)
    assert found["paired"] and len(found["coders"]) == 8
    for entry in found["coders"]:
        assert entry["first"] == entry["second"]
        for figure in ("fvu", "delta_ce"):
            assert entry[figure]["difference"] == 0 and entry[figure]["interval"] == [0.0, 0.0]
        assert entry["latents"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["means"] == []  # one seed of each


def test_runs_on_other_rows_are_said_to_be(
    seeds: Run, store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of tokens that one of them was trained without are in the figures of the other alone."""
    other, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, tokens=6_000, batch_rows=256,
            coders=(CODER | {"code": "binary"},), without_special_tokens=True,
        )
    )  # fmt: skip
    evaluate(other, FAST)
    assert compare_runs(seeds, seeds)["same_rows"] is True
    found = compare_runs(seeds, other)
    assert found["paired"] is found["same_rows"] is False
    assert found["coders"][0]["fvu"].get("interval") is None
    main_ok("compare", seeds.folder, other.folder)
    assert "Not on the same rows" in capsys.readouterr().out
    words = "Not all of these were measured on the same rows"
    both = render_report([seeds, other])
    assert words in both and words not in render_report([seeds])
    panels = by_panel(read_coders([seeds, other]))
    assert len(panels) == 2 and all("rows of" in panel for panel in panels)
    assert all(len({row.run for row in rows}) == 1 for rows in panels.values())
    assert all("rows of" not in panel for panel in by_panel(read_coders([seeds])))
    measures, units = Measures(), {}
    fewer = Run(Path(shutil.copytree(seeds.folder, tmp_path / "fewer")))
    evaluate(fewer, FAST.but(rows=100))
    evaluate(seeds, FAST.but(rows=10**9))  # as all of them
    assert compare_runs(seeds, fewer)["same_rows"] is False
    assert compare_runs(seeds, fewer)["paired"] is True  # losses
    for figure in ("fvu", "delta_ce", "kl"):
        contrast = Contrast(figure=figure, coders={})
        runs = (seeds, other, fewer)
        sums = [measures.sums(s, contrast) for r in runs for s in subjects_of("x", r)]
        units[figure] = {s.units for s in sums if s is not None}
    assert {figure: len(of) for figure, of in units.items()} == {"fvu": 3, "delta_ce": 2, "kl": 2}


def test_seeds_of_one_run_are_compared(seeds: Run) -> None:
    evaluation = raw(seeds.eval_path)
    assert sorted(s["differs"] for s in evaluation["stability"]) == ["code", "code", "seed", "seed"]
    found = compare_runs(seeds, seeds)
    assert [e["first"][-2:] + e["second"][-2:] for e in found["coders"]] == ["s0s1", "s0s1"]
    for entry in found["coders"]:
        f, g = (evaluation["coders"][entry[k]] for k in ("first", "second"))
        assert entry["fvu"]["difference"] == g["fvu"] - f["fvu"]
        low, high = entry["fvu"]["interval"]
        assert low <= entry["fvu"]["difference"] <= high
        # Paired by document, the difference is known better than either.
        assert high - low < f["fvu_interval"][1] - f["fvu_interval"][0]
        assert entry["latents"]["cosine"] > entry["latents"]["cosine_chance"]
    assert found["means"] == []  # in one run no seed is the first one


def test_means_over_seeds_are_of_coders_that_differ_in_nothing_else(
    seeds: Run, tmp_path: Path
) -> None:
    other = Run(Path(shutil.copytree(seeds.folder, tmp_path / "other")))
    found = compare_runs(seeds, other)
    assert [m["seeds"] for m in found["means"]] == [2, 2]
    assert found.means[0].fvu.to_json() == {"difference": 0.0, "interval": None}  # two seeds only


def test_on_the_command_line(
    seeds: Run, evaluated: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["compare", str(seeds.folder), str(seeds.folder)])
    assert not done.value.code
    assert "k4-s0 -> layers.2.mlp/" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(seeds.folder), str(seeds.folder), "--json"])
    assert json.loads(capsys.readouterr().out)["paired"] is True
    # One seed of each: nothing in one run to compare.
    with pytest.raises(UserError, match="differ in the seed alone are compared, and it has none"):
        compare_runs(evaluated, evaluated)


def test_a_run_that_is_not_evaluated_says_what_to_do(run: Run, evaluated: Run) -> None:
    with pytest.raises(StoreError, match=f"bsc eval {run.folder}"):
        compare_runs(evaluated, run)


def test_any_two_coders_of_a_hookpoint_are_a_pair(
    evaluated: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (evaluated.full_name(f"skip_transcoder-{c}-k8") for c in ("binary", "continuous"))
    found = compare_runs(
        evaluated, evaluated, ["skip_transcoder-binary-k8=transcoder-continuous-k8"]
    )
    (entry,) = found["coders"]
    assert (entry["first"], entry["second"]) == (a, b)
    figures = raw(evaluated.eval_path)["coders"]
    assert entry["fvu"]["difference"] == figures[b]["fvu"] - figures[a]["fvu"]
    assert entry["fvu"]["interval"] and found["means"] == []
    for pair, message in (
        ("k8", "should be FIRST=SECOND"),
        ("binary-k8=binary-k9", "no coder 'binary-k9'"),
        ("k8=binary-k8", "is not one coder"),
    ):
        with pytest.raises(UserError, match=message):
            compare_runs(evaluated, evaluated, [pair])
    folder = str(evaluated.folder)
    with pytest.raises(SystemExit) as done:
        main(["compare", folder, folder, "--pair", f"{a}={b}"])
    assert not done.value.code and f"{a} -> {b}" in capsys.readouterr().out
