from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import bsc


def test_every_public_name_is_there() -> None:
    for name in bsc.__all__:
        assert getattr(bsc, name) is not None
    assert set(bsc.__all__) == set(bsc._HOME)


def test_every_module_imports_and_its_all_is_there() -> None:
    names = [m.name for m in pkgutil.walk_packages(bsc.__path__, "bsc.")]
    assert "bsc.cache.store.store" in names and "bsc.eval.report.report" in names
    for name in names:
        if name in ("bsc.__main__",):  # runs the command line
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.{public}"


def test_modules_have_one_copy() -> None:
    import sys

    assert not [m for m in sys.modules if m.split(".")[0] in ("cache", "train", "eval")]
    assert Path(bsc.__file__).parent.joinpath("cache").is_symlink()
