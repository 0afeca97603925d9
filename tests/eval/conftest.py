"""What is evaluated: a run on a store of short documents, enough of them for intervals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bsc.cache.store.store import ActivationStore
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.train.run import Run
from tests.conftest import capture_short, train_small

SMALL = EvalConfig(
    ce_tokens=512, ablation_bins=3, ablation_tokens=320, ultra_ablations=1, probe_texts=12
)
"""All of an evaluation, of few tokens."""


@pytest.fixture(scope="session")
def store_path(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As that of the other tests, of many short documents."""
    return capture_short(tiny_model, tmp_path_factory.mktemp("eval-store"))


# Not those of the other tests, which would be of the other store.
@pytest.fixture(scope="session")
def store(store_path: Path) -> ActivationStore:
    return ActivationStore(store_path)


@pytest.fixture(scope="session")
def run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(store_path, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def small() -> EvalConfig:
    return SMALL


@pytest.fixture(scope="session")
def evaluated(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trained run of the tests, evaluated. Copy it before changing it."""
    copy = Run(Path(shutil.copytree(run.folder, tmp_path_factory.mktemp("evaluated") / "small")))
    evaluate(copy, SMALL)
    return copy


@pytest.fixture
def evaluated_copy(evaluated: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(evaluated.folder, tmp_path / "small")))
