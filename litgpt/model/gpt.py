"""The one model that runs every family.

Shapes: B rows, T tokens, C = n_embd, V = padded_vocab_size.
"""

from typing import Optional

import torch
from torch import nn

from litgpt.config import Config
from litgpt.model.attention import CausalSelfAttention, Rope
from litgpt.model.kv_cache import KVCache
from litgpt.model.mlp import LLaMAMLP
from litgpt.model.norm import RMSNorm
from litgpt.model.rope import inverse_frequencies, rope_table


class Block(nn.Module):
    """Attention and feed-forward, each on a normalized input and added to the stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LLaMAMLP(config)

    def forward(
        self, x: torch.Tensor, rope: Rope, documents: Optional[list[int]], cache: Optional[KVCache]
    ) -> torch.Tensor:
        x = x + self.attn(self.norm_1(x), rope, documents, cache)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """Embedding, blocks and last norm: what lies under the name `transformer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


class GPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = Transformer(config)
        self.tie_weights()
        # made on the CPU even when the weights are on the meta device: no checkpoint holds it
        self.inverse_frequencies = inverse_frequencies(config)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the pretrained weights."""
        return self.transformer.wte.weight.dtype

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's again, where the config says so."""
        if self.config.tie_embeddings:
            head = getattr(self.lm_head, "linear", self.lm_head)  # a method may have wrapped it
            head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights for a training from scratch.

        Normal, with a standard deviation of sqrt(2 / (5 C)) (https://arxiv.org/abs/1910.05895), and of
        2 / (n_layer sqrt(C)) where a layer writes into the stream (https://arxiv.org/abs/2204.06745).
        """
        width, layers = self.config.n_embd, self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(".proj")
                std = 2 / (layers * width**0.5) if writes else (2 / (5 * width)) ** 0.5
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self, idx: torch.Tensor, documents: Optional[list[int]] = None, cache: Optional[KVCache] = None
    ) -> torch.Tensor:
        """Logits for the token after each of `idx`.

        Args:
            idx: Token ids, (B, T).
            documents: Lengths of the documents that lie end to end in T; no token sees another document, and each
                starts at position 0. By default a row is one document.
            cache: Tokens that were read before; `idx` continues them and is added.

        Returns:
            (B, T, V)
        """
        return self.lm_head(self.hidden(idx, documents, cache))

    def hidden(
        self, idx: torch.Tensor, documents: Optional[list[int]] = None, cache: Optional[KVCache] = None
    ) -> torch.Tensor:
        """What the head reads, (B, T, C). Arguments as in `forward`."""
        x = self.transformer.wte(idx)
        if self.inverse_frequencies.device != x.device:
            self.inverse_frequencies = self.inverse_frequencies.to(x.device)
        rope = rope_table(self.inverse_frequencies, self.positions(idx, documents, cache), x.dtype)
        for block in self.transformer.h:
            x = block(x, rope, documents, cache)
        if cache is not None:
            cache.advance(idx.size(1))
        return self.transformer.ln_f(x)

    def positions(self, idx: torch.Tensor, documents: Optional[list[int]], cache: Optional[KVCache]) -> torch.Tensor:
        """The position of each of the T tokens in its document, (T,)."""
        tokens = idx.size(1)
        if documents is not None:
            assert cache is None and sum(documents) == tokens
            return torch.cat([torch.arange(n) for n in documents]).to(idx.device, non_blocking=True)
        start = cache.length if cache is not None else 0
        return torch.arange(start, start + tokens, device=idx.device)
