"""An import as a whole: the tutorial of the docs, and imports that fail half way."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bsc.errors import UserError
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
