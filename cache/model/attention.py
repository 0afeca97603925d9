"""What a model is given beside the token ids, so that documents of one context do not mix.

Causal models of transformers keep packed documents apart when positions begin again at 0. Other
models get an explicit mask. `document_separation` finds out which it is by trying: it changes the
tokens of one document and looks whether another one's rows move by more than rounding, and more of
them than where the two are in contexts of their own. There they can move, too: in a mixture of
experts, how many tokens an expert is given at a time decides how it rounds, and a token between two
experts goes to one or the other.
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
_ROUNDING = 1e-3
"""Share of a row's norm by which rounding may move it. Experts round by how many tokens they are
given at a time, which moved rows by up to 2e-6; what a token saw of another document moved them by
0.15 and more (tests/test_frictions.py)."""


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
        packing: how the contexts were filled (model/tokens.py).
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

        def of(
            token_id: torch.Tensor, position: torch.Tensor, separation: Separation = separation
        ) -> Mapping[str, torch.Tensor]:
            return rows(
                forward_inputs(
                    token_id, position, packing="masked", separation=separation, dtype=dtype
                )
            )

        try:
            moved = noise = 0
            for kept, changed in (half, half[::-1]):
                other = one.clone()
                other[:, changed] = two[:, changed]
                moved += _moved(of(one, position), of(other, position), kept)
                # The same in contexts of their own, where nothing can be seen of the other one.
                apart = [torch.cat([x[:, kept], x[:, changed]]) for x in (one, other)]
                each = position[:, :_PROBE].repeat(2, 1)
                a, b = (of(x, each) for x in apart)
                noise += _moved(a, b, slice(0, _PROBE))
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            continue  # this model does not take such arguments
        if moved <= 2 * noise:
            return separation
    raise UserError(
        "--packing masked: this model lets a token see other documents of its context whatever "
        "positions and mask it is given. Use --packing none (a document per context) or --packing "
        "joined (documents see each other)."
    )


def _moved(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tokens: slice) -> int:
    """How many of these tokens' rows differ by more than rounding, over all arrays."""
    count = 0
    for name in a:
        x, y = a[name][tokens].double(), b[name][tokens].double()
        count += int(((x - y).norm(dim=1) > _ROUNDING * x.norm(dim=1)).sum())
    return count
