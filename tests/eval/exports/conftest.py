"""A loopback hub, and what a push leaves there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bsc.train.run import Run
from tests.eval.exports.hub_process import Commands, Hub
from tests.hub import Files, HubState, hub_environment, serve


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubState, Commands]]:
    state = HubState({})
    with serve(state) as endpoint:
        commands = Commands(hub_environment(endpoint, tmp_path_factory.mktemp("hf")))
        yield state, commands
        commands.process.communicate()


@pytest.fixture
def hub(served: tuple[HubState, Commands], tmp_path: Path) -> Hub:
    """Empty, but for what earlier tests left in the cache of its client."""
    state, commands = served
    state.clear()
    return Hub(state, commands, tmp_path)


@pytest.fixture(scope="module")
def pushed(
    evaluated: Run, served: tuple[HubState, Commands], tmp_path_factory: pytest.TempPathFactory
) -> Files:
    """What a push of two coders leaves in a repository."""
    state, commands = served
    before, state.repos = state.repos, {}
    one = Hub(state, commands, tmp_path_factory.mktemp("pushed"))
    one.push(evaluated, "--coders", "*-k8-*", "--also", "sparsify,sparsify-binary")
    files, state.repos = one.files, before
    return files
