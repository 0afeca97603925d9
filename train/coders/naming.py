"""Coders by a part of their names, or by patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from bsc.errors import UserError, nearest

__all__ = ["full_name", "names_of"]


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


def names_of(wanted: Sequence[str], names: Sequence[str], where: object) -> list[str]:
    """Those of `names` that any of `wanted` means, in their order; all where nothing is wanted.

    Args:
        wanted: names, parts of names that one coder has, or patterns with * and ?, of the whole
            name or of what stands behind the hookpoint.
        names: of the coders that there are.
        where: they are, for messages.

    Raises:
        UserError: a name is not that of one coder, or a pattern fits none.

    >>> names_of(["sae-k*", "k8"], ["layers.3.mlp/sae-k8", "layers.3.mlp/sae-k32"], "runs/run")
    ['layers.3.mlp/sae-k8', 'layers.3.mlp/sae-k32']
    """
    chosen = set() if wanted else set(names)
    for one in wanted:
        if not set(one) & set("*?["):
            chosen.add(full_name(one, names, where))
            continue
        found = [n for n in names if fnmatchcase(n, one) or fnmatchcase(n, f"*/{one}")]
        if not found:
            raise UserError(
                f"{where}: no coder fits {one!r}{nearest(one, names)}; it has {', '.join(names)}."
            )
        chosen.update(found)
    return [n for n in names if n in chosen]
