"""An import as a whole: the tutorial of the docs, and imports that fail half way."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.evaluation import read_evaluation
from bsc.eval.exports.export import export_coders
from bsc.eval.exports.importing import import_coders
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run, claim
from tests.eval.exports.kinds import HELD, kinds
from tests.eval.interp.command import main_ok

HELD_KINDS = {
    f"{format_}: {site} {name}": (format_, config)
    for format_, held in HELD.items()
    for site, name, config in kinds()
    if (site, name) in held
}


def test_the_tutorial_runs(
    evaluated: Run, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the small store and run of the tests, with as many latents as they have."""
    text = (Path(__file__).parents[3] / "docs" / "exchange.md").read_text()
    blocks = re.findall(r"<!-- tutorial -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "bsc-demo" / "runs").mkdir(parents=True)
    (tmp_path / "bsc-demo" / "acts").symlink_to(store_path)
    shutil.copytree(evaluated.folder, tmp_path / "bsc-demo" / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks).splitlines():
        for name, small in (
            ("*continuous-k32*", "skip_transcoder-continuous-k8*"),
            ("--k 32 --n-latents 1536", "--k 4 --n-latents 64 --hookpoint layers.2.mlp"),
        ):
            line = line.replace(name, small)
        program, *arguments = shlex.split(line)
        assert program == "bsc"
        main_ok(*arguments)
    ours, back = read_evaluation(evaluated), read_evaluation(tmp_path / "runs" / "back")
    (one,) = back.coders.values()
    (same,) = (f for n, f in ours.coders.items() if n.endswith("skip_transcoder-continuous-k8-s0"))
    assert (one["fvu"], one["l0"]) == (same["fvu"], same["l0"])
    (sae,) = read_evaluation(tmp_path / "runs" / "sae-back").coders.values()
    assert 0 < sae["fvu"] < 1.5


def test_tokens_that_a_coder_was_trained_without_are_left_out(
    run: Run, store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SAELens says it: ids, or true for all special tokens."""
    place = tmp_path / "saelens"
    export_coders(run, ["*/sae-continuous-k4*"], "saelens", place)
    (path,) = place.rglob("cfg.json")
    cfg = json.loads(path.read_text())
    assert cfg["metadata"]["exclude_special_tokens"] is False

    def imported(name: str, said: object, **more: Any) -> list[int]:
        cfg["metadata"]["exclude_special_tokens"] = said
        path.write_text(json.dumps(cfg))
        made = import_coders([place], store_path, name=name, runs=tmp_path, **more)
        return made.config().without_tokens

    assert imported("none", False) == imported("null", None) == []
    assert imported("ids", [7, 3]) == [3, 7]
    assert imported("special", True) == [0]
    assert imported("given", True, without_tokens=[9]) == [9]
    assert imported("every", True, without_tokens=()) == []
    assert imported("both", None, without_tokens=[9], without_special_tokens=True) == [0, 9]
    for said in ("all", [-1], [1.5], {"a": 1}):
        with pytest.raises(StoreError, match="exclude_special_tokens: should be"):
            imported("wrong", said)
    with pytest.raises(UserError, match="--without-tokens -1"):
        imported("wrong", None, without_tokens=[-1])
    shutil.copytree(place, tmp_path / "more" / "one")
    cfg["metadata"]["exclude_special_tokens"] = [5]
    (tmp_path / "more" / "one" / path.relative_to(place)).write_text(json.dumps(cfg))
    path.write_text(
        json.dumps(cfg | {"metadata": cfg["metadata"] | {"exclude_special_tokens": []}})
    )
    with pytest.raises(UserError, match="was trained without the tokens"):
        import_coders([place, tmp_path / "more"], store_path, name="two", runs=tmp_path)
    assert not (tmp_path / "two").exists() and not (tmp_path / "wrong").exists()
    line = ["import", str(place), "--store", str(store_path), "--all-tokens"]
    with pytest.raises(SystemExit):
        main([*line, "--without-tokens", "3"])
    assert "--all-tokens and tokens to leave out exclude each other" in capsys.readouterr().err
    # And out again.
    back = export_coders(Run(tmp_path / "ids"), ["*"], "saelens", tmp_path / "back")
    (one,) = back["coders"].values()
    again = json.loads((tmp_path / "back" / one["place"] / "cfg.json").read_text())
    assert again["metadata"]["exclude_special_tokens"] == [3, 7]
    # Of rows seen in training nothing is known.
    measured = evaluate(
        Run(tmp_path / "ids"), EvalConfig(ce_tokens=512, ablation_bins=0, probes=())
    )
    (figures,) = measured.coders.values()
    assert figures.rows_unseen is None and measured.overlap is None


def test_a_damaged_coder_behind_a_whole_one_leaves_nothing(
    run: Run, store_path: Path, tmp_path: Path
) -> None:
    export_coders(run, ["skip_transcoder-continuous-k8*"], "sparsify", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (weights,) = (tmp_path / "b").rglob("sae.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        import_coders([tmp_path / "a", tmp_path / "b"], store_path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_import_that_cannot_write_leaves_nothing_and_not_another_ones_run(
    run: Run, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_coders(run, ["skip_transcoder-continuous-k8*"], "sparsify", tmp_path / "out")

    def import_it() -> Run:
        return import_coders([tmp_path / "out"], store_path, runs=tmp_path / "runs")

    def full(self: SparseCoder, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(SparseCoder, "save", full)
        with pytest.raises(OSError, match="No space"):
            import_it()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "imported").mkdir(parents=True)
    with claim(tmp_path / "runs" / "imported"):  # another process is at it
        with pytest.raises(UserError, match=r"not empty|in use"):
            import_it()
        assert (tmp_path / "runs" / "imported" / ".lock").exists()
    assert len(import_it().coder_names()) == 1
