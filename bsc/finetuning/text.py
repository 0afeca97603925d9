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
from bsc.cache.store.manifest import TextPoint, committed_windows, read_window
from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config
from bsc.errors import UserError

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
    """Where the capture's last batch of training rows begins that it did not keep all of, or the
    next one. Of several writers, who divide a stream of files among them in ways of their own, so
    many documents are passed over as they read."""
    kept: int = 0
    """Rows of that batch that it kept."""

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
            what = (
                f"corpus {source.corpus}, whose documents are others on this machine (those of its "
                f"Python). Finetune where the store was made."
                if source.corpus is not None
                else "files that have other sizes or times now. Put back what was captured; copies "
                "keep their times with `cp -p` or `rsync -t`."
            )
            raise UserError(
                f"{store.folder}: what was held out may be trained on where the text is another "
                f"one, and it was captured from {what}"
            )
        return cls(source, made["packing"], store.context, *_end_of_capture(store))

    def batches(
        self, tokenizer: Any, contexts: int, start: Place | None = None
    ) -> Iterator[tuple[Place, ContextBatch]]:
        """Whole batches of contexts of training documents, without end.

        Args:
            tokenizer: of the model.
            contexts: in a batch.
            start: place of the first batch; None: behind what the capture kept.

        Yields:
            The place and the batch.

        Raises:
            UserError: the text cannot be read, or gives not one batch.
        """
        epoch, document, offset, rows = start or self.fresh
        at = TextPoint(document, offset, rows)
        if start is None and self.kept:
            at = self._behind(tokenizer, at)
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

    def _behind(self, tokenizer: Any, at: TextPoint) -> TextPoint:
        """The first context behind those that the capture kept; the text's end where none is."""
        rows = 0
        for batch in self._pass(tokenizer, 1, at):
            if rows >= self.kept:
                return batch.point
            rows += len(batch.rows()["token_id"])
        return TextPoint(document=_ALL)

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


def _end_of_capture(store: ActivationStore) -> tuple[Place, int]:
    """Place of the first batch that the capture did not keep all of, and what it kept of it."""
    ends = []
    counts = committed_windows(store.folder, "train", store.writers)
    for rank, count in enumerate(counts):
        last = read_window(store.folder, "train", rank, count - 1) if count else None
        ends += [last.next] if last is not None else []
    if len(ends) == 1:
        (end,) = ends
        return Place(0, end.document, end.offset, end.rows), end.skip
    return Place(0, max((end.document for end in ends), default=-1) + 1), 0
