"""What is exported is loaded by the packages themselves, and what they save is imported: both give
the same codes and rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from bsc.eval.exports import circuit_tracer
from bsc.eval.exports.dictionary_learning import DICTIONARY_LEARNING
from bsc.eval.exports.saelens import SAELENS
from bsc.eval.exports.sparsify import SPARSIFY
from bsc.eval.exports.weights import check_written
from bsc.train.coders.coder import SparseCoder
from tests.eval.exports.kinds import HELD, kinds, random_coder, rows, written
from tests.hub import hub_environment, serve_hub

PACKAGES = (
    "eai-sparsify==1.3.3", "sae-lens==6.54.12", "dictionary-learning==0.1.0",
    "circuit-tracer==0.5.0",
    # What these import and we do not have, without what it would pull in: a second torch.
    "accelerate==1.15.0", "beartype==0.23.1", "better-abc==0.0.3", "docstring-parser==0.18.0",
    "einops==0.8.2", "fancy-einsum==0.0.3", "jaxtyping==0.3.11", "joblib==1.6.0",
    "natsort==8.4.0", "nltk==3.10.4", "nnsight==0.8.1", "psutil==7.2.2", "python-dotenv==1.2.4",
    "requests==2.34.2", "schedulefree==1.4.1", "simple-parsing==0.1.9", "transformer-lens==3.9.0",
    "typeguard==4.6.0", "wadler-lindig==0.1.8", "zstandard==0.25.0",
)  # fmt: skip


@pytest.mark.slow
def test_the_packages_themselves_compute_the_same(tmp_path: Path) -> None:
    """All of them at once: they are installed once, into a folder that nothing else sees."""
    peers, work = tmp_path / "peers", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(peers)]
    installed = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the index lacks a package of another tool: {installed.stderr[-300:]}")
    work.mkdir()
    cases = {}
    for format_, held in HELD.items():
        if format_ == "sparsify-binary":  # a branch without a release; test_formats.py has it
            continue
        for site, name, config in kinds():
            if (site, name) in held:
                case = f"{format_} {site} {name}".replace(" ", "_")
                written(format_, random_coder(config), work / case)
                cases[case] = format_, config
    save_file({"x": rows()}, work / "rows.safetensors")
    (work / "cases.json").write_text(json.dumps({case: f for case, (f, _) in cases.items()}))
    alone = tmp_path / "alone"
    shutil.copytree(work / "sparsify_sae_top-k", alone / "sparsify_sae_top-k")
    script = Path(__file__).with_name("real_packages.py")
    with serve_hub({"somebody/coders": work, "else/coders": alone}) as (endpoint, asked):
        environment = hub_environment(endpoint, tmp_path / "hf")
        environment |= {"PYTHONPATH": str(peers), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(script), str(work)], env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = {r.partition("/resolve/")[0] for r in asked if r.startswith("GET")}
    assert {"GET /somebody/coders", "GET /else/coders"} <= got
    failed = json.loads((work / "failed.json").read_text())
    assert failed == {}, "\n".join(failed.values())
    assert len(cases) == 14
    for case, (_, config) in cases.items():
        found = load_file(work / f"found-{case}.safetensors")
        computed = found["code"], found["y"]
        check_written(random_coder(config), partial(_theirs, computed), rows())
    own = json.loads((work / "written.json").read_text())
    assert len(own) == 18
    for case, format_ in own.items():
        found = load_file(work / f"found-{case}.safetensors")
        assert 0 < float((found["code"] != 0).float().mean()) < 0.5, case
        computed = found["code"], found["y"]
        check_written(read_folder(work / case, format_), partial(_theirs, computed), rows())


def read_folder(folder: Path, format_: str) -> SparseCoder:
    """What `bsc import` reads."""
    if format_ == "circuit-tracer":
        return circuit_tracer.read(folder, 0).coder
    reader = {
        "sparsify": SPARSIFY, "saelens": SAELENS, "dictionary-learning": DICTIONARY_LEARNING,
    }[format_]  # fmt: skip
    return reader.read(folder).coder


def _theirs(computed: tuple[Tensor, Tensor], x_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """What a package found for these rows, which are all that it was given."""
    assert len(x_Nd) == len(computed[0])
    return computed
