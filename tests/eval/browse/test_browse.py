"""The folder of pages: what is in it, and that every number is the one that was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bsc.cli import app
from bsc.errors import UserError
from bsc.eval.browse import writing
from bsc.eval.browse.browse import write_browser
from bsc.eval.browse.config import BrowseConfig
from bsc.eval.browse.pages import CoderPages
from bsc.eval.evaluation import read_evaluation
from bsc.eval.latent_table import latents
from bsc.eval.report.report import write_report
from bsc.eval.show import latent_examples
from bsc.train.run import Run


def data(path: Path) -> list[Any]:
    """What the scripts of a file pass to their functions, the arguments of each call."""
    calls = re.findall(r"^bsc\.\w+\((.*)\);$", path.read_text(), re.MULTILINE)
    return [json.loads(f"[{arguments}]") for arguments in calls]


def columns(folder: Path, coder: str) -> dict[str, list[Any]]:
    ((slug, table),) = data(folder / "coders" / coder / "latents.js")
    assert slug == coder
    return {"latent": table["latents"]} | {c["name"]: c["values"] for c in table["columns"]}


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]


def slug(name: str) -> str:
    return name.replace("/", "~")


def test_every_latent_of_every_coder_has_a_page_and_every_link_leads_somewhere(
    scored: Run, browser_folder: Path
) -> None:
    for name in scored.coder_names():
        for latent in range(64):
            assert (browser_folder / "coders" / slug(name) / f"0/{latent}.html").exists()
    n = 0
    for page in browser_folder.rglob("*.html"):
        for link in Words(page.read_text()).links:
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve()
            assert target.is_relative_to(browser_folder.resolve()) and target.is_file(), link
            if anchor and not anchor.startswith("latent="):
                assert f'id="{anchor}"' in target.read_text()
            n += 1
    assert n > 8 * 64 * 6


def test_every_number_of_the_table_is_the_one_that_was_measured(
    scored: Run, browser_folder: Path
) -> None:
    evaluation = read_evaluation(scored)
    for name in scored.coder_names():
        found, figures = columns(browser_folder, slug(name)), evaluation.coders[name]
        known = list(latents(scored, name))
        assert found["latent"] == [one.latent for one in known]
        assert found["firings"] == [one.firings for one in known]
        assert found["rate"] == [one.rate for one in known]
        assert sum(found["firings"]) == figures.firings
        for kind in ("predictability", "overlap", "judge/detection"):
            assert found[kind] == [one.scores.get(kind) for one in known]
        assert any(x is not None for x in found["predictability"])
        ultra = {one.latent: one.what for one in figures.ultra}
        told = found.get("what it is", [""] * len(known))
        assert {i: what for i, what in enumerate(told) if what} == ultra
        assert (
            found["explanation by judge"][3].endswith("of 3")
            and not found["explanation by judge"][5]
        )


def test_the_page_of_a_latent_has_its_contexts_and_figures(
    scored: Run, browser_folder: Path
) -> None:
    name = scored.full_name("skip_transcoder-continuous-k8")
    one = max(latents(scored, name), key=lambda found: found.firings)
    page = (browser_folder / "coders" / slug(name) / f"0/{one.latent}.html").read_text()
    text = "".join(Words(page).text)
    rows = read_evaluation(scored).coders[name].rows
    assert f"{100 * one.rate:.3f} %of tokens: {one.firings:,} of {rows:,}" in " ".join(
        text.split("\n")
    )
    shown = latent_examples(scored, name, one.latent, per_stratum=2)
    for context in shown.contexts:
        for _, margin, _ in context.text:
            if margin is not None:
                assert f'title="{context.margin:.4g}"' in page
    drawn = re.findall(r'<mark class="s\d drawn" title="([^"]+)"', page)
    assert drawn[: len(shown.contexts)] == [f"{c.margin:.4g}" for c in shown.contexts]
    marks = {int(m) for m in re.findall(r'<mark class="s(\d)', page)}
    assert max(marks) == 9 and len(marks) > 2
    # A binary latent is on or off: all marks are alike.
    name = scored.full_name("skip_transcoder-binary-k8")
    page = (browser_folder / "coders" / slug(name) / f"0/{one.latent}.html").read_text()
    assert set(re.findall(r'<mark class="s(\d)', page)) <= {"6"}


def test_more_of_a_text_is_there_and_is_the_text(scored: Run, browser_folder: Path) -> None:
    name = scored.full_name("skip_transcoder-continuous-k8")
    one = max(latents(scored, name, contexts=2), key=lambda found: found.firings)
    page = (browser_folder / "coders" / slug(name) / f"0/{one.latent}.html").read_text()
    contexts = [
        "".join(Words(part).text)
        for part in re.findall(r'<div class="context">.*?</label>(.*?)</div>', page, re.DOTALL)
    ]
    for context, whole in zip(one.contexts, contexts, strict=False):
        assert "".join(str(piece) for piece, *_ in context.text) in whole
    assert 'class="more"' in page


def test_partners_are_told_from_both_sides(scored: Run, browser_folder: Path) -> None:
    (first, second) = (arguments[0] for arguments in data(browser_folder / "pairs" / "1.js"))
    assert (first["a"], first["b"]) == (second["b"], second["a"])
    for latent, (partner, mutual) in enumerate(zip(first["latent"], first["mutual"], strict=True)):
        if mutual:
            assert second["latent"][partner] == latent and second["mutual"][partner]
            assert first["cosine"][latent] == pytest.approx(second["cosine"][partner], abs=1e-4)
            assert first["jaccard"][latent] == second["jaccard"][partner]
    assert sum(first["mutual"]) == sum(second["mutual"]) > 5
    # Only coders are compared that differ in their code alone or in their seed alone.
    pairs = {tuple(sorted((s.a, s.b))) for s in read_evaluation(scored).stability}
    numbers = sorted((browser_folder / "pairs").glob("*.js"))
    found = {tuple(sorted((data(p)[0][0]["a"], data(p)[0][0]["b"]))) for p in numbers}
    assert found == {tuple(slug(name) for name in pair) for pair in pairs}


def test_hostile_text_is_shown_as_text_everywhere(browser_folder: Path, scored: Run) -> None:
    for path in browser_folder.rglob("*"):
        if path.suffix in (".html", ".js") and path.name not in ("table.js", "latent.js"):
            text = path.read_text()
            assert "<img" not in text and "\u202e" not in text and "\0" not in text
            if path.suffix == ".html":
                assert "<script>" not in text and "Content-Security-Policy" in text
    page = browser_folder / "coders" / slug(scored.coder_names()[0]) / "0/3.html"
    assert "<script>document.title" in "".join(Words(page.read_text()).text)


def test_latents_and_contexts_are_as_many_as_were_asked_for(scored: Run, tmp_path: Path) -> None:
    config = BrowseConfig(coders=("*-k8-*",), latents=5, contexts=1)
    found = write_browser(scored, config, tmp_path / "some")
    folder = found.page.parent
    assert found.coders == 2 and found.latents == 10
    pages = list(folder.rglob("coders/*/0/*.html"))
    assert len(pages) == 10
    assert found.size == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    for page in folder.rglob("*.html"):  # neighbours without a page are named, not linked
        for link in Words(page.read_text()).links:
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_a_browser_is_replaced_whole_and_nothing_else_is(
    scored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = BrowseConfig(coders=("*binary-k8*",), latents=2)
    folder = write_browser(scored, few, tmp_path / "pages").page.parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(path: Path, raw: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            write_browser(scored, few, folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["pages"]
    again = write_browser(scored, few, folder)  # the same bytes
    assert {p: p.read_bytes() for p in again.page.parent.rglob("*") if p.is_file()} == before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        write_browser(scored, few, mine)
    assert (mine / "thesis.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        write_browser(scored, few, mine / "thesis.tex")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process writes all pages")
def test_several_processes_write_the_same_bytes_and_their_errors_are_said(
    scored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BrowseConfig(coders=("*-k8-*",))
    one = write_browser(scored, config, tmp_path / "one")
    monkeypatch.setattr(writing, "_FEW", 1)
    monkeypatch.setattr(writing, "_AT_ONCE", 7)
    monkeypatch.setattr(writing, "_cores", lambda: 3)
    own = os.getpid()
    page, seen = CoderPages.page, []

    def counted(self: CoderPages, latent: int) -> Any:
        seen.append(os.getpid())
        return page(self, latent)

    monkeypatch.setattr(CoderPages, "page", counted)
    several = write_browser(scored, config, tmp_path / "several")
    assert set(seen) == {own} and len(seen) < 30  # the size was measured here, the rest elsewhere
    assert several[1:] == one[1:]
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            other = tmp_path / "several" / path.relative_to(tmp_path / "one")
            assert other.read_bytes() == path.read_bytes()

    def full(self: CoderPages, latent: int) -> Any:
        if os.getpid() != own and latent == 40:
            raise OSError(28, "No space left on device")
        return page(self, latent)

    monkeypatch.setattr(CoderPages, "page", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        write_browser(scored, config, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_what_stands_beside_the_folder_stays(scored: Run, tmp_path: Path) -> None:
    few = BrowseConfig(coders=("*binary-k8*",), latents=2)
    for name in ("pages.old", "pages.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for place in (tmp_path / "pages", tmp_path / "pages", link, link):
        assert write_browser(scored, few, place).page.exists()
    assert link.is_symlink() and (real / "index.html").exists()
    names = {"pages", "pages.old", "pages.partial", "real", "link"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "pages.old" / "mine").exists()
    with pytest.raises(UserError, match="is in the browser"):
        write_browser(scored, few, real / "coders" / "x")
    with pytest.raises(UserError, match="named twice"):
        write_browser([scored, Run(scored.folder / ".." / "small")], few, tmp_path / "pages")


def test_two_at_the_same_time_each_write_a_whole_folder(scored: Run, tmp_path: Path) -> None:
    few = BrowseConfig(coders=("*binary-k8*",), latents=20)
    with ThreadPoolExecutor() as threads:
        found = list(
            threads.map(lambda _: write_browser(scored, few, tmp_path / "pages"), range(3))
        )
    for one in found:
        files = [p for p in one.page.parent.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) == one.size
    assert [p.name for p in tmp_path.iterdir()] == ["pages"]


def test_an_empty_folder_may_be_named_by_a_dot(
    scored: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_browser(scored, BrowseConfig(coders=("*binary-k8*",), latents=2), ".")
    assert (tmp_path / "here" / "index.html").exists()


def test_several_runs_are_beside_each_other(scored: Run, evaluated: Run, tmp_path: Path) -> None:
    odd = tmp_path / "r#1 50%?\"x'\u00e9"  # links are addresses, in which these mean something
    other = Run(Path(shutil.copytree(evaluated.folder, odd)))
    config = BrowseConfig(coders=("*binary-k8*",), latents=3)
    folder = write_browser([scored, other], config, tmp_path / "pages").page.parent
    assert len(list((folder / "coders").iterdir())) == 2
    for page in folder.rglob("*.html"):
        for link in Words(page.read_text()).links:
            assert (page.parent / link.partition("#")[0]).exists(), link
    (forth, _back) = (arguments[0] for arguments in data(folder / "pairs" / "1.js"))
    assert forth["latent"] and np.allclose(
        [c for c, m in zip(forth["cosine"], forth["mutual"], strict=True) if m], 1
    )


def test_the_report_links_to_pages_that_are_there(evaluated: Run, tmp_path: Path) -> None:
    report = write_report([evaluated], tmp_path / "report.html")
    assert "coders/" not in "".join(Words(report.read_text()).links)
    write_browser(evaluated, BrowseConfig(coders=("*-k8-*",)), tmp_path / "browse")
    links = [
        link for link in Words(write_report([evaluated], report).read_text()).links
        if link.startswith("browse/")
    ]  # fmt: skip
    assert len(links) > 10 and all((tmp_path / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coders", "nothing*"], "no coder fits 'nothing*'"),
        (["--latents", "0"], "--latents"),
        (["--contexts", "99"], "--contexts"),
        (["--store", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    scored: Run, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from bsc.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["browse", str(scored.folder), "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_the_command_says_how_large_it_will_be_and_where_it_is(
    scored: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages"
    result = CliRunner().invoke(
        app, ["browse", str(scored.folder), "--out", str(out), "--coders", "*binary-k8*"]
    )
    assert result.exit_code == 0 and str(out / "index.html") in result.output
