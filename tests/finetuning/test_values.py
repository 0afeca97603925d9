"""Continuous coders without their values: the control of finetuning."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.eval.passes.controls import binarised, calibrate
from bsc.finetuning.config import FinetuneConfig
from bsc.finetuning.finetune import finetune
from bsc.finetuning.values import without_values
from bsc.train.run import Run


def test_it_gives_what_mean_values_give(parents: Run, store: ActivationStore) -> None:
    name = next(n for n in parents.coder_names() if "continuous" in n)
    coder, hook = parents.coder(name), parents.config().coder(name).hookpoint
    removed = without_values(coder, store, hook)
    calibration = calibrate(coder, store.train, hook)
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
