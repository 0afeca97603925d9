"""Steps in an order in which each comes after what it needs, and the digest that each is known by.

The digest of a step is the hash of what it says and of the digests of what it needs. What a step
makes is in a folder with the digest in its name. So what was made is used again as long as nothing
changed that it depends on, and nothing that was made is ever replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import xxhash

from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError, StoreError, UserError, nearest
from bsc.eval.interp.config import DECIDING
from bsc.files import canonical_json
from bsc.study.commands import check_step, inputs_of, path_of_store
from bsc.study.config import Study, StudyStep

__all__ = ["Node", "chosen_nodes", "graph_of"]

_VERSION = 1
"""Of what a digest is made from."""


class Node(NamedTuple):
    """A step with what it needs."""

    step: StudyStep
    needs: tuple[str, ...]
    """Names of steps."""
    digest: str

    @property
    def name(self) -> str:
        """Name of the step."""
        return self.step.name

    @property
    def label(self) -> str:
        """Name of what it makes."""
        return f"{self.step.name}-{self.digest}"


def graph_of(study: Study, where: str) -> dict[str, Node]:
    """Every step of a study by name, checked, each after what it needs.

    Args:
        study: as it was read.
        where: what it was read from, for messages.

    Raises:
        ConfigError: a step is not as it should be, two are measured in one place, or they need each
            other.
    """
    steps = {step.name: step for step in study.steps}
    for step in study.steps:
        check_step(step, steps, where)
    needs = {s.name: tuple(dict.fromkeys(n for _, n in inputs_of(s))) for s in study.steps}
    for command in ("eval", "interp"):
        seen: dict[str, str] = {}
        for step in study.steps:
            if step.command == command and not step.fields.get("judge"):
                run = step.fields["run"]
                if run in seen:
                    raise ConfigError(
                        f"{where}: [{command}.{step.name}] and [{command}.{seen[run]}] both "
                        f"measure {run}, and a run has one folder for it. Leave one out."
                    )
                seen[run] = step.name
    _check_scores(study, where)
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise ConfigError(f"{where}: steps need each other: {' -> '.join(error.args[1])}") from None
    nodes: dict[str, Node] = {}
    # Those that could come at any time come in the order of the file.
    rank = {name: i for i, name in enumerate(steps)}
    level: dict[str, int] = {}
    for name in order:
        level[name] = max((level[n] + 1 for n in needs[name]), default=0)
    for name in sorted(order, key=lambda n: (level[n], rank[n])):
        step = steps[name]
        fields = _fields(step, f"{where}: [{step.command}.{name}]")
        said = [_VERSION, step.command, fields, [nodes[n].digest for n in needs[name]]]
        try:
            digest = xxhash.xxh3_64_hexdigest(canonical_json(said).encode())[:8]
        except (TypeError, ValueError) as error:  # a date, a time, not a number
            raise ConfigError(
                f"{where}: [{step.command}.{name}]: a value of a kind that no flag has ({error})."
            ) from None
        nodes[name] = Node(step, needs[name], digest)
    return nodes


def _fields(step: StudyStep, where: str) -> dict[str, Any]:
    """What a step says; of a store that there is, which one it is, wherever it lies.

    Raises:
        ConfigError: there is no such store, or not a whole one.
    """
    path = path_of_store(step)
    if path is None:
        return step.fields
    try:
        store = ActivationStore(path)
        if store.ring is not None:
            raise StoreError(f"{path}: a ring, whose rows are gone once they were read.")
        if not store.complete:
            raise StoreError(f"{path}: its capture has not ended. `bsc cache` goes on with it.")
    except StoreError as error:
        raise ConfigError(f"{where}: path: {error}") from None
    return {"store_id": store.store_id}


def _check_scores(study: Study, where: str) -> None:
    """See that steps that score the coders of one run draw the same latents: the scores without a
    judge come with each of them, and the last one's would be those of all.

    Raises:
        ConfigError: they do not.
    """
    seen: dict[str, StudyStep] = {}
    for step in study.steps:
        if step.command == "interp":
            other = seen.setdefault(step.fields["run"], step)
            for key in DECIDING:
                if step.fields.get(key) != other.fields.get(key):
                    raise ConfigError(
                        f"{where}: [interp.{step.name}] and [interp.{other.name}] score one run, "
                        f"but with another {key}. Give both the same."
                    )


def chosen_nodes(
    nodes: dict[str, Node], only: Collection[str], claims: Mapping[str, Sequence[str]]
) -> dict[str, Node]:
    """The steps that are named or that a named claim needs, with what they need in their turn.

    Args:
        nodes: every step.
        only: names of steps and ids of claims; none: all steps.
        claims: by id, the steps that each needs.

    Raises:
        UserError: a name is neither.
    """
    wanted = set(() if only else nodes)
    for name in only:
        if name not in nodes and name not in claims:
            raise UserError(
                f"--only {name}: no such step or claim{nearest(name, [*nodes, *claims])}; steps "
                f"are {', '.join(nodes)}, claims {', '.join(claims) or 'none'}."
            )
        wanted.update(claims.get(name, ()), {name} & nodes.keys())
    for name in reversed(nodes):
        if name in wanted:
            wanted.update(nodes[name].needs)
    return {name: node for name, node in nodes.items() if name in wanted}
