"""Documents to batches of token contexts, ready for the model.

Three ways to fill contexts (`packing`):

* masked: documents are joined and cut into contexts of one length; every document attends to itself
  alone and its positions begin at 0. No padding, every row real.
* joined: the same, but attention and positions run across documents, as most models were trained
  and most tools of the field capture.
* none: a context is one document, or a piece of a longer one. Short ones are padded for the model;
  padding is never stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.cache.model.ngrams import token_ngrams
from bsc.cache.model.text import TextDocument
from bsc.cache.model.text_source import Packing
from bsc.cache.store.kinds import Split
from bsc.cache.store.layout import TOKEN_ARRAYS
from bsc.cache.store.manifest import TextPoint
from bsc.errors import UserError

__all__ = ["ContextBatch", "context_batches", "tokenise"]

_DOCUMENTS_AT_ONCE = 128
_MAX_CHARACTERS = 250_000
"""Text that is enough to be tokenised at once: the model waits for the first of it."""


class ContextBatch(NamedTuple):
    """Contexts of one split. Arrays are (contexts, length)."""

    split: Split
    token_id: NDArray[np.int64]
    doc_id: NDArray[np.int64]
    position: NDArray[np.int64]
    """Position of the token from 0 in its context, or with packing masked in its document's part of
    it."""
    ngram: NDArray[np.uint64]
    """Hash of the 16 tokens of the document that end here, or 0 (model/ngrams.py)."""
    real: NDArray[np.bool_] | None
    """Which tokens are not padding; None: all."""
    point: TextPoint
    """Where in the text the batch begins."""

    def rows(self) -> dict[str, NDArray[Any]]:
        """The token arrays of its rows, (rows,) each: what is stored."""
        arrays = {n: getattr(self, n) for n in TOKEN_ARRAYS}
        return {n: a.reshape(-1) if self.real is None else a[self.real] for n, a in arrays.items()}


class _Tokens(NamedTuple):
    """Tokens of a document that follow each other."""

    ids: NDArray[np.int64]
    ngrams: NDArray[np.uint64]
    document: int
    offset: int
    """Place of the first one in the document."""

    def part(self, start: int, stop: int) -> _Tokens:
        return _Tokens(
            self.ids[start:stop], self.ngrams[start:stop], self.document, self.offset + start
        )


class _Packer:
    """Collects the documents of one split and gives batches of contexts."""

    def __init__(
        self, split: Split, context: int, batch: int, packing: Packing, start: TextPoint
    ) -> None:
        self.split, self.context, self.batch, self.packing = split, context, batch, packing
        self.start = start
        self._pieces: deque[_Tokens] = deque()
        """Tokens that wait."""
        self.waiting = 0
        """Tokens that wait; with packing none, contexts."""
        self.rows = start.rows
        """Rows given so far."""
        self.added = start.rows - start.offset
        """Tokens of all documents so far."""

    def add(self, ids: NDArray[np.int64], document: int) -> None:
        self.added += len(ids)
        offset = self.start.offset if document == self.start.document else 0
        tokens = _Tokens(ids, token_ngrams(ids), document, 0).part(offset, len(ids))
        left = len(tokens.ids)
        if self.packing == "none":
            for at in range(0, left, self.context):
                self._pieces.append(tokens.part(at, at + self.context))
                self.waiting += 1
        elif left:
            self._pieces.append(tokens)
            self.waiting += left

    def full_batches(self) -> Iterator[ContextBatch]:
        size = self.batch if self.packing == "none" else self.batch * self.context
        while self.waiting >= size:
            yield self._take(self.batch)

    def last_batch(self) -> Iterator[ContextBatch]:
        contexts = self.waiting if self.packing == "none" else self.waiting // self.context
        if contexts:
            yield self._take(contexts)

    def _take(self, contexts: int) -> ContextBatch:
        first = self._pieces[0]
        # Going on, rows of the first batch are committed already.
        skip = self.start.skip if self.rows == self.start.rows else 0
        point = TextPoint(first.document, first.offset, self.rows, skip)
        batch = self._take_padded(contexts) if self.packing == "none" else self._take_full(contexts)
        token_id, doc_id, position, ngram, real = batch
        self.rows += token_id.size if real is None else int(real.sum())
        return ContextBatch(self.split, token_id, doc_id, position, ngram, real, point)

    def _take_full(self, contexts: int) -> tuple[Any, Any, Any, Any, None]:
        wanted = contexts * self.context
        self.waiting -= wanted
        ids, docs = np.empty(wanted, np.int64), np.empty(wanted, np.int64)
        ngrams, starts = np.empty(wanted, np.uint64), np.zeros(wanted, bool)
        at = 0
        while at < wanted:
            piece = self._pieces.popleft()
            n = min(len(piece.ids), wanted - at)
            ids[at : at + n], ngrams[at : at + n] = piece.ids[:n], piece.ngrams[:n]
            docs[at : at + n], starts[at] = piece.document, True
            if n < len(piece.ids):
                self._pieces.appendleft(piece.part(n, len(piece.ids)))
            at += n
        shape = (contexts, self.context)
        position = np.broadcast_to(np.arange(self.context), shape)
        if self.packing == "masked":
            first = np.where(starts.reshape(shape), position, 0)
            position = position - np.maximum.accumulate(first, axis=1)
        return ids.reshape(shape), docs.reshape(shape), position, ngrams.reshape(shape), None

    def _take_padded(self, contexts: int) -> tuple[Any, Any, Any, Any, NDArray[np.bool_]]:
        self.waiting -= contexts
        pieces = [self._pieces.popleft() for _ in range(contexts)]
        shape = (contexts, max(len(piece.ids) for piece in pieces))
        token_id, doc_id = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        ngram, real = np.zeros(shape, np.uint64), np.zeros(shape, bool)
        for i, piece in enumerate(pieces):
            own = slice(len(piece.ids))
            token_id[i, own], ngram[i, own] = piece.ids, piece.ngrams
            doc_id[i], real[i, own] = piece.document, True
        return token_id, doc_id, np.broadcast_to(np.arange(shape[1]), shape), ngram, real


def _document_groups(source: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    """Groups that are small enough to tokenise at once."""
    group: list[TextDocument] = []
    characters = 0
    for document in source:
        group.append(document)
        characters += len(document.text)
        if len(group) == _DOCUMENTS_AT_ONCE or characters >= _MAX_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of documents, with the special tokens that the tokenizer itself adds.

    One that adds none gets its BOS, else its EOS, before each document: a separator that models of
    this kind were trained with. The tokenizer works on all cores.
    """
    own = bool(tokenizer("", verbose=False)["input_ids"])
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=own, return_attention_mask=False, verbose=False
    )["input_ids"]
    if own:
        return encoded
    begin = tokenizer.bos_token_id
    if begin is None:
        begin = tokenizer.eos_token_id
    return encoded if begin is None else [[begin, *ids] for ids in encoded]


def _encode(tokenizer: Any, group: list[TextDocument]) -> Iterator[list[int]]:
    """Token ids of documents: of text by the tokenizer, of chats by the model's own template, which
    has the special tokens in it, and of ids themselves.

    Raises:
        UserError: there is no template, or it refuses, or there is no such token.
    """
    plain = iter(tokenise(tokenizer, [d.text for d in group if d.given is None] or [""]))
    for document in group:
        given: Any = document.given
        if given is None:
            yield next(plain)
        elif isinstance(given[0], int):
            if max(given) >= len(tokenizer):
                raise UserError(
                    f"--column: document {document.number} has token id {max(given)}, but the "
                    f"model's tokenizer has {len(tokenizer)} tokens: ids of another model."
                )
            yield given
        else:
            yield _of_chat(tokenizer, document)


def _of_chat(tokenizer: Any, document: TextDocument) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            "--column: chat messages, but the tokenizer of this model has no chat template. Take a "
            "model that was trained on chats, or a column of text."
        )
    try:
        text = tokenizer.apply_chat_template(document.given, tokenize=False)
    except Exception as error:  # a template raises what it likes
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"--column: the chat template of the model refuses document {document.number}: "
            f"{first_line[:200]}"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def context_batches(
    source: Iterable[TextDocument],
    tokenizer: Any,
    *,
    context: int,
    batch: int,
    wanted: Mapping[Split, int],
    packing: Packing = "masked",
    starts: Mapping[Split, TextPoint] | None = None,
) -> Iterator[ContextBatch]:
    """Tokenise documents and fill contexts, training and held-out ones apart.

    Args:
        source: documents in the order in which they are to be captured.
        tokenizer: of the model, a transformers tokenizer.
        context: tokens in a context, at most.
        batch: contexts in a batch; the last batch of a split has fewer.
        wanted: rows that each split is to get. Documents of a split that has them are skipped,
            and the source is read until every split has, or ends.
        packing: how contexts are filled.
        starts: where to go on, by split: the batches are those that follow there in a run from the
            beginning. Documents before are read but not tokenised.

    Yields:
        Batches in the order in which they fill; in all at least the rows wanted of a split, up to
        a batch more, where the text has them.
    """
    packers: dict[Split, _Packer] = {
        split: _Packer(split, context, batch, packing, (starts or {}).get(split, TextPoint()))
        for split in wanted
    }

    def open_packer(document: TextDocument) -> _Packer | None:
        packer = packers.get("held_out" if document.held_out else "train")
        if packer is None or document.number < packer.start.document:
            return None
        return packer if packer.added < wanted[packer.split] + context else None

    for group in _document_groups(d for d in source if open_packer(d)):
        for document, ids in zip(group, _encode(tokenizer, group), strict=True):
            if packer := open_packer(document):
                packer.add(np.array(ids, dtype=np.int64), document.number)
                yield from packer.full_batches()
        if all(p.added >= wanted[s] + context for s, p in packers.items()):
            break
    for packer in packers.values():
        yield from packer.last_batch()
