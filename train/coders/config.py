"""What a coder is, on the axes of docs/coders.md: site, selection, code, surrogate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bsc.config import Config

__all__ = ["CoderConfig"]


class CoderConfig(Config):
    """The maths of one coder. Frozen, so a config that was saved is the config that ran."""

    site: Literal["sae", "transcoder", "skip_transcoder"] = "skip_transcoder"
    """What it maps: an SAE a module's output to itself, a transcoder the module's input to its
    output, a skip transcoder the same with a linear path beside the latents."""

    select: Literal["topk"] = "topk"
    """Which latents may be active: the k with the largest pre-activation (or margin)."""

    code: Literal["continuous", "binary"] = "continuous"
    """Value of a selected latent: relu(pre), or 1 where its margin is above 0."""

    surrogate: Literal["sigmoid"] = "sigmoid"
    """Gradient of a binary latent's step: s (1 - s) with s = sigmoid(margin / temperature)."""

    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Of the surrogate, in units of the pre-activation. Binary coders alone read it."""

    threshold: Literal["learned", "fixed"] = "learned"
    """Whether a binary latent's threshold is trained. Binary coders alone read it."""

    threshold_init: float = Field(default=0.004, gt=0)
    """First value of every threshold, in units of the pre-activation."""

    k: int = Field(ge=1)
    """Latents selected per row: L0 is at most k."""

    n_latents: int = Field(ge=1)
    """Number of latents, F."""

    d_in: int = Field(ge=1)
    """Width of the rows that are encoded."""

    d_out: int = Field(ge=1)
    """Width of the rows that are reconstructed."""

    decoder_norm: Literal["unit", "free"] = "free"
    """Whether the rows of the decoder have length 1."""

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
        return self

    @property
    def side(self) -> str:
        """Side of the hookpoint that is encoded: ``"input"`` or ``"output"``."""
        return "output" if self.site == "sae" else "input"

    @property
    def binary(self) -> bool:
        """Whether every latent is 0 or 1."""
        return self.code == "binary"
