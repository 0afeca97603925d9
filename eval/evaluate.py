"""Stage 3: figures of every coder of a run, on documents that no coder was trained on."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from bsc.cache.attention import Separation, document_separation
from bsc.cache.hookpoints import RowTap
from bsc.cache.models import LanguageModel, load_model
from bsc.cache.store import ActivationStore
from bsc.devices import pick_device
from bsc.errors import StoreError, UserError
from bsc.eval.examples import collect_examples
from bsc.eval.fidelity import measure
from bsc.eval.loss import Contexts, context_losses, contexts_of, paired_difference
from bsc.eval.splice import coder_replacement, mean_replacement, zero_replacement
from bsc.files import write_atomically, write_json
from bsc.progress import console, stage
from bsc.train.run import RUN_VERSION, Run
from bsc.versions import versions

__all__ = ["evaluate"]

CE_TOKENS = 100_000


def _matching_model(
    store: ActivationStore, name: str | None, device: torch.device
) -> LanguageModel:
    """The model that the store was captured from, with its head.

    Raises:
        StoreError: the model of that name has other weights now.
    """
    saved = store.attributes["model"]
    lm = load_model(
        name or str(saved["name"]), revision=saved["revision"], dtype=str(saved["dtype"]),
        device=device, with_head=True,
    )  # fmt: skip
    found = lm.identity()
    for key in ("revision", "weights_sha256"):
        if found[key] != saved[key]:
            raise StoreError(
                f"{store.folder}: captured from {saved['name']} with {key} {saved[key]}, but that "
                f"model now has {found[key]}. Name the model of the capture with --model."
            )
    return lm


def _open_store(run: Run, store: Path | None) -> ActivationStore:
    config = run.config()
    if store is None and "://" not in config["store"] and not Path(config["store"]).exists():
        raise StoreError(
            f"{run.folder}: trained on store {config['store']}, which is not there any more. Say "
            f"where it is now with --store."
        )
    opened = ActivationStore(store or config["store"])
    if opened.store_id != config["store_id"]:
        raise StoreError(
            f"{opened.folder}: this is store {opened.store_id}, but run {run.folder} was trained "
            f"on store {config['store_id']}. Name that one with --store."
        )
    return opened


def _losses(
    lm: LanguageModel, contexts: Contexts, hookpoints: list[str], store: ActivationStore
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Losses of the model as it is, and what ablating each hookpoint adds."""
    clean = context_losses(lm, contexts, {})
    ablations = {}
    for hook in hookpoints:
        mean = store.train.moments(f"{hook}/output").mean.to(lm.model.device)
        figures = {}
        for name, replace in (("zero", zero_replacement), ("mean", mean_replacement(mean))):
            ablated = context_losses(lm, contexts, {hook: replace})
            delta, interval = paired_difference(ablated, clean, contexts.counts)
            figures[name] = {"delta_ce": delta, "interval": list(interval)}
        ablations[hook] = figures
    return clean, ablations


def evaluate(
    run: Run,
    *,
    store: Path | None = None,
    model: str | None = None,
    ce_tokens: int = CE_TOKENS,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure every coder of a run and write eval.json, examples.json and firing counts.

    Args:
        run: a run whose training has ended.
        store: where the store is now; None: where it was in training.
        model: where the model is now; None: where it was at the capture.
        ce_tokens: held-out tokens for the losses of the language model.
        device: where to compute; None: a GPU where there is one.

    Returns:
        What eval.json holds.

    Raises:
        UserError: the store, its held-out rows or the model are not there or not the same.
    """
    if ce_tokens < 1:
        raise UserError(f"--ce-tokens {ce_tokens}: at least 1 is needed.")
    opened = _open_store(run, store)
    split = opened.held_out
    on = pick_device(device)
    lm = _matching_model(opened, model, on)
    names = run.coder_names()
    hooks = list(dict.fromkeys(str(c["hookpoint"]) for c in run.config()["coders"]))
    separation: Separation = "positions"
    if opened.packing == "masked":
        separation = document_separation(
            RowTap(lm.base, hooks).rows, dtype=lm.model.dtype, device=on,
            vocabulary=int(lm.model.get_input_embeddings().weight.shape[0]),
        )  # fmt: skip
    left_out_tokens = ()
    if run.config().get("without_special_tokens"):
        left_out_tokens = tuple(opened.attributes["model"]["special_token_ids"])
    contexts = contexts_of(opened, ce_tokens, separation)
    predicted = int(contexts.counts.sum())
    figures: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    counts: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    with stage("evaluate", len(names) + len(hooks), "coders and baselines") as progress:
        clean, ablations = _losses(lm, contexts, hooks, opened)
        progress.advance(len(hooks))
        for name in names:
            coder = run.coder(name).to(on)
            hook = str(coder.about["hookpoint"])
            if coder.about["frozen_at_step"] is not None:
                left_out.append(name)
                console.print(
                    f"{name}: left out, it turned non-finite at step "
                    f"{coder.about['frozen_at_step']} of its training"
                )
                progress.advance(1)
                continue
            fidelity = measure(coder, split, hook, without_tokens=left_out_tokens)
            spliced = context_losses(lm, contexts, {hook: coder_replacement(coder)})
            delta, interval = paired_difference(spliced, clean, contexts.counts)
            ablated = ablations[hook]["mean"]["delta_ce"]
            figures[name] = fidelity.to_json() | {
                "ce_spliced": float(spliced.sum() / predicted),
                "delta_ce": delta,
                "delta_ce_interval": list(interval),
                "loss_recovered_from_mean": 1 - delta / ablated if ablated else None,
            }
            examples[name] = collect_examples(coder, split, hook, fidelity.counts, lm.tokenizer)
            counts[name] = fidelity.counts
            progress.advance(1, name)
    result = {
        "version": RUN_VERSION,
        "store_id": opened.store_id,
        "model": opened.attributes["model"],
        "held_out_rows": split.rows,
        "contexts": len(contexts.token_id),
        "predicted_tokens": predicted,
        "context": opened.context,
        "ce_clean": float(clean.sum() / predicted),
        "ablations": ablations,
        "coders": figures,
        "left_out": left_out,
        "versions": versions(),
        "device": on.type,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # All at the end, eval.json last: an interrupted evaluation leaves the one before as it was.
    for name, count in counts.items():
        write_atomically(run.coder_folder(name) / "firing.safetensors", save({"counts": count}))
    write_json(run.folder / "examples.json", examples)
    write_json(run.eval_path, result)
    console.print(f"{run.eval_path}: {len(figures)} coders on {split.rows:,} held-out rows")
    return result
