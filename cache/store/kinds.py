"""Words of the format that have a fixed set of values. Imports nothing."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["CODECS", "SPLITS", "Codec", "Split"]

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
Codec = Literal["raw", "lz4", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
