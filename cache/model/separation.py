"""Finding out how a model keeps the documents of one context apart, and whether it does.

Two things are tried. The tokens of one document are changed: rows of another may move by no more
than rounding, and no more of them than where the two are in contexts of their own. (There they can
move, too: in a mixture of experts, how many tokens an expert is given at a time decides how it
rounds, and a token between two experts goes to one or the other.) And the rows have to be those
that the model gives each document alone, with nothing but its token ids: a mask may keep documents
apart and yet let a token see what comes after it, or further than the layer does, and positions may
begin at another number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from bsc.cache.model.attention import Separation, forward_inputs
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.kinds import first_position
from bsc.cache.model.models import LanguageModel
from bsc.errors import UserError
from bsc.formats import percent

__all__ = ["document_separation", "looks_ahead", "of_the_machine", "separation_of"]

_Rows = Mapping[str, torch.Tensor]
Rows = Callable[[Mapping[str, Any]], _Rows]

_PROBE = 6
"""Tokens of a document of the probe, and rows at an end of one that are looked at together."""
_ROUNDING = 1e-3
"""Share of a row's norm by which rounding may move it. Experts round by how many tokens they are
given at a time, which moved rows by up to 2e-6; what a token saw of another document moved them by
0.15 and more (tests/test_frictions.py)."""
_SAME = 1e-4
"""Share of a row's norm, in the median of some rows, by which those of a packed document differ
from those of the document alone where nothing is wrong and arithmetic is in float32; rows are
rounded to bfloat16 either way, so it is mostly 0."""
_TOLERANCE, _TOLERANCE_OF_HALVES = 0.01, 0.25
"""The most of what comes nearest, with a model in float32 and in half precision, where kernels
round differently: 1 % of four layers and 2 to 14 % of 48, with random weights. A wrong mask makes 9
to 150 % of four."""
_REFUSED = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What models raise on arguments that they do not take."""


def separation_of(lm: LanguageModel, hookpoints: list[str], context: int) -> Separation:
    """How a model keeps the documents of a context apart.

    Args:
        lm: the model.
        hookpoints: whose rows are looked at.
        context: tokens in a context.

    Raises:
        UserError: it does not, whatever it is given.
    """
    config = lm.model.config.get_text_config()
    return document_separation(
        RowTap(lm.base, hookpoints).rows,
        vocabulary=lm.vocabulary,
        dtype=lm.model.dtype,
        device=lm.model.device,
        context=context,
        window=getattr(config, "sliding_window", None)
        or getattr(config, "attention_chunk_size", None),
        first=first_position(lm.base),
    )


def looks_ahead(rows: Rows, *, vocabulary: int, device: torch.device) -> bool:
    """Whether tokens of a model see what comes after them, as in an encoder.

    Args:
        rows: rows by name for the arguments of a forward pass, (tokens, width) each.
        vocabulary: number of token ids.
        device: of the model.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary - 1, (2, _PROBE), generator=generator).to(device)
    moved = []
    for context in (0, 1):  # rows of the first one, when its last token or another one changes
        other = ids.clone()
        other[context, -1] += 1
        a, b = (
            {n: r[: _PROBE - 1] for n, r in rows({"input_ids": x}).items()} for x in (ids, other)
        )
        moved.append(_moved(a, b))
        most = (_PROBE - 1) * len(a)
    return moved[0] > 2 * moved[1] and 4 * moved[0] > most


def document_separation(
    rows: Rows,
    *,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    context: int = 2 * _PROBE,
    window: int | None = None,
    first: int = 0,
) -> Separation:
    """How a model keeps the documents of one context apart.

    Args:
        rows: rows by name for the arguments of a forward pass, (tokens, width) each.
        vocabulary: number of token ids.
        dtype: of the model.
        device: of the model.
        context: tokens in a context.
        window: tokens that some layers see at most.
        first: position of a document's first token.

    Raises:
        UserError: it does not, whatever it is given.
    """
    if window is not None and window >= context:
        window = None  # no token has more before it
    probe = _Probe(rows, vocabulary, dtype, device, context, window)
    mask: Literal["causal", "both"] = "causal"
    if looks_ahead(rows, vocabulary=vocabulary, device=device):
        mask = "both"
    # With a window first: a model that takes masks by kind of layer has such layers.
    candidates = [
        Separation(first=first),
        Separation(mask, window, first),
        Separation(mask, None, first),
    ]
    differences: dict[Separation, float] = {}
    for separation in dict.fromkeys(candidates):
        try:
            if probe.leaks(separation):
                continue
            differences[separation] = probe.difference(separation)
        except _REFUSED as error:
            if isinstance(error, UserError) or of_the_machine(error):
                raise
            continue  # this model does not take such arguments
        if differences[separation] <= _SAME:
            return separation
    if differences:
        best = min(differences.values())
        if best <= (_TOLERANCE if dtype == torch.float32 else _TOLERANCE_OF_HALVES):
            return next(s for s, d in differences.items() if d <= 1.5 * best)
        raise UserError(
            f"--packing masked: however this model is told where documents begin, their rows "
            f"differ from those of the documents alone, by {percent(best)} of their norm at least. "
            f"Use --packing none (a document per context) or --packing joined (documents see "
            f"each other)."
        )
    raise UserError(
        "--packing masked: this model lets a token see other documents of its context whatever "
        "positions and mask it is given. Use --packing none (a document per context) or --packing "
        "joined (documents see each other)."
    )


def of_the_machine(error: Exception) -> bool:
    """Whether the machine, not the model, refused: out of memory, or a fault of the GPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "CUDA error")
    )


class _Probe:
    """Two documents of random tokens, together and alone."""

    def __init__(
        self,
        rows: Rows,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        window: int | None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        # One of them is long enough for its last tokens not to see its first in every layer.
        long = _PROBE if window is None else max(_PROBE, min(2 * window, context - _PROBE))
        self.short, self.long, self.other = (
            torch.randint(0, vocabulary, (1, n), generator=generator).to(device)
            for n in (_PROBE, long, _PROBE)
        )
        self._rows, self._dtype = rows, dtype
        self._alone: list[_Rows] | None = None

    def _packed(self, documents: list[torch.Tensor], separation: Separation) -> list[_Rows]:
        """Rows of documents in one context, of each."""
        position = [torch.arange(d.shape[1], device=d.device) for d in documents]
        inputs = forward_inputs(
            torch.cat(documents, dim=1),
            torch.cat(position).unsqueeze(0),
            packing="masked",
            separation=separation,
            dtype=self._dtype,
        )
        ends = torch.tensor([0, *(d.shape[1] for d in documents)]).cumsum(0).tolist()
        rows = self._rows(inputs)
        return [{name: r[start:stop] for name, r in rows.items()} for start, stop in pairwise(ends)]

    def leaks(self, separation: Separation) -> bool:
        """Whether rows of a document move when another one of its context is changed."""
        kept, one, two = self.short, self.other, self.long[:, :_PROBE]
        moved = noise = 0
        for order in (1, -1):
            packed = [self._packed([kept, x][::order], separation)[::order][0] for x in (one, two)]
            moved += _moved(*packed)
            # The same in contexts of their own, where nothing can be seen of the other one.
            position = torch.arange(_PROBE, device=kept.device).repeat(2, 1)
            apart = [
                self._rows(
                    forward_inputs(
                        torch.cat([kept, x]), position, packing="masked", separation=separation,
                        dtype=self._dtype,
                    )
                )
                for x in (one, two)
            ]  # fmt: skip
            noise += _moved(*({n: r[:_PROBE] for n, r in rows.items()} for rows in apart))
        return moved > 2 * noise

    def difference(self, separation: Separation) -> float:
        """By how much rows differ from those of the documents alone, as a share of their norms.

        The largest median over an array's rows at one end of a document.
        """
        documents = [self.short, self.long]
        return max(
            self._from_alone(self._packed(documents[::order], separation)[::order])
            for order in (1, -1)
        )

    def _from_alone(self, rows: Sequence[_Rows]) -> float:
        """The largest median difference of rows of both documents, at an end, from those alone."""
        if self._alone is None:
            self._alone = [self._rows({"input_ids": d}) for d in (self.short, self.long)]
        return max(
            float(end.median())
            for mine, alone in zip(rows, self._alone, strict=True)
            for error in (_differences(alone[name], mine[name]) for name in mine)
            for end in (error[:_PROBE], error[-_PROBE:])
        )


def _differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Norm of the difference of each two rows, as a share of the first one's."""
    x, y = a.double(), b.double()
    share: torch.Tensor = (x - y).norm(dim=1) / x.norm(dim=1).clamp(min=1e-300)
    return share


def _moved(a: _Rows, b: _Rows) -> int:
    """How many rows differ by more than rounding, over all arrays."""
    return sum(int((_differences(a[name], b[name]) > _ROUNDING).sum()) for name in a)
