"""A planted corpus, and a scripted judge that is running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bsc.eval.interp.evidence import Texts
from tests.eval.interp import planted
from tests.eval.interp.scripted import Scripted, loopback, rule


@pytest.fixture(scope="session")
def where() -> Texts:
    return planted.texts(documents=80, tokens=200)


@pytest.fixture
def script() -> Iterator[Scripted]:
    with loopback(Scripted(rule)) as running:
        yield running
