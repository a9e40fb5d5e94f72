"""Linear layers, and the layout of their weights for inference."""

import torch
from torch import nn

from litgpt.model import kernels
from litgpt.model.kernels import linear


class Linear(nn.Linear):
    """`nn.Linear` by the fastest kernel for the device."""

    read = False  # whether something reads the weight itself, as DoRA does; such a weight is not prepacked

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # torch would import its compiler, which takes a second
            super().reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def prepack(self, shared: bool = False) -> None:
        """Change the weight to the layout of the kernels for inference, if the device has one that pays. A weight that
        is `shared` with another layer stays as it is there."""
        if not self.weight.requires_grad and (weight := kernels.prepacked(self.weight.detach())) is not None:
            self.put(weight, shared)

    @torch.no_grad()
    def undo_prepack(self) -> bool:
        """Restore the layout in rows. Returns whether the weight was prepacked."""
        prepacked = bool(self.weight.is_mkldnn)
        if prepacked:
            self.put(in_rows(self.weight))
        return prepacked

    def put(self, weight: torch.Tensor, shared: bool = False) -> None:
        """Replace the contents of the weight. Unless it is shared it stays the object that an optimizer may hold."""
        new = nn.Parameter(weight, self.weight.requires_grad)
        if shared:
            self.weight = new
        else:
            torch.utils.swap_tensors(self.weight, new)


class PartwiseLinear(Linear):
    """A linear layer that is filled one Hugging Face tensor at a time, and need not keep them as its `weight`."""

    stored: list  # what was made of the parts

    def begin(self, n_parts: int) -> None:
        """Make room for `n_parts` parts."""
        raise NotImplementedError

    def store(self, part: int, weight: torch.Tensor) -> None:
        """Take one part: a floating-point tensor (rows, in_features) on the device where it is to stay."""
        raise NotImplementedError


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def prepack(model: nn.Module) -> None:
    """Change the weights of a model that only runs inference to the layout that the device's kernels read, in place. On
    a CPU a token then takes half the time in bfloat16 and a third in float32, since a weight in rows is rearranged for
    every token. A prepacked weight has no gradient. A head that is tied to the embedding gets a copy."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for layer in linears(model):
        if not layer.read:
            layer.prepack(shared=id(layer.weight) in embeddings)


def undo_prepack(model: nn.Module) -> bool:
    """Undo `prepack`, except in quantized layers. Returns whether anything was prepacked. A head that was tied to the
    embedding is not tied again."""
    return sum(layer.undo_prepack() for layer in linears(model)) > 0


def linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def in_rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight (out_features, in_features), prepacked or not, in rows."""
    return weight.to_dense() if weight.is_mkldnn else weight
