"""A training step of saev; run by bench_peers.py with a git checkout of saev on the path.

The body of the loop of `saev.framework.train`: all forward passes, all backward passes, gradients
orthogonal to the decoder, clipping, one fused Adam over all. Matryoshka with one prefix is the
plain loss. AuxK is off.
"""

import torch
from bench_peers import LR, Look, Params, Step, fvu, measure
from saev.nn import modeling, objectives


def make_step(params: Params) -> tuple[Step, Look]:
    """Coders with one optimiser over all of them, as the trainer makes it."""
    assert (params.site, params.optimiser) == ("sae", "adam")
    torch.manual_seed(params.seed)
    saes = [
        modeling.SparseAutoencoder(
            modeling.SparseAutoencoderConfig(
                d_model=params.d,
                d_sae=params.latents,
                activation=modeling.TopK(top_k=k, aux=modeling.NoAux()),
                reinit_blend=0.0,
            )
        ).train()
        for k in params.k
    ]
    losses = [objectives.get_objective(objectives.Matryoshka(n_prefixes=1)) for _ in saes]
    groups = [{"params": sae.parameters(), "lr": LR} for sae in saes]
    optimiser = torch.optim.Adam(groups, fused=True)
    batches = params.batches()

    def step() -> None:
        x, _ = next(batches)
        for sae in saes:
            sae.normalize_w_dec()
        found = [loss(sae, x)[0] for sae, loss in zip(saes, losses, strict=True)]
        for loss in found:
            loss.loss.backward()
        for sae in saes:
            sae.remove_parallel_grads()
        for sae in saes:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm=1.0)
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def look() -> list[tuple[float, float]]:
        x, y = params.probe()
        seen = []
        for sae in saes:
            out = sae(x)
            l0 = float((out.f_x != 0).sum(1).float().mean())
            seen.append((fvu(y, out.x_hats[:, -1]), l0))
        return seen

    return step, look


if __name__ == "__main__":
    measure(make_step, {})
