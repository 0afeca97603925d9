"""Forward and backward pass of one coder over some rows: the loss, term by term, and its gradients.

The loss is a sum of terms w * |target - decoded code|^2 / (N V): the reconstruction (w = 1), with
multi-TopK the one with 4 k latents (w = 1/8), with AuxK what dead latents make of the residual.
Each is worked through by `_term`; a penalty on frequent latents adds to the first one's gradients.
docs/coders.md derives them.

Shape letters: N rows, F latents, k selected latents per row, M selected entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bsc.train.coders import kernels, surrogates, topk
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.kernels import Entries, TransposedCode
from bsc.train.coders.select import Selection, code_values, parts_at, select

__all__ = ["GUMBEL_CANDIDATES", "CoderPass"]

GUMBEL_CANDIDATES = 4
"""Latents of a group that its softmax is over."""
_MULTI_TOPK, _MULTI_WEIGHT = 4, 1 / 8

_Backward = Callable[[Tensor, Tensor, TransposedCode], Tensor]
"""Gradients of margins from those of codes and from the margins, all by latent, (M,)."""


class _Term(NamedTuple):
    """What a term of the loss leaves for the others."""

    error: Tensor
    """(N, d_out): decoded code less target."""
    g_y: Tensor
    """(N, d_out): gradient to the reconstruction."""
    g_bias: Tensor
    """(F,): gradient to the biases of the encoder, which is that to all margins of a latent."""


@dataclass
class CoderPass:
    """One coder and the rows that it is to see. Gradients are to centred rows and acting weights;
    the bank turns them into those of the parameters once per batch."""

    config: CoderConfig
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    w_dec: Tensor
    """(F, d_out): the decoder that acts, in the dtype of products."""
    gain: Tensor | None
    """(F,): what rows of the parameter W_dec are multiplied by to give those that act; None: 1."""
    centre: Tensor
    """(d_in,): was subtracted from the rows of a transcoder; those of an SAE are less b_dec."""
    z: Tensor
    """(N, d_in + extra): centred rows, then a column of ones, in the dtype of products."""
    target: Tensor
    """(N, d_out): what latents and the skip path have to give, less b_dec. Used up."""
    k: int
    temperature: float
    dead: Tensor | None
    """(F,) bool: latents that AuxK trains."""
    n_dead: int | None
    """How many; None: not known on the host."""
    noise: torch.Generator | None
    along: Tensor | None
    """(F, 1): gets <gradient of an acting decoder row, the row>; None: not needed."""
    aux_bias: Tensor | None
    """(F,): gets AuxK's own share of the gradient to the biases; None: not needed."""
    dot: Callable[[Tensor, Tensor, TransposedCode], Tensor]
    row_errors: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """`passes.row_errors`, or its compiled form."""
    scale: float
    """1 / (rows of the batch * total variance)."""
    rows: int
    """Rows of the batch, of which these may be a part."""
    add: bool
    """Whether to add to the gradients, which otherwise are overwritten."""
    sums: dict[str, Tensor] | None
    """Gets the gradients of the matrices instead, as summed, where one term is all that there is:
    the bank then passes over them once. None: there is more to come."""

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
        target = self.target
        if "W_skip" in p:
            target -= p["W_skip"] @ self.centre
            target -= self.z[:, :d_in] @ p["W_skip"].to(self.z.dtype).T
        add_base = self.add
        shift = self._row_thresholds(margin_NF)

        def backward(g_code: Tensor, margin: Tensor, by_latent: TransposedCode) -> Tensor:
            return self._straight_through(g_code, margin, by_latent, shift)

        def penalised(g_code: Tensor, margin: Tensor, by_latent: TransposedCode) -> Tensor:
            g_pre = backward(g_code, margin, by_latent)
            return g_pre.add_(self._rate_gradients(code, by_latent))

        if config.surrogate == "gumbel":
            chosen, code, term = self._gumbel(margin_NF, target)
        else:
            chosen = select(config, margin_NF, self.k)
            code = code_values(config, chosen.entries.latent, chosen.margin)
            first = penalised if config.rate_penalty else backward
            term = self._term(chosen, code, first, target, 1.0)
        error, g_base = term.error, term.g_y
        if config.multi_topk:
            k = min(_MULTI_TOPK * self.k, config.n_latents)
            more = select(config, margin_NF, k)
            values = code_values(config, more.entries.latent, more.margin)
            g_base = g_base + self._term(more, values, backward, target, _MULTI_WEIGHT).g_y
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
        backward: _Backward,
        target: Tensor,
        weight: float,
    ) -> _Term:
        """weight * scale * |decoded code - target|^2: adds its gradients to decoder and encoder."""
        error, g_y, g_rounded = self._error(chosen, code, target, weight)
        by_latent = kernels.transpose(chosen.entries, self.config.n_latents)
        g_code = self._code_gradients(g_y, g_rounded, by_latent)
        ordered_code, margin = (t.index_select(0, by_latent.order) for t in (code, chosen.margin))
        self._decoder_gradients(by_latent, ordered_code, g_rounded, g_code)
        g_pre = backward(g_code, margin, by_latent)
        sums = kernels.latent_sums(by_latent, g_pre.to(self.z.dtype), self.z)
        return _Term(error, g_y, self._encoder_gradients(sums))

    def _error(
        self, chosen: Selection, code: Tensor, target: Tensor, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Error of the decoded code, its gradient, and that in the dtype of products."""
        decoded = kernels.decode(chosen.entries, code.to(self.z.dtype), self.w_dec)
        factor = torch.full((), 2 * weight * self.scale, dtype=target.dtype, device=target.device)
        return self.row_errors(decoded, target, factor)

    def _code_gradients(self, g_y: Tensor, g_rounded: Tensor, by_latent: TransposedCode) -> Tensor:
        """Gradients of the code, (M,) by latent, in the dtype of `g_y`.

        From what was not rounded where that takes no longer.
        """
        exact = kernels.dots_in_float32(g_y.device, self.w_dec.dtype)
        if self.dot is not kernels.decoder_dot or not exact:  # compiled: in any dtype
            return self.dot(g_rounded, self.w_dec, by_latent).to(g_y.dtype)
        g_code = self.dot(g_y, self.parameters["W_dec"], by_latent)
        return g_code if self.gain is None else g_code.mul_(self.gain[by_latent.latent])

    def _decoder_gradients(
        self, by_latent: TransposedCode, code: Tensor, g_rounded: Tensor, g_code: Tensor
    ) -> None:
        """Add the gradients of the decoder; code and its gradients are by latent."""
        if self.along is not None:
            ones = g_code.new_ones((len(g_rounded), 1))
            along = kernels.latent_sums(by_latent, code.to(g_code.dtype) * g_code, ones)
            self.along.add_(along) if self.add else self.along.copy_(along)
        sums = kernels.latent_sums(by_latent, code.to(g_rounded.dtype), g_rounded)
        self._give_matrix("W_dec", sums)

    def _encoder_gradients(self, sums: Tensor) -> Tensor:
        """Add the gradients of the encoder, (F, d_in + extra); that of the biases, (F,)."""
        d_in = len(self.centre)
        self._give_matrix("encoder.weight", sums[:, :d_in])
        self._give("encoder.bias", sums[:, d_in], self.add)
        self.add = True
        return sums[:, d_in]

    def _row_thresholds(self, margin_NF: Tensor) -> Tensor | None:
        """(N, 1): what is added to the margins of binary latents with `threshold = "newton"`."""
        if self.config.threshold != "newton":
            return None
        part = parts_at(self.config, self.k)[-1]
        return topk.newton_shift(margin_NF[:, part.start : part.stop], part.k)

    def _straight_through(
        self, g_code: Tensor, margin: Tensor, by_latent: TransposedCode, shift: Tensor | None
    ) -> Tensor:
        """Gradients of margins from those of codes; all by latent."""
        config, margin = self.config, margin.to(g_code.dtype)
        if config.code == "continuous":
            return g_code * (margin > 0)
        shifted = margin
        if shift is not None:
            shifted = margin + shift.to(margin.dtype)[by_latent.row, 0]
        g = surrogates.SURROGATES[config.surrogate](g_code, shifted, self.temperature)
        if config.code == "binary":
            return g
        return torch.where(by_latent.latent >= config.first_binary, g, g_code * (margin > 0))

    def _rate_gradients(self, code: Tensor, by_latent: TransposedCode) -> Tensor:
        """What the penalty on frequent latents adds to the gradients of margins, (M,) by latent.

        That of rate_penalty sum_f max(0, rate_f - rate_cap), straight through with slope 1: see
        docs/coders.md. `code` is (M,), in the order of the entries.
        """
        config, n_rows = self.config, len(self.z)
        on = (code[by_latent.order] != 0).to(torch.float32)
        rate_F = kernels.latent_sums(by_latent, on, on.new_ones((n_rows, 1)))[:, 0] / n_rows
        above = (rate_F > config.rate_cap).to(self.target.dtype)
        return (
            above[by_latent.latent] * on.to(self.target.dtype) * (config.rate_penalty / self.rows)
        )

    def _gumbel(self, margin_NF: Tensor, target: Tensor) -> tuple[Selection, Tensor, _Term]:
        """The largest of each group after noise, whose code is 1."""
        if self.noise is not None:
            noise = surrogates.gumbel_noise(margin_NF, self.noise)
            margin_NF = (margin_NF + noise).to(margin_NF.dtype)
        if self.config.gumbel_support == "full":
            return self._full_gumbel(margin_NF, target)
        chosen, code, backward = self._top_gumbel(margin_NF)
        return chosen, code, self._term(chosen, code, backward, target, 1.0)

    def _full_gumbel(self, perturbed_NF: Tensor, target: Tensor) -> tuple[Selection, Tensor, _Term]:
        """The softmax over whole groups: every latent has a gradient, by two dense products.

        4 N F d FLOPs beside those of the encoder; some passes over N F values in float32.
        """
        values, index = topk.groupmax(perturbed_NF, self.k)
        chosen, code = Selection(Entries.of(index), values.reshape(-1)), torch.ones_like(values)
        error, g_y, g_rounded = self._error(chosen, code.flatten(), target, 1.0)
        g_NF = (g_rounded @ self.w_dec.T).to(target.dtype)
        by_latent = kernels.transpose(chosen.entries, self.config.n_latents)
        g_code = g_NF.gather(1, index).flatten()[by_latent.order]
        self._decoder_gradients(by_latent, code.flatten(), g_rounded, g_code)  # every code is 1
        groups = (self.k, -1)
        g_pre = surrogates.gumbel(
            g_NF.unflatten(1, groups),
            perturbed_NF.to(target.dtype).unflatten(1, groups),
            self.temperature,
        )
        sums = g_pre.flatten(1).to(self.z.dtype).T @ self.z
        return chosen, code.flatten(), _Term(error, g_y, self._encoder_gradients(sums))

    def _top_gumbel(self, margin_NF: Tensor) -> tuple[Selection, Tensor, _Backward]:
        """The largest of each group, whose code is 1, and its runners-up, whose code is 0."""
        values, index = topk.group_topk(margin_NF, self.k, GUMBEL_CANDIDATES)
        code = torch.zeros_like(values)
        code[:, :, 0] = 1

        def backward(g_code: Tensor, margin: Tensor, by_latent: TransposedCode) -> Tensor:
            g_Nkm = torch.empty_like(g_code).index_copy_(0, by_latent.order, g_code).view_as(values)
            g = surrogates.gumbel(g_Nkm, values.to(g_code.dtype), self.temperature)
            return g.flatten()[by_latent.order]

        chosen = Selection(Entries.of(index.flatten(1)), values.reshape(-1))
        return chosen, code.flatten(), backward

    def _auxk(self, margin_NF: Tensor, error: Tensor) -> None:
        """Dead latents reconstruct what is left over (Gao et al. 2024, section A.2).

        The k most active of them, with the value relu(margin) whatever the code; the residual is a
        constant. Scaled down where fewer than k latents are dead.
        """
        assert self.dead is not None
        if self.n_dead is None:
            dead = self.dead.nonzero().flatten()
        else:  # the same, without waiting for a GPU to count them
            order = self.dead.to(torch.uint8).argsort(descending=True, stable=True)
            dead = order[: self.n_dead]
        if not len(dead):
            return
        wanted = self.config.auxk_k or max(1, self.config.d_out // 2)
        k = min(wanted, len(dead))
        margin, index = topk.select_topk(margin_NF[:, dead], k)
        chosen = Selection(Entries.of(dead[index]), margin.reshape(-1))
        term = self._term(
            chosen,
            chosen.margin.relu(),
            lambda g_code, margin, by_latent: g_code * (margin > 0),
            -error,
            self.config.auxk_alpha * k / wanted,
        )
        if self.aux_bias is not None:
            self.aux_bias.add_(term.g_bias)

    def _give_matrix(self, name: str, sums: Tensor) -> None:
        if self.sums is None:
            self._give(name, sums, self.add)
        elif not self.add:
            self.sums[name] = sums
        else:
            if name in self.sums:
                self._give(name, self.sums.pop(name), False)
            self._give(name, sums, True)

    def _give(self, name: str, value: Tensor, add: bool) -> None:
        if add:
            self.gradients[name].add_(value)
        else:
            self.gradients[name].copy_(value)
