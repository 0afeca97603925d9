"""What is finetuned: a run with coders of two hookpoints, of a store of the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep
from tests.conftest import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As that of the other tests, with weights so large that a splice changes what it predicts."""
    return make_model(tmp_path_factory.mktemp("loud-model"), initializer_range=0.2)


@pytest.fixture(scope="session")
def store_path(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finetune-store") / "acts"
    capture(
        CaptureConfig(
            model=str(tiny_model), store=path, text=TextSource(corpus="stdlib", held_out=0.2),
            hookpoints=("layers.{0,2}.mlp",), tokens=6_000, held_out_tokens=2_000, context=32,
            batch_tokens=512,
        )
    )  # fmt: skip
    return path


# Not that of the other tests, which would be of the other store.
@pytest.fixture(scope="session")
def store(store_path: Path) -> ActivationStore:
    return ActivationStore(store_path)


@pytest.fixture(scope="session")
def parents(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Copy it before changing it."""
    run, _ = train_sweep(
        TrainConfig(
            store=store_path,
            runs=tmp_path_factory.mktemp("parents"),
            name="parents",
            tokens=12_000,
            batch_rows=256,
            coders=(
                {"code": ["binary", "continuous"], "k": 4, "n_latents": 64},
                {"code": "binary", "site": "sae", "k": 4, "n_latents": 64,
                 "hookpoint": "layers.2.mlp"},
            ),
        )
    )  # fmt: skip
    return run
