"""LoRA: freeze the pretrained weights W and learn a low-rank update, W + s B A, where s = alpha / r.

https://arxiv.org/abs/2106.09685. Variants: rsLoRA, with s = alpha / sqrt(r) (https://arxiv.org/abs/2312.03732); DoRA,
which learns the norms of the rows separately (https://arxiv.org/abs/2402.09353); PiSSA, where B A starts as the
principal components of W, which are subtracted from W (https://arxiv.org/abs/2404.02948).
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.methods.quantize import QuantizedLinear, full_weight
from litgpt.model.gpt import GPT
from litgpt.model.kernels import dropout
from litgpt.storage.fields import pattern

ALL_LINEAR = "all-linear"
TARGETS = ("query", "key", "value", "projection", "mlp", "head")
Variant = Literal["lora", "rslora", "dora"]
Init = Literal["kaiming", "pissa"]


class Dropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update. `linear` may be fused from several blocks of rows (q, k
    and v; gate and up); `adapted` says which of them get an update. Each of these has its own A and B. They are
    concatenated along their rows, so that one matmul applies all A's. Both are float32 in every precision."""

    def __init__(self, linear: nn.Linear, lora: "LoRA", adapted: Sequence[bool] = (True,)) -> None:
        super().__init__()
        self.linear = linear
        self.lora = lora
        self.dropout = Dropout(lora.dropout)
        self.sizes: tuple[int, ...] = getattr(linear, "parts", (linear.out_features,))
        self.adapted = tuple(adapted)
        assert len(self.adapted) == len(self.sizes) and any(self.adapted)
        ends = itertools.accumulate(self.sizes)
        # the output features of each adapted block
        self.rows = [slice(end - n, end) for end, n, on in zip(ends, self.sizes, self.adapted) if on]
        device, r, n_rows = linear.weight.device, lora.r, sum(self.adapted_sizes)
        self.lora_A = nn.Parameter(torch.empty(r * len(self.rows), linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(n_rows, r, device=device))
        self.magnitude = nn.Parameter(torch.empty(n_rows, device=device)) if lora.variant == "dora" else None
        linear.read = self.magnitude is not None  # type: ignore[assignment]
        self.start: Optional[tuple[torch.Tensor, torch.Tensor]] = None  # A and B before the first step, for PiSSA
        self.squares: Optional[tuple[Any, torch.Tensor]] = None  # see `frozen_squares`
        if device.type != "meta":
            self.reset_parameters()

    @property
    def adapted_sizes(self) -> list[int]:
        return [at.stop - at.start for at in self.rows]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A like the weight of a linear layer and set B to zero: training starts from exactly the base model. For
        PiSSA, set both to the principal components of the weight, and subtract them from it."""
        # not by `nn.init`, which Lightning turns off where weights are to be loaded; no checkpoint has these
        std = nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(self.lora_A.size(1))
        self.lora_A.uniform_(-math.sqrt(3.0) * std, math.sqrt(3.0) * std)
        self.lora_B.zero_()
        self.lora_B.lr_ratio = self.lora.plus_ratio  # type: ignore[attr-defined]
        if self.magnitude is not None:
            self.magnitude.copy_(self.adapted_rows().float().norm(dim=1))
        if self.lora.init == "pissa":
            self.take_principal_part()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LoRALinear":
        super()._apply(fn, recurse)
        self.start = (fn(self.start[0]), fn(self.start[1])) if self.start is not None else None
        self.squares = None
        return self

    def take_principal_part(self) -> None:
        for at, (_, a, b) in zip(self.rows, self.blocks()):
            w = self.linear.weight.detach()[at]
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
        """Add the update for `x` (..., in_features) to the frozen layer's output `y`, which may be overwritten."""
        dropped = self.dropout(x)
        if self.magnitude is None:
            return self.add_update(y, dropped)
        ratio = self.per_row(self.magnitude / self.row_norms()).to(y.dtype)
        bias = self.linear.bias
        if self.training and self.lora.dropout:
            base = F.linear(dropped, full_weight(self.linear).to(x.dtype))
            # exactly y where nothing is adapted
            return y + torch.addcmul(-base, ratio, self.add_update(base, dropped))
        if bias is None:
            return ratio * self.add_update(y, dropped)
        return torch.addcmul(bias, ratio, self.add_update(y - bias, dropped))

    def add_update(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the low-rank update for `x` to `y`, which may be overwritten. The compiler cannot trace `Update`."""
        if not torch.compiler.is_compiling():
            return Update.apply(y, x, self.lora_A, self.lora_B, self.rows, self.lora.scaling)
        parts = list(y.split(self.sizes, dim=-1))
        for i, a, b in self.blocks():
            parts[i] = parts[i] + self.lora.scaling * F.linear(F.linear(x.to(y.dtype), a.to(y.dtype)), b.to(y.dtype))
        return torch.cat(parts, dim=-1)

    def per_row(self, ratio: torch.Tensor) -> torch.Tensor:
        """From one value per adapted row to one per row, (out_features,): 1 for rows that are not adapted."""
        values = iter(ratio.split(self.adapted_sizes))
        return torch.cat([next(values) if on else ratio.new_ones(size) for size, on in zip(self.sizes, self.adapted)])

    def adapted_rows(self) -> torch.Tensor:
        """The frozen weight of the adapted blocks, (adapted rows, in_features)."""
        weight = full_weight(self.linear)
        return torch.cat([weight[at] for at in self.rows])

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """The norm of each adapted row of W + s B A, (adapted rows,), float32. A constant for the gradient, as the
        authors of DoRA advise. Computed as |W|^2 + 2 s W A' . B + s^2 B A A' . B, which needs no matrix of the size of
        W."""
        w, s = self.adapted_rows(), self.lora.scaling
        own = self.frozen_squares(w).split(self.adapted_sizes)
        squares = []
        for (_, a, b), rows, known in zip(self.blocks(), w.split(self.adapted_sizes), own):
            cross = ((rows @ a.t().to(rows.dtype)).float() * b).sum(1)
            squares.append(known + 2 * s * cross + s**2 * ((b @ (a @ a.t())) * b).sum(1))
        return torch.cat(squares).clamp(min=1e-12).sqrt()

    def frozen_squares(self, w: torch.Tensor) -> torch.Tensor:
        """|W|^2 of each adapted row, `w`. Cached until the frozen weight changes."""
        of = None if torch.compiler.is_compiling() else identity(self.linear)
        if self.squares is None or (self.squares[0] != of and not torch.compiler.is_compiling()):
            self.squares = of, torch.cat([part.float().square().sum(1) for part in w.split(4096)])
        return self.squares[1]

    @property
    def magnitudes(self) -> Sequence[Optional[torch.Tensor]]:
        return self.magnitude.split(self.adapted_sizes) if self.magnitude is not None else [None] * len(self.rows)

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each adapted block its number, A (r, in_features) and B (rows of the block, r)."""
        numbers = [i for i, on in enumerate(self.adapted) if on]
        return zip(numbers, self.lora_A.split(self.lora.r), self.lora_B.split(self.adapted_sizes))  # type: ignore

    def learned(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]]:
        """For each adapted block its number and the update of the original weight: A, B and DoRA's magnitude. For PiSSA
        the rank is doubled, since the update also has to subtract the initial B A."""
        for k, ((i, a, b), magnitude) in enumerate(zip(self.blocks(), self.magnitudes)):
            if self.start:
                a0, b0 = self.start[0].split(self.lora.r)[k], self.start[1].split(self.adapted_sizes)[k]
                a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
            yield i, a, b, magnitude


def identity(linear: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when the weight of a layer is replaced or written to."""
    weights = [weight for weight, _ in linear.stored] if isinstance(linear, QuantizedLinear) else [linear.weight]
    return tuple((id(weight), weight._version) for weight in weights)  # type: ignore[union-attr]


class Update(torch.autograd.Function):
    """Adds the scaled update to the output of the frozen layer, in place: one matmul for all A's, one for each B."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, *weights: Any) -> torch.Tensor:
        """`y` is (..., out_features), `x` (..., in_features); the others are attributes of `LoRALinear`."""
        lora_A, lora_B, rows, scaling = weights
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
    return a.chunk(len(rows), dim=-1), lora_B.split([at.stop - at.start for at in rows])


@dataclass
class LoRA:
    """Which layers get an update, and of what kind. Raises one `UserError` for everything that is wrong.

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
        targets: all-linear for all linear layers except the head, or a regular expression for the Hugging Face names of
            the layers to update, such as q_proj|v_proj; replaces the six switches. A fused layer such as qkv_proj is
            updated as a whole.
        layers: Update only these blocks, such as [0, 1], or [-2, -1] for the last two.

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
    modules: Optional[frozenset[str]] = None  # of an adapter that is loaded: they replace the switches
    # the weights that an adapter has in full, by Hugging Face name, and whether they are trained further
    in_full: Mapping[str, bool] = field(default_factory=dict)
    scaling: float = field(init=False)  # factor of the update, from alpha and r

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
            wrong.append(
                "--lora_init pissa changes the weights whose norms --lora_variant dora learns. Use only one of them"
            )
        if self.targets is not None:
            try:
                pattern(self.targets)
            except ValueError as e:
                wrong.append(f"--lora_targets: {e}")
        elif self.modules is None and not any(getattr(self, t) for t in TARGETS):
            flags = ", ".join(f"--lora_{t}" for t in TARGETS)
            wrong.append(f"LoRA is off for every layer, so there is nothing to train. Set one of {flags} to true")
        if wrong:
            raise UserError("; ".join(wrong) + ".")
        self.scaling = self.alpha / (math.sqrt(self.r) if self.variant == "rslora" else self.r)

    def idle_switches(self) -> list[str]:
        """The flags that `targets` overrides and that are not at their defaults."""
        switches = ((name, getattr(self, name)) for name in TARGETS)
        return [f"--lora_{name} {str(on).lower()}" for name, on in switches if on is not getattr(LoRA, name)]

    def apply(self, model: GPT) -> None:
        """Replace the selected linear layers with `LoRALinear` and freeze everything else, in place. Raises `UserError`
        if the selection matches no layer, or a layer does not support these options."""
        names = weight_map(model.config)
        model.requires_grad_(False)
        chosen = self.chosen_layers(model.config.n_layer)
        linears = [
            (n, m, names.holders(n, getattr(m, "parts", (m.out_features,))))
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
                        "rslora, or do not update the mlp."
                    )
                if self.init == "pissa" and isinstance(linear, QuantizedLinear):
                    raise UserError(
                        "--lora_init pissa changes the frozen weights, which --quantize rounds. Use only one of them."
                    )
                model.set_submodule(name, self.wrap(linear, adapted))
        if not found and self.modules is None:
            flag = f"--lora_targets {self.targets!r}" if self.targets is not None else "The selection for LoRA"
            leaves = sorted({module.rpartition(".")[2] for _, _, hf in linears for module in hf})
            raise UserError(f"{flag} matches no layer, so there is nothing to train. Layers: {', '.join(leaves)}.")
        if self.train_embeddings:
            model.transformer.wte.weight.requires_grad_(True)
        if self.in_full:
            self.train_in_full(model)
        model.stack_experts()

    def train_in_full(self, model: GPT) -> None:
        for parameter in weight_map(model.config).parameters(model).values():
            found = [tensor.name for tensor in parameter.tensors if tensor.name in self.in_full]
            if found and isinstance(parameter.module, QuantizedLinear) and parameter.leaf == "weight":
                raise UserError(f"--quantize rounds {found[0]}, which the adapter has in full. Omit --quantize.")
            if any(self.in_full[name] for name in found):
                parameter.value.requires_grad_(True)

    def wrap(self, linear: nn.Linear, adapted: Sequence[bool]) -> LoRALinear:
        return LoRALinear(linear, self, adapted)

    def chosen_layers(self, n_layer: int) -> Optional[set[int]]:
        if self.layers is None:
            return None
        wrong = [n for n in self.layers if not -n_layer <= n < n_layer]
        if wrong or not self.layers:
            words = ", ".join(map(str, wrong)) or "an empty list"
            raise UserError(f"--lora_layers has {words}. Layers of this model: 0 to {n_layer - 1}.")
        return {n % n_layer for n in self.layers}

    def selected(self, name: str, hf: Sequence[str], chosen: Optional[set[int]]) -> list[bool]:
        """For each block of rows of the layer with this name, whether it gets an update. `hf` has the Hugging Face
        module that holds each of them; `chosen` the layers of the model that `layers` selects, None for all."""
        if self.modules is not None:
            return [module in self.modules for module in hf]
        layer = re.search(r"\.h\.(\d+)\.", name)
        if layer and chosen is not None and int(layer[1]) not in chosen:
            return [False] * len(hf)
        if self.targets == ALL_LINEAR:
            return [layer is not None] * len(hf)
        if self.targets is not None:
            return [re.search(self.targets, module) is not None for module in hf]
        if name.endswith(("attn.qkv", "attn.in_qkv")):
            return [self.query, self.key, self.value][: len(hf)]
        if name.endswith(".attn.in_proj"):  # of a recurrent layer, for all that it reads
            return [self.query or self.key or self.value] * len(hf)
        if latent := re.search(r"\.attn\.(q|kv)_", name):  # one projection for keys and values
            return [self.query if latent[1] == "q" else self.key or self.value]
        if name.endswith((".in_beta", ".in_step")):  # small layers
            return [False]
        head = self.head and name.startswith("lm_head")
        return [self.projection if ".attn." in name else self.mlp if ".mlp." in name else head] * len(hf)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
