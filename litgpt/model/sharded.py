"""Weights of which each rank holds some rows (FSDP2), and plain ones alike.

A sharded tensor is torch's `DTensor`, cut along its rows as `torch.chunk` does. torch's module for it takes a second to
import, so it is imported where there are such tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

asking: Optional[Callable[[torch.Tensor], None]] = None  # while the first rank works alone: how it asks for a weight


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, in the tensor's own memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def my_rows(tensor: torch.Tensor) -> slice:
    """Which rows of the whole tensor they are."""
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    size = -(-len(tensor) // mesh.size())
    first = min(size * mesh.get_local_rank(), len(tensor))
    return slice(first, min(first + size, len(tensor)))


def put(tensor: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    """Copy `rows` into a tensor from row `first` on; each rank what falls among its own."""
    own = my_rows(tensor)
    start, stop = max(first, own.start), min(first + len(rows), own.stop)
    if start < stop:
        local_shard(tensor)[start - own.start : stop - own.start].copy_(rows[start - first : stop - first])


def shard_like(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded like `tensor`, of this rank's `rows`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )  # fmt: skip


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank that calls; a plain one as it is.

    All ranks have to call it alike, except within `on_first_rank`.
    """
    if not is_sharded(tensor):
        return tensor
    if asking is not None:
        asking(tensor)
    return gathered(tensor)


def gathered(tensor: Any) -> torch.Tensor:
    with torch.no_grad():
        return tensor.full_tensor().to(tensor.device_mesh.device_type)  # its rows may lie elsewhere


def on_first_rank(rank: int, tensors: Sequence[Any], work: Callable[[], None]) -> None:
    """Run `work` on the first rank alone. The others wait where something is sharded, and give their rows of the
    `tensors` that it wants to have whole, in whatever order; so `work` need not know of them."""
    global asking
    sharded = [t for t in tensors if is_sharded(t)]

    def tell(number: int) -> int:
        told = torch.tensor(number, device=sharded[0].device_mesh.device_type)
        torch.distributed.broadcast(told, 0)
        return int(told)

    if not sharded:
        if rank == 0:
            work()
        return
    if rank:
        while (number := tell(-1)) >= 0:
            gathered(sharded[number])
        return
    numbers = {id(t): number for number, t in enumerate(sharded)}

    def ask(tensor: torch.Tensor) -> None:
        tell(numbers[id(tensor)])

    asking = ask
    try:
        work()
    finally:
        asking = None
        tell(-1)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within it the weights of a module are whole. What was changed in them stays, with each rank its rows."""
    slots = [
        (m, leaf, p) for m in module.modules() for leaf, p in m._parameters.items() if p is not None and is_sharded(p)
    ]
    for m, leaf, p in slots:
        setattr(m, leaf, nn.Parameter(gathered(p), requires_grad=p.requires_grad))
    try:
        yield
    finally:
        for m, leaf, p in slots:
            put(p.detach(), 0, getattr(m, leaf).detach())
            setattr(m, leaf, p)


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all tensors together; those that are sharded are added up over all ranks."""
    norm = torch.nn.utils.get_total_norm([t for t in tensors if not is_sharded(t)])
    sharded = [local_shard(t) for t in tensors if is_sharded(t)]
    if not sharded:
        return norm
    squares = torch.nn.utils.get_total_norm(sharded).square()
    torch.distributed.all_reduce(squares)
    return (squares + norm.to(squares.device).square()).sqrt()
