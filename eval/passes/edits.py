"""Edits of a code before it is decoded: latents switched off, set, or left alone on their own.

with bsc.splice(model, {"layers.3.mlp": coder}, edit=bsc.edits.off([343])):
    model(**batch)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from bsc.train.coders.coder import Code

__all__ = ["Edit", "off", "only", "set"]

Edit = Callable[[Code], Code]


def _among(latent: Tensor, latents: Iterable[int]) -> Tensor:
    return torch.isin(latent, torch.tensor(sorted({int(i) for i in latents}), device=latent.device))


def off(latents: Iterable[int]) -> Edit:
    """These latents are 0.

    >>> code = Code(torch.tensor([[3, 5]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> off([5])(code).value
    tensor([[1., 0.]])
    """
    chosen = tuple(latents)
    return lambda code: code._replace(
        value=code.value.masked_fill(_among(code.latent, chosen), 0.0)
    )


def only(latents: Iterable[int]) -> Edit:
    """All but these latents are 0.

    >>> code = Code(torch.tensor([[3, 5]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> only([5])(code).value
    tensor([[0., 2.]])
    """
    chosen = tuple(latents)
    return lambda code: code._replace(
        value=code.value.masked_fill(~_among(code.latent, chosen), 0.0)
    )


def set(values: Mapping[int, float]) -> Edit:  # noqa: A001 - `bsc.edits.set` says what it does
    """These latents have these values in every row, whether they were selected or not.

    They stand at the end of each row; where one was selected, its own entry is 0.

    >>> code = Code(torch.tensor([[3, 5]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    >>> edited = set({5: 9.0, 7: 1.0})(code)
    >>> edited.latent, edited.value
    (tensor([[3, 5, 5, 7]]), tensor([[1., 0., 9., 1.]]))
    """
    chosen = {int(i): float(v) for i, v in values.items()}

    def edit(code: Code) -> Code:
        code = off(chosen)(code)
        shape = (*code.latent.shape[:-1], len(chosen))
        latent = torch.tensor(list(chosen), dtype=code.latent.dtype, device=code.latent.device)
        value = torch.tensor(list(chosen.values()), dtype=code.value.dtype).to(code.value.device)
        more = (latent.expand(shape), value.expand(shape), value.expand(shape))
        return Code(*(torch.cat(pair, dim=-1) for pair in zip(code, more, strict=True)))

    return edit
