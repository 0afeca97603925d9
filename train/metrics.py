"""Where training figures go: metrics.jsonl always, TensorBoard and W&B where asked for."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bsc.errors import StoreError, UserError
from bsc.files import canonical_json

__all__ = ["MetricsWriter", "check_targets"]

_SHOWN = ("fvu", "l0", "dead", "lr", "held_out_fvu", "held_out_l0", "kl", "ce")


def check_targets(*, tensorboard: bool, wandb: str | None) -> None:
    """See that what is asked for can be imported, before anything is written.

    Raises:
        UserError: it is not installed.
    """
    if tensorboard:
        _summary_writer()
    if wandb is not None:
        _wandb()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: not installed. pip install 'bsc[tensorboard]', or leave the flag out; "
            "metrics.jsonl has the same figures."
        ) from None
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb: not installed. pip install 'bsc[wandb]', or leave the flag out; "
            "metrics.jsonl has the same figures."
        ) from None
    return wandb


class MetricsWriter:
    """Writes lines of figures, each of one coder at one step."""

    def __init__(
        self,
        path: Path,
        *,
        keep_bytes: int = 0,
        tensorboard: Path | None = None,
        wandb: str | None = None,
        name: str = "run",
    ) -> None:
        """Open the file for lines after the first `keep_bytes`; what follows them is cut off.

        Args:
            path: of metrics.jsonl.
            keep_bytes: what a checkpoint counted.
            tensorboard: folder of its event files.
            wandb: project there.
            name: of the run, for W&B.

        Raises:
            UserError: what is asked for is not installed.
            StoreError: the file has fewer bytes.
        """
        self._stack = ExitStack()
        self._path = path
        self._placed_at = -1
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard is not None:
            self._board = self._stack.enter_context(_summary_writer()(str(tensorboard)))
        if wandb is not None:
            self._wandb = _wandb().init(
                project=wandb, name=name, resume="allow", dir=str(path.parent)
            )
            self._stack.callback(self._wandb.finish)
        self._file = self._stack.enter_context(path.open("ab"))
        if self._file.seek(0, os.SEEK_END) < keep_bytes:
            raise StoreError(f"{path}: shorter than when the checkpoint was written, so damaged.")
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)

    def write(self, line: dict[str, Any]) -> None:
        """One line: `step`, `coder` and figures.

        Raises:
            StoreError: the file is no longer there.
        """
        if line["step"] != self._placed_at:  # once for all coders of a step
            self._placed_at = line["step"]
            self._check_place()
        self._file.write(canonical_json(line, indent=None).encode())
        shown = {f"{line['coder']}/{k}": line[k] for k in _SHOWN if line.get(k) is not None}
        if self._board is not None:
            for key, value in shown.items():
                self._board.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(shown, step=line["step"])

    def _check_place(self) -> None:
        """A file that was removed or moved takes lines that nobody will ever read."""
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:
            there = False
        if not there:
            raise StoreError(
                f"{self._path}: no longer there: the run's folder was removed or moved while it "
                f"was trained, so training stops. Train again, or move the folder back and go on "
                f"with --resume."
            )

    def flush(self) -> int:
        """Make the lines durable; the length of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()
