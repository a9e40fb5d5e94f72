"""LoRA: freeze the pretrained weights W and learn a low-rank update, W + s B A, where s = alpha / r.

https://arxiv.org/abs/2106.09685. Its variants: rsLoRA, s = alpha / sqrt(r) (https://arxiv.org/abs/2312.03732); DoRA,
which learns the norms of the rows apart from their directions (https://arxiv.org/abs/2402.09353); PiSSA, where B A
starts as the principal part of W and W as what is left of it (https://arxiv.org/abs/2404.02948).

`LoRA.apply` swaps the linear layers of a built `GPT` in place, so that every family gets LoRA without a second model.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.methods.quantize import QuantizedLinear, full_weight
from litgpt.model import GPT
from litgpt.storage.fields import pattern

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
Variant = Literal["lora", "rslora", "dora"]
Init = Literal["kaiming", "pissa"]


class Dropout(nn.Dropout):
    """`nn.Dropout`, which on a CPU draws a number of 64 bits for each input: here 16 of them decide, in a quarter of
    the time. The share that is dropped is the nearest multiple of 2^-16, and the mean stays exact. For the backward
    pass a byte is kept for each input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.p and x.is_cpu) or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = drawn[: x.numel()].view(x.shape) >= dropped - 2**15
        return Kept.apply(x, kept, 2**16 / (2**16 - dropped))


class Kept(torch.autograd.Function):
    """Those inputs that are kept, scaled; the others are 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return (grads[0] * ctx.saved_tensors[0]).mul_(ctx.scale), None, None


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

    `linear` may be fused from several projections (q, k and v; gate and up), one block of rows below the other. Each
    adapted block has an A and a B of its own; the A's stand below each other, so that one product serves them all.
    A and B are float32, whatever the precision of `linear`.

    Args:
        linear: The layer, frozen.
        lora: Rank, scale, dropout and variant.
        adapted: For each block of `linear` whether it gets an update.
    """

    def __init__(self, linear: nn.Linear, lora: "LoRA", adapted: Sequence[bool] = (True,)) -> None:
        super().__init__()
        self.linear = linear
        self.lora = lora
        self.dropout = Dropout(lora.dropout)
        self.sizes: tuple[int, ...] = getattr(linear, "parts", (linear.out_features,))
        self.adapted = tuple(adapted)
        assert len(self.adapted) == len(self.sizes) and any(self.adapted)
        device, r = linear.weight.device, lora.r
        self.lora_A = nn.Parameter(torch.empty(r * sum(self.adapted), linear.in_features, device=device))
        rows = sum(self.adapted_sizes)
        self.lora_B = nn.Parameter(torch.empty(rows, r, device=device))
        self.magnitude = nn.Parameter(torch.empty(rows, device=device)) if lora.variant == "dora" else None
        linear.read = self.magnitude is not None  # type: ignore[assignment]
        self.start: Optional[tuple[torch.Tensor, torch.Tensor]] = None  # PiSSA: A and B before the first step
        self.squares: Optional[tuple[Any, torch.Tensor]] = (
            None  # DoRA: of what, and of each of its rows the norm's square
        )
        if device.type != "meta":
            self.reset_parameters()

    @property
    def adapted_sizes(self) -> list[int]:
        return [size for size, on in zip(self.sizes, self.adapted) if on]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as a linear layer's weight is drawn, B zero: training starts from exactly the base model. For PiSSA both
        from the base's weight, which loses what they hold."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.lora_B.lr_ratio = self.lora.plus_ratio  # type: ignore[attr-defined]
        if self.magnitude is not None:
            self.magnitude.copy_(self.adapted_rows().float().norm(dim=1))
        if self.lora.init == "pissa":
            self.take_principal_part()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LoRALinear":
        """Also what `.to`, `.half` and the like do to parameters."""
        super()._apply(fn, recurse)
        self.start = (fn(self.start[0]), fn(self.start[1])) if self.start is not None else None
        self.squares = None
        return self

    def take_principal_part(self) -> None:
        rows = iter(self.linear.weight.detach().split(list(self.sizes)))
        blocks = {i: (a, b) for i, a, b in self.blocks()}
        for i, w in enumerate(rows):
            if i not in blocks:
                continue
            a, b = blocks[i]
            u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
            n = min(self.lora.r, len(s))
            root = (s[:n] / self.lora.scaling).sqrt()
            a.zero_()[:n] = root[:, None] * v[:n]
            b.zero_()[:, :n] = u[:, :n] * root
            w -= (self.lora.scaling * (b @ a)).to(w.dtype)
        self.start = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.update(self.linear(x), x)

    def update(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output for `x`, (..., in_features), from that of the frozen layer, (..., out_features), which may be
        overwritten."""
        seen = self.dropout(x)
        if self.magnitude is None:
            return Update.apply(y, seen, self.lora_A, self.lora_B, self.rows, self.lora.scaling)
        update = Update.apply(torch.zeros_like(y), seen, self.lora_A, self.lora_B, self.rows, self.lora.scaling)
        ratio = self.fill(self.magnitude / self.row_norms()).to(y.dtype)
        if self.training and self.lora.dropout:
            base = F.linear(seen, full_weight(self.linear).to(x.dtype))
        else:
            base = y if self.linear.bias is None else y - self.linear.bias
        return y + (ratio - 1) * base + ratio * update

    @property
    def rows(self) -> list[slice]:
        """The output features of each adapted block."""
        ends = list(itertools.accumulate(self.sizes))
        return [slice(end - size, end) for end, size, on in zip(ends, self.sizes, self.adapted) if on]

    def fill(self, ratio: torch.Tensor) -> torch.Tensor:
        """From one number per adapted row to one per row, (out_features,); 1 where nothing is adapted."""
        given = iter(ratio.split(self.adapted_sizes))
        return torch.cat([next(given) if on else ratio.new_ones(size) for size, on in zip(self.sizes, self.adapted)])

    def adapted_rows(self) -> torch.Tensor:
        """The frozen weight of the adapted blocks, (adapted rows, in_features)."""
        blocks = full_weight(self.linear).split(list(self.sizes))
        return torch.cat([w for w, on in zip(blocks, self.adapted) if on])

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """The norm of each adapted row of W + s B A, (adapted rows,), float32; a constant for the gradient, as DoRA's
        authors advise. Written out as |W|^2 + 2 s W A' . B + s^2 B A A' . B, it needs no matrix of the size of W."""
        w, s = self.adapted_rows(), self.lora.scaling
        own = self.own_squares(w).split(self.adapted_sizes)
        squares = []
        for (_, a, b), rows, known in zip(self.blocks(), w.split(self.adapted_sizes), own):
            cross = ((rows @ a.t().to(rows.dtype)).float() * b).sum(1)
            squares.append(known + 2 * s * cross + s**2 * ((b @ (a @ a.t())) * b).sum(1))
        return torch.cat(squares).clamp(min=1e-12).sqrt()

    def own_squares(self, w: torch.Tensor) -> torch.Tensor:
        """|W|^2 of each row of `w`, the adapted rows; kept as long as the frozen weight is the same, and unchanged."""
        of = None if torch.compiler.is_compiling() else identity(self.linear)
        if self.squares is None or (self.squares[0] != of and not torch.compiler.is_compiling()):
            self.squares = of, torch.cat([part.float().square().sum(1) for part in w.split(4096)])
        return self.squares[1]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The number of each adapted block, with its A (r, in_features) and its B (rows of the block, r)."""
        numbers = [i for i, on in enumerate(self.adapted) if on]
        return zip(numbers, self.lora_A.split(self.lora.r), self.lora_B.split(self.adapted_sizes))  # type: ignore

    def learned(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]]:
        """For each adapted block its number and what was learned over the original weight: A, B and DoRA's magnitude.

        After PiSSA the rank is twice as high, since what B A had at the start has to be taken off again.
        """
        magnitudes = self.magnitude.split(self.adapted_sizes) if self.magnitude is not None else ()
        starts = zip(self.start[0].split(self.lora.r), self.start[1].split(self.adapted_sizes)) if self.start else ()
        magnitude, start = iter(magnitudes), iter(starts)
        for i, a, b in self.blocks():
            if self.start:
                a0, b0 = next(start)
                a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
            yield i, a, b, next(magnitude, None)


def identity(linear: nn.Module) -> tuple[tuple[int, int], ...]:
    """What tells whether the weight of a layer is another one, or has changed."""
    weights = [packed for packed, _ in linear.stored] if isinstance(linear, QuantizedLinear) else [linear.weight]
    return tuple((id(weight), weight._version) for weight in weights)  # type: ignore[union-attr]


class Update(torch.autograd.Function):
    """Adds the scaled update to the output of the frozen layer, in place: one product for all A's, one for each B."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        rows: list[slice],
        scaling: float,
    ) -> torch.Tensor:
        """`y` (..., out_features), `x` (..., in_features), A and B as in `LoRALinear`, `rows` of each adapted block."""
        ctx.rows, ctx.scaling = rows, scaling
        a = F.linear(x.reshape(-1, x.size(-1)).to(y.dtype), lora_A.to(y.dtype))  # (n, r * adapted blocks)
        ctx.save_for_backward(x, a, lora_A, lora_B)
        flat = y.view(-1, y.size(-1))
        for at, a_block, b_block in zip(rows, *pairs(a, lora_B.to(y.dtype), rows)):
            flat[:, at].addmm_(a_block, b_block.t(), alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, a, lora_A, lora_B = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].size(-1))
        flat = x.reshape(-1, x.size(-1)).to(grad.dtype)
        a_blocks, b_blocks = pairs(a, lora_B.to(grad.dtype), ctx.rows)
        parts = [grad[:, at] for at in ctx.rows]
        grad_a = torch.cat([part @ b for part, b in zip(parts, b_blocks)], dim=1).mul_(ctx.scaling)
        grad_B = torch.cat([part.t() @ a for part, a in zip(parts, a_blocks)]).mul_(ctx.scaling)
        grad_A = grad_a.t() @ flat
        grad_x = (grad_a @ lora_A.to(grad.dtype)).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return grads[0], grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None, None


def pairs(a: torch.Tensor, lora_B: torch.Tensor, rows: list[slice]) -> tuple[tuple, tuple]:
    """The products with A, and B, block by block."""
    return a.chunk(len(rows), dim=-1), lora_B.split([at.stop - at.start for at in rows])


@dataclass
class LoRA:
    """Which layers get an update, and of what kind.

    Args:
        r: Rank of the updates.
        alpha: Scale of the updates, which are multiplied by lora_alpha / lora_r.
        dropout: Dropout on the input of each LoRA update.
        query: Update the query projections.
        key: Update the key projections.
        value: Update the value projections.
        projection: Update the output projections of attention.
        mlp: Update the linear layers of the MLPs.
        head: Update the language model head.
        variant: rslora scales by lora_alpha / sqrt(lora_r), which suits high ranks. dora also learns the norms of the
            weight rows.
        init: kaiming starts from the base model, with updates that are zero; pissa moves the principal components of
            each weight into its update.
        plus_ratio: Learning rate of the second factor of each update, relative to the first (LoRA+).
        targets: Regular expression for the Hugging Face names of the layers to update, such as q_proj|v_proj; replaces
            the six switches. A fused layer such as qkv_proj is updated as a whole.
        layers: Update only these blocks, such as [0, 1], or [-2, -1] for the last two.

    Attributes:
        train_embeddings: Whether the embedding is trained too.
        modules: The exact Hugging Face modules of an adapter that is loaded; they replace the switches.
        scaling: Factor of the update, from alpha and r.

    Raises:
        UserError: nothing is selected, or a number is out of range; lists everything that is wrong.
    """

    r: int = 8
    alpha: Union[int, float] = 16
    dropout: float = 0.05
    query: bool = True
    key: bool = False
    value: bool = True
    projection: bool = False
    mlp: bool = False
    head: bool = False
    variant: Variant = "lora"
    init: Init = "kaiming"
    plus_ratio: float = 1.0
    targets: Optional[str] = None
    layers: Optional[Sequence[int]] = None
    train_embeddings: bool = False
    modules: Optional[frozenset[str]] = None
    scaling: float = field(init=False)

    def __post_init__(self) -> None:
        wrong = []
        if self.r < 1:
            wrong.append(f"--lora_r {self.r} must be above 0")
        if self.alpha <= 0 and self.modules is None:
            wrong.append(f"--lora_alpha {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            wrong.append(f"--lora_dropout {self.dropout} must be at least 0 and below 1")
        if self.plus_ratio <= 0:
            wrong.append(f"--lora_plus_ratio {self.plus_ratio} must be above 0")
        if self.init == "pissa" and self.variant == "dora":
            wrong.append("--lora_init pissa changes the weights whose norms --lora_variant dora learns: choose one")
        if self.targets is not None:
            try:
                pattern(self.targets)
            except ValueError as e:
                wrong.append(f"--lora_targets: {e}")
        elif self.modules is None and not any(getattr(self, t) for t in TARGETS):
            flags = ", ".join(f"--lora_{t}" for t in TARGETS)
            wrong.append(f"LoRA is off for every layer, so nothing would be trained: set one of {flags} to true")
        if wrong:
            raise UserError("; ".join(wrong) + ".")
        self.scaling = self.alpha / (math.sqrt(self.r) if self.variant == "rslora" else self.r)

    def idle_switches(self) -> list[str]:
        """The flags of the switches that are not at their defaults, and that `targets` makes idle."""
        switches = ((name, getattr(self, name)) for name in TARGETS)
        return [f"--lora_{name} {str(on).lower()}" for name, on in switches if on is not getattr(LoRA, name)]

    def apply(self, model: GPT) -> None:
        """Swap the selected linear layers for `LoRALinear` and freeze everything else, in place.

        Raises:
            UserError: what is selected is not in this model, or cannot be changed as wanted.
        """
        table = name_table(model.config)
        model.requires_grad_(False)
        chosen = self.chosen_layers(model.config.n_layer)
        linears = [
            (n, m, table.holders(n, getattr(m, "parts", (m.out_features,))))
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear)
        ]
        found = False
        for name, linear, hf in linears:
            adapted = self.selected(name, hf, chosen)
            if any(adapted):
                found = True
                if self.variant == "dora" and self.modules is None and model.config.n_expert and ".mlp." in name:
                    raise UserError(
                        "--lora_variant dora: peft has no DoRA for the mlp of a model with experts. Choose lora or "
                        "rslora, or leave the mlp as it is."
                    )
                if self.init == "pissa" and isinstance(linear, QuantizedLinear):
                    raise UserError(
                        "--lora_init pissa changes the frozen weights, which --quantize rounds: choose one."
                    )
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, LoRALinear(linear, self, adapted))
        if not found and self.modules is None:
            flag = f"--lora_targets {self.targets!r}" if self.targets is not None else "The selection for LoRA"
            leaves = sorted({module.rpartition(".")[2] for _, _, hf in linears for module in hf})
            raise UserError(f"{flag} matches no layer, so nothing would be trained. There are: {', '.join(leaves)}.")
        if self.train_embeddings:
            model.transformer.wte.weight.requires_grad_(True)

    def chosen_layers(self, n_layer: int) -> Optional[set[int]]:
        if self.layers is None:
            return None
        wrong = [n for n in self.layers if not -n_layer <= n < n_layer]
        if wrong or not self.layers:
            words = ", ".join(map(str, wrong)) or "an empty list"
            raise UserError(f"--lora_layers has {words}; the model has the layers 0 to {n_layer - 1}.")
        return {n % n_layer for n in self.layers}

    def selected(self, name: str, hf: Sequence[str], chosen: Optional[set[int]]) -> list[bool]:
        """For each block of the layer of this name whether it gets an update.

        Args:
            hf: For each block the Hugging Face module that holds it.
            chosen: The numbers of the blocks of the model that `layers` allows; None for all.
        """
        if self.modules is not None:
            return [module in self.modules for module in hf]
        layer = re.search(r"\.h\.(\d+)\.", name)
        if layer and chosen is not None and int(layer[1]) not in chosen:
            return [False] * len(hf)
        if self.targets is not None:
            return [re.search(self.targets, module) is not None for module in hf]
        if name.endswith("attn.qkv"):
            return [self.query, self.key, self.value]
        wanted = self.projection if ".attn." in name else self.mlp if ".mlp." in name else self.head
        return [wanted] * len(hf)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
