"""Text that every installation of bsc carries: the corpora `stdlib` and `env`.

`stdlib` is the standard library of the running interpreter: its sources, its help topics
(`pydoc_data.topics`) and the docstrings of its built-in modules, about 12 MB. `env` is that plus
the sources of the larger packages that bsc depends on, about 150 MB. No network, no download.

A document is one source file, one help topic or one built-in module's docstrings. Documents come
in the order of their names, so the same installation gives the same sequence; another version of
Python gives another text under the same names. Test suites are left out: some distributions ship
without them.

Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import pydoc
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["CORPORA", "ENV_PACKAGES", "Document", "documents"]

CORPORA = ("stdlib", "env")

ENV_PACKAGES = (
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "sympy",
    "torch",
    "transformers",
)
"""Packages whose sources `env` adds, where they are installed."""

MAX_BYTES = 400_000
"""Larger files are generated tables, not text that a person wrote."""

_NOT_TEXT = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages"}
_SKIP_PREFIXES = ("_sysconfigdata", "topics.py")  # paths of the build machine; topics come apart


class Document(NamedTuple):
    """One text with the name that decides its place and whether it is held out."""

    name: str
    text: str


def _source_files(root: Path, label: str) -> list[tuple[str, Path]]:
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if _NOT_TEXT.intersection(parts) or path.name.startswith(_SKIP_PREFIXES):
            continue
        found.append(("/".join((label, *parts)), path))
    return sorted(found)


def _read_source(path: Path) -> str | None:
    """Text of a Python file in its declared encoding; None when it is no readable text."""
    try:
        raw = path.read_bytes()
        if not raw.strip() or len(raw) > MAX_BYTES:
            return None
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n")
    except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _help_topics() -> list[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some distributions package it apart
        return []
    return [Document(f"topics/{name}", topics[name]) for name in sorted(topics)]


def _builtin_docstrings() -> list[Document]:
    """One document per built-in module: the docstrings of its public names and their members."""
    found = []
    for module_name in sorted(sys.builtin_module_names):
        with contextlib.suppress(Exception):  # a module that does not import here has no text
            module = importlib.import_module(module_name)
            parts = [f"{module_name}\n{inspect.getdoc(module) or ''}"]
            for name in sorted(vars(module)):
                member = getattr(module, name)
                # What the module itself defines. Streams and hooks of `sys` change at run time.
                own = getattr(member, "__module__", None) == module_name
                if name.startswith("_") or name.endswith("hook") or not own:
                    continue
                parts.append(f"{module_name}.{name}\n{pydoc.getdoc(member)}")
                if inspect.isclass(member):
                    parts += [
                        f"{module_name}.{name}.{attribute}\n{pydoc.getdoc(value)}"
                        for attribute, value in sorted(vars(member).items())
                        if not attribute.startswith("_") and pydoc.getdoc(value)
                    ]
            found.append(Document(f"builtins/{module_name}", "\n\n".join(parts)))
    return found


def documents(corpus: str) -> Iterator[Document]:
    """Documents of an embedded corpus, in the order of their names within each part.

    Args:
        corpus: ``"stdlib"`` or ``"env"``.

    Yields:
        Documents with a name that is unique within the corpus and a text that is not empty.

    Raises:
        ValueError: there is no such corpus.
    """
    if corpus not in CORPORA:
        raise ValueError(f"corpus must be one of {CORPORA}, got {corpus!r}")
    sources = _source_files(Path(sysconfig.get_path("stdlib")), "stdlib")
    if corpus == "env":
        for package in ENV_PACKAGES:
            spec = importlib.util.find_spec(package)
            for root in (spec.submodule_search_locations or []) if spec else []:
                sources += _source_files(Path(root), package)
    for name, path in sources:
        text = _read_source(path)
        if text is not None:
            yield Document(name, text)
    yield from _builtin_docstrings()
    yield from _help_topics()
