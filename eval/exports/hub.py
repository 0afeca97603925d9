"""Coders on the Hugging Face hub, as a folder: `hub://owner/name[@revision][/path/in/repository]`.

Asked is for the list of files first. Only files that formats here read are fetched, of one commit,
and only where all of them are of a size that somebody may have meant.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bsc.cache.model.hub import hub_address, hub_answers
from bsc.errors import UserError
from bsc.progress import format_bytes

__all__ = ["SCHEME", "Fetched", "fetch"]

SCHEME = "hub://"
_ADDRESS = re.compile(r"hub://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?P<path>/.*)?")
_WANTED = re.compile(
    r"(.*/)?(cfg\.json|config\.json|config\.yaml|ae\.pt|sae\.safetensors|"
    r"sae_weights\.safetensors|layer_\d+\.safetensors)"
)
_MOST_BYTES = 10 << 30


class Fetched(NamedTuple):
    """What was fetched."""

    folder: Path
    """The path of the address, in the cache of the hub's client."""
    repository: str
    commit: str
    path: str
    """In the repository; empty for the whole of it."""


def fetch(address: str) -> Fetched:
    """Download the coders that an address names.

    Raises:
        UserError: the address is none, nothing answers, the repository or revision is not there,
            or has no coders, strange names or more than 10 GiB of them.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision, path = _parsed(address)
    if not hub_answers():
        raise UserError(
            f"{address}: {hub_address()} does not answer. Is there a network, or is HF_HUB_OFFLINE "
            f"set? A folder that was downloaded elsewhere can be imported as it is."
        )
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        names = {s.rfilename: s.size for s in info.siblings or ()}
        commit = str(info.sha)
        wanted = _wanted(address, names, path)
        folder: Path | None = None
        for name in wanted:
            file = Path(hf_hub_download(repo, name, revision=commit))
            folder = Path(*file.parts[: len(file.parts) - len(PurePosixPath(name).parts)])
    except UserError:
        raise
    except Exception as error:  # of the client and of the HTTP library below it, by version
        status: Any = getattr(getattr(error, "response", None), "status_code", None)
        said = next(iter(str(error).splitlines()), repr(error))
        if status in (401, 403, 404):
            said = "no such repository or revision, or it is private"
        raise UserError(f"{address}: cannot be fetched ({said:.200}).") from None
    assert folder is not None
    return Fetched(folder / path, repo, commit, path)


def _parsed(address: str) -> tuple[str, str | None, str]:
    """Repository, revision and path of an address."""
    match = _ADDRESS.fullmatch(address)
    path = (match["path"] or "").strip("/") if match else ""
    if match is None or ".." in PurePosixPath(path).parts or not path.isprintable():
        raise UserError(
            f"{address}: should be hub://owner/name, hub://owner/name@revision or either with a "
            f"path in the repository, such as hub://owner/name/layers.3.mlp."
        )
    return match["repo"], match["revision"], path


def _wanted(address: str, names: dict[str, int | None], path: str) -> list[str]:
    """Files of coders below a path."""
    inside = [n for n in names if not path or n.startswith(f"{path}/")]
    wanted = sorted(n for n in inside if _WANTED.fullmatch(n))
    for name in wanted:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or "\\" in name or not name.isprintable():
            raise UserError(f"{address}: holds a file called {name!r:.80}, which is not fetched.")
    if not wanted:
        raise UserError(
            f"{address}: no files of a coder here; the repository has "
            f"{', '.join(sorted(names)[:6]) or 'none'}{', ...' if len(names) > 6 else ''}."
        )
    total = sum(names[n] or 0 for n in wanted)
    if total > _MOST_BYTES:
        raise UserError(
            f"{address}: {len(wanted)} files of {format_bytes(total)}, more than "
            f"{format_bytes(_MOST_BYTES)}. Name a path of the repository."
        )
    return wanted
