"""Base of the configs: frozen, strict about names, with errors that say which key and what near."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bsc.errors import ConfigError, nearest

__all__ = ["Config", "parse_config", "read_toml"]

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A config is checked once, when it is made, and never changes after."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def parse_config(kind: type[C], values: dict[str, Any], where: str) -> C:
    """Make a config from values that a user wrote.

    Args:
        kind: the config's class.
        values: by field name.
        where: what the values come from, for the message: ``"sweep.toml"`` or ``"bsc train"``.

    Raises:
        ConfigError: names every wrong field, what was found there and what is allowed.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        problems = [_problem(kind, dict(e)) for e in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None


def _problem(kind: type[Config], error: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = kind.model_fields
        return f"unknown key {name!r}{nearest(name, known)}; known are {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{name}: {text}" if name else text
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
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error}).") from None
