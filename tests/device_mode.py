"""The meta device as if it were a GPU: what would be copied, waited for, or refused there.

On the meta device many operators take CPU tensors silently, and nothing can be read. Under this mode

- an operator that gets a CPU tensor with dimensions beside one on the device raises `MixedDevices`;
- CPU tensors as indices are listed: legal on CUDA, but a copy that the host waits for;
- reading a value is answered, with zeros, and listed;
- a copy to the device is listed if it is not from pinned memory, or if the host waits for it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt.generate import sampling
from litgpt.model import devices

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._copy_from}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
LITGPT = str(Path(devices.__file__).parents[1])


class MixedDevices(AssertionError):
    pass


class DeviceMode(TorchDispatchMode):
    """
    Attributes:
        reads: Where the host waits for a value, as lines of the code.
        indices: Where CPU tensors are indices.
        copies: Where a tensor is copied to the device from memory that is not pinned, or waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.clear()

    def clear(self) -> None:
        self.reads: list[str] = []
        self.indices: list[str] = []
        self.copies: list[str] = []

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        copy = x.clone()
        self.pinned.add(copy.untyped_storage()._cdata)
        self.keep = copy  # while it is copied, no other storage has this address
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        there = [t for t in tensors if t.is_meta]
        packet = func.overloadpacket
        if there and packet in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal):
            self.reads.append(here())
            if packet is aten.nonzero:
                return torch.zeros(0, there[0].dim(), dtype=torch.int64, device="meta")
            return 0 if packet is aten._local_scalar_dense else False
        if packet in COPIES:
            return self.copy(func, tensors, args, kwargs)
        here_too = [t for t in tensors if not t.is_meta and t.dim() and t.numel()]
        if there and here_too:
            if packet not in INDEXED or not args[0].is_meta:
                raise MixedDevices(f"{func} with {[tuple(t.shape) for t in here_too]} on the CPU at {here()}")
            self.indices.append(here())
            moved = [i.to("meta") if torch.is_tensor(i) else i for i in args[1]]
            return func(args[0], moved, *args[2:], **kwargs)
        return func(*args, **kwargs)

    def copy(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        source = tensors[-1]
        if func.overloadpacket is aten._to_copy:
            target, waits = torch.device(kwargs.get("device") or source.device), not kwargs.get("non_blocking")
        else:
            target, waits = args[0].device, not (kwargs.get("non_blocking") or args[2:3] == (True,))
        if source.is_meta and target.type != "meta":
            self.reads.append(here())
            if func.overloadpacket is aten._to_copy:
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0].zero_()
        pinned = source.untyped_storage()._cdata in self.pinned
        if target.type == "meta" and not source.is_meta and source.dim() and (waits or not pinned):
            self.copies.append(here())
        return func(*args, **kwargs)


def here() -> str:
    """The line of litgpt that is running, and its caller's."""
    frame: Any = sys._getframe(1)
    lines: list[str] = []
    while frame is not None and len(lines) < 2:
        if frame.f_code.co_filename.startswith(LITGPT):
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines)


@contextmanager
def device_mode() -> Iterator[DeviceMode]:
    mode = DeviceMode()
    with mock.patch.object(devices, "pinned", mode.pin), mock.patch.object(sampling, "pinned", mode.pin), mode:
        yield mode
