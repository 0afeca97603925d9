"""What of the held-out text was trained on is measured at every capture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.overlap import LONG_RUN, measure_overlap
from bsc.cache.model.ngrams import NGRAM, token_ngrams
from bsc.cache.model.sides import is_text_held_out
from bsc.cache.model.text import parse_text
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.store import ActivationStore
from bsc.cache.store.verify import verify
from bsc.describe import describe
from bsc.errors import StoreError
from bsc.formats import percent


def sentences(rng: np.random.Generator, n: int) -> list[str]:
    words = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ake", "ine", "ort", "ull", "and")]
    return [" ".join(rng.choice(words, size=8)) + "." for _ in range(n)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of documents that all hold one notice of some sentences."""
    rng = np.random.default_rng(0)
    notice = " ".join(sentences(rng, 4))
    texts = [" ".join([*sentences(rng, 3), notice, *sentences(rng, 3)]) for _ in range(300)]
    folder = tmp_path_factory.mktemp("overlap")
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    held_out = [t for t in texts if is_text_held_out(t, 0.2)]
    assert 20 < len(held_out) < 150
    source = TextSource(held_out=0.2, **parse_text([str(file)]))
    for writers, store in ((1, "acts"), (2, "two")):
        for rank in range(writers):
            capture(CaptureConfig(
                model="demo", store=folder / store, text=source, hookpoints=("layers.0.mlp",),
                tokens=40_000, held_out_tokens=8_192, context=256, rank=rank, world=writers,
            ))  # fmt: skip
    return folder


def plain(store: ActivationStore) -> tuple[set[int], list[list[int]], list[list[int]]]:
    """Training n-grams, and held-out documents as tokens and rows, from the rows themselves."""
    held = store.held_out
    ids, doc = held.tokens("token_id").tolist(), held.tokens("doc_id")
    rows = [np.flatnonzero(doc == d).tolist() for d in dict.fromkeys(doc.tolist())]
    known = set(store.train.tokens("ngram").tolist()) - {0}
    return known, [[ids[r] for r in own] for own in rows], rows


@pytest.mark.parametrize("name", ["acts", "two"])
def test_seen_rows_are_those_of_n_grams_that_were_trained_on(path: Path, name: str) -> None:
    store = ActivationStore(path / name)
    seen, said = store.seen_rows(), store.overlap
    assert seen is not None and said is not None
    known, documents, rows = plain(store)
    expected = np.zeros(store.held_out.rows, bool)
    ngrams = long_runs = seen_long = 0
    for ids, own in zip(documents, rows, strict=True):
        hashes = token_ngrams(np.array(ids))
        assert np.array_equal(store.held_out.tokens("ngram")[own], hashes)
        hit = [int(h) in known for h in store.held_out.tokens("ngram")[own].tolist()]
        ngrams += int((hashes > 0).sum())
        for i in np.flatnonzero(hit).tolist():
            expected[own[max(0, i - NGRAM + 1) : i + 1]] = True
        for end in range(LONG_RUN - 1, len(ids)):
            long_runs += 1
            seen_long += all(hit[end - LONG_RUN + NGRAM : end + 1])
    assert np.array_equal(seen, expected)
    assert 0.2 < seen.mean() < 0.6  # the notice, and nothing else
    assert said["train_rows"] == store.train.rows and said["seen_rows"] == seen.sum()
    assert (said["ngrams"], said["runs"]) == (ngrams, long_runs)
    assert said["seen_runs"] == seen_long > 0
    facts = describe(path / name)["overlap"]
    assert f"{percent(seen.mean(), 2)} of {store.held_out.rows:,} held-out rows" in facts


def test_every_training_row_carries_its_n_gram_wherever_the_scatter_put_it(path: Path) -> None:
    """By the tokens of each document, which a context at a time are in order of `position`."""
    train = ActivationStore(path / "acts").train
    ids, doc, position, ngram = (
        train.tokens(n).astype(np.int64) for n in ("token_id", "doc_id", "position", "ngram")
    )
    checked = 0
    for d in np.unique(doc):
        own = np.flatnonzero(doc == d)
        order = own[np.argsort(position[own])]
        if not np.array_equal(position[order], np.arange(len(own))):
            continue  # it is in several contexts, whose order is not in the arrays
        expected = token_ngrams(ids[order]).astype(np.int64)
        # Of the last piece of a document, what came before is in another context.
        assert np.array_equal(ngram[order][NGRAM - 1 :], expected[NGRAM - 1 :])
        checked += 1
    assert checked > 3


def test_what_was_measured_is_checked(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "acts"
    shutil.copytree(path / "acts", root)
    assert list(verify(root)) == []
    bits = root / "overlap.bin"
    raw = bytearray(bits.read_bytes())
    raw[5] ^= 4
    bits.write_bytes(raw)
    assert [p for p in verify(root, quick=True) if "overlap.bin: changed" in p]
    with pytest.raises(StoreError, match=r"overlap.bin: changed: it has not the hash"):
        ActivationStore(root).seen_rows()
    bits.unlink()
    assert [p for p in verify(root, quick=True) if "overlap.bin: missing" in p]
    with pytest.raises(StoreError, match=r"overlap.bin: missing"):
        ActivationStore(root).seen_rows()


def test_the_demo_s_corpus_hardly_overlaps(tmp_path: Path) -> None:
    """Codec tables of the standard library are copies of each other; none is held out now."""
    capture(CaptureConfig(
        model="demo", store=tmp_path / "acts", text=TextSource(corpus="stdlib"),
        hookpoints=("layers.0.mlp",), tokens=120_000, held_out_tokens=16_384,
    ))  # fmt: skip
    said = ActivationStore(tmp_path / "acts").overlap
    assert said is not None and said["seen_runs"] <= 0.01 * said["runs"]
    assert measure_overlap(ActivationStore(tmp_path / "acts")) is not None
