"""A training step of dictionary_learning; run by bench_peers.py in its own environment.

`TopKTrainer.update` of every coder in turn, which is the loop of `trainSAE`. AuxK is off by
`auxk_alpha=0`. The package imports nnsight, which a step does not use: a mock stands for it.
"""

import sys
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
from bench_peers import LR, Look, Params, Step, fvu, measure

sys.modules["nnsight"] = MagicMock()
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402  (after the mock)


def make_step(params: Params) -> tuple[Step, Look]:
    """One trainer per coder."""
    assert (params.site, params.optimiser) == ("sae", "adam")
    trainers = [
        TopKTrainer(
            steps=params.warmup + params.steps, activation_dim=params.d, dict_size=params.latents,
            k=k, layer=0, lm_name="synthetic", lr=LR, auxk_alpha=0, warmup_steps=0,
            seed=params.seed + c, device="cpu",
        )
        for c, k in enumerate(params.k)
    ]  # fmt: skip
    batches, taken = params.batches(), 0

    def step() -> None:
        nonlocal taken
        x, _ = next(batches)
        for trainer in trainers:
            trainer.update(taken, x)
        taken += 1

    @torch.no_grad()
    def look() -> list[tuple[float, float]]:
        x, y = params.probe()
        seen = []
        for trainer in trainers:
            y_hat, code = trainer.ae(x, output_features=True)
            seen.append((fvu(y, y_hat), float((code != 0).sum(1).float().mean())))
        return seen

    return step, look


if __name__ == "__main__":
    measure(make_step, {"dictionary-learning": version("dictionary-learning")})
