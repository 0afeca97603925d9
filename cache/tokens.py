"""Documents to token contexts of one length, ready for the model.

The documents of a split are joined, each after a begin-of-text token (the tokenizer's BOS, else its
EOS, else nothing), and cut into contexts of exactly `context` tokens: no padding, every row real.
What a last context lacks is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsc.cache.layout import Split
from bsc.cache.text import TextDocument

__all__ = ["ContextBatch", "context_batches"]

_DOCUMENTS_AT_ONCE = 128
_MAX_CHARACTERS = 8_000_000
"""Text tokenised at once at most, whatever the length of documents."""


class ContextBatch(NamedTuple):
    """Contexts of one split, all of one length. Arrays are (contexts, length)."""

    split: Split
    token_id: NDArray[np.int64]
    doc_id: NDArray[np.int64]
    position: NDArray[np.int64]
    """Of the token in its context, from 0."""


class _Packer:
    """Joins the documents of one split and gives whole contexts."""

    def __init__(self, split: Split, context: int) -> None:
        self.split, self.context = split, context
        self._ids: list[NDArray[np.int64]] = []
        self._docs: list[NDArray[np.int64]] = []
        self.length = 0
        """Tokens that wait for their context to fill."""
        self.added = 0
        """Tokens of all documents so far."""

    def add(self, ids: NDArray[np.int64], document: int) -> None:
        self._ids.append(ids)
        self._docs.append(np.full(len(ids), document))
        self.length += len(ids)
        self.added += len(ids)

    def take(self, n_contexts: int) -> ContextBatch:
        ids, docs = np.concatenate(self._ids), np.concatenate(self._docs)
        n = n_contexts * self.context
        self._ids, self._docs = [ids[n:]], [docs[n:]]
        self.length -= n
        shape = (n_contexts, self.context)
        return ContextBatch(
            self.split,
            ids[:n].reshape(shape),
            docs[:n].reshape(shape),
            np.broadcast_to(np.arange(self.context), shape),
        )


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


def context_batches(
    source: Iterable[TextDocument],
    tokenizer: Any,
    *,
    context: int,
    batch: int,
    wanted: Mapping[Split, int],
) -> Iterator[ContextBatch]:
    """Tokenise documents and pack them, training and held-out ones apart.

    Args:
        source: documents in the order in which they are to be captured.
        tokenizer: of the model, a transformers tokenizer.
        context: tokens in a context.
        batch: contexts in a batch; the last batch of a split has fewer.
        wanted: tokens that each split is to get. Documents of a split that has them are skipped,
            and the source is read until every split has, or ends.

    Yields:
        Batches in the order in which they fill; in all at least the tokens wanted of a split, up
        to a batch more, where the text has them.
    """
    begin = tokenizer.bos_token_id
    if begin is None:
        begin = tokenizer.eos_token_id
    prefix = [] if begin is None else [begin]
    packers: dict[Split, _Packer] = {split: _Packer(split, context) for split in wanted}

    def open_packer(document: TextDocument) -> _Packer | None:
        packer = packers.get("held_out" if document.held_out else "train")
        return packer if packer and packer.added < wanted[packer.split] + context else None

    for group in _document_groups(d for d in source if open_packer(d)):
        encoded = tokenizer(
            [d.text for d in group],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for document, ids in zip(group, encoded, strict=True):
            if packer := open_packer(document):
                packer.add(np.array([*prefix, *ids], dtype=np.int64), document.number)
                while packer.length >= batch * context:
                    yield packer.take(batch)
        if all(p.added >= wanted[s] + context for s, p in packers.items()):
            break
    for packer in packers.values():
        if packer.length >= context:
            yield packer.take(packer.length // context)
