"""A corpus of words whose latents are known: what each of them fires on is what its name says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bsc.cache.model.ngrams import token_ngrams
from bsc.eval.figures.split_text import SplitText
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.evidence import Texts
from bsc.eval.interp.material import Material, Materials
from bsc.eval.interp.sampling import choose
from bsc.eval.passes.codes import LatentCode

WORDS = 300


class Tokenizer:
    """Token i is the word " w<i>"."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{i}" for i in ids)


def texts(
    documents: int = 60, tokens: int = 200, *, seed: int = 0, length: int = 16, shared: int = 0
) -> Texts:
    """Documents of words with Zipf's frequencies, with a passage that stands in all of them."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(2, WORDS + 2)
    ids = rng.choice(WORDS, size=documents * tokens, p=share / share.sum())
    passage = rng.choice(WORDS, size=shared)
    for document in ids.reshape(documents, tokens):
        document[50 : 50 + shared] = passage
    columns = {
        "token_id": ids.astype(np.uint32),
        "doc_id": np.repeat(np.arange(documents), tokens).astype(np.uint32),
        "position": np.tile(np.arange(tokens), documents).astype(np.uint16),
        "ngram": np.concatenate([token_ngrams(own) for own in ids.reshape(documents, tokens)]),
    }
    split = cast(Any, SimpleNamespace(tokens=columns.__getitem__))
    read = np.ones(len(ids), bool)
    return Texts(SplitText(split, Tokenizer()), read, length=length, seed=seed)


def code_of(
    masks: list[NDArray[np.bool_]], values: NDArray[np.float32] | None = None
) -> LatentCode:
    """A code whose latent i fires where mask i says."""
    rows = [np.flatnonzero(m) for m in masks]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    row = np.concatenate(rows).astype(np.uint32)
    margin = np.ones(len(row), np.float32) if values is None else values[row]
    return LatentCode(offsets, row, margin)


def word_masks(where: Texts, words: list[int]) -> list[NDArray[np.bool_]]:
    """Latents of one word each."""
    return [where.split_text.ids == w for w in words]


def material(
    where: Texts, masks: list[NDArray[np.bool_]], config: InterpConfig | None = None,
    coder: str = "coder", *, values: NDArray[np.float32] | None = None, first_binary: int = 0,
) -> Material:  # fmt: skip
    """Of a coder with these latents."""
    config = config or InterpConfig(excerpt_tokens=16, latents=len(masks))
    code = code_of(masks, values)
    counts = np.diff(code.offsets)
    chosen = choose(
        counts, config.latents, census=config.census_rate * len(where.read),
        min_firings=config.min_firings, seed=config.seed,
    )  # fmt: skip
    return Material(coder, code, counts, len(where.read), chosen, where, first_binary, config)


class Planted:
    """In the place of `Materials`, of coders that are there already."""

    def __init__(self, folder: Path, *coders: Material) -> None:
        self.coders, self.config = coders, coders[0].config
        self.names = self.every_name = [c.coder for c in coders]
        (folder / "interp").mkdir(exist_ok=True, parents=True)
        self.run = SimpleNamespace(folder=folder, interp_folder=folder / "interp")
        self.store = SimpleNamespace(store_id="planted")

    def __iter__(self) -> Iterator[Material]:
        return iter(self.coders)


def materials(folder: Path, *coders: Material) -> Materials:
    return cast(Materials, Planted(folder, *coders))
