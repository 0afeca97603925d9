"""The page in headless Chromium: it loads nothing, says nothing, its script does what it should.

The page's content security policy forbids every request, and a refused one is a console message.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from bsc.eval.evaluation import EVAL_VERSION
from bsc.eval.report.report import write_report
from bsc.records import write_record
from bsc.train.run import Run
from tests.eval.pages import HOSTILE, chromium, needs_browser, opened
from tests.raw import raw

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(evaluated: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([evaluated], tmp_path_factory.mktemp("page") / "report.html")


def test_the_page_is_silent_and_asks_for_nothing(browser: Browser, path: Path) -> None:
    _, heard = opened(browser, path)
    assert heard == []
    # And the test can fail: a page with a request to somewhere is caught.
    bad = path.with_name("bad.html")
    bad.write_text(path.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x"></body>'))
    _, heard = opened(browser, bad)
    assert heard != []


def test_every_figure_has_words_and_nothing_is_wider_than_a_phone(
    browser: Browser, path: Path
) -> None:
    page, _ = opened(browser, path, viewport={"width": 400, "height": 800})
    # Text of figures is as large as it was drawn, or nearly: they are moved over, not made small.
    for svg in page.locator("figure.wide:not(.one) svg").all():
        box = svg.bounding_box()
        assert box is not None and box["width"] >= 46 * 15
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    figures = page.locator("figure svg")
    assert figures.count() == page.get_by_role("img").count() == 12
    for i in range(figures.count()):
        assert len(figures.nth(i).get_attribute("aria-label") or "") > 40


def test_tables_show_all_their_columns_on_a_screen(browser: Browser, path: Path) -> None:
    page, _ = opened(browser, path, viewport={"width": 1280, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wider = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.closest('section').id)"
    )
    assert wider == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(browser: Browser, path: Path, scheme: Any) -> None:
    page, _ = opened(browser, path, color_scheme=scheme)
    ink, ground = (
        page.evaluate(f"getComputedStyle(document.body).{what}.match(/\\d+/g).map(Number)")
        for what in ("color", "backgroundColor")
    )
    assert abs(sum(ink[:3]) - sum(ground[:3])) > 500
    text = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert text == f"rgb({ink[0]}, {ink[1]}, {ink[2]})"


def test_tables_are_sorted_latents_searched_and_links_open(browser: Browser, path: Path) -> None:
    page, heard = opened(browser, path)
    column = page.locator("#coders thead th", has_text="KL")
    column.get_by_role("button").click()
    index = page.locator("#coders thead th").all_inner_texts()
    place = next(i for i, t in enumerate(index) if t.startswith("KL"))
    cells = page.locator(f"#coders tbody td:nth-child({place + 1})").all_inner_texts()
    assert [float(c) for c in cells] == sorted(map(float, cells), reverse=True)
    column.get_by_role("button").click()
    cells = page.locator(f"#coders tbody td:nth-child({place + 1})").all_inner_texts()
    assert [float(c) for c in cells] == sorted(map(float, cells))

    all_latents = page.locator(".latent").count()
    name = page.locator(".latent").first.get_attribute("data-name") or ""
    # Its heading: the number alone may stand in every text.
    page.get_by_role("searchbox").fill(f"latent {name} fires")
    shown = page.locator(".latent:not([hidden])")
    assert 0 < shown.count() < all_latents
    page.get_by_role("searchbox").fill("no text has this")
    assert shown.count() == 0
    page.get_by_role("searchbox").fill("")
    assert shown.count() == all_latents

    last = page.locator(".latent").last
    assert not last.is_visible()
    page.evaluate("id => { location.hash = id }", last.get_attribute("id"))
    last.wait_for(state="visible")
    assert heard == []


def test_without_script_everything_is_there(browser: Browser, path: Path) -> None:
    page, _ = opened(browser, path, java_script_enabled=False)
    assert page.locator("#coders table").first.locator("tbody tr").count() == 8
    assert page.locator("figure svg").first.is_visible()
    assert page.locator("th button").count() == 0 and not page.locator("#search").is_visible()
    page.locator("#latents summary").nth(1).click()
    assert page.locator("#latents details").nth(1).locator(".latent").first.is_visible()


def test_hostile_text_is_shown_and_does_nothing(
    browser: Browser, evaluated_copy: Run, tmp_path: Path
) -> None:
    examples = raw(evaluated_copy.eval_folder / "examples.json")["coders"]
    for latents in examples.values():
        for latent in latents:
            text = [[HOSTILE, 1.0, True], [HOSTILE, None, False]]
            latent["contexts"] = [{"stratum": 1, "text": text}]
    write_record(
        evaluated_copy.eval_folder / "examples.json", {"version": EVAL_VERSION, "coders": examples}
    )
    page, heard = opened(browser, write_report([evaluated_copy], tmp_path / "hostile.html"))
    assert heard == [] and page.title() == "bsc report: small"
    assert "<script>document.title" in page.locator(".context").first.inner_text()
    assert page.locator("img").count() == 0


def test_the_page_prints(browser: Browser, path: Path) -> None:
    page, _ = opened(browser, path)
    assert page.pdf()[:5] == b"%PDF-"
