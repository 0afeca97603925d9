"""`bsc pull` and `hub://` of repositories that are damaged or mean harm: one line, nothing left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest

from bsc.records import sealed
from bsc.train.run import Run
from tests.eval.exports.hub_process import REPO, Hub, one_commit, with_list
from tests.hub import Files


def other_coder(files: Files) -> Files:
    """One coder's files in the folder of the other, listed with their hashes."""
    a, b = sorted({n.rpartition("/")[0] for n in files if n.endswith("coder.safetensors")})
    listed = json.loads(files["bsc.json"])["files"]
    changed = dict(files)
    for file in ("config.json", "coder.safetensors", "firing.safetensors"):
        changed[f"{a}/{file}"] = files[f"{b}/{file}"]
        listed[f"{a}/{file}"] = listed[f"{b}/{file}"]
    return with_list(changed, lambda one: one.update(files=listed))


def flipped(files: Files, name: str) -> Files:
    raw = bytearray(files[name])
    raw[-1] ^= 1
    return files | {name: bytes(raw)}


def coder_file(files: Files) -> str:
    return next(n for n in files if "binary-k8-s0" in n and n.endswith("coder.safetensors"))


def claim(files: Files, size: int) -> Files:
    name = coder_file(files)
    return with_list(files, lambda one: one["files"][name].update(bytes=size))


HOSTILE: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a file is missing": (
        lambda f: {n: raw for n, raw in f.items() if n != coder_file(f)}, "not whole"),
    "a byte is wrong": (lambda f: flipped(f, coder_file(f)), "is not the file that bsc.json lists"),
    "the list is wrong": (lambda f: flipped(f, "bsc.json"), "cannot be read as JSON"),
    "a path leads out": (
        lambda f: with_list(f, lambda one: one["files"].update(
            {"../../evil.json": {"bytes": 1, "sha256": "0"}})), "which is not fetched"),
    "a coder leads out": (
        lambda f: with_list(f, lambda one: one["coders"].update({"x": "../.."})), "lists no"),
    "sizes are not those": (lambda f: claim(f, 10 << 30), "not whole"),
    "another coder's files": (other_coder, "is not what config.json says"),
    "no list": (lambda f: {n: raw for n, raw in f.items() if n != "bsc.json"}, "no bsc.json here"),
    "another run's coders": (
        lambda f: with_list(f, lambda one: one["coders"].pop(sorted(one["coders"])[0])),
        "name other coders"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_repository_is_one_line(what: str, pushed: Files, hub: Hub) -> None:
    change, message = HOSTILE[what]
    hub.state.repos[REPO] = one_commit(change(pushed) | {"evil.pt": b"pickle"})
    hub.refused(message, "pull", REPO)
    assert not list(hub.folder.glob("runs/*")) and not (hub.folder.parent / "evil.json").exists()
    assert not any("evil" in r for r in hub.state.requests)


def test_ten_gigabytes_of_a_small_coder_are_not_fetched(pushed: Files, hub: Hub) -> None:
    name = coder_file(pushed)
    files = {n: raw for n, raw in claim(pushed, 10 << 30).items() if n != name}
    hub.state.repos[REPO] = one_commit(files)
    hub.state.claims = [{"rfilename": name, "size": 10 << 30}]
    hub.refused("claims 10.7 GB", "pull", REPO)
    hub.refused("claims 10.7 GB", "load", f"hub://{REPO}/binary-k8")
    assert not any(name in r for r in hub.state.requests)


def test_pull_into_an_empty_folder_and_nowhere_else(pushed: Files, hub: Hub) -> None:
    hub.state.repos[REPO] = one_commit(with_place(pushed))
    (hub.folder / "empty").mkdir()
    (hub.folder / "link").symlink_to("empty")
    done = hub.bsc("pull", REPO, "--out", "link")
    assert done.returncode == 0, done.stderr
    pulled = Run.open(hub.folder / "empty")
    assert pulled.config().store == "acts", "what somebody else wrote is not gone to"
    hub.refused("not empty", "pull", REPO, "--out", ".")


def with_place(files: Files) -> Files:
    """The files with a store on the network."""
    config = json.loads(files["config.json"])
    config["store"] = "s3://attacker/acts"
    raw = sealed({n: v for n, v in config.items() if n != "xxh3_128"})
    listed = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    changed = files | {"config.json": raw}
    return with_list(changed, lambda one: one["files"].update({"config.json": listed}))
