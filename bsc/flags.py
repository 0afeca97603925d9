"""Commands: functions whose flags come of configs, and flags that no config has.

A command is a function. Its parameters are arguments and flags as for typer, but for those that
are named in `configs`: such a parameter stands for all options of a config (bsc/options.py), and
the function is given the config, checked, or a dictionary of what was given.

Configs are imported when a command is called or its help is asked for, so that `bsc --help` answers
at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from typer.core import TyperCommand

from bsc.options import MACHINE

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from bsc.config import Config
    from bsc.options import Option

__all__ = ["AsJson", "Check", "Device", "ModelNow", "StoreNow", "command", "flag"]

F = TypeVar("F", bound=Callable[..., None])


def flag(help_: str, panel: str | None = None, *names: str, default: str = "", **kind: Any) -> Any:
    """A flag of a command that is no field of a config.

    Args:
        help_: a noun phrase and what else there is to know, in sentences.
        panel: heading under which `--help` lists it.
        names: its names on the command line; none: that of the parameter.
        default: what happens without the flag, where its default value does not say so.
        kind: as for `typer.Option`; a parser raises ValueError with a message.
    """
    if "parser" in kind:
        kind["parser"] = _said(kind["parser"])
        kind.setdefault("metavar", "COUNT")
    shown = default or True
    return typer.Option(*names, help=help_, rich_help_panel=panel, show_default=shown, **kind)


AsJson = Annotated[bool, flag("Print the result as JSON.", MACHINE, "--json")]
Check = Annotated[
    bool,
    flag(
        "Whether shards are compared with the store's manifest when they are first read.",
        MACHINE,
        "--check/--no-check",
    ),
]
Device = Annotated[
    str | None, flag("cpu, cuda or cuda:1.", MACHINE, default="a GPU where there is one")
]
StoreNow = Annotated[
    str | None, flag("Where the store is now.", MACHINE, default="where it was in training")
]
ModelNow = Annotated[
    str | None, flag("Where the model is now.", MACHINE, default="where it was at the capture")
]


def command(
    app: typer.Typer,
    configs: Mapping[str, str],
    *,
    name: str = "",
    grids: tuple[str, ...] = (),
    epilog: str = "",
) -> Callable[[F], F]:
    """Make a function a command with the options of configs.

    Args:
        app: the command line.
        configs: by parameter of the function, where its config is:
            ``"bsc.eval.config:EvalConfig"``.
            A parameter that is annotated with the config gets one; one that is annotated as a
            dictionary gets the values that were given.
        name: of the command; empty: that of the function.
        grids: parameters whose every option may be given several times.
        epilog: below the help.
    """

    def register(function: F) -> F:
        called = name or function.__name__

        class Derived(TyperCommand):
            """Its options are made when they are needed."""

            @property
            def params(self) -> Any:
                return _whole(function, called, tuple(configs.items()), grids).params

            @params.setter
            def params(self, value: Any) -> None: ...

            def invoke(self, ctx: Any) -> Any:
                # What a config has by default is left to it, so that a file can say otherwise.
                unsaid = {
                    name: None
                    for name in ctx.params
                    if "__" in name and ctx.get_parameter_source(name).name == "DEFAULT"
                }
                callback = _whole(function, called, tuple(configs.items()), grids).callback
                return ctx.invoke(callback, **(ctx.params | unsaid))

        def stub() -> None: ...

        stub.__doc__ = function.__doc__
        app.command(called, cls=Derived, epilog=epilog)(stub)
        return function

    return register


class _Flag(NamedTuple):
    """An option on its way to the command line."""

    place: tuple[str, ...]
    """Parameter of the command, then fields, down to that of the option."""
    kind: Any
    """Type for typer."""
    option: Any
    """For typer, too."""
    default: Any
    """What help shows; ``inspect.Parameter.empty`` where it has to be given."""

    @property
    def name(self) -> str:
        """Parameter of the generated function."""
        return "__".join(self.place)

    def parameter(self) -> inspect.Parameter:
        """Parameter of the generated function."""
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[
                self.kind if self.default is not None else self.kind | None, self.option
            ],
            default=self.default,
        )


@cache
def _whole(
    function: Callable[..., None], called: str, configs: tuple[tuple[str, str], ...], grids: Any
) -> Any:
    """The command of a function, by typer, with every option of its configs."""
    kinds = {name: _load(where) for name, where in configs}
    names = {kind.__name__: kind for kind in kinds.values()}
    hints = get_type_hints(function, localns=names, include_extras=True)
    flags: list[_Flag] = []
    parameters = []
    for name, own in inspect.signature(function).parameters.items():
        if name not in kinds:
            parameters.append(
                own.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )
            continue
        for found in _flags(kinds[name], (name,), grid=name in grids):
            flags.append(found)
            parameters.append(found.parameter())

    def call(**given: Any) -> None:
        from bsc.config import parse_config

        values: dict[str, dict[str, Any]] = {name: {} for name in kinds}
        for found in flags:
            value = given.pop(found.name)
            if value is not None:
                into: Any = values
                for part in found.place[:-1]:
                    into = into.setdefault(part, {})
                into[found.place[-1]] = tuple(value) if isinstance(value, list) else value
        for name, kind in kinds.items():
            whole = hints[name] is kind
            given[name] = parse_config(kind, values[name], where) if whole else values[name]
        function(**given)

    where = f"bsc {called}"
    # typer reads the signature from here; mypy knows no such attribute of a function.
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    made = typer.Typer(add_completion=False)
    made.command()(call)
    return typer.main.get_command(made)


def _load(where: str) -> type[Config]:
    module, _, name = where.partition(":")
    found: type[Config] = getattr(import_module(module), name)
    return found


def _flags(kind: type[Config], place: tuple[str, ...], *, grid: bool) -> Iterator[_Flag]:
    """Flags of a config's options, of the configs in its fields too."""
    from bsc.options import options_in

    for here, field, option in options_in(kind, place):
        default = inspect.Parameter.empty if field.is_required() else field.default
        if option.shown or default == () or grid:
            default = None
        kind_ = _kind(field, option, grid)
        yield _Flag(here, kind_, _typer_option(here[-1], field, option), default)


def _typer_option(name: str, field: FieldInfo, option: Option) -> Any:
    """An option for typer."""
    return typer.Option(
        option.flag or option.name(name),
        help=field.description,
        rich_help_panel=option.panel,
        show_default=option.shown or True,
        metavar=option.metavar or ("COUNT" if option.parser else None),
        parser=_said(option.parser) if option.parser else None,
    )


def _kind(field: FieldInfo, option: Option, grid: bool) -> Any:
    """Type for typer of a field."""
    many = grid
    parts = _members(field.annotation)
    if any(get_origin(p) is tuple for p in parts):
        many, parts = True, _members(next(get_args(p)[0] for p in parts if get_origin(p) is tuple))
    words = str in parts or any(get_origin(p) is Literal for p in parts)
    plain: Any = next((p for p in (bool, int, float, Path) if p in parts and not words), str)
    return list[plain] if many else plain


def _members(annotation: Any) -> list[Any]:
    """What a union is of, without None and without what is annotated."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [m for a in get_args(annotation) for m in _members(a) if m is not NoneType]
    return [annotation]


def _said(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose ValueError is told to the user."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed
