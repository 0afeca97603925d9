"""How long does a training step take beside the encoder products that it cannot do without?

* step: forward and backward pass of all coders, without optimiser, over the bare product of the
  rows with all encoders, in the type that training takes it in, into memory that is there already,
  in the same run; and what it takes beside that product, in copies of the pre-activations.
* accumulate: the same with optimiser, at 2^14 rows a batch, over the bare products of the batch.
* scale: steps of 8, 64 and 256 small coders: is the time linear in their number?
* parts: each kernel of a step alone, beside what else could do its work.
* uneven: sums over the rows of each latent where all latents fire alike, where one fires in every
  row, and where 1 % of the latents have half of all firings: does the time depend on it?

Rows are random, weights as at the beginning of a run with a decoder that is not zero. Every part
checks what it times: losses are finite and fall under a step against the gradient, continuous
coders have L0 = k, and the gradients of a few rows are those of autograd on the dense coder in
float32. What is compared alternates. Nothing here reads a store, so the script needs torch,
pydantic, safetensors and numpy alone and runs on any machine with a GPU. The last line is JSON.

    python benchmarks/bench_train.py [--device cuda] [--parts step accumulate scale parts]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, from anywhere

from benchmarks.measure import alternate, ceilings, machine, ratio, spread
from bsc.devices import keep_freed_memory, product_dtype
from bsc.train.coders import kernels, topk
from bsc.train.coders.bank import Bank
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.kernels import Entries
from bsc.train.config import Optimiser
from bsc.train.optim import CoderOptimiser

K = (16, 32, 64, 128)
D = 576


def make_bank(
    site: Any, n_latents: int, ks: Sequence[int], device: torch.device, d: int = D, **how: Any
) -> tuple[Bank, Tensor, Tensor]:
    """A bank whose coders are binary and continuous in turn (one: continuous), and rows for it."""
    generator = torch.Generator().manual_seed(0)
    rows = how.pop("rows")
    configs = [
        CoderConfig(
            site=site, code="binary" if i % 2 == 0 and len(ks) > 1 else "continuous", k=k,
            n_latents=n_latents, d_in=d, d_out=d, decoder_norm="unit" if site == "sae" else "free",
        )
        for i, k in enumerate(ks)
    ]  # fmt: skip
    x = torch.randn((rows, d), generator=generator).bfloat16().to(device)
    y = x if site == "sae" else torch.randn((rows, d), generator=generator).bfloat16().to(device)
    how.setdefault("compute_dtype", product_dtype("bf16", device))
    bank = Bank(configs, total_variance=float(d), device=device, **how)
    bank.initialise(range(len(ks)), torch.zeros(d), torch.zeros(d))
    if site != "sae":
        bank.parameters["W_dec"].copy_(0.1 * bank.parameters["encoder.weight"])
    return bank, x, y


def bare_products(bank: Bank, x: Tensor, micro_rows: int) -> Callable[[], None]:
    """The product of the rows with all encoders, in pieces of `micro_rows`, into one buffer."""
    weight = bank.parameters["encoder.weight"].flatten(0, 1).to(bank.compute_dtype)
    out = torch.empty((micro_rows, len(weight)), dtype=bank.compute_dtype, device=x.device)
    x = x.to(bank.compute_dtype)

    def run() -> None:
        for at in range(0, len(x), micro_rows):
            torch.mm(x[at : at + micro_rows], weight.T, out=out)

    return run


def copies(bank: Bank, rows: int) -> Callable[[], None]:
    """Pre-activations of one coder after another into memory that is there already."""
    shape = (rows, bank.configs[0].n_latents)
    source = torch.ones(shape, dtype=bank.compute_dtype, device=bank.parameters["b_dec"].device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in bank.configs:
            target.copy_(source)

    return run


def check(bank: Bank, x: Tensor, y: Tensor, micro_rows: int | None = None) -> None:
    """That a step does what it should.

    Loss finite and lower after a small step; L0 = k; gradients those of the dense coder.
    """
    result = bank.step(x, y, micro_rows=micro_rows)
    assert result.loss.isfinite().all(), result.loss
    for c, config in enumerate(bank.configs):
        if config.code == "continuous":
            assert float(result.l0[c]) == config.k, (config, result.l0[c])
    for name, p in bank.parameters.items():
        length = bank.gradients[name].flatten(1).norm(dim=1).clamp(min=1e-20)
        step = 1e-2 / length.view(-1, *[1] * (p.ndim - 1)) * bank.gradients[name]
        p -= step
        bank.gradients[name].copy_(step)
    for c in range(len(bank.configs)):
        bank.renormalise(c)
    after = bank.step(x, y, micro_rows=micro_rows).loss
    assert (after < result.loss).all(), (result.loss, after)
    c = next(i for i, config in enumerate(bank.configs) if config.code == "continuous")
    few = slice(0, 64)
    bank.step(x[few], y[few])
    dense = {n: t[c].detach().float().requires_grad_() for n, t in bank.parameters.items()}
    xs, ys = x[few].float(), y[few].float()
    centred = xs - dense["b_dec"] if bank.site == "sae" else xs
    pre = centred @ dense["encoder.weight"].T + dense["encoder.bias"]
    top = pre.topk(bank.configs[c].k, dim=1)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    w = dense["W_dec"]
    if bank.site == "sae":
        w = w / w.norm(dim=1, keepdim=True)
    y_hat = code @ w + dense["b_dec"]
    if "W_skip" in dense:
        y_hat = y_hat + xs @ dense["W_skip"].T
    ((ys - y_hat).square().sum() / (len(xs) * bank.total_variance)).backward()
    for name in ("encoder.weight", "W_dec", "b_dec"):
        expected, found = dense[name].grad, bank.gradients[name][c]
        assert expected is not None
        cosine = torch.cosine_similarity(expected.flatten(), found.flatten(), dim=0)
        # Near ties are selected otherwise in bfloat16.
        assert cosine > 0.97, (name, float(cosine))


def bench_step(
    device: torch.device, repeats: int, quick: bool, only: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Steps of several shapes over the bare products; `only`: of so many coders."""
    rows = 65536 if device.type == "cuda" else 2048
    shapes: list[tuple[Any, int, tuple[int, ...]]] = [
        ("sae", 9216, K),
        ("skip_transcoder", 9216, K),
        ("transcoder", 9216, K),
    ]
    if device.type == "cuda":
        shapes = [(s, 36864, ks) for s, _, ks in shapes]
    else:
        shapes += [("skip_transcoder", 36864, K)]
    largest = shapes[0][1]
    shapes += [("sae", largest, (32,)), ("skip_transcoder", largest, (32,))]
    shapes += [("sae", largest, K * 4), ("skip_transcoder", largest, K * 4)]
    if quick:
        shapes = shapes[:1]
    found = []
    for site, n_latents, ks in shapes:
        if only and len(ks) not in only:
            continue
        variants: dict[str, dict[str, Any]] = {"eager": {}}
        if len(ks) == 4 and n_latents == largest:
            variants["compiled"] = {"compiled": True}
        bank, x, y = make_bank(site, n_latents, ks, device, rows=rows)
        micro = rows if device.type == "cpu" else min(rows, 16384)
        check(bank, x[:4096], y[:4096])
        runs: dict[str, Callable[[], object]] = {
            "gemm": bare_products(bank, x, micro),
            "copy": copies(bank, rows),
        }
        compile_seconds = 0.0
        for name, how in variants.items():
            other = (
                bank
                if name == "eager"
                else make_bank(site, n_latents, ks, device, rows=1, **how)[0]
            )
            started = time.perf_counter()
            check(other, x[:4096], y[:4096])
            compile_seconds = time.perf_counter() - started if how else compile_seconds
            runs[name] = partial(other.step, x, y, micro_rows=micro)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        n = max(3, repeats * 4 // len(ks)) if len(ks) > 4 or n_latents > 9216 else repeats
        ms = alternate(runs, device, n)
        gemm = 2 * rows * n_latents * D * len(ks)
        line: dict[str, Any] = {
            "site": site, "n_latents": n_latents, "k": list(ks), "rows": rows,
            "gemm_ms": spread(ms["gemm"]),
            "gemm_tflops": round(gemm / statistics.median(ms["gemm"]) / 1e9, 2),
            "dtype": str(bank.compute_dtype), "copy_ms": spread(ms["copy"]),
        }  # fmt: skip
        for name in variants:
            beside = [a - b for a, b in zip(ms[name], ms["gemm"], strict=True)]
            line[f"{name}_beside_in_copies"] = ratio(beside, ms["copy"])
            line[f"{name}_ms"] = spread(ms[name])
            line[f"{name}_over_gemm"] = ratio(ms[name], ms["gemm"])
        if "compiled" in variants:
            line["first_compiled_steps_s"] = round(compile_seconds, 1)
        if device.type == "cuda":
            line["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(line, file=sys.stderr, flush=True)
        found.append(line)
    return found


def bench_accumulate(device: torch.device, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Whole steps, optimiser included, of 2^14 rows over the bare products of as many."""
    rows = 2**16 if device.type == "cuda" else 2**14
    n_latents = 36864 if device.type == "cuda" else 9216
    found = []
    optimisers_timed: tuple[Optimiser, ...] = ("adam", "signum")
    for site in ("sae", "skip_transcoder")[: 1 if quick else 2]:
        for optimiser in optimisers_timed[: 1 if quick else 2]:
            for micro in (2048, 8192) if device.type == "cpu" else (16384, 65536):
                bank, x, y = make_bank(site, n_latents, K, device, rows=rows)
                check(bank, x[:4096], y[:4096], micro_rows=1000)
                optimisers = [
                    CoderOptimiser(optimiser, bank.trained(c), 1e-4) for c in range(len(K))
                ]

                def whole(
                    bank: Bank = bank, x: Tensor = x, y: Tensor = y, micro: int = micro,
                    optimisers: list[CoderOptimiser] = optimisers,
                ) -> None:  # fmt: skip
                    bank.step(x, y, micro_rows=micro)
                    for c, one in enumerate(optimisers):
                        one.step(1e-4)
                        bank.renormalise(c)

                runs: dict[str, Callable[[], object]] = {
                    "gemm": bare_products(bank, x, 2048 if device.type == "cpu" else micro),
                    "step": whole,
                }
                ms = alternate(runs, device, max(3, repeats // 2))
                line = {
                    "site": site, "optimiser": optimiser, "rows": rows, "micro_rows": micro,
                    "n_latents": n_latents, "gemm_ms": spread(ms["gemm"]),
                    "step_ms": spread(ms["step"]), "over_gemm": ratio(ms["step"], ms["gemm"]),
                }  # fmt: skip
                print(line, file=sys.stderr, flush=True)
                found.append(line)
    return found


def bench_scale(device: torch.device, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Steps of more and more small coders."""
    found = []
    for n in (8, 64, 256):
        bank, x, y = make_bank("sae", 512, (K[:2] * n)[:n], device, rows=1024)
        check(bank, x, y)
        ms = alternate({"step": partial(bank.step, x, y)}, device, repeats)
        found.append({"coders": n, "ms": spread(ms["step"]),
                      "ms_per_coder": round(statistics.median(ms["step"]) / n, 3)})  # fmt: skip
        print(found[-1], file=sys.stderr, flush=True)
    return found


def bench_parts(device: torch.device, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Every kernel of a step beside its alternatives, milliseconds per coder, by k."""
    rows, n_latents = (65536, 36864) if device.type == "cuda" else (2048, 9216)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((rows, D), generator=generator).bfloat16().to(device)
    table = (torch.randn((n_latents, D), generator=generator) / D**0.5).to(device)
    narrow = table.bfloat16()
    pre = x @ narrow.T
    found = []
    compiled = kernels.compiled_decoder_dot()
    for k in K:
        values, index = pre.topk(k, sorted=False)
        entries = Entries.of(index)
        code = values.relu().flatten()
        transposed = kernels.transpose(entries, n_latents)
        wide_x = x.float()
        weights = code.float()

        def by_index_add(
            index: Tensor = index, code: Tensor = weights, x: Tensor = wide_x, k: int = k
        ) -> Tensor:
            out = torch.zeros((n_latents, D), device=device)
            for at in range(0, len(index), 512):  # or it would make rows x k x d at once
                part = slice(at, at + 512)
                grown = x[part].repeat_interleave(k, 0) * code.view(-1, k)[part].reshape(-1, 1)
                out.index_add_(0, index[part].flatten(), grown)
            return out

        assert torch.equal(
            topk.select_topk(pre, k)[0].float().sort(1).values, values.float().sort(1).values
        )
        runs: dict[str, Callable[[], object]] = {
            "gemm": lambda: torch.mm(x, narrow.T, out=pre),
            "select: ours": partial(topk.select_topk, pre, k),
            "select: torch.topk": partial(pre.topk, k, sorted=False),
            "groupmax": partial(topk.groupmax, pre, k),
            "decode: bf16": partial(kernels.decode, entries, code, narrow),
            "decode: fp32": partial(kernels.decode, entries, weights, table),
            "dot: bf16": partial(kernels.decoder_dot, x, narrow, transposed),
            "dot: bf16 compiled": partial(compiled, x, narrow, transposed),
            "dot: fp32": partial(kernels.decoder_dot, wide_x, table, transposed),
            "transpose": partial(kernels.transpose, entries, n_latents),
            "sums: bf16": partial(kernels.latent_sums, transposed, code, x),
            "sums: fp32": partial(kernels.latent_sums, transposed, weights, wide_x),
            "sums: index_add": by_index_add,
        }
        if device.type == "cpu":  # numpy finds them
            runs["select: by values"] = partial(
                topk._descended_by_keys, pre, k, topk._folds(n_latents, k), by_bits=False
            )
        ms = alternate(runs, device, repeats)
        line = {"k": k, **{n: round(statistics.median(v), 2) for n, v in ms.items()}}
        print(line, file=sys.stderr, flush=True)
        found.append(line)
    return found


def bench_uneven(device: torch.device, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Sums over the rows of each latent, by how unevenly latents fire; k = 32."""
    rows, n_latents = (65536, 36864) if device.type == "cuda" else (8192, 9216)
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn((rows, D), generator=generator, device=device).bfloat16()
    k, often = 32, n_latents // 100
    weights = torch.ones(rows * k, dtype=torch.bfloat16, device=device)
    codes = {}
    for name in ("even", "one in every row", "half of the firings from 1 %"):
        score = torch.rand((rows, n_latents), generator=generator, device=device)
        if name.startswith("one"):
            score[:, 0] = 2
        if name.startswith("half"):
            drawn = torch.rand((rows, often), generator=generator, device=device)
            drawn = drawn.topk(k // 2).indices
            score.scatter_(1, drawn, 2.0)
        entries = Entries.of(score.topk(k, sorted=False).indices)
        codes[name] = kernels.transpose(entries, n_latents)
    runs: dict[str, Callable[[], object]] = {}
    for name, code in codes.items():
        whole = partial(torch.nn.functional.embedding_bag, code.row, x, code.offsets, mode="sum")
        runs[f"{name}: whole bags"] = partial(
            lambda whole, code: whole(per_sample_weights=weights[code.order]), whole, code
        )
        pieces = code.pieces or kernels.pieces_of(code.offsets, len(code.row))
        by_pieces = partial(kernels.latent_sums_by_pieces, code, pieces, weights, x)
        runs[f"{name}: by pieces"] = by_pieces
    ms = alternate(runs, device, repeats)
    line = {"rows": rows, "n_latents": n_latents, **{n: spread(v) for n, v in ms.items()}}
    print(line, file=sys.stderr, flush=True)
    return [line]


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "step": bench_step, "accumulate": bench_accumulate, "scale": bench_scale, "parts": bench_parts,
    "uneven": bench_uneven,
}  # fmt: skip


def main() -> None:
    """Run the parts and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first shape of each part alone")
    parser.add_argument("--coders", type=int, nargs="*", default=(), help="step: so many coders")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    results: dict[str, Any] = {"ceilings": ceilings(device)}
    for part in args.parts:
        how = {"only": args.coders} if part == "step" else {}
        results[part] = PARTS[part](device, args.repeats, args.quick, **how)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    facts = {
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
        "machine": machine(device), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }  # fmt: skip
    print(json.dumps({"benchmark": "train", "results": results} | facts))


if __name__ == "__main__":
    main()
