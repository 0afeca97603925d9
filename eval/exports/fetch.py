"""Coders of other tools on the hub, as a folder: `hub://owner/name[@revision][/path]`.

Asked is for the list of files first. Only files that formats here read are fetched, of one commit,
and only where all of them are of a size that somebody may have meant.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bsc.errors import UserError
from bsc.hub import Repository, check_file_name, open_repository, parse_address
from bsc.progress import format_bytes

__all__ = ["Fetched", "fetch"]

_WANTED = re.compile(
    r"(.*/)?(cfg\.json|config\.json|config\.yaml|ae\.pt|sae\.safetensors|"
    r"sae_weights\.safetensors|layer_\d+\.safetensors)"
)
_MOST_BYTES = 10 << 30


class Fetched(NamedTuple):
    """What was fetched."""

    folder: Path
    """The path of the address, in the cache of the hub's client."""
    commit: str


def fetch(text: str) -> Fetched:
    """Download the coders that an address names.

    Raises:
        UserError: the address is none, nothing answers, the repository or revision is not there,
            or has no coders, strange names or more than 10 GiB of them.
    """
    address = parse_address(text)
    repository = open_repository(address)
    root = Path()
    for name in _wanted(repository):
        file = repository.fetch(name)
        root = Path(*file.parts[: len(file.parts) - len(PurePosixPath(name).parts)])
    return Fetched(root / address.path, repository.commit)


def _wanted(repository: Repository) -> list[str]:
    """Files of coders below the path of the address."""
    address, sizes = repository.address, repository.sizes or {}
    inside = [n for n in sizes if not address.path or n.startswith(f"{address.path}/")]
    wanted = sorted(n for n in inside if _WANTED.fullmatch(n))
    for name in wanted:
        check_file_name(name, address)
    if not wanted:
        raise UserError(
            f"{address}: no files of a coder here; the repository has "
            f"{', '.join(sorted(sizes)[:6]) or 'none'}{', ...' if len(sizes) > 6 else ''}."
        )
    total = sum(sizes[n] for n in wanted)
    if total > _MOST_BYTES:
        raise UserError(
            f"{address}: {len(wanted)} files of {format_bytes(total)}, more than "
            f"{format_bytes(_MOST_BYTES)}. Name a path of the repository."
        )
    return wanted
