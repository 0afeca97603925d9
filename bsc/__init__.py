"""bsc: cache activations of a language model once, train many sparse coders on them, measure.

The public names below are loaded when they are first used, so that `import bsc` costs nothing.
`import bsc` also makes zarr-python know the data type `bfloat16`, whichever of the two is imported
first.

>>> import bsc
>>> bsc.SparseCoder.__name__
'SparseCoder'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bsc.zarr_on_import import register_with_zarr

if TYPE_CHECKING:
    from bsc.cache.capture.capture import capture
    from bsc.cache.capture.config import CaptureConfig
    from bsc.cache.model.text_source import TextSource
    from bsc.cache.store.store import ActivationStore
    from bsc.errors import UserError
    from bsc.eval.browse.browse import write_browser
    from bsc.eval.browse.config import BrowseConfig
    from bsc.eval.config import EvalConfig
    from bsc.eval.evaluate import evaluate
    from bsc.eval.evaluation import read_evaluation
    from bsc.eval.latent_table import latents
    from bsc.eval.passes import edits
    from bsc.eval.passes.inside import splice
    from bsc.eval.report.report import write_report
    from bsc.finetuning.config import FinetuneConfig
    from bsc.finetuning.finetune import finetune
    from bsc.train.coders.coder import SparseCoder
    from bsc.train.coders.config import CoderConfig
    from bsc.train.coders.module import CoderModule
    from bsc.train.config import TrainConfig
    from bsc.train.run import Run
    from bsc.train.trainer import train_sweep

__all__ = [
    "ActivationStore",
    "BrowseConfig",
    "CaptureConfig",
    "CoderConfig",
    "CoderModule",
    "EvalConfig",
    "FinetuneConfig",
    "Run",
    "SparseCoder",
    "TextSource",
    "TrainConfig",
    "UserError",
    "capture",
    "edits",
    "evaluate",
    "finetune",
    "latents",
    "read_evaluation",
    "splice",
    "train_sweep",
    "write_browser",
    "write_report",
]
__version__ = "0.1.0"

_HOME = {
    "ActivationStore": "bsc.cache.store.store",
    "BrowseConfig": "bsc.eval.browse.config",
    "CaptureConfig": "bsc.cache.capture.config",
    "CoderConfig": "bsc.train.coders.config",
    "CoderModule": "bsc.train.coders.module",
    "EvalConfig": "bsc.eval.config",
    "FinetuneConfig": "bsc.finetuning.config",
    "Run": "bsc.train.run",
    "SparseCoder": "bsc.train.coders.coder",
    "TextSource": "bsc.cache.model.text_source",
    "TrainConfig": "bsc.train.config",
    "UserError": "bsc.errors",
    "capture": "bsc.cache.capture.capture",
    "edits": "bsc.eval.passes.edits",
    "evaluate": "bsc.eval.evaluate",
    "finetune": "bsc.finetuning.finetune",
    "latents": "bsc.eval.latent_table",
    "read_evaluation": "bsc.eval.evaluation",
    "splice": "bsc.eval.passes.inside",
    "train_sweep": "bsc.train.trainer",
    "write_browser": "bsc.eval.browse.browse",
    "write_report": "bsc.eval.report.report",
}

register_with_zarr()


def __getattr__(name: str) -> object:
    if name == "edits":  # a module of functions
        return import_module(_HOME[name])
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__version__"])
