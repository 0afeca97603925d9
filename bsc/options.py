"""Options: fields of a config that are flags of a command too.

What an option is called, what it takes, its default, its help and where `--help` lists it stand in
one place, the field. Configs are made of these fields by Python callers, by TOML files and by
flags (bsc/flags.py) alike, and checked in one way (bsc/config.py). Imports no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

__all__ = ["CODERS", "MACHINE", "STEERING", "Option", "option", "option_of", "options_in"]

MACHINE = "Machine and output"
CODERS = "Coders: every value may be given several times"
STEERING = "Going on, planning, watching"


@dataclass(frozen=True)
class Option:
    """How a field is shown on a command line."""

    panel: str | None
    """Heading under which `--help` lists it."""
    flag: str
    """Its name there; empty: the field's."""
    shown: str
    """What happens without it, where the default value does not say so."""
    parser: Callable[[str], Any] | None
    """Makes the value of what was written; raises ValueError with a message."""
    metavar: str | None
    """What `--help` calls the value; None: its type."""

    def name(self, field: str) -> str:
        """The flag of a field, without its negation."""
        return self.flag.split("/")[0] or f"--{field.replace('_', '-')}"


def option(
    default: Any,
    help_: str,
    panel: str | None = None,
    *,
    flag: str = "",
    shown: str = "",
    parser: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    **bounds: Any,
) -> Any:
    """A field that is a flag.

    Args:
        default: as for `pydantic.Field`; ``...`` where there is none.
        help_: a noun phrase and what else there is to know, in sentences.
        panel: heading under which `--help` lists it.
        flag: its name on the command line; empty: the field's. ``--check/--no-check`` for a truth
            value that has a flag for either.
        shown: what happens without it, where the default value does not say so.
        parser: makes the value of what was written; raises ValueError with a message.
        metavar: what `--help` calls the value.
        bounds: as for `pydantic.Field`: ge, le, gt, lt.
    """
    from pydantic import Field  # here, for a command that has no config needs no pydantic

    extra = {"option": Option(panel, flag, shown, parser, metavar)}
    return Field(default, description=help_, json_schema_extra=cast(Any, extra), **bounds)


def option_of(field: FieldInfo) -> Option | None:
    """The option that a field is; None: it is none."""
    extra = field.json_schema_extra
    found: object = extra.get("option") if isinstance(extra, dict) else None
    return found if isinstance(found, Option) else None


def options_in(
    kind: type[BaseModel], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo, Option]]:
    """Every option of a config and of the configs in its fields: where it is, its field, itself."""
    from pydantic import BaseModel

    for name, field in kind.model_fields.items():
        here = (*place, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from options_in(field.annotation, here)
        elif found := option_of(field):
            yield here, field, found
