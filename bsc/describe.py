"""What a folder is, for `bsc info`: a store or a run, in a few facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsc.cache.store.layout import DATA
from bsc.cache.store.shuffle import check_shuffle
from bsc.cache.store.split import StoreSplit
from bsc.cache.store.store import ActivationStore
from bsc.errors import StoreError
from bsc.formats import percent
from bsc.progress import format_bytes
from bsc.records import expected_form, parse_json
from bsc.train.checkpoint import checkpoint_step
from bsc.train.run import Run, in_use

__all__ = ["describe", "render"]


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a store or a run.

    Raises:
        StoreError: the folder is neither.
    """
    with expected_form(str(path)):
        if "://" in str(path) or (Path(path) / DATA).exists():
            return _store(ActivationStore(path))
        path = Path(path)
        if (path / "config.json").exists() and "store_id" in _keys(path / "config.json"):
            return _run(Run(path))
    path = Path(path)
    inside = sorted(p.parent.name for p in path.glob("*/config.json"))[:5]
    inside += sorted(p.parent.name for p in path.glob(f"*/{DATA}"))[:5]
    raise StoreError(
        f"{path}: neither an activation store ({DATA} is missing) nor a run (config.json and "
        f"coders are missing)."
        + (f" Inside are {', '.join(inside)}; name one of them." if inside else "")
    )


def _store(store: ActivationStore) -> dict[str, Any]:
    provenance = store.provenance()
    capture = provenance.get("capture", {})
    facts: dict[str, Any] = {
        "kind": "store",
        "store_id": store.store_id,
        "format_version": store.attributes["version"],
        "complete": store.complete,
        "model": store.attributes["model"],
        "text": capture.get("text", {}),
        "context": store.context,
        "packing": store.packing,
        "codec": store.codec,
        "seed": capture.get("seed"),
        "window": capture.get("window"),
        "writers": store.writers,
        "bytes": store.bytes,
        "splits": {name: _split(split) for name, split in store.splits.items()},
        "hookpoints": {
            h.name: {"d_in": h.d_in, "d_out": h.d_out}
            | {side: _side(store, f"{h.name}/{side}") for side in ("input", "output")}
            for h in store.hookpoints
        },
    }
    if overlap := store.overlap:
        facts["overlap"] = _overlap(overlap)
    if store.ring is not None:
        facts["ring"] = store.ring
    elif store.train.rows:
        facts["shuffle"] = check_shuffle(store, batches=16).line()
    facts |= {k: provenance[k] for k in ("completed", "device", "started_at", "versions")
              if k in provenance}  # fmt: skip
    first = store.train.specs[f"{store.hookpoints[0].name}/input"].path
    array = f"{store.folder.address}/{DATA}/{first}"
    facts["open_elsewhere"] = [
        f"tensorstore.open({{'driver': 'zarr3', 'kvstore': 'file://{array}/'}}).result()",
        f"import bsc; zarr.open_array('{array}', mode='r')",
        f"README.md in {store.folder} has xarray, torch and numpy",
    ]
    return facts


def _overlap(found: dict[str, Any]) -> str:
    """How much of the held-out text was seen in training, in a sentence."""
    rows, runs = found["rows"], found["runs"]
    seen_rows, seen_runs = found["seen_rows"] / max(1, rows), found["seen_runs"] / max(1, runs)
    return (
        f"{percent(seen_rows, 2)} of {rows:,} held-out rows belong to {found['ngram_tokens']} "
        f"tokens in a row that stand in {found['train_rows']:,} training rows too; at most "
        f"{percent(seen_runs, 2)} of {runs:,} held-out runs of {found['run_tokens']} tokens do"
    )


def _split(split: StoreSplit) -> dict[str, Any]:
    return {
        "rows": split.rows,
        "shards": split.shards,
        "shard_rows": split.grid.shard_rows,
        "non_finite_values": split.non_finite,
    }


def _side(store: ActivationStore, name: str) -> dict[str, float]:
    """Length of the mean training row, and root mean square distance of rows from it."""
    if not store.train.rows:
        return {}
    moments = store.train.moments(name)
    return {
        "mean_norm": float(moments.mean.norm()),
        "deviation": moments.total_variance**0.5,
        "rms": float((moments.mean.square().sum() + moments.variance.sum()) / len(moments.mean))
        ** 0.5,
    }


def _keys(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return ("store_id",)  # what is wrong with it is said where it is read


def _run(run: Run) -> dict[str, Any]:
    """Facts about a run; of one that has not ended, how far it is and how to go on."""
    config = run.config()
    if "completed" not in config:
        world = int(config["world"])
        parts = [run.part(rank, world) for rank in range(world)]
        holder = next(filter(None, map(in_use, parts)), None)
        steps = min(checkpoint_step(part / "checkpoint") for part in parts)
        each = " --rank R --world " + str(world) if world > 1 else ""
        return {
            "kind": "run",
            "state": f"being trained by {holder}" if holder else "interrupted",
            "store": config["store"],
            "store_id": config["store_id"],
            "model": config["model"]["name"],
            "rows": steps * config["batch_rows"],
            "planned_rows": config["steps"] * config["batch_rows"],
            "processes": world,
            "coders": run.coder_names(),
        } | ({} if holder else {"go_on": f"{config.going_on} {run.folder}{each}"})  # fmt: skip
    return {
        "kind": "run",
        "state": "imported: trained elsewhere" if config.get("imported") else "complete",
        "store": config["store"],
        "store_id": config["store_id"],
        "model": config["model"]["name"],
        "rows": config["completed"]["rows"],
        "evaluated": run.eval_path.exists(),
        "coders": run.coder_names(),
    } | {name: config[name].to_json() for name in ("pulled", "finetuned") if name in config}


def render(facts: dict[str, Any], indent: int = 0) -> str:
    """Facts as indented lines for people.

    >>> print(render({"rows": 1000, "splits": {"train": {"bytes": 2000000}}}))
    rows: 1,000
    splits:
      train:
        bytes: 2.0 MB
    """
    lines = []
    for key, value in facts.items():
        pad = "  " * indent
        if isinstance(value, dict) and value:
            lines += [f"{pad}{key}:", render(value, indent + 1)]
        elif isinstance(value, list):
            lines += [f"{pad}{key}:", *(f"{pad}  {item}" for item in value)]
        elif key == "bytes":
            lines.append(f"{pad}{key}: {format_bytes(value)}")
        elif isinstance(value, int) and not isinstance(value, bool):
            lines.append(f"{pad}{key}: {value:,}")
        elif isinstance(value, float):
            lines.append(f"{pad}{key}: {value:.4g}")
        else:
            lines.append(f"{pad}{key}: {value}")
    return "\n".join(lines)
