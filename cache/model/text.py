"""Text as a stream of documents: an embedded corpus, local files, or a dataset on the hub.

Every source yields documents in an order that the seed decides, and marks each as held out or not
by a rule that looks at its text (model/sides.py). Nothing is ever all in memory but the names
of the embedded corpora and a shuffle buffer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsc.cache.model.models import resolve_model
from bsc.cache.model.sides import held_out_documents, is_text_held_out
from bsc.cache.model.text_source import TextSource
from bsc.config import parse_config
from bsc.embedded.corpus import CORPORA, documents
from bsc.errors import UserError
from bsc.hub import hub_address, hub_answers

__all__ = [
    "TextDocument",
    "choose_text",
    "default_text",
    "fingerprint",
    "parse_text",
    "read_text",
    "resolve_dataset",
]

SHUFFLE_BUFFER = 10_000
"""Documents in the buffer that shuffles a stream."""

_BUILDERS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
_DEFAULT_DATASETS = {
    "HuggingFaceTB/SmolLM2-135M": "EleutherAI/SmolLM2-135M-10B",
    "HuggingFaceTB/SmolLM2-360M": "EleutherAI/SmolLM2-135M-10B",
    "HuggingFaceTB/SmolLM2-1.7B": "EleutherAI/SmolLM2-135M-10B",
}


class TextDocument(NamedTuple):
    """A document with its place in the stream."""

    number: int
    """Number of the document in the order of the stream: rank, rank + writers, and so on."""
    text: str
    """What decides the side: of chat messages their contents, of token ids the numbers."""
    held_out: bool
    given: list[dict[str, str]] | list[int] | None = None
    """Chat messages (`role`, `content`), of which the model's template makes text, or token ids
    that are taken as they are; None: the text."""


def default_text(model_source: str, model_name: str) -> dict[str, Any]:
    """Fields of the `TextSource` that goes with a model when none is named.

    Raises:
        UserError: the model has no default text.
    """
    if model_name == "demo":
        return {"corpus": "stdlib"}
    if model_source in _DEFAULT_DATASETS:
        return {"dataset": _DEFAULT_DATASETS[model_source]}
    raise UserError(
        f"--text: model {model_name} has no default text. Name files (--text corpus.jsonl), an "
        f"embedded corpus (--text {' or --text '.join(CORPORA)}), or a dataset on the hub "
        f"(--dataset OWNER/NAME)."
    )


def choose_text(
    given: Mapping[str, Any], model: str, *, seed: int, where: str = "bsc cache"
) -> TextSource:
    """The text of a capture from flags.

    Args:
        given: fields of a `TextSource` by name, of which `files` may be a corpus or folders.
        model: whose default text is taken where none is named.
        seed: of the order of the documents.
        where: command that they are flags of, for messages.

    Raises:
        UserError: two texts are named, one is not there, or the model has no default text.
    """
    values = dict(given)
    files, dataset = values.pop("files", ()), values.pop("dataset", None)
    if files and dataset:
        raise UserError("--text and --dataset exclude each other: give one.")
    if dataset:
        chosen: dict[str, Any] = {"dataset": dataset}
    else:
        chosen = parse_text(files) if files else default_text(resolve_model(model), model)
        for name in ("config_name", "split"):  # there is but one of these in what is local
            values.pop(name, None)
    if "dataset" in chosen:
        chosen["revision"] = resolve_dataset(chosen["dataset"], values.pop("revision", None))
    else:
        values.pop("revision", None)
    return parse_config(TextSource, {**chosen, **values, "seed": seed}, where)


def parse_text(values: Sequence[str]) -> dict[str, Any]:
    """Fields of a `TextSource` from the values of ``--text``: one corpus, or files and folders.

    Raises:
        UserError: a file does not exist, its kind is not known or differs from the others, or a
            corpus is not alone.
    """
    if len(values) == 1 and values[0] in CORPORA:
        return {"corpus": values[0]}
    files: list[Path] = []
    for value in values:
        path = Path(value).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in _BUILDERS and p.is_file())
            if not inside:
                raise UserError(f"--text {value}: the folder has no {', '.join(_BUILDERS)} files.")
            files += inside
        elif path.is_file():
            files.append(path)
        elif value in CORPORA:
            raise UserError(
                f"--text {value}: an embedded corpus stands alone. Capture it without other text, "
                f"or name files and folders."
            )
        else:
            raise UserError(
                f"--text {value}: no such file. Give files, folders, or one of "
                f"{', '.join(CORPORA)}."
            )
    kinds = {_BUILDERS.get(p.suffix) for p in files}
    if None in kinds:
        odd = next(p for p in files if p.suffix not in _BUILDERS)
        raise UserError(f"--text {odd}: cannot read {odd.suffix or 'this kind of'} files. "
                        f"Known are {', '.join(_BUILDERS)}.")  # fmt: skip
    if len(kinds) > 1:
        raise UserError("--text: the files are of different kinds. Capture one kind at a time.")
    return {"files": tuple(str(p.resolve()) for p in files)}


def fingerprint(source: TextSource) -> str:
    """What tells this text from another one of the same name.

    Of an embedded corpus the SHA-256 of its documents; of local files that of their names, sizes
    and times of change; of a dataset on the hub its commit, or its name where there is no network.
    """
    digest = hashlib.sha256()
    if source.corpus is not None:
        for document in documents(source.corpus):
            digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "surrogatepass"))
    elif source.files:
        for name in source.files:
            status = Path(name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    else:
        digest.update(f"{source.dataset}\0{source.revision}".encode())
    return digest.hexdigest()[:16]


def resolve_dataset(dataset: str, revision: str | None) -> str | None:
    """The commit that a revision of a dataset on the hub means now; unchanged without a network."""
    from huggingface_hub import HfApi

    if not hub_answers():
        return revision
    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except Exception:  # no network, no access: reading the dataset says so better
        return revision


def read_text(source: TextSource, rank: int = 0, writers: int = 1) -> Iterator[TextDocument]:
    """The documents of a source, or the share of one of several writers, in its seed's order.

    Embedded corpora are permuted exactly; streams by a buffer of 10,000 documents over shuffled
    files. Documents that share much text are on one side of the split (model/sides.py).

    Raises:
        UserError: the source cannot be read, or has no such column.
    """
    if source.corpus is not None:
        found = sorted(documents(source.corpus))
        order = np.random.Generator(np.random.Philox(key=source.seed)).permutation(len(found))
        held_out = held_out_documents(found, source.held_out)
        for number in range(rank, len(order), writers):
            at = order[number]
            yield TextDocument(number, found[at].text, held_out[at])
        return
    for i, (text, given) in enumerate(_stream(source, rank, writers)):
        side = is_text_held_out(text, source.held_out)
        yield TextDocument(i * writers + rank, text, side, given)


_ROLES = {"human": "user", "gpt": "assistant"}
"""Names that data sets of chats have for roles."""


def _value(value: Any) -> tuple[str, list[dict[str, str]] | list[int] | None]:
    """Text of a column's value, and what it was where it was no text.

    Raises:
        ValueError: it is neither text, nor chat messages, nor token ids.
    """
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        return " ".join(map(str, value)), value
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        messages = []
        for message in value:
            role = message.get("role", message.get("from"))
            content = message.get("content", message.get("value"))
            if not isinstance(role, str) or not isinstance(content, str):
                raise ValueError(f"a list of {', '.join(map(str, message))}")
            messages.append({"role": _ROLES.get(role, role), "content": content})
        return "\n".join(m["content"] for m in messages), messages
    raise ValueError(type(value).__name__)


def _stream(
    source: TextSource, rank: int, writers: int
) -> Iterator[tuple[str, list[dict[str, str]] | list[int] | None]]:
    import datasets
    from datasets.distributed import split_dataset_by_node
    from datasets.exceptions import DatasetNotFoundError

    what = f"--dataset {source.dataset}" if source.dataset else f"--text {source.files[0]}"
    options: dict[str, Any] = {"streaming": True}
    if source.dataset is not None and not hub_answers():
        raise UserError(
            f"{what}: the hub ({hub_address()}) cannot be reached. What works offline: --text with "
            f"files or folders, or an embedded corpus ({', '.join(CORPORA)})."
        )
    try:
        if source.dataset is not None:
            stream = datasets.load_dataset(
                source.dataset,
                source.config_name,
                split=source.split,
                revision=source.revision,
                **options,
            )
        else:
            builder = _BUILDERS[Path(source.files[0]).suffix]
            if builder == "text":
                options["sample_by"] = "document"
            stream = datasets.load_dataset(
                builder, data_files=list(source.files), split="train", **options
            )
        stream = stream.shuffle(seed=source.seed, buffer_size=SHUFFLE_BUFFER)
        if writers > 1:  # whole files each where they can be divided, else every n-th document
            stream = split_dataset_by_node(stream, rank, writers)
        for row in stream:
            if source.column not in row:
                raise UserError(
                    f"--column {source.column}: {what} has no such column; it has "
                    f"{', '.join(map(str, row))}."
                )
            if row[source.column] is None:  # a row without text
                continue
            try:
                text, given = _value(row[source.column])
            except ValueError as error:
                raise UserError(
                    f"--column {source.column}: {what} has {error} there. Expected text, chat "
                    f"messages (a list of role and content), or token ids (a list of integers)."
                ) from None
            if text:
                yield text, given
    except DatasetNotFoundError:
        raise UserError(f"{what}: the hub has no such dataset, or no access to it.") from None
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds for a damaged file and for no network
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        if type(error) is StopIteration:  # what the JSON reader raises on an empty file
            first_line = "there is nothing in it"
        raise UserError(f"{what}: cannot be read: {first_line}") from error
