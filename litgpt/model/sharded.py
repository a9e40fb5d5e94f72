"""Operations on weights that may be sharded (FSDP2).

A sharded tensor is a `DTensor`; each rank holds a chunk of its rows, as `torch.chunk` splits them. Importing torch's
module for it takes a second, so functions import it only when they need it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

asking: Optional[Callable[[torch.Tensor], object]] = None  # within `on_first_rank`: asks for a tensor's shards


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, as a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def my_rows(tensor: torch.Tensor) -> slice:
    """Which rows of the full tensor this rank holds."""
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    size = -(-len(tensor) // mesh.size())
    first = min(size * mesh.get_local_rank(), len(tensor))
    return slice(first, min(first + size, len(tensor)))


def reshard(module: nn.Module) -> None:
    """Shard again what a forward pass gathered. Without a backward pass, FSDP leaves some weights as they are, and the
    parameters of the module are then not those that an optimizer has to update."""
    for part in module.modules():
        if callable(again := getattr(part, "reshard", None)):
            again()


def put(tensor: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    """Copy `rows` into a tensor from row `first` on. Each rank copies those that it holds."""
    own = my_rows(tensor)
    start, stop = max(first, own.start), min(first + len(rows), own.stop)
    if start < stop:
        local_shard(tensor)[start - own.start : stop - own.start].copy_(rows[start - first : stop - first])


def shard_like(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded like `tensor` and whose rows on this rank are `rows`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor. A collective operation if it is sharded: all ranks must call it, except within
    `on_first_rank`."""
    if is_sharded(tensor) and asking is not None:
        asking(tensor)
    return gathered(tensor) if is_sharded(tensor) else tensor


def gathered(tensor: Any) -> torch.Tensor:
    with torch.no_grad():
        return tensor.full_tensor().to(tensor.device_mesh.device_type)  # shards may be offloaded


def on_first_rank(rank: int, tensors: Sequence[Any], work: Callable[[], None]) -> None:
    """Run `work` on rank 0. Wherever it calls `full_tensor` for one of `tensors`, the other ranks send their shards. So
    `work` can be written for one process, in any order of tensors, and holds one full tensor at a time."""
    global asking
    sharded = [t for t in tensors if is_sharded(t)]

    def broadcast(number: int) -> int:
        sent = torch.tensor(number, device=sharded[0].device_mesh.device_type)
        torch.distributed.broadcast(sent, 0)
        return int(sent)

    if not sharded:
        if rank == 0:
            work()
        return
    if rank:
        while (number := broadcast(-1)) >= 0:
            gathered(sharded[number])
        return
    numbers = {id(t): number for number, t in enumerate(sharded)}
    asking = lambda tensor: broadcast(numbers[id(tensor)])  # noqa: E731
    try:
        work()
    finally:
        asking = None
        broadcast(-1)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within this context the weights of a module are full tensors. Changes to them are kept."""
    slots = [
        (m, name, p)
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False, remove_duplicate=False)
        if is_sharded(p)
    ]
    for m, name, p in slots:
        setattr(m, name, nn.Parameter(gathered(p), requires_grad=p.requires_grad))
    try:
        yield
    finally:
        for m, name, p in slots:
            put(p.detach(), 0, getattr(m, name).detach())
            setattr(m, name, p)


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm([t for t in tensors if not is_sharded(t)])
    sharded = [local_shard(t) for t in tensors if is_sharded(t)]
    if not sharded:
        return norm
    squares = torch.nn.utils.get_total_norm(sharded).square()
    torch.distributed.all_reduce(squares)
    return (squares + norm.to(squares.device).square()).sqrt()
