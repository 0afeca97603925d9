"""A study on a store that was captured before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.files import canonical_json
from bsc.study.amounts import reckon
from bsc.study.check import check_claims
from bsc.study.study import open_study

TEXT = """
title = "Does the larger step leave less unexplained?"

[cache.acts]
path = "{path}"

[train.sweep]
store = "acts"
batch_rows = 256

[[train.sweep.coders]]
hookpoint = "layers.2.mlp"
code = "continuous"
k = 4
n_latents = 64
lr = [1e-5, 1e-2]
seed = [0, 1]

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


def file_on(store: Path | str, folder: Path) -> Path:
    path = folder / "lr.toml"
    path.write_text(TEXT.format(path=store))
    return path


def digests(file: Path) -> list[str]:
    return [node.digest for node in open_study(file).nodes.values()]


def test_what_it_comes_to_is_that_of_the_store(store_path: Path, tmp_path: Path) -> None:
    store, opened = ActivationStore(store_path), open_study(file_on(store_path, tmp_path))
    reckoned = reckon(opened)
    acts, sweep, _ = reckoned.amounts.values()
    assert (acts.flop, acts.bytes, acts.through, acts.tokens) == (0, 0, 0, 0)
    assert "captured before" in acts.what
    assert sweep.tokens == store.train.rows // 256 * 256
    assert [c.coder.d_in for c in reckoned.coders["sweep"]] == [32] * 4
    check_claims(opened, reckoned.coders)


def opened_with(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """Stores have these attributes from now on."""
    made = ActivationStore.__init__

    def init(self: ActivationStore, *given: object, **more: object) -> None:
        made(self, *given, **more)  # type: ignore[arg-type] # as it was called
        self.__dict__.update(attributes)

    monkeypatch.setattr(ActivationStore, "__init__", init)


def test_it_is_the_same_store_wherever_it_lies(
    store_path: Path, store_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = digests(file_on(store_path, tmp_path))
    assert own == digests(file_on(store_copy, tmp_path))
    # Another one in its place is another one, and so is all that depends on it.
    opened_with(monkeypatch, store_id="0123456789abcdef")
    assert not set(own) & set(digests(file_on(store_copy, tmp_path)))


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ('path = "{path}"', 'path = "{path}/none"', r"\[cache.acts\]: path: .*no such folder"),
        ('path = "{path}"', 'path = ""', r"path: should be where a store is, got ''"),
        ('path = "{path}"', "path = 3", r"path: should be where a store is, got 3"),
        ('path = "{path}"', 'path = "{path}"\ntokens = 5', r"nothing is captured. Leave out tok"),
        ('path = "{path}"', 'store = "{path}"', r"\[cache.acts\]: model: missing"),
    ],
)  # fmt: skip
def test_mistakes(store_path: Path, tmp_path: Path, was: str, now: str, words: str) -> None:
    path = tmp_path / "lr.toml"
    path.write_text(TEXT.replace(was, now).format(path=store_path))
    with pytest.raises(UserError, match=words):
        open_study(path)


def test_a_store_that_is_not_whole_or_a_ring_is_refused(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_on(store_path, tmp_path)
    monkeypatch.setattr(ActivationStore, "complete", False)
    with pytest.raises(UserError, match="its capture has not ended"):
        open_study(file)
    monkeypatch.undo()
    opened_with(monkeypatch, ring=3)
    with pytest.raises(UserError, match="a ring, whose rows are gone"):
        open_study(file)


@pytest.mark.slow
def test_a_study_on_it_writes_nothing_into_it(store_copy: Path, tmp_path: Path) -> None:
    """Slow: four commands, each a process."""

    def files() -> dict[str, tuple[int, int]]:
        return {
            str(p): (p.stat().st_size, p.stat().st_mtime_ns)
            for p in sorted(store_copy.rglob("*")) if p.is_file()
        }  # fmt: skip

    before = files()
    file_on(store_copy, tmp_path)
    command = [sys.executable, "-m", "bsc", "study", "lr.toml"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert files() == before
    found = json.loads((tmp_path / "lr" / "study.json").read_text())
    assert [c["verdict"] for c in found["claims"]] == ["holds"]
    acts = next(s for s in found["steps"] if s["step"] == "acts")
    assert acts["state"] == "done" and acts["command"].endswith("captured before")
    assert str(tmp_path) not in canonical_json(found), "no place of this machine leaves it"
    assert not any((tmp_path / "lr" / "stores").iterdir())
    # Gone: said before anything is begun.
    shutil.rmtree(store_copy)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
