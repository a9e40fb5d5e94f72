"""A model on several devices: its layers one after the other, or on each device a part of each layer.

With tensor parallelism (https://arxiv.org/abs/1909.08053), a process has some heads of every attention and a part of
the width of every feed-forward layer. Their outputs, summed over the processes, are those of the complete layers.
Embedding, norms, routers and the head are complete everywhere.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import nn

from litgpt.checkpoint.folder import load_weights
from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.table import Parameter, StoredTensor
from litgpt.families.weights import Weights, check_weights
from litgpt.model.attention import ForwardContext
from litgpt.model.config import Config
from litgpt.model.devices import Accelerator, pick_device
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import EachRow
from litgpt.model.packing import Packing

DeviceCount = Union[int, Literal["auto"]]
AllReduce = Callable[[torch.Tensor], None]  # sums over all processes, in place
Index = Optional[tuple[int, list[range]]]  # a dimension of a tensor and the ranges to read; None for all of it


# one after the other


def usable_devices(accelerator: Accelerator, devices: DeviceCount) -> list[torch.device]:
    """This many devices of a type, or all. A CPU is one, and so is Apple's GPU. Raises `UserError` if there are not as
    many."""
    first = pick_device(accelerator)
    available = torch.cuda.device_count() if first.type == "cuda" else 1
    n = available if devices == "auto" else devices
    if not 1 <= n <= available:
        raise UserError(f"--devices {devices}: this machine has {available} of type {first.type}.")
    return [torch.device("cuda", i) for i in range(n)] if first.type == "cuda" else [first]


def spread(model: GPT, devices: list[torch.device]) -> None:
    """Move each block of a model to a device, in runs of about the same length; the rest goes to the first.

    The input of each block is moved to its device. The cache of a layer is where the layer is.
    """
    blocks, n, contexts = model.transformer.h, len(devices), DeviceContexts()
    for i, block in enumerate(blocks):
        device = devices[i * n // len(blocks)]
        block.to(device)
        block.forward = on_device(block, device, contexts, devices[0] if i == len(blocks) - 1 else None)
    for child in (*model.children(), *model.transformer.children()):
        if child is not model.transformer and child is not blocks:
            child.to(devices[0])
    model.tie_weights()


class DeviceContexts:
    """The context of the current forward pass, copied once to each device."""

    def __init__(self) -> None:
        self.context: Optional[ForwardContext] = None
        self.copies: dict[torch.device, ForwardContext] = {}

    def on(self, context: ForwardContext, device: torch.device) -> ForwardContext:
        if context is not self.context:
            self.context, self.copies = context, {}
        if device not in self.copies:
            self.copies[device] = replace(to_device(context, device), lent=context.lent)
        return self.copies[device]


def to_device(value: Any, device: torch.device) -> Any:
    """A copy with its tensors on a device, also those within containers and the parts of a `ForwardContext`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, (ForwardContext, EachRow, Packing)):
        return replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)})
    return value


def on_device(
    block: nn.Module, device: torch.device, contexts: DeviceContexts, back: Optional[torch.device]
) -> Callable[[torch.Tensor, ForwardContext], torch.Tensor]:
    forward = block.forward

    def wrapped(x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        y = forward(x.to(device), contexts.on(context, device))
        return y if back is None else y.to(back)

    return wrapped


# tensor parallelism


def check_divisible(config: Config, world_size: int) -> None:
    """Raises `UserError` if the layers of this model cannot be split into this many parts."""
    widths = {"n_query_groups": config.n_query_groups, "intermediate_size": config.intermediate_size}
    for name in ("global_query_groups", "moe_intermediate_size", "shared_intermediate_size"):
        if size := getattr(config, name):
            widths[name] = size
    wrong = [f"{name} {width}" for name, width in widths.items() if not width or width % world_size]
    if wrong:
        raise UserError(f"--devices {world_size} does not divide the model's {' and '.join(wrong)}.")
    if config.recurrent_layers:
        raise UserError("Models with recurrent layers cannot be split by heads. Use litgpt generate_sequentially.")
    if config.norm_qk and config.norm_qk_type == "olmo2" and world_size > 1:
        raise UserError(
            "Models that normalize their queries over all heads (OLMo 2 and 3, OLMoE) cannot be split by heads. Use "
            "litgpt generate_sequentially."
        )


class RowParallelLinear(nn.Module):
    """A part of a linear layer's input features. The outputs of all parts are summed; the bias is added once."""

    def __init__(self, linear: nn.Linear, all_reduce: AllReduce) -> None:
        super().__init__()
        self.bias = linear.bias
        linear.bias = None  # type: ignore[assignment]
        self.linear, self.all_reduce = linear, all_reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).contiguous()
        self.all_reduce(y)
        return y if self.bias is None else y + self.bias


def part_config(config: Config, world_size: int) -> Config:
    """The config of one of equal parts of a model: fewer heads, and narrower feed-forward layers."""
    check_divisible(config, world_size)
    names = ["n_head", "n_query_groups", "global_query_groups", "intermediate_size"]
    names += ["moe_intermediate_size", "shared_intermediate_size"]
    parts = {name: getattr(config, name) and getattr(config, name) // world_size for name in names}
    return replace(config, head_size=config.head_size, **parts)


def load_part(
    checkpoint: Weights, dtype: torch.dtype, device: torch.device, rank: int, world_size: int, all_reduce: AllReduce
) -> GPT:
    """A process's part of a model, in evaluation mode. Reads no more of the weights than that."""
    with torch.device("meta"):
        whole, model = GPT(checkpoint.config), GPT(part_config(checkpoint.config, world_size))
    check_weights(whole, checkpoint)
    for block in model.transformer.h:
        block.attn.proj = RowParallelLinear(block.attn.proj, all_reduce)  # type: ignore
        for mlp in [m for m in block.mlp.modules() if hasattr(m, "proj")]:  # type: ignore  # one, or each expert
            mlp.proj = RowParallelLinear(mlp.proj, all_reduce)  # type: ignore
    load_weights(model, PartialWeights(checkpoint, whole, model, rank, world_size), dtype, device)
    return model.requires_grad_(False).eval()


class PartialWeights(Weights):
    """The weights of a process's part of a model, by the names and in the forms of the part's own table.

    Args:
        checkpoint: All weights.
        whole: The complete model, on the meta device.
        part: The part.
    """

    def __init__(self, checkpoint: Weights, whole: GPT, part: GPT, rank: int, world_size: int) -> None:
        self.checkpoint, self.folder, self.config = checkpoint, checkpoint.folder, part.config
        self.sources: dict[str, tuple[str, Index]] = {}  # the tensor of the checkpoint, and what to read of it
        self.shapes = dict(checkpoint.shapes)
        parameters = weight_map(part.config).parameters(part)
        for name, parameter in weight_map(whole.config).parameters(whole).items():
            own, tensors = parameters[name], parameter.tensors
            n = len(own.tensors)
            split = n < len(tensors)  # the norms of each head are tensors of their own
            for tensor in tensors if split else ():
                self.shapes.pop(tensor.name)
            for source, target in zip(tensors[rank * n :] if split else tensors, own.tensors):
                if source.name in checkpoint.shapes:  # a tied head may not be
                    index = None if split else part_index(parameter, source, own.value.shape, rank, world_size)
                    self.sources[target.name] = source.name, index
                    self.shapes[target.name] = own.shape(target)
        self.dtypes = {name: checkpoint.dtypes[self.source(name)] for name in self.shapes}
        self.files = {name: checkpoint.files[self.source(name)] for name in self.shapes}

    def source(self, name: str) -> str:
        return self.sources[name][0] if name in self.sources else name

    def shards(self) -> list[Path]:
        return self.checkpoint.shards()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            source, index = self.sources.get(name, (name, None))
            yield name, self.checkpoint.part(source, *index) if index is not None else self.checkpoint.tensor(source)


def part_index(parameter: Parameter, tensor: StoredTensor, shape: torch.Size, rank: int, world_size: int) -> Index:
    """The dimension and the ranges of a stored tensor that belong to a process, whose parameter has this shape. None
    for all of it."""
    n_rows = len(parameter.value)
    if shape == parameter.value.shape:
        return None
    if len(shape) == 2 and shape[1] < parameter.value.size(1):  # some input features
        size = shape[1]
        return 0 if tensor.form.transposed else 1, [range(rank * size, (rank + 1) * size)]
    belongs = torch.zeros(n_rows, dtype=torch.bool, device="cpu")
    for block in belongs.split(list(getattr(parameter.module, "parts", None) or (n_rows,))):
        block.chunk(world_size)[rank].fill_(True)
    belongs = belongs[tensor.rows]
    order = tensor.form.rows
    rows = (belongs if order is None else belongs[order.cpu()]).nonzero().flatten().tolist()
    ends = [i for i, (row, after) in enumerate(zip(rows, [*rows[1:], -1]), start=1) if after != row + 1]
    ranges = [range(rows[start], rows[stop - 1] + 1) for start, stop in zip([0, *ends], ends)]
    return 1 if tensor.form.transposed and len(shape) == 2 else 0, ranges
