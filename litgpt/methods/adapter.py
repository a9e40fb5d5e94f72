"""LLaMA-Adapter: a learned prefix that later layers attend to, with a gate that starts at zero.

https://arxiv.org/abs/2303.16199. LLaMA-Adapter V2 adds a bias and a scale on every linear layer, and trainable norms:
those before and after attention and MLP, and the final one. The norms of queries and keys and the routers of experts
stay frozen. https://arxiv.org/abs/2304.15010

Shapes: B rows, T tokens, n query heads, g key-value heads, hs head size, P prefix tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Optional, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model.attention import CausalSelfAttention
from litgpt.model.attention_kernels import masked_attention
from litgpt.model.chunked_attention import Scores
from litgpt.model.gpt import GPT
from litgpt.model.mlp import Router

NORMS = {"norm_1", "norm_2", "post_attention_norm", "post_mlp_norm", "ln_f"}


class Prefix(nn.Module):
    """The prefix of one attention layer, in float32. Its keys and values have no positions and no norms."""

    order: Optional[
        torch.Tensor
    ]  # for each row of q, k and v, the row of `qkv` that the prefix uses; None for the same

    def __init__(self, length: int, n_embd: int, n_head: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.scores = Scores(scale)  # with the layer's soft cap if it applies to the prefix
        self.register_buffer("order", None, persistent=False)
        self.embedding = nn.Parameter(torch.empty(length, n_embd, device=device))
        self.gate = nn.Parameter(torch.empty(n_head, device=device))
        if device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.embedding.normal_()  # not by `nn.init`, as in LoRA
        self.gate.zero_()

    def forward(
        self, q: torch.Tensor, qkv: Callable[[torch.Tensor], torch.Tensor], sizes: tuple[int, int, int]
    ) -> torch.Tensor:
        """The term to add to the output of attention for the queries `q`, both (B, n, T, hs). `qkv` is the layer's
        fused projection, `sizes` are the numbers of its output features for queries, keys and values."""
        fused = qkv(self.embedding.to(q.dtype))
        fused = fused if self.order is None else fused[:, self.order.to(fused.device)]
        _, k, v = fused.split(sizes, dim=-1)  # (P, n * hs or g * hs)
        heads = k.size(-1) // q.size(-1)
        k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1)[None].expand(q.size(0), -1, -1, -1) for t in (k, v))
        y = masked_attention(q, k, v, self.scores, None)
        return self.gate.to(y.dtype)[:, None, None] * y


@dataclass
class LLaMAAdapter:
    """A prefix for every layer from `start_layer` on. Raises `UserError` if a number is out of range."""

    name: ClassVar[str] = "LLaMA-Adapter"

    prompt_length: int = 10
    start_layer: int = 2

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise UserError(f"--adapter_prompt_length {self.prompt_length} must be above 0.")
        if self.start_layer < 0:
            raise UserError(f"--adapter_start_layer {self.start_layer} must be at least 0.")

    def __str__(self) -> str:
        return f"{self.name} of {self.prompt_length} tokens"

    def apply(self, model: GPT) -> None:
        """Add the prefixes and freeze everything else, in place. Raises `UserError` if no layer would get a prefix."""
        config = model.config
        if self.start_layer >= config.n_layer:
            raise UserError(
                f"--adapter_start_layer {self.start_layer} is too high for {config.n_layer} layers. Set it to at most "
                f"{config.n_layer - 1}."
            )
        model.requires_grad_(False)
        for block in model.transformer.h[self.start_layer :]:
            attention = block.attn
            if not isinstance(attention, CausalSelfAttention):
                continue
            if attention.source != attention.layer:
                raise UserError(f"{self.name} needs keys and values in every layer. Layer {attention.layer} has none.")
            device = attention.proj.weight.device
            attention.prefix = Prefix(self.prompt_length, config.n_embd, config.n_head, attention.scores.scale, device)


class AdapterV2Linear(nn.Module):
    """scale * (W x + b + bias) with a learned scale and bias, in float32."""

    def __init__(self, linear: Union[nn.Linear, Router]) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.adapter_bias = nn.Parameter(torch.empty(linear.out_features, device=device))
        self.adapter_scale = nn.Parameter(torch.empty(linear.out_features, device=device))
        if device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.adapter_bias.zero_()
        self.adapter_scale.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


@dataclass
class LLaMAAdapterV2(LLaMAAdapter):
    """Prefixes from `start_layer` on, and a bias, a scale and trainable norms everywhere."""

    name: ClassVar[str] = "LLaMA-Adapter V2"

    def apply(self, model: GPT) -> None:
        super().apply(model)
        self.adapt_linears(model)

    def adapt_linears(self, model: GPT) -> None:
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
            model.set_submodule(name, AdapterV2Linear(linear))
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].rpartition(".")[2] in NORMS:
                parameter.requires_grad_(True)
        model.stack_experts()


def trained(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
