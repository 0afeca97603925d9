"""Pages in headless Chromium, and what they said or asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; other tests check the pages by parsing them"
)
HOSTILE = (
    "</div><script>document.title = 'taken'</script><img src=x onerror=alert(2)>"
    "\u202e\u0000\U0001f600&\"'"
)
"""Text that would act if it were not escaped."""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(
    browser: Browser, url: Path | str, *, own: str = "", **options: Any
) -> tuple[Page, list[str]]:
    """The page, and what it said or asked for.

    Args:
        browser: it is opened in.
        url: of the page.
        own: what addresses begin with that it may ask for beside its own.
        options: of the browser's context.
    """
    address = url if isinstance(url, str) else url.as_uri()
    page = browser.new_context(**options).new_page()
    heard: list[str] = []

    def asked(request: Any) -> None:
        if request.url != address and not (own and request.url.startswith(own)):
            heard.append(request.url)

    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", asked)
    page.goto(address)
    return page, heard
