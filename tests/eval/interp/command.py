"""What tests of `bsc interp` share: a small number of latents, and a command that succeeds."""

from __future__ import annotations

import pytest

from bsc.cli import main

SMALL = ("--latents", "6", "--explain-excerpts", "6", "--test-excerpts", "6")


def main_ok(*arguments: object) -> None:
    """Run `bsc` and expect exit code 0."""
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    assert not done.value.code
