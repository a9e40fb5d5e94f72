"""Several LoRA adapters on one model, in one batch: each token gets the update of its own request's adapter.

Shapes: N tokens of a forward pass, in_features and out_features of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.methods.adapter_folder import AdapterFolder
from litgpt.methods.lora import LoRALinear, lora_layers
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.devices import to_device
from litgpt.model.gpt import GPT


class Adapters:
    """Which tokens of the next forward pass have which adapter. All layers share one object.

    Args:
        uniform: Whether all tokens of a forward pass have the same one.
    """

    def __init__(self, uniform: bool = False) -> None:
        self.uniform = uniform
        self.parts: list[tuple[str, Union[slice, torch.Tensor]]] = []  # name and index of its tokens, by adapter

    def choose(self, names: Sequence[Optional[str]], lengths: Sequence[int], device: torch.device) -> None:
        """Set the adapter (None for the base model) and the number of tokens of each sequence that is read next. The
        model is on this device."""
        if self.uniform:
            assert len(set(names)) == 1
            self.parts = [(names[0], slice(None))] if names[0] is not None else []
            return
        places: dict[str, list[int]] = {}
        start = 0
        for name, n in zip(names, lengths):
            if name is not None:
                places.setdefault(name, []).extend(range(start, start + n))
            start += n
        self.parts = []
        for name, at in places.items():
            contiguous = at[-1] + 1 - at[0] == len(at)
            index = slice(at[0], at[-1] + 1) if contiguous else to_device(device, torch.tensor(at))[0]
            self.parts.append((name, index))


class AdaptedLinear(nn.Module):
    """A linear layer with the updates of several adapters. As a wrapper, it does not show in names."""

    def __init__(self, linear: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.linear = linear
        self.adapters = adapters
        self.updates: dict[str, LoRALinear] = {}  # each around the same linear

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "AdaptedLinear":
        """Include the updates, which `.to` and the like do not see. They share the layer, which is moved once."""
        super()._apply(fn, recurse)
        for update in self.updates.values():
            update._apply(fn, recurse=False)
            update.linear = self.linear  # type: ignore[assignment]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        flat_y, flat_x = y.view(-1, y.size(-1)), x.reshape(-1, x.size(-1))  # (N, out_features), (N, in_features)
        for name, at in self.adapters.parts:
            if (layer := self.updates.get(name)) is not None:
                flat_y[at] = layer.update(flat_y[at], flat_x[at])
        return y


@torch.no_grad()
def add_adapters(model: GPT, folders: Mapping[str, AdapterFolder]) -> Adapters:
    """Put several LoRA adapters on a base model, in place. At first no token has any.

    Raises:
        UserError: adapters do not fit the model, or change what the others need unchanged; all of them at once.
    """
    wrong = [f"{name}: {reason}" for name, folder in folders.items() if (reason := misfit(model, folder))]
    if wrong:
        raise UserError(f"--adapters {'; '.join(wrong)}. Serve such an adapter alone, or merge it first.")
    # texts that become longer than `switch` are read again, and experts see the tokens in another order
    updates_experts = any(".experts." in module for folder in folders.values() for module in modules(model, folder))
    adapters = Adapters(uniform=model.switch is not None or updates_experts)
    for name, folder in folders.items():
        with torch.device("meta"):
            empty = GPT(model.config)  # takes no memory: only what the adapter adds is filled
        folder.apply(empty)
        layers = lora_layers(empty)
        for layer in layers.values():
            for leaf, parameter in layer.named_parameters(recurse=False):
                setattr(layer, leaf, nn.Parameter(torch.zeros_like(parameter, device=model.device), False))
        folder.load_into(empty)
        for path, layer in layers.items():
            adapted = model.get_submodule(path)
            if not isinstance(adapted, AdaptedLinear):
                parent, _, leaf = path.rpartition(".")
                adapted = AdaptedLinear(adapted, adapters)
                setattr(model.get_submodule(parent), leaf, adapted)
            adapted.linear.read |= layer.linear.read  # type: ignore[assignment,operator]
            layer.linear = adapted.linear  # type: ignore[assignment]
            adapted.updates[name] = layer.eval()
    model.stack_experts()
    return adapters


def modules(model: GPT, folder: AdapterFolder) -> list[str]:
    """The modules of the model that a LoRA adapter updates, by our names where it has one of them."""
    names = weight_map(model.config)
    places = folder.places(model.config) if isinstance(folder, LoRAFolder) else {}
    return [names.find(place.module)[0] or place.module for several in places.values() for place in several]


def misfit(model: GPT, folder: AdapterFolder) -> str:
    """Why an adapter cannot share a model with others; empty if it can."""
    if not isinstance(folder, LoRAFolder):
        return f"{folder.folder} is a {folder.description}, and only LoRA adapters can share a base"
    if folder.in_full:
        return f"{folder.folder} replaces complete weights ({folder.in_full[0]})"
    if model.config.n_expert and any(module.endswith(".mlp.gate") for module in modules(model, folder)):
        return f"{folder.folder} updates routers"
    return ""
