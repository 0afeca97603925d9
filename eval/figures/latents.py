"""Figures that need the firings latent by latent: bits, samples, what frequent latents are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsc.array_file import write_arrays
from bsc.eval.figures.examples import Sample, Windows, choose_latents, sample
from bsc.eval.figures.rate import bit_figures
from bsc.eval.figures.ultra import RowFacts, diagnose, principal_components, ultra_latents
from bsc.eval.passes.batches import rows_read
from bsc.eval.passes.codes import Codes, LatentCode
from bsc.eval.passes.controls import Calibration
from bsc.eval.passes.row_pass import Sums
from bsc.eval.passes.setting import Setting
from bsc.progress import stage

__all__ = ["latent_figures"]

SHOWN_LATENTS = 16
"""Latents of each coder whose contexts are written for the report."""


def latent_figures(
    setting: Setting, folder: Path, max_rows: int | None, sums: Mapping[str, Sums],
    codes: Mapping[str, Codes], calibrations: Mapping[str, Calibration],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Figures that need the firings latent by latent: bits, samples, what frequent ones are."""
    split = setting.split
    windows = Windows(split, setting.lm.tokenizer)
    special = list(setting.store.attributes["model"]["special_token_ids"])
    figures: dict[str, dict[str, Any]] = {}
    shown: dict[str, Any] = {}
    with stage("latents", len(setting.coders), "coders") as progress:
        for hook in setting.hookpoints:
            read = rows_read(split, hook, max_rows, setting.without_tokens)
            facts = RowFacts.of(split.tokens("token_id"), windows.position, special, read)
            components, share = principal_components(split, hook, max_rows, setting.without_tokens)
            for name, coder in setting.coders_at(hook).items():
                code = codes[name].by_latent()
                step = calibrations[name].step.cpu().double().numpy() if name in calibrations \
                    else None  # fmt: skip
                figures[name] = bit_figures(code, sums[name].rows, coder.config.first_binary, step)
                latents = ultra_latents(sums[name].counts, sums[name].rows)
                figures[name] |= {
                    "ultra": diagnose(coder, code, facts, components, latents),
                    "components_share": share,
                }
                drawn = sample(code, windows.part)
                path = folder / "samples" / f"{name}.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, drawn.arrays())
                shown[name] = _shown(windows, code, drawn, sums[name])
                progress.advance(1, name)
    return figures, shown


def _shown(windows: Windows, code: LatentCode, drawn: Sample, sums: Sums) -> list[dict[str, Any]]:
    """Some latents across the range of rates, each with one context of each stratum."""
    found = []
    for latent in choose_latents(sums.counts, SHOWN_LATENTS):
        own = drawn.of(latent)
        contexts = []
        for stratum in sorted(set(own.stratum.tolist()), reverse=True):
            row = int(own.row[own.stratum == stratum][0])
            text = windows.marked(row, *code.of(latent))
            contexts.append({"stratum": int(stratum), "text": text})
        rate = int(sums.counts[latent]) / sums.rows
        found.append({"latent": latent, "rate": rate, "contexts": contexts})
    return found
