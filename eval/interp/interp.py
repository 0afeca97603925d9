"""`bsc interp`: explain latents, test the explanations, and say how good they are.

    RUN/interp/ledger.jsonl     every answer of every judge (eval/interp/ledger.py)
    RUN/interp/<name>/          results of a judge (eval/interp/results.py)
    RUN/interp/offline/         scores without a language model (eval/interp/offline.py)

`<name>` is the judge's, with what was asked otherwise than usual, so that results of one judge
never replace those of another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bsc.errors import UserError
from bsc.eval.interp.asking import Interpretation
from bsc.eval.interp.batch_files import read_replies, write_requests
from bsc.eval.interp.config import InterpConfig, Prices
from bsc.eval.interp.cost import Estimate, Meter
from bsc.eval.interp.judges.judge import Judge, NamedJudge
from bsc.eval.interp.ledger import Ledger
from bsc.eval.interp.material import Materials
from bsc.eval.interp.results import write_results
from bsc.eval.interp.scores import Interpretability, judge_of
from bsc.progress import console
from bsc.train.run import claim

__all__ = [
    "cost_of",
    "export_requests",
    "import_replies",
    "interpret",
    "result_name",
]


def result_name(model: str, config: InterpConfig) -> str:
    """Folder of the results of a judge, with what was asked otherwise than usual.

    A name that had to be changed to be one of a folder gets a part of its hash, so that no two
    judges share one.

    >>> result_name("Llama-3.1-8B", InterpConfig(marks="strong"))
    'Llama-3.1-8B+strong'
    >>> result_name("org/Llama-3.1-8B", InterpConfig())
    'org-Llama-3.1-8B-bf4c8b'
    """
    words = [_folder_name(model)]
    words += [config.marks] if config.marks != "all" else []
    words += [config.negatives] if config.negatives != "auto" else []
    if config.explanations in ("shuffled", "blank"):
        words.append(config.explanations)
    elif config.explanations != "own":
        words.append(_folder_name(str(Path(config.explanations).expanduser().resolve())))
    return "+".join([*words, "latents"] if config.only else words)


def _folder_name(text: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip(".-")[-60:].strip(".-")
    if plain == text and plain not in ("offline", "ledger.jsonl"):
        return plain
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("-")


@contextmanager
def _opened(materials: Materials) -> Iterator[Ledger]:
    """The ledger of a run, for this process alone."""
    folder = materials.run.interp_folder
    folder.mkdir(exist_ok=True)
    with claim(folder), Ledger(folder / "ledger.jsonl") as ledger:
        yield ledger


def interpret(
    materials: Materials, judge: Judge, prices: Prices | None = None, *, name: str | None = None
) -> Interpretability:
    """Ask a judge whatever has no answer yet, and score what there is.

    Args:
        materials: of an evaluated run.
        judge: who is asked.
        prices: what it charges, and how much may be spent.
        name: of the folder of the results; None: that of the judge.

    Raises:
        UserError: the judge cannot go on. What it has answered is in the ledger, and is scored.
    """
    with _opened(materials) as ledger:
        asked = Interpretation(materials, ledger, judge.model, judge.parameters)
        meter = Meter(prices or Prices(), ledger.entries(judge.model))
        folder = _folder(materials, judge.model, name)
        try:
            asked.ask(judge, meter)
        except UserError:
            if next(ledger.entries(judge.model), None):
                write_results(asked, judge.facts, folder)
            raise
        result = write_results(asked, judge.facts, folder)
    if meter.held_back:
        console.print(
            f"budget: {meter.spent:,.2f} of {meter.prices.budget:,.2f} is spent, and the next "
            f"request could exceed it. Go on with a larger --budget; nothing is asked twice."
        )
    console.print(f"{folder / 'interp.json'}: {len(result.coders)} coders")
    return result


def _folder(materials: Materials, model: str, name: str | None) -> Path:
    """Where the results go, seen to before anything is asked.

    Raises:
        UserError: the name cannot be that of a folder, or results of another judge are there.
    """
    chosen = result_name(model, materials.config) if name is None else name
    if name is not None and (not name or _folder_name(name) != name):
        raise UserError(
            f"--name {name}: use letters, digits, '-', '_' and '.', 60 at most, and not 'offline'."
        )
    folder = materials.run.interp_folder / chosen
    other = judge_of(folder)
    if other not in (None, model):
        raise UserError(
            f"{folder}: results of another judge are here, {other}. Give another --name."
        )
    return folder


def cost_of(materials: Materials, judge: Judge) -> dict[str, Estimate]:
    """What is still to be asked of a judge, by kind of request. Nothing is asked.

    Args:
        materials: of an evaluated run.
        judge: who would be asked.
    """
    with _opened(materials) as ledger:
        return Interpretation(materials, ledger, judge.model, judge.parameters).estimate()


def export_requests(materials: Materials, model: str, path: Path) -> tuple[int, bool]:
    """Write what can be asked now as a file for a batch API, or for people.

    Tests need explanations, so it takes two rounds: explanations, then, when they are imported,
    tests.

    Args:
        materials: of an evaluated run.
        model: name of the judge.
        path: file to write.

    Returns:
        How many requests, and whether more will come when these are answered.
    """
    with _opened(materials) as ledger:
        asked = Interpretation(materials, ledger, model, NamedJudge(model).parameters)
        requests = asked.open_requests()
        write_requests(path, requests, asked)
    return len(requests), any(r.kind == "explain" for r in requests)


def import_replies(
    materials: Materials, model: str, path: Path, *, name: str | None = None
) -> Interpretability:
    """Put the replies of a file into the ledger and score what there is.

    Args:
        materials: of the run that the requests were exported from, with the same settings.
        model: name of the judge.
        path: file of replies.
        name: of the folder of the results; None: that of the judge.

    Raises:
        UserError: the file cannot be read, or none of its lines answers a question of this run.
    """
    with _opened(materials) as ledger:
        asked = Interpretation(materials, ledger, model, NamedJudge(model).parameters)
        open_requests = {asked.key(r): r for r in asked.open_requests()}
        new = known = foreign = 0
        meter = Meter(Prices())
        for key, reply in read_replies(path):
            if key in ledger:
                known += 1
            elif request := open_requests.get(key):
                ledger.add(key, model, request, meter.note(request, reply))
                new += 1
            else:
                foreign += 1
        if not new and not known:
            raise UserError(
                f"--import {path}: none of its {foreign} lines answers a question of this run to "
                f"{model}. Give the options of --export, with the same --judge-model."
            )
        folder = _folder(materials, model, name)
        result = write_results(asked, NamedJudge(model).facts, folder)
        left = len(asked.open_requests())
    console.print(
        f"{path}: {new} new answers, {known} known before, {foreign} of other questions"
        + (f"; {left} more can be asked: --export" if left else "")
    )
    return result
