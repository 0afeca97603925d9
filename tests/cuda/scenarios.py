"""Training steps, optimisers, encoding, evaluation and capture on a device that is not there.

    python -m tests.cuda.scenarios FILE     writes a JSON line for each thing that was run

Every one has values compared with those on the CPU where it has any.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsc.cache.store.split import Moments
from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig
from bsc.train.config import OPTIMISERS, TrainConfig
from bsc.train.optim import CoderOptimiser
from bsc.train.run_config import PlannedCoder
from tests.cuda.machine import CUDA, Machine, host, load_guard, pretended

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH, ROWS = 6, 64
KINDS: dict[str, dict[str, Any]] = {
    "topk": {}, "binary": {"code": "binary"},
    "identity": {"code": "binary", "surrogate": "identity"},
    "rectangle": {"code": "binary", "surrogate": "rectangle"},
    "re": {"code": "binary", "surrogate": "re"},
    "newton": {"code": "binary", "threshold": "newton"},
    "exact k": {"code": "binary", "exact_k": True},
    "fixed threshold": {"code": "binary", "threshold": "fixed"},
    "groupmax": {"select": "groupmax"},
    "gumbel": {"code": "binary", "select": "groupmax", "surrogate": "gumbel"},
    "full gumbel": {"code": "binary", "select": "groupmax", "surrogate": "gumbel",
                    "gumbel_support": "full"},
    "batch top-k": {"select": "batch_topk"},
    "binary batch top-k": {"code": "binary", "select": "batch_topk"},
    "hybrid": {"code": "hybrid"},
    "multi top-k": {"multi_topk": True},
    "AuxK": {"auxk_alpha": 1 / 32},
    "binary AuxK": {"code": "binary", "auxk_alpha": 1 / 32, "surrogate": "identity"},
    "rate penalty": {"code": "binary", "rate_penalty": 0.5, "rate_cap": 0.05},
    "cascade": {"n_latents": 1024},
    "amplitude": {"site": "sae", "decoder_norm": "unit", "amplitude": "learned", "code": "binary"},
}  # fmt: skip


def configs() -> Iterator[tuple[str, CoderConfig]]:
    """Every kind of coder at every site."""
    for name, fields in KINDS.items():
        for site in ("sae", "transcoder", "skip_transcoder"):
            base: dict[str, Any] = {
                "k": 4,
                "n_latents": 32,
                "d_in": WIDTH,
                "d_out": WIDTH,
                "site": site,
            }
            if fields.get("site", site) == site:
                yield f"{name}, {site}", CoderConfig(**(base | fields))


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(config: CoderConfig, device: Any, dtype: torch.dtype, coders: int = 2) -> Bank:
    """A bank with weights of a trained coder's size."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bank = Bank(
        [config] * coders, total_variance=3.7, device=device, dtype=wide, compute_dtype=dtype
    )
    for i, (name, p) in enumerate(bank.parameters.items()):
        values = drawn(*p.shape, seed=i).to(wide)
        if name == "W_dec" and config.decoder_norm == "unit":
            values /= values.norm(dim=2, keepdim=True)
        p.copy_(values * 0.3 - 0.5 if name == "log_threshold" else values)
    if config.auxk_alpha:
        dead = (torch.arange(config.n_latents) % 3 == 0).repeat(coders, 1)
        bank.dead = dead.to(device)
    if config.surrogate == "gumbel":
        bank.generators = [torch.Generator().manual_seed(i) for i in range(coders)]
    return bank


def rows_of(config: CoderConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to encode and to reconstruct."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = drawn(ROWS, WIDTH, seed=1).to(wide)
    return (y if config.site == "sae" else drawn(ROWS, WIDTH, seed=2).to(wide)), y


Found = list[dict[str, Any]]


def note(found: Found, what: str, machine: Machine) -> None:
    """Write down what the machine counted."""
    counted = {name: dict(getattr(machine, name)) for name in ("syncs", "missing", "any_order")}
    found.append({"what": what} | counted)


def banks(machine: Machine, found: Found) -> None:
    """Steps of every kind of coder: 2 coders, 2 pieces of the batch."""
    for dtype in (torch.float64, torch.bfloat16):
        for name, config in configs():
            x, y = rows_of(config, dtype)
            plain = bank_of(config, "cpu", dtype)
            expected = plain.step(x, y, micro_rows=32)
            with pretended(machine):
                bank = bank_of(config, CUDA, dtype)
                on_device = x.to(CUDA), y.to(CUDA)
                machine.reset()
                got = bank.step(*on_device, micro_rows=32)
            exact = dtype == torch.float64
            near: dict[str, Any] = {
                "rtol": 1e-9 if exact else 0.1,
                "atol": 1e-12 if exact else 1e-3,
            }
            torch.testing.assert_close(host(got.loss), expected.loss, **near)
            for label, gradient in plain.gradients.items() if exact else ():
                torch.testing.assert_close(host(bank.gradients[label]), gradient, **near)
            note(found, f"step {dtype}: {name}", machine)


def optimisers(machine: Machine, found: Found) -> None:
    """Every optimiser, with clipping, and after a resume."""
    config = CoderConfig(site="sae", k=4, n_latents=32, d_in=WIDTH, d_out=WIDTH)
    x, y = rows_of(config, torch.bfloat16)
    for name in OPTIMISERS:
        with pretended(machine):
            bank = bank_of(config, CUDA, torch.bfloat16, 1)
            one = CoderOptimiser(name, bank.trained(0), 1e-3, clip_norm=1.0)
            bank.step(x.to(CUDA), y.to(CUDA))
            one.step(1e-3)
            machine.reset()
            one.step(1e-3)
            bank.renormalise(0)
            note(found, f"optimiser: {name}", machine)
            with one.averaged():
                bank.export(0)
            state = {n: t.detach().cpu().clone() for n, t in one.state().items()}
            again = CoderOptimiser(name, bank.trained(0), 1e-3)
            again.load_state(state)
            machine.reset()
            again.step(1e-3)
            note(found, f"optimiser after a resume: {name}", machine)


def trainers(machine: Machine, found: Found) -> None:
    """A bank with its counters: 3 coders, whole batches."""
    import bsc.train.bank_trainer as module

    moments = Moments(
        rows=100, mean=torch.zeros(WIDTH, dtype=torch.float64),
        variance=torch.ones(WIDTH, dtype=torch.float64),
    )  # fmt: skip
    store: Any = types.SimpleNamespace(train=None, attributes={"model": {"special_token_ids": []}})
    name = "layers.0.mlp/output"
    for label in ("topk", "binary", "batch top-k", "AuxK", "gumbel", "amplitude"):
        fields: dict[str, Any] = {"n_latents": 32, "site": "sae", **KINDS[label]}
        config = CoderConfig(k=4, d_in=WIDTH, d_out=WIDTH, **fields)
        planned = [
            PlannedCoder(
                name=f"c{i}", hookpoint="layers.0.mlp", coder=config, optimiser="adam", lr=1e-3,
                clip_norm=None, seed=i, warmup=0.05, decay="linear", anneal=0.1, k_init=config.k,
                temperature_init=config.temperature, patience=None, adam_eps=None,
            )
            for i in range(3)
        ]  # fmt: skip
        with pretended(machine):
            settings = TrainConfig(dead_after=64, batch_rows=ROWS)
            trainer = module.BankTrainer(
                planned, store, settings, CUDA, micro_rows=ROWS, moments={name: moments}
            )
            for step in range(3):
                batch = {name: drawn(ROWS, WIDTH, seed=step).bfloat16()}
                machine.reset()
                assert trainer.step(batch, step, 100) == []
            note(found, f"trainer step: {label}", machine)
            machine.reset()
            trainer.take_metrics()
            note(found, f"metrics: {label}", machine)
            trainer.held_out({name: drawn(512, WIDTH, seed=9).bfloat16()})
            trainer.state(0)
            list(trainer.finish({}, 3))


def evaluation(machine: Machine, found: Found) -> None:
    """Encoding, decoding, the pass over rows, a splice, and sums of losses."""
    from bsc.eval.passes import context_pass, controls, row_pass, splice
    from bsc.eval.passes.batches import RowBatch

    for name, config in configs():
        coder = bank_of(config, "cpu", torch.bfloat16, 1).export(0)
        x, y = rows_of(config, torch.bfloat16)
        batch = RowBatch(x, y, torch.arange(ROWS))
        expected = coder.decode(coder.encode(x), x)
        with pretended(machine):
            here = coder.to(CUDA)
            on_device = x.to(CUDA), y.to(CUDA)
            machine.reset()
            code = here.encode(on_device[0])
            got = here.decode(code, on_device[0])
            note(found, f"encode and decode: {name}", machine)
            torch.testing.assert_close(host(got), expected, rtol=1e-4, atol=1e-4)
            vars(controls)["row_batches"] = lambda *a, batch=batch, **k: iter([batch])
            # Rows come from the line above, so that no store is opened.
            store: Any = types.SimpleNamespace(ring=None, train=None)
            machine.reset()
            calibration = controls.calibrate(here, store, "h", without_tokens=())
            note(found, f"calibration: {name}", machine)
            one = row_pass._CoderPiece(here, calibration, 4)
            document = (torch.arange(ROWS) % 4).to(CUDA)
            unseen = torch.ones(ROWS, dtype=torch.float64).to(CUDA)
            machine.reset()
            with torch.no_grad():
                one.add(batch, *on_device, document, unseen)
            note(found, f"pass over rows, a coder and a batch: {name}", machine)
            one.sums()
            one.code(0)
            assert splice.coder_replacement(here)(*on_device).device == CUDA
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 50, dtype=torch.bfloat16)  # clean and spliced
    target, document = torch.randint(0, 50, (40,)), torch.arange(40) // 11
    unseen = torch.ones(40)
    log_p = context_pass._log_softmax(logits[0])
    clean = context_pass._Clean(log_p, target, document, 3, unseen)
    expected_sums = context_pass._sums(clean, logits[1])
    with pretended(machine):
        on_cuda = logits.to(CUDA)
        there = target.to(CUDA), document.to(CUDA), 3, unseen.to(CUDA)
        machine.reset()
        log_p = context_pass._log_softmax(on_cuda[0])
        sums = context_pass._sums(context_pass._Clean(log_p, *there), on_cuda[1])
        note(found, "losses of a batch of contexts", machine)
    for a, b in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def capture(machine: Machine, found: Found) -> None:
    """Rows of a small model, and their way to the host."""
    from transformers import LlamaConfig, LlamaModel

    from bsc.cache.capture.staging import Staging
    from bsc.cache.model.attention import forward_inputs
    from bsc.cache.model.hookpoints import RowTap

    torch.manual_seed(0)
    make: Any = LlamaConfig
    model: Any = LlamaModel(make(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, attn_implementation="eager",
    )).eval().requires_grad_(False)  # fmt: skip
    hooks = ["layers.0.mlp", "layers.1.mlp"]
    ids, position = torch.randint(0, 40, (2, 12)), torch.arange(6).repeat(2, 2)
    expected = RowTap(model, hooks).rows(forward_inputs(ids, position, packing="masked"))
    with pretended(machine):
        for module in model.modules():
            for n, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[n] = torch.nn.Parameter(p.data.to(CUDA), requires_grad=False)
            for n, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[n] = b.to(CUDA)
        inputs = forward_inputs(ids.to(CUDA), position.to(CUDA), packing="masked")
        tap = RowTap(model, hooks)
        machine.reset()
        with torch.no_grad():
            got = tap.rows(inputs)
        note(found, "capture: rows of a batch", machine)
        for name, rows in expected.items():
            torch.testing.assert_close(host(got[name]), rows, rtol=2e-2, atol=1e-2)
        plain_empty: Any = torch.empty
        torch.empty = lambda *a, pin_memory=False, **k: plain_empty(*a, **k)
        staging = Staging(2, CUDA)
        try:
            machine.reset()
            slot = staging.slot()
            order = torch.from_numpy(np.random.default_rng(0).permutation(24))
            for name, rows in got.items():
                filled = slot.fill(name, rows, order)
                torch.testing.assert_close(filled, host(rows)[order])
            slot.filled()
            slot.wait()
            note(found, "capture: staging of a block", machine)
        finally:
            torch.empty = plain_empty
            staging.close()


def finetuning(machine: Machine, found: Found) -> None:
    """A coder in the place of a module, the loss of what is predicted, and a step.

    Autograd's engine needs a real device, so the passes back are called one by one.
    """
    from bsc.finetuning.config import FinetuneConfig
    from bsc.finetuning.losses import clean_predictions, prediction_loss
    from bsc.finetuning.tuned_coder import TunedCoder
    from bsc.train.coders import sparse_grad
    from bsc.train.run_config import FinetunedCoder
    from bsc.train.training_rows import Scale

    for name, config in configs():
        start = bank_of(config, "cpu", torch.float32, 1).export(0)
        surrogate = None if config.code == "continuous" else config.surrogate
        planned = FinetunedCoder(
            name="a", hookpoint="h", coder=start.config, parent="a", parent_xxh3_128="",
            optimiser="adam", lr=1e-3, warmup=0.0, decay="none", clip_norm=None,
            surrogate="sigmoid" if surrogate == "gumbel" else surrogate,
        )  # fmt: skip
        x, y = rows_of(config, torch.float32)
        zero = torch.zeros(WIDTH)
        scale = Scale(1.5, 1.5, zero, zero, 3.0)
        results: dict[str, list[torch.Tensor]] = {}
        places = [(torch.device("cpu"), "fp32"), (CUDA, "bf16"), (CUDA, "fp32")]
        for device, precision in places:
            settings = FinetuneConfig.model_validate({"precision": precision})
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            with pretended(machine), torch.no_grad():
                coder = TunedCoder(planned, start, scale, settings, device)
                rows = x.to(device), y.to(device)
                kept = (torch.arange(len(x)) % 7 == 0).to(device)
                target = (torch.arange(len(x)) % 5).to(device)
                weight = torch.ones(len(x)).to(device)
                machine.reset()
                coder.begin()
                y_hat = coder.replacement(kept)(*rows)
                clean = clean_predictions(y_hat + 0.1, target, weight)
                loss, both = prediction_loss(y_hat * y_hat, clean, kl=True)
                code = coder.module.encode(rows[0])
                chosen = sparse_grad.Selected(code.latent, config.n_latents)
                context: Any = types.SimpleNamespace(
                    needs_input_grad=(True, True), how=(dtype, chosen), selected=chosen
                )
                context.saved_tensors = code.value, coder.module.W_dec
                g_value, g_table, *_ = sparse_grad._Decoded.backward(context, y_hat)
                context.saved_tensors = rows[0], coder.module.encoder.weight
                g_rows, g_weight, *_ = sparse_grad._WithGradient.backward(context, g_value)
                g_bias, _ = sparse_grad._OfLatents.backward(context, g_value)
                coder.finite(len(x))
                coder.step(0, 2, len(x))
                if device == CUDA:
                    note(found, f"finetuning {precision}, a coder and a batch: {name}", machine)
                made = (y_hat, loss, both, g_table, g_rows, g_weight, g_bias, coder.figures)
                results[device.type] = [host(t).clone() for t in made]
        for a, b in zip(results["cuda"], results["cpu"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


SCENARIOS: dict[str, Callable[[Machine, Found], None]] = {
    "banks": banks, "optimisers": optimisers, "trainers": trainers, "evaluation": evaluation,
    "capture": capture, "finetuning": finetuning,
}  # fmt: skip


def main(path: Path) -> None:
    """Run everything and write down what was counted, as on the oldest torch that we support."""
    load_guard()
    torch.set_num_threads(1)
    vars(torch)["__version__"] = "2.8.0"
    machine, found = Machine(REPOSITORY), Found()
    for run in SCENARIOS.values():
        run(machine, found)
    path.write_text("".join(json.dumps(line) + "\n" for line in found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
