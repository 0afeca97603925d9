"""From the tables of a sweep to its coders, every default filled in, each with a name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from bsc.cache.store.layout import Hookpoint
from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config
from bsc.errors import ConfigError
from bsc.train.coders.config import BINARY_ONLY, CoderConfig
from bsc.train.config import SweepPoint
from bsc.train.preset import Preset, coder_defaults
from bsc.train.run_config import PlannedCoder
from bsc.train.schedule import default_decay, default_lr, default_warmup, paper_lr

__all__ = ["coder_config", "expand", "hookpoints_of", "plan_coder", "plan_coders"]


def coder_config(point: SweepPoint, hook: Hookpoint) -> CoderConfig:
    """The maths of a point at a hookpoint.

    Raises:
        ConfigError: the point is not possible there, for example k > n_latents.
    """
    values = {f: getattr(point, f) for f in CoderConfig.model_fields if hasattr(point, f)}
    if point.code == "continuous":
        # What it does not read must not tell coders apart: a grid then has it once.
        values = {f: v for f, v in values.items() if f not in BINARY_ONLY}
    values["d_in"] = hook.d_out if point.site == "sae" else hook.d_in
    values["d_out"] = hook.d_out
    values["n_latents"] = point.n_latents or point.expansion * hook.d_out
    norm = point.decoder_norm or ("unit" if point.site == "sae" else "free")
    values["decoder_norm"] = norm
    learned = point.code != "continuous" and norm == "unit"
    values["amplitude"] = point.amplitude or ("learned" if learned else "none")
    return parse_config(CoderConfig, values, f"coder at {hook.name}")


def plan_coder(point: SweepPoint, hook: Hookpoint, steps: float = 0) -> PlannedCoder:
    """The coder of a point at a hookpoint, with every default filled in but its name.

    Args:
        point: of a sweep.
        hook: where it is.
        steps: of the run, as `default_lr` takes them.

    Raises:
        ConfigError: the point is not possible there.
    """
    config = coder_config(point, hook)
    if point.k_init is not None and config.select == "groupmax":
        raise ConfigError("k_init: with select='groupmax' k is the number of groups, for good.")
    if point.k_init is not None and point.k_init > config.n_latents:
        raise ConfigError(f"k_init={point.k_init} is more than n_latents={config.n_latents}.")
    if point.lr == "paper":
        lr = paper_lr(point.optimiser, config.code, config.surrogate, config.n_latents)
    else:
        lr = point.lr or default_lr(point.optimiser, config.code, config.n_latents, steps)
    binary = config.code != "continuous"
    return PlannedCoder(
        name="",
        hookpoint=hook.name,
        group=point.group,
        coder=config,
        optimiser=point.optimiser,
        lr=lr,
        warmup=default_warmup(point.optimiser) if point.warmup is None else point.warmup,
        decay=point.decay or default_decay(point.optimiser),
        clip_norm=point.clip_norm,
        adam_eps=point.adam_eps if point.optimiser in ("adam", "muon") else None,
        k_init=point.k_init or config.k,
        temperature_init=(point.temperature_init if binary else None) or config.temperature,
        anneal=point.anneal,
        patience=point.patience,
        seed=point.seed,
    )


def expand(
    tables: Iterable[dict[str, Any]], where: str, preset: Preset | None = None
) -> list[SweepPoint]:
    """The points of all tables: within a table every combination of its lists.

    Args:
        tables: fields of `SweepPoint`, or lists of them.
        where: what the tables come from, for messages.
        preset: what stands in the place of the defaults (train/preset.py).

    Raises:
        ConfigError: a table has an unknown key or a wrong value.

    >>> [(p.code, p.k) for p in expand([{"code": ["binary", "continuous"], "k": [8, 16]}], "test")]
    [('binary', 8), ('binary', 16), ('continuous', 8), ('continuous', 16)]
    """
    points: list[SweepPoint] = []
    for number, table in enumerate(tables, 1):
        axes = [v if isinstance(v, (list, tuple)) else [v] for v in table.values()]
        if empty := [k for k, axis in zip(table, axes, strict=True) if not axis]:
            raise ConfigError(f"{where}: coders table {number}: {empty[0]} is an empty list.")
        for values in itertools.product(*axes):
            fields = dict(zip(table, values, strict=True))
            fields = coder_defaults(preset, fields) | fields
            points.append(parse_config(SweepPoint, fields, f"{where}: coders table {number}"))
    return list(dict.fromkeys(points))


def hookpoints_of(point: SweepPoint, store: ActivationStore) -> Sequence[Hookpoint]:
    """Where a point has a coder: at its hookpoint, or at every one of the store.

    Raises:
        StoreError: the store has no such hookpoint.
    """
    return [store.hookpoint(point.hookpoint)] if point.hookpoint else store.hookpoints


def plan_coders(
    points: list[SweepPoint], store: ActivationStore, steps: float = 0
) -> list[PlannedCoder]:
    """Coders with every default filled in, and names that tell them apart.

    Args:
        points: of a sweep.
        store: whose hookpoints they are at.
        steps: of the run, as `default_lr` takes them.

    Raises:
        ConfigError, StoreError: a point does not fit the store.
    """
    planned = []
    for point in points:
        planned += [plan_coder(point, hook, steps) for hook in hookpoints_of(point, store)]
    return _named(list(dict.fromkeys(planned)))


_LONGEST_NAME = 200
_ALWAYS_NAMED = ("group", "site", "code", "k", "seed")
_NEVER_NAMED = ("name", "hookpoint", "coder", "d_in", "d_out", *_ALWAYS_NAMED)


def _named(planned: list[PlannedCoder]) -> list[PlannedCoder]:
    """Name coders by group, site, code, k and seed, and by what else differs among their like.

    Raises:
        ConfigError: two coders would have one name.
    """

    def fields(p: PlannedCoder) -> dict[str, Any]:
        found = p.coder.model_dump() | p.model_dump()
        for first, last in (("k_init", "k"), ("temperature_init", "temperature")):
            if found[first] == found[last]:
                found[first] = None  # it does not change
        return found

    def key(mine: dict[str, Any]) -> tuple[Any, ...]:
        return (mine["hookpoint"], *(mine[f] for f in _ALWAYS_NAMED))

    every = [fields(p) for p in planned]
    seen: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for mine in every:
        values = seen.setdefault(key(mine), {})
        for f, v in mine.items():
            values.setdefault(f, set()).add(str(v))
    named = []
    for p, mine in zip(planned, every, strict=True):
        like = seen[key(mine)]
        parts = [mine["group"]] if mine["group"] else []
        parts += [mine["site"], mine["code"], f"k{mine['k']}", f"s{mine['seed']}"]
        parts += [f"{f}={mine[f]}" for f in mine if f not in _NEVER_NAMED and len(like[f]) > 1]
        named.append(p.model_copy(update={"name": f"{p.hookpoint}/{'-'.join(parts)}"}))
    names = [p.name for p in named]
    if long := [n for n in names if max(map(len, n.split("/"))) > _LONGEST_NAME]:
        raise ConfigError(
            f"a coder would be called {long[0]}, which is too long for a folder. Divide its table, "
            f"so that fewer fields differ in each, or give a shorter group."
        )
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"two coders would be called {twice[0]}. Give their tables a `group`.")
    return named
