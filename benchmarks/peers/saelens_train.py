"""A training step of SAELens; run by bench_peers.py in SAELens' environment.

`SAETrainer.step` of every coder in turn, which is what `fit` and `MultiSAETrainer` call. AuxK has
nothing to do before a latent is dead, after 1,000 steps. wandb and plotly are imported and not used
here: mocks stand for them.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from unittest.mock import MagicMock

import torch
from bench_peers import LR, Look, Params, Step, fvu, measure

for name in ("wandb", "plotly", "plotly.express", "plotly.graph_objects", "plotly_express"):
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])
import sae_lens  # noqa: E402  (after the mocks)
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402


def make_step(params: Params) -> tuple[Step, Look]:
    """One trainer per coder."""
    assert (params.site, params.optimiser) == ("sae", "adam")
    assert params.warmup + params.steps < 1000
    torch.manual_seed(params.seed)
    batches = params.batches()
    trainers = [
        SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=params.batch * (params.warmup + params.steps),
                train_batch_size_samples=params.batch, lr=LR, lr_end=LR / 10, device="cpu",
                dead_feature_window=1000, logger=sae_lens.LoggingConfig(log_to_wandb=False),
            ),
            sae=sae_lens.TopKTrainingSAE(
                sae_lens.TopKTrainingSAEConfig(
                    d_in=params.d, d_sae=params.latents, k=k, dtype="float32", device="cpu"
                )
            ),
            data_provider=batches,
        )
        for k in params.k
    ]  # fmt: skip

    def step() -> None:
        x, _ = next(batches)
        for trainer in trainers:
            trainer.step(x)
            trainer.n_training_steps += 1

    @torch.no_grad()
    def look() -> list[tuple[float, float]]:
        x, y = params.probe()
        seen = []
        for trainer in trainers:
            code = trainer.sae.encode(x)
            l0 = float((code != 0).sum(1).float().mean())
            seen.append((fvu(y, trainer.sae.decode(code)), l0))
        return seen

    return step, look


if __name__ == "__main__":
    measure(make_step, {"sae-lens": version("sae-lens")})
