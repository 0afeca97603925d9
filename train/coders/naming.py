"""Coders by a part of their names."""

from __future__ import annotations

from collections.abc import Sequence

from bsc.errors import UserError, nearest

__all__ = ["full_name"]


def full_name(wanted: str, names: Sequence[str], where: object) -> str:
    """The one of `names` that is `wanted`, or has it as its end or as a part.

    Args:
        wanted: what the user said.
        names: of the coders that there are.
        where: they are, for messages.

    Raises:
        UserError: there is none, or there are several; the message names them.

    >>> full_name("k32", ["layers.3.mlp/sae-k8", "layers.3.mlp/sae-k32"], "runs/run")
    'layers.3.mlp/sae-k32'
    """
    for found in (
        [n for n in names if n == wanted],
        [n for n in names if n.endswith(f"/{wanted}")],
        [n for n in names if wanted in n],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{where}: {wanted!r} is not one coder; {len(found)} have it in their names: "
                f"{', '.join(found)}."
            )
    raise UserError(
        f"{where}: no coder {wanted!r}{nearest(wanted, names)}; it has {', '.join(names)}."
    )
