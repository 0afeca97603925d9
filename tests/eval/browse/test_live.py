"""The live page: what it answers, and whom it refuses."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn
from playwright.sync_api import expect

from bsc.cache.model.models import load_model
from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import UserError
from bsc.eval.browse.live.server import MAX_BODY, application, listen
from bsc.eval.browse.live.workbench import Question, Workbench
from bsc.eval.browse.pages import visible
from bsc.train.run import Run
from bsc.typed import write_typed
from tests.eval.pages import HOSTILE, chromium, needs_browser, opened

TEXT = "def parse(self, text):\n    return text.split()"
TOKEN = "a-token"


class Served(NamedTuple):
    port: int
    run: Run

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """One request; a header of None is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        if body is not None and "Content_Length" not in headers:
            headers["Content_Length"] = str(len(body))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        found = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        connection.close()
        return found

    def look(self, asked: Any, **headers: str) -> tuple[int, Any]:
        body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        headers.setdefault("Content_Type", "application/json")
        status, raw, _ = self.ask("POST", f"/{TOKEN}/look", body, **headers)
        return status, json.loads(raw) if raw.startswith(b"{") else raw


@pytest.fixture(scope="module")
def workbench(scored: Run, browser_folder: Path) -> Workbench:
    return Workbench(scored)


@pytest.fixture(scope="module")
def served(workbench: Workbench) -> Iterator[Served]:
    listening = listen()
    port = int(listening.getsockname()[1])
    config = uvicorn.Config(application(workbench, port, TOKEN), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(port, workbench.run)
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.mark.parametrize(
    "name", ["skip_transcoder-continuous-k8", "sae-binary-k4", "/transcoder-binary-k4"]
)
@pytest.mark.parametrize("error", [True, False])
def test_the_edited_distribution_is_that_of_a_hook_by_hand(
    workbench: Workbench, store: ActivationStore, name: str, error: bool
) -> None:
    full = workbench.run.full_name(name)
    coder = workbench.run.coder(full)
    first = workbench.look(Question(text=TEXT, coder=full, error=error))
    fires = [latent for latent, *_ in first["latents"][-1]]
    edits = {fires[0]: 0.0, 5: 3.0}
    found = workbench.look(Question(text=TEXT, coder=full, edits=edits, error=error))

    saved = store.attributes["model"]
    model = load_model(str(saved["name"]), device=torch.device("cpu"), with_head=True).model
    ids = torch.tensor([workbench.lm.tokenizer(TEXT)["input_ids"]])
    bos = workbench.lm.tokenizer.bos_token_id
    if ids[0, 0] != bos:
        ids = torch.cat([torch.tensor([[bos]]), ids], dim=1)

    def spliced(values: dict[int, float]) -> torch.Tensor:
        """Probabilities of next tokens with the coder in the place of the MLP."""

        def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            x = (y if coder.config.site == "sae" else args[0])[0]
            code = coder.encode(x)
            plain = coder.decode(code, x).float()
            before = torch.zeros(len(x), coder.config.n_latents)
            before.scatter_(1, code.latent, code.value.float())
            after = before.clone()
            for latent, value in values.items():
                after[:, latent] = value
            moved = (after - before) @ coder.W_dec.float()
            return ((y[0].float() if error else plain) + moved)[None].to(y.dtype)

        handle = model.model.layers[2].mlp.register_forward_hook(hook)
        with torch.inference_mode():
            found: torch.Tensor = model(ids).logits[0].float().softmax(dim=-1)
        handle.remove()
        return found

    before, after = spliced({}), spliced(edits)
    strings = found["tokens"]
    assert "".join(strings[-3:]) == TEXT[-len("".join(strings[-3:])) :] and len(strings) == len(
        ids[0]
    )
    every = [visible(workbench._string(i)) for i in range(4096)]
    compared = 0
    for place, rows in enumerate(found["next"]):
        for text, p, q in rows:
            if every.count(text) == 1:  # others are bytes that are shown alike
                token = every.index(text)
                assert p == pytest.approx(float(before[place, token]), rel=0.02, abs=1e-6)
                assert q == pytest.approx(float(after[place, token]), rel=0.02, abs=1e-6)
                compared += 1
    assert compared > 100
    kl = (before * (before.log() - after.log())).sum(dim=-1)
    assert torch.allclose(torch.tensor(found["kl"]), kl, atol=2e-4, rtol=0.05)
    assert max(found["kl"]) > 1e-6


def test_tokens_that_the_run_left_out_stay_as_the_model_makes_them(
    workbench: Workbench, tmp_path: Path
) -> None:
    name = workbench.run.full_name("sae-binary-k4")
    asked = Question(text=TEXT, coder=name, edits={5: 3.0}, error=False)
    everywhere = workbench.look(asked)
    bos = workbench.lm.tokenizer.bos_token_id
    copy = Run(Path(shutil.copytree(workbench.run.folder, tmp_path / "run")))
    write_typed(copy.config_path, copy.config().model_copy(update={"without_tokens": [bos]}))
    found = Workbench(copy).look(asked)
    assert everywhere["latents"][0] and found["latents"][0] == []
    assert found["latents"][1:] and everywhere["kl"][0] > 0 and found["kl"][0] == 0
    clean = workbench.lm.model(torch.tensor([[bos]])).logits[0, 0].float().softmax(dim=-1)
    likeliest = sorted((float(p) for p in clean), reverse=True)[:5]
    assert [p for _, p, _ in found["next"][0]][:5] == pytest.approx(likeliest, rel=0.02)


def test_a_coder_that_diverged_is_not_offered(scored: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(scored.folder, tmp_path / "run")))
    name = copy.coder_names()[0]
    coder = copy.coder(name)
    coder.about["frozen_at_step"] = 3
    coder.save(copy.coder_folder(name))
    assert Workbench(copy).names == [n for n in copy.coder_names() if n != name]


def test_without_an_edit_nothing_changes(workbench: Workbench) -> None:
    name = workbench.names[0]
    found = workbench.look(Question(text=TEXT, coder=name))
    assert set(found["kl"]) == {0.0} and not found["edited"]
    assert all(before == after for row in found["next"] for _, before, after in row)
    long = workbench.look(Question(text="x y " * 200, coder=name))
    assert len(long["tokens"]) == workbench.max_tokens and long["left_out"] > 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": TEXT, "coder": "none"}, "no coder"),
        ({"text": TEXT, "edits": {"64": 1}}, "no latent 64"),
        ({"text": TEXT, "edits": {"-1": 1}}, "no latent -1"),
        ({"text": TEXT, "edits": {"1": 1e300}}, "too large"),
        ({"text": TEXT, "edits": {"a": 1}}, "invalid literal"),
        ({"text": TEXT, "edits": [1]}, "edits"),
        ({"text": TEXT, "edits": {"1": "1"}}, "edits"),
        ({"text": "x" * 20_001}, "text"),
        ({"text": TEXT, "edits": {str(i): 1 for i in range(65)}}, "edits"),
        ({"text": TEXT, "more": 1}, "more"),
        ([], "object"),
        (b"{", "Expecting"),
        (b"[" * 50_000, ""),
    ],
)
def test_questions_that_make_no_sense_are_one_message(
    served: Served, asked: Any, message: str
) -> None:
    if isinstance(asked, dict):
        asked = {"coder": served.run.coder_names()[0]} | asked
    status, found = served.look(asked)
    assert status == 422 and message in found["error"] and "Traceback" not in found["error"]


def test_values_that_are_not_finite_are_refused(served: Served) -> None:
    name = served.run.coder_names()[0]
    for value in (b"NaN", b"Infinity", b"1e999"):
        body = b'{"text": "a b", "coder": "%s", "edits": {"1": %s}}' % (name.encode(), value)
        status, _ = served.look(body)
        assert status == 422


def test_the_page_and_its_parts(served: Served) -> None:
    for place, kind in (
        ("", "text/html"),
        ("live.js", "text/javascript"),
        ("style.css", "text/css"),
    ):
        status, raw, headers = served.ask("GET", f"/{TOKEN}/{place}")
        assert status == 200 and headers["content-type"].startswith(kind) and raw
        assert "default-src 'none'" in headers["content-security-policy"]
        assert (
            headers["cache-control"] == "no-store" and "access-control-allow-origin" not in headers
        )
    status, raw, _ = served.ask("GET", f"/{TOKEN}/pages/index.html")
    assert status == 200 and b"coders" in raw
    assert served.look({"text": TEXT, "coder": served.run.coder_names()[0]})[0] == 200
    assert served.ask("GET", f"/{TOKEN}/look")[0] == 405


def test_other_hosts_origins_and_addresses_are_refused(served: Served) -> None:
    good = f"127.0.0.1:{served.port}"
    asked = {"text": TEXT, "coder": served.run.coder_names()[0]}
    for host in (
        "evil.example",
        f"evil.example:{served.port}",
        "127.0.0.1",
        f"0.0.0.0:{served.port}",
        "",
    ):
        assert served.ask("GET", f"/{TOKEN}/", Host=host)[0] in (400, 421), host
        assert served.look(asked, Host=host)[0] in (400, 421)
    for origin in (
        "http://evil.example",
        "null",
        f"https://{good}",
        f"http://{good}.evil.example",
        "",
    ):
        assert served.look(asked, Origin=origin)[0] == 403, origin
    assert served.look(asked, Sec_Fetch_Site="cross-site")[0] == 403
    assert served.look(asked, Origin=f"http://{good}")[0] == 200
    status, _, headers = served.ask("GET", f"/{TOKEN}")
    assert status == 308 and headers["location"] == f"/{TOKEN}/"
    for path in ("/", "/look", "/live.js", "/a-toke/", "/a-tokenn/", f"//{TOKEN}/", "/%00/"):
        assert served.ask("GET", path)[0] == 404, path
    assert served.ask("OPTIONS", f"/{TOKEN}/look", Origin="http://evil.example")[0] == 403
    assert served.look(asked, Content_Type="text/plain")[0] == 415  # what a form may send


def test_large_bodies_are_refused_before_they_are_read(served: Served) -> None:
    size = 100 << 20
    status, _, _ = served.ask("POST", f"/{TOKEN}/look", b"", Content_Length=str(size))
    assert status == 413
    # In pieces, without saying how large it will be: no more than the bound is taken.
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
        raw.sendall(
            f"POST /{TOKEN}/look HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
            f"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        piece = b"x" * (64 << 10)
        answer = b""
        try:
            for _ in range(1_600):
                raw.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        except OSError:
            pass  # it hung up
        try:
            while part := raw.recv(4096):
                answer += part
        except OSError:
            pass
    assert b"413" in answer or answer == b""
    assert served.look({"text": "a", "coder": served.run.coder_names()[0]})[0] == 200
    assert MAX_BODY < 1 << 20


def test_no_path_leaves_the_pages(served: Served) -> None:
    (served.run.browse_folder / "link").unlink(missing_ok=True)
    (served.run.browse_folder / "link").symlink_to(served.run.folder / "config.json")
    paths = [
        "../config.json", "%2e%2e/config.json", "..%2fconfig.json", "%2e%2e%2f%2e%2e%2fetc/passwd",
        "....//config.json", "..\\config.json", "/etc/passwd", "%2fetc%2fpasswd", "link",
        "coders/../../config.json", "%252e%252e/config.json",
    ]  # fmt: skip
    for path in paths:
        status, raw, _ = served.ask("GET", f"/{TOKEN}/pages/{path}")
        assert status in (400, 404), path
        assert b"root:" not in raw and b"store_id" not in raw
    (served.run.browse_folder / "link").unlink()


def test_mistakes_on_the_command_line(
    scored: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = listen()
    port = str(taken.getsockname()[1])
    for arguments, message in (
        (["--live", "--out", str(tmp_path / "x")], "--coders alone"),
        (["--live", "--latents", "3"], "--coders alone"),
        (["--port", "80"], "--live"),
        (["--live", "--port", port], "cannot be listened on"),
        (["--live", "--port", "99999"], "cannot be listened on"),
        (["--live", "--model", str(tmp_path)], "config.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["browse", str(scored.folder), *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1, arguments
    taken.close()


def test_without_the_extra_it_says_what_to_install(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "starlette.applications", None)
    with pytest.raises(UserError, match=r"pip install 'bsc\[live\]'"):
        application(workbench, 1, TOKEN)


@needs_browser
def test_the_page_in_a_browser(served: Served) -> None:
    address = f"http://127.0.0.1:{served.port}/{TOKEN}/"
    with chromium() as browser:
        page, heard = opened(browser, address, own=address, viewport={"width": 1200, "height": 900})
        page.locator("#tokens .token").first.wait_for()
        page.locator("#text").fill("def f(x):\n    return " + HOSTILE.replace("\0", ""))
        expect(page.locator("#tokens")).to_contain_text("<script>")
        page.locator("#tokens .token").nth(3).click()
        latent = page.locator("#latents tbody tr").first
        latent.get_by_role("button", name="off").click()
        expect(page.locator("#edits")).to_contain_text("off")
        expect(page.locator("#kl")).to_contain_text("nats")
        assert page.locator("#next tbody tr").count() >= 10
        page.locator("#number").fill("7")
        page.locator("#value").fill("2.5")
        page.locator("#add").click()
        expect(page.locator("#edits")).to_contain_text("7: set to 2.5")
        page.locator("#number").fill("99999")
        page.locator("#add").click()
        expect(page.locator("#status")).to_contain_text("from 0 to 63")
        page.locator("#number").fill("8")
        page.locator("#value").fill("1e300")
        page.locator("#add").click()
        expect(page.locator("#edits")).not_to_contain_text("8: set")
        page.locator("#edits button").first.click()
        page.locator("#coder").select_option(index=3)
        expect(page.locator("#edits li")).to_have_count(0)
        page.locator("#text").fill("")
        expect(page.locator("#tokens .token")).to_have_count(0)
        expect(page.locator("#next tbody tr")).to_have_count(0)
        expect(page.locator("#status")).to_have_text("")
        assert heard == [] and page.title().startswith("bsc live")
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
