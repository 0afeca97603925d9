"""Continuous coders without their values: the control of finetuning."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.eval.passes.controls import binarised, calibrate
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune
from bsc.finetuning.job import make_job
from bsc.finetuning.values import without_values
from bsc.train.run import Run


def test_it_gives_what_mean_values_give(parents: Run, store: ActivationStore) -> None:
    name = next(n for n in parents.coder_names() if "continuous" in n)
    coder, hook = parents.coder(name), parents.config().coder(name).hookpoint
    removed = without_values(coder, store, hook, without_tokens=())
    calibration = calibrate(coder, store, hook, without_tokens=())
    (x,) = next(store.held_out.batches((f"{hook}/input",), 512))
    x = x.float()
    code = coder.encode(x)
    ones = removed.encode(x)
    assert set(ones.value.unique().tolist()) <= {0.0, 1.0}
    fired, fires = (torch.zeros(len(x), 64).scatter_(1, c.latent, (c.value != 0).float())
                    for c in (code, ones))  # fmt: skip
    assert (fired == fires).all(dim=1).float().mean() > 0.99  # but for pre-activations near 0
    expected = coder.decode(binarised(coder, calibration, code), x)
    same = (fired == fires).all(dim=1)
    torch.testing.assert_close(removed.decode(ones, x)[same], expected[same], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, coder.decode(code, x))


def test_means_are_of_the_rows_that_the_run_was_trained_on(
    parents: Run, store: ActivationStore
) -> None:
    job = make_job(parents, FinetuneConfig(name="removed", values="removed", tokens=512))
    token = store.train.tokens("token_id")
    common = int(np.bincount(token).argmax())
    object.__setattr__(job, "without_tokens", (common,))
    planned = job.planned[0]
    before, after = parents.coder(planned.parent), job.coder(planned)
    split, hook = store.train, planned.hookpoint
    x = torch.cat([split.tensor(f"{hook}/input", i) for i in range(split.shards)]).float()
    code = before.encode(x)
    kept = torch.from_numpy(token != common)
    assert 0.01 < 1 - kept.float().mean() < 0.5
    compared = 0
    for latent in range(before.config.n_latents):
        fires = (code.latent == latent) & (code.value != 0)
        here = code.value[fires & kept.unsqueeze(1)]
        if len(here) > 5:
            row = before.W_dec[latent] * here.mean()
            torch.testing.assert_close(after.W_dec[latent], row, rtol=1e-4, atol=1e-6)
            compared += not torch.allclose(here.mean(), code.value[fires].mean(), rtol=1e-3)
    assert compared > 5  # latents that the token's rows would have changed


def test_only_continuous_coders_are_finetuned_so(parents: Run, tmp_path: Path) -> None:
    before = Run(Path(shutil.copytree(parents.folder, tmp_path / "parents")))
    config = FinetuneConfig(name="removed", values="removed", tokens=256, batch_tokens=64)
    run, _ = finetune(before, config)
    coders = run.config().coders
    assert len(coders) == 2  # one for each hookpoint
    for one in coders:
        assert one.name.endswith("-values_removed") and "continuous" in one.name
        assert (one.coder.code, one.coder.threshold) == ("binary", "fixed")
        assert run.coder(one.name).config.code == "binary"
    config = config.but(name="none", coders=("*binary*",))
    with pytest.raises(UserError, match="none of the coders that were named has values to remove"):
        finetune(before, config)
