"""Finetuning a run: what it makes, what it changes, and what it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsc.cache.model.tokens import ContextBatch
from bsc.cache.store.manifest import TextPoint
from bsc.eval.config import EvalConfig
from bsc.eval.evaluate import evaluate
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune, run_job, stepper_of, tuned_coders
from bsc.finetuning.job import make_job
from bsc.finetuning.schedule import Schedule, schedule_of
from bsc.train.coders.coder import Code, SparseCoder
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.run_config import FinetunedCoder
from bsc.train.trainer import train_sweep

SHORT: dict[str, Any] = {
    "loss": "kl",
    "tokens": 4_096,
    "batch_tokens": 256,
    "lr": 3e-3,
    "log_every": 1,
}


def config(tmp_path: Path, **fields: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"runs": tmp_path, **SHORT, **fields})


def kl(run: Run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in run.metrics():
        found.setdefault(line["coder"], []).append(line["kl"])
    return found


def tensors(run: Run, name: str) -> dict[str, torch.Tensor]:
    return SparseCoder.load(run.coder_folder(name)).tensors


def test_a_new_run_of_coders_that_cost_the_model_less(parents: Run, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in parents.folder.rglob("*") if p.is_file()}
    run, summaries = finetune(parents, config(tmp_path, tokens=20_000, lr=1e-3))
    assert {p: p.read_bytes() for p in parents.folder.rglob("*") if p.is_file()} == before
    assert run.coder_names() == parents.coder_names() == [s.name for s in summaries]
    saved = run.config()
    assert saved.finetuned is not None and saved.finetuned.run == str(parents.folder.resolve())
    assert saved.completed is not None and saved.completed.rows == 19_968
    evaluated = evaluate(run, EvalConfig(ce_tokens=2_000, ablation_bins=0, probes=()))
    first = Run(Path(shutil.copytree(parents.folder, tmp_path / "before")))
    was = evaluate(first, EvalConfig(ce_tokens=2_000, ablation_bins=0, probes=()))
    ratios: list[float] = []
    for planned in saved.coders:
        assert isinstance(planned, FinetunedCoder)
        name = planned.name
        assert planned.parent == name and planned.seed == parents.config().coder(name).seed
        assert planned.parent_xxh3_128 == parents.coder(name).xxh3_128()
        assert planned.parent_xxh3_128 != run.coder(name).xxh3_128()
        ratios.append(evaluated.coders[name].kl / was.coders[name].kl)
    # Little text, so not much; but on documents that neither training nor finetuning has read.
    assert np.mean(ratios) < 0.99 and max(ratios) < 1.01
    about = run.coder(saved.coders[0].name).about
    assert about["finetuned_from"] == saved.finetuned.run and about["finetuned_on"] == 19_968


@pytest.mark.parametrize("loss", ["ce", "kl+fvu"])
def test_other_losses(parents: Run, tmp_path: Path, loss: Any) -> None:
    run, _ = finetune(parents, config(tmp_path, loss=loss, tokens=20_000, coders=("*continuous*",)))
    lines = [m for m in run.metrics() if m["coder"].startswith("layers.2")]
    what = "ce" if loss == "ce" else "fvu"
    assert np.mean([m[what] for m in lines[-10:]]) < np.mean([m[what] for m in lines[:10]])


def test_together_coders_learn_beside_each_other(parents: Run, tmp_path: Path) -> None:
    names = [n for n in parents.coder_names() if "continuous" in n]
    chosen = config(tmp_path, coders=("*continuous*",), tokens=20_000)
    apart, _ = finetune(parents, chosen)
    both, _ = finetune(parents, chosen.model_copy(update={"together": True, "name": "together"}))
    record = both.config().finetuned
    assert record is not None and record.sets == [names]
    figures = kl(both)
    assert figures[names[0]] == figures[names[1]]  # of one spliced pass
    # Two splices cost more than either, and end up costing less than they began with.
    assert figures[names[0]][0] > max(kl(apart)[n][0] for n in names)
    assert np.mean(figures[names[0]][-10:]) < np.mean(figures[names[0]][:10])
    measured = [
        evaluate(run, EvalConfig(ce_tokens=2_000, ablation_bins=0, probes=())).together
        for run in (apart, both)
    ]
    (label,) = measured[0]
    assert measured[1][label].kl < measured[0][label].kl


def test_a_coder_alone_becomes_what_it_is_in_company(parents: Run, tmp_path: Path) -> None:
    run, _ = finetune(parents, config(tmp_path, tokens=1_024))
    name = run.coder_names()[1]
    alone, _ = finetune(parents, config(tmp_path, tokens=1_024, name="alone", coders=(name,)))
    assert alone.coder_names() == [name]
    for tensor, other in zip(tensors(run, name).values(), tensors(alone, name).values(),
                             strict=True):  # fmt: skip
        assert torch.equal(tensor, other)


def test_contexts_at_a_time_change_nothing_but_rounding(parents: Run, tmp_path: Path) -> None:
    common = {"tokens": 512, "precision": "fp32", "coders": ("layers.2*",)}
    whole, _ = finetune(parents, config(tmp_path, **common))
    parts, _ = finetune(parents, config(tmp_path, **common, name="parts", micro_tokens=64))
    assert parts.config().micro_rows == 64 and whole.config().micro_rows == 256
    for name in whole.coder_names():
        assert kl(parts)[name] == pytest.approx(kl(whole)[name], rel=1e-2)  # a bfloat16 model
        # A step of Adam is as long whatever the gradient, so of near-0 gradients signs may differ.
        a, b = (tensors(r, name)["encoder.weight"] for r in (whole, parts))
        start = parents.coder(name).W_enc
        moved = torch.cosine_similarity((a - start).flatten(), (b - start).flatten(), dim=0)
        assert moved > 0.9


def test_unit_rows_stay_as_long_as_they_were(parents: Run, tmp_path: Path) -> None:
    """With a learned amplitude, which is the default of binary SAEs, lengths are trained."""
    name = next(n for n in parents.coder_names() if "sae" in n)
    job = make_job(parents, config(tmp_path, coders=(name,)))
    (coder,) = tuned_coders(job).values()
    assert coder.planned.coder.amplitude == "learned"
    assert "parametrizations.W_dec.original0" in coder.parameters
    run, _ = run_job(job, None)
    directions = tensors(run, name)["W_dec"].norm(dim=1)
    assert not torch.allclose(directions, parents.coder(name).W_dec.norm(dim=1), rtol=1e-3)
    # Without one they are held.
    fixed = parents.coder(name)
    plain = fixed.config.model_copy(update={"amplitude": "none"})
    copied = Run(Path(shutil.copytree(parents.folder, tmp_path / "fixed")))
    SparseCoder(plain, fixed.tensors, about=fixed.about).save(copied.coder_folder(name))
    planned = job.planned[0].model_copy(update={"coder": plain})
    scale = coder.scale
    held = type(coder)(planned, copied.coder(name), scale, job.config, torch.device("cpu"))
    assert "parametrizations.W_dec.original0" not in held.parameters
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for gradient in held.gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        held.step(step, 5, 100)
    after = held.finish({}, 5)
    torch.testing.assert_close(after.W_dec.norm(dim=1), fixed.W_dec.norm(dim=1))
    assert not torch.allclose(after.W_dec, fixed.W_dec, rtol=1e-3)


def test_a_coder_that_turns_non_finite_is_left_alone(
    parents: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(parents, config(tmp_path, coders=("layers.2*",), tokens=1_024))
    worst = job.planned[0].name
    job.planned[0] = job.planned[0].model_copy(update={"lr": 1e30})
    run, summaries = run_job(job, None)
    by_name = {s.name: s for s in summaries}
    frozen = by_name[worst].frozen_at
    assert frozen is not None and 0 < frozen < 4
    assert f"{worst}: not finite at step {frozen}" in capsys.readouterr().err
    others = [s for s in summaries if s.name != worst]
    assert others and all(s.frozen_at is None and s.kl is not None for s in others)
    alone, _ = finetune(parents, config(tmp_path, name="b", coders=(others[0].name,), tokens=1_024))
    a, b = (tensors(r, others[0].name) for r in (run, alone))
    assert all(torch.equal(a[n], b[n]) for n in a)
    measured = evaluate(run, EvalConfig(ce_tokens=500, ablation_bins=0, probes=()))
    assert measured.left_out == [worst]


def test_rows_of_left_out_tokens_stay_as_they_are(
    parents: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coders that were not trained on a token are not spliced in there, nor learn from it."""
    job = make_job(parents, config(tmp_path, coders=("layers.2.mlp/skip*continuous*",)))
    _, batch = next(job.text.batches(job.lm.tokenizer, job.batch_contexts))
    common = int(np.bincount(batch.token_id.ravel()).argmax())
    object.__setattr__(job, "without_tokens", (common,))
    coders = tuned_coders(job)
    stepper = stepper_of(job, coders)
    (coder,) = coders.values()
    seen: list[int] = []
    real = coder._count

    def count(code: Code, used: torch.Tensor) -> None:
        seen.append(int(used.sum()))
        real(code, used)

    monkeypatch.setattr(coder, "_count", count)
    stepper.step(batch, 0, 10)
    assert seen == [int((batch.token_id != common).sum())]


def test_learning_rates() -> None:
    def of(code: str = "binary", **fields: Any) -> Schedule:
        return schedule_of(FinetuneConfig(**fields), code, 1_000)

    assert of("continuous") == of("hybrid") == Schedule(2e-3, 0.05, "linear", 0.7)
    assert of("binary") == Schedule(3e-3, 0.05, "linear", 0.7)
    assert of(lr="paper") == Schedule(1e-3, 0.05, "linear", 0.9)  # 50 of 1,000 steps
    assert of(lr="paper", beta1=0.5).beta1 == 0.5 and of(beta1=0.0).beta1 == 0.0
    assert schedule_of(FinetuneConfig(lr="paper"), "binary", 200).warmup == 0.25
    assert schedule_of(FinetuneConfig(lr="paper"), "binary", 20).warmup == 1.0
    assert of(lr=0.5, optimiser="signum") == Schedule(0.5, 0.0, "none", 0.7)
    assert of(lr=0.5, warmup=0.2, decay="none") == Schedule(0.5, 0.2, "none", 0.7)


def test_parents_that_differ_in_more_than_their_seed_stay_apart(
    store_path: Path, tmp_path: Path
) -> None:
    """Of coders that were trained with other learning rates none is another seed."""
    table = {"hookpoint": "layers.2.mlp", "code": "continuous", "k": 4, "n_latents": 32}
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=tmp_path, name="rates", tokens=1_024, batch_rows=256,
            coders=({**table, "lr": [1e-2, 3e-3], "seed": [0, 1]},),
        )
    )  # fmt: skip
    new, _ = finetune(run, config(tmp_path, tokens=256))
    kinds = {c.name: c.but_for_the_seed for c in new.config().coders}
    assert len(kinds) == 4 and len(set(kinds.values())) == 2
    before = {c.name: c.but_for_the_seed for c in run.config().coders}
    for a in kinds:
        for b in kinds:
            assert (kinds[a] == kinds[b]) == (before[a] == before[b])


def test_a_step_without_anything_to_learn_from_leaves_coders_finite(
    parents: Run, tmp_path: Path
) -> None:
    """Contexts of one document whose only token predicts nothing, and all of whose rows are left
    out."""
    job = make_job(parents, config(tmp_path, coders=("layers.2*",), loss="kl+fvu"))
    object.__setattr__(job, "without_tokens", (7,))
    coders = tuned_coders(job)
    stepper = stepper_of(job, coders)
    ids = np.full((2, 4), 7)
    batch = ContextBatch("train", ids, ids, np.zeros_like(ids), ids.astype(np.uint64), None,
                         TextPoint())  # fmt: skip
    assert stepper.step(batch, 0, 10) == []
    for coder in coders.values():
        coder.progress.frozen_at = 0
    assert stepper.step(batch, 1, 10) == []  # nobody is left to learn
