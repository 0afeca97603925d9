"""Banks: company makes no difference, compiled is eager, hundreds of coders are linear."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from bsc.errors import UserError
from bsc.train.bank_trainer import check_compiler
from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.passes import EAGER
from bsc.train.config import Optimiser
from bsc.train.optim import CoderOptimiser

D, F = 32, 512


def rows(n: int = 700) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(5))


def make(configs: list[CoderConfig], seeds: list[int], **how: Any) -> Bank:
    bank = Bank(configs, total_variance=float(D), **how)
    bank.initialise(seeds, torch.zeros(D), torch.zeros(D))
    return bank


def train(bank: Bank, names: list[Optimiser], steps: int = 15, **how: Any) -> list[Any]:
    optimisers = [CoderOptimiser(n, bank.trained(c), 0.01) for c, n in enumerate(names)]
    x = rows()
    losses = []
    for _ in range(steps):
        losses.append(bank.step(x, x, **how).loss)
        for c, o in enumerate(optimisers):
            o.step(0.01)
            bank.renormalise(c)
    return [bank.export(c) for c in range(len(names))]


def coder(**fields: Any) -> CoderConfig:
    values: dict[str, Any] = {"site": "sae", "k": 8, "n_latents": F, "d_in": D, "d_out": D}
    return CoderConfig(**values | fields)


MIXED: list[tuple[CoderConfig, int, Optimiser]] = [
    (coder(code="binary"), 0, "adam"),
    (coder(code="continuous", k=3, decoder_norm="unit"), 1, "signum"),
    (coder(code="hybrid", k=20, select="batch_topk"), 2, "signum_classic"),
    (coder(code="binary", surrogate="rectangle", threshold="fixed", exact_k=True), 0, "muon"),
    (coder(code="continuous", select="groupmax", k=16), 3, "adam"),
]


def test_coders_of_every_kind_in_one_bank_are_those_trained_alone() -> None:
    """Bit for bit on a CPU: each coder has a product of its own, of the same shape either way."""
    together = train(make([c for c, _, _ in MIXED], [s for _, s, _ in MIXED]),
                     [o for _, _, o in MIXED])  # fmt: skip
    for (config, seed, optimiser), other in zip(MIXED, together, strict=True):
        (alone,) = train(make([config], [seed]), [optimiser])
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), (config, name)


def test_a_coder_that_is_not_active_stands_still_and_the_others_do_not_notice() -> None:
    configs = [c for c, _, _ in MIXED]
    bank = make(configs, [0] * 5)
    x = rows()
    whole = bank.step(x, x)
    expected = {n: g.clone() for n, g in bank.gradients.items()}
    for g in bank.gradients.values():
        g.fill_(3.0)
    part = bank.step(x, x, active=[0, 3])
    assert part.loss[[0, 3]].equal(whole.loss[[0, 3]]) and not part.loss[[1, 2, 4]].any()
    for name, g in bank.gradients.items():
        assert torch.equal(g[0], expected[name][0]) and (g[1] == 3).all()


def test_a_batch_in_pieces_is_the_batch() -> None:
    """The sums of the pieces are rounded apart, so equal to rounding; what fired is the same."""
    configs = [coder(code="binary"), coder(code="continuous", decoder_norm="unit")]
    bank = make(configs, [0, 1])
    x = rows()
    whole, expected = bank.step(x, x), {n: g.clone() for n, g in bank.gradients.items()}
    pieces = bank.step(x, x, micro_rows=128)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-5, atol=0)
    assert torch.equal(pieces.fired, whole.fired) and torch.equal(pieces.l0, whole.l0)
    for name, g in bank.gradients.items():
        assert (g - expected[name]).norm() <= 0.01 * expected[name].norm(), name


def test_rows_far_from_zero_cost_no_precision() -> None:
    """A mean a hundred times the deviation: bfloat16 products are of centred rows."""
    configs = [coder(code="continuous"), coder(code="binary")]
    x, mean = rows(), torch.full((D,), 100.0)
    near, far = make(configs, [0, 0]), Bank(configs, total_variance=float(D))
    far.initialise([0, 0], mean, mean)
    a, b = near.step(x, x), far.step(x + mean, x + mean)
    torch.testing.assert_close(a.loss, b.loss, rtol=2e-3, atol=0)
    torch.testing.assert_close(a.l0, b.l0, rtol=0.01, atol=0.0)


def test_a_bias_that_cancels_a_large_product_keeps_its_digits() -> None:
    """62.57 is 62.5 in bfloat16; the rest rides in a column of its own."""
    x = rows()
    x[:, 0] = 1.0
    results = {}
    for dtype in (torch.bfloat16, torch.float64):
        bank = make([coder(code="binary", site="transcoder")], [0], compute_dtype=dtype)
        bank.parameters["encoder.weight"][0, :, 0] = -64.0
        spread = torch.randn(F, generator=torch.Generator().manual_seed(1))
        bank.parameters["encoder.bias"][0] = 62.57 + 0.01 * spread
        results[dtype] = float(bank.step(x, x).l0[0])
    # Most latents are off. Rounded, all of the biases would be 62.5.
    assert results[torch.float64] < 6.0
    assert abs(results[torch.bfloat16] / results[torch.float64] - 1) < 0.02, results


@pytest.mark.slow
@pytest.mark.parametrize("site", ["sae", "skip_transcoder"])
def test_compiled_is_eager(site: str) -> None:
    """To rounding: the compiled passes are the same operations with fewer roundings on the way."""
    configs = [coder(code="binary", site=site, threshold="fixed"), coder(code="binary", site=site)]
    if site == "sae":
        unit = {"code": "binary", "decoder_norm": "unit"}
        configs = [coder(**unit), coder(**unit, amplitude="learned")]
    configs += [coder(code="continuous", k=20, site=site, multi_topk=True)]
    try:
        check_compiler(torch.device("cpu"))
    except UserError as error:  # no compiler; every other test is of the eager form
        pytest.skip(str(error))
    eager, compiled = (make(configs, [0, 1, 2], compiled=c) for c in (False, True))
    assert compiled._passes is not EAGER and eager._passes is EAGER
    x = rows()
    for micro_rows in (None, 300):
        for bank in (eager, compiled):
            bank.parameters["W_dec"].copy_(bank.parameters["encoder.weight"])
            for c in range(len(configs)):
                bank.renormalise(c)
        a, b = (bank.step(x, x, micro_rows=micro_rows) for bank in (eager, compiled))
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=0)
        assert (a.fired != b.fired).double().mean() < 1e-3
        for name, g in eager.gradients.items():
            other = compiled.gradients[name]
            assert (g - other).norm() <= 0.01 * g.norm(), name


def test_a_compiler_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("g++: command not found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"--compile: .*g\+\+: command not found.*Leave the flag"):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
def test_hundreds_of_small_coders_cost_no_more_than_their_number() -> None:
    seconds = {}
    for n in (32, 256):
        bank = make([coder(k=1 + i % 16, code=("binary", "continuous")[i % 2]) for i in range(n)],
                    list(range(n)))  # fmt: skip
        x = rows(256)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            result = bank.step(x, x)
            times.append(time.perf_counter() - started)
        assert result.loss.isfinite().all() and len(result.loss) == n
        seconds[n] = statistics.median(times)
    # Far from quadratic; how linear it is stands in benchmarks/records/train_*.md.
    assert seconds[256] < 4 * 8 * seconds[32], seconds
