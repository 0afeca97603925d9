"""What a run of finetuning comes to: a request, checked and decided before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import xxhash

from bsc.cache.model.attention import Separation
from bsc.cache.model.models import LanguageModel
from bsc.cache.store.store import ActivationStore
from bsc.devices import available_bytes, pick_device
from bsc.errors import UserError
from bsc.eval.passes.prefix import Prefix
from bsc.eval.passes.setting import check_widths, matching_model, open_store, separation_in
from bsc.files import canonical_json
from bsc.finetuning.config import BATCH_TOKENS, FinetuneConfig
from bsc.finetuning.memory import MemoryPlan, ModelSize, plan_memory
from bsc.finetuning.schedule import schedule_of
from bsc.finetuning.text import StoreText
from bsc.finetuning.values import config_without_values, without_values
from bsc.progress import console
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig
from bsc.train.metrics import check_targets
from bsc.train.run import Run
from bsc.train.run_config import RUN_VERSION, Finetuned, FinetunedCoder, RunCoder, RunConfig
from bsc.versions import versions

__all__ = ["FinetuneJob", "make_job"]


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that decides a run."""

    config: FinetuneConfig
    parent: Run
    run: Run
    store: ActivationStore
    text: StoreText
    lm: LanguageModel
    separation: Separation
    without_tokens: tuple[int, ...]
    planned: list[FinetunedCoder]
    sets: list[list[str]]
    """Names of coders that are spliced in together."""
    memory: MemoryPlan
    free: int
    """Bytes that may be used beside the model."""
    batch_contexts: int
    steps: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step, where contexts are full."""
        return self.batch_contexts * self.text.context

    def coder(self, planned: FinetunedCoder) -> SparseCoder:
        """The coder that one begins as.

        Raises:
            UserError: it is damaged, not of this model, or another one than when the run began.
        """
        coder = self.parent.coder(planned.parent)
        check_widths(self.store, planned.name, coder)
        if coder.xxh3_128() != planned.parent_xxh3_128:
            raise UserError(
                f"{self.parent.folder}: {planned.parent} is not the coder that this run began "
                f"with: it was trained on, or exchanged. Finetune it under another --name."
            )
        removed = self.config.values == "removed"
        if not removed:
            return coder
        return without_values(
            coder, self.store, planned.hookpoint, without_tokens=self.without_tokens
        )

    def record(self) -> RunConfig:
        """What config.json holds until the run is complete."""
        before, config = self.parent.config(), self.config
        return RunConfig(
            version=RUN_VERSION,
            name=config.name,
            store=_absolute(self.store.folder.address),
            store_id=self.store.store_id,
            model=self.store.attributes["model"],
            rows=self.store.train.rows,
            steps=self.steps,
            batch_rows=self.batch_tokens,
            micro_rows=self.memory.micro_contexts * self.text.context,
            seed=None,
            normalise=config.normalise,
            without_tokens=list(self.without_tokens),
            dead_after=config.dead_after,
            log_every=config.log_every,
            device=self.lm.model.device.type,
            rank=0,
            world=1,
            assigned={},
            config=None,
            coders=list(self.planned),
            imported=before.imported,
            versions=versions(),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            finetuned=Finetuned(
                run=str(self.parent.folder.resolve()),
                loss=config.loss,
                sets=self.sets,
                context=self.text.context,
                config=config.model_dump(mode="json"),
            ),
        )


def make_job(
    parent: Run,
    config: FinetuneConfig,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    check: bool = True,
    run: Run | None = None,
    saved: RunConfig | None = None,
) -> FinetuneJob:
    """Check a request and decide everything, without writing or loading a coder.

    Args:
        parent: the run whose coders are finetuned.
        config: how.
        store: where its store is now; None: where it was in training.
        model: where the model is now; None: where it was at the capture.
        check: whether shards are compared with the manifest when they are first read.
        run: the new run; None: where the config says.
        saved: what the run's config.json holds, if it goes on.

    Raises:
        UserError: the request cannot be carried out.
    """
    if parent.config().trained_on:
        raise UserError(
            f"{parent.folder}: figures of a run on another store, not a run. Name the run itself; "
            f"`bsc eval --on` measures what comes of it on that store, too."
        )
    chosen = _chosen(parent, config.coders)
    if run is None:
        run = Run((config.runs or parent.folder.resolve().parent) / config.name)
        if run.folder.resolve() == parent.folder.resolve():
            raise UserError(f"--name {config.name}: that is the run itself. Give another name.")
        run.check_new(run.folder)
    check_targets(tensorboard=config.tensorboard, wandb=config.wandb)
    opened = open_store(parent, store, check=check)
    text = StoreText.of(opened)
    if saved is not None and (saved.rows, saved.store_id) != (opened.train.rows, opened.store_id):
        raise UserError(
            f"{opened.folder}: {opened.train.rows:,} training rows of store {opened.store_id}, but "
            f"the run began with {saved.rows:,} of {saved.store_id}. It can only go on with those."
        )
    batch_tokens = config.batch_tokens or max(BATCH_TOKENS, text.context)
    if config.batch_tokens is None:
        config = config.model_copy(update={"batch_tokens": batch_tokens})
    contexts = batch_tokens // text.context
    steps = config.tokens // (max(1, contexts) * text.context)
    if contexts < 1 or steps < 1:
        what = "--batch-tokens" if contexts < 1 else "--tokens"
        least = text.context if contexts < 1 else contexts * text.context
        given = batch_tokens if contexts < 1 else config.tokens
        raise UserError(
            f"{what} {given}: fewer than {least:,} tokens, which is one "
            + ("context of this store." if contexts < 1 else "step. Give more, or a smaller batch.")
        )
    planned = _saved_coders(saved) if saved else _planned(parent, chosen, config, steps)
    sets = _sets(planned, together=config.together)
    device = pick_device(config.device)
    lm = matching_model(opened, model, device)
    free = available_bytes(device)
    memory = plan_memory(
        planned,
        sets,
        _size(lm, planned),
        context=text.context,
        batch_contexts=contexts,
        micro_tokens=saved.micro_rows if saved else config.micro_tokens,
        precision=config.precision,
        device=device.type,
        free=free,
    )
    separation = separation_in(opened, lm, list(dict.fromkeys(c.hookpoint for c in planned)))
    without = tuple(parent.config().without_tokens)
    return FinetuneJob(
        config, parent, run, opened, text, lm, separation, without, planned, sets, memory, free,
        contexts, steps,
    )  # fmt: skip


def _saved_coders(saved: RunConfig) -> list[FinetunedCoder]:
    """The coders of a run of finetuning."""
    return [c for c in saved.coders if isinstance(c, FinetunedCoder)]


def _chosen(parent: Run, patterns: Sequence[str]) -> list[RunCoder]:
    """The coders that any of the patterns means, and all where there are none.

    Raises:
        UserError: a pattern means none.
    """
    names = parent.names_of(patterns)
    return [c for c in parent.config().coders if c.name in names]


def _planned(
    parent: Run, chosen: Sequence[RunCoder], config: FinetuneConfig, steps: int
) -> list[FinetunedCoder]:
    """What becomes of the coders that are finite."""
    planned = []
    removed = config.values == "removed"
    for before in chosen:
        if removed and before.coder.code != "continuous":
            console.print(f"{before.name}: left out, its latents have no values to remove")
            continue
        coder = parent.coder(before.name)
        if coder.about.get("frozen_at_step") is not None:
            console.print(f"{before.name}: left out, it turned non-finite in training")
            continue
        own = config_without_values(before.coder) if removed else before.coder
        schedule = schedule_of(config, own.code, steps)
        planned.append(
            FinetunedCoder(
                name=f"{before.name}-values_removed" if removed else before.name,
                hookpoint=before.hookpoint,
                group=before.group,
                coder=own,
                seed=before.seed,
                parent=before.name,
                parent_xxh3_128=coder.xxh3_128(),
                parent_kind=_kind(before),
                optimiser=config.optimiser,
                lr=schedule.lr,
                warmup=schedule.warmup,
                decay=schedule.decay,
                beta1=schedule.beta1,
                clip_norm=config.clip_norm,
                surrogate=_surrogate(own),
            )
        )
    if not planned:
        none = "has values to remove" if removed else "stayed finite"
        raise UserError(f"{parent.folder}: none of the coders that were named {none}.")
    return planned


def _kind(coder: RunCoder) -> str:
    kind = coder.but_for_the_seed.model_dump(mode="json")
    return xxhash.xxh3_64_hexdigest(canonical_json(kind).encode())


def _absolute(store: str) -> str:
    """Where a store is, for a process that is started elsewhere."""
    return store if "://" in store else str(Path(store).resolve())


def _surrogate(coder: CoderConfig) -> str | None:
    """That of training; Gumbel-softmax is about which latent of a group is selected, which here is
    the one that will be selected afterwards, so the sigmoid takes its place."""
    if coder.code == "continuous":
        return None
    return "sigmoid" if coder.surrogate == "gumbel" else coder.surrogate


def _sets(planned: Sequence[FinetunedCoder], *, together: bool) -> list[list[str]]:
    """Names of coders that are spliced in together: those that differ in their hookpoint alone."""
    if not together:
        return [[c.name] for c in planned]
    groups: dict[str, list[FinetunedCoder]] = {}
    for coder in planned:
        groups.setdefault(coder.name.removeprefix(f"{coder.hookpoint}/"), []).append(coder)
    for label, own in groups.items():
        hooks = [c.hookpoint for c in own]
        if len(set(hooks)) < len(hooks):
            raise UserError(f"--together: several coders of {hooks[0]} are called {label}.")
    return [[c.name for c in own] for own in groups.values()]


def _size(lm: LanguageModel, planned: Sequence[FinetunedCoder]) -> ModelSize:
    """What memory depends on. Of models that do not say how they are made, more than they need."""
    config: Any = lm.model.config
    config = getattr(config, "get_text_config", lambda: config)()
    layers = int(getattr(config, "num_hidden_layers", 0) or 1)
    eager = getattr(config, "_attn_implementation", "eager") == "eager"
    table = lm.model.get_input_embeddings().weight
    first = min(
        (len(Prefix(lm.base, [hook]).layers) for hook in {c.hookpoint for c in planned}), default=0
    )
    return ModelSize(
        width=int(table.shape[1]),
        layers=max(1, layers - first),
        # Fused attention keeps nothing for each pair of tokens.
        heads=int(getattr(config, "num_attention_heads", 0) or 1) if eager else 0,
        vocabulary=int(table.shape[0]),
        bytes_each=torch.finfo(lm.model.dtype).bits // 8,
    )
