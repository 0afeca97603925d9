"""What a capture is asked for. Imports neither torch nor zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from bsc.cache.model.text_source import Packing, TextSource
from bsc.cache.store.kinds import Codec
from bsc.config import Config
from bsc.counts import parse_count
from bsc.options import MACHINE, option

__all__ = ["CaptureConfig"]

_MODEL, _ROWS, _STORE = "Model", "What is captured", "How it is stored"


class CaptureConfig(Config):
    """What to capture and where to put it."""

    model: str = option(
        ..., "'demo', a short name (SmolLM2-135M), a folder, or a hub id (owner/name).", _MODEL
    )
    store: str | Path = option(
        "acts", "Folder of the store, or s3://bucket/path; one begun is gone on with.", _STORE
    )
    text: TextSource
    """Where the text comes from."""

    hookpoints: tuple[str, ...] = option(
        (),
        "Module names relative to the base model, with * and {a,b}: 'layers.{0,9,18,27}.mlp'; a@b "
        "takes the input of a and the output of b. `bsc modules MODEL` lists what there is.",
        _ROWS,
        shown="the MLPs at 0, 30, 60 and 90 % of the depth",
    )
    tokens: int = option(
        10_000_000, "Training tokens to capture: 500000, 10M, 1B.", _ROWS, ge=1, parser=parse_count
    )
    """At most 1 % fewer are captured."""
    held_out_tokens: int | None = option(
        None,
        "Tokens of held-out documents to capture.",
        _ROWS,
        ge=0,
        parser=parse_count,
        shown="the held-out share of --tokens, at most 1,048,576",
    )
    context: int | None = option(
        None, "Tokens in a context.", _ROWS, ge=1, shown="the model's, at most 2048"
    )
    packing: Packing = option(
        "masked",
        "masked: documents share contexts and do not see each other; joined: they do; none: a "
        "context per document.",
        _ROWS,
    )
    max_non_finite: float = option(
        1e-6, "Share of rows with NaN or inf above which to stop.", _ROWS, ge=0, le=1
    )
    codec: Codec = option(
        "raw", "raw, lz4 (exact, about a quarter smaller) or int8 (half, FVU about 1e-4).", _STORE
    )
    window: int = option(64, "Shards that rows are scattered over at a time.", _STORE, ge=1)
    ring: int | None = option(
        None,
        "Training shards on disk at most; the capture waits for training runs that read them at "
        "the same time.",
        _STORE,
        shown="all of them stay",
    )
    revision: str | None = option(None, "Revision of the model on the hub.", _MODEL)
    random_weights: int | None = option(
        None, "Seed of untrained weights instead of the model's: a control.", _MODEL
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Type of the model's arithmetic: auto, float32, bfloat16 or float16.", _MODEL
    )
    """auto: that of the checkpoint, but float32 for bfloat16 on a CPU that has no instructions for
    it. Rows are stored as bfloat16 whatever it is."""
    batch_tokens: int | None = option(
        None, "Tokens in a forward pass.", MACHINE, ge=1, shown="8,192 on a CPU, 65,536 on a GPU"
    )
    rank: int = option(0, "Number of this process.", MACHINE, ge=0, shown="torchrun's, or 0")
    world: int = option(
        1, "Processes that write the store.", MACHINE, ge=1, shown="torchrun's, or 1"
    )
    device: str | None = option(
        None, "cpu, cuda or cuda:1.", MACHINE, shown="a GPU where there is one"
    )
    seed: int = option(0, "Seed of the order of documents and rows.", "Text", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fits(self) -> CaptureConfig:
        if self.rank >= self.world:
            raise ValueError(
                f"--rank {self.rank}: ranks of {self.world} processes go from 0 to {self.world - 1}"
            )
        if self.held_out_tokens and not self.text.held_out:
            raise ValueError(
                "--held-out 0 holds out no document, so --held-out-tokens has none to capture"
            )
        if self.ring is not None and "://" in str(self.store):
            raise ValueError(
                "--ring needs a file system; object storage has no bound to keep within"
            )
        return self
