"""An evaluation on disk: what is where in the folder of a run, and what eval.json holds.

eval.json                        every figure
eval/examples.json               contexts of some latents of each coder, for the report
eval/documents.safetensors       sums by document, which `bsc compare` pairs runs by
eval/codes/<coder>/              every firing (passes/codes.py)
eval/samples/<coder>.safetensors sampled firings of every latent (figures/examples.py)
eval/{rows,losses,ablation}/     pieces that an interrupted evaluation goes on from
coders/<coder>/firing.safetensors   in how many rows each latent fired

Figures are defined in docs/evaluation.md. Intervals are of 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bsc.errors import StoreError
from bsc.eval.config import EvalConfig
from bsc.train.run import Run, as_run
from bsc.typed import Record, read_typed

__all__ = [
    "EVAL_VERSION",
    "Ablation",
    "Accuracy",
    "Bin",
    "Bits",
    "CoderFigures",
    "Evaluation",
    "EvaluationFolder",
    "Examples",
    "Fidelity",
    "Firing",
    "Histogram",
    "Interval",
    "LatentFigures",
    "Likeness",
    "LossFigures",
    "Pair",
    "Probes",
    "Probing",
    "ShownContext",
    "ShownLatent",
    "Together",
    "UltraLatent",
    "read_evaluation",
]

EVAL_VERSION = 3

Interval = list[float] | None
"""[low, high], or None where the sample is too small for one."""


class Fidelity(Record):
    """How well a coder reconstructs."""

    rows: int
    """Rows that were evaluated."""
    fvu: float
    fvu_interval: Interval
    fvu_median_channel: float
    """Median over the channels that vary of a channel's own FVU."""
    fvu_skip_only: float
    """Every latent off: what the skip path and b_dec explain."""
    fvu_gain: float
    """What the latents add to it."""
    fvu_quantised: float
    """FVU of the quantised code, whose size `bits` is."""
    fvu_binarised: float | None = None
    """Where a code has values: each replaced by its latent's mean."""
    fvu_binarised_interval: Interval = None
    l0: float
    """Latents that are not 0, per row."""
    rows_unseen: int | None = None
    """Where some rows were seen in training: the others."""
    fvu_unseen: float | None = None
    fvu_unseen_interval: Interval = None


class Histogram(Record):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]


class Firing(Record):
    """How often latents fire."""

    latents: int
    dead: int
    """Latents that never fired."""
    dead_rate_bound: float
    """Largest rate, at 95 % confidence, of a latent that never fired."""
    firings: int
    latents_above: dict[str, int]
    """By firing rate."""
    share_of_firings_above: dict[str, float]
    """By firing rate of the latents."""
    ultra_per_token: float
    """Firings per row of latents with a rate above 10 %."""
    log10_rate_histogram: Histogram
    """Histogram of log10 of the firing rates of the latents that fired."""


class LossFigures(Record):
    """What something spliced into the model costs it, in nats per predicted token."""

    ce_spliced: float
    delta_ce: float
    delta_ce_interval: Interval
    kl: float
    kl_interval: Interval
    delta_top1: float
    delta_top1_interval: Interval
    delta_ce_unseen: float | None = None
    """Where some tokens were seen in training: on the others."""
    delta_ce_unseen_interval: Interval = None
    loss_recovered_zero: float | None = None
    loss_recovered_mean: float | None = None
    delta_ce_binarised: float | None = None
    """Where a code has values: each replaced by its latent's mean."""
    delta_ce_binarised_interval: Interval = None


class Together(LossFigures):
    """Coders that differ in their hookpoint alone, all spliced in at once."""

    coders: list[str]


class Bits(Record):
    """Size of a code, per token."""

    bits: float
    bits_firing: float
    bits_values: float


class UltraLatent(Record):
    """What a latent is that fires on more than 10 % of the rows."""

    latent: int
    rate: float
    position_share: float
    """Share of the entropy of its firing that the position explains."""
    token_share: float
    special_share: float
    """Share of its firings that are on special tokens."""
    token_entropy: float
    """Bits, over the common tokens."""
    token_entropy_all: float
    """The same of all rows."""
    antipode: int
    """Latent whose decoder row is the most opposite."""
    decoder_cosine: float
    encoder_cosine: float
    component_share: float
    """Share of its decoder row that lies in the first principal components of the output."""
    component: int
    what: str
    """The diagnosis in words."""
    delta_ce: float | None = None
    """What turning it off adds to the loss, where that was tried."""
    delta_ce_interval: Interval = None


class LatentFigures(Bits):
    """Figures that need the firings latent by latent."""

    ultra: list[UltraLatent]
    components_share: float
    """Share of the output's variance in the components that `ultra` speaks of."""


class Bin(Record):
    """Latents that were turned off at a time."""

    latents: int
    firing_share: float
    score: float
    """Mean score of its latents, weighted by firings."""
    delta_ce: float
    delta_ce_interval: Interval


class Ablation(Record):
    """Bins of latents of equal firing mass that were turned off one after the other."""

    score: str
    """What latents are in order by: ``"rate"``, or the name of a file."""
    predicted_tokens: int
    bins: list[Bin]
    random: list[Bin]
    """The control: the same latents in random order."""


class CoderFigures(Fidelity, Firing, LossFigures, LatentFigures):
    """Every figure of a coder."""

    ablation: Ablation | None = None

    def __repr__(self) -> str:
        return f"<CoderFigures FVU {self.fvu:.4f}, L0 {self.l0:.1f}, delta CE {self.delta_ce:.4f}>"


class Accuracy(Record):
    """How often a probe is right."""

    accuracy: float
    """Mean over classes."""
    interval: Interval
    classes: dict[str, float]


Probes = dict[str, dict[str, Accuracy]]
"""By arm, then by how many columns a probe reads."""


class Probing(Record):
    """Sparse probing on one set of labelled texts."""

    classes: list[str]
    texts: int
    tokens: int
    """Tokens of a text that are read at most."""
    train: list[int]
    """Fewest and most training texts of a class."""
    test: list[int]
    coders: dict[str, Probes]
    baselines: dict[str, Probes]
    """On the channels themselves, by hookpoint and side."""


class Likeness(Record):
    """How alike the latents of two coders are."""

    living: list[int]
    matched: int
    method: str
    cosine: float
    """Mean over matched pairs."""
    cosine_weighted: float
    """Weighted by firings."""
    cosine_chance: float
    """Against a rotated copy."""
    share_above: dict[str, float]
    mmcs: float
    jaccard: float | None


class Pair(Likeness):
    """Two coders of a run that differ in their seed, or in their code."""

    differs: Literal["seed", "code"]
    a: str
    b: str
    fvu_difference: float
    fvu_interval: Interval
    delta_ce_difference: float
    delta_ce_interval: Interval


class Evaluation(Record):
    """What eval.json holds."""

    version: int
    store_id: str
    model: dict[str, Any]
    """Identity of the model, as the store has it."""
    held_out_rows: int
    """Rows that FVU, L0 and dead latents are of; at a hookpoint those that are not finite less."""
    contexts: int
    context: int
    documents: int
    predicted_tokens: int
    predicted_unseen: int
    overlap: dict[str, Any] | None
    """How much of the held-out text was seen in training, as the store has it."""
    config: EvalConfig
    coders: dict[str, CoderFigures]
    left_out: list[str]
    """Coders that turned non-finite."""
    ce_clean: float | None
    """Loss of the model as it is; None where every coder was left out."""
    top1_clean: float | None
    ablations: dict[str, dict[str, LossFigures]]
    """By hookpoint, of the module replaced by ``"zero"`` or by its ``"mean"``."""
    together: dict[str, Together]
    probing: dict[str, Probing]
    stability: list[Pair]
    versions: dict[str, str]
    device: str
    at: str

    def __repr__(self) -> str:
        return f"<Evaluation of {len(self.coders)} coders on {self.held_out_rows:,} held-out rows>"


class ShownContext(Record):
    """A context in which a latent fires."""

    stratum: int
    text: list[list[str | float | bool | None]]
    """Pieces: text, margin (None of silent tokens), and whether the drawn firing is there."""


class ShownLatent(Record):
    """Some contexts of a latent."""

    latent: int
    rate: float
    contexts: list[ShownContext]


class Examples(Record):
    """What examples.json holds."""

    version: int
    coders: dict[str, list[ShownLatent]]


@dataclass(frozen=True)
class EvaluationFolder:
    """Where the evaluation of a run is."""

    run: Run

    @property
    def path(self) -> Path:
        """The folder of everything but the figures."""
        return self.run.eval_folder

    @property
    def documents(self) -> Path:
        """Sums by document."""
        return self.path / "documents.safetensors"

    @property
    def examples_path(self) -> Path:
        """Contexts for the report."""
        return self.path / "examples.json"

    def codes(self, coder: str) -> Path:
        """Folder of every firing of a coder."""
        return self.path / "codes" / coder

    def sample(self, coder: str) -> Path:
        """Sampled firings of a coder."""
        return self.path / "samples" / f"{coder}.safetensors"

    def firing(self, coder: str) -> Path:
        """In how many rows each latent of a coder fired."""
        return self.run.coder_folder(coder) / "firing.safetensors"

    @property
    def remedy(self) -> str:
        """What to do where a file is missing or damaged."""
        return f"`bsc eval {self.run.folder}` writes it."

    def read(self) -> Evaluation:
        """The figures.

        Raises:
            StoreError: the run has not been evaluated, or the file is damaged.
        """
        path = self.run.eval_path
        if not path.exists():
            run = self.run.folder
            raise StoreError(f"{run}: not evaluated yet. Run `bsc eval {run}`.")
        found = read_typed(Evaluation, path, "evaluation", EVAL_VERSION, self.remedy)
        if found.store_id != self.run.config().store_id:
            raise StoreError(f"{path}: of another store than the run. {self.remedy}")
        return found

    def read_examples(self) -> dict[str, list[ShownLatent]]:
        """Contexts in which latents fire, by coder.

        Raises:
            StoreError: the file is missing or damaged.
        """
        path = self.examples_path
        return read_typed(Examples, path, "examples", EVAL_VERSION, self.remedy).coders


def read_evaluation(run: Run | str | Path) -> Evaluation:
    """The figures of a run.

    Args:
        run: an evaluated run, or its folder.

    Raises:
        StoreError: there is no such run, it has not been evaluated, or its figures are damaged.
    """
    return EvaluationFolder(as_run(run)).read()
