"""The ledger: nothing that was paid for is lost or asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bsc.errors import UserError
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.ledger import Ledger
from tests.eval.interp.scripted import Scripted, loopback, rule
from tests.eval.interp.wired import requests


def test_half_a_line_is_cut_off_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    (request,) = requests(1)
    with Ledger(path) as ledger:
        ledger.add("a", "m", request, Reply("ok", "1"))
        ledger.add("b", "m", request, Reply("failed", error="x"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "sta')
    with Ledger(path) as ledger:
        assert "a" in ledger and "c" not in ledger and len(ledger) == 1
        assert "b" not in ledger and ledger.failed("b")
        ledger.add("b", "m", request, Reply("ok", "0"))
        assert not ledger.failed("b")
    assert path.read_bytes().startswith(whole)
    with Ledger(path) as ledger:
        found = ledger.get("b")
        assert found and found.text == "0" and ledger.get("zzz") is None
        assert [e["key"] for e in ledger.entries("m")] == ["a", "b"]
        assert list(ledger.entries("another")) == []
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"rubbish\n" + lines[1])
    with pytest.raises(UserError, match="line 2: damaged"):
        Ledger(path)


@pytest.mark.parametrize("killed_after", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_and_resume_give_the_same_bytes(tmp_path: Path, killed_after: int) -> None:
    """kill -9 in the midst of it; the next process goes on and asks no prompt twice."""
    program = """
import sys
from pathlib import Path
from tests.eval.interp import planted
from tests.eval.interp.wired import few_words
from bsc.eval.interp.judges.connection import EndpointConfig
from bsc.eval.interp.judges.endpoint import Endpoint
from bsc.eval.interp.interp import interpret
of = planted.materials(Path(sys.argv[2]), few_words(planted.texts(documents=80, tokens=200)))
judge = Endpoint(EndpointConfig.of(sys.argv[1], None, concurrency=8, timeout=5.0, first_wait=0.05))
judge.find_model()
interpret(of, judge)
"""
    repository = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    with loopback(Scripted(rule)) as script:
        script.delay = 0.005
        run = [sys.executable, "-c", program, script.url]
        process = subprocess.Popen([*run, str(tmp_path / "killed")], env=environment,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 60
        while len(script.bodies) < killed_after and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        answered = script.questions()
        subprocess.run([*run, str(tmp_path / "killed")], env=environment, check=True, timeout=60)
        both = script.questions()
        # What was under way when it was killed was never received: eight at most.
        twice = [p for p, n in both.items() if n > 1]
        assert len(twice) <= 8 and all(both[p] == 2 for p in twice) and len(answered) < len(both)
        n = len(script.bodies)
        subprocess.run([*run, str(tmp_path / "killed")], env=environment, check=True, timeout=60)
        assert len(script.bodies) == n
        subprocess.run([*run, str(tmp_path / "whole")], env=environment, check=True, timeout=60)
    for name in ("interp.json", "latents.jsonl", "scores-fuzzing.csv"):
        killed, whole = (tmp_path / w / "interp" / "simulated-loopback" / name
                         for w in ("killed", "whole"))  # fmt: skip
        if name == "interp.json":
            # A server that is asked on another run probes again; what it can do is the same.
            one, other = json.loads(killed.read_text()), json.loads(whole.read_text())
            assert one["coders"] == other["coders"] and one["usage"] == other["usage"]
        else:
            assert killed.read_bytes() == whole.read_bytes()
