"""A training step of bsc, as `bsc.train.trainer` takes it; run by bench_peers.py."""

import torch
from bench_peers import LR, Look, Params, Step, measure

from bsc.devices import keep_freed_memory
from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig
from bsc.train.optim import CoderOptimiser
from bsc.versions import versions


def make_step(params: Params) -> tuple[Step, Look]:
    """A bank of coders, half of them binary so that each k comes with both codes, and its step."""
    keep_freed_memory()  # as the trainer does
    codes = [("continuous", "binary")[(c + c // 4) % 2] for c in range(len(params.k))]
    configs = [
        CoderConfig(
            site=params.site, code=code, k=k, n_latents=params.latents, d_in=params.d,
            d_out=params.d, decoder_norm="unit" if params.site == "sae" else "free",
        )
        for code, k in zip(codes, params.k, strict=True)
    ]  # fmt: skip
    bank = Bank(
        configs, total_variance=float(params.y.var(dim=0).sum()),
        compiled=True,
    )  # fmt: skip
    bank.initialise(range(len(configs)), params.x.mean(0), params.y.mean(0))
    optimisers = [
        CoderOptimiser(params.optimiser, bank.trained(c), LR) for c in range(len(configs))
    ]
    last_fired = torch.zeros((len(configs), params.latents), dtype=torch.int64)
    sums = torch.zeros((2, len(configs)), dtype=torch.float64)
    batches, rows = params.batches(), 0

    def step() -> None:
        nonlocal rows
        x, y = next(batches)
        result = bank.step(x, y)
        rows += len(x)
        last_fired.masked_fill_(result.fired, rows)
        sums.add_(torch.stack([result.loss, result.l0]))
        finite = result.loss.isfinite()
        for gradient in bank.gradients.values():
            if gradient.ndim == 2:
                finite &= gradient.sum(dim=1).isfinite()
        for c, ok in enumerate(finite.tolist()):
            assert ok
            optimisers[c].step(LR)
            lengths = bank.renormalise(c)
            if lengths is not None:
                optimisers[c].rescale("W_dec", lengths)

    def look() -> list[tuple[float, float]]:
        result = bank.step(*params.probe())
        return list(zip(result.loss.tolist(), result.l0.tolist(), strict=True))

    return step, look


if __name__ == "__main__":
    measure(make_step, {"bsc": versions()["bsc"]})
