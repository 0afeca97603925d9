"""What a model is given beside the token ids, so that documents of one context do not mix.

Many causal models of transformers keep packed documents apart when positions begin again at 0.
Others need a mask: which one is found out by trying (model/separation.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

__all__ = ["BY_POSITIONS", "Separation", "forward_inputs"]


@dataclass(frozen=True)
class Separation:
    """How a model is told where the documents of a context begin."""

    mask: Literal["none", "causal", "both"] = "none"
    """Mask that is given with the positions: none, one under which a token sees what stands before
    it in its document, or one under which it sees the whole document."""
    window: int | None = None
    """Layers of transformers' kind ``sliding_attention`` get a mask of their own, under which a
    token sees only so many tokens: itself and those before it if causal, else as many on each side.
    None: all layers get the same."""
    first: int = 0
    """Position of a document's first token: RoBERTa's come behind that of padding."""

    def said(self) -> dict[str, Any]:
        """What a store says of it: nothing where it is as with most models."""
        return {} if self == BY_POSITIONS else {"separation": asdict(self)}


BY_POSITIONS = Separation()


def forward_inputs(
    token_id: torch.Tensor,
    position: torch.Tensor,
    *,
    packing: str,
    separation: Separation = BY_POSITIONS,
    real: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of the model's forward pass for one batch of contexts.

    Args:
        token_id: (contexts, length) integers.
        position: (contexts, length); with packing masked it begins at 0 with every document.
        packing: how the contexts were filled (model/tokens.py).
        separation: how this model keeps documents apart, for packing masked.
        real: (contexts, length), which tokens are not padding, for packing none.
        dtype: of the model, for an explicit mask.
    """
    inputs: dict[str, Any] = {"input_ids": token_id}
    if packing == "none" and real is not None:
        inputs["attention_mask"] = real.long()
    if packing == "masked":
        inputs["position_ids"] = position + separation.first
        if separation.mask != "none":
            inputs["attention_mask"] = _masks(position, separation, dtype)
    return inputs


def _masks(position: torch.Tensor, separation: Separation, dtype: torch.dtype) -> Any:
    """(contexts, 1, length, length), 0 where a token is seen; by kind of layer with a window."""
    document = (position == 0).cumsum(dim=1)
    place = torch.arange(position.shape[1], device=position.device)
    back = place.unsqueeze(1) - place  # by how much a token stands before the one that looks
    hidden = document.unsqueeze(2) != document.unsqueeze(1)
    if separation.mask == "causal":
        hidden = hidden | (back < 0)

    def mask(hidden: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return values.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    if separation.window is None:
        return mask(hidden)
    # As transformers counts: a causal window has the token itself, one to both sides does not.
    far = (
        back >= separation.window if separation.mask == "causal" else back.abs() > separation.window
    )
    return {"full_attention": mask(hidden), "sliding_attention": mask(hidden | far)}
