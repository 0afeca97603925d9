"""Users' mistakes in `bsc finetune`: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cli import main
from bsc.finetuning import job as job_module
from bsc.finetuning.plan import FinetunePlan
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.conftest import make_model

SHORT = ("--tokens", "1024", "--batch-tokens", "256", "--lr", "1e-3")


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    found = capsys.readouterr()
    return int(done.value.code or 0), found.out, found.err


MISTAKES = [
    (["{nowhere}"], "no such run"),
    (["{run}", "--coders", "*k99*"], "no coder fits"),
    (["{run}", "--name", "parents"], "that is the run itself"),
    (["{run}", "--tokens", "100"], "which is one step"),
    (["{run}", "--batch-tokens", "16"], "which is one context of this store"),
    (["{run}", "--optimiser", "muon"], "no learning rate was measured for it"),
    (["{run}", "--lr", "paper", "--optimiser", "signum"], "the authors finetuned with adam"),
    (["{run}", "--loss", "mse"], "loss"),
    (["{run}", "--lr", "-1"], "lr"),
    (["{run}", "--plan", "--resume"], "--plan is for a new run"),
    (["{run}", "--resume"], "not a run of finetuned coders"),
    (["{run}", "--store", "{other}"], "was trained on store"),
    (["{run}", "--model", "{othermodel}"], "weights_sha256"),
    (["{run}", "--model", "{nowhere}"], "no such folder"),
    (["{run}", "--name", "../outside"], "make a name"),
    (["{run}", "--device", "cuda:9"], "cuda"),
]


@pytest.fixture(scope="module")
def places(
    parents: Run, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("mistakes")
    other_model = make_model(folder / "model", initializer_range=0.1)
    capture(
        CaptureConfig(
            model=str(other_model), store=folder / "acts", text=TextSource(corpus="stdlib"),
            hookpoints=("layers.{0,2}.mlp",), tokens=1_000, held_out_tokens=200, context=32,
            batch_tokens=256,
        )
    )  # fmt: skip
    return {
        "run": str(parents.folder), "nowhere": str(folder / "nowhere"),
        "other": str(folder / "acts"), "othermodel": str(other_model),
    }  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, places: dict[str, str],
    arguments: list[str], words: str,
) -> None:  # fmt: skip
    given = [a.format(**places) for a in arguments]
    own = {"--resume", "parents"} & set(given)  # of the folder of the run itself
    more = [] if own else ["--runs", str(tmp_path / "runs")]
    defaults = SHORT[:4] if not {"--tokens", "--batch-tokens"} & set(given) else ()
    code, _, err = run_main(capsys, "finetune", *given, *more, *defaults)
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(last) == 1 and words in last[0], err
    assert "Traceback" not in err and not (tmp_path / "runs").exists()


def test_a_model_that_is_gone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    capture(
        CaptureConfig(
            model=str(model), store=tmp_path / "acts", text=TextSource(corpus="stdlib"),
            hookpoints=("layers.2.mlp",), tokens=1_000, held_out_tokens=200, context=32,
            batch_tokens=256,
        )
    )  # fmt: skip
    coders = ({"code": "binary", "k": 2, "n_latents": 16},)
    run, _ = train_sweep(
        TrainConfig(store=tmp_path / "acts", runs=tmp_path, batch_rows=128, coders=coders)
    )
    shutil.rmtree(model)
    code, _, err = run_main(capsys, "finetune", run.folder, *SHORT)
    assert code == 2 and "no such folder" in err and not (tmp_path / "finetuned").exists()


def test_a_text_that_gives_no_batch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path
) -> None:
    words = [f"document {i} " + "of some words " * 5 for i in range(40)]
    text = tmp_path / "a.jsonl"
    text.write_text("\n".join(json.dumps({"text": w}) for w in words))
    capture(
        CaptureConfig(
            model=str(tiny_model), store=tmp_path / "acts", tokens=256, held_out_tokens=32,
            text=TextSource(files=(str(text),), held_out=0.2), context=16, batch_tokens=64,
            hookpoints=("layers.2.mlp",),
        )
    )  # fmt: skip
    coders = ({"code": "binary", "k": 2, "n_latents": 16},)
    run, _ = train_sweep(
        TrainConfig(store=tmp_path / "acts", runs=tmp_path, batch_rows=128, coders=coders)
    )
    code, _, err = run_main(capsys, "finetune", run.folder, "--tokens", "1M", "--batch-tokens",
                            "65536", "--lr", "1e-3")  # fmt: skip
    assert code == 2 and "fewer than 4096 contexts of 16 tokens" in err
    assert not (tmp_path / "finetuned").exists()


def test_more_memory_than_there_is(
    capsys: pytest.CaptureFixture[str], parents: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code, out, _ = run_main(capsys, "finetune", parents.folder, *SHORT, "--plan", "--json")
    assert code == 0
    plan = json.loads(out)
    assert set(plan) >= {*FinetunePlan.__dataclass_fields__, "hours"}
    assert plan["memory"]["total"] < plan["free"] and plan["micro_tokens"] == 256
    # Contexts at a time follow from what is free, and below one of them nothing is begun.
    less = plan["memory"]["total"] - plan["memory"]["passes"]
    one = (plan["memory"]["passes"] - (128 << 20)) // 8
    monkeypatch.setattr(job_module, "available_bytes", lambda device: less + (128 << 20) + 3 * one)
    code, out, _ = run_main(capsys, "finetune", parents.folder, *SHORT, "--plan", "--json")
    assert code == 0 and json.loads(out)["micro_tokens"] == 64
    monkeypatch.setattr(job_module, "available_bytes", lambda device: less)
    code, _, err = run_main(capsys, "finetune", parents.folder, *SHORT, "--runs", tmp_path / "runs")
    assert code == 2 and "1 contexts of 32 tokens at a time" in err and "--coders" in err
    code, _, err = run_main(
        capsys, "finetune", parents.folder, *SHORT, "--runs", tmp_path / "runs", "--micro-tokens",
        "128",
    )  # fmt: skip
    assert code == 2 and "or give a smaller --micro-tokens" in err
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], parents: Run) -> None:
    code, out, _ = run_main(capsys, "finetune", parents.folder, *SHORT, "--plan")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "coders", "tokens", "lr", "memory", "checkpoint", "time",
    ]  # fmt: skip
