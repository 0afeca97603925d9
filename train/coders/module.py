"""A coder as a torch module: for hooks, nnsight, finetuning; differentiable.

The names in its state dict are those of a coder on disk. Rows pass through in the dtype of its
parameters and come back in that of the rows.
"""

from __future__ import annotations

import warnings
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import register_parametrization

from bsc.train.coders import sparse_grad, surrogates, topk
from bsc.train.coders.coder import Code, SparseCoder, latent_thresholds, parameter_shapes
from bsc.train.coders.select import select_dense
from bsc.train.coders.sparse_grad import Selected

__all__ = ["CoderModule"]


_LEAST_LENGTH = 1e-20
"""Of a row that is divided by its length."""


class _LengthAndDirection(nn.Module):
    """A matrix as the lengths of its rows and their directions."""

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        """(F, d) of (F, 1) and (F, d), whatever the length of the directions is."""
        own = torch.linalg.vector_norm(direction, dim=1, keepdim=True).clamp_min(_LEAST_LENGTH)
        matrix: Tensor = direction * (length / own)
        return matrix

    def right_inverse(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths and directions of a matrix."""
        length = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
        return length, matrix / length.clamp_min(_LEAST_LENGTH)


class CoderModule(nn.Module):
    """A coder whose parameters and inputs have gradients.

    Continuous codes are differentiated exactly, on the latents that are selected. The step of a
    binary latent has no derivative: its gradient is that of `surrogate`, or stops there.

    >>> from bsc.train.coders.config import CoderConfig
    >>> config = CoderConfig(site="sae", code="continuous", k=1, n_latents=2, d_in=2, d_out=2)
    >>> coder = SparseCoder(config, {"encoder.weight": torch.eye(2), "W_dec": torch.eye(2),
    ...     "encoder.bias": torch.zeros(2), "b_dec": torch.zeros(2)})
    >>> module = CoderModule(coder)
    >>> module(torch.tensor([[3.0, 1.0]])).sum().backward()
    >>> module.W_dec.grad
    tensor([[3., 3.],
            [0., 0.]])
    """

    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter
    log_threshold: nn.Parameter
    select_threshold: Tensor
    """Batch top-k: smallest selected margins, a buffer."""

    def __init__(
        self,
        coder: SparseCoder,
        surrogate: str | None = None,
        temperature: float | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Take a copy of a coder's tensors.

        Args:
            coder: the coder.
            surrogate: gradient of a binary latent's step, one of `surrogates.SURROGATES`; None:
                none, so that nothing flows through binary latents.
            temperature: of the surrogate; None: as in training.
            compute_dtype: of products; None: that of the parameters. Training takes bfloat16.

        Raises:
            ValueError: there is no such surrogate.
        """
        super().__init__()
        if surrogate is not None and surrogate not in surrogates.SURROGATES:
            known = ", ".join(surrogates.SURROGATES)
            raise ValueError(f"surrogate={surrogate!r}: should be one of {known}.")
        self.config, self.about = coder.config, dict(coder.about)
        self.surrogate = surrogate
        self.temperature = coder.config.temperature if temperature is None else temperature
        self._warned = False
        copies = {n: t.detach().clone() for n, t in coder.tensors.items()}
        n, d = copies["encoder.weight"].shape
        dtype, device = coder.dtype, coder.W_enc.device
        self.compute_dtype = compute_dtype or dtype
        self.encoder = nn.Linear(d, n, device="meta", dtype=dtype)
        self.encoder.weight = nn.Parameter(copies.pop("encoder.weight"))
        self.encoder.bias = nn.Parameter(copies.pop("encoder.bias"))
        if "select_threshold" in copies:
            self.register_buffer("select_threshold", copies.pop("select_threshold"))
        for name, value in copies.items():
            self.register_parameter(name, nn.Parameter(value))
        self.to(device)

    def extra_repr(self) -> str:
        """What it is, for `print`."""
        c = self.config
        return f"{c.code} {c.site}, {c.select}, k={c.k}, surrogate={self.surrogate}"

    def coder(self) -> SparseCoder:
        """The coder as its parameters stand, its tensors copied."""
        names = parameter_shapes(self.config)
        tensors = {n: attrgetter(n)(self).detach().clone() for n in names}
        return SparseCoder(self.config, tensors, about=self.about)

    def hold_row_lengths(self) -> None:
        """Train the directions of the decoder's rows, and their lengths as the coder was trained:
        not at all, or, with a learned amplitude, as numbers of their own.

        Only of coders whose decoder rows had length 1 in training. `W_dec` is then worked out from
        `parametrizations.W_dec.original0` (lengths) and `original1` (directions).
        """
        if self.config.decoder_norm == "unit":
            register_parametrization(self, "W_dec", _LengthAndDirection())
            if self.config.amplitude == "none":
                lengths: nn.Parameter = self.get_parameter("parametrizations.W_dec.original0")
                lengths.requires_grad_(False)

    @torch.no_grad()
    def renormalise(self) -> Tensor | None:
        """Give directions length 1 again after a step, and return what they were divided by,
        (F, 1); None where lengths are not held. The coder stays the same."""
        if not isinstance(getattr(self, "parametrizations", None), nn.ModuleDict):
            return None
        direction = self.get_parameter("parametrizations.W_dec.original1")
        lengths: Tensor = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        direction.div_(lengths.clamp_(min=_LEAST_LENGTH))
        return lengths

    def encode(self, x: Tensor) -> Code:
        """Code of rows (..., d_in), differentiable but for which latents are selected."""
        return self._shaped(self._encode(self._rows(x))[0], x)

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).to(self.encoder.weight.dtype)

    def _shaped(self, code: Code, x: Tensor) -> Code:
        return Code(*(t.reshape(*x.shape[:-1], t.shape[-1]) for t in code))

    def _encode(self, rows: Tensor) -> tuple[Code, Selected]:
        """Code of rows (N, d_in) and what is selected."""
        config, weight, bias = self.config, self.encoder.weight, self.encoder.bias
        if config.site == "sae":
            rows = rows - self.b_dec
        log_threshold = self._log_threshold(weight)
        with torch.no_grad():
            theta = log_threshold.exp() * config.has_threshold
            acting, dtype = bias - theta, self.compute_dtype
            margins = linear(rows.to(dtype), weight.to(dtype), acting.to(dtype))
            latent, on = self._select(margins)
            # The bias as it is, where products round it.
            product = margins.gather(1, latent).to(rows.dtype) - acting.to(dtype)[latent]
        selected = Selected(latent, config.n_latents)
        product = sparse_grad.with_gradient(rows, weight, product, self.compute_dtype, selected)
        pre = product + sparse_grad.of_latents(bias, selected)
        margin = pre
        if config.has_threshold:
            margin = pre - sparse_grad.of_latents(log_threshold.exp(), selected)
        value = margin.relu()
        binary = latent >= config.first_binary
        if config.code != "continuous":
            self._say_that_gradients_stop(margin)
            # The margin's own dependence on the threshold is in the step.
            step = sparse_grad.step(
                pre - theta[latent], sparse_grad.of_latents(log_threshold, selected),
                self._shift(margins, latent), self.surrogate, self.temperature, config.always_on,
            )  # fmt: skip
            value = torch.where(binary, step, value)
        return Code(latent, value.masked_fill(~on, 0), margin), selected

    def decode(self, code: Code, x: Tensor) -> Tensor:
        """y_hat (..., d_out) of a code, and of the rows that it is of (for the skip path)."""
        latent, value = (t.reshape(-1, t.shape[-1]) for t in (code.latent, code.value))
        selected = Selected(latent, self.config.n_latents)
        y = self._decode(value, selected, self._rows(x))
        return y.reshape(*code.latent.shape[:-1], -1)

    def _decode(self, value: Tensor, selected: Selected, rows: Tensor) -> Tensor:
        value = value.to(self.W_dec.dtype)
        y = sparse_grad.decoded(value, self.W_dec, self.compute_dtype, selected) + self.b_dec
        if not hasattr(self, "W_skip"):
            return y
        products = linear(rows.to(self.compute_dtype), self.W_skip.to(self.compute_dtype))
        return y + products.to(y.dtype)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Code]:
        """y_hat (..., d_out) of rows (..., d_in) in the dtype of the parameters, and their code."""
        rows = self._rows(x)
        code, selected = self._encode(rows)
        y = self._decode(code.value, selected, rows)
        return y.reshape(*x.shape[:-1], -1), self._shaped(code, x)

    def forward(self, x: Tensor) -> Tensor:
        """y_hat (..., d_out) of rows (..., d_in), in the dtype of the rows."""
        return self.reconstruct(x)[0].to(x.dtype)

    def _log_threshold(self, weight: Tensor) -> Tensor:
        """(F,): 0 where a latent has no threshold, which its margin then does not see."""
        if not self.config.has_threshold:
            return weight.new_zeros(len(weight))
        first = self.config.first_binary
        none = weight.new_full((first,), -torch.inf)
        return torch.cat([none, self.log_threshold]) if first else self.log_threshold

    def _select(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (N, k) and whether they count, which those that fill up a row do not."""
        config = self.config
        if config.select != "batch_topk":
            latent = select_dense(config, margins, config.parts)[1]
            return latent, torch.ones_like(latent, dtype=torch.bool)
        above = margins >= latent_thresholds(config, self.select_threshold)
        width = max(1, int(above.sum(1).max())) if len(margins) else 1
        ranked, latent = margins.masked_fill(~above, -torch.inf).topk(width, dim=1)
        return latent, ranked != -torch.inf

    def _shift(self, margins: Tensor, latent: Tensor) -> Tensor:
        """Row thresholds of `newton`, which its surrogate is taken at; else 0."""
        if self.config.threshold != "newton" or self.config.code == "continuous":
            return margins.new_zeros(())
        part = self.config.parts[-1]
        shift = topk.newton_shift(margins[:, part.start : part.stop], part.k)
        return shift.to(margins.dtype).expand_as(latent)

    def _say_that_gradients_stop(self, margin: Tensor) -> None:
        if self.surrogate is None and margin.requires_grad and not self._warned:
            self._warned = True
            warnings.warn(
                "no gradient flows through the binary latents of this coder: their step has no "
                "derivative. Name a surrogate, such as CoderModule(coder, surrogate='sigmoid').",
                stacklevel=3,
            )
