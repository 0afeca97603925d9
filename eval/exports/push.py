"""`bsc push`: a run as a repository of the Hugging Face hub, in one commit.

Layout `run` keeps the folders of a run and puts coders in formats of other tools beside them:

    README.md, bsc.json, config.json, metrics.jsonl, eval.json, eval/
    coders/<hookpoint>/<coder>/
    <format>/<place>/

Layout `sparsify` has nothing but a folder for each hookpoint, with a coder in sparsify's format and
in ours, and files beside these folders, which is what sparsify's `load_many` takes:

    README.md, bsc.json, config.json, metrics.jsonl, eval.json, eval-documents.safetensors, ...
    <hookpoint>/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from bsc.errors import UserError, nearest
from bsc.eval.exports.card import Tool, model_card
from bsc.eval.exports.export import WEIGHT_FORMATS, export_coders, refusals
from bsc.eval.exports.publish import Published, publish, text_facts
from bsc.eval.exports.target import (
    CARD,
    changes,
    check_pushed,
    find_target,
    keeps_card,
    pushed_before,
)
from bsc.eval.passes.setting import open_store
from bsc.hub import (
    HubAddress,
    Repository,
    as_user_error,
    hub_address,
    hub_answers,
    open_repository,
    parse_address,
    sha256_of,
)
from bsc.train.coders.repository import (
    REPOSITORY_FILE,
    REPOSITORY_VERSION,
    PushedFile,
    PushedRun,
)
from bsc.train.run import Run
from bsc.typed import write_typed

__all__ = ["Upload", "push_run"]

_LAYOUTS = ("run", "sparsify")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Upload:
    """What is about to be uploaded."""

    repo: str
    """owner/name."""
    new: bool
    """Whether the repository is made."""
    private: bool
    files: dict[str, Path]
    """By name in the repository."""
    replaced: list[str]
    """Names of those that are there already."""
    removed: list[str]
    """Files of an earlier push that go."""
    card: str
    """Text of README.md."""
    warnings: list[str]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def push_run(
    run: Run,
    repo: str,
    *,
    licence: str,
    confirm: Callable[[Upload], bool],
    coders: Sequence[str] = ("*",),
    also: Sequence[str] = (),
    layout: str = "run",
    private: bool = False,
    examples: bool = False,
    card: str | None = None,
    store: str | Path | None = None,
) -> str | None:
    """Upload a run.

    Args:
        run: a run whose training has ended.
        repo: owner/name of a repository that is new, or that an earlier push made.
        licence: of the weights, as the hub spells it.
        confirm: is shown what would be uploaded, and says whether to.
        coders: names, parts of names or patterns; those that turned non-finite stay.
        also: formats of other tools to write those coders in that they can hold.
        layout: of the repository.
        private: whether a new repository is private; an existing one has to be.
        examples: whether the contexts of the report go too, which are text of the corpus.
        card: what becomes of a README.md that is there and that no push wrote as it is:
            ``"keep"`` or ``"replace"``; None: it is an error.
        store: where the store is now, for checking what is written for other tools.

    Returns:
        The commit; None where it was not confirmed.

    Raises:
        UserError: it cannot be published like this, or the hub refuses. What `bsc pull` takes has
            changed only where the message names the new commit.
    """
    address = _checked_request(repo, licence, also, layout, card)
    names, warnings = _whole_coders(run, coders)
    with TemporaryDirectory(prefix="bsc-push-") as temporary:
        folder = Path(temporary)
        published = publish(run, names, folder / "run", examples=examples)
        if published.evaluation is None:
            warnings.append(f"not evaluated, so the card has no figures: bsc eval {run.folder}")
        folders = _folders(published, layout)
        files = {_place(name, folders, layout): path for name, path in published.files.items()}
        tools = _write_formats(run, published, also, layout, folder, files, store)
        text = model_card(
            address.repo, published, folders, licence, tools, _text_of(run, store, warnings)
        )
        there = find_target(address, private=private)
        before = pushed_before(there) if there else None
        (folder / CARD).write_text(text)
        if there is None or not keeps_card(there, before, card):
            files[CARD] = folder / CARD
        files[REPOSITORY_FILE] = _write_list(published, folders, files, folder)
        replaced, removed = changes(there, before, files)
        upload = Upload(
            address.repo,
            new=there is None,
            private=there.private if there else private,
            files=dict(sorted(files.items())),
            replaced=replaced,
            removed=removed,
            card=text,
            warnings=warnings,
        )
        return _commit(upload, there, run.folder.name) if confirm(upload) else None


def _checked_request(
    repo: str, licence: str, also: Sequence[str], layout: str, card: str | None
) -> HubAddress:
    address = parse_address(repo)
    if address.path or address.revision:
        raise UserError(f"{repo}: a run is pushed to owner/name, without a revision or a path.")
    if not _LICENCE.fullmatch(licence):
        raise UserError(
            f"--license {licence!r:.40}: should be a licence as the hub spells it, such as "
            f"apache-2.0, mit, cc-by-4.0 or other."
        )
    if layout not in _LAYOUTS:
        raise UserError(f"--layout {layout}: should be one of {', '.join(_LAYOUTS)}.")
    if card not in (None, "keep", "replace"):
        raise UserError(f"--card {card}: should be keep or replace.")
    if layout == "sparsify" and also:
        raise UserError(
            "--layout sparsify is sparsify's own format and nothing else, so that its load_many "
            "takes it; leave --also out, or take the layout `run`."
        )
    for one in also:
        if one not in WEIGHT_FORMATS:
            raise UserError(
                f"--also {one}: should be one of {', '.join(WEIGHT_FORMATS)}"
                f"{nearest(one, WEIGHT_FORMATS)}."
            )
    if not hub_answers():
        raise UserError(
            f"{address}: {hub_address()} does not answer. Is there a network, or is HF_HUB_OFFLINE "
            f"set?"
        )
    return address


def _whole_coders(run: Run, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The chosen coders that are finite, and a warning of the others."""
    names, broken = run.finite_names(wanted)
    if not broken:
        return names, []
    return names, [f"left out, for they turned non-finite in training: {', '.join(broken)}"]


def _folders(published: Published, layout: str) -> dict[str, str]:
    """Folder of every coder in the repository."""
    if layout == "run":
        return {name: f"coders/{name}" for name in published.names}
    hooks = {name: published.config.coder(name).hookpoint for name in published.names}
    if len(set(hooks.values())) < len(hooks):
        raise UserError(
            f"--layout sparsify has one coder for each hookpoint; here are {len(hooks)} coders at "
            f"{len(set(hooks.values()))}. Choose with --coders, or take the layout `run` with "
            f"--also sparsify."
        )
    return hooks


def _place(name: str, folders: dict[str, str], layout: str) -> str:
    """Where a file of the run is in the repository."""
    coder, _, file = name.removeprefix("coders/").rpartition("/")
    if name.startswith("coders/") and coder in folders:
        return f"{folders[coder]}/{file}"
    return name.replace("/", "-") if layout == "sparsify" else name


def _write_formats(
    run: Run, published: Published, also: Sequence[str], layout: str, folder: Path,
    files: dict[str, Path], store: str | Path | None,
) -> list[Tool]:  # fmt: skip
    """Write the coders for other tools, and say what each of these can hold."""
    names = published.names
    tools = []
    for format_ in WEIGHT_FORMATS:
        refused = refusals(run, names, format_)
        held = [n for n in names if n not in refused]
        wanted = format_ in also or (layout == "sparsify" and format_.startswith("sparsify"))
        if format_ == "sparsify-binary" and (layout == "sparsify" or "sparsify" in also):
            held = [n for n in held if published.config.coder(n).coder.code == "binary"]
        if not wanted or (layout == "sparsify" and not held):
            tools.append(Tool(format_, refused))
            continue
        if not held:
            reasons = "; ".join(dict.fromkeys(refused.values()))
            raise UserError(f"--also {format_}: it can hold none of these coders: {reasons}.")
        written = export_coders(run, held, format_, folder / format_, store=store)
        inside = "" if layout == "sparsify" else f"{format_}/"
        for path in (folder / format_).rglob("*"):
            name = path.relative_to(folder / format_).as_posix()
            if path.is_file() and not (layout == "sparsify" and name == "export.json"):
                files[f"{inside}{name}"] = path
        place = written["coders"][held[0]]["place"]
        shown = inside.strip("/") or "<hookpoint>"
        tools.append(Tool(format_, refused, shown, f"{inside}{place}", len(held)))
    if layout == "sparsify":
        stray = [n for n in published.names if f"{_folder_of(n, published)}/cfg.json" not in files]
        if stray:
            raise UserError(
                f"--layout sparsify: its formats cannot hold {', '.join(stray)}. Choose others "
                f"with --coders, or take the layout `run`."
            )
    return tools


def _folder_of(name: str, published: Published) -> str:
    return published.config.coder(name).hookpoint


def _text_of(run: Run, store: str | Path | None, warnings: list[str]) -> dict[str, str]:
    """What the store knows of its text, where it can be reached."""
    try:
        return text_facts(open_store(run, store).provenance())
    except UserError as error:
        if store is not None:
            raise
        warnings.append(f"the card does not say which text it was ({error})")
        return {}


def _write_list(
    published: Published, folders: dict[str, str], files: dict[str, Path], folder: Path
) -> Path:
    listed = {n: PushedFile(bytes=p.stat().st_size, sha256=sha256_of(p)) for n, p in files.items()}
    card = listed.pop(CARD, None)  # which people edit there
    record = PushedRun(
        version=REPOSITORY_VERSION, run=published.config.name, coders=folders, files=listed,
        card=card.sha256 if card else None,
    )  # fmt: skip
    write_typed(folder / REPOSITORY_FILE, record)
    return folder / REPOSITORY_FILE


def _commit(upload: Upload, there: Repository | None, run: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, address = HfApi(), parse_address(upload.repo)
    with as_user_error(address, "be made"):
        if there is None:
            api.create_repo(upload.repo, private=upload.private or None)
            there = open_repository(address)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        for name, path in upload.files.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in upload.removed]
    with as_user_error(
        f"{address}: nothing has changed there but what is uploaded and not yet committed; run the "
        f"same command again. It", "be pushed"
    ):  # fmt: skip
        done = api.create_commit(
            upload.repo, operations, commit_message=f"bsc push {PurePosixPath(run).name}",
            parent_commit=there.commit,
        )  # fmt: skip
    commit = str(done.oid)
    check_pushed(address._replace(revision=commit), upload.files)
    return commit
