"""A bank: coders of one shape, stacked, trained on the same rows.

The forward pass and every gradient are written out (docs/coders.md derives them), on sparse
operations that never make anything of size N x k x d. Tests hold them to autograd in float64.

Parameters are float32; the rows, the weights of the encoder and the decoder and the gradients of
reconstructions are rounded to bfloat16 for the arithmetic, whose sums are float32. Rows are centred
before they are rounded (those of an SAE by its own b_dec, which is what it reads), and biases go
through the encoder's GEMM as two more columns (the rounded bias and what was lost in rounding), so
that a mean far from zero costs no precision.

Shape letters: C coders, N rows, F latents, k selected latents per row, M selected entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsc.train.coders import kernels, surrogates
from bsc.train.coders.backward import CoderPass
from bsc.train.coders.coder import SparseCoder, parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.passes import EAGER, compiled_passes

__all__ = ["EXTRA_COLUMNS", "Bank", "StepResult"]

EXTRA_COLUMNS = 8
"""Columns beside those of a row in the encoder's GEMM: bias, its rest, and padding."""
_THRESHOLD_MEMORY = 0.99


class StepResult(NamedTuple):
    """What one forward and backward pass says of each coder."""

    loss: Tensor
    """(C,): squared error of the batch over the total variance that the rows have by the store;
    without AuxK, multi-TopK and the penalty on frequent latents."""
    l0: Tensor
    """(C,): mean number of latents per row that are not 0."""
    fired: Tensor
    """(C, F) bool: latents that are not 0 in at least one row."""


class Bank:
    """Stacked parameters of C coders and their gradients.

    `parameters[name]` is (C, *shape) and `gradients[name]` the same, by the names on disk (and
    `amplitude`). Rows of W_dec have length 1 at every step where `decoder_norm` is "unit":
    `renormalise` after whatever changes them. `trained(c)` has the slices of one coder as views,
    for an optimiser of its own.
    """

    def __init__(
        self,
        configs: Sequence[CoderConfig],
        *,
        total_variance: float,
        compute_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        units: tuple[float, float] = (1.0, 1.0),
        compiled: bool = False,
    ) -> None:
        """Make a bank with parameters of zeros; `initialise` sets them.

        Args:
            configs: one per coder. Site, widths and number of latents are the same for all.
            total_variance: mean squared distance of a target row from the mean target row.
            compute_dtype: of the products; their sums are float32 or better.
            dtype: of parameters and gradients.
            device: where they are.
            units: what rows that are encoded and rows that are reconstructed are divided by.
            compiled: torch.compile what gains by it, at the first step.
        """
        first = configs[0]
        shared = [(c.site, c.n_latents, c.d_in, c.d_out) for c in configs]
        assert len(set(shared)) == 1, "coders of one bank share site, widths and n_latents"
        self.configs, self.site = tuple(configs), first.site
        self.n_latents, self.d_in, self.d_out = first.n_latents, first.d_in, first.d_out
        self.total_variance, self.compute_dtype, self.units = total_variance, compute_dtype, units
        self.k = [c.k for c in configs]
        """Latents that each coder selects now; a schedule may change it."""
        self.temperature = [c.temperature for c in configs]
        """Temperature of each coder's surrogate now."""
        self.dead: Tensor | None = None
        """(C, F) bool: latents that AuxK trains; None: none."""
        self.n_dead: list[int] | None = None
        """How many latents of each coder are dead; None: to be counted when they are needed."""
        self.generators: list[torch.Generator] | None = None
        """Generators of the noise of each gumbel coder; None: no noise."""
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        shapes = parameter_shapes(first.model_copy(update={"code": "continuous"}))
        shapes.pop("select_threshold", None)
        # Stacked for all where one coder needs them, so that different coders share a bank.
        if any(c.has_threshold for c in configs):
            shapes["log_threshold"] = (first.n_latents,)
        if any(c.amplitude == "learned" for c in configs):
            shapes["amplitude"] = (first.n_latents,)
        n = len(configs)
        self.parameters = {name: torch.zeros((n, *s), **options) for name, s in shapes.items()}
        self.gradients = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.select_minimum = torch.zeros((n, 2, 2), dtype=torch.float64, device=device)
        """Batch top-k: per coder and part, running sum and weight of the smallest active margin."""
        self._centre = torch.zeros(self.d_in, **options)
        unit = any(c.decoder_norm == "unit" for c in configs)
        self._along = torch.zeros((n, self.n_latents if unit else 0, 1), **options)
        apart = any(self._has_aux_apart(c) for c in range(n))
        self._aux_bias = torch.zeros((n, self.n_latents if apart else 0), **options)
        """AuxK's own gradient to the biases, where that to a threshold is another multiple."""
        options["dtype"] = compute_dtype
        self._encoder = torch.zeros((n, self.n_latents, self.d_in + EXTRA_COLUMNS), **options)
        self._decoder = torch.zeros((n, self.n_latents, self.d_out), **options)
        self._pre = torch.empty((0, self.n_latents), **options)
        self._rows = torch.zeros((0, self.d_in + EXTRA_COLUMNS), **options)
        self._passes = compiled_passes() if compiled else EAGER
        on_gpu = self._centre.device.type == "cuda"  # on a CPU the eager one is as fast
        self._dot = kernels.compiled_decoder_dot() if compiled and on_gpu else kernels.decoder_dot

    def _has_aux_apart(self, c: int) -> bool:
        """Whether the margins of AuxK and of the code go on to the thresholds by other factors."""
        config = self.configs[c]
        return config.auxk_alpha > 0 and config.has_threshold and config.surrogate != "sigmoid"

    def names(self, coder: int) -> list[str]:
        """Names of the tensors that coder number `coder` trains."""
        config = self.configs[coder]
        names = [n for n in self.parameters if n not in ("log_threshold", "amplitude")]
        if config.has_threshold and config.threshold == "learned":
            names.append("log_threshold")
        if config.amplitude == "learned":
            names.append("amplitude")
        return names

    def trained(self, coder: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter and gradient of every tensor that a coder trains, as views."""
        found = {}
        for name in self.names(coder):
            part = slice(self.configs[coder].first_binary if name == "log_threshold" else 0, None)
            found[name] = (
                self.parameters[name][coder][part],
                self.gradients[name][coder][part],
            )
        return found

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
        self._centre.copy_(mean_x)
        for c, (config, seed) in enumerate(zip(self.configs, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            bound = 1 / math.sqrt(self.d_in)
            drawn = torch.rand((self.n_latents, self.d_in), generator=generator)
            w = (2 * drawn - 1).mul_(bound).to(p["b_dec"])
            p["encoder.weight"][c] = w
            p["b_dec"][c] = mean_y
            if "log_threshold" in p:
                p["log_threshold"][c] = math.log(config.threshold_init)
            if "amplitude" in p:
                p["amplitude"][c] = 1
            if self.site == "sae":
                p["W_dec"][c] = w / w.norm(dim=1, keepdim=True)
            else:
                p["encoder.bias"][c] = -(w @ mean_x)

    def decoder(self, coder: int) -> Tensor:
        """The decoder that acts, (F, d_out): unit rows and amplitudes where the config says so."""
        w: Tensor = self.parameters["W_dec"][coder]
        if self.configs[coder].decoder_norm == "free":
            return w
        # An average of unit rows (schedule-free) is shorter than they are.
        unit: Tensor = w / w.norm(dim=1, keepdim=True)
        amplitude = self._amplitude(coder)
        return unit if amplitude is None else unit * amplitude

    def theta(self, coder: int) -> Tensor:
        """Thresholds of the binary latents, from the first of them on."""
        log: Tensor = self.parameters["log_threshold"][coder, self.configs[coder].first_binary :]
        return log.exp()

    @torch.no_grad()
    def step(
        self,
        x_Nd: Tensor,
        y_Nd: Tensor,
        *,
        micro_rows: int | None = None,
        active: Sequence[int] | None = None,
        of_rows: int | None = None,
    ) -> StepResult:
        """Forward and backward pass over a batch: overwrites `gradients`.

        Args:
            x_Nd: rows that are encoded, (N, d_in), any float dtype; of an SAE the same as `y_Nd`.
            y_Nd: rows that are reconstructed, (N, d_out), any float dtype.
            micro_rows: rows that are worked on at a time, which bounds the memory; None: all.
                Batch top-k selects, and `rate_penalty` counts, among these.
            active: coders to train; None: all. The gradients of the others stand.
            of_rows: rows of the whole batch, where loss, L0 and gradients of its parts are summed.

        Returns:
            The loss whose gradient was taken, and what fired; zeros for coders not active.
        """
        active = range(len(self.configs)) if active is None else active
        n, size, whole = len(x_Nd), micro_rows or len(x_Nd), of_rows or len(x_Nd)
        device, n_coders = self._centre.device, len(self.configs)
        self._prepare(min(size, n), active)
        loss, l0 = torch.zeros((2, n_coders), dtype=torch.float64, device=device)
        # The last column takes what did not fire: a mask as an index would wait for the device.
        fired = torch.zeros((n_coders, self.n_latents + 1), dtype=torch.bool, device=device)
        for start in range(0, n, size):
            x, y = x_Nd[start : start + size], y_Nd[start : start + size]
            z, pre = self._rows[: len(x)], self._pre[: len(x)]
            y = y.to(self._centre.dtype) / self.units[1]
            if self.site != "sae":
                z[:, : self.d_in] = x.to(self._centre.dtype) / self.units[0] - self._centre
            last = start + size >= n
            for c in active:
                target = y - self.parameters["b_dec"][c]
                if self.site == "sae":  # what it is to give is what it reads
                    z[:, : self.d_in] = target
                kernels.pre_activations(z, self._encoder[c], pre)
                sums: dict[str, Tensor] | None = {} if start == 0 and last else None
                one = self._pass(c, z, target, whole, start > 0, sums)
                latent, margin, on, error = one.run(pre)
                loss[c] += error
                l0[c] += on.sum()
                kernels.mark(fired[c], latent.where(on, self.n_latents))
                if self.configs[c].select == "batch_topk":
                    self._note_minima(c, latent, margin, on)
                if last:
                    self._finish(c, sums or {})
        return StepResult(loss, l0 / whole, fired[:, : self.n_latents])

    def _pass(
        self,
        c: int,
        z: Tensor,
        target: Tensor,
        rows: int,
        add: bool,
        sums: dict[str, Tensor] | None,
    ) -> CoderPass:
        unit = self.configs[c].decoder_norm == "unit"
        amplitude = self._amplitude(c)
        return CoderPass(
            config=self.configs[c],
            parameters={name: stacked[c] for name, stacked in self.parameters.items()},
            gradients={name: stacked[c] for name, stacked in self.gradients.items()},
            w_dec=self._decoder[c],
            gain=None if amplitude is None else amplitude.squeeze(1),
            centre=self._centre,
            z=z,
            target=target,
            k=self.k[c],
            temperature=self.temperature[c],
            dead=None if self.dead is None else self.dead[c],
            n_dead=None if self.n_dead is None else self.n_dead[c],
            noise=None if self.generators is None else self.generators[c],
            along=self._along[c] if unit else None,
            aux_bias=self._aux_bias[c] if self._has_aux_apart(c) else None,
            dot=self._dot,
            row_errors=self._passes.row_errors,
            scale=1 / (rows * self.total_variance),
            rows=rows,
            add=add,
            sums=sums,
        )

    def _prepare(self, rows: int, active: Sequence[int]) -> None:
        """Round the weights of the active coders for a step, and make room for its rows."""
        self._aux_bias.zero_()
        if len(self._pre) < rows:
            self._pre = self._pre.new_empty((rows, self.n_latents))
            self._rows = self._rows.new_zeros((rows, self.d_in + EXTRA_COLUMNS))
            self._rows[:, self.d_in : self.d_in + 2] = 1
        for c in active:
            self._round(c)

    def _round(self, c: int) -> None:
        """Encoder and decoder as products take them."""
        p, d, config = self.parameters, self.d_in, self.configs[c]
        encoder, decoder = self._encoder[c], self._decoder[c]
        weight, w, bias = p["encoder.weight"][c], p["W_dec"][c], p["encoder.bias"][c]
        if self.site == "sae":  # it reads centred rows
            encoder[:, :d] = weight
        else:
            bias = self._passes.round_encoder(weight, bias, self._centre, encoder[:, :d])
        if config.has_threshold:
            bias = bias.clone()
            bias[config.first_binary :] -= self.theta(c)
        rounded = bias.to(self.compute_dtype)
        encoder[:, d] = rounded
        encoder[:, d + 1] = bias - rounded
        amplitude = self._amplitude(c)
        if amplitude is None:
            decoder.copy_(w)
        else:
            self._passes.round_decoder(w, amplitude, decoder)

    def _finish(self, c: int, sums: dict[str, Tensor]) -> None:
        """Gradients of the parameters from those to centred rows, folded biases, acting rows.

        `sums` has those of matrices that are not in `gradients` yet.
        """
        config = self.configs[c]
        p = {name: stacked[c] for name, stacked in self.parameters.items()}
        grad = {name: stacked[c] for name, stacked in self.gradients.items()}
        g_bias = grad["encoder.bias"]
        unit, along = config.decoder_norm == "unit", self._along[c]
        encoder, decoder = sums.get("encoder.weight"), sums.get("W_dec")
        if self.site != "sae":
            self._passes.encoder_gradient(encoder, g_bias, self._centre, grad["encoder.weight"])
        else:
            if encoder is not None:
                grad["encoder.weight"].copy_(encoder)
            # It reads x - b_dec.
            grad["b_dec"].addmv_(p["encoder.weight"].T, g_bias, alpha=-1)
        if unit:
            self._passes.unit_decoder_gradient(
                decoder, p["W_dec"], self._amplitude(c), along, grad["W_dec"]
            )
        elif decoder is not None:
            grad["W_dec"].copy_(decoder)
        if unit and config.amplitude == "learned":
            amplitude = p["amplitude"]
            grad["amplitude"].copy_((along.squeeze(1) / amplitude).nan_to_num_(0.0, 0.0, 0.0))
        if config.has_threshold:
            binary, theta = slice(config.first_binary, None), self.theta(c)
            factor = surrogates.threshold_factor(config.surrogate, theta, self.temperature[c])
            own = grad["log_threshold"][binary]
            if self._has_aux_apart(c):  # relu(pre - theta) has a true derivative: -theta
                aux = self._aux_bias[c, binary]
                torch.mul(factor, g_bias[binary] - aux, out=own)
                own.addcmul_(theta, aux, value=-1)
            else:
                torch.mul(factor, g_bias[binary], out=own)

    def _amplitude(self, c: int) -> Tensor | None:
        """(F, 1): learned lengths of decoder rows; None: 1."""
        if self.configs[c].amplitude != "learned":
            return None
        return self.parameters["amplitude"][c].unsqueeze(1)

    @torch.no_grad()
    def renormalise(self, coder: int) -> Tensor | None:
        """Give the decoder rows of a coder length 1 where its config says so; acts as before.

        Returns:
            The lengths that they had, (F, 1); None: they are free.
        """
        if self.configs[coder].decoder_norm != "unit":
            return None
        return self._passes.unit_rows(self.parameters["W_dec"][coder].detach())

    def _note_minima(self, c: int, latent: Tensor, margin: Tensor, on: Tensor) -> None:
        """Batch top-k: remember the smallest margin of an active latent, per part."""
        for i, part in enumerate(self.configs[c].parts):
            mine = on & (latent >= part.start) & (latent < part.stop)
            smallest = margin.where(mine, torch.inf).min().double()
            # Where nothing is active the average stays as it is.
            weight = smallest.isfinite().double() * (1 - _THRESHOLD_MEMORY)
            new = torch.stack([smallest.nan_to_num(posinf=0.0), torch.ones_like(smallest)])
            self.select_minimum[c, i].lerp_(new, weight)

    def export(self, coder: int, about: dict[str, Any] | None = None) -> SparseCoder:
        """One coder as it stands, its tensors copied."""
        config = self.configs[coder]
        shapes = parameter_shapes(config)
        p = self.parameters
        tensors = {n: p[n][coder].detach().clone() for n in shapes if n in p}
        tensors["W_dec"] = self.decoder(coder).detach().clone()
        if config.has_threshold:
            tensors["log_threshold"] = tensors["log_threshold"][config.first_binary :].clone()
        if "select_threshold" in shapes:
            total, weight = self.select_minimum[coder, : len(config.parts)].unbind(1)
            tensors["select_threshold"] = torch.where(weight > 0, total / weight, 0.0).to(
                tensors["b_dec"].dtype
            )
        return SparseCoder(config, tensors, about=about)
