"""What of a run leaves the machine: its records, of the coders that were chosen, without places.

A place is a folder, or an address that is not the hub's: where the store was, a model in a folder,
a file of labelled texts. Its last part is kept: of fields that hold places, whatever they say, and
of every other text that begins like one. Weights go as they are; checkpoints, codes and sampled
firings stay, and text of the corpus goes only where it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bsc.array_file import read_arrays, write_arrays
from bsc.eval.evaluation import EVAL_VERSION, Evaluation, EvaluationFolder, Examples
from bsc.files import canonical_json, write_atomically
from bsc.hub import SCHEME
from bsc.train.coders.repository import CODER_FILES
from bsc.train.run import Run
from bsc.train.run_config import RunConfig
from bsc.typed import parse_typed, write_typed

__all__ = ["Published", "publish", "text_facts", "without_places"]

_PLACE = re.compile(
    r"(/|~|\.\.?/|\$\w+/|[A-Za-z]:[\\/]|\\\\|file:|[A-Za-z][A-Za-z0-9+.-]*://)\S[^\n]*|.*/\.\./.*"
)
_PLACES = frozenset({"store", "runs", "probes", "ablation_score", "files"})
"""Fields that hold places."""


@dataclass(frozen=True)
class Published:
    """What is published of a run."""

    names: list[str]
    """Of its coders."""
    config: RunConfig
    evaluation: Evaluation | None
    files: dict[str, Path]
    """Where every file is now, by its place in the run."""


def without_places(value: Any, field: str = "") -> Any:
    """JSON with every place of this machine reduced to its last part.

    >>> without_places({"store": "mine/acts", "code": "binary", "at": ["s3://mine/acts"]})
    {'store': 'acts', 'code': 'binary', 'at': ['acts']}
    """
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for name, one in value.items():
            key, number = without_places(name), 2
            while key in found:  # of two places that end alike
                key, number = f"{without_places(name)}-{number}", number + 1
            found[key] = without_places(one, name)
        return found
    if isinstance(value, (list, tuple)):
        return [without_places(one, field) for one in value]
    if not isinstance(value, str) or value.startswith(SCHEME):
        return value
    if field in _PLACES or _PLACE.fullmatch(value):
        return re.split(r"[\\/@:]+", value.rstrip("\\/"))[-1]
    return value


def text_facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What a store knows of its text."""
    capture = without_places(provenance["capture"])
    facts = {name.replace("_", " "): value for name, value in capture["text"].items()}
    facts["held out share"] = facts.pop("held out", 0)
    facts["tokens of a context"] = capture["context"]
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in facts.items()
    }


def publish(run: Run, names: Sequence[str], folder: Path, *, examples: bool) -> Published:
    """Write what is published of a run into a folder, where the run's own file cannot serve.

    Args:
        run: a run whose training has ended.
        names: of its coders.
        folder: a new one, for files that differ from those of the run.
        examples: whether the contexts of the report go, which are text of the corpus.

    Returns:
        The files.

    Raises:
        StoreError: a file of the run is damaged.
    """
    files = _Files(folder, {})
    config = _published_config(run, names)
    write_typed(files.new("config.json"), config)
    lines = [line for line in run.metrics() if line["coder"] in names]
    text = "".join(canonical_json(line, indent=None) for line in lines)
    write_atomically(files.new("metrics.jsonl"), text)
    for name in names:
        own, place = run.coder_folder(name), f"coders/{name}"
        coder = run.coder(name)  # which finds damage before it is published
        about = without_places(coder.about)
        if about != coder.about:
            coder.about = about
            coder.save(folder / place)
            own = folder / place
        files.found.update({f"{place}/{file}": own / file for file in CODER_FILES})
        if (firing := EvaluationFolder(run).firing(name)).exists():
            files.found[f"{place}/firing.safetensors"] = firing
    evaluation = None
    if run.eval_path.exists():
        evaluation = _publish_evaluation(run, names, files, examples=examples)
    return Published(list(names), config, evaluation, files.found)


class _Files(NamedTuple):
    """Files by their places in the run."""

    folder: Path
    """Where those are written that differ from the run's own."""
    found: dict[str, Path]

    def new(self, name: str) -> Path:
        """A file that is written anew."""
        path = self.found[name] = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _published_config(run: Run, names: Sequence[str]) -> RunConfig:
    whole = run.config().to_json()
    whole["coders"] = [c for c in whole["coders"] if c["name"] in names]
    whole["assigned"] = {n: rank for n, rank in whole["assigned"].items() if n in names}
    return parse_typed(RunConfig, without_places(whole), run.config_path)


def _publish_evaluation(
    run: Run, names: Sequence[str], files: _Files, *, examples: bool
) -> Evaluation:
    own, chosen = EvaluationFolder(run), set(names)
    whole = own.read().to_json()
    whole["coders"] = {n: one for n, one in whole["coders"].items() if n in chosen}
    whole["left_out"] = [n for n in whole["left_out"] if n in chosen]
    whole["together"] = {
        n: one for n, one in whole["together"].items() if chosen.issuperset(one["coders"])
    }
    whole["stability"] = [one for one in whole["stability"] if {one["a"], one["b"]} <= chosen]
    for probing in whole["probing"].values():
        probing["coders"] = {n: one for n, one in probing["coders"].items() if n in chosen}
    evaluation = parse_typed(Evaluation, without_places(whole), run.eval_path)
    write_typed(files.new("eval.json"), evaluation)
    sums = read_arrays(own.documents, own.remedy)
    kept = {n: a for n, a in sums.items() if n.rpartition("/")[0] in {"", "clean", *chosen}}
    write_arrays(files.new("eval/documents.safetensors"), kept)
    shown = own.read_examples() if examples else {}
    record = Examples(version=EVAL_VERSION, coders={n: shown.get(n, []) for n in names})
    write_typed(files.new("eval/examples.json"), record)
    return evaluation
