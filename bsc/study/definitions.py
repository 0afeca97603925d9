"""What the figures of a study are, each in a sentence or two, for its page."""

from __future__ import annotations

from collections.abc import Iterable

from bsc.eval.figures.firing import FREQUENT
from bsc.study.config import Claim
from bsc.study.needs import sides_of

__all__ = ["definition_of", "definitions_of"]

_REMOVED = (
    "where every firing of a continuous latent takes the mean value that the latent has over "
    "training rows in which it fires; nothing is trained again"
)
_DEFINITIONS = {
    "fvu": "Fraction of variance unexplained: squared error over squared distance from the mean "
    "row, both summed over all held-out rows and channels, then divided once.",
    "fvu_values_removed": f"FVU {_REMOVED}.",
    "fvu_quantised": "FVU of the code that bits are counted of: with values of continuous latents "
    "quantised so that the squared error grows by 1 %.",
    "fvu_skip_only": "FVU with every latent off: what the linear skip path and the decoder's bias "
    "explain.",
    "fvu_gain": "FVU with every latent off, less FVU: what the latents explain.",
    "delta_ce": "Mean next-token loss with the coder's reconstruction in the place of the module's "
    "output, less the loss of the model as it is, in nats, on held-out documents.",
    "delta_ce_values_removed": f"delta CE {_REMOVED}.",
    "kl": "Mean divergence, in nats, of the next-token distribution with the coder spliced in from "
    "that of the model as it is, on held-out documents.",
    "l0": "Mean number of latents per row that are not 0.",
    "bits": "Bits per row that the code takes when each latent is coded by itself: an upper bound.",
    "dead": "Latents that fire on none of the held-out rows.",
    "dead_share": "Share of the latents that fire on none of the held-out rows.",
    "latents_above": "Latents that fire on more than {} of the held-out rows.",
    "share_of_firings_above": "Share of all firings that come of latents which fire on more than "
    "{} of the held-out rows.",
    "ultra": "Latents that fire on more than 10 % of the held-out rows and were found to be: {}.",
    "probe": "Sparse probing: accuracy of a logistic regression that tells texts of a class from "
    "others by a few latents, on other texts, mean over classes; half is chance. {}",
    "predictability": "How well a small fixed classifier that sees the last four tokens and the "
    "position tells where a latent fires: half is chance. High means simple. It asks no language "
    "model.",
    "overlap": "The intruder test, answered by counting the tokens that excerpts share: a fifth is "
    "chance. It asks no language model.",
    "judge": "Score that a language model gave the latents in a test of their explanations or "
    "excerpts: {}.",
    "non_finite": "1 of a coder whose training ended in numbers that are not finite, else 0.",
    "spike": "How unsteady a training was: the largest ratio of its FVU to the least FVU before, "
    "without the first tenth of the training. 1 is a training that never got worse.",
}
_ULTRA = {
    "position": "explained by the position, which takes more than half of the entropy of firing",
    "token": "explained by the token, which takes more than half of the entropy of firing",
    "special tokens": "on special tokens for more than half of their firings",
    "antipode": "one of two whose encoder and decoder rows point in opposite ways",
    "principal component": "nearly in the space of the ten directions in which the output varies "
    "most",
}


def definition_of(figure: str) -> str:
    """What a figure is, in words.

    >>> definition_of("latents_above:0.1")
    'Latents that fire on more than 10 % of the held-out rows.'
    >>> definition_of("top1_clean")
    'The number of this name in eval.json.'
    """
    name, _, word = figure.partition(":")
    if name == "probe":
        arm, _, latents = word.partition(":")
        word = f"Arm {arm}, {latents or 1} latent(s)." if arm else ""
    if name == "ultra":
        word = _ULTRA.get(word, word)
    if name in ("latents_above", "share_of_firings_above"):
        word = {str(rate): f"{rate * 100:g} %" for rate in FREQUENT}.get(word, word)
    return _DEFINITIONS.get(name, "The number of this name in eval.json.").format(word).strip()


def definitions_of(claims: Iterable[Claim]) -> dict[str, str]:
    """Definitions of the figures that claims and their variants are about, by figure."""
    figures: dict[str, None] = {}
    for claim in claims:
        for part in claim.parts:
            for one in (part, *(part.changed(v) for v in part.variants)):
                figures |= {side.figure: None for side in sides_of(one)}
    return {figure: definition_of(figure) for figure in figures}
