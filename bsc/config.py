"""Base of the configs: frozen, strict about names, with errors that say which key and what near."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bsc.errors import ConfigError, nearest
from bsc.options import option_of

__all__ = ["Config", "parse_config", "read_toml"]

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A config is checked once, when it is made, and never changes after."""

    # Built at the first use, so that a command that only says what its flags are need not wait.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        defer_build=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_coercion(cls, values: Any) -> Any:
        """A number is not a truth value or a text: `k = true` and `k = "8"` are mistakes."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            kinds = _kinds(field.annotation) if field else set()
            numeric = kinds & {int, float}
            if (numeric and isinstance(value, bool) and bool not in kinds) or (
                numeric and isinstance(value, str) and str not in kinds
            ):
                raise ValueError(f"{name}: should be a number, got {value!r}")
            if bool in kinds and not isinstance(value, bool) and not kinds & {int, str}:
                raise ValueError(f"{name}: should be true or false, got {value!r}")
        return values

    def but(self, **changes: Any) -> Self:
        """The same but for some fields, checked again."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(given | changes))


def parse_config(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config from values that a user wrote.

    Args:
        kind: the config's class.
        values: by field name.
        where: what the values come from, for the message: ``"sweep.toml"`` or ``"bsc train"``.

    Raises:
        ConfigError: names every wrong field, what was found there and what is allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected fields with values, got {values!r:.100}")
    try:
        return kind(**values)
    except ValidationError as error:
        flags = where.startswith("bsc ")
        problems = [_problem(kind, dict(e), flags) for e in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _kinds(annotation: Any) -> set[Any]:
    """Types and types of literals that an annotation allows.

    >>> _kinds(int | None) == {int, type(None)}
    True
    """
    parts = get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*map(_kinds, parts))


_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}


def _problem(kind: type[Config], error: dict[str, Any], flags: bool) -> str:
    """What is wrong with a field, in words.

    Args:
        kind: the config.
        error: as pydantic gives it.
        flags: whether fields are named as flags where they are one.
    """
    # After the field's own name pydantic puts which member of a union it tried.
    place = [str(part) for part in error["loc"]] or [""]
    name = place.pop(0)
    field = kind.model_fields.get(name)
    while field and place and isinstance(field.annotation, type) and place[0] != name:
        if not issubclass(field.annotation, Config):
            break
        kind, name = field.annotation, place.pop(0)
        field = kind.model_fields.get(name)
    option = option_of(field) if field and flags else None
    if option:
        name = option.name(name)
    if error["type"] == "extra_forbidden":
        known = kind.model_fields
        return f"unknown key {name!r}{nearest(name, known)}; known are {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{name}: {text}" if name else text
    if error["type"] in _BOUNDS:
        key, words = _BOUNDS[error["type"]]
        return f"{name}: should be {words} {error['ctx'][key]:,g}, got {error['input']!r}"
    if error["type"] == "literal_error":
        known = error["ctx"]["expected"]
        near = nearest(str(error["input"]), re.findall(r"'([^']+)'", known))
        return f"{name}: should be {known}, got {error['input']!r}{near}"
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it is missing or not TOML; the message has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, a huge number
        raise ConfigError(f"{path}: not a TOML file ({error}).") from None
