"""The command line: quick to start, and one clear message for every mistake."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bsc.cli import main
from bsc.files import canonical_json
from bsc.records import record_hash
from bsc.train.run import Run
from tests.cache.synthetic import change_capture
from tests.raw import raw


def bsc(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bsc", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=120,
    )  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, bsc.cli\n"
        "try: bsc.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'zarr', 'numpy', 'transformers', 'datasets', 'pydantic')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_import_test_can_fail() -> None:
    code = "import sys, bsc; bsc.SparseCoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True"


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of the command line, run in this process."""
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return int(done.value.code or 0), capsys.readouterr().err


MISTAKES = [
    (["cache", "--model", "./no-such-folder"], "no such folder"),
    (["cache", "--model", "demoo"], "demoo"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--hookpoints", "layers.9.mlp"],
     "matches no module of the model (did you mean 'layers.2.mlp'"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--hookpoints", "nonsense"],
     "Its modules begin with layers.0.mlp"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--store", "{store}"],
     "holds a store of another capture: context is 32, asked for is 64"),
    (["cache", "--model", "{tiny}", "--text", "{empty}"], "not one whole context"),
    (["cache", "--model", "{tiny}", "--text", "missing.txt"], "no such file"),
    (["cache", "--model", "{tiny}"], "has no default text"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--dataset", "a/b"], "exclude each other"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--context", "9999"],
     "contexts of 2 to 64"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--dtype", "int3"],
     "--dtype: should be 'auto'"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--tokens", "1000T"],
     "What would fit: --ring"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--tokens", "9" * 400],
     "is larger than 1,000T"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--max-non-finite", "-1"],
     "--max-non-finite: should be at least 0"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--max-non-finite", "2"],
     "--max-non-finite: should be at most 1"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--tokens", "many"], "is not a count"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--store", "/proc/acts"],
     "cannot be written"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--store", "{empty}/acts"], "is a file"),
    (["cache", "--model", "{tiny}", "--text", "stdlib", "--device", "gpu"], "--device gpu"),
    (["train", "--store", "{store}", "--device", "cuda:99"], "--device cuda:99: cannot be used"),
    (["train", "--store", "nowhere"], "Make a store with `bsc cache` first"),
    (["train", "--store", "{tiny}"], "not an activation store"),
    (["train", "--store", "{store}", "--k", "65", "--n-latents", "64"], "k=65 is more than"),
    (["train", "--store", "{store}", "--code", "ternary"],
     "'continuous', 'binary' or 'hybrid', got 'ternary'"),
    (["train", "--store", "{store}", "--k", "0"], "--k: should be at least 1, got 0"),
    (["train", "--store", "{store}", "--select", "groupmax", "--k", "7", "--n-latents", "64"],
     "into 7 equal groups, but 64 is not a multiple of 7"),
    (["train", "--store", "{store}", "--lr", "fast"], "a number or 'paper', got 'fast'"),
    (["train", "--store", "{store}", "--set", "amplitud=learned"],
     "unknown key 'amplitud' (did you mean 'amplitude'"),
    (["train", "--store", "{store}", "--set", "temperature"], "FIELD=VALUE, got 'temperature'"),
    (["train", "--store", "{store}", "--rank", "1"], "--rank and --world belong together"),
    (["train", "--store", "{store}", "--rank", "2", "--world", "2"], "go from 0 to 1"),
    (["train", "--store", "{store}", "--rank", "0", "--world", "99"], "more processes than the 4"),
    (["train", "--store", "{store}", "--add-coders"], "--add-coders belongs to --resume"),
    (["train", "--resume", "nowhere"], "no such run"),
    (["train", "--resume", "{empty_folder}"], "nothing of rank 0 of 1 here"),
    (["train", "--resume", "{run}"], "this run is complete"),
    (["train", "--resume", "{run}", "--batch-rows", "7"], "batch_rows is 7, but the run has 256"),
    (["train", "--resume", "{run}", "--k", "7"], "which is not in these tables"),
    (["train", "--resume", "{run}", "--world", "2", "--rank", "1"],
     "it was trained by 1 process(es)"),
    (["train", "{text_k}", "--store", "{store}"], "k: should be a number, got '8'"),
    (["train", "--store", "{store}", "--hookpoint", "layers.7.mlp"], "did you mean"),
    (["train", "{toml}", "--store", "{store}"],
     "unknown key 'batchrows' (did you mean 'batch_rows'"),
    (["train", "{toml_table}", "--store", "{store}"], "unknown key 'sead' (did you mean 'seed'"),
    (["train", "no.toml"], "no such file"),
    (["train", "{empty}", "--store", "{store}"], "the file is empty"),
    (["train", "--store", "{store}", "--n-latents", "10000000000"],
     "may be used on cpu. Train fewer coders or latents"),
    (["eval", "{run}", "--ce-tokens", "0"], "--ce-tokens: should be at least 1"),
    (["report", "{run}", "--out", "."], "name a file"),
    (["eval", "{store}"], "an activation store, not a run"),
    (["verify", "{run}"], "is missing), but a run"),
    (["compare", "{run}", "{run}"], "not evaluated yet"),
    (["cashe"], "Did you mean 'cache'? `bsc --help` lists the commands."),
    (["modules", "empty.txt"], "--model empty.txt: a file"),
    (["eval", "nowhere"], "no such run"),
    (["report", "{run}"], "Run `bsc eval"),
    (["eval", "{run}", "--store", "{other_store}"], "was trained on store"),
    (["info", "{empty_folder}"], "neither an activation store"),
    (["verify", "{tiny}"], "not an activation store"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_gets_one_message_exit_code_2_and_leaves_nothing(
    arguments: list[str], message: str, tiny_model: Path, store_path: Path, run: Run,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.toml").write_text("batchrows = 5\n")
    (tmp_path / "table.toml").write_text("[[coders]]\nsead = 5\n")
    (tmp_path / "text.toml").write_text('[[coders]]\nk = "8"\n')
    other = shutil.copytree(store_path, tmp_path / "other") if "{other_store}" in arguments else ""
    if other:
        change_capture(Path(other), seed=7)
    places = {
        "tiny": tiny_model, "store": store_path, "run": run.folder, "empty": "empty.txt",
        "empty_folder": "empty", "toml": "bad.toml", "toml_table": "table.toml",
        "text_k": "text.toml",
        "other_store": other,
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    stored = sorted(store_path.rglob("*"))
    code, err = run_main(capsys, *(a.format(**places) for a in arguments))
    assert code == 2, err
    assert message in err and "Traceback" not in err
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1, err
    assert sorted(tmp_path.rglob("*")) == before and sorted(store_path.rglob("*")) == stored


def test_a_store_of_another_width_is_refused(
    store_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_copy / "data.zarr/layers.0.mlp/input/zarr.json"
    path.write_text(path.read_text().replace("32\n", "33\n"))
    code, err = run_main(capsys, "train", "--store", store_copy, "--runs", store_copy.parent / "r")
    assert code == 2 and "it does not have the hash that it carries" in err
    meta = json.loads(path.read_text())
    del meta["attributes"]["xxh3_128"]
    meta["attributes"]["xxh3_128"] = record_hash(meta)  # of one who knows how
    path.write_text(canonical_json(meta))
    code, err = run_main(capsys, "train", "--store", store_copy, "--runs", store_copy.parent / "r")
    assert code == 2 and "not the metadata of an array" in err


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # Not by mode bits: tests may run as root, whom they do not bind.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, err = run_main(
        capsys, "cache", "--model", tiny_model, "--text", "stdlib", "--store", tmp_path / "acts"
    )
    assert (
        code == 2
        and "cannot be written here (Permission denied)" in err
        and not (tmp_path / "acts").exists()
    )


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    done = bsc("train", "--store", "nowhere", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "StoreError" in done.stderr


def test_verify_exits_1_and_names_the_file(store_copy: Path) -> None:
    assert bsc("verify", store_copy).returncode == 0
    shard = next((store_copy / "data.zarr/layers.0.mlp/output/c").rglob("0"))
    if shard.is_dir():
        shard = shard / "0"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 4
    shard.write_bytes(raw)
    done = bsc("verify", store_copy, "--json")
    assert done.returncode == 1
    assert str(shard) in json.loads(done.stdout)["problems"][0]


def test_info_knows_stores_and_runs(store_path: Path, run: Run) -> None:
    facts = json.loads(bsc("info", store_path, "--json").stdout)
    assert (
        facts["kind"] == "store" and facts["complete"] and facts["splits"]["train"]["rows"] > 5000
    )
    facts = json.loads(bsc("info", run.folder, "--json").stdout)
    assert facts["kind"] == "run" and len(facts["coders"]) == 8
    assert "rows: " in bsc("info", store_path).stdout


@pytest.mark.slow
def test_the_commands_of_the_issue_work_in_a_row(tiny_model: Path, tmp_path: Path) -> None:
    steps: list[list[object]] = [
        ["cache", "--model", tiny_model, "--text", "stdlib", "--hookpoints", "layers.1.mlp",
         "--tokens", "4k", "--context", "32", "--batch-tokens", "512", "--json"],
        ["verify", "acts"],
        ["train", "--store", "./acts", "--code", "binary", "--code", "continuous", "--k", "8",
         "--k", "16", "--site", "skip_transcoder", "--seed", "0", "--n-latents", "64",
         "--batch-rows", "256", "--json"],
        ["eval", "runs/run", "--ce-tokens", "256", "--ablation-bins", "2",
         "--no-probe", "--json"],
        ["report", "runs/run"],
    ]  # fmt: skip
    outputs = []
    for arguments in steps:
        done = bsc(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (arguments, done.stderr)
        outputs.append(done.stdout)
    assert json.loads(outputs[0])["rows"] >= 3960
    assert len(json.loads(outputs[2])["coders"]) == 4
    assert len(json.loads(outputs[3])["coders"]) == 4
    assert outputs[4].strip() == "runs/run/report.html"
    files = {p.name for p in (tmp_path / "runs/run").iterdir()}
    assert files == {
        "checkpoint",
        "config.json",
        "metrics.jsonl",
        "coders",
        "eval",
        "eval.json",
        "report.html",
    }


def test_a_sweep_is_planned_trained_stopped_and_resumed_from_the_command_line(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def ok(*arguments: str) -> None:
        with pytest.raises(SystemExit) as done:
            main(list(arguments))
        assert not done.value.code

    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(
        f'store = "{store_path}"\ntokens = 2_560\nbatch_rows = 256\n[[coders]]\n'
        'hookpoint = "layers.2.mlp"\ncode = ["binary", "continuous", "hybrid"]\nk = [2, 4]\n'
        "n_latents = 64\n"
    )
    ok("train", "sweep.toml", "--plan", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["coders"] == 6 and plan["steps"] == 10 and plan["rows_per_second"] > 0
    assert not Path("runs").exists()
    ok("train", "sweep.toml", "--set", "temperature=[1.0, 2.0]", "--set", "optimiser=signum")
    out = capsys.readouterr().out
    run = Run.open("runs/sweep")
    assert len(run.coder_names()) == 2 * 2 * 2 + 2  # continuous coders have no temperature
    assert "FVU (held out)" in out and out.rstrip().endswith("runs/sweep")
    assert {c["optimiser"] for c in raw(run.config_path)["coders"]} == {"signum"}
    ok("train", "--resume", "runs/sweep", "--tokens", "3840", "--json")
    result = json.loads(capsys.readouterr().out)
    assert len(result["coders"]) == 10 and Run.open("runs/sweep").config()["steps"] == 15
    code, err = run_main(capsys, "train", "sweep.toml", "--resume", "runs/sweep")
    assert code == 2 and "which is not in these tables" in err  # of which two --set went before
    ok("train", "--resume", "runs/sweep", "--add-coders", "--tokens", "5120", "--k", "3",
          "--hookpoint", "layers.2.mlp", "--n-latents", "64", "--code", "binary")  # fmt: skip
    run = Run.open("runs/sweep")
    assert run.coder(run.coder_names()[-1]).about["rows"] == 1_280
