"""What a step may say, and the command line that it is.

The keys of a step are the flags of its command, with `_` for `-`; so the configs of the commands
are the one place where they are known and checked. Of `train` they are the keys of a sweep's file.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from bsc.config import Config, parse_config
from bsc.errors import ConfigError, nearest
from bsc.options import options_in
from bsc.study.config import Command, StudyStep

__all__ = [
    "arguments",
    "check_step",
    "config_of",
    "in_numbers",
    "inputs_of",
    "path_of_store",
    "shown",
]


C = TypeVar("C", bound=Config)


class _Kind(NamedTuple):
    """What a command takes."""

    configs: tuple[str, ...]
    """Whose options are its keys."""
    inputs: Mapping[str, tuple[Command, ...]]
    """Keys that name steps, and of which command those are."""
    needed: tuple[str, ...]
    taken: tuple[str, ...] = ()
    """Options that the study gives itself."""
    more: tuple[str, ...] = ()
    """Keys that are flags of the command and in none of its configs, or of the study."""


_RUNS: tuple[Command, ...] = ("train", "finetune")
_KINDS: dict[Command, _Kind] = {
    "cache": _Kind(
        ("bsc.cache.capture.config:CaptureConfig",), {}, ("model",), ("store", "rank", "world")
    ),
    "train": _Kind(
        ("bsc.train.config:TrainConfig",),
        {"store": ("cache",), "chosen": ("choose",)},
        ("store",),
        ("name", "runs"),
    ),
    "choose": _Kind(
        (), {"runs": _RUNS}, ("runs", "field"), (), ("field", "by", "figure", "coders")
    ),
    "finetune": _Kind(
        ("bsc.finetuning.config:FinetuneConfig",),
        {"run": _RUNS, "chosen": ("choose",)},
        ("run",),
        ("name", "runs"),
    ),
    "eval": _Kind(
        ("bsc.eval.config:EvalConfig",),
        {"run": _RUNS},
        ("run",),
        (),
        ("no_probe", "device"),
    ),
    "interp": _Kind(
        ("bsc.eval.interp.config:InterpConfig", "bsc.eval.interp.config:JudgeConfig",
         "bsc.eval.interp.config:Prices"),
        {"run": ("eval",)},
        ("run",),
        ("name",),
    ),
}  # fmt: skip


def _config(where: str) -> type[Config]:
    module, _, name = where.partition(":")
    found: type[Config] = getattr(import_module(module), name)
    return found


def inputs_of(step: StudyStep) -> Iterator[tuple[str, str]]:
    """Keys of a step that name other steps, with the name of each."""
    for key in _KINDS[step.command].inputs:
        value = step.fields.get(key, ())
        for name in [value] if isinstance(value, str) else value:
            yield key, name


def path_of_store(step: StudyStep) -> str | None:
    """Where the store of a step is that another capture made; None: the step makes one."""
    return step.fields.get("path") if step.command == "cache" else None


def check_step(step: StudyStep, steps: Mapping[str, StudyStep], where: str) -> None:
    """See that a step says what its command takes, and names steps that there are.

    Raises:
        ConfigError: it does not.
    """
    kind, where = _KINDS[step.command], f"{where}: [{step.command}.{step.name}]"
    if step.command == "cache" and "path" in step.fields:
        _check_path(step.fields, where)
        return
    for key in kind.needed:
        if key not in step.fields:
            more = "; or `path`, of a store that there is" if step.command == "cache" else ""
            raise ConfigError(f"{where}: {key}: missing{more}")
    for key, name in _named(step, where):
        wanted = kind.inputs[key]
        of = [s for s in steps.values() if s.command in wanted]
        if name not in (s.name for s in of):
            names = [s.name for s in of]
            raise ConfigError(
                f"{where}: {key} = {name!r}: no step of {' or '.join(wanted)} is called so"
                f"{nearest(name, names)}; there are {', '.join(names) or 'none'}."
            )
    own = {k: v for k, v in step.fields.items() if k not in kind.inputs}
    if given := next((k for k in own if k in kind.taken), None):
        raise ConfigError(f"{where}: {given}: the study gives it. Leave it out.")
    if step.command == "train":
        _check_sweep(own, where)
    elif step.command == "choose":
        _check_choose(own, kind, where)
    else:
        _check_flags(own, kind, where)


def _check_path(own: Mapping[str, Any], where: str) -> None:
    path = own["path"]
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: path: should be where a store is, got {path!r:.100}")
    if more := ", ".join(k for k in own if k != "path"):
        raise ConfigError(
            f"{where}: path: names a store that there is, so nothing is captured. Leave out {more}."
        )


def _named(step: StudyStep, where: str) -> Iterator[tuple[str, str]]:
    """As `inputs_of`, of what may be of another type."""
    for key in _KINDS[step.command].inputs:
        value = step.fields.get(key)
        if isinstance(value, list) and key not in ("runs", "chosen"):
            raise ConfigError(f"{where}: {key}: is the name of one step, got {value!r:.80}")
        many = value if isinstance(value, list) else [] if value is None else [value]
        for name in many:
            if not isinstance(name, str):
                raise ConfigError(f"{where}: {key}: the name of a step is text, got {name!r:.100}")
            yield key, name


def _check_sweep(own: dict[str, Any], where: str) -> None:
    from bsc.train.config import TrainConfig
    from bsc.train.sweep import expand

    config = parse_config(TrainConfig, in_numbers(TrainConfig, own, where), where)
    expand(config.coders, where, config.preset)


def _check_choose(own: dict[str, Any], kind: _Kind, where: str) -> None:
    if odd := next((k for k in own if k not in kind.more), None):
        known = [*kind.inputs, *kind.more]
        raise ConfigError(f"{where}: unknown key {odd!r}{nearest(odd, known)}")
    by = own.get("by", [])
    if not isinstance(by, list) or not all(isinstance(b, str) for b in by):
        raise ConfigError(f"{where}: by: should be a list of fields of coders, got {by!r:.100}")
    if not isinstance(own.get("coders", {}), dict):
        raise ConfigError(
            f"{where}: coders: should be a table of fields, got {own['coders']!r:.80}"
        )
    for key in ("field", "figure"):
        if not isinstance(own.get(key, ""), str):
            raise ConfigError(f"{where}: {key}: should be text, got {own[key]!r:.100}")


def _check_flags(own: dict[str, Any], kind: _Kind, where: str) -> None:
    """Check values by the configs that they are options of."""
    known = list(kind.more)
    for config in map(_config, kind.configs):
        known += _flags(config)
        config_of(config, own, where)
    for key in kind.more:
        if key in own and not isinstance(own[key], bool if key == "no_probe" else str):
            what = "true or false" if key == "no_probe" else "text"
            raise ConfigError(f"{where}: {key}: should be {what}, got {own[key]!r:.80}")
    if odd := next((k for k in own if k not in known), None):
        shown_ = [k for k in (*kind.inputs, *known) if k not in kind.taken]
        raise ConfigError(
            f"{where}: unknown key {odd!r}{nearest(odd, shown_)}; known are {', '.join(shown_)}"
        )


def config_of(config: type[C], fields: Mapping[str, Any], where: str) -> C:
    """The config that some keys of a step are the flags of.

    Args:
        config: its class.
        fields: of the step; keys that are no flags of the config are passed over.
        where: the step, for messages.

    Raises:
        ConfigError: a value is not as it should be. Where text comes from is left to the command.
    """
    values: dict[str, Any] = {}
    flags = _flags(config)
    for key in fields.keys() & flags.keys():
        place, value = flags[key], _read(config, flags[key], fields[key], f"{where}: {key}")
        into = values
        for part in place[:-1]:
            into = into.setdefault(part, {})
        into[place[-1]] = tuple(value) if isinstance(value, list) else value
    if "text" in config.model_fields:
        sources = ("files", "dataset", "config_name", "revision")
        given = {k: v for k, v in values.get("text", {}).items() if k not in sources}
        values["text"] = {"corpus": "stdlib", **given}
    return parse_config(config, values, where)


def _flags(config: type[Config]) -> dict[str, tuple[str, ...]]:
    """Where the options of a config are, by the names of their flags."""
    return {
        option.name(place[-1]).removeprefix("--").replace("-", "_"): place
        for place, _, option in options_in(config)
    }


def _read(config: type[Config], place: tuple[str, ...], value: Any, where: str) -> Any:
    """A value, parsed where the flag has words for it, such as "10M"."""
    option = next(o for at, _, o in options_in(config) if at == place)
    if isinstance(value, str) and option.parser:
        try:
            return option.parser(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    return value


def in_numbers(config: type[Config], own: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields with what is written in words, such as "10M", as numbers."""
    places = {place for place, _, _ in options_in(config)}
    return {
        name: _read(config, (name,), value, f"{where}: {name}") if (name,) in places else value
        for name, value in own.items()
    }


def arguments(step: StudyStep, given: Mapping[str, str]) -> list[str]:
    """Arguments of `bsc` for a step whose keys are flags.

    Args:
        step: one of cache, finetune, eval or interp.
        given: flags that the study gives, and as ``""`` the argument.

    >>> step = StudyStep(name="figures", command="eval", fields={"run": "x", "ce_tokens": 100})
    >>> arguments(step, {"": "runs/x"})
    ['eval', 'runs/x', '--ce-tokens', '100']
    """
    kind = _KINDS[step.command]
    line = [step.command, *([given[""]] if "" in given else [])]
    off = {}
    for config in map(_config, kind.configs):
        for place, _, option in options_in(config):
            names = option.flag.split("/")
            if len(names) == 2:
                off[option.name(place[-1])] = names[1]
    own = {f"--{k.replace('_', '-')}": v for k, v in step.fields.items() if k not in kind.inputs}
    for name, value in (own | {k: v for k, v in given.items() if k}).items():
        if value is True:
            line.append(name)
        elif value is False:
            line += [off[name]] if name in off else []
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                line += [name, str(one)]
    return line


def shown(line: list[str]) -> str:
    """A command line as a person would write it."""
    return "bsc " + shlex.join(line)
