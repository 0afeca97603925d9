"""Doing one step: its command line, its process, its record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError, StoreError, UserError
from bsc.files import write_atomically
from bsc.locks import FileLock
from bsc.study.choose import choose, chosen_value
from bsc.study.commands import arguments, in_numbers, inputs_of, path_of_store, shown
from bsc.study.folder import RECORD_VERSION, StepRecord, StudyFolder
from bsc.study.graph import Node
from bsc.study.subjects import Subject, selected, subjects_of, text_of
from bsc.versions import versions

if TYPE_CHECKING:
    from bsc.train.config import SweepPoint

__all__ = ["FailedStep", "do_step", "with_choices"]

_SHARED = ("cache", "train")
"""Commands that several processes can share."""


class FailedStep(Exception):
    """A step that did not end as it should; its words say how."""


def do_step(node: Node, folder: StudyFolder, lock: FileLock, launch: Sequence[str] = ()) -> None:
    """Do a step whose needs are there, or go on with it, and write its record.

    Args:
        node: of the study.
        folder: of the study.
        lock: of the step. The command's process inherits it, so the step is held for as long as
            anybody works on it.
        launch: words before `bsc` in the command lines of captures and trainings.

    Raises:
        FailedStep: the command failed, or it did not make what it should.
    """
    chosen: list[dict[str, Any]] | None = None
    line = ["choose"]
    try:
        if node.step.command == "choose":
            chosen = _choose(node, folder)
        else:
            line = _line(node, folder)
    except UserError as error:
        raise FailedStep(str(error)) from error
    # A run may be whole without a record: whoever wrote it was killed before it could say so.
    whole = node.step.command in ("train", "finetune") and folder.made(node) is not None
    there = path_of_store(node.step) is not None
    if chosen is None and not whole and not there:
        begun = node.step.command == "finetune" and folder.run(node.name).config_path.exists()
        now = ["finetune", str(folder.run(node.name).folder), "--resume"] if begun else line
        _call(node, folder, now, lock, launch if node.step.command in _SHARED else ())
    made = folder.made(node)
    if made is None:
        raise FailedStep(f"ended without an error, but made nothing; see {folder.log(node)}")
    own = "" if chosen is not None else shown([_relative(word, folder.path) for word in line])
    if there:
        own = f"store {made}, captured before"
    record = StepRecord(
        version=RECORD_VERSION,
        step=node.name,
        digest=node.digest,
        command=own or f"choose {node.step.fields['field']}",
        made=made,
        needs=folder.needs(node),
        seconds=round(_before(node, folder), 3),
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        **({} if chosen is None else {"chosen": chosen}),
    )
    folder.write(node, record)
    _time_path(node, folder).unlink(missing_ok=True)


def _relative(word: str, root: Path) -> str:
    return word.removeprefix(f"{root}{os.sep}")


def _line(node: Node, folder: StudyFolder) -> list[str]:
    """Arguments of `bsc` that begin the step; all but those of a finetuning go on with it too."""
    step = node.step
    if path_of_store(step):
        return []
    if step.command == "cache":
        return arguments(step, {"--store": str(folder.store(step.name))})
    runs = str(folder.path / "runs")
    if step.command == "train":
        sweep = folder.path / "records" / f"{node.label}.toml"
        write_atomically(sweep, _sweep(node, folder))
        return ["train", str(sweep), "--runs", runs, "--name", node.label, "--continue"]
    if step.command == "finetune":
        given = {"": str(folder.run(step.fields["run"]).folder), "--runs": runs}
        given |= {"--name": node.label}
        if "chosen" in step.fields:
            given["--lr"] = text_of(_one_value(node, folder))
        return arguments(step, given)
    given = {"": str(folder.run(step.name).folder)}
    if step.fields.get("judge"):
        given["--name"] = step.name
    return arguments(step, given)


def _choices(node: Node, folder: StudyFolder) -> list[tuple[str, list[dict[str, Any]]]]:
    """Field and values of every `choose` that a step goes by."""
    found = []
    for key, name in inputs_of(node.step):
        if key == "chosen":
            other = folder.nodes[name]
            record = folder.done(other)
            if record is None or record.chosen is None:
                raise StoreError(f"{folder.record_path(other)}: damaged; remove it.")
            found.append((other.step.fields["field"], record.chosen))
    return found


def _one_value(node: Node, folder: StudyFolder) -> Any:
    """The one value that was chosen for a run that takes one."""
    values = {text_of(c[field]): c[field] for field, arms in _choices(node, folder) for c in arms}
    if len(values) != 1:
        raise ConfigError(
            f"[finetune.{node.name}]: chosen: {len(values)} values were chosen, by arm, and a run "
            f"has one. Give `choose` an empty `by`, or runs of one arm."
        )
    return next(iter(values.values()))


def _sweep(node: Node, folder: StudyFolder) -> str:
    """The sweep of a step as TOML, with what was chosen for each coder."""
    from bsc.train.config import TrainConfig
    from bsc.train.sweep import expand

    store = folder.store(node.step.fields["store"])
    where = f"[train.{node.name}]"
    own = {k: v for k, v in node.step.fields.items() if k not in ("store", "chosen")}
    own = in_numbers(TrainConfig, own, where)
    tables = list(own.pop("coders", [{"code": ["binary", "continuous"]}]))
    if choices := _choices(node, folder):
        given = TrainConfig.model_validate({"coders": tables, "preset": own.get("preset")})
        points = expand(given.coders, where, given.preset)
        tables = with_choices(points, choices, ActivationStore(store), where)
    top = own | {"store": str(store)}
    lines = [f"{k} = {_toml(v)}" for k, v in top.items()]
    for table in tables:
        lines += ["", "[[coders]]"]
        lines += [f"{k} = {_toml(v)}" for k, v in table.items() if v is not None]
    return "\n".join(lines) + "\n"


def with_choices(
    points: Sequence[SweepPoint],
    choices: Sequence[tuple[str, Any]],
    store: ActivationStore,
    where: str,
) -> list[dict[str, Any]]:
    """Tables of coders, each with what was chosen for its like; one for each hookpoint where they
    were chosen apart.

    Raises:
        ConfigError: nothing was chosen for the like of a coder.
    """
    from bsc.train.sweep import hookpoints_of, plan_coder

    tables = []
    for point in points:
        table = {n: getattr(point, n) for n in point.model_fields_set}
        at: dict[str, dict[str, Any]] = {}
        for hook in hookpoints_of(point, store):
            planned = plan_coder(point, hook)
            fields = planned.coder.model_dump() | planned.model_dump()
            at[hook.name] = {f: chosen_value(arms, f, fields) for f, arms in choices}
            for field, value in at[hook.name].items():
                if value is None and field not in table:
                    raise ConfigError(
                        f"{where}: no {field} was chosen for a coder like {planned!r}."
                    )
        values = list(at.values())
        if all(v == values[0] for v in values):
            tables.append(table | _missing(values[0], table))
        else:
            tables += [table | {"hookpoint": name} | _missing(v, table) for name, v in at.items()]
    return tables


def _missing(values: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in values.items() if field not in table}


def _toml(value: Any) -> str:
    """A value as TOML, which is JSON for text, numbers, truth values and lists of them."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _choose(node: Node, folder: StudyFolder) -> list[dict[str, Any]]:
    fields = node.step.fields
    runs = fields["runs"]
    subjects: list[Subject] = []
    for name in [runs] if isinstance(runs, str) else runs:
        subjects += subjects_of(name, folder.run(name))
    where = f"[choose.{node.name}]"
    subjects = selected(subjects, fields.get("coders", {}), f"{where}: coders")
    return choose(
        subjects, fields["field"], fields.get("by", []), fields.get("figure", "fvu"), where
    )


def _time_path(node: Node, folder: StudyFolder) -> Path:
    return folder.path / "records" / f".{node.label}.seconds"


def _before(node: Node, folder: StudyFolder) -> float:
    """Seconds that went into a step before it was stopped."""
    try:
        return float(_time_path(node, folder).read_text())
    except (OSError, ValueError):
        return 0.0


def _call(
    node: Node, folder: StudyFolder, line: Iterable[str], lock: FileLock, launch: Sequence[str]
) -> None:
    """Run `bsc` and wait for it."""
    before, started = _before(node, folder), time.perf_counter()
    # -P: nothing of the folder that the user is in is imported.
    whole = [*launch, sys.executable, "-P", "-m", "bsc", *line]
    log = folder.log(node)
    try:
        with log.open("ab") as out:
            out.write(f"$ {' '.join(whole)}\n".encode())
            out.flush()
            with (
                subprocess.Popen(
                    whole,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock.descriptor,),
                    process_group=0,  # Ctrl-C comes to this process alone, which ends the other
                ) as process,
                _stopped_with(process),
            ):
                code = process.wait()
    except OSError as error:
        what = error.filename or whole[0]
        raise FailedStep(f"{what}: cannot be started or written ({error.strerror}).") from None
    finally:
        spent = before + time.perf_counter() - started
        write_atomically(_time_path(node, folder), f"{spent:.3f}")
    if code and not (node.step.command in ("train", "finetune") and folder.made(node)):
        raise FailedStep(f"{_last_line(log)} (exit {code}; all of it is in {log})")


@contextmanager
def _stopped_with(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop a process, as it wishes to be stopped, where this one is."""
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _last_line(log: Path) -> str:
    """What a command said last, or its error."""
    lines = [n for n in log.read_text(errors="replace").splitlines() if n.strip()]
    errors = [n for n in lines if n.startswith("error: ")]
    said = (errors or lines or ["it said nothing"])[-1]
    return said.removeprefix("error: ")[:1000]
