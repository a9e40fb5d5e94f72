"""LitGPT's `GPT`: LitGPT's arguments and the names of its weights over the model that everything inside litgpt uses.

Shapes: B rows, T tokens, V = padded_vocab_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional, TypeVar, Union

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.families.table import without_wrappers
from litgpt.litgpt_format.config import Config
from litgpt.litgpt_format.folder import group_order, lit_modules
from litgpt.litgpt_format.rope import build_rope_cache
from litgpt.model.gpt import GPT as InnerGPT
from litgpt.model.kv_cache import KVCache
from litgpt.model.mlp import Router

G = TypeVar("G", bound="GPT")
LEGACY_QKV = ".attn.attn."  # in older files, with rows in another order


class NoCache(UserError, TypeError):
    """`input_pos` was given, but there is no key-value cache."""


@dataclass
class Names:
    """A parameter of ours and the tensors of LitGPT that hold its rows."""

    ours: str
    theirs: list[str]
    sizes: list[int]  # rows in each of `theirs`
    shape: Optional[tuple[int, ...]] = None  # of the tensor in LitGPT, if it differs
    old: str = ""  # the name of a fused qkv in older files


class LayerCache:
    """The cache of a layer, as loops for LitGPT know it. All layers have one cache here."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def reset_parameters(self) -> None:
        """Forget the keys and values."""
        self.cache.clear()


class GPT(nn.Module):
    """A decoder-only transformer, as in LitGPT. State dicts have LitGPT's names.

    Attributes:
        inner: The `litgpt.model.gpt.GPT` that has the weights and does the work.
    """

    inner: InnerGPT
    lm_head: nn.Module
    config_class: type[Config] = Config
    wraps_linear = False  # whether LitGPT's state dicts have `.linear` in the name of every linear layer

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        model = InnerGPT(config.to_model())
        self.change(model)
        self.hold(model, config)

    @classmethod
    def around(cls, model: InnerGPT, config: Config) -> "GPT":
        """LitGPT's interface to a model that exists. The two share their weights."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.hold(model, config)
        return made

    def hold(self, model: InnerGPT, config: Config) -> None:
        self.config = config
        self.__dict__["inner"] = model  # not a submodule: it would double all names
        self.lm_head, self.transformer = model.lm_head, model.transformer
        self.max_length = config.block_size
        self.cache: Optional[KVCache] = None
        self.cache_rows = self.cache_length = 0
        self.share_cache()
        self.register_state_dict_post_hook(to_lit_names)
        self.register_load_state_dict_pre_hook(from_lit_names)
        self.register_load_state_dict_post_hook(name_keys)

    def change(self, model: InnerGPT) -> None:
        """Add what a finetuning method trains to the model that is wrapped, in place."""

    @classmethod
    def from_name(cls: type[G], name: str, **kwargs: Any) -> G:
        """A model with random weights. Arguments as in `Config.from_name`."""
        return cls(cls.config_class.from_name(name, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def max_seq_length(self) -> int:
        """The most tokens that a sequence may have, at most `config.block_size`."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if value > self.config.block_size:
            raise UserError(f"max_seq_length {value} is above the block_size of this model, {self.config.block_size}.")
        self.max_length = value

    def reset_parameters(self) -> None:
        """Does nothing: positions are computed when they are needed."""

    def rope_cache(self, device: Optional[torch.device] = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, as in `build_rope_cache`. The model itself does not use them."""
        c = self.config
        ropes = c.rope_condense_ratio, c.rope_adjustments, c.rope_local_base_freq
        return build_rope_cache(self.max_length, c.rope_n_elem, device, c.rope_base, *ropes)

    def rope_cache_length(self) -> int:
        """How many dimensions of a head rotate."""
        return self.config.rope_n_elem

    @property
    def cos(self) -> torch.Tensor:
        return self.rope_cache(self.inner.device)[0]

    @property
    def sin(self) -> torch.Tensor:
        return self.rope_cache(self.inner.device)[1]

    def _init_weights(self, module: nn.Module) -> None:
        """For `model.apply(model._init_weights)`."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is not self and hasattr(module, "reset_parameters") and any(True for _ in module.parameters(False)):
            module.reset_parameters()  # type: ignore[operator]

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: Optional[int] = None,
        rope_cache_length: Optional[int] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Begin to cache keys and values for `input_pos`. The cache grows when it needs to, on the device and in the
        precision of the model; the last three arguments are not used.

        Args:
            batch_size: The most rows of a forward pass.
            max_seq_length: The most tokens of a row; `max_seq_length` of the model by default.
        """
        self.cache = KVCache(self.inner.config)
        self.cache_rows, self.cache_length = batch_size, max_seq_length or self.max_length
        self.share_cache()

    def clear_kv_cache(self) -> None:
        self.cache = None
        self.share_cache()

    def share_cache(self) -> None:
        """Give each layer its `attn.kv_cache`."""
        for block in self.inner.transformer.h:
            block.attn.kv_cache = None if self.cache is None else LayerCache(self.cache)  # type: ignore[union-attr]

    def forward(
        self,
        idx: torch.Tensor,
        input_pos: Optional[torch.Tensor] = None,
        input_pos_maxp1: Optional[int] = None,
        lm_head_chunk_size: int = 0,
    ) -> Union[torch.Tensor, list[torch.Tensor]]:
        """Logits for the token after each of `idx`, (B, T, V).

        Args:
            idx: Token IDs, (B, T).
            input_pos: The position of each token, (T,) or (B, T), counted up by 1 from at most the number of cached
                tokens. Cached tokens from the first of these positions on are replaced. Needs `set_kv_cache`.
            input_pos_maxp1: Not used.
            lm_head_chunk_size: Return a list of logits of as many tokens; one tensor if 0.
        """
        rows, length = idx.shape
        if length > self.max_length:
            raise UserError(f"The sequence has {length} tokens, but max_seq_length is {self.max_length}.")
        if input_pos is None:
            x = self.inner.hidden(idx)
        else:
            context = self.cached_rows(input_pos, rows, length)
            x = self.inner.hidden(idx.reshape(1, -1), [length] * rows, context, range(rows)).view(rows, length, -1)
        if lm_head_chunk_size > 0:
            return [self.lm_head(part) for part in x.split(lm_head_chunk_size, dim=1)]
        return self.lm_head(x)

    def cached_rows(self, input_pos: torch.Tensor, rows: int, length: int) -> KVCache:
        """The cache, with the tokens before `input_pos` in each row."""
        if self.cache is None:
            raise NoCache("input_pos needs a key-value cache. Call set_kv_cache first.")
        if input_pos.size(-1) != length or input_pos.dim() > 2 or (input_pos.dim() == 2 and len(input_pos) != rows):
            raise UserError(f"input_pos has the shape {tuple(input_pos.shape)}, but idx has {(rows, length)}.")
        if rows > self.cache_rows:
            raise UserError(f"idx has {rows} rows, but set_kv_cache was called for {self.cache_rows}.")
        positions = input_pos.expand(rows, length).tolist()
        for row, numbers in enumerate(positions):
            start = numbers[0]
            if numbers != list(range(start, start + length)):
                raise UserError("The positions in input_pos must increase by 1 from token to token.")
            if numbers[-1] >= self.cache_length:
                raise UserError(f"input_pos has {numbers[-1]}, but the cache holds {self.cache_length} tokens.")
            if self.cache.keep(row, start) != start:
                raise UserError(
                    f"input_pos begins at {start}, but the cache has no longer, or not yet, the tokens before. Process "
                    "the sequence again from position 0."
                )
        return self.cache

    def parameter_names(self) -> Iterator[Names]:
        """Every parameter and the tensors of LitGPT that hold it."""
        for path, module in self.named_modules(remove_duplicate=False):
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    yield self.lit_names(path, module, leaf, parameter)

    def lit_names(self, path: str, module: nn.Module, leaf: str, parameter: torch.Tensor) -> Names:
        layer = without_wrappers(path)
        owner: Any = self.get_submodule(layer)
        while hasattr(owner, "linear"):  # the layer without wrappers, which knows its blocks of rows
            owner = owner.linear
        wrapped = self.wraps_linear and (isinstance(module, nn.Linear) or type(module) is Router)
        linear = ".linear" if wrapped and leaf in ("weight", "bias") else ""
        theirs = [f"{name}{linear}.{leaf}" for name in lit_modules(layer, owner)]
        sizes = [len(parameter)]
        if len(theirs) > 1:
            parts = owner.parts if leaf != "lora_A" else [len(parameter) // len(theirs)] * len(theirs)
            sizes = list(parts)
        old = theirs[0].replace(".attn.qkv.", LEGACY_QKV) if ".attn.qkv." in theirs[0] else ""
        return Names(f"{path}.{leaf}", theirs, sizes, old=old)


def to_lit_names(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give the tensors of a state dict LitGPT's names, in place and in the same order."""
    assert isinstance(model, GPT)
    found: dict[str, Any] = {}
    names = {prefix + names.ours: names for names in model.parameter_names()}
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        if key in names:
            n = names[key]
            parts = value.split(n.sizes) if len(n.sizes) > 1 else [value if n.shape is None else value.view(n.shape)]
            found |= {prefix + name: part for name, part in zip(n.theirs, parts)}
        else:
            found[key] = value
    state.update(found)


def from_lit_names(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
) -> None:
    """Give the tensors of a state dict our names, in place. Accepts names with and without `.linear`, and the fused qkv
    of older files. Of a layer that is only half there, the other half stays as it is."""
    assert isinstance(model, GPT)
    order = group_order(model.inner.config)
    for names in model.parameter_names():
        found = [
            next((prefix + s for s in spellings(name, names.old) if prefix + s in state), "") for name in names.theirs
        ]
        own = model.get_parameter(names.ours).detach()
        if not any(found) or (own.is_meta and not all(found)):
            continue
        values = [state.pop(key) if key else part for key, part in zip(found, own.split(names.sizes))]
        missing += [prefix + name for key, name in zip(found, names.theirs) if not key]
        if LEGACY_QKV in found[0] and names.ours.endswith(("weight", "bias")):
            values = [value[order.argsort().to(value.device)] for value in values]
        value = values[0] if len(values) == 1 else torch.cat(values)
        state[prefix + names.ours] = value if names.shape is None else value.flatten()


def spellings(name: str, old: str) -> Iterator[str]:
    """The names that a tensor may have in a file."""
    for spelling in (name, old) if old else (name,):
        yield spelling
        yield spelling.replace(".linear.", ".")


def name_keys(model: nn.Module, incompatible: Any) -> None:
    """Give the missing keys of a loaded state dict LitGPT's names."""
    assert isinstance(model, GPT)
    theirs = {names.ours: names.theirs for names in model.parameter_names()}
    missing = incompatible.missing_keys
    for key in list(missing):
        ours = next((o for o in theirs if key == o or key.endswith(f".{o}")), None)
        if ours is not None:
            at = missing.index(key)
            missing[at : at + 1] = [key.removesuffix(ours) + name for name in theirs[ours]]
