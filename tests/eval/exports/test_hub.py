"""`bsc push`, `bsc pull`, `hub://` through huggingface_hub's own client and a loopback server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bsc.eval.evaluation import read_evaluation
from bsc.eval.exports.publish import without_places
from bsc.eval.report.report import render_report
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run
from tests.eval.exports.hub_process import REPO, Hub, one_commit
from tests.hub import Files, HubRepository


def test_a_run_comes_back_as_it_left(evaluated: Run, hub: Hub) -> None:
    commit = hub.push(evaluated)
    assert len(hub.state.repos[REPO].commits) == 2, "everything is in one commit"
    done = hub.bsc("pull", f"{REPO}@{commit}", "--out", "theirs")
    assert done.returncode == 0, done.stderr
    theirs = Run.open(hub.folder / "theirs")
    assert theirs.coder_names() == evaluated.coder_names()
    for name in theirs.coder_names():
        a, b = evaluated.coder(name), theirs.coder(name)
        assert a.config == b.config
        assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert read_evaluation(theirs).coders == read_evaluation(evaluated).coders
    assert list(theirs.metrics()) == list(evaluated.metrics())
    pulled = theirs.config().pulled
    assert pulled is not None and (pulled.repository, pulled.commit) == (REPO, commit)
    assert not list(hub.folder.glob(".*.partial"))
    assert "coders on" in render_report([theirs, evaluated])
    compared = hub.bsc("compare", "theirs", str(evaluated.folder))
    assert compared.returncode == 0, compared.stderr
    hub.refused("checkpoints are not published", "train", "--resume", "theirs", "--tokens", "20k")
    hub.refused("this folder is not empty", "pull", REPO, "--out", "theirs")


def test_nothing_of_this_machine_or_of_the_corpus_leaves(
    evaluated: Run, store_path: Path, pushed: Files
) -> None:
    shown = json.loads((evaluated.eval_folder / "examples.json").read_text())["coders"]
    pieces = [
        "".join(piece for piece, *_ in context["text"])
        for latents in shown.values() for latent in latents for context in latent["contexts"]
    ]  # fmt: skip
    assert pieces
    for name, raw in pushed.items():
        for place in (store_path.parent, evaluated.folder.parent):
            assert str(place).encode() not in raw, f"{name} says where {place} is"
        if not name.endswith(".safetensors"):
            text = raw.decode()
            assert not any(json.dumps(p)[1:-1] in text for p in pieces if len(p) > 20), name
    assert not [n for n in pushed if "checkpoint" in n or "codes" in n or "samples" in n]


def test_places_lose_all_but_their_last_part() -> None:
    value = {"a": ["/home/x/acts/", "s3://b/c", "~/m", "../m/n", "C:\\d\\e"], "/x/texts.csv": 1}
    assert without_places(value) == {"a": ["acts", "c", "m", "n", "e"], "texts.csv": 1}
    others = ["file:/home/x/y", "S3://b/c", "$HOME/y", "~x/y", "acts/../../home/y", "s3://u:p@b/"]
    assert without_places(others) == ["y", "c", "y", "y", "y", "b"]
    assert without_places({"probes": ["secret/labels.csv", "stdlib"], "store": "mine/acts"}) == {
        "probes": ["labels.csv", "stdlib"], "store": "acts",
    }  # fmt: skip
    assert without_places({"/a/t.csv": 1, "/b/t.csv": 2}) == {"t.csv": 1, "t.csv-2": 2}
    kept = ["hub://o/n", "o/n", "layers.3.mlp", "1/2", "a sentence with a / in it", ""]
    assert without_places(kept) == kept


def test_other_tools_find_their_formats(pushed: Files, store_path: Path, hub: Hub) -> None:
    folders = {n.rpartition("/")[0] for n in pushed if n.endswith("cfg.json")}
    assert folders == {"sparsify/layers.2.mlp", "sparsify-binary/layers.2.mlp"}
    hub.state.repos[REPO] = one_commit(pushed)
    for folder in sorted(folders):
        done = hub.bsc(
            "import", f"hub://{REPO}/{folder}", "--store", str(store_path.resolve()),
            "--name", folder.partition("/")[0],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_card_has_figures_licence_and_ways_to_load(pushed: Files, evaluated: Run) -> None:
    card = pushed["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["library_name"] == "bsc"
    figures = read_evaluation(evaluated).coders
    for name in [n for n in figures if "-k8-" in n]:
        row = next(line for line in body.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{figures[name].fvu:.4f} (" in row and f"{figures[name].delta_ce:.4f} (" in row
    assert f"hub://{REPO}/" in body and f"bsc pull {REPO}" in body
    assert f'load_from_hub("{REPO}", hookpoint="sparsify/layers.2.mlp")' in body
    assert "SAELens has no top-k transcoder" in body, "what cannot be represented is said"
    assert "short.jsonl" in body, "which text it was"


def test_a_second_push_takes_the_place_of_the_first(evaluated: Run, hub: Hub) -> None:
    first = hub.push(evaluated)
    hub.state.repos[REPO].commits[hub.state.repos[REPO].head]["notes.md"] = b"of the user"
    done = hub.bsc(
        "push", str(evaluated.folder), REPO, "--license", "mit", "--yes", "--coders", "binary-k8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "removed  coders/layers.2.mlp/sae-binary-k4-s0/coder.safetensors" in done.stderr
    coders = [n for n in hub.files if n.endswith("coder.safetensors")]
    assert len(coders) == 1 and "binary-k8" in coders[0] and "notes.md" in hub.files
    assert "all" not in hub.files["README.md"].decode().split("sparse")[0]
    for revision, n in ((first, len(evaluated.coder_names())), ("main", 1)):
        assert hub.bsc("pull", f"{REPO}@{revision}", "--out", revision).returncode == 0
        assert len(Run.open(hub.folder / revision).coder_names()) == n


def test_what_people_wrote_on_the_hub_is_not_replaced(evaluated: Run, hub: Hub) -> None:
    hub.push(evaluated, "--coders", "binary-k8")
    repo = hub.state.repos[REPO]
    repo.commits[repo.head]["README.md"] += b"\nEdited."
    command = ("push", str(evaluated.folder), REPO, "--license", "mit", "--yes")
    hub.refused("somebody wrote or edited its README.md", *command, "--coders", "binary-k8")
    hub.push(evaluated, "--coders", "binary-k8", "--card", "keep")
    assert hub.files["README.md"].endswith(b"Edited.")
    hub.push(evaluated, "--coders", "binary-k8", "--card", "replace")
    assert not hub.files["README.md"].endswith(b"Edited.")
    repo.commits[repo.head]["coders/layers.2.mlp/sae-binary-k4-s0/config.json"] = b"of a person"
    hub.refused("no `bsc push` wrote it", *command)
    hub.push(evaluated, "--coders", "binary-k8")


def test_a_push_whose_commit_cannot_be_looked_at_is_done(evaluated: Run, hub: Hub) -> None:
    committed: list[str] = []

    def then_silent(request: str) -> bool:
        if "/commit/" in request:
            committed.append(request)
        return bool(committed) and request.startswith("GET")

    hub.state.fails = then_silent
    commit = hub.push(evaluated, "--coders", "binary-k8")
    hub.state.fails = lambda request: False
    assert commit == hub.state.repos[REPO].head


def test_a_coder_is_loaded_by_name_also_without_a_network(pushed: Files, hub: Hub) -> None:
    hub.state.repos[REPO] = one_commit(pushed)
    address = f"hub://{REPO}/binary-k8"
    done = hub.load(address)
    assert done.returncode == 0 and "binary" in done.stdout, done.stderr
    pinned = f"hub://{REPO}@{hub.state.repos[REPO].head}/binary-k8"
    code = "import sys, bsc; [print(bsc.SparseCoder.load(a)) for a in sys.argv[1:]]"
    offline = hub.python("-c", code, address, pinned, HF_HUB_OFFLINE="1")
    assert offline.stdout == 2 * done.stdout, offline.stderr
    for wrong, message in (
        (f"hub://{REPO}/k8", "2 have it in their names"),
        (f"hub://{REPO}", "name one of its coders"),
        (f"hub://{REPO}/binary-k9", "no coder 'binary-k9'"),
        (f"hub://{REPO}@{'c' * 40}/binary-k8", "no such repository or revision"),
    ):
        hub.refused(message, "load", wrong)


@pytest.mark.parametrize("broken", ["PUT /lfs/", f"POST /api/models/{REPO}/commit/"])
def test_a_broken_upload_leaves_nothing_that_pull_takes(
    broken: str, evaluated: Run, hub: Hub
) -> None:
    hub.state.fails = lambda request: request.startswith(broken)
    command = ("push", str(evaluated.folder), REPO, "--license", "mit", "--yes")
    hub.refused("run the same command again", *command)
    hub.refused("no bsc.json here", "pull", REPO)
    hub.state.fails = lambda request: False
    assert hub.bsc(*command).returncode == 0
    assert hub.bsc("pull", REPO).returncode == 0


def test_somebody_elses_push_in_between_is_not_overwritten(evaluated: Run, hub: Hub) -> None:
    hub.push(evaluated)
    repo = hub.state.repos[REPO]

    def another_commit(request: str) -> bool:
        if "/preupload/" in request and len(repo.commits) == 2:
            repo.commits["d" * 40] = dict(repo.commits[repo.head])
        return False

    hub.state.fails = another_commit
    command = ("push", str(evaluated.folder), REPO, "--license", "mit", "--yes")
    hub.refused("cannot be pushed", *command, "--coders", "binary-k8")
    assert repo.head == "d" * 40


def test_what_cannot_be_pushed_is_one_line(evaluated: Run, hub: Hub) -> None:
    run = str(evaluated.folder)
    licence = ("--license", "mit", "--yes")
    hub.refused("--license: say under which", "push", run, REPO)
    hub.refused("--yes uploads without asking", "push", run, REPO, "--license", "mit")
    hub.refused("as the hub spells it", "push", run, REPO, "--license", "My Own!", "--yes")
    hub.refused("did you mean 'sparsify' or", "push", run, REPO, *licence, "--also", "sparsfy")
    hub.refused("one coder for each hookpoint", "push", run, REPO, *licence, "--layout", "sparsify")
    hub.refused("can hold none", "push", run, REPO, *licence, "--also", "circuit-tracer")
    hub.refused("without a revision or a path", "push", run, f"{REPO}@main", *licence)
    assert not any(r.startswith("POST") for r in hub.state.requests)
    hub.state.repos[REPO] = HubRepository(
        {"f" * 40: {"model.safetensors": b"", "config.json": b""}}
    )
    hub.refused("holds other things", "push", run, REPO, *licence)
    for files, message in (
        ({"README.md": b"# Mine"}, "somebody wrote or edited its README.md"),
        ({"bsc.json": b"{}", "config.json": b"{}"}, "not known what there may be replaced"),
    ):
        hub.state.repos[REPO] = one_commit(files)
        hub.refused(message, "push", run, REPO, *licence, "--coders", "binary-k8")
    hub.state.repos[REPO] = one_commit({".gitattributes": b""})
    hub.refused("is public already", "push", run, REPO, *licence, "--private")
    del hub.state.repos[REPO]
    dry = hub.bsc("push", run, REPO, "--dry-run", "--coders", "binary-k8")
    assert dry.returncode == 0 and "## Figures" in dry.stdout and REPO not in hub.state.repos
    without = hub.bsc("push", run, REPO, *licence, token="")
    assert without.returncode == 2 and "hf auth login" in without.stderr, without.stderr


def test_a_private_repository_without_figures(run: Run, hub: Hub, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "copy")))
    name = copy.full_name("sae-binary-k4-s0")
    coder = copy.coder(name)
    frozen = SparseCoder(coder.config, coder.tensors, about=coder.about | {"frozen_at_step": 3})
    frozen.save(copy.coder_folder(name))
    done = hub.bsc("push", str(copy.folder), REPO, "--license", "mit", "--yes", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.state.repos[REPO].private
    assert "non-finite in training: layers.2.mlp/sae-binary-k4-s0" in done.stderr
    assert "not evaluated" in done.stderr
    assert not [n for n in hub.files if "sae-binary" in n or "eval" in n]
    assert hub.bsc("pull", REPO, "--out", "pulled").returncode == 0


def test_the_layout_of_sparsify_has_nothing_but_hookpoints(
    evaluated: Run, hub: Hub, store_path: Path
) -> None:
    hub.push(evaluated, "--layout", "sparsify", "--coders", "skip_transcoder-binary-k8-s0")
    folders = {n.partition("/")[0] for n in hub.files if "/" in n}
    assert folders == {"layers.2.mlp"}
    assert {"cfg.json", "sae.safetensors", "coder.safetensors", "config.json"} <= {
        n.rpartition("/")[2] for n in hub.files if n.startswith("layers.2.mlp/")
    }
    assert hub.bsc("pull", REPO, "--out", "pulled").returncode == 0
    pulled = Run.open(hub.folder / "pulled")
    assert read_evaluation(pulled).coders.keys() == set(pulled.coder_names())
    assert "binary" in hub.load(f"hub://{REPO}/layers.2.mlp").stdout
