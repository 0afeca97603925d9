"""The README and the demo tell the truth: commands, snippets and printed figures."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from bsc.cli import app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
KS = (8, 16, 32, 64)


class Demo(NamedTuple):
    folder: Path
    stdout: str
    peak_bytes: int


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    # With all cores, as a person has it, also where tests are told to use one thread each. Beside
    # other tests threads had better wait for each other without spinning (docs/training.md).
    threads = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    threads["GOMP_SPINCOUNT"] = "1000"
    done = subprocess.run(
        [sys.executable, "-m", "bsc", "demo"], cwd=folder, capture_output=True, text=True,
        env=threads,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return Demo(folder, done.stdout, peak)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def table(text: str) -> dict[str, list[float]]:
    """Rows of figures by the coder's name."""
    found = {}
    for line in text.splitlines():
        if line.startswith("layers."):
            name, *rest = line.split()
            found[name] = [float(x) for x in rest if x not in ("to", "%")]
    return found


def test_every_bsc_command_of_the_readme_is_accepted_by_the_command_line() -> None:
    group = typer.main.get_command(app)
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("bsc ")
    ]
    assert len(commands) >= 6
    for _, name, *arguments in commands:
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


@pytest.mark.slow
def test_the_sweep_of_the_readme_has_the_table_below_it(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same coders, best arms and all; figures within what another Python's library changes."""
    (block,) = blocks("toml")
    monkeypatch.chdir(demo.folder)
    Path("sweep.toml").write_text(block)
    with pytest.raises(SystemExit) as done:
        main(["train", "sweep.toml"])
    assert not done.value.code
    match = re.search(r"<!-- output: sweep -->\n```\n(.*?)```", README, flags=re.S)
    assert match
    shown, found = table(match[1]), table(capsys.readouterr().out)
    assert list(shown) == list(found) and len(shown) == 6
    for name in shown:
        assert found[name][1] == pytest.approx(shown[name][1], rel=0.15), name  # held-out FVU
        assert found[name][2] == pytest.approx(shown[name][2], rel=0.15), name  # L0


def test_the_commands_that_ci_runs_are_those_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert "command_of test" in script and "command_of demo" in script
    for name, last in (("demo", ".venv/bin/bsc demo"), ("test", ".venv/bin/pytest -q")):
        match = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)\n```", README, flags=re.S)
        assert match and match[1].endswith(last) and "-c constraints.txt" in match[1]


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.slow
def test_the_demo_looks_like_science(demo: Demo) -> None:
    """FVU falls as k grows, binary above continuous at the same k, both well below 1."""
    figures = table(demo.stdout)
    assert len(figures) == 8
    fvu = {
        code: [figures[f"layers.3.mlp/skip_transcoder-{code}-k{k}-s0"][0] for k in KS]
        for code in ("binary", "continuous")
    }
    for curve in fvu.values():
        assert curve == sorted(curve, reverse=True) and curve[0] < 0.6, fvu
    assert all(b > c for b, c in zip(fvu["binary"], fvu["continuous"], strict=True)), fvu
    cost = {
        code: [figures[f"layers.3.mlp/skip_transcoder-{code}-k{k}-s0"][7] for k in KS]
        for code in ("binary", "continuous")
    }
    assert sum(cost["binary"]) > sum(cost["continuous"]) > 0, cost


@pytest.mark.slow
def test_the_demo_leaves_what_the_readme_says_and_takes_less_than_4_gb(demo: Demo) -> None:
    out = demo.folder / "bsc-demo"
    assert {p.name for p in out.iterdir()} == {"acts", "runs", "report.html", "browse"}
    assert (out / "runs/demo/eval.json").exists()
    assert demo.stdout.splitlines()[-2:] == [
        "report: bsc-demo/report.html", "latents: bsc-demo/browse/index.html"
    ]  # fmt: skip
    assert len(list((out / "browse/coders").rglob("*.html"))) == 8 * 1536 + 8
    assert demo.peak_bytes < 4e9


@pytest.mark.slow
def test_the_output_in_the_readme_is_that_of_the_demo(demo: Demo) -> None:
    """The same coders; figures within what another Python's standard library changes."""
    match = re.search(r"<!-- output: demo -->\n```\n(.*?)```", README, flags=re.S)
    assert match
    shown, found = table(match[1]), table(demo.stdout)
    assert list(shown) == list(found)
    for name in shown:
        assert found[name][0] == pytest.approx(shown[name][0], rel=0.15), name  # FVU
        assert found[name][1] == pytest.approx(shown[name][1], rel=0.15), name  # L0


@pytest.mark.slow
def test_the_python_snippets_of_the_readme_run(demo: Demo) -> None:
    first, second = blocks("python")
    first += "\nassert rows.shape[1] == 192 and reconstruction.shape == (8, 192)\n"
    first += "assert code.value.shape == (8, 32)\n"
    second += """
rows = [by_tensorstore, by_zarr, by_xarray]
assert all((r.view("u2") == rows[0].view("u2")).all() and r.shape == (5, 192) for r in rows)
assert (by_torch.view(torch.int16).numpy().view("u2") == rows[0].view("u2")).all()
"""
    for code in (first, second):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=demo.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_snippets_in_a_store_open_it_without_bsc(demo: Demo) -> None:
    store = demo.folder / "bsc-demo/acts"
    snippets = re.findall(r"```python\n(.*?)```", (store / "README.md").read_text(), flags=re.S)
    assert len(snippets) == 5
    head = "import numpy as np, torch\n"
    tail = "\nprint(np.asarray(torch.as_tensor(rows).float() if isinstance(rows, torch.Tensor)"
    tail += " else rows).astype('<f4')[:5, :3].tolist())"
    printed = set()
    for i, snippet in enumerate(snippets):
        before = snippets[3] if i == 4 else ""  # the last one takes S and d from the one before
        done = subprocess.run(
            [sys.executable, "-c", head + before + snippet + tail],
            cwd=store, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1


@pytest.mark.slow
def test_tensorstore_and_zarr_open_every_array_of_the_demo(demo: Demo) -> None:
    """tensorstore in a process without bsc, so that nothing of ours can help it."""
    data = demo.folder / "bsc-demo/acts/data.zarr"
    arrays = sorted(
        p.parent.relative_to(data).as_posix()
        for p in data.rglob("zarr.json")
        if json.loads(p.read_text())["node_type"] == "array"
    )
    assert len(arrays) == 12
    code = """
import sys, xxhash, numpy as np
if sys.argv[1] == "tensorstore":
    import tensorstore as ts
    def read(name):
        spec = {"driver": "zarr3", "kvstore": f"file://{sys.argv[2]}/{name}/"}
        return ts.open(spec).result().read().result()
else:
    import bsc, zarr
    group = zarr.open_group(sys.argv[2], mode="r")
    read = lambda name: group[name][:]
for name in sys.argv[3:]:
    a = np.asarray(read(name))
    print(name, a.dtype, a.shape, xxhash.xxh3_128(a.tobytes()).hexdigest())
assert sys.argv[1] == "zarr" or not [m for m in sys.modules if m.startswith("bsc")]
"""
    outputs = []
    for library in ("tensorstore", "zarr"):
        done = subprocess.run(
            [sys.executable, "-c", code, library, str(data), *arrays],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    assert outputs[0] == outputs[1]
    types = {line.split()[0]: line.split()[1] for line in outputs[0]}
    assert {t for n, t in types.items() if "/tokens/" in f"/{n}"} == {"uint32", "uint64"}
    assert {t for n, t in types.items() if "mlp" in n} == {"bfloat16"}
