"""How much memory a model keeps for its backward pass, on the meta device.

With the stand-ins of `litgpt.train.memory.stand_ins` for the kernels of a GPU.
"""

import weakref
from typing import Any, Optional, Union

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.methods.lora import LoRA
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.blocks import recompute
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train.memory.stand_ins import gpu_kernels


class Storages(TorchDispatchMode):
    """The bytes of the storages that were made under this mode and are alive. `others` do not count."""

    def __init__(self, *others: torch.Tensor) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.others = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.others:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None).atexit = False
        return out

    @property
    def total(self) -> int:
        return sum(self.alive.values())


def kept(
    config: Config, method: Optional[LoRA], scheme: Optional[str], checkpointing: Union[bool, str], tokens: int
) -> tuple[int, int]:
    """Bytes that are alive between the forward and the backward pass of the blocks, without weights, in bfloat16: on
    the device and in the memory of the host. `checkpointing` is a value of --train.activation_checkpointing."""
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
        if scheme is not None:
            quantize(model, scheme, torch.device("cpu"))
        if method is not None:
            method.apply(model)
            model.transformer.wte.requires_grad_(True)  # as if a layer before the first one were trained
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                for part, rows in enumerate(layer.parts):
                    layer.store(part, torch.empty(rows, layer.in_features, dtype=torch.bfloat16))
        if checkpointing:
            recompute(model, offload=checkpointing == "offload")
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    quantized = [weight for m in model.modules() if isinstance(m, QuantizedLinear) for weight, _ in m.stored]
    with gpu_kernels() as offloaded, Storages(*model.parameters(), *quantized, ids) as storages:
        hidden = model.hidden(ids, [tokens // 2, tokens // 2])
        total, host = storages.total, sum(offloaded)
        hidden.sum().backward()
    return total, host
