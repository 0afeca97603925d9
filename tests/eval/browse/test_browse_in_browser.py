"""The pages in headless Chromium, opened from the file system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from bsc.train.run import Run
from tests.eval.pages import chromium, needs_browser, opened

pytestmark = needs_browser
WIDE = {"width": 1500, "height": 900}
CODER = "layers.2.mlp~skip_transcoder-continuous-k8"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def coder(browser_folder: Path, scored: Run) -> Path:
    name = scored.full_name("skip_transcoder-continuous-k8").replace("/", "~")
    return browser_folder / "coders" / name


def visit(browser: Browser, folder: Path, place: str, **options: Any) -> tuple[Page, list[str]]:
    own = folder.resolve().as_uri() + "/"
    return opened(browser, own + place, own=own, **options)


def first_cells(page: Page, n: int = 20) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        ".rows tbody tr[data-row] td:first-child", "cells => cells.map(c => c.textContent)"
    )
    return found[:n]


def large(folder: Path, coder: Path, n: int) -> str:
    """A table of n latents beside the others."""
    place = folder / "coders" / f"large-{n}"
    place.mkdir(exist_ok=True)
    columns = [
        {"name": "fires on", "kind": "words", "values": [f"token{i % 997} x" for i in range(n)]},
        {"name": "rate", "kind": "percent", "values": [(i * 7919 % n) / n for i in range(n)]},
    ]
    table = {"latents": list(range(n)), "rows": 1000, "columns": columns}
    (place / "latents.js").write_text(f'bsc.put("{place.name}",{json.dumps(table)});')
    page = (coder / "index.html").read_text()
    page = page.replace(f'data-coder="{coder.name}"', f'data-coder="{place.name}"')
    (place / "index.html").write_text(page)
    return f"coders/{place.name}/index.html"


@pytest.mark.parametrize("n", [36_864, 100_000])
def test_large_tables_are_sorted_filtered_and_searched(
    browser: Browser, browser_folder: Path, coder: Path, n: int
) -> None:
    place = large(browser_folder, coder, n)
    page, heard = visit(browser, browser_folder, place, viewport={"width": 900, "height": 700})
    assert heard == []
    assert page.locator("output").inner_text() == f"{n:,} latents"
    assert page.locator(".rows tbody tr").count() < 100  # those in sight alone
    by_rate = sorted(range(n), key=lambda i: (-(i * 7919 % n), i))
    assert first_cells(page) == [str(i) for i in by_rate[:20]]
    page.get_by_role("button", name="rate").click()
    assert first_cells(page, 3) == [str(i) for i in by_rate[::-1][:3]]
    page.locator(".rows").evaluate("box => { box.scrollTop = box.scrollHeight }")
    page.locator(f".rows tbody tr[data-row='{by_rate[0]}']").wait_for()
    page.get_by_label("Range of rate").fill("> 99.9052")
    expected = [i for i in by_rate if (i * 7919 % n) / n > 0.999052]
    assert page.locator("output").inner_text() == f"{len(expected):,} of {n:,}"
    shown = page.locator(".rows tbody tr[data-row] td:nth-child(3)").first.inner_text()
    page.get_by_label("Range of rate").fill(shown)  # a number means what is shown as it
    assert page.locator(".rows tbody tr[data-row]").count() > 0
    page.get_by_label("Range of rate").fill("nonsense")
    assert "wrong" in (page.get_by_label("Range of rate").get_attribute("class") or "")
    page.get_by_label("Range of rate").fill("")
    page.get_by_role("searchbox").fill("token13 X")
    wanted = sum(f"token{i % 997} x".startswith("token13") for i in range(n))
    assert page.locator("output").inner_text() == f"{wanted:,} of {n:,}"
    # The address says it all: opened again, it is the same view.
    again, _ = visit(browser, browser_folder, place + "#" + page.url.partition("#")[2])
    assert again.locator("output").inner_text() == f"{wanted:,} of {n:,}"
    assert heard == []


def test_a_latent_is_shown_beside_the_table_and_keys_go_through_the_order(
    browser: Browser, browser_folder: Path, coder: Path
) -> None:
    page, heard = visit(browser, browser_folder, f"coders/{coder.name}/index.html", viewport=WIDE)
    page.get_by_role("button", name="rate").click()
    order = first_cells(page)
    frame = page.frame_locator("iframe")
    page.locator(".rows tbody tr[data-row]").first.click()
    frame.get_by_role("heading", name=f"Latent {order[0]}", exact=True).wait_for()
    page.keyboard.press("j")
    page.keyboard.press("j")
    frame.get_by_role("heading", name=f"Latent {order[2]}", exact=True).wait_for()
    frame.locator("h1").click()  # keys go on where the latent has the focus
    page.keyboard.press("k")
    frame.get_by_role("heading", name=f"Latent {order[1]}", exact=True).wait_for()
    assert f"latent={order[1]}" in page.url
    again, _ = visit(browser, browser_folder, page.url.rpartition("/browse/")[2], viewport=WIDE)
    assert again.locator("output").inner_text() == "64 latents"  # of the address no filter came
    page.keyboard.press("/")
    page.keyboard.type("zzzz")
    assert page.locator("output").inner_text().startswith("0 of")
    page.keyboard.press("Escape")
    again, _ = visit(
        browser, browser_folder, f"coders/{coder.name}/index.html#latent={order[2]}", viewport=WIDE
    )
    again.frame_locator("iframe").get_by_role(
        "heading", name=f"Latent {order[2]}", exact=True
    ).wait_for()
    assert heard == []


def test_a_row_is_clicked_though_the_table_is_drawn_meanwhile(
    browser: Browser, browser_folder: Path, coder: Path
) -> None:
    page, heard = visit(browser, browser_folder, f"coders/{coder.name}/index.html", viewport=WIDE)
    row = page.locator(".rows tbody tr[data-row]").nth(3)
    row.hover()
    page.mouse.down()
    page.evaluate("document.querySelector('.rows').dispatchEvent(new Event('scroll'))")
    page.mouse.up()
    expect(row).to_have_class("selected")
    assert f"latent={first_cells(page)[3]}" in page.url
    assert heard == []


def test_contexts_are_searched_when_asked_for(
    browser: Browser, browser_folder: Path, coder: Path
) -> None:
    page, heard = visit(browser, browser_folder, f"coders/{coder.name}/index.html")
    words = (coder / "contexts.js").read_text()
    word = next(w for w in words.split() if w.isalpha() and len(w) > 7)
    page.get_by_role("searchbox").fill(word)
    before = page.locator("output").inner_text()
    page.get_by_label("in contexts too").check()
    expect(page.locator("output")).not_to_have_text(before)
    assert heard == []


def test_back_button_and_keys_on_a_page(
    browser: Browser, browser_folder: Path, coder: Path
) -> None:
    small = {"width": 800, "height": 700}
    page, heard = visit(browser, browser_folder, f"coders/{coder.name}/index.html", viewport=small)
    page.get_by_role("button", name="rate").click()
    order = first_cells(page)
    page.locator(".rows tbody tr[data-row] a").first.click()
    page.get_by_role("heading", name=f"Latent {order[0]}", exact=True).wait_for()
    page.go_back()
    page.locator("output").wait_for()
    assert first_cells(page) == order
    page.goto(coder.joinpath("0/5.html").resolve().as_uri())
    page.keyboard.press("j")
    page.get_by_role("heading", name="Latent 6", exact=True).wait_for()
    page.keyboard.press("k")
    page.get_by_role("heading", name="Latent 5", exact=True).wait_for()
    assert heard == []


def test_two_coders_side_by_side(browser: Browser, browser_folder: Path) -> None:
    page, heard = visit(browser, browser_folder, "pairs/1.html", viewport=WIDE)
    matched = page.locator("output").inner_text()
    assert matched.endswith("latents")
    cells = page.locator(".rows tbody tr[data-row]").first.locator("td").all_inner_texts()
    page.locator(".rows tbody tr[data-row]").first.click()
    for frame, latent in zip(("first", "second"), cells, strict=False):
        shown = page.frame_locator(f"iframe[title='Latent of the {frame} coder']")
        shown.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    assert page.evaluate(
        "(() => { const c = document.querySelector('canvas'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; return d.some(x => x !== 0) })()"
    )
    for which in ("a", "b", "all"):
        page.locator("#which").select_option(which)
        assert page.locator("output").inner_text() != matched
    page.locator("#which").select_option("matched")  # and the tables before it listen no more
    page.locator("h1").click()
    page.keyboard.press("j")
    page.get_by_role("searchbox").fill("e")
    page.get_by_role("searchbox").fill("")
    assert page.locator("output").inner_text() == matched
    narrow, _ = visit(
        browser, browser_folder, "pairs/1.html", viewport={"width": 900, "height": 900}
    )
    narrow.locator(".rows tbody tr[data-row] a").first.click()
    narrow.get_by_role("heading", name=f"Latent {cells[0]}", exact=True).wait_for()
    page.locator("#axis").select_option(label="firings")
    box = page.locator("canvas").bounding_box()
    assert box is not None
    page.locator("canvas").click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    assert heard == []


@pytest.mark.parametrize("width", [400, 900, 1280, 3840])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, browser_folder: Path, coder: Path, width: int, scheme: Any
) -> None:
    places = [
        "index.html",
        "pairs/1.html",
        *(f"coders/{coder.name}/{p}" for p in ("index.html", "0/3.html")),
    ]
    for place in places:
        page, heard = visit(
            browser, browser_folder, place,
            viewport={"width": width, "height": 800}, color_scheme=scheme,
        )  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        for aside in page.locator("aside").all():
            assert aside.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), (place, width)
        ink, ground = (
            page.evaluate(f"getComputedStyle(document.body).{what}.match(/\\d+/g).map(Number)")
            for what in ("color", "backgroundColor")
        )
        assert abs(sum(ink[:3]) - sum(ground[:3])) > 500
        assert heard == []


def test_contexts_are_read_and_opened_without_a_script(
    browser: Browser, browser_folder: Path, coder: Path
) -> None:
    page, _ = visit(
        browser, browser_folder, f"coders/{coder.name}/index.html", java_script_enabled=False
    )
    links = page.locator(".numbers a")
    assert links.count() > 20 and not page.locator("#tools").is_visible()
    links.first.click()
    page.locator(".context").first.wait_for()
    opening = page.locator(".context:has(.more)").first
    assert not opening.locator(".more").first.is_visible()
    opening.locator("label").click()
    assert opening.locator(".more").first.is_visible()
    assert page.locator("mark.drawn").first.is_visible()


def test_hostile_words_do_nothing(browser: Browser, browser_folder: Path, coder: Path) -> None:
    for place in ("index.html", "0/3.html"):
        page, heard = visit(browser, browser_folder, f"coders/{coder.name}/{place}", viewport=WIDE)
        assert "<script>document.title" in page.content().replace("&lt;", "<").replace("&gt;", ">")
        assert page.title() != "taken" and page.locator("img").count() == 0 and heard == []


def test_pages_print(browser: Browser, browser_folder: Path, coder: Path) -> None:
    page, _ = visit(browser, browser_folder, f"coders/{coder.name}/0/3.html")
    assert page.pdf()[:5] == b"%PDF-"


def test_the_test_can_fail(browser: Browser, browser_folder: Path) -> None:
    bad = browser_folder / "bad.html"
    page = (browser_folder / "index.html").read_text()
    bad.write_text(page.replace("</body>", '<img src="http://127.0.0.1:9/x"></body>'))
    _, heard = visit(browser, browser_folder, "bad.html")
    bad.unlink()
    assert heard != []
