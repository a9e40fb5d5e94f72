"""Several LoRA adapters over one model, in one batch: each token gets the update of its own text's adapter.

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
from litgpt.model import GPT


class Adapters:
    """Which tokens of the forward pass that comes next have which adapter. All layers look at the same one.

    Attributes:
        parts: Names, and for each the places of its tokens.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[str, Union[slice, torch.Tensor]]] = []

    def choose(self, names: Sequence[Optional[str]], lengths: Sequence[int]) -> None:
        """Say what comes next: texts that lie end to end, the adapter of each (None for the model as it is) and the
        number of its tokens."""
        places: dict[str, list[int]] = {}
        start = 0
        for name, n in zip(names, lengths):
            if name is not None:
                places.setdefault(name, []).extend(range(start, start + n))
            start += n
        self.parts = []
        for name, at in places.items():
            together = at[-1] + 1 - at[0] == len(at)
            self.parts.append((name, slice(at[0], at[-1] + 1) if together else torch.tensor(at)))


class AdaptedLinear(nn.Module):
    """A linear layer with the updates of several adapters. As a wrapper, it does not show in names.

    Args:
        linear: The layer.
        adapters: Says which tokens get which update.
    """

    def __init__(self, linear: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.linear = linear
        self.adapters = adapters
        self.updates: dict[str, LoRALinear] = {}  # each around the same linear

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "AdaptedLinear":
        """Also what `.to` and the like do to parameters. The updates share the layer, which follows by itself."""
        super()._apply(fn, recurse)
        for update in self.updates.values():
            update._apply(fn, recurse=False)
            update.linear = self.linear  # type: ignore[assignment]
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        flat, seen = y.view(-1, y.size(-1)), x.reshape(-1, x.size(-1))  # (N, out_features), (N, in_features)
        for name, at in self.adapters.parts:
            if (layer := self.updates.get(name)) is not None:
                flat[at] = layer.update(flat[at], seen[at])
        return y


@torch.no_grad()
def add_adapters(model: GPT, folders: Mapping[str, AdapterFolder]) -> Adapters:
    """Put LoRA adapters beside each other on a base model, in place.

    Returns:
        What says, before each forward pass, which tokens have which; at first none have any.

    Raises:
        UserError: an adapter does not fit the model, or changes what the others need as it is; all of them at once.
    """
    wrong = [f"{name}: {reason}" for name, folder in folders.items() if (reason := unfit(model, folder))]
    if wrong:
        raise UserError(f"--adapters {'; '.join(wrong)}. Serve such an adapter alone, or merge it first.")
    adapters = Adapters()
    for name, folder in folders.items():
        with torch.device("meta"):
            apart = GPT(model.config)  # takes no memory: only what the adapter adds is filled
        folder.apply(apart)
        layers = lora_layers(apart)
        for layer in layers.values():
            for leaf, parameter in layer.named_parameters(recurse=False):
                setattr(layer, leaf, nn.Parameter(torch.zeros_like(parameter, device=model.device), False))
        folder.load_into(apart)
        for path, layer in layers.items():
            place = model.get_submodule(path)
            if not isinstance(place, AdaptedLinear):
                parent, _, leaf = path.rpartition(".")
                place = AdaptedLinear(place, adapters)
                setattr(model.get_submodule(parent), leaf, place)
            place.linear.read |= layer.linear.read  # type: ignore[assignment,operator]
            layer.linear = place.linear  # type: ignore[assignment]
            place.updates[name] = layer.eval()
    return adapters


def unfit(model: GPT, folder: AdapterFolder) -> str:
    """Why an adapter cannot share a model with others; nothing if it can."""
    if not isinstance(folder, LoRAFolder):
        return f"{folder.folder} is a {folder.description}, only LoRA can share a base"
    if folder.in_full:
        return f"{folder.folder} replaces whole weights ({folder.in_full[0]})"
    if model.switch is not None:
        return f"the model reads a text again once it is longer than {model.switch} tokens"
    names = weight_map(model.config)
    ours = [names.find(module)[0] or module for module in folder.places(model.config)]
    if model.config.n_expert and any(".mlp." in module for module in ours):
        return f"{folder.folder} updates experts, which see tokens in another order"
    return ""
