"""The Hugging Face hub: whether it answers, what an address means, files of one commit.

Its clients try again for half a minute and more, and print each attempt; without a network one
question beforehand saves that. What a repository says of itself is not trusted: names that lead
out of a folder are refused before anything is fetched.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from bsc.errors import UserError

__all__ = [
    "SCHEME",
    "HubAddress",
    "Repository",
    "as_user_error",
    "check_file_name",
    "hub_address",
    "hub_answers",
    "open_repository",
    "parse_address",
    "sha256_of",
]

SCHEME = "hub://"
_SECONDS = 6.0
"""For one request, and for finding the address of the host, which has no timeout of its own."""
_answered: list[str] = []
_REPOSITORY = r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)"
_REVISION = r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.%-]+))?"
_ADDRESS = re.compile(rf"(?:hub://)?{_REPOSITORY}{_REVISION}(?P<path>/.*)?")


def hub_address() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def hub_answers() -> bool:
    """Whether there is any answer from the hub; no, where HF_HUB_OFFLINE says not to ask.

    Asked until there was one.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if _answered:
        return True

    def ask() -> None:
        try:
            httpx.head(hub_address(), timeout=_SECONDS)
            _answered.append(hub_address())
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS + 1)
    return bool(_answered)


class HubAddress(NamedTuple):
    """`hub://owner/name[@revision][/path]`, taken apart."""

    repo: str
    """owner/name."""
    revision: str | None
    """A branch, a tag or a commit; None: what the hub calls main."""
    path: str
    """In the repository, without slashes at its ends; empty for all of it."""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}{'/' if self.path else ''}{self.path}"


def parse_address(text: str) -> HubAddress:
    """What an address names; `hub://` may be left out.

    Raises:
        UserError: it is no address.

    >>> parse_address("hub://owner/name@refs/pr/1/layers.3.mlp")
    HubAddress(repo='owner/name', revision='refs/pr/1', path='layers.3.mlp')
    """
    match = _ADDRESS.fullmatch(text)
    path = (match["path"] or "").strip("/") if match else ""
    if match is None or ".." in PurePosixPath(path).parts or not path.isprintable():
        raise UserError(
            f"{text}: should be hub://owner/name, hub://owner/name@revision or either with a "
            f"path in the repository, such as hub://owner/name/layers.3.mlp."
        )
    revision = match["revision"]
    return HubAddress(match["repo"], revision and unquote(revision), path)


def check_file_name(name: str, where: object) -> None:
    """See that a file of a repository stays below the folder that it is put into.

    Raises:
        UserError: its name leads out of it, or is none that anybody would give.
    """
    parts = PurePosixPath(name).parts
    odd = "\\" in name or ":" in name or not name.isprintable() or str(PurePosixPath(name)) != name
    if odd or ".." in parts or name.startswith("/"):
        raise UserError(f"{where}: holds a file called {name!r:.80}, which is not fetched.")


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    address: HubAddress
    commit: str
    sizes: dict[str, int] | None
    """Bytes by file; None without a network, where what was fetched before is all there is."""
    private: bool = False

    def fetch(self, name: str, into: Path | None = None) -> Path:
        """Download a file, unless it was downloaded before.

        Args:
            name: of the file in the repository.
            into: a folder; None: the cache of the hub's client.

        Raises:
            UserError: its name leads out of the folder, or it cannot be fetched.
        """
        from huggingface_hub import hf_hub_download

        check_file_name(name, self.address)
        known: dict[str, Any] = {"local_files_only": self.sizes is None}
        with as_user_error(self.address):
            return Path(
                hf_hub_download(
                    self.address.repo, name, revision=self.commit, local_dir=into, **known
                )
            )


def open_repository(address: HubAddress, known: str | None = None) -> Repository:
    """The files of a repository at the commit that its revision means now.

    Args:
        address: of it.
        known: a file that it should have, by which a copy in the cache is found where the hub does
            not answer; None: without an answer there is nothing to be done.

    Raises:
        UserError: nothing answers, or there is no such repository or revision.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    if hub_answers():
        with as_user_error(address):
            info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
            sizes = {s.rfilename: int(s.size or 0) for s in info.siblings or ()}
            if known in sizes:  # so that the cache has what the revision means, for no network
                hf_hub_download(address.repo, known, revision=address.revision)
        return Repository(address, str(info.sha), sizes, bool(info.private))
    cached = known and try_to_load_from_cache(address.repo, known, revision=address.revision)
    if isinstance(cached, str):  # snapshots/<commit>/<file>
        commit = Path(cached).parts[-1 - len(PurePosixPath(known or "").parts)]
        return Repository(address, commit, None)
    before = ", and it was not downloaded before" if known else ""
    raise UserError(
        f"{address}: {hub_address()} does not answer{before}. Is there a network, or is "
        f"HF_HUB_OFFLINE set? What was downloaded elsewhere can be used as a folder."
    )


@contextmanager
def as_user_error(what: object, doing: str = "be fetched") -> Iterator[None]:
    """A block that asks the hub, whose errors become one line without a token.

    Args:
        what: is asked for, for the message.
        doing: what cannot be done.

    Raises:
        UserError: whatever the client raised, or the HTTP library below it, by version.
    """
    from huggingface_hub import get_token

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        status: int | None = None
        while cause is not None and status is None:
            status = getattr(getattr(cause, "response", None), "status_code", None)
            cause = cause.__cause__
        said = next(iter(str(error).splitlines()), repr(error))
        if token := get_token():
            said = said.replace(token, "***")
        if doing == "be fetched" and status in (401, 403, 404):
            said = "no such repository or revision, or it is private"
        elif status in (401, 403):
            said = (
                f"{said:.120}: log in with `hf auth login`, or set HF_TOKEN to a token that may "
                f"write there"
            )
        raise UserError(f"{what}: cannot {doing} ({said:.300}).") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
