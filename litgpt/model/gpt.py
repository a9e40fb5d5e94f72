"""The one model that runs every family.

Shapes: B rows, T tokens, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import nn

from litgpt.model.attention import CausalSelfAttention, ForwardContext
from litgpt.model.config import Config
from litgpt.model.kv_cache import KVCache
from litgpt.model.linear import Embedding, Linear
from litgpt.model.mlp import MLPS, Router
from litgpt.model.norm import EachHeadNorm, RMSNorm, make_norm
from litgpt.model.rope import make_ropes
from litgpt.model.sharded import unsharded


class Block(nn.Module):
    """Attention and feed-forward, each on a normalized input and added to the stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()

        def norm(wanted: bool) -> nn.Module:
            return make_norm(config, config.n_embd) if wanted else nn.Identity()

        self.norm_1 = norm(config.norm_1)
        self.attn = CausalSelfAttention(config, layer)
        self.post_attention_norm = norm(config.post_attention_norm)
        self.norm_2 = norm(config.norm_2 and not config.shared_attention_norm)
        self.mlp = MLPS[config.mlp_class(layer)](config)
        self.post_mlp_norm = norm(config.post_mlp_norm)
        self.parallel, self.shared = config.parallel_residual, config.shared_attention_norm
        self.multiplier = config.residual_multiplier

    def forward(self, x: torch.Tensor, reading: ForwardContext) -> torch.Tensor:
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, reading))
        if self.parallel:
            return x + attended + self.mlp(normed if self.shared else self.norm_2(x))
        x = torch.add(x, attended, alpha=self.multiplier)
        return torch.add(x, self.post_mlp_norm(self.mlp(self.norm_2(x))), alpha=self.multiplier)


class Transformer(nn.Module):
    """Embedding, blocks and last norm: what lies under the name `transformer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        if config.learned_positions:
            self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)


class ScaledHead(nn.Module):
    """A head whose logits are divided by a number, or kept small by a tanh. As a wrapper, it does not show in names."""

    def __init__(self, linear: nn.Linear, scaling: float, softcap: Optional[float]) -> None:
        super().__init__()
        self.linear = linear
        self.scaling, self.softcap = scaling, softcap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x) / self.scaling
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class GPT(nn.Module):
    """A decoder-only transformer."""

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
        """Of the pretrained weights."""
        return self.transformer.wte.weight.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GPT":
        """Also what `.to` and the like do to parameters. The ropes, which no checkpoint holds, are made anew, in
        float32, so that nothing is lost on the way through the meta device."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.device)).device
        self.ropes = make_ropes(self.config)
        for rope in self.ropes:
            rope.inverse = rope.inverse.to(device)
        return self

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's again, where the config says so."""
        if self.config.tie_embeddings:
            head: Any = self.lm_head
            while hasattr(head, "linear"):  # what wraps it: a scale, or a method's layer
                head = head.linear
            head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights for a training from scratch.

        Normal, with a standard deviation of sqrt(2 / (5 C)) (https://arxiv.org/abs/1910.05895), and of
        2 / (n_layer sqrt(C)) where a layer writes into the stream (https://arxiv.org/abs/2204.06745).
        """
        width, layers = self.config.n_embd, self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                writes = name.endswith(".proj")
                std = 2 / (layers * width**0.5) if writes else (2 / (5 * width)) ** 0.5
                with unsharded(module):
                    nn.init.normal_(module.weight, std=std)
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, EachHeadNorm, nn.LayerNorm)):
                with unsharded(module):
                    module.reset_parameters()

    def forward(
        self,
        idx: torch.Tensor,
        seqlens: Optional[list[int]] = None,
        cache: Optional[KVCache] = None,
        rows: Optional[Sequence[int]] = None,
    ) -> torch.Tensor:
        """Logits for the token after each of `idx`.

        Args:
            idx: Token ids, (B, T).
            documents: Lengths of the documents that lie end to end in T; no token sees another document, and each
                starts at position 0, or behind what the cache has of it. By default a row is one document.
            cache: Texts that were read before; the documents continue them and are added. B is 1.
            rows: The row of the cache that each document continues, by default the first.

        Returns:
            (B, T, V)
        """
        return self.lm_head(self.hidden(idx, seqlens, cache, rows))

    def hidden(
        self,
        idx: torch.Tensor,
        seqlens: Optional[list[int]] = None,
        cache: Optional[KVCache] = None,
        rows: Optional[Sequence[int]] = None,
    ) -> torch.Tensor:
        """What the head reads, (B, T, C). Arguments as in `forward`."""
        seqlens, wanted = seqlens or [idx.size(1)], seqlens
        starts = [0] * len(seqlens)
        if cache is not None:
            assert idx.size(0) == 1
            rows, wanted = rows or [0], seqlens
            if self.switch is not None:
                idx, seqlens = self.read_again(idx, seqlens, cache, rows)
            starts = [cache.length(row) for row in rows]
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, seqlens)])
        positions = positions.to(idx.device)
        x = self.transformer.wte(idx)
        if self.config.learned_positions:
            x = x + self.transformer.wpe(positions)
        if self.embedding_scale != 1:
            x = x * torch.tensor(
                self.embedding_scale, dtype=x.dtype
            )  # rounded to the dtype, as the models were trained
        lengths = [start + n for start, n in zip(starts, seqlens)]
        ropes = [rope.table(positions, seqlens, lengths, x.dtype) for rope in self.ropes]
        reading = ForwardContext(seqlens, ropes, cache, rows or ())
        reading.make_masks(self.config, x.device)
        for block in self.transformer.h:
            x = block(x, reading)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.advance(reading.rows, seqlens)
            if seqlens != wanted:
                x = torch.cat([part[:, -n:] for part, n in zip(x.split(seqlens, dim=1), wanted)], dim=1)
        return x

    @property
    def switch(self) -> Optional[int]:
        """The length of text above which all of its tokens rotate otherwise, if a rope has one."""
        return next((rope.switch for rope in self.ropes if rope.switch is not None), None)

    def read_again(
        self, idx: torch.Tensor, seqlens: list[int], cache: KVCache, rows: Sequence[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Where a text gets longer than the switch with its document, the cache forgets it and the document becomes the
        whole text. Returns what to read and its documents, and notes the tokens in the cache."""
        read: list[int] = []
        lengths = []
        for row, ids in zip(rows, idx[0].split(seqlens)):
            known, new = cache.length(row), ids.tolist()
            if 0 < known <= self.switch < known + len(new):  # type: ignore[operator]
                new = [*cache.ids[row], *new]
                cache.keep(row, 0)
            cache.ids.setdefault(row, []).extend(new)
            read += new
            lengths.append(len(new))
        return torch.tensor([read], device=idx.device), lengths
