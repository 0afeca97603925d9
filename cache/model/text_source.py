"""Where text comes from and how contexts are filled with it. Imports neither torch nor datasets."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from bsc.config import Config
from bsc.embedded.held_out import HELD_OUT_FRACTION
from bsc.options import option

__all__ = ["PACKINGS", "Packing", "TextSource"]

Packing = Literal["masked", "joined", "none"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)

_TEXT = "Text"


class TextSource(Config):
    """Where text comes from. Exactly one of corpus, files and dataset is set."""

    corpus: str | None = None
    """An embedded corpus: ``"stdlib"`` or ``"env"``."""
    files: tuple[str, ...] = option(
        (),
        "'stdlib', 'env', or files and folders (txt, jsonl, parquet, arrow); may be given several "
        "times.",
        _TEXT,
        flag="--text",
        shown="what goes with the model",
    )
    """Local files: txt and md (a file is a document), jsonl, json, parquet, arrow."""
    dataset: str | None = option(None, "Dataset on the hub (owner/name).", _TEXT)
    config_name: str | None = option(
        None, "Configuration of the dataset on the hub.", _TEXT, flag="--dataset-config"
    )
    revision: str | None = option(
        None, "Revision of the dataset on the hub.", _TEXT, flag="--dataset-revision"
    )
    split: str = option("train", "Split of the dataset on the hub.", _TEXT)
    column: str = option(
        "text", "Column that has text, chat messages (role and content) or token ids.", _TEXT
    )
    held_out: float = option(
        HELD_OUT_FRACTION,
        "Share of the documents that is held out from training.",
        _TEXT,
        ge=0,
        lt=1,
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of the documents."""

    @model_validator(mode="after")
    def _one(self) -> TextSource:
        given = [self.corpus is not None, bool(self.files), self.dataset is not None]
        if sum(given) != 1:
            raise ValueError("text comes from one of corpus, files and dataset")
        return self

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        return {k: v for k, v in dict(self).items() if v not in (None, ())}
