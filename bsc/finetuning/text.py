"""Training documents of a store's own text, as contexts that are filled as in the capture.

First those that the capture did not come to, which no coder has seen; then the whole text again and
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from bsc.cache.model.text import fingerprint, read_text
from bsc.cache.model.text_source import Packing, TextSource
from bsc.cache.model.tokens import ContextBatch, context_batches
from bsc.cache.store.manifest import TextPoint, windows
from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config
from bsc.errors import UserError
from bsc.progress import console

__all__ = ["Place", "StoreText"]

_ALL = 2**62


class Place(NamedTuple):
    """Where a batch is in the text."""

    epoch: int = 0
    """0: after what the capture read; then passes over the whole text."""
    document: int = 0
    offset: int = 0
    rows: int = 0


@dataclass(frozen=True)
class StoreText:
    """The text that a store was captured from."""

    source: TextSource
    packing: Packing
    context: int
    fresh: Place
    """Where the capture's training rows end. Of several writers, who divide a stream of files among
    them in ways of their own, so many documents are passed over as they read."""

    @classmethod
    def of(cls, store: ActivationStore) -> StoreText:
        """The text of a store, which has to be what it was: which documents are held out depends
        on it.

        Raises:
            UserError: it is not there, or an embedded corpus of other documents.
        """
        made = dict(store.provenance()["capture"])
        values = dict(made["text"])
        was = values.pop("fingerprint", None)
        source = parse_config(TextSource, values, f"{store.folder}/provenance.json")
        try:
            now = fingerprint(source)
        except OSError as error:
            raise UserError(
                f"{store.folder}: captured from {error.filename}, which is not there. Finetuning "
                f"reads the text again: put it back where it was."
            ) from None
        if was is not None and now != was:
            if source.corpus is not None:
                raise UserError(
                    f"{store.folder}: captured from corpus {source.corpus}, whose documents are "
                    f"others on this machine (those of its Python). What was held out may be among "
                    f"them, so they cannot be finetuned on. Finetune where the store was made."
                )
            # A document is held out by its own words, wherever its file is and whenever it changed.
            console.print(f"{store.folder}: its text was changed or moved since the capture")
        return cls(source, made["packing"], store.context, _end_of_capture(store))

    def batches(self, tokenizer: Any, contexts: int, start: Place) -> Iterator[tuple[Place, Any]]:
        """Whole batches of contexts of training documents, without end.

        Args:
            tokenizer: of the model.
            contexts: in a batch.
            start: place of the first batch.

        Yields:
            The place and the batch.

        Raises:
            UserError: the text cannot be read, or gives not one batch.
        """
        epoch = start.epoch
        at = TextPoint(start.document, start.offset, start.rows)
        while True:
            some, whole = False, at == TextPoint()
            for batch in self._pass(tokenizer, contexts, at):
                if len(batch.token_id) < contexts:  # what is left at the end of the text
                    continue
                some = True
                p = batch.point
                yield Place(epoch, p.document, p.offset, p.rows), batch
            if whole and not some:
                raise UserError(
                    f"the training documents of the text give fewer than {contexts} contexts of "
                    f"{self.context} tokens, which is one batch. Give a smaller --batch-tokens, or "
                    f"capture more text."
                )
            epoch, at = epoch + 1, TextPoint()

    def _pass(self, tokenizer: Any, contexts: int, at: TextPoint) -> Iterator[ContextBatch]:
        """Batches to the end of the text. Held-out documents are not even tokenised."""
        return context_batches(
            read_text(self.source),
            tokenizer,
            context=self.context,
            batch=contexts,
            wanted={"train": _ALL},
            packing=self.packing,
            starts={"train": at},
        )


def _end_of_capture(store: ActivationStore) -> Place:
    ends = []
    for rank in range(store.writers):
        ends += [window.next for window in windows(store.folder, "train", rank)][-1:]
    if len(ends) == 1:
        (end,) = ends
        return Place(0, end.document, end.offset, end.rows)
    return Place(0, max((end.document for end in ends), default=-1) + 1)
