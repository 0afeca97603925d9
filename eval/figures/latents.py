"""Figures that need the firings latent by latent: bits, samples, what frequent latents are."""

from __future__ import annotations

from collections.abc import Mapping

from bsc.array_file import write_arrays
from bsc.eval.evaluation import (
    EvaluationFolder,
    Interval,
    LatentFigures,
    ShownContext,
    ShownLatent,
    UltraLatent,
)
from bsc.eval.figures.examples import Sample, choose_latents, sample
from bsc.eval.figures.rate import bit_figures
from bsc.eval.figures.split_text import SplitText
from bsc.eval.figures.ultra import RowFacts, diagnose, principal_components, ultra_latents
from bsc.eval.passes.batches import rows_read
from bsc.eval.passes.codes import Codes, LatentCode
from bsc.eval.passes.controls import Calibration
from bsc.eval.passes.row_pass import Sums
from bsc.eval.passes.setting import Setting
from bsc.progress import stage
from bsc.typed import combined

__all__ = ["latent_figures", "with_single_ablations"]

SHOWN_LATENTS = 16
"""Latents of each coder whose contexts are written for the report."""


def latent_figures(
    setting: Setting,
    max_rows: int | None,
    sums: Mapping[str, Sums],
    codes: Mapping[str, Codes],
    calibrations: Mapping[str, Calibration],
) -> tuple[dict[str, LatentFigures], dict[str, list[ShownLatent]]]:
    """Figures and examples of every coder; leaves samples of its firings on disk."""
    split, folder = setting.split, EvaluationFolder(setting.run)
    split_text = SplitText(split, setting.lm.tokenizer)
    special = list(setting.store.attributes["model"]["special_token_ids"])
    figures: dict[str, LatentFigures] = {}
    shown: dict[str, list[ShownLatent]] = {}
    with stage("latents", len(setting.coders), "coders") as progress:
        for hook in setting.hookpoints:
            read = rows_read(split, hook, max_rows, setting.without_tokens)
            facts = RowFacts.of(split.tokens("token_id"), split_text.position, special, read)
            components, share = principal_components(split, hook, max_rows, setting.without_tokens)
            for name, coder in setting.coders_at(hook).items():
                code, own = codes[name].by_latent(), sums[name]
                known = calibrations.get(name)
                step = None if known is None else known.step.cpu().double().numpy()
                latents = ultra_latents(own.counts, own.rows)
                figures[name] = combined(
                    LatentFigures,
                    bit_figures(code, own.rows, coder.config.first_binary, step),
                    ultra=diagnose(coder, code, facts, components, latents),
                    components_share=share,
                )
                drawn = sample(code, split_text.part)
                path = folder.sample(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, drawn.arrays())
                shown[name] = _shown(split_text, code, drawn, own)
                progress.advance(1, name)
    return figures, shown


def with_single_ablations(
    figures: LatentFigures, singles: list[tuple[float, Interval]]
) -> LatentFigures:
    """The figures with what turning off the most frequent latents one by one adds to the loss."""
    ultra = list(figures.ultra)
    for i, (cost, interval) in enumerate(singles):
        ultra[i] = combined(UltraLatent, ultra[i], delta_ce=cost, delta_ce_interval=interval)
    return figures.model_copy(update={"ultra": ultra})


def _shown(split_text: SplitText, code: LatentCode, drawn: Sample, sums: Sums) -> list[ShownLatent]:
    """Some latents across the range of rates, each with one context of each stratum."""
    found = []
    for latent in choose_latents(sums.counts, SHOWN_LATENTS):
        own = drawn.of(latent)
        contexts = []
        for stratum in sorted(set(own.stratum.tolist()), reverse=True):
            row = int(own.row[own.stratum == stratum][0])
            text = split_text.marked(row, *code.of(latent))
            contexts.append(ShownContext(stratum=int(stratum), text=text))
        rate = int(sums.counts[latent]) / sums.rows
        found.append(ShownLatent(latent=latent, rate=rate, contexts=contexts))
    return found
