"""How near does asking a judge come to the time that the judge itself takes; and how long does
predictability of all latents of a coder take?

Judge: a loopback server in another process that answers every prompt after 50 ms. 10,000 prompts
at concurrency 32, over the whole path: httpx, retries, the gate, parsing, the ledger on disk. The
ideal is prompts / concurrency x 50 ms. `bare` is a loop of httpx alone over the same requests.

Predictability: 4,096 latents on 2 M tokens, 32 firings a token, rates from a power law, a quarter
of the latents tied to a token; wall time and peak memory of this process.

    python -m benchmarks.bench_interp

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bsc.eval.figures.division import divide
from bsc.eval.interp.judges.connection import EndpointConfig
from bsc.eval.interp.judges.endpoint import Endpoint
from bsc.eval.interp.judges.prompts import Request, test_request
from bsc.eval.interp.judges.reply import Reply
from bsc.eval.interp.ledger import Ledger, key_of
from bsc.eval.interp.predictability import contexts_of_tokens, predictability
from bsc.eval.passes.codes import LatentCode
from bsc.versions import versions

ANSWER = json.dumps({
    "object": "chat.completion", "model": "simulated-bench",
    "choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": '{"1": 0, "2": 1, "3": 1, "4": 0}'}}],
    "usage": {"prompt_tokens": 400, "completion_tokens": 20},
}).encode()  # fmt: skip


async def _serve(latency: float, pipe: Pipe) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}"
        try:
            while True:
                header = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in header.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                writer.write(head.encode() + b"\r\n\r\n" + ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


def _server(latency: float, pipe: Pipe) -> None:
    asyncio.run(_serve(latency, pipe))


def prompts(n: int) -> list[Request]:
    """Fuzzing questions of five excerpts of 32 tokens each, all different."""
    words = [[(f" word{j} {i}", j == 9) for j in range(32)] for i in range(5)]
    return [test_request("fuzzing", "coder", i, 0, f"words like {i}", words) for i in range(n)]


def through_the_ledger(url: str, requests: list[Request], concurrency: int) -> float:
    """Seconds of the whole path."""
    judge = Endpoint(EndpointConfig(url, "simulated-bench", concurrency=concurrency))
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.jsonl") as ledger:
        keys = {id(r): key_of(judge.model, judge.parameters, r) for r in requests}

        def asked(request: Request, reply: Reply) -> None:
            assert reply.status == "ok", reply
            ledger.add(keys[id(request)], judge.model, request, reply)

        started = time.perf_counter()
        judge.ask(requests, asked)
        seconds = time.perf_counter() - started
        assert len(ledger) == len(requests)
    return seconds


async def _bare(url: str, requests: list[Request], concurrency: int) -> None:
    source = iter(requests)

    async def worker(client: httpx.AsyncClient) -> None:
        for request in source:
            body = {"model": "m", "messages": list(request.messages)}
            (await client.post(f"{url}/chat/completions", json=body)).json()

    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))


def alone(url: str, n: int = 200) -> float:
    """Seconds that the judge takes for one prompt at a time, over a plain socket."""
    port = int(url.split(":")[2].split("/")[0])
    message = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}"
    times = []
    with socket.create_connection(("127.0.0.1", port)) as server:
        for _ in range(n):
            started = time.perf_counter()
            server.sendall(message)
            got = b""
            while not got.endswith(ANSWER):
                got += server.recv(65_536)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def bench_judge(n: int, concurrency: int, latency: float, repeats: int) -> dict[str, Any]:
    """Ratios to the ideal time, whole path and httpx alone, alternating."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_server, args=(latency, theirs), daemon=True
    )
    process.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    requests, ideal = prompts(n), math.ceil(n / concurrency) * latency
    through_the_ledger(url, requests[: 4 * concurrency], concurrency)
    whole, bare, latency_alone = [], [], alone(url)
    print(f"the judge alone takes {1e3 * latency_alone:.1f} ms a prompt")
    for i in range(repeats):
        whole.append(through_the_ledger(url, requests, concurrency) / ideal)
        started = time.perf_counter()
        asyncio.run(_bare(url, requests, concurrency))
        bare.append((time.perf_counter() - started) / ideal)
        print(f"judge {i}: whole / ideal {whole[-1]:.3f}, bare httpx / ideal {bare[-1]:.3f}")
    process.terminate()
    return {
        "prompts": n, "concurrency": concurrency, "latency_s": latency, "ideal_s": ideal,
        "alone_s": latency_alone,
        "whole_over_ideal": whole, "bare_over_ideal": bare,
    }  # fmt: skip


def synthetic_code(ids: np.ndarray, latents: int, l0: float) -> LatentCode:
    """Firings at power-law rates; every fourth latent fires on one token and at random besides."""
    rng = np.random.default_rng(0)
    n = len(ids)
    rates = rng.pareto(1.0, latents) + 0.05
    for _ in range(20):
        rates = np.minimum(rates * (l0 / rates.sum()), 0.6)
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(ids.max() + 2))
    rows = []
    for i, p in enumerate(rates):
        gaps = rng.geometric(p, size=int(n * p * 1.05) + 50)
        own = np.cumsum(gaps) - 1
        own = own[own < n]
        if i % 4 == 0:
            token = 20 + i
            own = np.union1d(own, order[starts[token] : starts[token + 1]])
        rows.append(own.astype(np.uint32))
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return LatentCode(offsets, np.concatenate(rows), np.ones(int(offsets[-1]), np.float32))


def bench_predictability(tokens: int, latents: int) -> dict[str, Any]:
    """Seconds and peak memory for all latents of a coder."""
    rng = np.random.default_rng(1)
    share = 1 / np.arange(2, 49_154)
    ids = rng.choice(49_152, size=tokens, p=share / share.sum()).astype(np.uint32)
    doc_id, position = np.arange(tokens) // 700, np.arange(tokens) % 700
    code = synthetic_code(ids, latents, 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started = time.perf_counter()
    division = divide(doc_id, np.zeros(tokens, np.uint64))
    contexts = contexts_of_tokens(ids, doc_id, position, np.ones(tokens, bool), division)
    found = predictability(code, contexts)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    tied = np.arange(latents) % 4 == 0
    auc = [float(np.nanmean(found.auc[which])) for which in (tied, ~tied)]
    assert abs(auc[1] - 0.5) < 0.01 < auc[0] - auc[1]
    print(f"predictability: {seconds:.1f} s, peak {peak:.2f} GB; mean AUC tied {auc[0]:.3f}, "
          f"random {auc[1]:.3f}")  # fmt: skip
    return {
        "tokens": tokens, "latents": latents, "firings": int(code.offsets[-1]), "seconds": seconds,
        "peak_gb": peak, "of_it_before_gb": before, "auc_tied": auc[0], "auc_random": auc[1],
    }  # fmt: skip


def main() -> None:
    """Run both and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--latents", type=int, default=4_096)
    a = parser.parse_args()
    result = {
        "predictability": bench_predictability(a.tokens, a.latents),
        "judge": bench_judge(a.prompts, a.concurrency, a.latency, a.repeats),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor()},
        "versions": versions() | {"httpx": httpx.__version__},
    }
    ratios = result["judge"]["whole_over_ideal"]
    print(f"median whole / ideal {statistics.median(ratios):.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
