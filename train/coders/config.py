"""What a coder is, on four axes: site, select, code, surrogate (docs/coders.md)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from bsc.config import Config
from bsc.options import CODERS, option

__all__ = ["BINARY_ONLY", "CoderChoices", "CoderConfig", "Part"]

DEFAULT_TEMPERATURE = {"sigmoid": 2.0, "identity": 2.0, "rectangle": 2.0, "re": 2.0, "gumbel": 0.5}

BINARY_ONLY = (
    "surrogate",
    "temperature",
    "threshold",
    "threshold_init",
    "exact_k",
    "amplitude",
    "gumbel_support",
)
"""Fields that a continuous coder does not read; they keep their defaults there."""


class Part(NamedTuple):
    """A run of latents that share a code, ``start`` to ``stop``, of which k are selected."""

    code: str
    start: int
    stop: int
    k: int


class CoderChoices(Config):
    """What can be chosen of a coder. None: by what else is chosen (bsc.train.sweep)."""

    site: Literal["sae", "transcoder", "skip_transcoder"] = option(
        "skip_transcoder", "sae, transcoder, skip_transcoder.", CODERS
    )
    """What it maps: an SAE a module's output to itself, a transcoder the module's input to its
    output, a skip transcoder the same with a linear path beside the latents."""

    select: Literal["topk", "groupmax", "batch_topk"] = option(
        "topk", "topk, groupmax, batch_topk.", CODERS
    )
    """Which latents may be active: the k largest of a row, the largest of each of k groups, or the
    k N largest of a batch of N rows (then rows differ in number, and the saved coder has one
    threshold for all)."""

    code: Literal["continuous", "binary", "hybrid"] = option(
        "continuous", "binary, continuous, hybrid.", CODERS, shown="binary and continuous"
    )
    """Value of a selected latent: relu(pre), or 1 where its margin is above 0. Hybrid: the first
    latents are continuous, the last `n_binary` binary, each part with selected latents of its
    own."""

    surrogate: Literal["sigmoid", "identity", "rectangle", "re", "gumbel"] = option(
        "sigmoid", "sigmoid, identity, rectangle, re, gumbel.", CODERS
    )
    """Gradient of a binary latent's step. Binary coders alone read it."""

    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the surrogate, in units of the pre-activation. None: 2, and 0.5 for gumbel.
    Binary coders alone read it."""

    gumbel_support: Literal["top4", "full"] = "top4"
    """Latents of a group that the softmax of `gumbel` is over, and that get a gradient: the 4
    largest, or all of them, which costs two dense products more. `gumbel` alone reads it."""

    threshold: Literal["learned", "fixed", "newton"] = option(
        "learned", "learned, fixed, newton.", CODERS
    )
    """Threshold of the binary latents: one trained number per latent, the same number untrained,
    or none per latent but for every row the one at which the sigmoids of its pre-activations add
    up to k. With `newton` every selected latent is 1. Binary coders alone read it."""

    threshold_init: float = Field(default=0.004, gt=0)
    """First value of every threshold, in units of the pre-activation."""

    exact_k: bool = False
    """Every selected binary latent is 1, whatever its margin, so that L0 is k and not at most k."""

    k: int = option(32, "Selected latents.", CODERS, ge=1)
    """Latents selected per row: L0 is at most k. With batch_topk k is the mean over rows, and L0 at
    inference, by threshold, may be more."""

    k_binary: int | None = Field(default=None, ge=1)
    """Hybrid: how many of the k are binary. None: half of k."""

    n_latents: int | None = option(
        None, "Latents.", CODERS, ge=1, shown="32 times the output's width"
    )
    """Number of latents, F; None: `expansion` times the width of the output."""

    n_binary: int | None = Field(default=None, ge=1)
    """Hybrid: how many of the latents are binary. None: half of them."""

    decoder_norm: Literal["unit", "free"] | None = option(
        None, "unit, free.", CODERS, shown="unit for SAEs, else free"
    )
    """Whether the rows of the decoder have length 1. None: unit for SAEs, free for transcoders."""

    amplitude: Literal["none", "learned"] | None = None
    """learned: unit decoder rows times one trained number per latent, so that binary latents of
    unit rows can express a magnitude. Multiplied into the decoder of the saved coder. None: learned
    for binary and hybrid coders with unit rows, which cannot express how much a latent counts
    without it; else none."""

    auxk_alpha: float = option(0.0, "Weight of the AuxK loss.", CODERS, ge=0)
    """Weight of the AuxK loss: dead latents reconstruct what the others leave over."""

    auxk_k: int | None = Field(default=None, ge=1)
    """Dead latents selected for it. None: half of d_out."""

    multi_topk: bool = False
    """Adds an eighth of the loss that the coder has with 4 k selected latents."""

    rate_penalty: float = Field(default=0.0, ge=0)
    """Weight of a penalty on frequent latents: what a latent adds to the loss by firing on every
    row, where `rate_cap` is 0. 0: none."""

    rate_cap: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows on which a latent may fire without a penalty; `rate_penalty` alone reads
    it."""


class CoderConfig(CoderChoices):
    """The maths of one coder, with nothing left open. Frozen, so a config that was saved is the
    config that ran."""

    temperature: float = Field(default=2.0, gt=0)
    k: int = Field(ge=1)
    n_latents: int = Field(ge=1)
    d_in: int = Field(ge=1)
    """Width of the rows that are encoded."""
    d_out: int = Field(ge=1)
    """Width of the rows that are reconstructed."""
    decoder_norm: Literal["unit", "free"] = "free"
    amplitude: Literal["none", "learned"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            if values.get("temperature") is None:
                chosen = values.get("surrogate", "sigmoid")
                values["temperature"] = DEFAULT_TEMPERATURE.get(str(chosen), 2.0)
            if values.get("code") == "hybrid":
                for name, of in (("k_binary", "k"), ("n_binary", "n_latents")):
                    if values.get(name) is None and isinstance(values.get(of), int):
                        values[name] = max(1, values[of] // 2)
        return values

    @model_validator(mode="after")
    def _check(self) -> CoderConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k={self.k} is more than n_latents={self.n_latents}")
        if self.site == "sae" and self.d_in != self.d_out:
            raise ValueError(
                f"an SAE reconstructs what it reads, but d_in={self.d_in} and d_out={self.d_out}"
            )
        if self.decoder_norm == "unit" and self.site != "sae":
            raise ValueError(
                f"decoder_norm='unit' is for SAEs; a {self.site} begins with a decoder of zeros"
            )
        if self.amplitude == "learned" and self.decoder_norm != "unit":
            raise ValueError("amplitude='learned' needs decoder_norm='unit': free rows have one")
        if (self.k_binary or self.n_binary) and self.code != "hybrid":
            raise ValueError(f"k_binary and n_binary are for code='hybrid', not {self.code!r}")
        if self.surrogate == "gumbel" and (self.select != "groupmax" or self.code != "binary"):
            raise ValueError(
                "surrogate='gumbel' needs select='groupmax' and code='binary': its softmax is over "
                "the latents of a group"
            )
        if self.gumbel_support == "full" and self.surrogate != "gumbel":
            raise ValueError(
                f"gumbel_support='full' is for surrogate='gumbel', not {self.surrogate!r}"
            )
        if self.threshold == "newton" and (
            self.surrogate == "gumbel" or self.select == "batch_topk" or self.code == "continuous"
        ):
            raise ValueError(
                "threshold='newton' is for binary and hybrid coders with select='topk' or "
                "'groupmax', and not for surrogate='gumbel': it is one number per row, which "
                "makes k of its sigmoids"
            )
        if self.multi_topk and self.select == "groupmax":
            raise ValueError(
                "multi_topk selects 4 k latents, which select='groupmax' does not have"
            )
        if self.rate_penalty and self.surrogate == "gumbel":
            raise ValueError(
                "rate_penalty is not for surrogate='gumbel', where one latent of each group fires"
            )
        for part in self.parts:
            size = part.stop - part.start
            if not 1 <= part.k <= size:
                raise ValueError(f"{part.k} {part.code} latents of {size} cannot be selected")
            if self.select == "groupmax" and size % part.k:
                raise ValueError(
                    f"select='groupmax' cuts {size} {part.code} latents into {part.k} equal "
                    f"groups, but {size} is not a multiple of {part.k}"
                )
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """Runs of latents of one code, which select for themselves: two if hybrid, else one."""
        if self.code != "hybrid":
            return (Part(self.code, 0, self.n_latents, self.k),)
        k_binary, n_binary = self.k_binary or 0, self.n_binary or 0
        border = self.n_latents - n_binary
        return (
            Part("continuous", 0, border, self.k - k_binary),
            Part("binary", border, self.n_latents, k_binary),
        )

    @property
    def side(self) -> str:
        """Side of the hookpoint that is encoded: ``"input"`` or ``"output"``."""
        return "output" if self.site == "sae" else "input"

    @property
    def first_binary(self) -> int:
        """Latents from this one on are binary; n_latents where none is."""
        return {"binary": 0, "continuous": self.n_latents}.get(
            self.code, self.n_latents - (self.n_binary or 0)
        )

    @property
    def has_threshold(self) -> bool:
        """Whether binary latents have a threshold each."""
        return (
            self.code != "continuous" and self.surrogate != "gumbel" and self.threshold != "newton"
        )

    @property
    def always_on(self) -> bool:
        """Whether every selected binary latent is 1, whatever its margin."""
        return self.exact_k or self.surrogate == "gumbel" or self.threshold == "newton"
