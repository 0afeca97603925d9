"""What a folder is, for `bsc info`: a store or a run, in a few facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsc.cache.layout import DATA
from bsc.cache.store import ActivationStore
from bsc.errors import StoreError
from bsc.progress import format_bytes
from bsc.train.run import Run

__all__ = ["describe", "render"]


def describe(path: Path) -> dict[str, Any]:
    """Facts about a store or a run.

    Raises:
        StoreError: the folder is neither.
    """
    if (path / DATA).exists():
        return _store(ActivationStore(path))
    if (path / "config.json").exists() and (path / "coders").exists():
        return _run(Run.open(path))
    raise StoreError(
        f"{path}: neither an activation store ({DATA} is missing) nor a run (config.json and "
        f"coders are missing)."
    )


def _store(store: ActivationStore) -> dict[str, Any]:
    return {
        "kind": "store",
        "store_id": store.store_id,
        "complete": store.complete,
        "model": store.attributes["model"],
        "text": store.provenance().get("capture", {}).get("text", {}),
        "context": store.context,
        "bytes": store.bytes,
        "splits": {
            name: {
                "rows": split.rows,
                "shards": split.shards,
                "shard_rows": split.grid.shard_rows,
                "non_finite_values": split.non_finite,
            }
            for name, split in store.splits.items()
        },
        "hookpoints": {
            h.name: {
                "d_in": h.d_in,
                "d_out": h.d_out,
                **{
                    f"{side}_rms": (
                        store.train.moments(f"{h.name}/{side}").total_variance / width
                    ) ** 0.5
                    for side, width in (("input", h.d_in), ("output", h.d_out))
                    if store.train.rows and not store.train.non_finite
                },
            }
            for h in store.hookpoints
        },
    }  # fmt: skip


def _run(run: Run) -> dict[str, Any]:
    config = run.config()
    return {
        "kind": "run",
        "store": config["store"],
        "store_id": config["store_id"],
        "model": config["model"]["name"],
        "rows": config["completed"]["rows"],
        "evaluated": run.eval_path.exists(),
        "coders": run.coder_names(),
    }


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
