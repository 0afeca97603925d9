from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch

from bsc.errors import ConfigError
from bsc.records import write_record
from bsc.train import bank_trainer, schedule
from bsc.train.config import OPTIMISERS, Optimiser, TrainConfig
from bsc.train.optim import (
    ClassicSignum,
    CoderOptimiser,
    ScheduleFreeSignSGD,
    adam_eps,
    state_bytes,
)
from bsc.train.resume import resume
from bsc.train.schedule import annealed, comparable_steps, default_lr, lr_scale, paper_lr
from bsc.train.trainer import train_sweep
from tests.raw import raw


class SignSGD(torch.optim.Optimizer):
    """The base optimiser that the reference wraps: minus lr times the sign of the gradient."""

    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


def gradient(p: torch.Tensor, step: int) -> torch.Tensor:
    """Of a quadratic with a target that moves, so that signs change."""
    target = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) * (1 + (step % 5))
    return p.detach() - target


def test_signum_equals_the_schedulefree_package_step_by_step() -> None:
    start = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    a = ScheduleFreeSignSGD([ours], lr=0.03, beta=0.95)
    b = schedulefree.ScheduleFreeWrapper(SignSGD([theirs], lr=0.03), momentum=0.95)
    b.train()
    for step in range(60):
        ours.grad, theirs.grad = gradient(ours, step), gradient(theirs, step)
        a.step()
        b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    a.finish()
    b.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_classic_signum_is_the_sign_of_the_momentum() -> None:
    p = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, momentum = p.clone(), torch.zeros_like(p)
    optimiser = ClassicSignum([p.requires_grad_()], lr=0.02, beta=0.9)
    for step in range(40):
        p.grad = gradient(p, step)
        momentum = 0.9 * momentum + 0.1 * gradient(expected, step)
        expected -= 0.02 * momentum.sign()
        optimiser.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)


def tensors(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W": (6, 4), "b": (6,)}
    return {
        n: (torch.randn(s, generator=g), torch.randn(s, generator=g)) for n, s in shapes.items()
    }


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_adam_and_muon_are_those_of_torch(name: Optimiser) -> None:
    """Over slices of a stack, with the learning rate of every step."""
    ours, theirs = tensors(), tensors()
    mine = CoderOptimiser(name, ours, lr=1.0)
    reference: list[torch.optim.Optimizer]
    if name == "adam":
        reference = [torch.optim.Adam([p for p, _ in theirs.values()], lr=1.0)]
    else:
        reference = [
            torch.optim.Muon(
                [theirs["W"][0]], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.Adam([theirs["b"][0]], lr=1.0),
        ]  # fmt: skip
    for step in range(20):
        lr = 0.01 * (1 + step % 3)
        for name_, (p, g) in ours.items():
            g.copy_(gradient(p, step))
            theirs[name_][0].grad = gradient(theirs[name_][0], step)
        mine.step(lr)
        for part in reference:
            part.param_groups[0]["lr"] = lr
            part.step()
        for name_, (p, _) in ours.items():
            torch.testing.assert_close(p, theirs[name_][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_reaches_a_minimum(name: Optimiser) -> None:
    p, g = torch.full((4, 4), 3.0) + torch.eye(4), torch.zeros(4, 4)
    lr = 0.2 if name == "muon" else 0.05  # whose step is spread over the matrix
    optimiser = CoderOptimiser(name, {"p": (p, g)}, lr=lr)
    for step in range(400):
        g.copy_(p.detach() - 1.0)
        optimiser.step(lr * lr_scale(step, 400, 0.0, "none" if name == "signum" else "linear"))
    optimiser.finish()
    assert (p - 1).abs().max() < 0.3, p


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name: Optimiser) -> None:
    def run(mine: dict[str, tuple[torch.Tensor, torch.Tensor]], o: CoderOptimiser, at: int) -> None:
        for step in range(at, at + 5):
            for p, g in mine.values():
                g.copy_(gradient(p, step))
            o.step(0.01)

    whole = tensors()
    one = CoderOptimiser(name, whole, 0.01)
    run(whole, one, 0)
    half = {n: (p.detach().clone(), g.clone()) for n, (p, g) in whole.items()}
    state = {n: t.clone() for n, t in one.state().items()}
    assert state and all("/" in n for n in state)
    run(whole, one, 5)
    other = CoderOptimiser(name, half, 0.01)
    other.load_state(state)
    run(half, other, 5)
    for n in whole:
        assert torch.equal(whole[n][0], half[n][0]), n
    assert sum(t.nbytes for t in one.state().values() if t.ndim) == state_bytes(
        name, {n: tuple(p.shape) for n, (p, _) in whole.items()}
    )


def test_averages_stand_in_for_the_weights_and_leave_them_as_they_were() -> None:
    mine = tensors()
    optimiser = CoderOptimiser("signum", mine, 0.1)
    for step in range(7):
        for p, g in mine.values():
            g.copy_(gradient(p, step))
        optimiser.step(0.1)
    before = {n: p.detach().clone() for n, (p, _) in mine.items()}
    with optimiser.averaged():
        inside = {n: p.detach().clone() for n, (p, _) in mine.items()}
    assert all(torch.equal(p, before[n]) for n, (p, _) in mine.items())
    optimiser.finish()
    assert all(torch.equal(p, inside[n]) for n, (p, _) in mine.items())
    assert not torch.equal(inside["W"], before["W"])


def test_clipping_cuts_the_length_of_all_gradients_together() -> None:
    mine = tensors()
    optimiser = CoderOptimiser("adam", mine, 0.1, clip_norm=0.5)
    optimiser.step(0.1)
    length = torch.cat([g.flatten() for _, g in mine.values()]).norm()
    torch.testing.assert_close(length, torch.tensor(0.5))


def test_an_optimiser_works_on_slices_of_a_stack_and_leaves_the_others() -> None:
    stack, grads = torch.ones(3, 4), torch.ones(3, 4)
    CoderOptimiser("adam", {"p": (stack[1], grads[1])}, lr=0.1).step(0.1)
    assert torch.equal(stack[0], torch.ones(4)) and torch.equal(stack[2], torch.ones(4))
    torch.testing.assert_close(stack[1].detach(), torch.full((4,), 0.9))


def test_the_schedule_rises_then_falls_to_nearly_zero() -> None:
    scales = [lr_scale(s, 200, 0.05, "linear") for s in range(200)]
    peak = scales.index(max(scales))
    assert max(scales) == 1.0 and peak == 9 and scales[-1] < 0.01
    assert sorted(scales[peak:], reverse=True) == scales[peak:]
    assert [lr_scale(s, 10, 0.5, "none") for s in (0, 4, 9)] == [0.2, 1.0, 1.0]


def test_k_and_temperature_go_to_their_last_value_and_stay() -> None:
    values = [annealed(100, 10, s, 100, 0.5) for s in range(100)]
    assert values[0] == 100 and values[25] == 55 and set(values[50:]) == {10}


def test_the_rules_of_the_paper_by_name() -> None:
    """The values of the authors' code at its two sizes."""
    for optimiser, code, n_latents, expected in (
        ("adam", "continuous", 18432, 1.89e-4), ("signum", "continuous", 18432, 4.71e-3),
        ("adam", "binary", 18432, 4.0e-3), ("signum", "binary", 18432, 4.0e-3),
        ("adam", "continuous", 36864, 1.33e-4), ("signum", "continuous", 36864, 3.33e-3),
        ("adam", "binary", 36864, 2.83e-3),
    ):  # fmt: skip
        assert paper_lr(optimiser, code, "sigmoid", n_latents) == pytest.approx(expected, rel=0.01)  # type: ignore[arg-type]
    assert paper_lr("signum", "binary", "gumbel", 36864) == 3e-2
    with pytest.raises(ConfigError, match="trained Gumbel-softmax coders with Signum alone"):
        paper_lr("adam", "binary", "gumbel", 36864)
    with pytest.raises(ConfigError, match="no learning rate for muon and binary"):
        paper_lr("muon", "binary", "sigmoid", 100)
    assert default_lr("adam", "hybrid", 2**14) == default_lr("adam", "continuous", 2**14)


def test_the_average_of_signum_follows_rows_that_are_normalised() -> None:
    """Schedule-free keeps z and works the average out from y and z: both are divided."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn((5, 7), generator=generator)
    gradient = torch.zeros_like(w)
    optimiser = CoderOptimiser("signum", {"W_dec": (w, gradient)}, 0.1)
    for _ in range(20):
        gradient.copy_(torch.randn(w.shape, generator=generator))
        optimiser.step(0.1)
        with optimiser.averaged():
            before = w.detach().clone()
        lengths = w.detach().norm(dim=1, keepdim=True)
        with torch.no_grad():
            w /= lengths
        optimiser.rescale("W_dec", lengths)
        with optimiser.averaged():
            torch.testing.assert_close(w.detach(), before / lengths)


def test_a_step_of_adam_does_not_depend_on_the_unit_of_the_loss() -> None:
    """Powers of two, so that it is the same bits. With a constant epsilon it is not."""
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def trained(unit: float, eps: float) -> torch.Tensor:
        weight, g = start.clone(), torch.zeros_like(start)
        optimiser = CoderOptimiser("adam", {"w": (weight, g)}, 0.01, eps=eps)
        for step in range(20):
            g.copy_(gradient(weight, step) * unit)
            optimiser.step(0.01)
        return weight.detach()

    small, rows, variance = 2.0**-30, 2**16, 2.0**12
    eps = adam_eps(1, 1.0)
    assert adam_eps(rows, variance) == eps / (rows * variance)
    assert torch.equal(trained(1.0, eps), trained(small, eps * small))
    moved = (trained(small, 1e-8) - start).norm() / (trained(1.0, 1e-8) - start).norm()
    assert moved < 0.5


def test_training_takes_epsilon_by_the_scale_of_the_loss(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def noted(*given: Any, **named: Any) -> CoderOptimiser:
        used.append(named["eps"])
        return CoderOptimiser(*given, **named)

    monkeypatch.setattr(bank_trainer, "CoderOptimiser", noted)
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "adam_eps": [None, 1e-3]}
    config = TrainConfig(
        store=store_path, runs=tmp_path, batch_rows=256, tokens=512, coders=(table,),
    )  # fmt: skip
    run, _ = train_sweep(config)
    assert used == [pytest.approx(1e-6 / (256 * 32)), 1e-3]  # in units of rms each channel has 1
    assert [c.adam_eps for c in run.config().planned] == [None, 1e-3]


def test_a_run_from_before_epsilon_was_a_setting_goes_on_with_its_tables(
    store_path: Path, tmp_path: Path
) -> None:
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "optimiser": list(OPTIMISERS)}
    config = TrainConfig(
        store=store_path, runs=tmp_path, batch_rows=256, tokens=512, coders=(table,),
    )  # fmt: skip
    run, _ = train_sweep(config)
    record = raw(run.config_path)
    for coder in record["coders"]:
        del coder["adam_eps"]
    write_record(run.config_path, record)
    older = [1e-8 if c.optimiser in ("adam", "muon") else None for c in run.config().planned]
    assert [c.adam_eps for c in run.config().planned] == older
    resume(run.folder, {"coders": (table,), "tokens": 1_024})
    assert [c.adam_eps for c in run.config().planned] == older
    new = {**table, "k": [4, 8]}
    resume(run.folder, {"coders": (new,), "tokens": 1_536}, add_coders=True)
    assert [c.adam_eps for c in run.config().planned] == [*older, None, None, None, None]
    assert len({c.name for c in run.config().planned}) == 8


def test_a_longer_run_has_smaller_steps_for_binary_coders_and_goes_on_with_those_it_began_with(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "_SHORT", 1)  # 40 steps of 4 rows are 1.8 of 2,048
    monkeypatch.setattr(schedule, "_MEASURED", 2)
    table = {
        "hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "code": ["binary", "continuous"],
    }  # fmt: skip

    def usual(steps: int) -> float:
        return default_lr("adam", "binary", 64, comparable_steps(steps, 4))

    config = TrainConfig(
        store=store_path, runs=tmp_path, batch_rows=4, tokens=160, coders=(table,), eval_every=0,
    )  # fmt: skip
    run, _ = train_sweep(config)
    began = [usual(40), 0.01]
    assert [c.lr for c in run.config().planned] == began
    assert began[0] == pytest.approx(0.04 / (40 * (4 / 2048) ** 0.5))
    for tokens in (200, 240):  # the second time its tables are of neither length
        resume(run.folder, {"coders": (table,), "tokens": tokens})
        assert [c.lr for c in run.config().planned] == began
    with pytest.raises(ConfigError, match="which is not in these tables"):
        resume(run.folder, {"coders": (table | {"lr": 0.02},), "tokens": 280})
    resume(run.folder, {"coders": (table | {"k": [4, 8]},), "tokens": 280}, add_coders=True)
    assert sorted(c.lr for c in run.config().planned) == sorted([*began, usual(60), 0.01])
    assert usual(80) == pytest.approx(0.04 / 2 * (2 / 80 / (4 / 2048) ** 0.5) ** 0.5)


def test_a_rate_that_was_said_is_not_taken_for_a_default(store_path: Path, tmp_path: Path) -> None:
    table = {
        "hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "code": ["binary", "continuous"],
    }  # fmt: skip
    said = {**table, "lr": 0.003}
    config = TrainConfig(
        store=store_path, runs=tmp_path, batch_rows=256, tokens=512, coders=(said,)
    )
    run, _ = train_sweep(config)
    for other in (table, {**table, "lr": 0.01}):
        with pytest.raises(ConfigError, match="which is not in these tables"):
            resume(run.folder, {"coders": (other,), "tokens": 1_024})
    both = {**table, "lr": [0.003, 0.01]}
    resume(run.folder, {"coders": (both,), "tokens": 1_024}, add_coders=True)
    assert [c.lr for c in run.config().planned] == [0.003, 0.003, 0.01, 0.01]


def test_a_default_beside_a_rate_that_was_said_goes_on_as_it_began(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64, "code": "binary"}
    tables = (table, {**table, "lr": 0.001})
    config = TrainConfig(store=store_path, runs=tmp_path, batch_rows=256, tokens=512, coders=tables)
    run, _ = train_sweep(config)
    began = [default_lr("adam", "binary", 64), 0.001]
    assert [c.lr for c in run.config().planned] == began
    monkeypatch.setattr(schedule, "_SHORT", 0.1)  # as if the rule had come, or the run grown, since
    resume(run.folder, {"coders": tables, "tokens": 1_024})
    assert [c.lr for c in run.config().planned] == began
