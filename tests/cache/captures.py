"""Small captures, the same for every test of kills and faults."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource

__all__ = ["config_of", "text_of"]


def text_of(model: str, held_out: float = 0.2) -> TextSource:
    """A corpus beside the model: 300 documents of different lengths."""
    path = Path(model).parent / "corpus.jsonl"
    if not path.exists():
        rng = random.Random(0)
        words = ["alpha", "beta", "gamma", "delta", "(x)", "return", "import", "None", "\n"]
        lines = [
            json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(1, 90)))})
            for _ in range(300)
        ]
        path.write_text("\n".join(lines))
    return TextSource(files=(str(path),), held_out=held_out)


def config_of(model: str, store: Path, **other: object) -> CaptureConfig:
    """Three windows of six shards, and held-out shards between them."""
    fields: dict[str, object] = {
        "text": text_of(model), "hookpoints": ("layers.1.mlp",),
        "tokens": 3_600, "held_out_tokens": 1_200, "context": 32, "batch_tokens": 256, "window": 6,
    }  # fmt: skip
    # A dict has one type for all its values; pydantic checks each of them.
    return CaptureConfig(model=model, store=store, **(fields | other))  # type: ignore[arg-type]
