"""What formats of coders in other tools have in common, and how a file that was written is checked.

A format says which coders it can hold exactly (`refusal`), writes one (`write`), and computes from
what was written as the other tool does (`reference`): a short form of that tool's own formula. What
is written counts only when rows of the store give the same through both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bsc.config import parse_config
from bsc.errors import StoreError, UserError
from bsc.eval.passes.batches import rows_at_once
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig

__all__ = [
    "Checked",
    "CoderFormat",
    "Found",
    "Origin",
    "Reference",
    "check_written",
    "linear_threshold",
    "make_coder",
    "read_weights",
    "stated",
    "strict_threshold",
    "unit_rows",
]

_ROUNDING = 1e-5
"""Share of the largest value by which sums in another order may differ, in float32."""

Reference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows (N, d_in) to the code of every latent, (N, F), and the reconstruction, (N, d_out)."""


class Origin(NamedTuple):
    """Where a coder is from, for fields of other tools that say so."""

    model: str
    hookpoint: str
    context: int
    """Tokens of a context."""
    without_tokens: tuple[int, ...] = ()
    """Ids of tokens that it was trained without."""


class Found(NamedTuple):
    """A coder that another tool wrote."""

    coder: SparseCoder
    model: str | None
    """Name of the model that it says it is of."""
    hookpoint: str | None
    """Where it says that it belongs."""
    file: str
    """Its weights, in the folder."""
    without_tokens: tuple[int, ...] | Literal["special"] | None = None
    """Ids of tokens that it says it was trained without, or all special ones; None: it says
    nothing of them."""


class CoderFormat(NamedTuple):
    """One coder in a folder of its own, as another tool reads it."""

    refusal: Callable[[CoderConfig], str | None]
    """Why the format cannot hold such a coder exactly, and what is nearest; None: it can."""
    write: Callable[[SparseCoder, Path, Origin], None]
    """Put a coder into an empty folder."""
    reference: Callable[[Path], Reference]
    """What the other tool computes with what stands in the folder."""
    read: Callable[[Path], Found]
    """The coder that stands in a folder, as ours.

    Raises UserError: it is damaged, or ours cannot be the same function."""


@dataclass(frozen=True)
class Checked:
    """Largest differences between a coder and what the other tool makes of its file."""

    rows: int
    code: float
    """Largest difference of a code where both have the latent on."""
    largest_code: float
    reconstruction: float
    largest_reconstruction: float
    near_ties: int
    """Latents on in one alone, with margins within rounding of where the selection ends."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in float32.

    Raises:
        StoreError: it is missing or damaged, or holds values that are not finite.
    """
    try:
        tensors = {n: t.float() for n, t in load_file(path).items()}
    # The last two: dtypes that safetensors knows and this torch cannot make or widen.
    except (OSError, SafetensorError, NotImplementedError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be read ({error}).") from None
    return _finite(tensors, path)


def _finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad:
        raise StoreError(f"{path}: {', '.join(bad)} hold values that are not finite (NaN or inf).")
    return tensors


T = TypeVar("T", int, str, bool)


def stated(config: Mapping[str, Any], name: str, kind: type[T], path: Path) -> T:
    """A field of another tool's config.

    Raises:
        StoreError: it is missing or of another type.
    """
    value = config.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise StoreError(f"{path}: {name} should be {kind.__name__}, found {value!r:.60}.")
    return value


def make_coder(path: Path, tensors: Mapping[str, Tensor], **fields: Any) -> SparseCoder:
    """A coder of what another tool wrote.

    Args:
        path: of its weights, for messages.
        tensors: by our names; others are left out.
        fields: of `CoderConfig`; the widths are those of the tensors.

    Raises:
        StoreError: a tensor is missing or of another shape.
        ConfigError: the fields do not go together.
    """
    for name in ("encoder.weight", "W_dec"):
        if name not in tensors or tensors[name].ndim != 2:
            raise StoreError(f"{path}: no matrix {name} here; it has {', '.join(sorted(tensors))}.")
    n_latents, d_in = tensors["encoder.weight"].shape
    widths = {"n_latents": n_latents, "d_in": d_in, "d_out": tensors["W_dec"].shape[1]}
    config = parse_config(CoderConfig, fields | widths, str(path))
    wanted = parameter_shapes(config)
    try:
        kept = {n: tensors[n].contiguous() for n in wanted if n in tensors}
        return SparseCoder(config, kept)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None


def strict_threshold(threshold: Tensor) -> Tensor:
    """t' with m > t' exactly where m >= t, in float32: tools compare strictly, batch top-k does
    not."""
    return torch.nextafter(threshold.float(), torch.tensor(-torch.inf))


def linear_threshold(threshold: Tensor) -> Tensor:
    """t with m >= t exactly where m > t', in float32: the inverse of `strict_threshold`."""
    return torch.nextafter(threshold.float(), torch.tensor(torch.inf))


def unit_rows(coder: SparseCoder) -> tuple[SparseCoder, float]:
    """The same function with decoder rows of length 1, and what its codes are multiplied by.

    Raises:
        UserError: that would change the code (binary latents) or the selection (rows of several
            lengths).
    """
    config = coder.config
    if config.code != "continuous":
        raise UserError(
            f"--unit-rows: a {config.code} coder would have codes other than 0 and 1. Leave the "
            f"flag out."
        )
    lengths = coder.W_dec.norm(dim=1)
    length = float(lengths.mean())
    if not length or float((lengths / length - 1).abs().max()) > 1e-5:
        raise UserError(
            f"--unit-rows: the decoder rows have lengths from {float(lengths.min()):.4g} to "
            f"{float(lengths.max()):.4g}, so that other latents would be the largest. Train with "
            f"decoder_norm = 'unit', or leave the flag out."
        )
    factor = {"encoder.weight": length, "encoder.bias": length, "select_threshold": length}
    tensors = {n: t * factor.get(n, 1.0) for n, t in coder.tensors.items()}
    tensors["W_dec"] = coder.W_dec / length
    return SparseCoder(config, tensors, about=coder.about), length


def _boundary(coder: SparseCoder, margins_NF: Tensor, selected_Nk: Tensor) -> Tensor:
    """Margin at which the selection of a latent ends, broadcastable to (N, F)."""
    config = coder.config
    if config.select == "batch_topk":
        return coder.thresholds()
    if config.select == "groupmax":
        largest: Tensor = margins_NF.unflatten(1, (config.k, -1)).amax(dim=2)
        return largest.repeat_interleave(config.n_latents // config.k, dim=1)
    return selected_Nk.amin(dim=1, keepdim=True)


def check_written(coder: SparseCoder, reference: Reference, x_Nd: Tensor) -> Checked:
    """Run rows through a coder and through what another tool makes of its file.

    Raises:
        UserError: they differ by more than rounding.
    """
    found = {"code": 0.0, "largest_code": 0.0, "y": 0.0, "largest_y": 0.0}
    near_ties = 0
    for x in x_Nd.float().split(rows_at_once(coder.config.n_latents)):
        code, margins = coder.encode(x), coder.margins(x)
        mine = torch.zeros_like(margins).scatter_(1, code.latent, code.value)
        theirs, y_theirs = reference(x)
        y_mine = coder.decode(code, x)
        if not all(bool(t.isfinite().all()) for t in (mine, theirs, y_mine, y_theirs)):
            raise UserError("codes or reconstructions are not finite (NaN or inf)")
        both = (mine != 0) & (theirs != 0)
        ends = _boundary(coder, margins, code.margin)
        off = torch.minimum((margins - ends).abs(), margins.abs())
        alone = (mine != 0) ^ (theirs != 0)
        scale = _ROUNDING * float(margins.abs().max())
        if bool((alone & (off > scale)).any()):
            raise UserError(
                f"{int((alone & (off > scale)).sum()):,} latents of {len(x):,} rows are on in the "
                f"coder or in what was written, but not in both"
            )
        near_ties += int(alone.sum())
        rows = ~alone.any(dim=1)
        for name, a, b in (
            ("code", mine.where(both, 0.0), theirs.where(both, 0.0)),
            ("y", y_mine[rows], y_theirs[rows]),
        ):
            if a.numel():
                found[name] = max(found[name], float((a - b).abs().max()))
                largest = f"largest_{name}"
                found[largest] = max(found[largest], float(a.abs().max()))
    for name, what in (("code", "codes"), ("y", "reconstructions")):
        if not found[name] <= _ROUNDING * max(found[f"largest_{name}"], 1e-30):
            raise UserError(
                f"{what} differ by {found[name]:.3g} where the largest is "
                f"{found[f'largest_{name}']:.3g}"
            )
    return Checked(
        len(x_Nd), found["code"], found["largest_code"], found["y"], found["largest_y"], near_ties
    )
