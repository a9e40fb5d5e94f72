"""What one model is: its sizes and the switches of its math."""

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class Config:
    """Sizes and switches of a `GPT`. The field names are LitGPT's.

    `litgpt.families.read_config` makes it from a checkpoint's `config.json`.
    """

    model_type: str = "llama"  # the family: whose `config.json` and weight names these are
    name: str = ""  # for people; nothing depends on it
    block_size: int = 4096  # positions the model was made for
    padded_vocab_size: int = 32000  # rows of the embedding and of the head
    n_layer: int = 16
    n_embd: int = 4096
    n_head: int = 32
    n_query_groups: Optional[int] = None  # heads of keys and values; as many as queries by default
    head_size: Optional[int] = None
    intermediate_size: Optional[int] = None
    norm_eps: float = 1e-5
    bias: bool = False  # in every linear layer of a block ...
    attn_bias: Optional[bool] = None  # ... unless these say otherwise: in q, k, v
    attn_proj_bias: Optional[bool] = None  # in the projection after attention
    mlp_bias: Optional[bool] = None
    lm_head_bias: bool = False
    tie_embeddings: bool = False  # the head's weight is the embedding's
    rope_base: float = 10000.0
    rope_type: str = "default"
    rope_adjustments: dict[str, Any] = field(default_factory=dict)  # the numbers that `rope_type` needs

    def __post_init__(self) -> None:
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.intermediate_size = self.intermediate_size or 4 * self.n_embd
        for name in ("attn_bias", "attn_proj_bias", "mlp_bias"):
            if getattr(self, name) is None:
                setattr(self, name, self.bias)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        return tuple(n * self.head_size for n in (self.n_head, self.n_query_groups, self.n_query_groups))  # type: ignore
