"""`bsc examples`: contexts in which one latent fires, on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from bsc.array_file import read_arrays
from bsc.cache.model.models import load_tokenizer
from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import EvaluationFolder, ShownContext
from bsc.eval.figures.division import PARTS
from bsc.eval.figures.examples import Sample
from bsc.eval.figures.split_text import SplitText
from bsc.eval.passes.codes import Codes
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.setting import open_store
from bsc.formats import printable
from bsc.train.run import Run
from bsc.typed import Record

# Control characters of a text must not reach the terminal.

__all__ = [
    "LatentContext",
    "LatentExamples",
    "contexts_of",
    "held_out_text",
    "latent_examples",
    "load_sample",
    "print_examples",
]


def load_sample(run: Run, coder: str) -> Sample:
    """The sampled firings of a coder's latents, from its evaluation.

    Raises:
        StoreError: there are none, or the file is damaged.
    """
    folder = EvaluationFolder(run)
    path = folder.sample(coder)
    if not path.exists():
        raise StoreError(
            f"{run.folder}: no sampled firings of {coder}. `bsc eval {run.folder}` draws them."
        )
    return Sample(**read_arrays(path, folder.remedy))


class LatentContext(ShownContext):
    """A context in which a latent fires, and where it is."""

    part: str
    """``"explain"`` or ``"test"`` documents."""
    row: int
    """Row of the drawn firing."""
    margin: float
    """Margin of the drawn firing."""


class LatentExamples(Record):
    """Contexts in which a latent fires."""

    coder: str
    latent: int
    firings: int
    contexts: list[LatentContext]


def latent_examples(
    run: Run,
    coder: str,
    latent: int,
    *,
    part: str = "all",
    per_stratum: int = 1,
    store: str | Path | None = None,
    model: str | None = None,
) -> LatentExamples:
    """Contexts in which a latent fires, for any latent of an evaluated coder.

    Args:
        run: an evaluated run.
        coder: name of the coder, or a part of it that no other has.
        latent: its number.
        part: ``"explain"``, ``"test"`` or ``"all"`` documents.
        per_stratum: contexts of each tenth of its firings at most.
        store: where the store is now; None: where it was in training.
        model: where the model is now, for its tokenizer; None: where it was at the capture.

    Raises:
        UserError: there is no such coder, latent or part, or nothing to read it from.
    """
    if part not in (*PARTS, "all"):
        raise UserError(f"--part {part}: should be {', '.join(PARTS)} or all.")
    if per_stratum < 1:
        raise UserError(f"--per-stratum {per_stratum}: should be 1 or more.")
    name = run.full_name(coder)
    drawn = load_sample(run, name)
    n_latents = run.config().coder(name).coder.n_latents
    if not 0 <= latent < n_latents:
        raise UserError(f"{name}: no latent {latent}; they are 0 to {n_latents - 1}.")
    own = drawn.of(latent, None if part == "all" else part)
    split_text = held_out_text(run, store, model)
    codes = Codes(Pieces(EvaluationFolder(run).codes(name)), np.zeros(n_latents, np.int64))
    firing = codes.of(latent)
    contexts = contexts_of(own, per_stratum, split_text, firing)
    return LatentExamples(coder=name, latent=latent, firings=len(firing[0]), contexts=contexts)


def held_out_text(run: Run, store: str | Path | None, model: str | None) -> SplitText:
    """The text of the held-out rows of a run's store.

    Raises:
        UserError: the store or the tokenizer is not there.
    """
    opened = open_store(run, store)
    saved = opened.attributes["model"]
    tokenizer = load_tokenizer(model or str(saved["name"]), saved["revision"])
    return SplitText(opened.held_out, tokenizer)


def contexts_of(
    own: Sample,
    per_stratum: int,
    split_text: SplitText,
    firing: tuple[NDArray[Any], NDArray[np.float32]],
) -> list[LatentContext]:
    """Contexts of a latent, the strongest tenth of its firings first.

    Args:
        own: drawn firings of the latent.
        per_stratum: contexts of each tenth at most.
        split_text: the text of the held-out rows.
        firing: rows and margins of all its firings.
    """
    return [
        LatentContext(
            stratum=int(stratum),
            part=PARTS[own.part[i]],
            row=int(own.row[i]),
            margin=float(own.margin[i]),
            text=split_text.marked(int(own.row[i]), *firing),
        )
        for stratum in sorted(set(own.stratum.tolist()), reverse=True)
        for i in np.flatnonzero(own.stratum == stratum)[:per_stratum]
    ]


def print_examples(found: LatentExamples) -> None:
    """Print contexts on stdout, firing tokens marked."""
    console = Console(highlight=False)
    console.print(
        f"latent {found.latent} of {found.coder}: {found.firings:,} firings"
        + ("" if found.contexts else "; none in these documents")
    )
    for context in found.contexts:
        line = Text(f"{context.stratum + 1:>2}/10  {context.margin:<8.3g} ", style="dim")
        for piece, margin, drawn in context.text:
            shown = printable(str(piece).replace("\n", "\u23ce"))
            # Marked by brackets too, where there are no colours.
            line.append(
                shown if margin is None else f"<<{shown}>>",
                style="not dim"
                if margin is None
                else f"bold not dim{' underline' if drawn else ''}",
            )
        console.print(line, soft_wrap=True)
