"""Forward and backward pass of one coder over some rows: the loss, term by term, and its gradients.

The loss is a sum of terms w * |target - decoded code|^2 / (N V): the reconstruction (w = 1), with
multi-TopK the one with 4 k latents (w = 1/8), with AuxK what dead latents make of the residual.
Each is worked through by `_term`; docs/coders.md derives the gradients.

Shape letters: N rows, F latents, k selected latents per row, M selected entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bsc.train.coders import kernels, surrogates
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.kernels import Entries
from bsc.train.coders.select import Selection, code_values, select

__all__ = ["GUMBEL_CANDIDATES", "CoderPass"]

GUMBEL_CANDIDATES = 4
"""Latents of a group that its softmax is over."""
_MULTI_TOPK, _MULTI_WEIGHT = 4, 1 / 8


@dataclass
class CoderPass:
    """One coder and the rows that it is to see. Gradients are to centred rows and acting weights;
    the bank turns them into those of the parameters once per batch."""

    config: CoderConfig
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    w_dec: Tensor
    """(F, d_out): the decoder that acts, in the dtype of products."""
    centre: Tensor
    """(d_in,): was subtracted from the rows."""
    z: Tensor
    """(N, d_in + extra): centred rows, then a column of ones, in the dtype of products."""
    y: Tensor
    """(N, d_out): targets."""
    k: int
    temperature: float
    dead: Tensor | None
    """(F,) bool: latents that AuxK trains."""
    noise: torch.Generator | None
    along: Tensor | None
    """(F, 1): gets <gradient of an acting decoder row, the row>; None: not needed."""
    dot: Callable[[Tensor, Tensor, Entries], Tensor]
    scale: float
    """1 / (rows of the batch * total variance)."""
    add: bool
    """Whether to add to the gradients, which otherwise are overwritten."""

    def run(self, margin_NF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add all gradients.

        Args:
            margin_NF: pre - theta of every latent.

        Returns:
            Of the M selected entries the latent (int64), the margin and whether the code is not 0;
            and the squared error times `scale`.
        """
        config, p = self.config, self.parameters
        d_in = len(self.centre)
        target = self.y - p["b_dec"]  # what latents and the skip path have to give
        if "W_skip" in p:
            target -= p["W_skip"] @ self.centre
            target -= self.z[:, :d_in] @ p["W_skip"].to(self.z.dtype).T
        add_base = self.add
        if config.surrogate == "gumbel":
            chosen, code, backward = self._gumbel(margin_NF)
        else:
            chosen, backward = select(config, margin_NF, self.k), self._straight_through
            code = code_values(config, chosen.entries.latent, chosen.margin)
        error, g_base = self._term(chosen, code, backward, target, 1.0)
        if config.multi_topk:
            k = min(_MULTI_TOPK * self.k, config.n_latents)
            more = select(config, margin_NF, k)
            values = code_values(config, more.entries.latent, more.margin)
            _, g_more = self._term(more, values, self._straight_through, target, _MULTI_WEIGHT)
            g_base = g_base + g_more
        self._give("b_dec", g_base.sum(0), add_base)
        if "W_skip" in p:
            product = (g_base.to(self.z.dtype).T @ self.z[:, :d_in]).to(g_base.dtype)
            self._give("W_skip", product.addr_(g_base.sum(0), self.centre), add_base)
        if config.auxk_alpha > 0 and self.dead is not None:
            self._auxk(margin_NF, error)
        loss = error.square_().sum() * self.scale
        return chosen.entries.latent.long(), chosen.margin, code != 0, loss

    def _term(
        self,
        chosen: Selection,
        code: Tensor,
        backward: Callable[[Tensor, Selection], Tensor],
        target: Tensor,
        weight: float,
    ) -> tuple[Tensor, Tensor]:
        """weight * scale * |decoded code - target|^2: adds its gradients to decoder and encoder.

        Returns:
            The error, and the gradient to the reconstruction, (N, d_out).
        """
        entries, dtype = chosen.entries, self.z.dtype
        error = kernels.decode(entries, code.to(dtype), self.w_dec).to(target.dtype) - target
        g_y = error * (2 * weight * self.scale)
        g_rounded = g_y.to(dtype)
        g_code = self.dot(g_rounded, self.w_dec, entries).to(target.dtype)
        g_pre = backward(g_code, chosen)
        by_latent = kernels.transpose(entries, self.config.n_latents)
        if self.along is not None:
            ones = g_code.new_ones((len(target), 1))
            along = kernels.latent_sums(by_latent, code.to(g_code.dtype) * g_code, ones)
            self.along.add_(along) if self.add else self.along.copy_(along)
        sums = kernels.latent_sums(by_latent, g_pre.to(dtype), self.z)
        d_in = len(self.centre)
        self._give("W_dec", kernels.latent_sums(by_latent, code.to(dtype), g_rounded), self.add)
        self._give("encoder.weight", sums[:, :d_in], self.add)
        self._give("encoder.bias", sums[:, d_in], self.add)
        self.add = True
        return error, g_y

    def _straight_through(self, g_code: Tensor, chosen: Selection) -> Tensor:
        """Gradient of a code to its pre-activation."""
        config, margin = self.config, chosen.margin.to(g_code.dtype)
        if config.code == "continuous":
            return g_code * (margin > 0)
        g = surrogates.SURROGATES[config.surrogate](g_code, margin, self.temperature)
        if config.code == "binary":
            return g
        return torch.where(chosen.entries.latent >= config.first_binary, g, g_code * (margin > 0))

    def _gumbel(
        self, margin_NF: Tensor
    ) -> tuple[Selection, Tensor, Callable[[Tensor, Selection], Tensor]]:
        """The largest of each group after noise, whose code is 1, and its runners-up: 0."""
        if self.noise is not None:
            noise = surrogates.gumbel_noise(margin_NF, self.noise)
            margin_NF = (margin_NF + noise).to(margin_NF.dtype)
        values, index = kernels.group_topk(margin_NF, self.k, GUMBEL_CANDIDATES)
        code = torch.zeros_like(values)
        code[:, :, 0] = 1

        def backward(g_code: Tensor, chosen: Selection) -> Tensor:
            perturbed = chosen.margin.to(g_code.dtype).view_as(values)
            g = surrogates.gumbel(g_code.view_as(perturbed), perturbed, self.temperature)
            return g.flatten()

        chosen = Selection(Entries.of(index.flatten(1)), values.reshape(-1))
        return chosen, code.flatten(), backward

    def _auxk(self, margin_NF: Tensor, error: Tensor) -> None:
        """Dead latents reconstruct what is left over (Gao et al. 2024, section A.2).

        The k most active of them, with the value relu(margin) whatever the code; the residual is a
        constant. Scaled down where fewer than k latents are dead.
        """
        assert self.dead is not None
        dead = self.dead.nonzero().flatten()
        if not len(dead):
            return
        wanted = self.config.auxk_k or max(1, self.config.d_out // 2)
        k = min(wanted, len(dead))
        margin, index = kernels.select_topk(margin_NF[:, dead], k)
        chosen = Selection(Entries.of(dead[index]), margin.reshape(-1))
        self._term(
            chosen,
            chosen.margin.relu(),
            lambda g_code, chosen: g_code * (chosen.margin > 0),
            -error,
            self.config.auxk_alpha * k / wanted,
        )

    def _give(self, name: str, value: Tensor, add: bool) -> None:
        if add:
            self.gradients[name].add_(value)
        else:
            self.gradients[name].copy_(value)
