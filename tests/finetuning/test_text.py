"""The text of finetuning: training documents of the store's own text, packed as in the capture."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.models import LanguageModel, load_model
from bsc.cache.model.sides import is_text_held_out
from bsc.cache.model.text import read_text
from bsc.cache.model.text_source import Packing, TextSource
from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.finetuning import text as text_module
from bsc.finetuning.text import Place, StoreText


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return load_model(str(tiny_model), revision=None, dtype="bfloat16", device="cpu")


def rows_of_store(store: ActivationStore) -> dict[tuple[int, int], list[int]]:
    """Token ids by document and place in it, of the training rows."""
    arrays = [store.train.tokens(n).astype(np.int64) for n in ("doc_id", "position", "token_id")]
    found: dict[tuple[int, int], list[int]] = {}
    for document, position, token in zip(*arrays, strict=True):
        found.setdefault((int(document), int(position)), []).append(int(token))
    return found


@pytest.mark.parametrize("packing", ["masked", "joined", "none"])
def test_the_first_contexts_are_the_rows_of_the_store(
    tiny_model: Path, tmp_path: Path, lm: LanguageModel, packing: Packing
) -> None:
    capture(
        CaptureConfig(
            model=str(tiny_model), store=tmp_path / "acts", packing=packing, tokens=2_000,
            text=TextSource(corpus="stdlib", held_out=0.2), hookpoints=("layers.2.mlp",),
            held_out_tokens=256, context=32, batch_tokens=512,
        )
    )  # fmt: skip
    store = ActivationStore(tmp_path / "acts")
    rows, text = rows_of_store(store), StoreText.of(store)
    assert text.packing == packing
    left = store.train.rows
    for _, batch in text.batches(lm.tokenizer, 16, Place()):
        own = batch.rows()
        for document, position, token in zip(
            own["doc_id"][:left], own["position"][:left], own["token_id"][:left], strict=True
        ):
            rows[int(document), int(position)].remove(int(token))
        left -= len(own["doc_id"])
        if left <= 0:
            break
    assert not any(rows.values())  # each row of the store was met, and none was met twice


def test_it_begins_with_documents_that_the_capture_did_not_come_to(
    store: ActivationStore, lm: LanguageModel
) -> None:
    text = StoreText.of(store)
    assert text.fresh.rows + text.kept == store.train.rows and text.kept > 0
    batches = list(islice(text.batches(lm.tokenizer, 16), 20))
    place, first = batches[0]
    assert 0 <= place.rows - store.train.rows < store.context  # whole contexts
    trained = set(store.train.tokens("doc_id").tolist())
    later = set().union(*(set(np.unique(b.doc_id).tolist()) for _, b in batches[1:]))
    # The last document of the capture goes on.
    assert not trained & later - {int(first.doc_id[-1, -1])}
    whole = list(islice(text.batches(lm.tokenizer, 1, Place()), 400))
    at = next(i for i, (p, _) in enumerate(whole) if p.rows == place.rows)
    for (_, one), expected in zip(whole[at:], first.token_id, strict=False):
        assert np.array_equal(one.token_id[0], expected)


def test_a_held_out_document_never_appears(store: ActivationStore, lm: LanguageModel) -> None:
    """In more than a whole pass over the text, by number and by its words."""
    text = StoreText.of(store)
    held_out = {d.number for d in read_text(text.source) if d.held_out}
    ngrams = set(store.held_out.tokens("ngram").tolist()) - {0}
    seen: set[int] = set()
    alike = total = 0
    for place, batch in text.batches(lm.tokenizer, 512, Place()):
        if place.epoch == 1:
            break
        seen.update(np.unique(batch.doc_id).tolist())
        found = batch.ngram[batch.ngram != 0]
        alike += int(np.isin(found, np.fromiter(ngrams, np.uint64)).sum())
        total += len(found)
    assert len(seen) > 500 and len(held_out) > 50 and not seen & held_out
    # Licences and the like stand in many files; whole documents do not (ADR 13).
    assert alike < 0.001 * total


def test_a_test_of_leaks_that_can_fail(
    store: ActivationStore, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_training(source: TextSource) -> object:
        return (d._replace(held_out=False) for d in read_text(source))

    monkeypatch.setattr(text_module, "read_text", all_training)
    with pytest.raises(AssertionError):
        test_a_held_out_document_never_appears(store, lm)


def test_it_goes_on_from_a_place_and_begins_again_at_the_end(
    tmp_path: Path, tiny_model: Path, lm: LanguageModel
) -> None:
    words = [f"document {i} " + "of some words " * (i % 7 + 1) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": w}) for w in words))
    capture(
        CaptureConfig(
            model=str(tiny_model), store=tmp_path / "acts", tokens=256, held_out_tokens=32,
            text=TextSource(files=(str(tmp_path / "a.jsonl"),), held_out=0.2), context=16,
            hookpoints=("layers.2.mlp",), batch_tokens=64,
        )
    )  # fmt: skip
    text = StoreText.of(ActivationStore(tmp_path / "acts"))
    whole = list(islice(text.batches(lm.tokenizer, 4, Place()), 30))
    assert whole[-1][0].epoch >= 1
    assert {len(b.token_id) for _, b in whole} == {4}
    first = sum(place.epoch == 0 for place, _ in whole)
    assert np.array_equal(whole[first][1].token_id, whole[0][1].token_id)
    for at in (1, 3, first - 1, first, first + 2):
        again = islice(text.batches(lm.tokenizer, 4, whole[at][0]), 5)
        for (place, batch), (expected, other) in zip(again, whole[at : at + 5], strict=True):
            assert place == expected and np.array_equal(batch.token_id, other.token_id)
            assert np.array_equal(batch.position, other.position)
    for document in read_text(text.source):  # the rule is that of the capture
        assert document.held_out == is_text_held_out(document.text, 0.2)
    with pytest.raises(UserError, match="fewer than 4096 contexts of 16 tokens"):
        next(text.batches(lm.tokenizer, 4096, Place()))
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="files that have other sizes or times now"):
        StoreText.of(ActivationStore(tmp_path / "acts"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl, which is not there"):
        StoreText.of(ActivationStore(tmp_path / "acts"))


def test_a_corpus_of_other_documents_is_refused(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "fingerprint", lambda source: "another")
    with pytest.raises(UserError, match="what was held out may be trained on"):
        StoreText.of(store)
