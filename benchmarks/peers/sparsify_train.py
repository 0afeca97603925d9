"""A training step of sparsify (eai-sparsify); run by bench_peers.py in sparsify's environment.

What `sparsify.Trainer` runs between two forward passes of the language model, in its order:
initial biases, unit decoder, forward, fired latents, loss read, backward, gradients orthogonal to
the decoder, optimiser, counters. AuxK is off, which is its default. "signum" is its default
optimiser, schedule-free sign SGD.
"""

import os
from importlib.metadata import version

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from bench_peers import LR, Look, Params, Step, fvu, measure
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD


def make_step(params: Params) -> tuple[Step, Look]:
    """Coders with one optimiser over all of them, as the trainer makes it."""
    sae = params.site == "sae"
    torch.manual_seed(params.seed)
    coders = [
        SparseCoder(
            params.d,
            SparseCoderConfig(
                num_latents=params.latents, k=k, transcode=not sae, skip_connection=not sae
            ),
            dtype=torch.float32,
        )
        for k in params.k
    ]
    for coder in coders:
        if not sae:
            mean = params.x[: params.batch].mean(0)
            coder.encoder.bias.data = -mean @ coder.encoder.weight.data.T
        coder.b_dec.data = params.y[: params.batch].mean(0)
    groups = [{"params": coder.parameters(), "lr": LR} for coder in coders]
    if params.optimiser == "adam":
        optimiser = torch.optim.Adam(groups)
    else:
        optimiser = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        optimiser.train()
    since_fired = [torch.zeros(params.latents, dtype=torch.long) for _ in coders]
    did_fire = [torch.zeros(params.latents, dtype=torch.bool) for _ in coders]
    losses = [0.0] * len(coders)
    batches = params.batches()

    def step() -> None:
        x, y = next(batches)
        total_variance = (y - y.mean(0)).pow(2).sum()
        for c, coder in enumerate(coders):
            if sae:
                coder.set_decoder_norm_to_unit_norm()
            out = coder(x=x, y=y, dead_mask=None, total_variance=total_variance)
            did_fire[c][out.latent_indices.flatten()] = True
            losses[c] = float(out.fvu.detach())
            out.fvu.backward()
        if sae:
            for coder in coders:
                coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            for counts, fired in zip(since_fired, did_fire, strict=True):
                counts += len(x)
                counts[fired] = 0
                fired.zero_()

    @torch.no_grad()
    def look() -> list[tuple[float, float]]:
        x, y = params.probe()
        seen = []
        for coder in coders:
            out = coder(x=x, y=y)
            seen.append((fvu(y, out.sae_out), float((out.latent_acts > 0).sum(1).float().mean())))
        return seen

    return step, look


if __name__ == "__main__":
    measure(make_step, {n: version(n) for n in ("eai-sparsify", "schedulefree")})
