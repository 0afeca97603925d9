"""Commands that ask a loopback hub, and repositories that they find there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bsc.records import sealed
from bsc.train.run import Run
from tests.hub import Files, HubRepository, HubState

REPO = "somebody/coders"
TOKEN = "hf_NeverShowThisToken"


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """A process that asks one hub alone and runs commands one after the other.

    The hub's client reads its variables once, when it is imported, which takes seconds.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_commands.py"))], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, arguments: list[str], folder: Path, token: str) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"arguments": arguments, "folder": str(folder), "token": token}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Done(*json.loads(self.process.stdout.readline()))


class Hub(NamedTuple):
    """A server, and a way to run commands that ask it."""

    state: HubState
    commands: Commands
    folder: Path

    def python(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A process of its own."""
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=300,
            env=self.commands.environment | more, cwd=self.folder,
        )  # fmt: skip

    def bsc(self, *arguments: str, token: str = TOKEN) -> Done:
        done = self.commands.run(list(arguments), self.folder, token)
        assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return done

    def load(self, address: str) -> Done:
        """Load a coder and print it."""
        return self.bsc("load", address)

    def refused(self, message: str, *arguments: str) -> None:
        done = self.bsc(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr, done.stderr

    def push(self, run: Run, *more: str) -> str:
        """The commit."""
        flags = ("--license", "mit", "--yes", *more)
        done = self.bsc("push", str(run.folder.resolve()), REPO, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().rpartition("@")[2]

    @property
    def files(self) -> Files:
        repo = self.state.repos[REPO]
        return repo.commits[repo.head]


def one_commit(files: Files) -> HubRepository:
    """Of files; the commit is theirs, since the client's cache lasts for all tests."""
    digest = hashlib.sha1(b"".join(name.encode() + raw for name, raw in sorted(files.items())))
    return HubRepository({digest.hexdigest(): files})


def with_list(files: Files, change: Callable[[dict[str, Any]], None]) -> Files:
    """The files with another list of them, whose hash is right."""
    listed = json.loads(files["bsc.json"])
    change(listed)
    return files | {"bsc.json": sealed({n: v for n, v in listed.items() if n != "xxh3_128"})}
