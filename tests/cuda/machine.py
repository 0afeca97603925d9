"""A CUDA device that is not there: tensors that say ``cuda:0`` and have their values on the CPU.

Every step runs to its end with real numbers, while `device`, `is_cuda` and dispatch say CUDA. What
surfaces: tensors on different devices, as CUDA refuses them; `.numpy()` of a tensor on the device;
dtypes that an operation has no CUDA kernel for (`GAPS`); host synchronisations, and sums in an
order that CUDA leaves open, by the line of bsc that causes them. Speed and rounding do not.

Needs a C++ compiler for some lines that register a device guard that does nothing: a build of torch
for CPUs has none for CUDA, and without it any Python indexing aborts. The guard changes the process
for good, so use it in a process of its own (scenarios.py).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo  # before Generator is replaced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["CUDA", "Machine", "host", "load_guard", "pretended"]

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static struct Set { Set() {
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  if (!slot.load()) slot.store(new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
} } set;
"""
CUDA = torch.device("cuda", 0)

GAPS = {"_embedding_bag_per_sample_weights_backward": {torch.bfloat16}}
"""Operations that have no CUDA kernel for a dtype on some version that we support: before torch
2.13 (https://github.com/pytorch/pytorch/issues/185808)."""
_SYNCING = {
    "_local_scalar_dense": 1, "nonzero": 1, "equal": 1, "bincount": 2, "masked_select": 1,
    "unique_dim": 1, "_unique2": 1, "unique_consecutive": 1, "is_nonzero": 1, "histc": 2,
}  # fmt: skip
"""Operations that read from the device before they go on, and how often."""
_WRITES = ("index_put_", "_index_put_impl_", "index_put")
_MIXED = ("_to_copy", "copy_", "index", *_WRITES, "set_", "lift_fresh", "_foreach_copy_")
"""Operations that may have tensors of both devices."""
_ANY_ORDER = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "put_", "cumsum", "cumsum_", "bincount", "histc", "index_reduce_",
}  # fmt: skip
"""Operations whose sums CUDA adds up in any order, so that floats differ from run to run
(torch.use_deterministic_algorithms). `index_put_` that accumulates sorts first."""


def load_guard() -> None:
    """Make torch believe that it has CUDA. For the rest of the process.

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    root = Path(torch.__file__).parent
    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(_GUARD)
    command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", f"-I{root}/include", "guard.cpp"]
    command += [f"-L{root}/lib", "-lc10", "-o", "guard.so"]
    subprocess.run(command, check=True, cwd=folder)
    ctypes.CDLL(str(folder / "guard.so"))
    torch.cuda._lazy_init = lambda: None  # what C++ calls before it makes a CUDA tensor


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    _inner: torch.Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], inner: torch.Tensor) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self._inner = inner

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    # torch types the arguments more narrowly than it calls with.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert Machine.current is not None, f"{func} on a CUDA tensor outside the mode"
        return Machine.current.run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        # Python indexing by a list makes a tensor in C++, where no mode sees it.
        if isinstance(index, list):
            index = torch.tensor(index)
        elif isinstance(index, tuple):
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
        return super().__getitem__(index)

    def tolist(self) -> Any:
        assert Machine.current is not None
        Machine.current.sync("tolist")
        return self._inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def data_ptr(self) -> int:
        return self._inner.data_ptr()

    # torch passes `tensor_contents`, which its own stub leaves to Tensor.
    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


def host(value: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, wherever it says that it is."""
    return value._inner if isinstance(value, OnDevice) else value


# torch leaves the methods of TorchDispatchMode untyped: hence `no-untyped-call` below.
class Machine(TorchDispatchMode):
    """Runs on the CPU what is on cuda:0, checks devices, and counts."""

    current: ClassVar[Machine | None] = None

    def __init__(self, repository: Path) -> None:
        """Count by the lines of the files in a repository."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._repository, self._depth = repository, 0
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.syncs: collections.Counter[str] = collections.Counter()
        self.missing: collections.Counter[str] = collections.Counter()
        self.any_order: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Any:
        Machine.current = self
        self._depth += 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        self._depth -= 1
        Machine.current = self if self._depth else None
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _where(self) -> str:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename).resolve()
            inside = path.is_relative_to(self._repository) and ".venv" not in path.parts
            if inside and "tests" not in path.parts:
                return f"{path.relative_to(self._repository)}:{frame.lineno}"
        return "elsewhere"

    def sync(self, what: str, times: int = 1) -> None:
        """Count a host synchronisation."""
        self.syncs[f"{self._where()} {what}"] += times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation."""
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        device = [t for t in tensors if isinstance(t, OnDevice)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not device and wanted != "cuda":
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        self._note_syncs(name, args, kwargs, to_host=bool(device) and wanted == "cpu")
        self._check_devices(func, name, tensors, device)
        if name in GAPS and any(t.dtype in GAPS[name] for t in device):
            self.missing[f"{self._where()} {name}"] += 1
        floats = any(t.is_floating_point() for t in tensors)
        if name in _ANY_ORDER and floats:
            self.any_order[f"{self._where()} {name}"] += 1
        known = {id(t._inner): t for t in device}
        inner_args, inner_kwargs = tree_map(
            lambda t: t._inner if isinstance(t, OnDevice) else t, (args, dict(kwargs))
        )
        if wanted == "cuda":
            inner_kwargs["device"] = torch.device("cpu")
            inner_kwargs.pop("pin_memory", None)
        out = func(*inner_args, **inner_kwargs)
        if name == "_to_copy" and device and wanted == "cpu":
            return out
        if name == "copy_" and not isinstance(args[0], OnDevice):
            return args[0]

        def wrap(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return t
            return known[id(t)] if id(t) in known else OnDevice(t)

        return tree_map(wrap, out)

    def _note_syncs(self, name: str, args: Any, kwargs: Any, *, to_host: bool) -> None:
        base = name.rstrip("_") if not name.startswith("__") else name
        if name == "_to_copy" and to_host:
            self.sync("copy to the host")
        elif name == "copy_" and isinstance(args[1], OnDevice):
            late = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
            if not isinstance(args[0], OnDevice) and not late:
                self.sync("copy to the host")
        elif name == "index" or name in _WRITES:
            indices = [i for i in args[1] if i is not None]
            masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
            filled = name != "index" and args[2].numel() == 1 and len(indices) == 1
            if masks and not filled:
                self.sync("mask as index", len(masks))
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync("repeat_interleave without output_size")
        elif base in _SYNCING:
            self.sync(base, _SYNCING[base])

    def _check_devices(
        self, func: Any, name: str, tensors: list[torch.Tensor], device: list[OnDevice]
    ) -> None:
        if name in _MIXED or not device:
            return
        several = name.startswith(("_fused_", "_foreach_"))
        others = [t for t in tensors if not isinstance(t, OnDevice)]
        bad = [t for t in others if t.ndim or (several and not device)]
        if bad:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu "
                f"({[tuple(t.shape) for t in bad]}) at {self._where()}"
            )


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


@contextlib.contextmanager
def pretended(machine: Machine) -> Iterator[Machine]:
    """While the block runs, CUDA's generators, streams and events are there."""
    cuda: Any = torch.cuda
    tensor: Any = torch.Tensor
    inference: Any = torch.inference_mode
    saved = (
        (torch, "Generator", torch.Generator),
        (cuda, "Stream", cuda.Stream),
        (cuda, "Event", cuda.Event),
        (cuda, "current_stream", cuda.current_stream),
        (cuda, "stream", cuda.stream),
        (tensor, "record_stream", tensor.record_stream),
        # Wrappers cannot be inference tensors; no_grad takes the place of inference_mode.
        (inference, "__enter__", inference.__enter__),
        (inference, "__exit__", inference.__exit__),
    )
    made: Any = torch.Generator

    # A class in place of another, which mypy has no word for: here and where it is assigned.
    class Generator(made):  # type: ignore[misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            return made()

    def enter(self: Any) -> None:
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()

    torch.Generator = Generator  # type: ignore[misc]
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    tensor.record_stream = lambda self, stream: None
    inference.__enter__ = enter
    inference.__exit__ = lambda self, *error: self._no_grad.__exit__(*error)
    core: Any = torch._C
    lifted = core._only_lift_cpu_tensors()
    core._set_only_lift_cpu_tensors(True)
    try:
        with machine:
            yield machine
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
        core._set_only_lift_cpu_tensors(lifted)
