"""The repository that a push goes to: what is there, what may be replaced, what arrived."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bsc.errors import StoreError, UserError
from bsc.eval.exports.export import WEIGHT_FORMATS
from bsc.hub import HubAddress, Repository, as_user_error, open_repository, sha256_of
from bsc.progress import console
from bsc.train.coders.repository import REPOSITORY_FILE, PushedRun, listed_files

__all__ = ["CARD", "changes", "check_pushed", "find_target", "keeps_card", "pushed_before"]

CARD = "README.md"
_FILES = {
    "config.json", "metrics.jsonl", "eval.json", "eval-documents.safetensors", "eval-examples.json",
}  # fmt: skip
"""Of a run, at the top of a repository."""
_NOT_OURS = {CARD, ".gitattributes", REPOSITORY_FILE}


def find_target(address: HubAddress, *, private: bool) -> Repository | None:
    """The repository as it is; None: there is none.

    Raises:
        UserError: it is public and should not be, or holds something else than a pushed run.
    """
    from huggingface_hub import HfApi

    with as_user_error(address):
        if not HfApi().repo_exists(address.repo):
            return None
    there = open_repository(address)
    if private and not there.private:
        raise UserError(
            f"{address}: is public already. Make it private there, or leave --private out."
        )
    others = sorted(set(there.sizes or {}) - _NOT_OURS)
    if others and REPOSITORY_FILE not in (there.sizes or {}):
        raise UserError(
            f"{address}: holds other things ({', '.join(others[:4])}"
            f"{', ...' if len(others) > 4 else ''}), which no `bsc push` wrote. Name a new "
            f"repository."
        )
    return there


def pushed_before(there: Repository) -> PushedRun | None:
    """What an earlier push left; None: there was none.

    Raises:
        UserError: there is a list of files that no push wrote as it is.
    """
    if REPOSITORY_FILE not in (there.sizes or {}):
        return None
    try:
        return listed_files(there)
    except StoreError as error:
        raise UserError(
            f"{error} So it is not known what there may be replaced: remove {REPOSITORY_FILE} and "
            f"what belongs to it on the hub, or name a new repository."
        ) from None


def keeps_card(there: Repository, before: PushedRun | None, card: str | None) -> bool:
    """Whether the README.md that is there stays.

    Raises:
        UserError: somebody wrote or edited it, and it was not said what becomes of it.
    """
    if CARD not in (there.sizes or {}) or card == "replace":
        return False
    if card == "keep":
        return True
    if before is None or before.card != sha256_of(there.fetch(CARD)):
        raise UserError(
            f"{there.address}: somebody wrote or edited its README.md. --card keep leaves it as it "
            f"is, --card replace puts the new one in its place."
        )
    return False


def changes(
    there: Repository | None, before: PushedRun | None, files: dict[str, Path]
) -> tuple[list[str], list[str]]:
    """Files that are replaced, and files of an earlier push that are removed.

    Raises:
        UserError: a file is there that no push wrote.
    """
    known = set(before.files) if before else set()
    present = set(there.sizes or {}) if there else set()
    replaced = present & set(files)
    if foreign := sorted(replaced - known - {CARD, REPOSITORY_FILE}):
        where = there.address if there else None
        raise UserError(
            f"{where}: {foreign[0]} is there, and no `bsc push` wrote it. Remove it on the hub, or "
            f"name a new repository."
        )
    ours = tuple(f"{folder}/" for folder in before.coders.values()) if before else ()
    ours = (*ours, "coders/", "eval/", *(f"{format_}/" for format_ in WEIGHT_FORMATS))
    gone = {n for n in known & present - set(files) if n.startswith(ours) or n in _FILES}
    return sorted(replaced), sorted(gone)


def check_pushed(address: HubAddress, files: Mapping[str, Path]) -> None:
    """See that a commit has all files.

    Raises:
        UserError: it lacks some.
    """
    try:
        now = open_repository(address).sizes or {}
    except UserError as error:
        console.print(f"{address}: pushed, and could not be looked at ({error})", markup=False)
        return
    lacking = [n for n, p in files.items() if now.get(n) != p.stat().st_size]
    if lacking:
        raise UserError(
            f"{address}: pushed, and {len(lacking)} files are not there as they were "
            f"({lacking[0]}), so `bsc pull` refuses it. Is there a .gitignore in the repository "
            f"that leaves them out? Remove it and push again."
        )
