"""Rematerialization: activations that cheap operations can compute again are not kept for the backward pass.

A norm, a GLU, a dropout or a rotation needs no matmul, and its result can be as large as that of one. `run` calls such
a function and keeps a recipe for its result: the function and its inputs. Where autograd would keep the result, within
`rematerialization()`, it keeps the recipe. The arithmetic is the same, so gradients are equal bit for bit.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch

from litgpt.model.devices import autocast_dtype

is_compiling = torch.compiler.is_compiling


@dataclass
class Recipe:
    """How to compute a tensor again. `inputs` are packed by `pack`."""

    function: Callable[..., torch.Tensor]
    inputs: list[Any]
    versions: list[int]  # of those inputs that are tensors: how often they were written to
    dtype: torch.dtype
    version: int  # of the result itself
    autocast: AbstractContextManager  # that of the forward pass

    def compute(self) -> torch.Tensor:
        tensors = [x for x in self.inputs if torch.is_tensor(x)]
        if [x._version for x in tensors] != self.versions:
            raise RuntimeError("The input of a rematerialized function was overwritten before the backward pass.")
        with torch.no_grad(), self.autocast:
            return self.function(*map(unpack, self.inputs))


@dataclass
class Rematerialized:
    """A view of the tensor that a recipe computes."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


recipes: Optional[dict[int, Recipe]] = None  # by the address of a live storage; None outside `rematerialization`


@contextmanager
def rematerialization() -> Iterator[None]:
    """Within it, autograd keeps recipes instead of the results of `run`."""
    global recipes
    if not torch.is_grad_enabled() or is_compiling():
        yield
        return
    outer, recipes = recipes, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        recipes = outer


def run(x: torch.Tensor, function: Callable[..., torch.Tensor], *others: Any) -> torch.Tensor:
    """`function(x, *others)`, with a recipe unless it is a view of `x`."""
    y = function(x, *others)
    if is_compiling() or recipes is None or not y.requires_grad:
        return y
    storage = y.untyped_storage()
    if storage._cdata != x.untyped_storage()._cdata:
        inputs = [pack(value) if torch.is_tensor(value) else value for value in (x, *others)]
        versions = [value._version for value in inputs if torch.is_tensor(value)]
        recipes[storage._cdata] = Recipe(function, inputs, versions, y.dtype, y._version, autocast_of(x))
        weakref.finalize(storage, recipes.pop, storage._cdata, None).atexit = False  # the address may be used again
    return y


def autocast_of(x: torch.Tensor) -> AbstractContextManager:
    dtype = autocast_dtype(x.device)
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype, cache_enabled=False)


def pack(x: torch.Tensor) -> Any:
    """What autograd keeps in place of a tensor."""
    recipe = recipes.get(x.untyped_storage()._cdata) if recipes else None
    if recipe is None or recipe.dtype != x.dtype or recipe.version != x._version:
        return x.detach()
    return Rematerialized(recipe, x.size(), x.stride(), x.storage_offset())


def unpack(kept: Any) -> Any:
    if not isinstance(kept, Rematerialized):
        return kept
    return kept.recipe.compute().as_strided(kept.size, kept.stride, kept.offset)
