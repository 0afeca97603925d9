"""`bsc interp` and `bsc export` on a trained and evaluated run, and what is made of them."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bsc.cli import main
from bsc.errors import UserError
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.evidence import gather
from bsc.eval.interp.material import Materials
from bsc.eval.report.export import write_figures
from bsc.eval.report.report import render_report
from bsc.records import write_record
from bsc.train.run import Run
from tests.eval.interp.command import SMALL, main_ok
from tests.eval.interp.scripted import Scripted, loopback, rule
from tests.raw import raw

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def scored(
    evaluated: Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, Scripted]]:
    """The run of the tests, scored by a scripted judge over the wire."""
    folder = tmp_path_factory.mktemp("scored") / "small"
    run = Run(Path(shutil.copytree(evaluated.folder, folder)))
    with loopback(Scripted(rule)) as script:
        script.answer = lambda kind, messages: (
            json.dumps({"explanation": HOSTILE}) if kind == "explain" else rule(kind, messages)
        )
        main_ok("interp", run.folder, "--judge", script.url, *SMALL)
        yield run, script


def test_it_scores_every_coder(scored: tuple[Run, Scripted]) -> None:
    run, script = scored
    folder = run.interp_folder / "simulated-loopback"
    result = json.loads((folder / "interp.json").read_text())
    assert set(result["coders"]) == set(raw(run.eval_path)["coders"])
    tests = [t for c in result["coders"].values() for t in c["tests"].values()]
    assert any(t["unweighted"]["mean"] is not None for t in tests)
    assert result["judge"]["simulated"] and result["judge"]["known_answers_right"] == "4 of 4"
    assert len(script.questions()) == result["usage"]["requests"]
    offline = json.loads((run.interp_folder / "offline" / "offline.json").read_text())
    assert set(offline["coders"]) == set(result["coders"])


def test_scores_are_in_the_report_with_their_evidence(scored: tuple[Run, Scripted]) -> None:
    run, _ = scored
    page = render_report([run])
    assert "Simulated judge" in page.split("</header>")[0]
    section = page.split('<section id="interp">')[1].split("</section>")[0]
    for word in ("detection", "fuzzing", "intruder", "predictability", "overlap", "The judge:"):
        assert word in section
    assert ">Simulated judge simulated-loopback</h3>" in section
    assert HOSTILE not in page and "&lt;script&gt;alert(1)" in section
    assert page == render_report([run])
    assert len(page) < 5_000_000


def test_a_report_of_a_run_without_scores_says_how_to_get_them(evaluated: Run) -> None:
    assert "bsc interp RUN" in render_report([evaluated])


def test_scores_can_order_the_bins_of_an_ablation(scored: tuple[Run, Scripted]) -> None:
    from bsc.eval.figures.scores import read_scores

    run, _ = scored
    widths = {c["name"]: c["coder"]["n_latents"] for c in raw(run.config_path)["coders"]}
    found = read_scores(str(run.interp_folder / "offline" / "scores-predictability.csv"), widths)
    assert found is not None
    assert sum(int(np.isfinite(v).sum()) for v in found.values()) > 10


def test_a_dry_run_asks_nothing(evaluated_copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with loopback(Scripted(rule)) as script:
        main_ok("interp", evaluated_copy.folder, "--judge", script.url, "--dry-run", *SMALL,
                "--price-in", "0.15", "--price-out", "0.6")  # fmt: skip
        assert script.bodies == []
    said = capsys.readouterr().out
    assert "detection" in said and "price:" in said and "hours:" in said
    assert not (evaluated_copy.interp_folder / "offline").exists()


def test_named_latents_do_not_replace_a_sample(scored: tuple[Run, Scripted]) -> None:
    run, script = scored
    path = run.interp_folder / "simulated-loopback" / "interp.json"
    offline = run.interp_folder / "offline" / "offline.json"
    before = path.read_bytes(), offline.read_bytes()
    latents = [json.loads(x)["latent"] for x in path.with_name("latents.jsonl").open()][:2]
    main_ok("interp", run.folder, "--judge", script.url, *SMALL, "--coders", run.coder_names()[0],
            "--latent", latents[0], "--latent", latents[1])  # fmt: skip
    assert (
        path.read_bytes(),
        (run.interp_folder / "offline" / "offline.json").read_bytes(),
    ) == before
    found = json.loads(
        (run.interp_folder / "simulated-loopback+latents" / "interp.json").read_text()
    )
    assert found["coders"][run.coder_names()[0]]["latents"] == len(set(latents))


def test_figures_for_a_paper_have_the_scores(scored: tuple[Run, Scripted], tmp_path: Path) -> None:
    run, _ = scored
    folder = write_figures([run], tmp_path / "figures")
    with (folder / "interp.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["judge"] for r in rows} >= {"simulated-loopback", "offline"}
    assert {r["score"] for r in rows} >= {"detection", "fuzzing", "intruder", "predictability"}
    assert {r["latents_are"] for r in rows} == {"unweighted", "weighted"}
    assert {p.suffix for p in folder.glob("interp-0-0*")} == {".svg", ".pdf"}


def chosen(run: Run, *wanted: str) -> list[str]:
    return Materials(run, InterpConfig(coders=wanted), store=None, model=None).names


def test_coders_are_scored_in_the_order_of_the_sweep(evaluated: Run) -> None:
    names = evaluated.coder_names()
    assert chosen(evaluated, names[5], names[1]) == [names[1], names[5]]
    assert chosen(evaluated, "*-binary-*") == [name for name in names if "-binary-" in name]


def test_coders_that_were_left_out_of_the_evaluation_are_not_scored(evaluated_copy: Run) -> None:
    gone, *others = evaluated_copy.coder_names()
    found = raw(evaluated_copy.eval_path)
    del found["coders"][gone]
    write_record(evaluated_copy.eval_path, found)
    assert chosen(evaluated_copy) == chosen(evaluated_copy, "*") == others
    with pytest.raises(UserError, match=f"{gone} was left out of the evaluation"):
        chosen(evaluated_copy, others[0], gone)


def test_coders_can_be_scored_one_by_one(scored: tuple[Run, Scripted], evaluated_copy: Run) -> None:
    """What is there of the others stays, and in the end it is the same."""
    run, script = scored
    names = run.coder_names()[:3]
    for name in names:
        main_ok("interp", evaluated_copy.folder, "--judge", script.url, *SMALL, "--coders", name)
    one, other = (r.interp_folder / "simulated-loopback" for r in (run, evaluated_copy))
    whole, parts = (json.loads((f / "interp.json").read_text())["coders"] for f in (one, other))
    assert {n: whole[n] for n in names} == parts
    lines = [(f / "latents.jsonl").read_text().splitlines() for f in (one, other)]
    assert set(lines[1]) == {x for x in lines[0] if json.loads(x)["coder"] in names}
    # One of them with other tests: the others stay, and what no coder has is gone.
    main_ok("interp", evaluated_copy.folder, "--judge", script.url, *SMALL, "--coders", names[0],
            "--test", "detection")  # fmt: skip
    found = json.loads((other / "interp.json").read_text())
    assert list(found["coders"]) == names and list(found["coders"][names[0]]["tests"]) == [
        "detection"
    ]
    assert found["coders"][names[1]] == whole[names[1]]
    assert any("different settings: tests" in flag for flag in found["flags"])
    assert names[0] not in (other / "scores-fuzzing.csv").read_text()
    offline = json.loads((evaluated_copy.interp_folder / "offline" / "offline.json").read_text())
    assert set(offline["coders"]) == set(names)
    assert "detection" in render_report([evaluated_copy])


MISTAKES = [
    (["interp", "{run}", "--judge", "http://127.0.0.1:9/v1"], "no answer"),
    (["interp", "{run}", "--judge", "./no-such-folder"], "--judge ./no-such-folder: no such"),
    (["interp", "{run}", "--judge", "127.0.0.1:8000/v1"], "A URL begins with http://"),
    (["interp", "{run}", "--judge", "vlm"], "did you mean 'vllm'"),
    (["interp", "{run}", "--judge-model", "x"], "there is no judge; name one with --judge"),
    (["interp", "{run}", "--dry-run", "--export", "x.jsonl"], "--dry-run and --export"),
    (["interp", "{run}", "--latent", "64"], "no latent 64; they are 0 to 63"),
    (["interp", "{run}", "--coders", "nope"], "no coder 'nope'"),
    (["interp", "{run}", "--test", "detektion"], "detektion"),
    (["interp", "{run}", "--marks", "some"], "marks"),
    (["interp", "{run}", "--budget", "5"], "needs the prices"),
    (["interp", "{run}", "--judge", "demo", "--judge-model", "x"], "only an endpoint has several"),
    (["interp", "{run}", "--export", "x.jsonl"], "name the judge with --judge-model"),
    (["interp", "{run}", "--judge", "demo", "--import", "x.jsonl"], "give one of them"),
    (["interp", "{run}", "--import", "no.jsonl", "--judge-model", "m"], "cannot be read"),
    (["interp", "{run}", "--store", "/nowhere"], "nowhere"),
    (["interp", "/nowhere"], "no such run"),
    (["export", "{run}", "nope", "--format", "delphi", "--out", "x"], "no coder 'nope'"),
    (["export", "{run}", "{coder}", "--format", "delphi", "--out", "{run}"], "not empty"),
    (["export", "{run}", "{coder}", "--format", "delfi", "--out", "x"], "did you mean 'delphi'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_gets_one_clear_message(
    evaluated_copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = evaluated_copy
    before = {p: p.stat().st_size for p in run.folder.rglob("*") if p.is_file()}
    filled = [a.format(run=run.folder, coder=run.coder_names()[0]) for a in arguments]
    with pytest.raises(SystemExit) as done:
        main(filled)
    said = capsys.readouterr().err
    assert done.value.code == 2 and "Traceback" not in said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert message in error
    after = {
        p: p.stat().st_size
        for p in run.folder.rglob("*")
        if p.is_file() and "offline" not in p.parts and p.name not in ("ledger.jsonl", ".lock")
    }
    assert after == before


def test_a_run_that_is_not_evaluated_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["interp", str(run.folder)])
    assert "not evaluated yet" in capsys.readouterr().err


def test_the_store_that_is_gone(evaluated_copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(
        evaluated_copy.config_path, raw(evaluated_copy.config_path) | {"store": "/gone/acts"}
    )
    with pytest.raises(SystemExit) as done:
        main(["interp", str(evaluated_copy.folder)])
    assert done.value.code == 2 and "not there any more" in capsys.readouterr().err


# exports


COLUMNS = {
    "model": ("id creatorId layers neuronsPerLayer owner", "displayNameShort displayName instruct "
              "createdAt"),
    "release": ("name description creatorName creatorId", "descriptionShort urls creatorNameShort "
                "createdAt"),
    "sourceset": ("modelId name description creatorName creatorId", "releaseName visibility type "
                  "urls createdAt"),
    "source": ("id modelId setName creatorId", "visibility num_prompts num_tokens_in_prompt "
               "dataset hfRepoId hfFolderId createdAt"),
    "features": ("modelId layer index", "sourceSetName maxActApprox frac_nonzero hasVector vector "
                 "hookName neg_str neg_values pos_str pos_values creatorId createdAt"),
    "activations": ("id modelId layer index tokens values maxValue maxValueTokenIndex minValue "
                    "creatorId", "binMin binMax binContains qualifyingTokenIndex dfaValues "
                    "lossValues createdAt"),
    "explanations": ("id modelId layer index description authorId", "notes createdAt"),
}  # fmt: skip
"""Of Neuronpedia's tables: columns without a default, and others of theirs that are written."""


def test_neuronpedias_lines(scored: tuple[Run, Scripted], tmp_path: Path) -> None:
    run, _ = scored
    name = run.coder_names()[0]
    explained = run.interp_folder / "simulated-loopback" / "latents.jsonl"
    main_ok("export", run.folder, name, "--format", "neuronpedia", "--out", tmp_path / "out",
            "--explanations", explained, "--creator", "me", "--hub", "me/coders")  # fmt: skip
    (source,) = (tmp_path / "out").glob("*/*")
    lines = {
        kind: [
            json.loads(x)
            for x in gzip.decompress((source / kind / "batch-0.jsonl.gz").read_bytes()).splitlines()
        ]
        for kind in ("features", "activations", "explanations")
    }
    for kind in ("model", "release", "sourceset", "source"):
        lines[kind] = [json.loads((source / f"{kind}.jsonl").read_text())]
    for kind, (required, others) in COLUMNS.items():
        for line in lines[kind]:
            assert set(required.split()) <= set(line) <= {*required.split(), *others.split()}, kind
            assert all(line[name] not in (None, "") for name in required.split())
            assert line.get("creatorId", "me") == "me" == line.get("authorId", "me")
    (model,), (of_hub,) = lines["model"], lines["source"]
    assert re.fullmatch("[a-z0-9_-]+", model["id"]) and model["layers"] == 3
    assert (of_hub["hfRepoId"], of_hub["hfFolderId"]) == ("me/coders", f"coders/{name}")
    assert {json.loads(one["notes"])["by"] for one in lines["explanations"]} == {
        "simulated-loopback"
    }
    assert len(lines["features"]) == 64
    assert [f["index"] for f in lines["features"]] == [str(i) for i in range(64)]
    for one in lines["activations"]:
        assert len(one["tokens"]) == len(one["values"])
        assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"] == max(one["values"])
        assert one["values"][one["qualifyingTokenIndex"]] > 0 and one["layer"] == source.name
    assert lines["explanations"] and all(e["description"] for e in lines["explanations"])
    assert (source / "source.jsonl").read_text().count("\n") == 1


def test_training_on_removes_scores_and_keeps_what_was_paid(scored: tuple[Run, Scripted],
                                                           tmp_path: Path) -> None:  # fmt: skip
    run = Run(Path(shutil.copytree(scored[0].folder, tmp_path / "run")))
    ledger = (run.interp_folder / "ledger.jsonl").read_bytes()
    run.remove_figures()
    assert [p.name for p in run.interp_folder.iterdir()] == ["ledger.jsonl"]
    assert (run.interp_folder / "ledger.jsonl").read_bytes() == ledger
    assert not run.eval_path.exists() and not run.eval_folder.exists()


def test_evidence_of_a_real_store_is_on_three_sides(evaluated: Run) -> None:
    materials = Materials(evaluated, InterpConfig(min_firings=4), store=None, model=None)
    seen = 0
    for material in materials:
        for latent in material.chosen.latents():
            row, value = material.code.of(latent)
            found = gather(material.texts, latent, row.astype(np.int64), value, explain=8, test=8)
            sides = [
                {int(material.texts.doc_id[w.start]) for w in excerpts}
                for excerpts in (found.explain, found.firing + found.firing_token,
                                found.silent + found.silent_token)
            ]  # fmt: skip
            assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
            seen += bool(sides[2])
    assert seen > 10
