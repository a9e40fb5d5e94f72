"""What one model is: its sizes and the switches of its math."""

from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class Config:
    """Sizes and switches of a `GPT`. The field names are LitGPT's where LitGPT has the switch.

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

    # the block
    norm_class_name: str = "RMSNorm"  # or LayerNorm
    norm_eps: float = 1e-5
    norm_affine: bool = True  # whether norms have weights
    norm_unit_offset: bool = False  # RMSNorm scales by 1 + weight
    norm_1: bool = True  # before attention
    norm_2: bool = True  # before the feed-forward part
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = False  # attention and feed-forward read the same input
    shared_attention_norm: bool = False  # ... and the same norm of it
    residual_multiplier: float = 1.0  # of what attention and feed-forward add to the stream
    bias: bool = False  # in every linear layer of a block ...
    attn_bias: Optional[bool] = None  # ... unless these say otherwise: in q, k, v
    attn_proj_bias: Optional[bool] = None  # in the projection after attention
    mlp_bias: Optional[bool] = None

    # attention
    attention_scores_scalar: Optional[float] = None  # scores are divided by its root; the head size by default
    attention_logit_softcapping: Optional[float] = None
    norm_qk: bool = False
    norm_qk_type: str = "default"  # per head, one weight; `olmo2`: over all heads; `each_head`: a weight for each head
    clip_qkv: Optional[float] = None
    sliding_window_size: Optional[int] = None  # tokens that a local layer sees, the current one among them
    sliding_window_indices: Optional[list[int]] = None  # 1 for each local layer; all by default

    # positions
    learned_positions: bool = False  # an embedding of positions
    rotary_percentage: float = 1.0  # share of a head that rotates
    rope_base: float = 10000.0
    rope_type: str = "default"
    rope_adjustments: dict[str, Any] = field(default_factory=dict)  # the numbers that `rope_type` needs
    rope_local_base_freq: Optional[float] = None  # another base, without adjustments, ...
    rope_indices: Optional[list[int]] = None  # ... for each layer that has a 1 here
    rope_layers: Optional[list[int]] = None  # 1 for each layer whose heads rotate; all by default

    # feed-forward
    mlp_class_name: str = "LLaMAMLP"
    gelu_approximate: str = "none"  # or tanh
    n_expert: int = 0
    n_expert_per_token: int = 0
    moe_intermediate_size: Optional[int] = None
    moe_layers: Optional[list[int]] = None  # 1 for each layer with experts; all by default
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1

    # the ends
    scale_embeddings: bool = False  # by the root of the width
    embedding_multiplier: float = 1.0
    lm_head_bias: bool = False
    tie_embeddings: bool = False  # the head's weight is the embedding's
    logits_scaling: float = 1.0  # logits are divided by it
    final_logit_softcapping: Optional[float] = None

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

    @property
    def rope_n_elem(self) -> int:
        """Dimensions of a head that rotate."""
        assert self.head_size is not None
        return int(self.rotary_percentage * self.head_size)

    def window(self, layer: int) -> Optional[int]:
        """Tokens that this layer sees, the current one among them; None if all."""
        return self.sliding_window_size if on(self.sliding_window_indices, layer) else None

    def rope_kind(self, layer: int) -> Optional[int]:
        """Which rope this layer has: 0, 1 for the local one, None for none."""
        if self.rope_n_elem == 0 or not on(self.rope_layers, layer):
            return None
        return int(self.rope_local_base_freq is not None and on(self.rope_indices, layer))

    def mlp_class(self, layer: int) -> str:
        """The feed-forward part of this layer."""
        return "LLaMAMLP" if self.n_expert and not on(self.moe_layers, layer) else self.mlp_class_name


def on(indices: Optional[list[int]], layer: int) -> bool:
    """Whether a list of 0 and 1 has a 1 for this layer; a list that is not given has ones."""
    return indices is None or bool(indices[layer])
