"""A bank: coders of one shape, stacked, trained on the same rows with one encoder GEMM for all.

The forward pass and every gradient are written out (docs/coders.md derives them), on sparse
operations that never make anything of size N x k x d. Tests hold them to autograd in float64.

Shape letters: C coders, N rows, F latents, k selected latents per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsc.train.coders import kernels
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig

__all__ = ["Bank", "StepResult"]


class StepResult(NamedTuple):
    """What one forward and backward pass says of each coder."""

    loss: Tensor
    """(C,): squared error of the batch over the total variance that the rows have by the store."""
    l0: Tensor
    """(C,): mean number of latents per row that are not 0."""
    fired: Tensor
    """(C, F) bool: latents that are not 0 in at least one row."""


class Bank:
    """Stacked parameters of C coders and their gradients.

    `parameters[name]` is (C, *shape) and `gradients[name]` the same, by the names on disk. The
    slice of a coder is a view, so an optimiser may work on one coder alone.
    """

    def __init__(
        self,
        configs: Sequence[CoderConfig],
        *,
        total_variance: float,
        compute_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Make a bank with parameters of zeros; `initialise` sets them.

        Args:
            configs: one per coder. Site, widths and number of latents are the same for all.
            total_variance: mean squared distance of a target row from the mean target row.
            compute_dtype: of the encoder GEMM.
            dtype: of parameters, gradients and everything else.
            device: where they are.
        """
        first = configs[0]
        shared = [(c.site, c.n_latents, c.d_in, c.d_out) for c in configs]
        assert len(set(shared)) == 1, "coders of one bank share site, widths and n_latents"
        self.configs, self.site = tuple(configs), first.site
        self.n_latents, self.d_in, self.d_out = first.n_latents, first.d_in, first.d_out
        self.total_variance, self.compute_dtype = total_variance, compute_dtype
        # log_threshold is stacked for all, so that binary and continuous coders share a bank.
        shapes = parameter_shapes(first) | {"log_threshold": (first.n_latents,)}
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        stack = (len(configs),)
        self.parameters = {n: torch.zeros(stack + s, **options) for n, s in shapes.items()}
        self.gradients = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self._weight = torch.empty(
            (len(configs) * self.n_latents, self.d_in), dtype=compute_dtype, device=device
        )

    def names(self, coder: int) -> list[str]:
        """Names of the tensors that coder number `coder` trains."""
        config = self.configs[coder]
        names = list(parameter_shapes(config))
        if config.binary and config.threshold == "fixed":
            names.remove("log_threshold")
        return names

    def initialise(self, seeds: Sequence[int], mean_x: Tensor, mean_y: Tensor) -> None:
        """Set the parameters of every coder from its seed; coders with one seed begin alike.

        W_enc is uniform in +-1/sqrt(d_in), b_dec = mean y. SAE: W_dec = W_enc with rows of length
        1. Transcoders: W_dec = 0, W_skip = 0, b_enc = -W_enc mean x, so that a coder begins as the
        constant mean and its pre-activations are centred.

        Args:
            seeds: one per coder.
            mean_x: (d_in,), mean of the rows that are encoded.
            mean_y: (d_out,), mean of the rows that are reconstructed.
        """
        p = self.parameters
        mean_x, mean_y = (m.to(p["b_dec"]) for m in (mean_x, mean_y))
        for c, (config, seed) in enumerate(zip(self.configs, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            bound = 1 / math.sqrt(self.d_in)
            drawn = torch.rand((self.n_latents, self.d_in), generator=generator)
            w = (2 * drawn - 1).mul_(bound).to(p["b_dec"])
            p["encoder.weight"][c] = w
            p["b_dec"][c] = mean_y
            p["log_threshold"][c] = math.log(config.threshold_init)
            if self.site == "sae":
                p["W_dec"][c] = w / w.norm(dim=1, keepdim=True)
            else:
                p["encoder.bias"][c] = -(w @ mean_x)

    def decoder(self, coder: int) -> Tensor:
        """The decoder that acts, (F, d_out): with rows of length 1 where the config says so."""
        w: Tensor = self.parameters["W_dec"][coder]
        if self.configs[coder].decoder_norm == "unit":
            w = w / w.norm(dim=1, keepdim=True)
        return w

    def _pre_activations(self, x_Nd: Tensor) -> Tensor:
        """Margins of every latent, (N, C, F): one GEMM, biases and thresholds folded in."""
        p = self.parameters
        bias = p["encoder.bias"].clone()
        if self.site == "sae":  # (x - b_dec) W^T + b = x W^T + (b - W b_dec)
            bias -= torch.einsum("cfd,cd->cf", p["encoder.weight"], p["b_dec"])
        for c, config in enumerate(self.configs):
            if config.binary:
                bias[c] -= p["log_threshold"][c].exp()
        self._weight.copy_(p["encoder.weight"].view_as(self._weight))
        pre = torch.nn.functional.linear(
            x_Nd.to(self.compute_dtype), self._weight, bias.flatten().to(self.compute_dtype)
        )
        return pre.view(len(x_Nd), len(self.configs), self.n_latents)

    @torch.no_grad()
    def step(self, x_Nd: Tensor, y_Nd: Tensor) -> StepResult:
        """Forward and backward pass over a batch: overwrites `gradients`.

        Args:
            x_Nd: rows that are encoded, (N, d_in), any float dtype.
            y_Nd: rows that are reconstructed, (N, d_out), any float dtype.

        Returns:
            The loss whose gradient was taken, and what fired.
        """
        dtype = self.parameters["b_dec"].dtype
        pre_NCF = self._pre_activations(x_Nd)
        x_Nd, y_Nd = x_Nd.to(dtype), y_Nd.to(dtype)
        results = [self._coder_step(c, pre_NCF[:, c], x_Nd, y_Nd) for c in range(len(self.configs))]
        loss, l0, fired = (torch.stack(parts) for parts in zip(*results, strict=True))
        return StepResult(loss, l0, fired)

    def _coder_step(
        self, c: int, pre_NF: Tensor, x_Nd: Tensor, y_Nd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, n = self.configs[c], len(x_Nd)
        p = {name: stacked[c] for name, stacked in self.parameters.items()}
        grad = {name: stacked[c] for name, stacked in self.gradients.items()}
        w_dec = self.decoder(c)

        margin, index = kernels.select_topk(pre_NF, config.k)
        margin = margin.to(x_Nd.dtype)
        code = (margin > 0).to(margin.dtype) if config.binary else margin.relu()
        y_hat = kernels.decode(index, code, w_dec).add_(p["b_dec"])
        if "W_skip" in p:
            y_hat.addmm_(x_Nd, p["W_skip"].T)
        error = y_hat.sub_(y_Nd)
        scale = 1 / (n * self.total_variance)
        loss = error.square().sum() * scale

        g_y = error.mul_(2 * scale)
        g_code = kernels.decoder_dot(g_y, w_dec, index)
        if config.binary:
            s = torch.sigmoid(margin / config.temperature)
            g_pre = g_code * s * (1 - s)
        else:
            g_pre = g_code * (margin > 0)
        transposed = kernels.transpose(index, config.n_latents)
        torch.sum(g_y, dim=0, out=grad["b_dec"])
        grad["W_dec"].copy_(kernels.latent_sums(transposed, code, g_y))
        grad["encoder.weight"].copy_(kernels.latent_sums(transposed, g_pre, x_Nd))
        grad["encoder.bias"].zero_().index_add_(0, index.flatten(), g_pre.flatten())
        if "W_skip" in grad:
            torch.mm(g_y.T, x_Nd, out=grad["W_skip"])
        if config.binary:  # d margin / d log theta = -theta
            torch.mul(p["log_threshold"].exp(), -grad["encoder.bias"], out=grad["log_threshold"])
        if self.site == "sae":  # the encoder read x - b_dec
            grad["b_dec"].addmv_(p["encoder.weight"].T, grad["encoder.bias"], alpha=-1)
            grad["encoder.weight"].addr_(grad["encoder.bias"], p["b_dec"], alpha=-1)
        if config.decoder_norm == "unit":
            self._project(grad["W_dec"], w_dec, p["W_dec"])

        on = code != 0
        fired = torch.zeros(config.n_latents, dtype=torch.bool, device=index.device)
        fired[index[on]] = True
        return loss, on.sum() / n, fired

    @staticmethod
    def _project(grad_Fd: Tensor, unit_Fd: Tensor, w_Fd: Tensor) -> None:
        """Gradient to W of a loss of W / |W|, in place: the part across a row, over its length."""
        grad_Fd -= (grad_Fd * unit_Fd).sum(dim=1, keepdim=True) * unit_Fd
        grad_Fd /= w_Fd.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def renormalise(self, coder: int) -> None:
        """Give the decoder rows of a coder length 1 where its config says so; acts as before."""
        if self.configs[coder].decoder_norm == "unit":
            self.parameters["W_dec"][coder].copy_(self.decoder(coder))

    def export(self, coder: int, about: dict[str, Any] | None = None) -> SparseCoder:
        """One coder as it stands, its tensors copied."""
        config = self.configs[coder]
        tensors = {n: self.parameters[n][coder].detach().clone() for n in parameter_shapes(config)}
        tensors["W_dec"] = self.decoder(coder).detach().clone()
        return SparseCoder(config, tensors, about=about)
