"""Coders in a repository of the Hugging Face hub, as `bsc push` lays them out.

    bsc.json        which files belong together, their sizes and SHA-256, and where each coder is
    <folder>/       of a coder, as SparseCoder.save writes it

bsc.json goes up in the same commit as the files. A repository without it, or with other files than
it says, is not taken: it is none of these, or only a part of one.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import field_validator

from bsc.config import parse_config
from bsc.errors import StoreError, UserError
from bsc.hub import Repository, check_file_name, open_repository, parse_address, sha256_of
from bsc.progress import format_bytes
from bsc.records import parse_object, parse_record, read_file
from bsc.train.coders.coder import parameter_shapes
from bsc.train.coders.config import CoderConfig
from bsc.train.coders.naming import full_name
from bsc.typed import Record, parse_typed

__all__ = [
    "CODER_FILES", "REPOSITORY_FILE", "REPOSITORY_VERSION", "PushedFile", "PushedRun",
    "check_sizes", "fetch_checked", "fetch_coder", "listed_files", "read_pushed",
]  # fmt: skip

REPOSITORY_FILE = "bsc.json"
REPOSITORY_VERSION = 1
CODER_FILES = ("config.json", "coder.safetensors")
_MOST_LISTED = 64 << 20
"""Bytes of bsc.json; a thousand coders take a hundredth of it."""
_HEADER = 1 << 20
"""Bytes that a file may have beside its tensors."""
_REMEDY = "Ask whoever pushed it, or take another revision."


class PushedFile(Record):
    """A file of the repository."""

    bytes: int
    sha256: str


class PushedRun(Record):
    """What bsc.json holds."""

    version: int
    run: str
    """Name of the run."""
    coders: dict[str, str]
    """Folder in the repository, by the name of the coder in its run."""
    files: dict[str, PushedFile]
    """Every file that was pushed but this one and the card."""
    card: str | None = None
    """SHA-256 of README.md as it was pushed, by which an edited one is known."""

    @field_validator("coders")
    @classmethod
    def _apart(cls, coders: dict[str, str]) -> dict[str, str]:
        if not coders or len(set(coders.values())) < len(coders):
            raise ValueError("every coder should have a folder of its own")
        return coders


def read_pushed(text: str) -> tuple[Repository, PushedRun]:
    """What a repository holds, found to be whole by its list.

    Args:
        text: address of it, as `bsc.hub.parse_address` takes it.

    Raises:
        UserError: there is no such repository or revision.
        StoreError: `bsc push` did not write it, or it lacks a file.
    """
    address = parse_address(text)
    repository = open_repository(address, REPOSITORY_FILE)
    sizes = repository.sizes
    if sizes is not None and REPOSITORY_FILE not in sizes:
        raise StoreError(
            f"{address}: no {REPOSITORY_FILE} here, so it is no run that `bsc push` wrote, or only "
            f"a part of one. Coders of other tools come in with `bsc import {address}`."
        )
    pushed = listed_files(repository)
    for name, folder in pushed.coders.items():
        for file in CODER_FILES:
            if f"{folder}/{file}" not in pushed.files:
                raise StoreError(f"{address}: {REPOSITORY_FILE} lists no {file} of coder {name}.")
    for name, listed in pushed.files.items():
        check_file_name(name, address)
        if sizes is not None and sizes.get(name) != listed.bytes:
            found = f"{sizes[name]:,} bytes" if name in sizes else "not there"
            raise StoreError(
                f"{address}: not whole: {name} should have {listed.bytes:,} bytes and is {found}. "
                f"{_REMEDY}"
            )
    return repository, pushed


def listed_files(repository: Repository) -> PushedRun:
    """What bsc.json says, which may not be so.

    Raises:
        UserError: it cannot be fetched.
        StoreError: it is damaged.
    """
    address, sizes = repository.address, repository.sizes
    if sizes is not None and sizes[REPOSITORY_FILE] > _MOST_LISTED:
        raise StoreError(f"{address}: its {REPOSITORY_FILE} is too large to be a list of files.")
    where = Path(f"{address.repo}/{REPOSITORY_FILE}")
    raw = read_file(repository.fetch(REPOSITORY_FILE), "list of files", _REMEDY)
    record = parse_record(raw, where, REPOSITORY_VERSION, _REMEDY)
    return parse_typed(PushedRun, record, where, _REMEDY)


def check_sizes(
    repository: Repository, pushed: PushedRun, folder: str, config: CoderConfig | None = None
) -> None:
    """See that the files of a coder are not larger than such a coder can be.

    Args:
        repository: where they are.
        pushed: its list.
        folder: of the coder.
        config: what it is; None: not known yet, which is enough for its config.json.

    Raises:
        StoreError: one is, or a file is missing.
    """
    most = {"config.json": _HEADER}
    if config is not None:
        numbers = sum(math.prod(shape) for shape in parameter_shapes(config).values())
        most["coder.safetensors"] = 8 * (numbers + config.n_latents) + _HEADER
        most["firing.safetensors"] = 64 * config.n_latents + _HEADER
    for file, bound in most.items():
        listed = pushed.files.get(f"{folder}/{file}")
        if listed is not None and listed.bytes > bound:
            raise StoreError(
                f"{repository.address}: {folder}/{file} claims {format_bytes(listed.bytes)}, and "
                f"such a file of this coder has {format_bytes(bound)} at most."
            )


def fetch_checked(
    repository: Repository, pushed: PushedRun, name: str, into: Path | None = None
) -> Path:
    """Download a file that is what bsc.json says.

    Raises:
        UserError: it cannot be fetched.
        StoreError: it is another one.
    """
    if name not in pushed.files:
        raise StoreError(f"{repository.address}: {REPOSITORY_FILE} lists no {name}.")
    path = repository.fetch(name, into)
    listed = pushed.files[name]
    if path.stat().st_size != listed.bytes or sha256_of(path) != listed.sha256:
        raise StoreError(
            f"{repository.address}: {name} is not the file that {REPOSITORY_FILE} lists. Remove "
            f"{path} and try again; where that does not help, ask whoever pushed it."
        )
    return path


def fetch_coder(text: str) -> Path:
    """Folder of one coder, in the cache of the hub's client.

    Args:
        text: `hub://owner/name[@revision]/<coder>`: its name, or the end or a part of it,
            or its folder. It may be left out where there is one coder.

    Raises:
        UserError: there is no such repository, revision or coder, or several such coders.
        StoreError: the repository is damaged, or not one of ours.
    """
    repository, pushed = read_pushed(text)
    wanted = repository.address.path
    names = {folder: name for name, folder in pushed.coders.items()}
    if wanted in names:
        folder = wanted
    elif not wanted and len(names) == 1:
        (folder,) = names
    elif not wanted:
        raise UserError(
            f"{repository.address}: name one of its coders behind a slash: "
            f"{', '.join(pushed.coders)}."
        )
    else:
        folder = pushed.coders[full_name(wanted, list(pushed.coders), repository.address)]
    check_sizes(repository, pushed, folder)
    path = fetch_checked(repository, pushed, f"{folder}/config.json")
    stated = parse_object(path.read_bytes(), path).get("coder")
    config = parse_config(CoderConfig, stated if isinstance(stated, dict) else {}, str(path))
    check_sizes(repository, pushed, folder, config)
    return fetch_checked(repository, pushed, f"{folder}/coder.safetensors").parent
