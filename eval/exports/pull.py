"""`bsc pull`: a run from the Hugging Face hub, checked, in a folder of its own.

Files are fetched beside the folder, by the names that a run has and no others, and moved into place
when all of them are there and what they should be. A pull that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bsc.errors import StoreError, UserError
from bsc.eval.evaluation import EvaluationFolder
from bsc.eval.exports.publish import without_places
from bsc.files import check_new_folder
from bsc.hub import Repository, parse_address
from bsc.progress import console, format_bytes, stage
from bsc.train.coders.repository import (
    CODER_FILES,
    REPOSITORY_FILE,
    PushedFile,
    PushedRun,
    check_sizes,
    fetch_checked,
    read_pushed,
)
from bsc.train.run import Run, claim
from bsc.train.run_config import Pulled, RunConfig
from bsc.typed import parse_typed, write_typed

__all__ = ["pull_run"]

_OPTIONAL = ("metrics.jsonl", "eval.json", "eval/documents.safetensors", "eval/examples.json")
_MOST = 4 << 30
"""Bytes of a file that is none of a coder's: metrics of a thousand coders take a tenth of it."""
_NOTHING = PushedFile(bytes=0, sha256="")


def pull_run(text: str, out: str | Path | None = None) -> Run:
    """Download a run.

    Args:
        text: `owner/name[@revision]`, with or without `hub://`.
        out: a folder that is new or empty; None: runs/ and the name of the repository.

    Returns:
        The run, whose config says where it came from.

    Raises:
        UserError: there is no such repository, or the folder cannot be written.
        StoreError: it is no run, only a part of one, or damaged; nothing is left then.
    """
    address = parse_address(text)
    if address.path:
        raise UserError(
            f"{text}: a run is the whole of a repository. One coder of it: "
            f"bsc.SparseCoder.load({str(address)!r})."
        )
    # Resolved: a link to an empty folder is one, and "." is a name.
    folder = (Path(out) if out else Path("runs") / address.repo.rpartition("/")[2]).resolve()
    check_new_folder(folder, "run")
    repository, pushed = read_pushed(text)
    started = folder.parent / f".{folder.name}.{repository.commit[:12]}.partial"
    started.mkdir(parents=True, exist_ok=True)
    try:
        with claim(started):  # which another pull may be filling
            _fetch(repository, pushed, started, folder.name)
            folder.mkdir(exist_ok=True)
            # The config last, without which it is no run.
            for path in sorted(started.iterdir(), key=lambda p: p.name == "config.json"):
                if not path.name.startswith("."):
                    path.rename(folder / path.name)
    except StoreError:
        shutil.rmtree(started, ignore_errors=True)
        raise
    shutil.rmtree(started)
    return Run(Path(out) if out else folder)


def _fetch(repository: Repository, pushed: PushedRun, folder: Path, name: str) -> None:
    """Everything of the run, into a folder."""
    address, fetched = repository.address, folder / "fetched"
    if pushed.files.get("config.json", _NOTHING).bytes > _MOST:
        raise StoreError(f"{address}: its config.json is too large to be that of a run.")
    config = Run(fetch_checked(repository, pushed, "config.json", fetched).parent).config()
    places = _places(repository, pushed, config)
    total = sum(pushed.files[source].bytes for source in places.values())
    there = sum((fetched / s).stat().st_size for s in places.values() if (fetched / s).exists())
    free = shutil.disk_usage(folder).free + there
    if total > free:
        raise UserError(
            f"{address}: has {format_bytes(total)}, and {folder.parent} {format_bytes(free)} free."
        )
    console.print(
        f"{address}: {len(places)} files, {format_bytes(total)}, commit {repository.commit}",
        markup=False, highlight=False,
    )  # fmt: skip
    with stage("pull", total, "bytes") as progress:
        for source in places.values():
            fetch_checked(repository, pushed, source, fetched)
            progress.advance(pushed.files[source].bytes)
    for place, source in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (fetched / source).rename(folder / place)
    shutil.rmtree(fetched)
    run = Run(folder)
    pulled = Pulled(repository=address.repo, commit=repository.commit)
    # A place that somebody else wrote is not gone to: the store is named, not its address.
    bare = parse_typed(RunConfig, without_places(config.to_json()), run.config_path)
    write_typed(run.config_path, bare.model_copy(update={"name": name, "pulled": pulled}))
    for planned in config.coders:
        coder = run.coder(planned.name)
        if (coder.config, coder.about.get("hookpoint")) != (planned.coder, planned.hookpoint):
            raise StoreError(f"{address}: coder {planned.name} is not what config.json says.")
    if run.eval_path.exists():
        EvaluationFolder(run).read()


def _places(repository: Repository, pushed: PushedRun, config: RunConfig) -> dict[str, str]:
    """Files of the run: their place in it, and in the repository.

    Raises:
        StoreError: the run has other coders than are there, or files are larger than they can be.
    """
    address = repository.address
    if {c.name for c in config.coders} != set(pushed.coders):
        raise StoreError(f"{address}: its config.json and {REPOSITORY_FILE} name other coders.")
    places = {"config.json": "config.json"}
    for optional in _OPTIONAL:
        for source in (optional, optional.replace("/", "-")):  # by layout
            if source in pushed.files:
                places.setdefault(optional, source)
    for source in places.values():
        if pushed.files[source].bytes > _MOST:
            raise StoreError(
                f"{address}: {source} claims {format_bytes(pushed.files[source].bytes)}, which is "
                f"more than such a file has."
            )
    for one in config.coders:
        folder = pushed.coders[one.name]
        check_sizes(repository, pushed, folder, one.coder)
        for file in (*CODER_FILES, "firing.safetensors"):
            if f"{folder}/{file}" in pushed.files:
                places[f"coders/{one.name}/{file}"] = f"{folder}/{file}"
    return places
