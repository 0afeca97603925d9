"""Small real things to test with: a tiny random model, and a store captured from it."""

from __future__ import annotations

import os

# Workers of pytest-xdist share the cores: one thread each, and in the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bsc.embedded
from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.embedded.corpus import documents
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.trainer import train_sweep

EMBEDDED = Path(bsc.embedded.__path__[0]) / "model"


def make_model(folder: Path, **shape: float) -> Path:
    """A Llama model with random weights and the embedded tokenizer, saved as transformers does."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **shape,
    }
    model = LlamaForCausalLM(LlamaConfig(**fields))
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def store_path(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two hookpoints, 6,000 rows. Copy it before changing it."""
    path = tmp_path_factory.mktemp("stores") / "acts"
    capture(
        CaptureConfig(
            model=str(tiny_model),
            store=path,
            text=TextSource(corpus="stdlib", held_out=0.2),
            hookpoints=("layers.{0,2}.mlp",),
            tokens=6_000,
            held_out_tokens=2_000,
            context=32,
            batch_tokens=512,
        )
    )
    return path


def capture_short(tiny_model: Path, folder: Path) -> Path:
    """A store of many short documents, for figures that are sums over documents."""
    texts = [d.text[i : i + 150] for d in documents("stdlib") if d.name.startswith("stdlib/email")
             for i in range(0, len(d.text), 300)]  # fmt: skip
    (folder / "short.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    capture(
        CaptureConfig(
            model=str(tiny_model), store=folder / "acts", hookpoints=("layers.{0,2}.mlp",),
            text=TextSource(files=(str(folder / "short.jsonl"),), held_out=0.2), tokens=6_000,
            held_out_tokens=2_000, context=32, batch_tokens=512,
        )
    )  # fmt: skip
    return folder / "acts"


@pytest.fixture(scope="session")
def store(store_path: Path) -> ActivationStore:
    return ActivationStore(store_path)


@pytest.fixture
def store_copy(store_path: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store_path, tmp_path / "acts")


def train_small(store_path: Path, runs: Path) -> Run:
    """A trained run: binary and continuous, every site, two k."""
    run, _ = train_sweep(
        TrainConfig(
            store=store_path,
            runs=runs,
            name="small",
            tokens=12_000,
            batch_rows=256,
            coders=(
                {
                    "hookpoint": "layers.2.mlp",
                    "site": ["sae", "transcoder", "skip_transcoder"],
                    "code": ["binary", "continuous"],
                    "k": [4],
                    "n_latents": 64,
                },
                {"hookpoint": "layers.2.mlp", "code": ["binary", "continuous"], "k": 8,
                 "n_latents": 64},
            ),
        )
    )  # fmt: skip
    return run


@pytest.fixture(scope="session")
def run(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of `train_small`. Copy it before changing it."""
    return train_small(store_path, tmp_path_factory.mktemp("runs"))
