"""What each step of a study comes to, from its configs and the model's config alone: tokens,
arithmetic, bytes, requests to a judge. Nothing has to exist yet.

Arithmetic is counted in FLOP, two for each multiplication and addition of a product. Left out is
what grows with none of the products: normalisation, losses over the vocabulary, optimisers, the
matching of latents, the regressions of sparse probing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.estimate import estimate
from bsc.cache.capture.source import context_length
from bsc.cache.model.hookpoints import modules_of
from bsc.cache.model.models import load_architecture
from bsc.cache.store.kinds import SPLITS
from bsc.cache.store.layout import Hookpoint
from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config
from bsc.errors import ConfigError, UserError, nearest
from bsc.eval.config import EvalConfig
from bsc.eval.figures.probing import LENGTH
from bsc.eval.passes.controls import CALIBRATION_ROWS
from bsc.finetuning.config import BATCH_TOKENS, FinetuneConfig
from bsc.finetuning.values import config_without_values
from bsc.study.commands import config_of, in_numbers, path_of_store
from bsc.study.config import Hardware, StudyStep
from bsc.study.judging import JudgeWork, judge_work
from bsc.study.study import OpenedStudy
from bsc.train.coders.coder import parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.naming import names_of
from bsc.train.config import TrainConfig
from bsc.train.memory import flops_per_row
from bsc.train.optim import state_bytes
from bsc.train.run_config import PlannedCoder
from bsc.train.schedule import comparable_steps
from bsc.train.sweep import expand, plan_coders

if TYPE_CHECKING:
    from bsc.train.config import Optimiser

__all__ = ["Amount", "ModelCost", "Reckoned", "encode_flop", "reckon"]

PROBE_TEXTS_IN_ALL = 6_000
"""Labelled texts of a set: so many has the embedded one, of 8 classes."""
PROBE_CLASSES = 8
SECONDS_A_FIRING = 2.3e-7
"""Of the scores without a judge, on one core: benchmarks/records/interp_2core-epyc_2026-11-20.md,
64 million firings in 14.4 s."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What a step comes to."""

    what: str
    """In words."""
    coders: int = 0
    tokens: int = 0
    """Tokens or rows that go through the model or the coders."""
    flop: float = 0.0
    bytes: int = 0
    """What is on disk in the end."""
    through: float = 0.0
    """Bytes that are written to the store, or read from it."""
    core_seconds: float = 0.0
    """Time of what is counted in firings, on a core, and not in FLOP."""
    judge: JudgeWork | None = None


class ModelCost:
    """FLOP of a token in a model: two for each parameter but those of embeddings, and in every
    layer those of attention to a whole context, whose masked part is multiplied like the rest."""

    def __init__(self, base: torch.nn.Module, context: int) -> None:
        """Count what a model without weights, of `load_architecture`, has."""
        table = cast(Any, base).get_input_embeddings().weight
        self.base, self.context = base, context
        self.vocabulary, self.width = (int(n) for n in table.shape)
        tables = [m for m in base.modules() if isinstance(m, torch.nn.Embedding)]
        self.parameters = _parameters(base) - sum(_parameters(m) for m in tables)
        """All but embeddings."""
        config = getattr(base, "config", None)
        self.layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        self.attention = 4.0 * context * self.width
        self.whole = 2.0 * self.parameters + self.layers * self.attention
        """Of all layers."""
        self.head = 2.0 * self.width * self.vocabulary

    def before(self, hook: str, *, with_its_own: bool = False) -> float:
        """Of the layers before that of a hookpoint, which need not run again for what is spliced in
        there; with its own, what a capture there runs. Without layers: none, and the whole model.
        """
        found = re.match(r"(?:(.+?)\.)?(\d+)(?:\.|$)", modules_of(hook)[-1])
        holder = self.base.get_submodule(found[1]) if found and found[1] else self.base
        if found is None or not isinstance(holder, torch.nn.ModuleList):
            return self.whole if with_its_own else 0.0
        run = list(holder)[: int(found[2]) + with_its_own]
        return sum(2.0 * _parameters(layer) + self.attention for layer in run)


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def encode_flop(config: CoderConfig) -> float:
    """FLOP of a row that is encoded and decoded."""
    skip = 2 * config.d_in * config.d_out if config.site == "skip_transcoder" else 0
    return float(2 * config.n_latents * config.d_in + 2 * config.k * config.d_out + skip)


class _Store(NamedTuple):
    """A store that is to be captured."""

    hookpoints: list[Hookpoint]
    rows: int
    held_out: int
    bytes_each: int
    model: ModelCost

    def hookpoint(self, name: str) -> Hookpoint:
        """As of an `ActivationStore`, for `plan_coders`."""
        for hook in self.hookpoints:
            if hook.name == name:
                return hook
        names = [h.name for h in self.hookpoints]
        raise ConfigError(
            f"hookpoint = {name!r}: the store has none called so{nearest(name, names)}; it has "
            f"{', '.join(names)}."
        )


class _Run(NamedTuple):
    """A run that is to be trained or finetuned."""

    store: _Store
    coders: list[PlannedCoder]


class _Measured(NamedTuple):
    """A run with the rows that it is to be evaluated on."""

    run: _Run
    rows: int


class Reckoned(NamedTuple):
    """What is known of a study before it runs."""

    amounts: dict[str, Amount]
    """What every step comes to, by name, in their order."""
    coders: dict[str, list[PlannedCoder]]
    """Coders of every run, by its step; of finetuning as they begin, without what is chosen."""


def reckon(opened: OpenedStudy) -> Reckoned:
    """What every step of a study comes to, and its coders.

    Raises:
        UserError: the config of a model cannot be had, or a step does not fit the model.
    """
    reckoning = _Reckoning(opened)
    found = {}
    for name, node in opened.nodes.items():
        of_command = getattr(reckoning, node.step.command)
        found[name] = of_command(node.step, f"{opened.file}: [{node.step.command}.{name}]")
    return Reckoned(found, {name: run.coders for name, run in reckoning.runs.items()})


class _Reckoning:
    """The steps before a step, as far as what it comes to depends on them."""

    def __init__(self, opened: OpenedStudy) -> None:
        self.opened = opened
        self.hardware: Hardware = opened.study.hardware
        self.stores: dict[str, _Store] = {}
        self.runs: dict[str, _Run] = {}
        self.measured: dict[str, _Measured] = {}
        self._models: dict[tuple[str, str | None, int | None], ModelCost] = {}

    def cache(self, step: StudyStep, where: str) -> Amount:
        """A capture: the model up to the deepest hookpoint, and writing its rows."""
        if path := path_of_store(step):
            return self._existing(step.name, ActivationStore(path))
        config = config_of(CaptureConfig, step.fields, where)
        folder = self.hardware.architectures.get(config.model)
        store = self.opened.folder.store(step.name)
        # The GPU that it asks for need not be here.
        config = config.but(model=folder or config.model, store=store, device="cpu")
        model = self._model(config.model, config.revision, config.context)
        made = estimate(config, disk_rate=self.hardware.disk_rate, free=1 << 62)
        grids = made.plan.grids
        rows, held_out = (grids[s].rows if s in grids else 0 for s in ("train", "held_out"))
        hooks = list(made.plan.hookpoints)
        each = 1 if config.codec == "int8" else 2
        self.stores[step.name] = _Store(hooks, rows, held_out, each, model)
        deepest = max(model.before(h.name, with_its_own=True) for h in hooks)
        return Amount(
            what=f"{rows + held_out:,} tokens, {len(hooks)} hookpoint(s)",
            tokens=rows + held_out,
            flop=deepest * (rows + held_out),
            bytes=made.plan.bytes,
            through=made.disk_hours * 3600 * made.disk_rate,
        )

    def _existing(self, name: str, store: ActivationStore) -> Amount:
        """A store that there is: nothing is left to do for it."""
        saved = store.attributes["model"]
        folder = self.hardware.architectures.get(saved["name"])
        model = self._model(folder or saved["name"], saved["revision"], store.context)
        rows, held_out = (store.splits[s].rows if s in store.splits else 0 for s in SPLITS)
        each = 1 if store.codec == "int8" else 2
        self.stores[name] = _Store(list(store.hookpoints), rows, held_out, each, model)
        return Amount(what=f"{rows + held_out:,} tokens, captured before")

    def _model(self, name: str, revision: str | None, context: int | None) -> ModelCost:
        key = (name, revision, context)
        if key not in self._models:
            try:
                base, longest = load_architecture(name, revision=revision)
            except UserError as error:
                raise UserError(
                    f"{error} A plan needs no more of it than config.json: "
                    f'[hardware] architectures = {{ "{name}" = "FOLDER" }}.'
                ) from None
            self._models[key] = ModelCost(base, context_length(context, longest))
        return self._models[key]

    def train(self, step: StudyStep, where: str) -> Amount:
        """A sweep: steps of every coder, and reading the rows that they are taken on."""
        own = {k: v for k, v in step.fields.items() if k not in ("store", "chosen")}
        own.setdefault("coders", [{"code": ["binary", "continuous"]}])
        config = parse_config(TrainConfig, in_numbers(TrainConfig, own, where), where)
        store = self.stores[step.fields["store"]]
        try:
            points = expand(config.coders, where, config.preset)
            steps = (config.tokens or store.rows) // config.batch_rows
            length = comparable_steps(steps, config.batch_rows)
            coders = plan_coders(points, cast(Any, store), length)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
        self.runs[step.name] = _Run(store, coders)
        rows = steps * config.batch_rows
        read = {(c.hookpoint, c.coder.side): c.coder.d_in for c in coders}
        read |= {(c.hookpoint, "output"): c.coder.d_out for c in coders}
        return Amount(
            what=f"{len(coders)} coder(s), {rows:,} rows",
            coders=len(coders),
            tokens=rows,
            flop=sum(flops_per_row(c.coder) for c in coders) * rows,
            bytes=_run_bytes(((c.coder, c.optimiser) for c in coders), keep=config.keep_checkpoint),
            through=float(rows * store.bytes_each * sum(read.values())),
        )

    def choose(self, step: StudyStep, where: str) -> Amount:
        """A look at figures that are there: nothing."""
        runs = step.fields["runs"]
        names = runs if isinstance(runs, str) else ", ".join(runs)
        return Amount(what=f"{step.fields['field']} of {names}")

    def finetune(self, step: StudyStep, where: str) -> Amount:
        """One pass of the model as it is, and for each set of coders one forward and one backward
        pass from its first layer on. Nothing of the model has a gradient."""
        config = config_of(FinetuneConfig, step.fields, where)
        run = self.runs[step.fields["run"]]
        coders = _named(run.coders, config.coders, where)
        if config.values == "removed":
            coders = [
                c.model_copy(
                    update={
                        "coder": config_without_values(c.coder),
                        "name": f"{c.name}-values_removed",
                    }
                )
                for c in coders
                if c.coder.code == "continuous"
            ]
        self.runs[step.name] = _Run(run.store, coders)
        model = run.store.model
        sets = list(_alike(coders).values()) if config.together else [[c] for c in coders]
        context = model.context
        batch = (config.batch_tokens or max(BATCH_TOKENS, context)) // context * context
        tokens = config.tokens // max(1, batch) * batch
        each = model.whole + model.head
        for own in sets:
            each += 2 * _after(model, own) + sum(flops_per_row(c.coder) for c in own)
        return Amount(
            what=f"{len(coders)} coder(s) in {len(sets)} set(s), {tokens:,} tokens",
            coders=len(coders),
            tokens=tokens,
            flop=each * tokens,
            bytes=_run_bytes(
                ((c.coder, config.optimiser) for c in coders), keep=config.keep_checkpoint
            ),
        )

    def eval(self, step: StudyStep, where: str) -> Amount:
        """Passes of the model with every coder, ablation and edit, and all rows through every
        coder. Frequent latents that are turned off one by one are taken to be there."""
        config = config_of(EvalConfig, step.fields, where)
        run = self.runs[step.fields["run"]]
        store, coders = run.store, run.coders
        model = store.model
        rows = min(config.rows or store.held_out, store.held_out)
        self.measured[step.name] = _Measured(run, rows)
        clean = model.whole + model.head
        spliced = {c.name: _after(model, [c]) + encode_flop(c.coder) for c in coders}
        passes, each = 1, clean
        for hook in {c.hookpoint for c in coders}:
            passes += 2  # zero and mean ablation
            each += 2 * (clean - model.before(hook))
        for c in coders:
            n = 1 if c.coder.code == "binary" else 2  # with its values removed, too
            passes, each = passes + n, each + n * spliced[c.name]
        for own in _alike(coders).values():
            if len(own) > 1:
                passes += 1
                each += _after(model, own) + sum(encode_flop(c.coder) for c in own)
        tokens = min(config.ce_tokens, store.held_out)
        flop = each * tokens
        off = 2 * config.ablation_bins + config.ultra_ablations
        if off:
            ablated = clean + sum((1 + off) * spliced[c.name] for c in coders)
            flop += ablated * min(config.ablation_tokens, tokens)
        for c in coders:
            calibrated = 0 if c.coder.code == "binary" else min(CALIBRATION_ROWS, store.rows)
            flop += (rows + calibrated) * encode_flop(c.coder)
        if not step.fields.get("no_probe"):
            texts = min(PROBE_TEXTS_IN_ALL, PROBE_CLASSES * config.probe_texts)
            probed = model.whole + sum(encode_flop(c.coder) for c in coders)
            flop += len(config.probes) * texts * LENGTH * probed
        return Amount(
            what=f"{len(coders)} coder(s), {passes} passes over {tokens:,} tokens, {rows:,} rows",
            coders=len(coders),
            tokens=tokens,
            flop=flop,
            bytes=sum(
                rows * c.coder.k * (8 + (4 if c.coder.n_latents > 1 << 16 else 2)) for c in coders
            ),
        )

    def interp(self, step: StudyStep, where: str) -> Amount:
        """Scores without a judge for all firings, and the questions to a judge."""
        run, rows = self.measured[step.fields["run"]]
        work, coders = judge_work(
            step.fields,
            lambda config: config_of(config, step.fields, where),
            lambda names: _named(run.coders, names, where),
            self.hardware,
        )
        firings = sum(rows * c.coder.k for c in coders)
        asked = f", {work.requests:,} requests" if work else ""
        return Amount(
            what=f"{len(coders)} coder(s), {firings:,} firings{asked}",
            coders=len(coders),
            tokens=rows,
            core_seconds=SECONDS_A_FIRING * firings,
            judge=work,
        )


def _named(coders: list[PlannedCoder], wanted: tuple[str, ...], where: str) -> list[PlannedCoder]:
    """The coders that some names or patterns mean; all where there are none."""
    names = names_of(wanted, [c.name for c in coders], where)
    return [c for c in coders if c.name in names]


def _alike(coders: Iterable[PlannedCoder]) -> dict[str, list[PlannedCoder]]:
    """Coders that differ in their hookpoint alone, by what they share."""
    groups: dict[str, list[PlannedCoder]] = {}
    for coder in coders:
        groups.setdefault(coder.name.removeprefix(f"{coder.hookpoint}/"), []).append(coder)
    return groups


def _after(model: ModelCost, coders: list[PlannedCoder]) -> float:
    """FLOP of a token from the first layer on in which any of some coders is spliced in."""
    return model.whole + model.head - min(model.before(c.hookpoint) for c in coders)


def _run_bytes(coders: Iterable[tuple[CoderConfig, Optimiser]], *, keep: bool) -> int:
    """Bytes of coders in float32, and of the last checkpoint where it is kept."""
    total = 0
    for config, optimiser in coders:
        shapes = parameter_shapes(config)
        weights = 4 * sum(prod(s) for s in shapes.values())
        total += weights + (weights + state_bytes(optimiser, shapes) if keep else 0)
    return total
