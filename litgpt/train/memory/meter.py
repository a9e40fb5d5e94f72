"""The memory of a computation on fake tensors: each storage from its birth to its death.

A fake tensor has a shape, a dtype and a device, but no data. Sizes are rounded as by an allocator.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt.model.sharded import local_shard

CUDA_BLOCK = 512  # bytes: CUDA's caching allocator rounds every allocation up to a multiple
CPU_BLOCK = 1
TEMPORARY = "temporary"


@dataclass(eq=False)
class Life:
    """A storage. Each birth and each death has its own time."""

    size: int
    birth: int
    kind: str = TEMPORARY
    death: float = float("inf")


class Meter(TorchDispatchMode):
    """Follows every storage that is made under it, and answers reads of values.

    Args:
        block: Bytes that sizes are rounded up to.

    Attributes:
        total: The bytes that are alive.
        place: What is computed; set by the caller.
        peaks: By place, the most bytes that were alive at once there, and when.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.lives: list[Life] = []
        self.alive: dict[int, Life] = {}  # by the address of the storage
        self.time = self.total = 0
        self.place = ""
        self.start()
        self.paused = False  # whether new storages do not count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5 if args[0].dtype.is_floating_point else 1  # some optimizers divide by 1 - x
        if any(hasattr(t, "from_local") for t in types):
            return NotImplemented  # a sharded tensor calls this again for its shard
        out = func(*args, **(kwargs or {}))
        for value in () if self.paused else tree_leaves(out):
            if torch.is_tensor(value):
                self.follow(value)
        return out

    def __enter__(self) -> "Meter":
        self.resize = torch.UntypedStorage.resize_
        meter = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = meter.resize(storage, size)
            if (life := meter.alive.get(storage._cdata)) is not None:
                meter.end(storage._cdata)
                meter.begin(storage, life.kind)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def start(self) -> None:
        """Forget earlier peaks."""
        self.peaks: dict[str, tuple[int, int]] = {self.place: (self.total, self.time)}

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max(size for size, _ in self.peaks.values())

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.begin(storage)
            weakref.finalize(storage, self.end, storage._cdata).atexit = False

    def begin(self, storage: torch.UntypedStorage, kind: str = TEMPORARY) -> None:
        self.time += 1
        life = Life(-(-storage.nbytes() // self.block) * self.block, self.time, kind)
        self.lives.append(life)
        self.alive[storage._cdata] = life
        self.total += life.size
        if self.total > self.peaks.get(self.place, (-1, 0))[0]:
            self.peaks[self.place] = self.total, self.time

    def end(self, key: int) -> None:
        self.time += 1
        life = self.alive.pop(key)
        life.death = self.time
        self.total -= life.size

    def name(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Give the storages of tensors a kind, unless they have one. What is kept for the backward pass may become a
        gradient there."""
        for tensor in tensors:
            life = self.alive.get(local_shard(tensor).untyped_storage()._cdata)
            if life is not None and life.kind in (TEMPORARY, "kept"):
                life.kind = kind

    def name_all(self, kind: str) -> None:
        """Give all living storages without a kind this one."""
        for life in self.alive.values():
            if life.kind == TEMPORARY:
                life.kind = kind

    def at_peaks(self) -> dict[str, dict[str, int]]:
        """The bytes by kind at the peak of each place."""
        found: dict[str, dict[str, int]] = {}
        for place, (_, time) in self.peaks.items():
            kinds = found[place] = {}
            for life in self.lives:
                if life.birth <= time < life.death:
                    kinds[life.kind] = kinds.get(life.kind, 0) + life.size
        return found
