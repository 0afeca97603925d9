"""Makes zarr-python know `bfloat16` after `import bsc`, without importing zarr for it.

zarr takes a third of a second to import, and most commands never need it. If it is loaded already
the type is registered at once; if not, as soon as somebody imports it. zarr 3.4.1 and later find
the type by themselves through the package's entry point, before that this is how.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_with_zarr"]

_TYPE = "bsc.cache.store.zarr_bfloat16"


class _ThenRegister(Loader):
    """Loads zarr as ever, then the module that registers the type."""

    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        import_module(_TYPE)


class _ZarrFinder(MetaPathFinder):
    """Answers for `zarr` alone, until it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "zarr":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


def register_with_zarr() -> None:
    """Register the type now if zarr is loaded, else when it is."""
    if "zarr" in sys.modules:
        import_module(_TYPE)
    else:
        sys.meta_path.insert(0, _ZarrFinder())
