"""The page in headless Chromium: no message on the console, so nothing broken and nothing loaded.

The page's content security policy forbids every request, and a refused one is a console message.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bsc.eval.evaluate import evaluate
from bsc.eval.report.report import write_report
from bsc.train.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; test_report.py checks the page by parsing it"
)


def console(page: Path, profile: Path) -> list[str]:
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={profile}",
         "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "</html>" in done.stdout, done.stderr
    return re.findall(r".*CONSOLE.*", done.stderr)


def test_the_report_says_nothing_on_the_console(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    evaluate(copy, ce_tokens=512)
    page = write_report([copy])
    assert console(page, tmp_path / "profile") == []
    # And the test can fail: a page with a request to somewhere is caught.
    text = page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>')
    (tmp_path / "bad.html").write_text(text)
    assert console(tmp_path / "bad.html", tmp_path / "profile") != []
