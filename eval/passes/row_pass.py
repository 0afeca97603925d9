"""One pass over the held-out rows of a store for all coders of a run at once.

Rows are read once for each hookpoint, and every coder encodes them while they are in memory. What
is kept are sums (for FVU, in float64) and the codes themselves (codes.py), piece by piece, so
that an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bsc.cache.store.split import StoreSplit
from bsc.errors import StoreError
from bsc.eval.passes.batches import RowBatch, piece_ranges, row_batches
from bsc.eval.passes.controls import Calibration, binarised, quantised
from bsc.eval.passes.pieces import Arrays, Pieces
from bsc.eval.passes.sums import add_to
from bsc.train.coders.coder import Code, SparseCoder

__all__ = ["Sums", "add_up", "pass_over_rows"]


class _CoderPiece:
    """Sums and code of one coder over one piece."""

    def __init__(self, coder: SparseCoder, calibration: Calibration | None, documents: int) -> None:
        self.coder, self.calibration = coder, calibration
        device, d_out = coder.W_enc.device, coder.config.d_out
        self.kinds = ["coder", "skip"]
        if calibration is not None:
            self.kinds += ["binarised", "quantised"]
        self.channel = {
            k: torch.zeros(d_out, dtype=torch.float64, device=device) for k in self.kinds
        }
        self.by_document = {
            k: torch.zeros(documents, dtype=torch.float64, device=device) for k in self.kinds
        }
        self.unseen = torch.zeros(documents, dtype=torch.float64, device=device)
        self.counts = torch.zeros(coder.config.n_latents, dtype=torch.int64)
        none = torch.empty(0, dtype=torch.int64)
        self.entries = [(none, none, none.int(), none.float())]
        """By batch: numbers of its rows, firings of each, and of each firing latent and margin."""

    def add(self, batch: RowBatch, x: Tensor, y: Tensor, document: Tensor, unseen: Tensor) -> None:
        coder, calibration = self.coder, self.calibration
        code = coder.encode(x)
        rest = y - coder.skip(x)
        errors = {"skip": rest, "coder": rest - coder.latent_sum(code)}
        if calibration is not None:
            for kind, edit in (("binarised", binarised), ("quantised", quantised)):
                errors[kind] = rest - coder.latent_sum(edit(coder, calibration, code))
        for kind, error in errors.items():
            squared = error.square()
            self.channel[kind] += squared.sum(dim=0, dtype=torch.float64)
            by_row = squared.sum(dim=1, dtype=torch.float64)
            add_to(self.by_document[kind], document, by_row)
            if kind == "coder":
                add_to(self.unseen, document, by_row * unseen)
        self._keep(code, batch.number)

    def _keep(self, code: Code, index: Tensor) -> None:
        # On the host, in one transfer: of a mask on a GPU every use as an index would wait for it.
        latent = torch.where(code.value != 0, code.latent, -1).int()
        margin = code.margin.float()
        if latent.device.type != "cpu":
            latent, bits = torch.stack([latent, margin.view(torch.int32)]).cpu()
            margin = bits.view(torch.float32)
        on = latent >= 0
        latent, margin = latent[on], margin[on]
        self.counts += torch.bincount(latent, minlength=len(self.counts))
        self.entries.append((index, on.sum(dim=1), latent, margin))

    def sums(self) -> Arrays:
        found = {f"{k}/channel": v.cpu().numpy() for k, v in self.channel.items()}
        found |= {f"{k}/block": v.cpu().numpy() for k, v in self.by_document.items()}
        return found | {"counts": self.counts.numpy(), "unseen": self.unseen.cpu().numpy()}

    def code(self, start: int) -> Arrays:
        wide = self.coder.config.n_latents > 1 << 16
        index, firings, latent, margin = (
            torch.cat([e[i] for e in self.entries]).numpy() for i in range(4)
        )
        return {
            "first_row": np.array([start]),
            "row": (index - start).astype(np.uint32).repeat(firings),
            "latent": latent.astype(np.uint32 if wide else np.uint16),
            "margin": margin,
        }


def _mean_output(
    split: StoreSplit, hookpoint: str, without_tokens: Collection[int], max_rows: int | None
) -> Tensor:
    """Mean output row, (d_out,) float64, of the rows that are evaluated."""
    damaged = any(split.non_finite_rows(f"{hookpoint}/{side}") for side in ("input", "output"))
    if max_rows is None and not without_tokens and not damaged:
        return split.moments(f"{hookpoint}/output").mean
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for batch in row_batches(split, hookpoint, 1, without_tokens, last=max_rows):
        total = total + batch.y.double().sum(dim=0)
        rows += len(batch.y)
    if rows == 0:
        raise StoreError(f"{split.where}: no row of {hookpoint} is left to evaluate on.")
    return total / rows


class _Totals:
    """Sums over the rows of one piece that every coder's errors are divided by."""

    def __init__(
        self, mean: Tensor, document: NDArray[np.int64], unseen: NDArray[np.bool_] | None
    ) -> None:
        """Begin at 0.

        Args:
            mean: (d_out,) mean output over all rows, float64.
            document: (rows,) document of each row of the piece.
            unseen: (rows,) which rows were not seen in training; None: all.
        """
        self.mean, device = mean, mean.device
        self.first = int(document.min())
        self.documents = int(document.max()) - self.first + 1
        self._document = torch.from_numpy(document) - self.first
        self._unseen = torch.ones(len(document), dtype=torch.float64)
        if unseen is not None:
            self._unseen = torch.from_numpy(unseen).double()
        self.channel = torch.zeros_like(mean)
        self.by_document, self.rows, self.unseen, self.unseen_rows = (
            torch.zeros(self.documents, dtype=torch.float64, device=device) for _ in range(4)
        )

    def add(self, y: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows; their documents, and 1 where they were not seen in training.

        Args:
            y: (N, d_out) outputs.
            number: (N,) their numbers in the piece.
        """
        of_row = self._document[number].to(self.mean.device)
        unseen = self._unseen[number].to(self.mean.device)
        squared = (y.double() - self.mean).square()
        self.channel += squared.sum(dim=0)
        add_to(self.by_document, of_row, squared.sum(dim=1))
        self.rows += torch.bincount(of_row, minlength=self.documents)
        add_to(self.unseen, of_row, squared.sum(dim=1) * unseen)
        add_to(self.unseen_rows, of_row, unseen)
        return of_row, unseen

    def arrays(self) -> Arrays:
        """The sums, by name."""
        return {
            "first_block": np.array([self.first]),
            "block_rows": self.rows.cpu().numpy(),
            "total/channel": self.channel.cpu().numpy(),
            "total/block": self.by_document.cpu().numpy(),
            "total/unseen": self.unseen.cpu().numpy(),
            "unseen_rows": self.unseen_rows.cpu().numpy(),
        }


@torch.inference_mode()
def pass_over_rows(
    coders: Mapping[str, SparseCoder],
    calibrations: Mapping[str, Calibration],
    split: StoreSplit,
    hookpoint: str,
    *,
    document: NDArray[np.int64],
    pieces: Pieces,
    codes: Mapping[str, Pieces],
    seen: NDArray[np.bool_] | None = None,
    max_rows: int | None = None,
    without_tokens: Collection[int] = (),
) -> Generator[int]:
    """Encode every row with every coder of a hookpoint; yields the rows of each piece when done.

    Args:
        coders: by name, all on one device.
        calibrations: of those whose values are also binarised and quantised.
        split: rows to evaluate on, normally the held-out ones.
        hookpoint: module whose rows they are.
        document: (rows,) number of each row's document, which intervals are resampled by.
        pieces: where the sums go.
        codes: where the code of each coder goes.
        seen: (rows,) whether a row's text was trained on word for word; None: not known.
        max_rows: rows to evaluate on at most.
        without_tokens: token ids whose rows are left out, as they were in training.
    """
    widest = max(c.config.n_latents for c in coders.values())
    weights = next(iter(coders.values())).W_enc
    device, dtype = weights.device, weights.dtype
    ranges = piece_ranges(split, max_rows)
    todo = {
        i
        for i in range(len(ranges))
        if not (pieces.done(i) and all(codes[name].done(i) for name in coders))
    }
    mean = _mean_output(split, hookpoint, without_tokens, max_rows).to(device) if todo else None
    for piece, (first, last) in enumerate(ranges):
        if piece in todo:
            assert mean is not None
            unseen = None if seen is None else ~seen[first:last]
            totals = _Totals(mean, document[first:last], unseen)
            work = {
                n: _CoderPiece(c, calibrations.get(n), totals.documents) for n, c in coders.items()
            }
            for batch in row_batches(
                split, hookpoint, widest, without_tokens, first=first, last=last
            ):
                x, y = batch.x.to(device, dtype), batch.y.to(device, dtype)
                of_row, is_unseen = totals.add(y, batch.number - first)
                for one in work.values():
                    side = y if one.coder.config.side == "output" else x
                    one.add(batch, side, y, of_row, is_unseen)
            for name, one in work.items():
                codes[name].write(piece, one.code(first))
            sums = totals.arrays()
            for i, one in enumerate(work.values()):
                sums |= {f"{i}/{key}": value for key, value in one.sums().items()}
            pieces.write(piece, sums)
        yield last - first


class Sums(NamedTuple):
    """Sums of one coder over all pieces."""

    channel: dict[str, NDArray[Any]]
    """By kind (total, coder, skip, and binarised, quantised): (d_out,) squared error."""
    by_document: dict[str, NDArray[Any]]
    """The same by document: (documents,)."""
    document_rows: NDArray[Any]
    """(documents,) rows of each document."""
    counts: NDArray[Any]
    """(F,) int64: rows in which each latent is not 0."""
    unseen: dict[str, NDArray[Any]]
    """Squared error by document over rows that were not seen in training, of the kinds total and
    coder, and `rows`, how many there are: (documents,). All rows, where that is not known."""

    @property
    def rows(self) -> int:
        """Rows that were evaluated."""
        return int(self.document_rows.sum())


def add_up(pieces: Pieces, n_pieces: int, names: list[str], n_documents: int) -> dict[str, Sums]:
    """The sums of every coder of a pass, in the order in which `pass_over_rows` had them."""
    found: dict[str, Sums] = {}
    for piece in range(n_pieces):
        arrays = pieces.read(piece)
        at = int(arrays["first_block"][0])
        for i, name in enumerate(names):
            own = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{i}/")}
            own |= {k: v for k, v in arrays.items() if k.startswith("total/")}
            if name not in found:
                kinds = [k.removesuffix("/channel") for k in own if k.endswith("/channel")]
                found[name] = Sums(
                    {k: np.zeros_like(own[f"{k}/channel"]) for k in kinds},
                    {k: np.zeros(n_documents) for k in kinds},
                    np.zeros(n_documents),
                    np.zeros_like(own["counts"]),
                    {k: np.zeros(n_documents) for k in ("total", "coder", "rows")},
                )
            sums = found[name]
            here = slice(at, at + len(arrays["block_rows"]))
            for kind in sums.channel:
                sums.channel[kind][...] += own[f"{kind}/channel"]
                sums.by_document[kind][here] += own[f"{kind}/block"]
            sums.document_rows[here] += arrays["block_rows"]
            sums.unseen["total"][here] += arrays["total/unseen"]
            sums.unseen["coder"][here] += own["unseen"]
            sums.unseen["rows"][here] += arrays["unseen_rows"]
            sums.counts[...] += own["counts"]
    return found
