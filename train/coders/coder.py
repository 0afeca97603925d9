"""One coder: encode, decode, and its form on disk.

    pre   = (x - b_dec) W_enc^T + b_enc          b_dec is subtracted by SAEs alone
    S     = k latents by pre - theta              theta = exp(log_threshold), 0 if continuous
    code  = relu(pre)        on S, 0 elsewhere    continuous
    code  = 1[pre > theta]   on S, 0 elsewhere    binary
    y_hat = sum_f code_f W_dec[f] + b_dec (+ x W_skip^T)

Shape letters: N rows, F latents, k selected. docs/coders.md has the gradients and the sources.

On disk a coder is a folder with coder.safetensors (encoder.weight [F, d_in], encoder.bias [F],
W_dec [F, d_out], b_dec [d_out], and where they exist W_skip [d_out, d_in], log_threshold [binary
latents] and select_threshold [parts] or [F], all float32) and config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bsc.array_file import array_hash
from bsc.config import parse_config
from bsc.errors import StoreError
from bsc.hub import SCHEME
from bsc.records import check_seal, parse_object, write_record
from bsc.tensor_file import write_tensors
from bsc.train.coders import kernels
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.kernels import Entries
from bsc.train.coders.select import code_values, select_dense

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["CODER_VERSION", "Code", "SparseCoder", "latent_thresholds", "parameter_shapes"]

CODER_VERSION = 2
_VERSIONS = (1, CODER_VERSION)
"""Versions that are read; coders of version 1 carry no hash."""
_DTYPES = (torch.float32, torch.float64)
_WEIGHTS, _CONFIG = "coder.safetensors", "config.json"


class Code(NamedTuple):
    """Latent activations of a batch in sparse form; each (N, k), or (..., N, k)."""

    latent: Tensor
    """The selected latents, int64, no latent twice in a row."""
    value: Tensor
    """Their code: 0 where a selected latent is off, or fills a row up to k."""
    margin: Tensor
    """pre - theta of the selected latents."""


def parameter_shapes(config: CoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a coder's tensors by their names on disk."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (config.n_latents, config.d_in),
        "encoder.bias": (config.n_latents,),
        "W_dec": (config.n_latents, config.d_out),
        "b_dec": (config.d_out,),
    }
    if config.site == "skip_transcoder":
        shapes["W_skip"] = (config.d_out, config.d_in)
    if config.has_threshold:
        shapes["log_threshold"] = (config.n_latents - config.first_binary,)
    if config.select == "batch_topk":
        shapes["select_threshold"] = (len(config.parts),)
    return shapes


def latent_thresholds(config: CoderConfig, select_threshold: Tensor) -> Tensor:
    """Thresholds of batch top-k for each latent, (F,), from those of each part or each latent."""
    if len(select_threshold) == config.n_latents:
        return select_threshold
    parts = zip(select_threshold.split(1), config.parts, strict=True)
    return torch.cat([one.expand(part.stop - part.start) for one, part in parts])


class SparseCoder:
    """A trained coder. Computes in the dtype of its tensors; rows are converted to it.

    >>> config = CoderConfig(site="sae", code="binary", k=1, n_latents=2, d_in=2, d_out=2)
    >>> eye = torch.eye(2)
    >>> coder = SparseCoder(config, {"encoder.weight": eye, "encoder.bias": torch.zeros(2),
    ...     "W_dec": 3 * eye, "b_dec": torch.zeros(2), "log_threshold": torch.zeros(2)})
    >>> coder.forward(torch.tensor([[5.0, 2.0], [0.5, 0.1]]))
    tensor([[3., 0.],
            [0., 0.]])
    """

    def __init__(
        self,
        config: CoderConfig,
        tensors: dict[str, Tensor],
        *,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Take a config and its tensors.

        Args:
            config: what the coder is.
            tensors: by the names on disk.
            about: where it comes from (hookpoint, model, store, training), saved beside it.

        Raises:
            StoreError: the tensors are not those of such a coder: by their names, their shapes or
                their dtype, which is one for all, float32 or float64.
        """
        shapes = parameter_shapes(config)
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found.get("select_threshold") == (config.n_latents,):  # one for each latent: JumpReLU
            shapes["select_threshold"] = (config.n_latents,)
        if found != shapes:
            raise StoreError(f"a coder's tensors should be {shapes}, found {found}.")
        dtypes = {name: t.dtype for name, t in tensors.items()}
        if len(set(dtypes.values())) > 1 or dtypes["W_dec"] not in _DTYPES:
            raise StoreError(f"a coder's tensors should all be float32, found {dtypes}.")
        self.config, self.tensors, self.about = config, tensors, dict(about or {})

    def __getattr__(self, name: str) -> Tensor:
        tensors: dict[str, Tensor] = self.__dict__.get("tensors", {})
        if name in tensors:
            return tensors[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        c = self.config
        name, hook = self.about.get("name"), self.about.get("hookpoint")
        what = f"{name}: " if name else ""
        at = f" at {hook}" if hook and not str(name).startswith(str(hook)) else ""
        size = f"{c.n_latents:,} latents, {c.d_in} -> {c.d_out}"
        return f"<SparseCoder {what}{c.code} {c.site}{at}, k {c.k}, {size}>"

    @property
    def W_enc(self) -> Tensor:
        """Encoder, (F, d_in)."""
        return self.tensors["encoder.weight"]

    @property
    def b_enc(self) -> Tensor:
        """Bias of the encoder, (F,)."""
        return self.tensors["encoder.bias"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors."""
        return self.W_enc.dtype

    def to(self, device: str | torch.device) -> SparseCoder:
        """The same coder on another device."""
        moved = {name: t.to(device) for name, t in self.tensors.items()}
        return SparseCoder(self.config, moved, about=self.about)

    def in_units(self, *, x: float, y: float) -> SparseCoder:
        """The same function on rows that were divided by `x` and `y` when it was trained.

        Args:
            x: unit of the rows that are encoded.
            y: unit of the rows that are reconstructed.
        """
        factor = {"encoder.weight": 1 / x, "W_dec": y, "b_dec": y, "W_skip": y / x}
        tensors = {n: t * factor.get(n, 1.0) for n, t in self.tensors.items()}
        return SparseCoder(self.config, tensors, about=self.about)

    def margins(self, x_Nd: Tensor) -> Tensor:
        """pre - theta of every latent, (N, F); theta is 0 for a continuous coder."""
        x_Nd = x_Nd.to(self.dtype)
        if self.config.site == "sae":
            x_Nd = x_Nd - self.b_dec
        bias = self.b_enc
        if self.config.has_threshold:
            bias = bias.clone()
            bias[self.config.first_binary :] -= self.log_threshold.exp()
        return torch.nn.functional.linear(x_Nd, self.W_enc, bias)

    def thresholds(self) -> Tensor:
        """Batch top-k: the smallest margin at which each latent is selected, (F,)."""
        return latent_thresholds(self.config, self.select_threshold)

    def encode(self, x: Tensor) -> Code:
        """Code of rows: (N, d_in) or (..., N, d_in), for example (batch, sequence, d_in), of any
        float dtype.

        Batch top-k takes what is above the thresholds that training left, so that the code of a row
        does not depend on its company; k is then what the row with the most of them has.

        Raises:
            ValueError: the rows are not d_in wide.
        """
        code = self._encode(self._rows(x))
        return Code(*(t.reshape(*x.shape[:-1], t.shape[-1]) for t in code))

    def _rows(self, x: Tensor) -> Tensor:
        """Rows (N, d_in) of a tensor (..., d_in)."""
        if x.ndim < 2 or x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"expected rows (..., {self.config.d_in}), the input of this coder; found a "
                f"tensor {tuple(x.shape)}."
            )
        return x.reshape(-1, x.shape[-1])

    def _encode(self, x_Nd: Tensor) -> Code:
        margins = self.margins(x_Nd)
        if self.config.select != "batch_topk":
            margin, latent = select_dense(self.config, margins, self.config.parts)
            return Code(latent, code_values(self.config, latent, margin), margin)
        above = margins >= self.thresholds()
        width = max(1, int(above.sum(1).max())) if len(margins) else 1
        ranked, latent = margins.masked_fill(~above, -torch.inf).topk(width, dim=1)
        margin = margins.gather(1, latent)
        value = code_values(self.config, latent, margin).masked_fill(ranked == -torch.inf, 0)
        return Code(latent, value, margin)

    def csr(self, code: Code) -> csr_array:
        """A code as a matrix (rows, F) of scipy, float32, with nothing where a latent is off.

        Leading shapes become one: a code of (batch, sequence, k) has batch times sequence rows.
        `torch.sparse_csr_tensor(m.indptr, m.indices, m.data, m.shape)` is the same in torch.
        """
        from scipy.sparse import csr_array

        latent = code.latent.reshape(-1, code.latent.shape[-1])
        value = code.value.detach().reshape(latent.shape)
        on = value != 0
        row_ends = torch.zeros(len(latent) + 1, dtype=torch.int64)
        row_ends[1:] = on.sum(dim=1).cumsum(0)
        matrix = csr_array(
            (value[on].float().cpu().numpy(), latent[on].cpu().numpy(), row_ends.numpy()),
            shape=(len(latent), self.config.n_latents),
        )
        matrix.sort_indices()
        return matrix

    def skip(self, x: Tensor) -> Tensor:
        """What the coder gives with every latent off, (..., d_out): b_dec, and x W_skip^T if
        any."""
        if "W_skip" in self.tensors:
            return torch.nn.functional.linear(x.to(self.dtype), self.W_skip, self.b_dec)
        return self.b_dec.expand(*x.shape[:-1], -1)

    def latent_sum(self, code: Code) -> Tensor:
        """What the latents alone give, (..., d_out): the sum of their decoder rows times the
        code."""
        latent = code.latent.reshape(-1, code.latent.shape[-1])
        y_Nd = kernels.decode(Entries.of(latent), code.value.flatten(), self.W_dec)
        return y_Nd.reshape(*code.latent.shape[:-1], -1)

    def decode(self, code: Code, x: Tensor) -> Tensor:
        """y_hat, (..., d_out), of a code and the rows that it is of (for the skip path)."""
        return self.latent_sum(code) + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        """y_hat of rows (..., d_in): (..., d_out)."""
        return self.decode(self.encode(x), x)

    __call__ = forward

    def xxh3_128(self) -> str:
        """Hash of its tensors: what tells this coder from another one."""
        return _tensor_hash({n: t.detach().cpu().contiguous() for n, t in self.tensors.items()})

    def save(self, folder: str | Path) -> None:
        """Write the coder to `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}
        write_tensors(folder / _WEIGHTS, tensors)
        write_record(
            folder / _CONFIG,
            {
                "version": CODER_VERSION,
                "coder": self.config.model_dump(),
                "about": self.about,
                "tensors_xxh3_128": _tensor_hash(tensors),
            },
        )

    @staticmethod
    def about_of(folder: Path) -> dict[str, Any]:
        """Where a coder that `save` wrote comes from, without reading its tensors.

        Raises:
            StoreError: the folder has no coder, or its config is damaged.
        """
        about: dict[str, Any] = _saved(folder)["about"]
        return about

    @classmethod
    def load(cls, folder: str | Path) -> SparseCoder:
        """Read a coder that `save` wrote, bit for bit.

        Args:
            folder: of it, or where it is on the Hugging Face hub after `bsc push`:
                `hub://owner/name[@revision]/<coder>`, by its name in the run or a part of it.

        Raises:
            StoreError: the folder has no coder, or one that is of another version or damaged: its
                tensors are not those of the config, do not have the hash that the config states,
                or hold values that are not finite though training did not end so.
            ConfigError: its config has a wrong field.
            UserError: the hub does not answer, or has no such coder.
        """
        if isinstance(folder, str) and folder.startswith(SCHEME):
            from bsc.train.coders.repository import fetch_coder

            folder = fetch_coder(folder)
        folder = Path(folder)
        saved = _saved(folder)
        version, values, about = saved["version"], saved["coder"], saved["about"]
        written = saved["tensors_xxh3_128"] if version == CODER_VERSION else None
        frozen = about.get("frozen_at_step") is not None
        if version not in _VERSIONS:
            raise StoreError(
                f"{folder}: a coder of format version {version}; this bsc reads versions "
                f"{_VERSIONS[0]} to {CODER_VERSION}."
            )
        config = parse_config(CoderConfig, values, str(folder / _CONFIG))
        try:
            tensors = load_file(folder / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{folder / _WEIGHTS}: cannot be read ({error}).") from None
        try:
            coder = cls(config, tensors, about=about)
        except StoreError as error:
            raise StoreError(f"{folder / _WEIGHTS}: {error}") from None
        if written is not None and written != _tensor_hash(tensors):
            raise StoreError(
                f"{folder / _WEIGHTS}: damaged or exchanged: the tensors do not have the hash in "
                f"{_CONFIG}. Where training was stopped while it wrote, `bsc train --resume` "
                f"writes it again; else copy it from where it is whole, or train it again."
            )
        bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
        if bad and not frozen:
            raise StoreError(
                f"{folder / _WEIGHTS}: {', '.join(bad)} hold values that are not finite (NaN or "
                f"inf), so every figure of this coder would be wrong. Copy the coder again from "
                f"where it is whole, or train it again."
            )
        return coder


def _tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    return array_hash({name: t.numpy() for name, t in tensors.items()})


def _saved(folder: Path) -> dict[str, Any]:
    """What the config of a coder holds.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = folder / _CONFIG
    try:
        saved = parse_object(path.read_bytes(), path)
    except FileNotFoundError:
        raise StoreError(f"{folder}: no coder here ({_CONFIG} is missing).") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from None
    needed = ["version", "coder", "about"]
    if saved.get("version") == CODER_VERSION:
        check_seal(saved, path, "Copy the coder again, or train it again.")
        needed.append("tensors_xxh3_128")
    if missing := [key for key in needed if key not in saved]:
        raise StoreError(f"{path}: not a coder's config (it has no {missing[0]!r}).")
    if not isinstance(saved["about"], dict):
        raise StoreError(f"{path}: not a coder's config ('about' is no object).")
    return saved
