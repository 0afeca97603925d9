"""Evaluating a run on a store that it was not trained on: the same model on another text.

What is measured goes into a folder that is a run like any other, RUN/on/NAME, with links to the
coders and metrics of the run and with the other store in its config. So report, compare, examples
and interp take it as they take a run.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from bsc.cache.store.store import ActivationStore
from bsc.errors import UserError
from bsc.train.run import Run
from bsc.train.run_config import TrainedOn
from bsc.typed import write_typed

__all__ = ["run_on"]

_MODEL = ("weights_sha256", "revision", "dtype", "random_weights")
"""What must be the same of two stores' models."""


def run_on(run: Run, store: str | Path) -> Run:
    """The run with another store, made if need be.

    Args:
        run: a run whose training has ended.
        store: of the same model, with the run's hookpoints and held-out rows.

    Raises:
        UserError: the store is of another model, lacks a hookpoint, or is the run's own.
    """
    config = run.config()
    opened = ActivationStore(store)
    opened.held_out  # noqa: B018 - raises, with what to do, where there are none
    if opened.store_id == config.store_id:
        raise UserError(
            f"--on {store}: this is the store that the run was trained on; leave --on out to "
            f"measure on its held-out rows."
        )
    mine, other = config.model, opened.attributes["model"]
    if differ := [key for key in _MODEL if mine.get(key) != other.get(key)]:
        raise UserError(
            f"--on {store}: captured from another model than the run's: {differ[0]} is "
            f"{other.get(differ[0])}, the run's is {mine.get(differ[0])}. Capture the other text "
            f"from the model that the run's store was captured from."
        )
    for planned in config.coders:
        hook = opened.hookpoint(planned.hookpoint)
        if planned.coder.d_out != hook.d_out:
            raise UserError(
                f"--on {store}: {hook.name} has width {hook.d_out}, {planned.name} gives "
                f"{planned.coder.d_out}: a store of another model."
            )
    name = PurePosixPath(str(store).rstrip("/")).name or "store"
    folder = run.folder / "on" / f"{name}-{opened.store_id[:6]}"
    own = Run(folder)
    address = opened.folder.address
    record = config.model_copy(
        update={
            "store": address if "://" in address else str(Path(address).resolve()),
            "store_id": opened.store_id,
            "trained_on": TrainedOn(store=config.store, store_id=config.store_id),
        }
    )
    for planned in config.coders:
        for file in ("coder.safetensors", "config.json"):
            _link(own.coder_folder(planned.name) / file, run.coder_folder(planned.name) / file)
    _link(own.metrics_path, run.metrics_path)
    if not own.config_path.exists() or own.config() != record:  # trained on, or moved
        own.remove_figures()
        write_typed(own.config_path, record)
    return own


def _link(path: Path, target: Path) -> None:
    """A link that holds when the run's folder is moved as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
