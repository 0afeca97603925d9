"""A coder as a torch module: for hooks, nnsight, finetuning; differentiable.

The names in its state dict are those of a coder on disk. Rows pass through in the dtype of its
parameters and come back in that of the rows.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from bsc.train.coders import surrogates, topk
from bsc.train.coders.coder import Code, SparseCoder, latent_thresholds, parameter_shapes
from bsc.train.coders.select import select_dense

__all__ = ["CoderModule"]


class _Step(torch.autograd.Function):
    """1 where a margin is above 0 (or everywhere), with the gradient of a surrogate.

    Gradients are those of training (docs/coders.md), to pre-activations and to log thresholds.
    """

    @staticmethod
    def forward(
        ctx: Any, margin: Tensor, log_threshold: Tensor, shift: Tensor, surrogate: str | None,
        temperature: float, always_on: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(margin, log_threshold, shift)
        ctx.how = surrogate, temperature
        return torch.ones_like(margin) if always_on else (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        margin, log_threshold, shift = ctx.saved_tensors
        surrogate, temperature = ctx.how
        none = (None,) * 4
        if surrogate is None:
            return (None, None, *none)
        g = surrogates.SURROGATES[surrogate](grads[0], margin + shift, temperature)
        factor = surrogates.threshold_factor(surrogate, log_threshold.exp(), temperature)
        return (g, g * factor, *none)


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
        self, coder: SparseCoder, surrogate: str | None = None, temperature: float | None = None
    ) -> None:
        """Take a copy of a coder's tensors.

        Args:
            coder: the coder.
            surrogate: gradient of a binary latent's step, one of `surrogates.SURROGATES`; None:
                none, so that nothing flows through binary latents.
            temperature: of the surrogate; None: as in training.

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
        tensors = {n: t.detach().clone() for n, t in self.state_dict().items()}
        assert set(tensors) == set(parameter_shapes(self.config))
        return SparseCoder(self.config, tensors, about=self.about)

    def encode(self, x: Tensor) -> Code:
        """Code of rows (..., d_in), differentiable but for which latents are selected."""
        config, own = self.config, self.encoder.weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(own)
        if config.site == "sae":
            rows = rows - self.b_dec
        pre = linear(rows, self.encoder.weight, self.encoder.bias)
        log_threshold = self._log_threshold(pre)
        margins = pre - (log_threshold.exp() if config.has_threshold else 0)
        latent, on = self._select(margins.detach())
        margin = margins.gather(1, latent)
        value = margin.relu()
        binary = latent >= config.first_binary
        if config.code != "continuous":
            self._say_that_gradients_stop(margin)
            # The margin's own dependence on the threshold is in the step.
            at = pre.gather(1, latent) - log_threshold.detach().exp()[latent] * config.has_threshold
            step: Tensor = _Step.apply(  # type: ignore[no-untyped-call] # torch leaves it untyped
                at, log_threshold[latent], self._shift(margins.detach(), latent), self.surrogate,
                self.temperature, config.always_on,
            )  # fmt: skip
            value = torch.where(binary, step, value)
        value = value.masked_fill(~on, 0)
        shape = (*x.shape[:-1], latent.shape[1])
        return Code(latent.reshape(shape), value.reshape(shape), margin.reshape(shape))

    def decode(self, code: Code, x: Tensor) -> Tensor:
        """y_hat (..., d_out) of a code, and of the rows that it is of (for the skip path)."""
        latent, value = (t.reshape(-1, t.shape[-1]) for t in (code.latent, code.value))
        value = value.to(self.W_dec.dtype)
        y = embedding_bag(latent, self.W_dec, per_sample_weights=value, mode="sum") + self.b_dec
        y = y.reshape(*code.latent.shape[:-1], -1)
        return y + linear(x.to(y.dtype), self.W_skip) if hasattr(self, "W_skip") else y

    def forward(self, x: Tensor) -> Tensor:
        """y_hat (..., d_out) of rows (..., d_in), in the dtype of the rows."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def _log_threshold(self, pre: Tensor) -> Tensor:
        """(F,): 0 where a latent has no threshold, which its margin then does not see."""
        if not self.config.has_threshold:
            return pre.new_zeros(pre.shape[1])
        first = self.config.first_binary
        none = pre.new_full((first,), -torch.inf)
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
