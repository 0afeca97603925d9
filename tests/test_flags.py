"""Flags come of configs: a field is a flag, with its type, default and help."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer

from bsc.cli import app
from bsc.config import Config, parse_config
from bsc.counts import parse_count
from bsc.errors import ConfigError, UserError
from bsc.flags import AsJson, command
from bsc.options import option, option_of

CONFIGS = [
    "bsc.cache.capture.config:CaptureConfig",
    "bsc.cache.model.text_source:TextSource",
    "bsc.train.config:TrainConfig",
    "bsc.train.config:SweepPoint",
    "bsc.finetuning.config:FinetuneConfig",
    "bsc.eval.config:EvalConfig",
    "bsc.eval.interp.config:JudgeConfig",
    "bsc.eval.interp.config:InterpConfig",
    "bsc.eval.interp.config:Prices",
]


class Inner(Config):
    """Part of another."""

    width: int | None = option(None, "Width.", "Sizes", ge=1, shown="the model's")


class Example(Config):
    """Every kind of option."""

    inner: Inner = Inner()
    rows: int = option(100, "Rows.", parser=parse_count)
    share: float = option(0.5, "Share.", ge=0, le=1)
    kind: Literal["one", "two"] = option("one", "one or two.")
    folder: Path = option(Path("here"), "Folder.")
    where: str | Path = option("acts", "Folder or address.")
    names: tuple[str, ...] = option((), "Names.", flag="--name")
    numbers: tuple[int, ...] = option((1, 2), "Numbers.")
    quiet: bool = option(False, "Quiet.")
    check: bool = option(True, "Check.", flag="--check/--no-check")
    needed: str = option(..., "What is needed.")
    unsaid: int = 3
    """Not a flag."""


def run(*arguments: str, whole: bool = True) -> Any:
    """What a command with the options of `Example` is given."""
    given: list[Any] = []
    small = typer.Typer(add_completion=False)

    def with_config(config: Example, as_json: AsJson = False) -> None:
        """A command."""
        given.append((config, as_json))

    def with_values(config: dict[str, Any], as_json: AsJson = False) -> None:
        """A command."""
        given.append((config, as_json))

    register = command(small, {"config": f"{__name__}:Example"}, name="example")
    register(with_config if whole else with_values)
    typer.main.get_command(small)(list(arguments), standalone_mode=False)
    return given[0] if given else None


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, import_module(__name__)))


def test_what_is_not_given_is_left_to_the_config() -> None:
    config, as_json = run("--needed", "x")
    assert config == Example(needed="x") and not as_json
    assert run("--needed", "x", whole=False) == ({"needed": "x"}, False)


def test_every_kind_of_option_arrives() -> None:
    config, as_json = run(
        "--needed", "x", "--width", "7", "--rows", "2k", "--share", "1", "--kind", "two",
        "--folder", "a/b", "--where", "s3://bucket/acts", "--name", "a", "--name", "b",
        "--numbers", "5", "--quiet", "--no-check", "--json",
    )  # fmt: skip
    assert as_json and config == Example(
        needed="x", inner=Inner(width=7), rows=2000, share=1.0, kind="two", folder=Path("a/b"),
        where="s3://bucket/acts", names=("a", "b"), numbers=(5,), quiet=True, check=False,
    )  # fmt: skip
    assert config.where == "s3://bucket/acts", "an address is no path"


def test_a_default_that_is_given_counts_as_given() -> None:
    values, _ = run("--needed", "x", "--rows", "100", "--check", whole=False)
    assert values == {"needed": "x", "rows": 100, "check": True}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "2"], "bsc example: --share: should be at most 1, got 2.0"),
        (["--kind", "tow"], "--kind: should be 'one' or 'two', got 'tow' (did you mean 'two'?)"),
        (["--width", "0"], "bsc example: --width: should be at least 1, got 0"),
    ],
)
def test_a_wrong_value_names_the_flag(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("--needed", "x", *arguments)
    assert words in str(error.value)


def test_one_line_makes_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        run("--needed", "x", "--unsaid", "4")
    run("--help")
    shown = capsys.readouterr().out
    for words in ("--needed", "[required]", "[default: 100]", "the model's", "Sizes", "COUNT"):
        assert words in shown, words
    assert "--unsaid" not in shown


@pytest.mark.parametrize("where", CONFIGS)
def test_help_names_every_value_that_a_flag_takes(where: str) -> None:
    module, _, name = where.partition(":")
    found = 0
    for field in getattr(import_module(module), name).model_fields.values():
        if option_of(field):
            found += 1
            assert field.description and field.description.endswith("."), field
            if get_origin(field.annotation) is Literal:
                for value in get_args(field.annotation):
                    assert value in field.description, (field.description, value)
    assert found


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [*CONFIGS, "bsc.study.config:Hardware"])
def test_a_number_of_a_config_is_finite(where: str, number: float) -> None:
    module, _, name = where.partition(":")
    kind = getattr(import_module(module), name)
    for field, info in kind.model_fields.items():
        if {float, float | None} & {info.annotation, *get_args(info.annotation)}:
            with pytest.raises(ConfigError, match=f"{field}: input should be a finite number"):
                parse_config(kind, {field: number}, "a file")


def test_flags_of_a_command_are_told_apart() -> None:
    for info in app.registered_commands:
        made = typer.Typer(add_completion=False)
        made.registered_commands = [info]
        names = [o for p in typer.main.get_command(made).params for o in p.opts]
        assert len(names) == len(set(names)), (info.name, names)


@pytest.mark.parametrize("name", ["cache", "plan", "train", "eval", "interp"])
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys, bsc.cli\n"
        f"try: bsc.cli.main(['{name}', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'zarr', 'numpy', 'transformers', 'datasets', 'httpx')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-500:] + done.stderr


def test_python_callers_get_the_same_checks() -> None:
    with pytest.raises(ValueError, match="share"):
        Example(needed="x", share=3)
    with pytest.raises(UserError, match="here: share: should be at most 1"):
        parse_config(Example, {"needed": "x", "share": 3}, "here")
    assert Example(needed="x").but(share=1.0).share == 1.0
    with pytest.raises(ValueError, match="share"):
        Example(needed="x").but(share=2.0)
