from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.cache.model.models import load_model
from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.eval.figures.ablation import ablated, ablation_figures, equal_mass_bins, random_bins
from bsc.eval.figures.scores import read_scores
from bsc.eval.passes.context_pass import LossSums, joined, pass_over_contexts
from bsc.eval.passes.contexts import contexts_of
from bsc.eval.passes.splice import coder_replacement
from bsc.train.coders.coder import SparseCoder
from bsc.train.run import Run
from tests.eval.planted import planted_contexts

HOOK = "layers.2.mlp"


def test_bins_have_equal_mass_and_every_scored_living_latent_once() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, size=500)
    score = rng.random(500)
    score[:20] = np.nan
    for bins in (equal_mass_bins(score, counts, 10), random_bins(score, counts, 10)):
        assert len(bins) == 10
        mass = np.array([counts[b].sum() for b in bins])
        assert mass.max() - mass.min() < 2 * 50
        latents = np.concatenate(bins)
        assert sorted(latents) == [i for i in range(20, 500) if counts[i]]
    ordered = equal_mass_bins(score, counts, 10)
    assert all(score[a].max() <= score[b].min() for a, b in itertools.pairwise(ordered))
    assert equal_mass_bins(np.full(500, np.nan), counts, 10) == []


def test_one_latent_with_most_firings_fills_a_bin_alone() -> None:
    bins = equal_mass_bins(np.arange(4.0), np.array([1, 1, 100, 1]), 4)
    assert [2] in [b.tolist() for b in bins]
    assert sorted(np.concatenate(bins)) == [0, 1, 2, 3]


def permuted(coder: SparseCoder, order: torch.Tensor) -> SparseCoder:
    rows = ("encoder.weight", "encoder.bias", "W_dec", "log_threshold")
    tensors = {n: t[order] if n in rows else t for n, t in coder.tensors.items()}
    return SparseCoder(coder.config, tensors, about=coder.about)


@pytest.fixture(scope="module")
def coder(run: Run) -> SparseCoder:
    return run.coder(next(n for n in run.coder_names() if "skip_transcoder-binary-k8" in n))


def losses(
    store: ActivationStore, model: Path, coder: SparseCoder, groups: dict[str, np.ndarray]
) -> dict[str, LossSums]:
    lm = load_model(str(model), dtype="float32", with_head=True)
    variants = {"whole": {HOOK: coder_replacement(coder)}}
    variants |= {name: ablated(coder, HOOK, latents) for name, latents in groups.items()}
    contexts = contexts_of(store, 512)
    return joined(pass_over_contexts(lm, contexts, variants), contexts.documents)


def test_no_latent_costs_nothing_and_all_of_them_are_the_skip_path(
    store: ActivationStore, tiny_model: Path, coder: SparseCoder
) -> None:
    every = np.arange(64)
    found = losses(store, tiny_model, coder, {"none": np.array([], np.int64), "all": every})
    assert np.array_equal(found["none"].nats, found["whole"].nats)
    lm = load_model(str(tiny_model), dtype="float32", with_head=True)
    skip = {"skip": {HOOK: lambda x, y: coder.skip(x)}}
    contexts = contexts_of(store, 512)
    alone = joined(pass_over_contexts(lm, contexts, skip), contexts.documents)
    assert found["all"].nats == pytest.approx(alone["skip"].nats, rel=1e-5)
    assert not np.array_equal(found["all"].nats, found["whole"].nats)


def test_latents_go_by_their_own_numbers_whatever_the_order_of_rows(
    store: ActivationStore, tiny_model: Path, coder: SparseCoder
) -> None:
    """The row number after sorting, in the place of the latent's own, ablates the wrong latents."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order).numpy()  # where each latent is now
    chosen = np.array([3, 9, 17, 40, 41, 50, 51, 52])
    here = losses(store, tiny_model, coder, {"some": chosen})["some"].nats
    there = losses(store, tiny_model, permuted(coder, order), {"some": place[chosen]})["some"].nats
    wrong = losses(store, tiny_model, permuted(coder, order), {"some": chosen})["some"].nats
    assert here == pytest.approx(there, rel=1e-5)
    assert abs(here - wrong).max() > abs(here - there).max() * 5


def test_figures_are_differences_from_the_spliced_baseline() -> None:
    none = np.zeros(20)
    sums = {
        "whole": LossSums(np.full(20, 40.0), none, none, none),
        "bin": LossSums(np.full(20, 42.0), none, none, none),
    }
    (found,) = ablation_figures(
        [np.array([1, 2])], np.array([9.0, 1.0, 4.0]), np.array([10, 30, 10]), sums, ["bin"],
        "whole", planted_contexts(20, 10),
    )  # fmt: skip
    assert found["delta_ce"] == pytest.approx(0.2) and found["firing_share"] == 0.8
    assert found["score"] == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert found["delta_ce_interval"] == pytest.approx([0.2, 0.2])


def test_scores_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("coder,latent,score\na,1,0.5\nb,0,2\n")
    found = read_scores(str(path), {"a": 3, "b": 1})
    assert found is not None
    assert np.array_equal(found["a"], [np.nan, 0.5, np.nan], equal_nan=True)
    lines = tmp_path / "scores.jsonl"
    lines.write_text('{"coder": "a", "latent": 2, "score": 1}\n')
    again = read_scores(str(lines), {"a": 3})
    assert again is not None and again["a"][2] == 1
    assert read_scores("rate", {"a": 3}) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("coder,latent,score\nx,1,0.5\n", "entry 1: no coder 'x'"),
        ("coder,latent,score\naa,1,0.5\naa,3,0.5\n", "entry 2: coder aa has no latent 3"),
        ("coder,latent\naa,1\n", "entry 1: needs coder, latent and score"),
    ],
)
def test_wrong_scores_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_scores(str(path), {"aa": 3})
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(str(tmp_path / "nowhere.csv"), {"aa": 3})
