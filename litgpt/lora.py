"""LoRA: freeze the pretrained weights W and learn a low-rank update, W + (alpha / r) B A.

https://arxiv.org/abs/2106.09685

`LoRA.apply` swaps the linear layers of a built `GPT` in place, so that every family gets LoRA without a second model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.errors import UserError
from litgpt.model import GPT

TARGETS = ("query", "key", "value", "projection", "mlp", "head")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

    `linear` may be fused from several projections (q, k and v; gate and up), one block of rows below the other. Each
    adapted block has an A and a B of its own; the A's stand below each other, so that one product serves them all.
    A and B are float32, whatever the precision of `linear`.

    Args:
        linear: The layer, frozen.
        r: The rank.
        alpha: The update is scaled by alpha / r.
        dropout: The share of the inputs that the update does not see in training.
        adapted: For each block of `linear` whether it gets an update.
    """

    def __init__(
        self, linear: nn.Linear, r: int, alpha: float, dropout: float, adapted: Sequence[bool] = (True,)
    ) -> None:
        super().__init__()
        self.linear = linear
        self.r = r
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.sizes: tuple[int, ...] = getattr(linear, "parts", (linear.out_features,))
        self.adapted = tuple(adapted)
        assert len(self.adapted) == len(self.sizes) and any(self.adapted)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r * sum(self.adapted), linear.in_features, device=device))
        out_features = sum(size for size, on in zip(self.sizes, self.adapted) if on)
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device))
        if device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as a linear layer's weight is drawn, B zero: training starts from exactly the base model."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        a = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r * adapted blocks)
        return y + self.spread(a, self.lora_B.to(a.dtype)).to(y.dtype)

    def spread(self, a: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        """The scaled update from the products with A, (..., r * adapted blocks), to (..., out_features)."""
        a_blocks = iter((a * self.scaling).split(self.r, dim=-1))
        b_blocks = iter(lora_B.split([size for size, on in zip(self.sizes, self.adapted) if on]))
        blocks = [
            F.linear(next(a_blocks), next(b_blocks)) if on else a.new_zeros(*a.shape[:-1], size)
            for size, on in zip(self.sizes, self.adapted)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The number of each adapted block, with its A (r, in_features) and its B (rows of the block, r)."""
        numbers = [i for i, on in enumerate(self.adapted) if on]
        return zip(numbers, self.lora_A.split(self.r), self.lora_B.split([self.sizes[i] for i in numbers]))  # type: ignore


@dataclass
class LoRA:
    """Which layers get an update, and of what rank.

    Raises:
        UserError: nothing is selected, or a number is out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False
    modules: Optional[frozenset[str]] = None  # instead of the above: the Hugging Face modules of a read adapter

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"--lora_r {self.r} must be above 0.")
        if self.alpha <= 0 and self.modules is None:
            raise UserError(f"--lora_alpha {self.alpha} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora_dropout {self.dropout} must be at least 0 and below 1.")
        if self.modules is None and not any(getattr(self, t) for t in TARGETS):
            flags = ", ".join(f"--lora_{t}" for t in TARGETS)
            raise UserError(f"LoRA is off for every layer, so nothing would be trained: set one of {flags} to true.")

    def apply(self, model: GPT) -> None:
        """Swap the selected linear layers for `LoRALinear` and freeze everything else, in place."""
        from litgpt.families import name_table

        table = name_table(model.config)
        model.requires_grad_(False)
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            hf = table.to_hf(name)
            adapted = self.selected(name) if self.modules is None else [module in self.modules for module in hf]
            if any(adapted):
                parent, _, leaf = name.rpartition(".")
                lora = LoRALinear(linear, self.r, self.alpha, self.dropout, adapted)
                setattr(model.get_submodule(parent), leaf, lora)

    def selected(self, name: str) -> list[bool]:
        """For each block of the layer of this name whether the flags select it."""
        if name.endswith("attn.qkv"):
            return [self.query, self.key, self.value]
        if ".attn." in name:
            return [self.projection]
        if ".mlp." in name:
            return [self.mlp] * (2 if name.endswith("mlp.fc") else 1)
        return [self.head]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
