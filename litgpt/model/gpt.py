"""The one model that runs every family.

Shapes: B rows, T tokens, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from litgpt.model import kernels_cpu as kernels_cpu  # registers its kernels
from litgpt.model.attention import CausalSelfAttention, ForwardContext, MultiheadLatentAttention, Sinks
from litgpt.model.config import Config
from litgpt.model.delta_net import GatedDeltaNet
from litgpt.model.devices import to_device
from litgpt.model.kernels import remat, saved_tensors
from litgpt.model.kv_cache import KVCache
from litgpt.model.linear import Embedding, Linear
from litgpt.model.mamba2 import Mamba2
from litgpt.model.mlp import MLPS, XIELU, LLaMAMoE, Router, ScaledRouter
from litgpt.model.norm import EachHeadNorm, RMSNorm, make_norm
from litgpt.model.packing import Packing
from litgpt.model.recurrent import CausalConv, RecurrentLayer, ShortConv
from litgpt.model.rope import make_ropes
from litgpt.model.sharded import unsharded

RECURRENT: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (GatedDeltaNet, Mamba2, ShortConv)}


def mixer(config: Config, layer: int) -> type[nn.Module]:
    """The class of the module that mixes tokens in this layer."""
    if config.is_recurrent(layer):
        return RECURRENT[config.recurrent_class_name]
    return CausalSelfAttention if config.latent_attention is None else MultiheadLatentAttention


class Block(nn.Module):
    """Attention and MLP, each on a normalized input and added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()

        def norm(used: bool) -> nn.Module:
            return make_norm(config, config.n_embd) if used else nn.Identity()

        self.norm_1 = norm(config.norm_1)
        self.attn = mixer(config, layer)(config, layer)
        self.post_attention_norm = norm(config.post_attention_norm)
        self.norm_2 = norm(config.norm_2 and not config.shared_attention_norm)
        self.mlp = MLPS[config.mlp_class(layer)](config.of_layer(layer))
        self.post_mlp_norm = norm(config.post_mlp_norm)
        self.parallel, self.shared = config.parallel_residual, config.shared_attention_norm
        self.multiplier = config.residual_multiplier
        self.per_layer = PerLayerGate(config, layer) if config.per_layer_embedding else None
        self.scale = LayerScalar() if config.layer_scalar else nn.Identity()

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, context))
        if self.parallel:
            return x + attended + self.mlp(normed if self.shared else self.norm_2(x))
        x = torch.add(x, attended, alpha=self.multiplier)
        x = torch.add(x, self.post_mlp_norm(self.mlp(self.norm_2(x))), alpha=self.multiplier)
        return self.scale(x if self.per_layer is None else self.per_layer(x, context))


class PerLayerInputs(nn.Module):
    """What each layer gets for each token beside the stream, (B, T, n_layer, size): an embedding of its own, and a
    projection of the embedding (https://ai.google.dev/gemma/docs/gemma-3n)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, self.size = config.n_embd, config.per_layer_embedding
        self.wte = Embedding(config.per_layer_vocab_size, config.n_layer * self.size)
        self.down = Linear(width, config.n_layer * self.size, bias=False)
        self.norm = make_norm(config, self.size)

    def forward(self, idx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        embedded = self.wte(idx) * torch.tensor(self.size**0.5, dtype=x.dtype)  # rounded, as in `GPT.hidden`
        projected = self.norm((self.down(x) * x.size(-1) ** -0.5).unflatten(-1, (-1, self.size)))
        return (projected + embedded.view_as(projected)) * 2**-0.5


class PerLayerGate(nn.Module):
    """Adds what a layer gets for each token to the stream, gated by the stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.gelu, self.approximate = layer, config.gelu_gates, config.gelu_approximate
        self.gate = Linear(config.n_embd, config.per_layer_embedding, bias=False)
        self.proj = Linear(config.per_layer_embedding, config.n_embd, bias=False)
        self.norm = make_norm(config, config.n_embd)

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        assert context.per_layer is not None
        gate = remat(self.gate(x), self.activation)
        return x + self.norm(self.proj(gate * context.per_layer[:, :, self.layer]))

    def activation(self, gate: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate=self.approximate) if self.gelu else F.silu(gate)


class LayerScalar(nn.Module):
    """A number that scales the output of a layer, and stays as it is."""

    layer_scalar: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("layer_scalar", torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_scalar)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.layer_scalar.to(x.dtype)


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if config.learned_positions:
            self.wpe = Embedding(config.block_size, config.n_embd)
        if config.per_layer_embedding:
            self.per_layer = PerLayerInputs(config)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)


OWN_START = (  # layers with a `reset_parameters` of their own
    *(RMSNorm, EachHeadNorm, nn.LayerNorm, XIELU, Sinks, CausalConv, RecurrentLayer, LayerScalar, ScaledRouter),
)


class ScaledHead(nn.Module):
    """A head that divides its logits by `scaling` and softcaps them with a tanh."""

    def __init__(self, linear: nn.Linear, scaling: float, softcap: Optional[float]) -> None:
        super().__init__()
        self.linear = linear
        self.scaling, self.softcap = scaling, softcap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x) / self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class GPT(nn.Module):
    """A decoder-only transformer."""

    saved_tensors: Callable[[torch.Tensor], AbstractContextManager] = staticmethod(saved_tensors)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head: nn.Module = Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        if config.logits_scaling != 1 or config.final_logit_softcapping is not None:
            self.lm_head = ScaledHead(self.lm_head, config.logits_scaling, config.final_logit_softcapping)
        self.transformer = Transformer(config)
        self.tie_weights()
        self.ropes = make_ropes(config)
        self.embedding_scale = config.embedding_multiplier * (config.n_embd**0.5 if config.scale_embeddings else 1)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.wte.weight.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GPT":
        """Called by `.to` and similar methods. Computes the ropes again, in float32: no checkpoint holds them, and they
        would be lost on the meta device."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.device)).device
        self.ropes = make_ropes(self.config)
        for rope in self.ropes:
            rope.inverse = rope.inverse.to(device)
        return self

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            head: Any = self.lm_head
            while hasattr(head, "linear"):  # in a `ScaledHead` or in a method's layer
                head = head.linear
            head.weight = self.transformer.wte.weight

    def stack_experts(self) -> None:
        """For a model whose weights are in their place: see `LLaMAMoE.stack`."""
        for block in self.transformer.h:
            if isinstance(block.mlp, LLaMAMoE):
                block.mlp.stack()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights for training from scratch. Normal, with a standard deviation of sqrt(2 / (5 C))
        (https://arxiv.org/abs/1910.05895), or of 2 / (n_layer sqrt(C)) for layers that write to the residual stream
        (https://arxiv.org/abs/2204.06745)."""
        width, layers = self.config.n_embd, self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                writes = name.endswith((".proj", ".out"))
                std = 2 / (layers * width**0.5) if writes else (2 / (5 * width)) ** 0.5
                with unsharded(module):
                    nn.init.normal_(module.weight, std=std)
                    if not isinstance(module, nn.Embedding) and module.bias is not None:
                        nn.init.zeros_(module.bias)
            if isinstance(module, OWN_START):
                with unsharded(module):
                    module.reset_parameters()
        self.stack_experts()

    def forward(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits for the token after each of `idx`, (B, T, V). Arguments as in `hidden`."""
        return self.lm_head(self.hidden(idx, *args, **kwargs))

    def hidden(
        self,
        idx: torch.Tensor,
        seqlens: Optional[list[int]] = None,
        cache: Optional[KVCache] = None,
        rows: Optional[Sequence[int]] = None,
        packing: Optional[Packing] = None,
    ) -> torch.Tensor:
        """The input of the head, (B, T, C).

        Args:
            idx: Token ids, (B, T), on the model's device or on the CPU.
            seqlens: Lengths of the sequences that are packed end to end in T. They do not attend to each other. Each
                starts at position 0, or after its cached tokens. By default each row is one sequence.
            cache: Keys and values of the tokens before. The new ones are added. B is 1.
            rows: The cache row that each sequence continues, by default the first.
            packing: That of `seqlens`, on the model's device; by default it is made here.
        """
        seqlens = new_seqlens = seqlens or (packing.seqlens if packing is not None else [idx.size(1)])
        rows = (rows or [0]) if cache is not None else ()
        if cache is not None and self.switch is not None:
            idx, seqlens = self.restart_longer(idx, seqlens, cache, rows)
        if cache is not None:
            cache.snapshot(rows, seqlens)
        starts = [cache.length(row) for row in rows] if cache is not None else [0] * len(seqlens)
        packing = packing or Packing.of(seqlens, starts)
        tensors = idx, packing.positions, packing.cu_seqlens, torch.tensor(list(rows))
        idx, positions, cu_seqlens, rows_on_device = to_device(self.device, *tensors)
        x = self.transformer.wte(idx)
        if self.config.learned_positions:
            x = x + self.transformer.wpe(positions)
        if self.embedding_scale != 1:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)  # rounded, as when these models were trained
        lengths = [start + n for start, n in zip(starts, seqlens)]
        ropes = [rope.table(positions, seqlens, lengths, x.dtype) for rope in self.ropes]
        context = ForwardContext(Packing(seqlens, positions, cu_seqlens), ropes, cache, rows)
        if self.config.query_scale:  # https://ai.meta.com/blog/llama-4-multimodal-intelligence
            times = (positions / self.config.query_scale_length).floor()
            context.query_scale = (1 + self.config.query_scale * times.log1p()).to(x.dtype)[:, None]
        if self.config.per_layer_embedding:
            context.per_layer = self.transformer.per_layer(idx, x)
        if cache is not None and len(rows) > 1 and max(seqlens) == 1:
            context.each = cache.each_row(rows, rows_on_device, positions)
        with self.saved_tensors(x):
            for block in self.transformer.h:
                x = block(x, context)
            x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(context.rows, seqlens)
            if seqlens != new_seqlens:
                x = torch.cat([part[:, -n:] for part, n in zip(x.split(seqlens, dim=1), new_seqlens)], dim=1)
        return x

    @property
    def switch(self) -> Optional[int]:
        """The sequence length above which the rope of all its tokens changes, if there is one."""
        return next((rope.switch for rope in self.ropes if rope.switch is not None), None)

    def restart_longer(
        self, idx: torch.Tensor, seqlens: list[int], cache: KVCache, rows: Sequence[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Clear the cache rows of sequences that grow longer than `switch`, whose tokens are all processed again.
        Returns the ids to process, (1, T), which the cache has recorded, and their sequence lengths."""
        all_ids: list[int] = []
        lengths = []
        for row, ids in zip(rows, idx[0].split(seqlens)):
            known, new = cache.length(row), ids.tolist()
            if 0 < known <= self.switch < known + len(new):  # type: ignore[operator]
                new = [*cache.ids[row], *new]
                cache.keep(row, 0)
            cache.ids.setdefault(row, []).extend(new)
            all_ids += new
            lengths.append(len(new))
        return torch.tensor([all_ids]), lengths
