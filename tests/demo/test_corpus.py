from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bsc.embedded.corpus import ENV_PACKAGES, documents
from bsc.embedded.held_out import is_held_out


@pytest.fixture(scope="module")
def stdlib() -> dict[str, str]:
    return dict(documents("stdlib"))


def test_stdlib_has_sources_topics_and_docstrings_of_a_size_that_helps(
    stdlib: dict[str, str],
) -> None:
    parts = {kind: [n for n in stdlib if n.startswith(f"{kind}/")] for kind in
             ("stdlib", "topics", "builtins")}  # fmt: skip
    assert len(parts["stdlib"]) > 400 and len(parts["builtins"]) > 10
    assert sum(map(len, parts.values())) == len(stdlib)
    assert 8e6 < sum(len(t.encode()) for t in stdlib.values()) < 30e6
    assert "stdlib/json/decoder.py" in stdlib and "len" in stdlib["builtins/builtins"]
    assert not [n for n in stdlib if "/test/" in n or "site-packages" in n or "_sysconfigdata" in n]


def test_another_process_reads_the_same_documents_in_the_same_order(stdlib: dict[str, str]) -> None:
    code = (
        "import json, hashlib; from bsc.embedded.corpus import documents\n"
        "print(json.dumps([[n, hashlib.sha256(t.encode()).hexdigest()]"
        " for n, t in documents('stdlib')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}
    )
    import hashlib

    here = [[n, hashlib.sha256(t.encode()).hexdigest()] for n, t in stdlib.items()]
    assert json.loads(done.stdout) == here, done.stderr


def test_env_is_stdlib_and_the_packages(stdlib: dict[str, str]) -> None:
    env = dict(documents("env"))
    assert stdlib.items() <= env.items()
    assert {n.split("/")[0] for n in env} - {"stdlib", "topics", "builtins"} <= set(ENV_PACKAGES)
    assert "torch/nn/functional.py" in env
    assert sum(len(t.encode()) for t in env.values()) > 50e6


def test_about_one_document_in_twenty_is_held_out(stdlib: dict[str, str]) -> None:
    share = sum(is_held_out(n) for n in stdlib) / len(stdlib)
    assert 0.02 < share < 0.08
    smaller, larger = ({n for n in stdlib if is_held_out(n, f)} for f in (0.02, 0.2))
    assert smaller < {n for n in stdlib if is_held_out(n)} < larger
    assert is_held_out("stdlib/json/decoder.py") == is_held_out("stdlib/json/decoder.py", 0.05)


def test_another_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        next(documents("wikipedia"))
