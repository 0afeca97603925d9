"""Stage 3: figures of every coder of a run, on documents that no coder was trained on.

One pass over the held-out rows and one over the held-out contexts serve all coders; both go on
where they stopped. What is written: bsc/eval/evaluation.py.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bsc.array_file import write_arrays
from bsc.devices import keep_freed_memory
from bsc.errors import StoreError
from bsc.eval.config import EvalConfig
from bsc.eval.evaluation import (
    EVAL_VERSION,
    CoderFigures,
    Evaluation,
    EvaluationFolder,
    Examples,
    LossFigures,
    Pair,
    Probing,
    ShownLatent,
    Together,
)
from bsc.eval.figures.ablation import AblationPlan, ablate
from bsc.eval.figures.fidelity import fidelity_figures, fvu
from bsc.eval.figures.firing import firing_figures, write_firing_counts
from bsc.eval.figures.labelled import LabelledTexts, read_sets
from bsc.eval.figures.latents import latent_figures, with_single_ablations
from bsc.eval.figures.loss import loss_figures, loss_sums, loss_variants, together
from bsc.eval.figures.probing import probing_figures
from bsc.eval.figures.stability import run_stability
from bsc.eval.passes.batches import document_numbers, piece_ranges
from bsc.eval.passes.codes import SORTED_IN_MEMORY, Codes
from bsc.eval.passes.context_pass import CLEAN, LossSums
from bsc.eval.passes.contexts import Contexts, contexts_of
from bsc.eval.passes.controls import CALIBRATION_ROWS, TOLERANCE, Calibration, calibrate
from bsc.eval.passes.pieces import Pieces
from bsc.eval.passes.row_pass import Sums, add_up, pass_over_rows
from bsc.eval.passes.setting import Setting, open_setting
from bsc.progress import console, format_bytes, stage
from bsc.train.run import Run, as_run, claim
from bsc.typed import combined, write_typed
from bsc.versions import versions

__all__ = ["evaluate"]


def _rows(
    setting: Setting, config: EvalConfig, identity: dict[str, Any]
) -> tuple[dict[str, Sums], dict[str, Codes], dict[str, Calibration]]:
    """The pass over the rows of every hookpoint."""
    split, store = setting.split, setting.store
    ranges = piece_ranges(split, config.rows)
    rows = ranges[-1][1]
    folder = EvaluationFolder(setting.run)
    _check_room(setting, rows)
    calibrations = {}
    with stage("calibrate", len(setting.coders), "coders") as progress:
        for name, coder in setting.coders.items():
            if coder.config.code != "binary":
                hook = setting.hookpoint(name)
                calibrations[name] = calibrate(
                    coder, store, hook, without_tokens=setting.without_tokens
                )
            progress.advance(1)
    sums: dict[str, Sums] = {}
    codes: dict[str, Codes] = {}
    document, seen = document_numbers(split), setting.store.seen_rows()
    with stage("rows", rows * len(setting.hookpoints), "rows") as progress:
        for hook in setting.hookpoints:
            coders = setting.coders_at(hook)
            own = {
                **identity,
                "hookpoint": hook,
                "evaluated": rows,
                "calibration": [CALIBRATION_ROWS, TOLERANCE],
            }
            pieces = Pieces.open(folder.path / "rows" / hook, own)
            places = {n: Pieces.open(folder.codes(n), own) for n in coders}
            for done in pass_over_rows(
                coders,
                calibrations,
                split,
                hook,
                document=document,
                pieces=pieces,
                codes=places,
                seen=seen,
                max_rows=config.rows,
                without_tokens=setting.without_tokens,
            ):
                progress.advance(done)
            sums |= add_up(pieces, len(ranges), list(coders), int(document.max()) + 1)
            codes |= {n: Codes(places[n], sums[n].counts) for n in coders}
    return sums, codes, calibrations


def _check_room(setting: Setting, rows: int) -> None:
    """See that the codes fit on the disk before they are made."""
    firings = {name: int(rows * _on(setting, name)) for name in setting.coders}
    needed = sum(
        firings[name] * (8 + (4 if c.config.n_latents > 1 << 16 else 2))
        for name, c in setting.coders.items()
    )
    if (most := max(firings.values())) > SORTED_IN_MEMORY:  # those of one coder, by latent
        needed += 8 * most
    folder = EvaluationFolder(setting.run).path
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.glob("codes/**/*.safetensors"))
    free = shutil.disk_usage(folder).free
    if needed - there > 0.95 * free:
        raise StoreError(
            f"{folder}: the codes of {len(setting.coders)} coders on {rows:,} rows take up to "
            f"{format_bytes(needed)}, but {format_bytes(free + there)} are free. Evaluate on fewer "
            f"rows with --rows."
        )


def _on(setting: Setting, name: str) -> float:
    """Latents per row that are selected: k, or what thresholds let through of some rows."""
    coder = setting.coders[name]
    if coder.config.select != "batch_topk":
        return coder.config.k
    array = f"{setting.hookpoint(name)}/{coder.config.side}"
    (x,) = next(setting.split.batches((array,), 1024))
    return float((coder.encode(x.to(coder.W_enc.device)).value != 0).sum() / len(x))


def _coder_hash(run: Run, name: str) -> str:
    """Hash of a coder's files."""
    digest = hashlib.sha256()
    for path in sorted(run.coder_folder(name).glob("co*.*")):  # coder.safetensors, config.json
        digest.update(path.read_bytes())
    return digest.hexdigest()


def evaluate(
    run: Run | str | Path,
    config: EvalConfig | None = None,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    device: str | None = None,
    check: bool = True,
) -> Evaluation:
    """Measure every coder of a run and write eval.json and what is in the folder eval.

    Args:
        run: a run whose training has ended, or its folder.
        config: how much is measured; None: the defaults.
        store: where the store is now; None: where it was in training.
        model: where the model is now; None: where it was at the capture.
        device: where to compute; None: a GPU where there is one.
        check: whether shards are compared with the manifest when they are first read.

    Returns:
        What eval.json holds.

    Raises:
        UserError: the store, its held-out rows or the model are not there or not the same, or a
            file of labels or scores is not as it should be.
    """
    run = as_run(run)
    config = config or EvalConfig()
    sets = read_sets(config.probes)
    setting = open_setting(run, store=store, model=model, device=device, check=check)
    if setting.lm.model.device.type == "cpu":
        keep_freed_memory()
    with claim(run.folder):
        return _evaluate(setting, config, sets)


def _evaluate(setting: Setting, config: EvalConfig, sets: list[LabelledTexts]) -> Evaluation:
    run, folder = setting.run, EvaluationFolder(setting.run)
    contexts = contexts_of(setting.store, config.ce_tokens, setting.separation)
    identity = _identity(setting)
    # Examples of another evaluation are not left beside the codes of this one.
    Pieces.open(folder.path / "samples", identity | {"evaluated": config.rows})
    measured = _Measured.nothing()
    if setting.coders:
        measured = _measure(setting, config, contexts, sets, identity)
    examples = Examples(version=EVAL_VERSION, coders=measured.shown)
    write_typed(folder.examples_path, examples)
    rows = max((c.rows for c in measured.coders.values()), default=setting.split.rows)
    result = Evaluation(
        version=EVAL_VERSION,
        store_id=setting.store.store_id,
        model=setting.store.attributes["model"],
        held_out_rows=rows,
        contexts=len(contexts.token_id),
        documents=int((contexts.counts > 0).sum()),
        predicted_tokens=int(contexts.counts.sum()),
        predicted_unseen=int(contexts.unseen_counts.sum()),
        overlap=setting.store.overlap,
        context=setting.store.context,
        config=config,
        left_out=setting.left_out,
        versions=versions(),
        device=setting.lm.model.device.type,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in measured._asdict().items() if name != "shown"},
    )
    # Last: an interrupted evaluation leaves the one before as it was.
    write_typed(run.eval_path, result)
    console.print(f"{run.eval_path}: {len(result.coders)} coders on {rows:,} held-out rows")
    return result


def _identity(setting: Setting) -> dict[str, Any]:
    """What decides every figure but how much is measured."""
    return {
        "version": EVAL_VERSION,
        "store_id": setting.store.store_id,
        "coders": {n: _coder_hash(setting.run, n) for n in setting.coders},
        "rows": {split: part.rows for split, part in setting.store.splits.items()},
        "separation": asdict(setting.separation),
        "without_tokens": list(setting.without_tokens),
        "overlap": setting.store.overlap,
        "checked": setting.store.check,
        "device": setting.lm.model.device.type,
        "torch": torch.__version__,
    }


class _Measured(NamedTuple):
    """Fields of an `Evaluation` that are measured on coders, and examples of them."""

    coders: dict[str, CoderFigures]
    shown: dict[str, list[ShownLatent]]
    ablations: dict[str, dict[str, LossFigures]]
    together: dict[str, Together]
    probing: dict[str, Probing]
    stability: list[Pair]
    ce_clean: float | None
    top1_clean: float | None

    @classmethod
    def nothing(cls) -> _Measured:
        """Where every coder was left out."""
        return cls({}, {}, {}, {}, {}, [], None, None)


def _measure(
    setting: Setting,
    config: EvalConfig,
    contexts: Contexts,
    sets: list[LabelledTexts],
    identity: dict[str, Any],
) -> _Measured:
    """Every figure, and files of what they are made from."""
    folder = EvaluationFolder(setting.run)
    sums, codes, calibrations = _rows(setting, config, identity)
    _leave_out(setting, {n: [fvu(own)] for n, own in sums.items()})
    by_latent, shown = latent_figures(setting, config.rows, sums, codes, calibrations)
    identity = identity | {"ce_tokens": config.ce_tokens}
    pieces = Pieces.open(folder.path / "losses", identity)
    variants, groups = loss_variants(setting, calibrations), together(setting)
    losses = loss_sums(setting, "losses", contexts, variants, pieces)
    _leave_out(setting, {n: [losses[n].nats.sum(), losses[n].kl.sum()] for n in setting.coders})
    plan = AblationPlan(
        config.ablation_bins, config.ablation_tokens, config.ablation_score, config.ultra_ablations
    )
    ultra = {name: by_latent[name].ultra for name in setting.coders}
    turned_off = ablate(setting, plan, contexts, identity, sums, ultra)
    coders = {}
    for name in setting.coders:
        latents, some = by_latent[name], {}
        if name in turned_off:
            some["ablation"] = turned_off[name].figures
            latents = with_single_ablations(latents, turned_off[name].singles)
        coders[name] = combined(
            CoderFigures,
            fidelity_figures(sums[name]),
            firing_figures(sums[name].counts, sums[name].rows),
            loss_figures(name, losses, contexts, [setting.hookpoint(name)]),
            latents,
            **some,
        )
    probing = probing_figures(setting, sets, config.probe_texts)
    stability = run_stability(setting, codes, sums, losses, contexts)
    _write_sums(setting, sums, losses, contexts)
    clean, predicted = losses[CLEAN], contexts.counts.sum()
    return _Measured(
        coders,
        shown,
        {
            hook: {
                kind: loss_figures(f"{hook}|{kind}", losses, contexts, [hook])
                for kind in ("zero", "mean")
            }
            for hook in setting.hookpoints
        },
        {
            label: combined(
                Together, loss_figures(f"together|{label}", losses, contexts, []), coders=names
            )
            for label, names in groups.items()
            if setting.coders.keys() >= set(names)
        },
        probing,
        stability,
        float(clean.nats.sum() / predicted),
        float(clean.right.sum() / predicted),
    )


def _leave_out(setting: Setting, figures: Mapping[str, Sequence[float]]) -> None:
    """Go on without coders whose figures are not finite, and name them."""
    for name, values in figures.items():
        if not np.isfinite(values).all():
            del setting.coders[name]
            setting.left_out.append(name)
            console.print(f"{name}: left out, it gives values that are not finite")


def _write_sums(
    setting: Setting, sums: Mapping[str, Sums], losses: Mapping[str, LossSums], contexts: Contexts
) -> None:
    """Sums by document, which `bsc compare` pairs runs by, and how often latents fire."""
    arrays: dict[str, NDArray[Any]] = {
        "predicted": contexts.counts,
        f"{CLEAN}/nats": losses[CLEAN].nats,
    }
    for name in setting.coders:
        own = sums[name]
        write_firing_counts(setting.run, name, own.counts)
        arrays |= {
            f"{name}/nats": losses[name].nats,
            f"{name}/kl": losses[name].kl,
            f"{name}/squared_error": own.by_document["coder"],
            f"{name}/squared_deviation": own.by_document["total"],
        }
        for kind in own.by_document.keys() & {"binarised", "quantised"}:
            arrays[f"{name}/squared_error_{kind}"] = own.by_document[kind]
        if (without := losses.get(f"{name}|binarised")) is not None:
            arrays[f"{name}/nats_binarised"] = without.nats
    write_arrays(EvaluationFolder(setting.run).documents, arrays)
