"""Reading a store in object storage: batches, beside plain requests for the same objects.

A server of the S3 protocol on this machine, in a process of its own, which can be made to answer
late, as one far away does. In turn, each with an empty cache of shards:

* get 1, get 8: every shard once by plain requests, one or eight at a time: the ceiling.
* loader 1, loader 8: an epoch of batches, with one shard or eight got at a time.
* warm: the same epoch from the cache.

The last line is JSON.

    python -m benchmarks.bench_remote --shards 24 --late 0.02
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_scale import Played
from benchmarks.measure import machine, spread
from bsc.cache.store import remote
from bsc.cache.store.layout import shard_key
from bsc.cache.store.loader import Loader
from bsc.cache.store.store import ActivationStore
from bsc.versions import versions

BUCKET = "remote"
ROWS = 16_384


def serve(port: int, late: float) -> None:
    """Serve buckets from memory; answers to GET come `late` seconds later."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)

    def slow(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and "/c/" in environ["PATH_INFO"]:
            time.sleep(late)
        return app(environ, start_response)

    run_simple("127.0.0.1", port, slow, threaded=True)


def epoch(url: str, names: tuple[str, ...], at_once: int) -> int:
    """Rows of an epoch."""
    remote._FETCHES = at_once
    loader = Loader(ActivationStore(url, check=False).train, names, batch_rows=2048, seed=0)
    return sum(len(x) for x, _ in loader.epoch_batches(0))


def main() -> None:
    """Make the store, read it, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--late", type=float, default=0.02, help="Seconds before each answer.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_473)
    arguments = parser.parse_args()
    server = get_context("spawn").Process(target=serve, args=(arguments.port, arguments.late))
    server.start()
    work = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        result = measure(work, arguments.port, arguments.shards, arguments.repeats)
    finally:
        server.kill()
        shutil.rmtree(work)
    facts = {
        "benchmark": "remote", "shards": arguments.shards, "late_seconds": arguments.late,
        "result": result, "machine": machine(torch.device("cpu")), "cores": os.cpu_count(),
        "system": platform.platform(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(facts))


def measure(work: Path, port: int, shards: int, repeats: int) -> dict[str, Any]:
    """Each way of reading in turn."""
    import boto3

    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "id", "AWS_REGION": "us-east-1",
        "AWS_SECRET_ACCESS_KEY": "secret", "BSC_SHARD_CACHE": str(work / "cache"),
        "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip
    s3 = boto3.resource(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="id",
        aws_secret_access_key="secret",
    )  # fmt: skip
    time.sleep(3.0)  # the server starts
    s3.create_bucket(Bucket=BUCKET)
    played = Played(f"s3://{BUCKET}/acts", shards, 1, None, rows=ROWS)
    played.write()
    names = tuple(n for n, s in played.specs.items() if s.width is not None)
    keys = [shard_key(played.specs[n], i) for i in range(shards) for n in names]
    size = shards * sum(played.specs[n].shard_bytes(played.grid) for n in names)

    def get(at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            found = sum(pool.map(lambda key: len(played.folder.read(key)), keys))
        assert found == size

    ways: dict[str, Callable[[], object]] = {
        "get 1": lambda: get(1),
        "get 8": lambda: get(8),
        "loader 1": lambda: epoch(played.where, names, 1),
        "loader 8": lambda: epoch(played.where, names, 8),
        "warm": lambda: epoch(played.where, names, 8),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            if name != "warm":
                shutil.rmtree(work / "cache", ignore_errors=True)
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    mb = {n: spread([size / 1e6 / s for s in found]) for n, found in seconds.items()}
    over = statistics.median(seconds["loader 1"]) / statistics.median(seconds["loader 8"])
    return {"bytes": size, "mb_per_second": mb, "eight_over_one": round(over, 2)}


if __name__ == "__main__":
    main()
