"""The documentation runs: examples of public names, the tutorial, commands; and the site builds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import bsc
from bsc.cli import app
from bsc.eval.exports.export import export_coders
from bsc.train.run import Run
from tests.eval.interp.command import main_ok

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, marker: str = "", language: str = "bash") -> list[str]:
    """Code of a page; of the blocks below a marker alone, where one is named."""
    before = rf"<!-- {marker} -->\n" if marker else ""
    return re.findall(rf"{before}```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(code: str) -> list[list[str]]:
    joined = re.sub(r"\$\w+", "1", code.replace("\\\n", " "))
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]


def test_every_public_name_has_a_page_that_names_its_home() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (listed,) = (section["Public names"] for section in nav if "Public names" in section)
    assert listed == ["api/index.md", *(f"api/{name}.md" for name in bsc.__all__)]
    index = (DOCS / "api/index.md").read_text()
    for name in bsc.__all__:
        page = (DOCS / f"api/{name}.md").read_text()
        home = bsc._HOME[name]
        assert (
            f"\n::: {home}{'' if home.endswith(name) and name == 'edits' else '.' + name}\n" in page
        )
        assert page.startswith(f"# bsc.{name}\n") and f"({name}.md)" in index
        assert blocks(DOCS / f"api/{name}.md", language="python")


@pytest.mark.parametrize("name", bsc.__all__)
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_example_of_a_public_name_runs(
    name: str, evaluated: Run, store_path: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (code,) = blocks(DOCS / f"api/{name}.md", language="python")
    (tmp_path / "bsc-demo" / "runs").mkdir(parents=True)
    (tmp_path / "bsc-demo" / "acts").symlink_to(store_path)
    run = tmp_path / "bsc-demo" / "runs" / "demo"
    shutil.copytree(evaluated.folder, run)
    for demo, small in (
        ('model="demo"', f"model={str(tiny_model)!r}"),
        ('Path(bsc.embedded.__path__[0]) / "model"', repr(str(tiny_model))),
        ("skip_transcoder-binary-k32", "skip_transcoder-binary-k8"),
        ('"binary-k32"', '"skip_transcoder-binary-k8"'),
    ):
        code = code.replace(demo, small)
    if name not in ("CaptureConfig", "capture"):
        code = code.replace("layers.3.mlp", "layers.2.mlp")
    else:
        code = code.replace("layers.3.mlp", "layers.1.mlp")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert name in code


def test_every_command_of_the_documentation_is_accepted_by_the_command_line() -> None:
    group = typer.main.get_command(app)
    seen = 0
    for page in sorted(DOCS.glob("*.md")):
        for code in blocks(page):
            for words in commands(code):
                while words and "=" in words[0] and not words[0].startswith("-"):
                    words = words[1:]  # variables of the environment
                if "bsc" not in words[:1]:
                    continue
                # What a shell would make of what comes behind it is not the command's.
                end = next(
                    (i for i, w in enumerate(words) if w in ("&&", "|", "&", ";", ">")), None
                )
                _, name, *arguments = words[:end]
                command = group.commands[name]  # type: ignore[attr-defined]  # typer's group is untyped
                command.make_context(name, arguments)
                seen += 1
    assert seen > 45


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for fewer tokens."""
    monkeypatch.chdir(tmp_path)
    texts = [
        p.read_text(errors="replace")[:4_000]
        for p in sorted(Path(json.__file__).parent.glob("*.py"))
    ]
    texts += [f"Note {i}: " + " ".join(str(j * i) for j in range(60)) for i in range(400)]
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    found = blocks(DOCS / "tutorial.md", "tutorial")
    assert len(found) == 5
    for words in commands("".join(found)):
        main_ok(*(w.replace("100k", "30k") for w in words[1:]))
    assert (tmp_path / "tutorial/run/browse/index.html").exists()
    assert len(list(tmp_path.glob("tutorial/run/on/mine*/eval.json"))) == 1


@pytest.mark.slow
def test_commands_for_coders_of_other_tools_run(
    evaluated: Run, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acts").symlink_to(store_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "runs").mkdir()
    shutil.copytree(evaluated.folder, tmp_path / "runs" / "run")
    name = "skip_transcoder-continuous-k8*"
    export_coders(evaluated, [name], "sparsify", tmp_path / "theirs" / "sparsify")
    (imported,) = blocks(DOCS / "other-tools.md", "imported")
    (exported,) = blocks(DOCS / "other-tools.md", "exported")
    for words in commands(imported + exported):
        more = ["--no-probe", "--ce-tokens", "512", "--ablation-bins", "0"]
        main_ok(
            *(w.replace("sae-continuous-k32", "sae-continuous-k4") for w in words[1:]),
            *(more if words[1] == "eval" else []),
        )
    assert (tmp_path / "runs/theirs/browse/index.html").exists()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip(
        "mkdocs", reason="the extra `docs` is not installed; .ci/run builds the site"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/api/SparseCoder.html").read_text()
    assert "doc-signature" in page and "(N, k)" in page and "<blockquote>" not in page
    assert "unpkg.com" not in page and "fonts.googleapis" not in page
