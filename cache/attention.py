"""What a model is given beside the token ids, so that documents of one context do not mix.

Causal models of transformers keep packed documents apart when positions begin again at 0. Other
models get an explicit mask. `document_separation` finds out which it is by trying: it changes the
tokens of one document and looks whether a single bit of another one's rows moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from bsc.errors import UserError

__all__ = ["Separation", "document_separation", "forward_inputs"]

Separation = Literal["positions", "mask"]
Rows = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]

_PROBE = 6
"""Tokens of each of the two documents of the probe."""


def forward_inputs(
    token_id: torch.Tensor,
    position: torch.Tensor,
    *,
    packing: str,
    separation: Separation = "positions",
    real: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Arguments of the model's forward pass for one batch of contexts.

    Args:
        token_id: (contexts, length) integers.
        position: (contexts, length); with packing masked it begins at 0 with every document.
        packing: how the contexts were filled (cache/tokens.py).
        separation: how this model keeps documents apart, for packing masked.
        real: (contexts, length), which tokens are not padding, for packing none.
        dtype: of the model, for an explicit mask.
    """
    inputs = {"input_ids": token_id}
    if packing == "none" and real is not None:
        inputs["attention_mask"] = real.long()
    if packing == "masked":
        inputs["position_ids"] = position
        if separation == "mask":
            document = (position == 0).cumsum(dim=1)
            other = document.unsqueeze(2) != document.unsqueeze(1)
            mask = torch.zeros(other.shape, dtype=dtype, device=token_id.device)
            mask.masked_fill_(other, torch.finfo(dtype).min)
            inputs["attention_mask"] = mask.unsqueeze(1)
    return inputs


def document_separation(
    rows: Rows, *, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> Separation:
    """How a model keeps the documents of one context apart.

    Args:
        rows: rows by name for the arguments of a forward pass, (tokens, width) each.
        vocabulary: number of token ids.
        dtype: of the model.
        device: of the model.

    Raises:
        UserError: it does not, whatever it is given.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 2 * _PROBE), generator=generator).to(device)
    position = torch.arange(_PROBE, device=device).repeat(1, 2)
    one, two = ids[:1], ids[1:]
    half = slice(0, _PROBE), slice(_PROBE, None)
    candidates: tuple[Separation, ...] = ("positions", "mask")
    for separation in candidates:
        try:
            apart = []
            for kept, changed in (half, half[::-1]):
                other = one.clone()
                other[:, changed] = two[:, changed]
                a, b = (
                    rows(
                        forward_inputs(
                            x, position, packing="masked", separation=separation, dtype=dtype
                        )
                    )
                    for x in (one, other)
                )
                apart += [torch.equal(a[name][kept], b[name][kept]) for name in a]
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            continue  # this model does not take such arguments
        if all(apart):
            return separation
    raise UserError(
        "--packing masked: this model lets a token see other documents of its context whatever "
        "positions and mask it is given. Use --packing none (a document per context) or --packing "
        "joined (documents see each other)."
    )
