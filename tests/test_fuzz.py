"""Malformed inputs by the hundred: flags, sweeps, and every file that bsc reads.

Whatever is in them, a command ends with its exit code and at most one message: no exception, no
hang, nothing written outside of its folders. The inputs follow from the seeds below.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cli import main
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.material import Materials
from bsc.eval.interp.offline import offline_scores
from bsc.files import canonical_json
from bsc.records import record_hash, sealed
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.raw import raw

SECONDS = 60
"""A command that takes longer hangs."""
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**63, -(2**70), 10**400, 1.5, "", "x", "../../../x",
    "/etc/passwd", "a\x00b", "\u202eevil", "layers.0.mlp", "9" * 5000, [], [[]], [None], {},
    {"": {}}, {"a": [1]},
]  # fmt: skip
WORDS = [
    "", "-1", "0", "nan", "inf", "1e999", "9" * 400, "x", "../../x", "a,b", "True", "[]", "{}",
    "1.5", "layers.*.mlp", "\u202e", "a\x00b", "1k1", "--", "%s", "{a", "*", "s3://", "/dev/null",
]  # fmt: skip


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, (dict, list)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(one, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(copy[at[0]], at[1:], new)
    return copy


def without(value: Any, at: tuple[Any, ...]) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = without(copy[at[0]], at[1:])
    return copy


def mutated_json(raw: bytes, rng: random.Random) -> bytes:
    """Another value somewhere, or a value less; half the time with the hash that it then needs."""
    lines = raw.decode().splitlines()
    whole = len(lines) < 2 or lines[0] in ("{", "[")
    number = 0 if whole else rng.randrange(len(lines))
    value = json.loads(raw if whole else lines[number])
    at = rng.choice([p for p in paths_of(value) if p] or [()])
    value = (
        changed(value, at, rng.choice(ODD)) if rng.random() < 0.7 or not at else without(value, at)
    )
    if isinstance(value, dict) and "xxh3_128" in value and rng.random() < 0.6:
        return sealed({k: v for k, v in value.items() if k != "xxh3_128"})
    own = value.get("attributes") if isinstance(value, dict) else None
    if isinstance(own, dict) and "xxh3_128" in own and rng.random() < 0.6:
        rest = {k: v for k, v in own.items() if k != "xxh3_128"}
        value["attributes"] = rest | {"xxh3_128": record_hash(value | {"attributes": rest})}
        return canonical_json(value).encode()
    if whole:
        return json.dumps(value).encode()
    lines[number] = json.dumps(value)
    return "\n".join(lines).encode() + b"\n"


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """What disks, editors and enemies do to files."""
    place = rng.randrange(len(raw) + 1)
    return rng.choice(
        [
            b"", raw[:place], raw + b"\n{}", raw + raw, b"[" * 100_000, b'{"a":' * 50_000,
            b"\xff\xfe", b"\x00" * len(raw),
            raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :],
            raw.replace(b"0", b"Infinity", 1), raw.replace(b"0", b"NaN", 1),
            raw.replace(b"1", b"1e999", 1), raw.replace(b"1", b"9" * 5000, 1),
            b"null", b"[]", b"{}", b'"text"', b"\x80\x04\x95pickle",
            raw.replace(b'"', b'"\\ud800', 1),
        ]
    )  # fmt: skip


class TooLong(BaseException):
    """Not an Exception, so that nothing takes it for a mistake of a user."""


@contextmanager
def in_time() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_main(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr; an exception of whatever kind fails the test."""
    with in_time(), pytest.raises(SystemExit) as done:
        main(arguments)
    said = capsys.readouterr().err
    code = int(done.value.code or 0)
    assert "Traceback" not in said and code in (0, 1, 2), (arguments, code, said)
    if code == 2:
        assert sum(line.startswith("error:") for line in said.splitlines()) == 1, (arguments, said)
    return code, said


def where(error: BaseException) -> str:
    """An error with the place in bsc that it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "bsc" in f.filename]
    at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{str(error)[-700:] or type(error).__name__} ({type(error).__name__}){at}"


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and an evaluated and scored run with its checkpoint."""
    root = tmp_path_factory.mktemp("fuzz")
    capture(
        CaptureConfig(
            model=str(tiny_model), store=root / "acts", hookpoints=("layers.1.mlp",), tokens=800,
            text=TextSource(corpus="stdlib", held_out=0.3), held_out_tokens=400, context=16,
            batch_tokens=256, codec="int8",
        )
    )  # fmt: skip
    run, _ = train_sweep(
        TrainConfig(
            store=root / "acts", runs=root / "runs", name="run", batch_rows=64,
            coders=({"code": ["binary", "continuous"], "k": 2, "n_latents": 16,
                      "seed": [0, 1]},),
        )
    )  # fmt: skip
    evaluate(run, EvalConfig(ce_tokens=128, ablation_bins=2, ablation_tokens=64, probes=()))
    offline_scores(Materials(Run(run.folder), InterpConfig(min_firings=4), store=None, model=None))
    return root


@pytest.fixture
def place(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, and a file outside of it that nobody may touch."""
    root = tmp_path / "in" / "side"
    shutil.copytree(site, root)
    config = raw(Run(root / "runs/run").config_path) | {"store": str(root / "acts")}
    config["config"]["store"] = str(root / "acts")
    (root / "runs/run/config.json").write_bytes(sealed(config))
    monkeypatch.chdir(root)
    return root


def outside(place: Path) -> list[Path]:
    return sorted(p for p in place.parent.parent.rglob("*") if not p.is_relative_to(place))


STORE_COMMANDS = (
    ["verify", "acts"], ["info", "acts"], ["shuffle-check", "acts", "--batch-rows", "64"],
    ["train", "--store", "acts", "--plan", "--batch-rows", "64"],
    ["train", "--store", "acts", "--name", "new", "--tokens", "128", "--batch-rows", "64",
     "--k", "2", "--n-latents", "16"],
    ["examples", "runs/run", "binary-k2-s0", "1"],
)  # fmt: skip
RUN_COMMANDS = (
    ["info", "runs/run"], ["compare", "runs/run", "runs/run"],
    ["examples", "runs/run", "binary-k2-s0", "1"],
    ["interp", "runs/run", "--dry-run", "--min-firings", "4"],
    ["export", "runs/run", "binary-k2-s0", "--format", "delphi", "--out", "exported"],
    ["eval", "runs/run", "--no-probe", "--ce-tokens", "64", "--ablation-bins", "0"],
    ["report", "runs/run"], ["train", "--resume", "runs/run", "--tokens", "1600"],
)  # fmt: skip


def damage(site: Path, rng: random.Random) -> tuple[Path, bytes, list[str]]:
    """A file, what it holds now, and a command that may read it."""
    files = [p for p in sorted(site.rglob("*")) if p.is_file() and p.suffix != ".html"]
    texts = [p for p in files if p.suffix in (".json", ".jsonl")]
    of_store = rng.random() < 0.4
    base = site / ("acts" if of_store else "runs/run")
    path = rng.choice(
        [p for p in (texts if rng.random() < 0.7 else files) if p.is_relative_to(base)]
    )
    raw = path.read_bytes()
    way: Callable[[bytes, random.Random], bytes] = mutated_bytes
    if path in texts and rng.random() < 0.65:
        way = mutated_json
    commands = STORE_COMMANDS if of_store else RUN_COMMANDS
    return path.relative_to(site), way(raw, rng), list(rng.choice(commands))


def try_files(seeds: range, site: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = outside(place)
    failures = []
    for seed in seeds:
        name, content, command = damage(site, random.Random(seed))
        kept = place.with_name("kept")
        shutil.copytree(place, kept)
        (place / name).write_bytes(content)
        try:
            _, said = run_main(command, capsys)
            assert "no such" not in said, said
        except BaseException as error:
            failures.append(f"seed {seed}: {name}, {command}: {where(error)}")
        shutil.rmtree(place)
        kept.rename(place)
        os.chdir(place)  # the folder of before is gone
        assert outside(place) == before, (seed, name, command)
    assert not failures, "\n" + "\n".join(failures)


def test_the_commands_work_on_what_is_whole(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (*STORE_COMMANDS, *RUN_COMMANDS):
        code, said = run_main(list(command), capsys)
        assert code == 0, (command, said)


@pytest.mark.parametrize("part", range(4))
def test_damaged_files(
    part: int, site: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_files(range(30 * part, 30 * part + 30), site, place, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_more_damaged_files(
    part: int, site: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_files(range(1_000 + 60 * part, 1_060 + 60 * part), site, place, capsys)


def flags_of(command: str) -> list[str]:
    import typer

    from bsc.cli import app

    group: Any = typer.main.get_command(app)
    return [
        option
        for parameter in group.commands[command].params
        for option in parameter.opts
        if option.startswith("--") and option not in ("--help", "--judge", "--wandb", "--store")
    ]


def test_flags(
    place: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cheap = {
        "plan": ["--model", str(tiny_model)],
        "train": ["--store", "acts", "--plan", "--batch-rows", "64"],
        "eval": ["runs/run", "--no-probe", "--ce-tokens", "64", "--ablation-bins", "0"],
        "interp": ["runs/run", "--dry-run", "--min-firings", "4"],
        "examples": ["runs/run", "binary-k2-s0", "1"],
        "export": ["runs/run", "binary-k2-s0", "--format", "delphi", "--out", "exported"],
        "shuffle-check": ["acts"],
        "modules": [str(tiny_model)],
    }
    before = outside(place)
    failures = []
    rng = random.Random(0)
    for _ in range(200):
        command = rng.choice(list(cheap))
        known = flags_of(command)
        given = [
            x for _ in range(rng.choice([1, 1, 2])) for x in (rng.choice(known), rng.choice(WORDS))
        ]
        try:
            run_main([command, *cheap[command], *given], capsys)
        except BaseException as error:
            failures.append(f"{command} {given}: {where(error)}")
    assert not failures, "\n" + "\n".join(failures)
    assert outside(place) == before


SWEEP = {
    "name": "toml", "tokens": 256, "batch_rows": 64, "seed": 1, "normalise": True,
    "coders": [{"code": ["binary", "continuous"], "k": [2, 4], "n_latents": 16, "lr": 0.001,
                "site": "sae", "optimiser": "adam", "surrogate": "sigmoid"}],
}  # fmt: skip


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def test_sweeps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = outside(place)
    failures = []
    for seed in range(120):
        rng = random.Random(seed)
        value: Any = SWEEP
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.choice([p for p in paths_of(value) if p])
            odd = [o for o in ODD if o is not None]
            value = (
                changed(value, at, rng.choice(odd)) if rng.random() < 0.8 else without(value, at)
            )
        text = "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items())
        raw = mutated_bytes(text.encode(), rng) if rng.random() < 0.2 else text.encode()
        (place / "sweep.toml").write_bytes(raw)
        try:
            run_main(["train", "sweep.toml", "--store", "acts", "--plan"], capsys)
        except BaseException as error:
            failures.append(f"seed {seed}: {raw[:300]!r}: {where(error)}")
    assert not failures, "\n" + "\n".join(failures)
    assert outside(place) == before
