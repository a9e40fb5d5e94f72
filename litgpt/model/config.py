"""The configuration of a model: its sizes and the switches of its math."""

from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Optional, get_args, get_origin

import yaml

from litgpt.errors import UserError, brief, nearest
from litgpt.storage.fields import is_number
from litgpt.storage.files import PlainSafeLoader, read_yaml


@dataclass
class Config:
    """Sizes and switches of a `GPT`, under LitGPT's names for the switches that LitGPT has.
    `litgpt.families.read_config` reads it from a checkpoint's `config.json`, `from_name` from `models.yaml`."""

    model_type: str = "llama"  # the family, which decides on `config.json` and weight names
    name: str = ""  # for display only
    repo_id: str = ""  # the repository of a known model
    block_size: int = 4096  # the maximum number of positions
    padded_vocab_size: int = 32000  # rows of the embedding and of the head
    n_layer: int = 16
    n_embd: int = 4096
    n_head: int = 32
    n_query_groups: int = 0  # heads of keys and values; as many as queries by default
    head_size: int = 0  # the width divided by the number of heads by default
    global_head_size: Optional[int] = None  # of layers without a window; `head_size` by default
    global_query_groups: Optional[int] = None  # of layers without a window; `n_query_groups` by default
    intermediate_size: int = 0  # four times the width by default

    # the block
    norm_class_name: str = "RMSNorm"  # or LayerNorm
    norm_eps: float = 1e-5
    norm_affine: bool = True  # whether norms have weights
    norm_bias: bool = True  # whether a LayerNorm with weights has a bias
    norm_unit_offset: bool = False  # norms scale by 1 + weight
    norm_1: bool = True  # before attention
    norm_2: bool = True  # before the feed-forward part
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = False  # attention and feed-forward read the same input
    shared_attention_norm: bool = False  # ... after the same norm
    residual_multiplier: float = 1.0  # scales what attention and feed-forward add to the stream
    layer_scalar: bool = False  # the stream is scaled after each layer, by a number that is not trained
    bias: bool = False  # in every linear layer of a block, ...
    attn_bias: Optional[bool] = None  # ... unless these override it: in q, k, v
    attn_proj_bias: Optional[bool] = None  # in the projection after attention
    mlp_bias: Optional[bool] = None

    # attention
    attention_scores_scalar: Optional[float] = None  # scores are divided by its root; the head size by default
    attention_logit_softcapping: Optional[float] = None
    query_scale: float = 0.0  # queries grow by this times the log of 1 + ...
    query_scale_length: int = 0  # ... the number of times that their position is beyond this length
    norm_qk: bool = False
    norm_qk_type: str = "default"  # per head, one weight; `olmo2`: over all heads; `each_head`: a weight for each head
    norm_qk_after_rope: bool = False
    norm_v: bool = False  # values have a norm without weights, per head
    clip_qkv: Optional[float] = None
    global_keys_as_values: bool = False  # layers without a window project values as keys, before the norms and the rope
    latent_attention: Optional[dict[str, Any]] = None  # sizes, named as by LATENT: q, k and v are expanded from latents
    latent_norm_eps: Optional[float] = None  # of the norms of the latents; `norm_eps` by default
    attention_sinks: bool = False  # each head has a learned score that takes a share of its attention
    attention_gate: bool = False  # what attention returns is scaled by the sigmoid of more rows of the query projection
    kv_shared_layers: int = 0  # the last layers have no keys and values, but use those of an earlier layer, ...
    wide_shared_layers: bool = False  # ... and have an MLP of twice the width
    sliding_window_size: Optional[int] = None  # tokens that a local layer sees, including the current one
    sliding_window_indices: Optional[list[int]] = None  # 1 for each local layer; by default all are local

    # layers that are recurrent instead of attending
    recurrent_layers: Optional[list[int]] = None  # 1 for each of them; by default none
    recurrent_class_name: str = "GatedDeltaNet"  # or Mamba2, which calls keys B, queries C, and values x; or ShortConv
    conv_size: int = 4  # tokens that their convolution sees, including the current one
    conv_bias: bool = False
    recurrent_bias: bool = False  # in their linear layers
    linear_key_heads: int = 16
    linear_value_heads: int = 32
    linear_key_size: int = 128  # of a head
    linear_value_size: int = 128
    time_step_limit: Optional[list[float]] = None  # the smallest and the largest step of Mamba 2

    # positions
    learned_positions: bool = False  # an embedding of positions
    rotary_percentage: float = 1.0  # the share of a head that rotates
    rope_base: float = 10000.0
    rope_type: str = "default"
    rope_adjustments: dict[str, Any] = field(default_factory=dict)  # the numbers of `rope_type`
    rope_local_base_freq: Optional[float] = None  # another base, without adjustments, ...
    rope_indices: Optional[list[int]] = None  # ... for each layer that has a 1 here
    rope_layers: Optional[list[int]] = None  # 1 for each layer with a rope; by default all have it
    rope_interleave: bool = False  # neighbors rotate together, instead of the first half of a head with the second

    # feed-forward
    mlp_class_name: str = "LLaMAMLP"
    gelu_approximate: str = "none"  # or tanh
    activation: str = "gelu"  # of a GptNeoxMLP; or relu2, the square of ReLU; or xielu, which learns
    n_expert: int = 0
    n_expert_per_token: int = 0
    moe_intermediate_size: Optional[int] = None
    moe_layers: Optional[list[int]] = None  # 1 for each layer with experts; by default all have them
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1
    router_scores: str = "softmax"  # of the experts for a token, or sigmoid
    router_bias: bool = False  # added to the scores for the choice alone, and not trained
    n_expert_groups: int = 1  # the experts are in as many groups, ...
    n_topk_groups: int = 1  # ... and those of a token in the best of them, ...
    n_topk_scores_per_group: int = 2  # ... which are those with the highest sums of as many scores
    routed_scaling_factor: float = 1.0  # of the shares of the chosen experts
    n_shared_expert: int = 0  # experts that every token goes through, as one wide MLP beside those that it chooses
    shared_intermediate_size: Optional[int] = None  # its width, if that is not as many times the width of an expert
    shared_expert_gate: bool = False  # scales the output of the shared experts by a sigmoid, for each token
    expert_activation: str = "silu"  # of the gates of all experts, or gelu
    expert_norms: bool = False  # norms before and after the chosen experts and the shared ones, and a `ScaledRouter`
    gate_bias: bool = False  # in the layer that computes the scores
    swiglu_alpha: Optional[float] = None  # SwiGLU with a gate of gate * sigmoid(alpha * gate), times up + 1, ...
    swiglu_limit: Optional[float] = None  # ... where gate is at most this number, and up between it and its negative

    # the ends
    scale_embeddings: bool = False  # by the root of the width
    embedding_multiplier: float = 1.0
    per_layer_embedding: int = 0  # the width of what each layer gets for each token beside the stream; 0 without
    per_layer_vocab_size: int = 0  # rows of the embedding for this
    lm_head_bias: bool = False
    tie_embeddings: bool = False  # the head's weight is the embedding's
    logits_scaling: float = 1.0  # logits are divided by it
    final_logit_softcapping: Optional[float] = None

    def __post_init__(self) -> None:
        self.n_query_groups = self.n_query_groups or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        if self.latent_attention is not None:
            self.head_size = self.latent_attention["qk_nope_head_dim"] + self.latent_attention["qk_rope_head_dim"]
        self.intermediate_size = self.intermediate_size or 4 * self.n_embd
        for name in ("attn_bias", "attn_proj_bias", "mlp_bias"):
            if getattr(self, name) is None:
                setattr(self, name, self.bias)

    @classmethod
    def from_name(cls, name: str) -> "Config":
        """The config of a known model, by its name or the id of its repository. The head has its own weight, as in
        LitGPT, even if the published model ties it to the embedding. Raises `UserError` if there is no such model. The
        message suggests a similar name."""
        rows = known_models()
        found = rows.get(name) or known_repositories().get(name)
        if found is None:
            every = [*rows, *known_repositories()]
            raise UserError(f"No known model is called {name!r}.{nearest(name, every)}")
        return cls(**found)

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """The config that LitGPT's `model_config.yaml` describes. The file does not name the family. It is derived from
        the repository or the switches. Raises `UserError` if the file cannot be read, or asks for math that is not
        implemented."""
        numbers = read_yaml(Path(path))
        if not is_fields(numbers) or any(numbers.get(k) is None for k in ("n_layer", "n_embd", "n_head")):
            raise UserError(f"{path} is not a model_config.yaml of LitGPT. Expected n_layer, n_embd and n_head.")
        try:
            return from_litgpt(numbers)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        n, groups, size = self.n_head, self.n_query_groups, self.head_size
        return n * size * (1 + self.attention_gate), groups * size, groups * self.value_size

    @property
    def value_size(self) -> int:
        """Dimensions of a head of values."""
        return self.latent_attention["v_head_dim"] if self.latent_attention is not None else self.head_size

    @property
    def rope_n_elem(self) -> int:
        """How many dimensions of a head rotate."""
        if self.latent_attention is not None:
            return self.latent_attention["qk_rope_head_dim"]
        return int(self.rotary_percentage * self.head_size)

    def of_layer(self, layer: int) -> "Config":
        """The config with the sizes of this layer, where layers differ."""
        changes: dict[str, Any] = {}
        if self.global_head_size or self.global_query_groups or self.global_keys_as_values:
            size, groups = self.global_head_size or self.head_size, self.global_query_groups or self.n_query_groups
            changes = {"head_size": size, "n_query_groups": groups}
            if self.window(layer) is not None:
                changes = {"global_head_size": None, "global_query_groups": None, "global_keys_as_values": False}
        if self.kv_shared_layers:
            shared = self.kv_source(layer) != layer
            width = self.intermediate_size * (2 if shared and self.wide_shared_layers else 1)
            changes |= {"intermediate_size": width, "wide_shared_layers": False}
            changes["kv_shared_layers"] = self.n_layer if shared else 0
        return replace(self, **changes) if changes else self

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values this layer uses: itself, or the last one of its kind that has its own."""
        own = range(self.n_layer - self.kv_shared_layers)
        if layer in own:
            return layer
        kind = self.window(layer) is None
        return next((i for i in reversed(own) if (self.window(i) is None) == kind), -1)

    @property
    def projection_sizes(self) -> tuple[int, ...]:
        """`qkv_sizes` without what the layer with this config does not project; see `of_layer`."""
        return self.qkv_sizes[: 1 if self.kv_shared_layers else 2 if self.global_keys_as_values else 3]

    @property
    def gelu_gates(self) -> bool:
        """Whether MLPs, or experts, have gates with GELU."""
        return self.mlp_class_name == "GemmaMLP" or (
            self.mlp_class_name == "LLaMAMoE" and self.expert_activation == "gelu"
        )

    def window(self, layer: int) -> Optional[int]:
        """How many tokens this layer sees, including the current one; None if all."""
        return self.sliding_window_size if on(self.sliding_window_indices, layer) else None

    def rope_kind(self, layer: int) -> Optional[int]:
        """The rope of this layer: 0 for the global one, 1 for the local one, None without."""
        if self.rope_n_elem == 0 or not on(self.rope_layers, layer):
            return None
        return int(self.rope_local_base_freq is not None and on(self.rope_indices, layer))

    @property
    def shared_size(self) -> int:
        """The width of the shared experts together; 0 without."""
        one = self.moe_intermediate_size or self.intermediate_size
        return self.shared_intermediate_size or self.n_shared_expert * one

    def mlp_sizes(self, layer: int) -> list[int]:
        """The widths of the MLPs of a layer, of each expert and of the shared ones."""
        if self.mlp_class(layer) != "LLaMAMoE":
            return [self.of_layer(layer).intermediate_size]
        one = self.moe_intermediate_size or self.intermediate_size
        return [one] * self.n_expert + [self.shared_size] * bool(self.shared_size)

    def mixing(self, layer: int) -> list[tuple[str, int, int]]:
        """The linear layers of attention or what takes its place: LoRA's switch for each, inputs, outputs."""
        width, size = self.n_embd, self.n_head * self.value_size
        if not self.is_recurrent(layer):
            sizes = zip(("query", "key", "value"), self.qkv_sizes)
            return [*((name, width, n) for name, n in sizes), ("projection", size, width)]
        heads, keys = self.linear_value_heads, self.linear_key_heads * self.linear_key_size
        values = heads * self.linear_value_size
        fused = [("query", width, keys), ("key", width, keys), ("value", width, values)]
        small = [("", width, heads), ("", width, heads)]
        return [*fused, ("projection", width, values), ("projection", values, width), *small]

    def is_recurrent(self, layer: int) -> bool:
        return self.recurrent_layers is not None and bool(self.recurrent_layers[layer])

    def mlp_class(self, layer: int) -> str:
        return "LLaMAMLP" if self.n_expert and not on(self.moe_layers, layer) else self.mlp_class_name


def on(indices: Optional[list[int]], layer: int) -> bool:
    """Whether a list of 0 and 1 has a 1 for this layer; None stands for all ones."""
    return indices is None or bool(indices[layer])


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """The fields of every known model by its name, in the order of `models.yaml`."""
    text = Path(__file__).with_name("models.yaml").read_text(encoding="utf-8")
    listed = yaml.load(text, PlainSafeLoader)
    models = {}
    for family in listed:
        for row in family["models"]:
            numbers = {"model_type": family["model_type"], **family["all"], **row}
            if dense := numbers.pop("first_k_dense_replace", 0):
                numbers["moe_layers"] = [int(i >= dense) for i in range(numbers["n_layer"])]
            for key in REPEATED:
                if key in numbers:
                    numbers[key] = [numbers[key][i % len(numbers[key])] for i in range(numbers["n_layer"])]
            models[row["name"]] = numbers
    return models


def known_repositories() -> dict[str, dict[str, Any]]:
    return {row["repo_id"]: row for row in known_models().values()}


REPEATED = ("sliding_window_indices", "rope_indices", "rope_layers", "recurrent_layers")  # patterns in the table
# the sizes of latent attention: of the latents of queries (None without), of those of keys and values, of the part of a
# head that rotates, of the part that does not, and of a head of values
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
MOST_LAYERS = 10_000  # lists have one entry per layer
CHOICES = {
    "mlp_class_name": ("LLaMAMLP", "GemmaMLP", "GptNeoxMLP", "LLaMAMoE"),
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "gelu_approximate": ("none", "tanh"),
    "router_scores": ("softmax", "sigmoid"),
    "recurrent_class_name": ("GatedDeltaNet", "ShortConv", "Mamba2"),
}
LITGPT_DEFAULTS: dict[str, Any] = {  # of fields that an older model_config.yaml may lack
    "padded_vocab_size": 50688,
    "norm_class_name": "LayerNorm",
    "parallel_residual": True,
    "bias": True,
    "rotary_percentage": 0.25,
    "mlp_class_name": "GptNeoxMLP",
}
LITGPT_UNUSED = ("vocab_size", "padding_multiple", "norm_topk_prob", "rope_n_elem")  # these do not change the math
LITGPT_LLAMA3 = {  # its names of a rope's numbers: those of Hugging Face
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def from_litgpt(numbers: dict[str, Any]) -> Config:
    """A `Config` from the fields of LitGPT's. Raises `UserError` for math that is not implemented. In LitGPT two
    switches depend on the name: with `Gemma` in it an RMSNorm scales by 1 + weight, with `OLMo` in it a LayerNorm has
    no weights."""
    known = {k: v for k, v in numbers.items() if v is not None and not k.startswith(("lora_", "adapter_"))}
    numbers = LITGPT_DEFAULTS | {k: v for k, v in known.items() if k not in LITGPT_UNUSED}
    hf, rope = (numbers.pop(key, None) or {} for key in ("hf_config", "rope_adjustments"))
    if not is_fields(hf) or not is_fields(rope):
        raise UserError(f"hf_config {hf!r} and rope_adjustments {rope!r} must be objects.")
    rope = {k: checked(f"rope_adjustments.{k}", v, float) if v is not None else None for k, v in rope.items()}
    refused = ["norm_qk_type"] if numbers.get("norm_qk_type", "default") not in ("default", "olmo2") else []
    if "beta_fast" in rope or "beta_slow" in rope:
        raise UserError(
            "rope_adjustments for YaRN are not implemented, because LitGPT computes it unlike other libraries."
        )
    first_moe = checked("first_k_dense_replace", numbers.pop("first_k_dense_replace", 0), int)
    placing = numbers.pop("sliding_window_layer_placing", "all")
    condense = checked("rope_condense_ratio", numbers.pop("rope_condense_ratio", 1), float)
    if condense != 1 and (rope or numbers.get("rope_local_base_freq")):
        refused.append("rope_condense_ratio beside other ropes")
    refused += sorted(numbers.keys() - {f.name for f in fields(Config)})
    if refused:
        raise UserError(f"{', '.join(refused)} is not implemented.")
    if "low_freq_factor" in rope or "high_freq_factor" in rope:
        rope = {LITGPT_LLAMA3.get(k, k): v for k, v in rope.items()}
        if missing := [k for k in LITGPT_LLAMA3.values() if k not in rope]:
            raise UserError(f"rope_adjustments lacks {', '.join(missing)}.")
    else:
        rope = {"factor": rope["factor"]} if "factor" in rope else {"factor": condense} if condense != 1 else {}
    declared = {f.name: f.type for f in fields(Config)}
    numbers = {k: checked(k, v, declared[k]) for k, v in numbers.items()}
    if zero := [k for k in ("n_layer", "n_embd", "n_head") if numbers[k] < 1]:
        raise UserError(f"{', '.join(zero)} must be above 0.")
    for key, allowed in CHOICES.items():
        if numbers.get(key, allowed[0]) not in allowed:
            raise UserError(f"{key} {brief(numbers[key])} is not implemented. Choose from {', '.join(allowed)}.")
    if numbers["n_layer"] > MOST_LAYERS:
        raise UserError(f"n_layer {numbers['n_layer']} is above {MOST_LAYERS}.")
    numbers |= litgpt_latents(numbers) | litgpt_experts(numbers, first_moe, known.get("norm_topk_prob", False))
    if placing in ("interleaved", 2):
        numbers["sliding_window_indices"] = [int(i % 2 == 0) for i in range(numbers["n_layer"])]
    bias, repo_id = numbers["bias"], "/".join(str(hf[k]) for k in ("org", "name") if hf.get(k))
    for key in ("sliding_window_indices", "rope_indices"):
        if len(numbers.get(key, range(numbers["n_layer"]))) < numbers["n_layer"]:
            raise UserError(f"{key} must have a number for each of {numbers['n_layer']} layers.")
        if key in numbers:
            numbers[key] = numbers[key][: numbers["n_layer"]]
    name = numbers.get("name") or str(hf.get("name") or "")
    switches = {
        "norm_unit_offset": numbers["norm_class_name"] == "RMSNorm" and "Gemma" in name,
        "norm_affine": not (numbers["norm_class_name"] == "LayerNorm" and "OLMo" in name),
    }
    size = numbers.get("head_size") or numbers["n_embd"] // numbers["n_head"]
    if numbers.get("latent_attention") is None and int(numbers["rotary_percentage"] * size) % 2:
        raise UserError(
            f"rotary_percentage {numbers['rotary_percentage']} rotates an odd number of {size} dimensions per head."
        )
    known_row = known_repositories().get(repo_id)
    return Config(
        **numbers
        | switches
        | {
            "model_type": known_row["model_type"] if known_row else family_of(numbers | switches),
            "repo_id": repo_id,
            **({"block_size": max(numbers.get("block_size", 0), known_row["block_size"])} if known_row else {}),
            "rope_type": "llama3" if "low_freq_factor" in rope else "linear" if rope else "default",
            "rope_adjustments": rope,
            "attn_bias": bool(bias or numbers.get("attn_bias")),
        }
    )


def litgpt_latents(numbers: dict[str, Any]) -> dict[str, Any]:
    """The sizes of LitGPT's latent attention, checked. It ignores `head_size` and `rotary_percentage`."""
    if (latent := numbers.get("latent_attention")) is None:
        return {}
    latent = {name: checked(f"latent_attention.{name}", latent.get(name), int) for name in LATENT}
    if 0 in latent.values() or numbers.get("n_query_groups") not in (None, 0, numbers["n_head"]):
        raise UserError(f"latent_attention {brief(latent)} needs sizes above 0, and as many n_query_groups as n_head.")
    return {"latent_attention": latent, "head_size": 0, "rotary_percentage": 1.0}


def litgpt_experts(numbers: dict[str, Any], first_moe: int, norm_topk_prob: Any) -> dict[str, Any]:
    """The switches of LitGPT's experts that have other names here. With groups of experts its router has sigmoid scores
    and a bias, and `norm_topk_prob` counts; `first_moe` is its `first_k_dense_replace`."""
    found: dict[str, Any] = {}
    if first_moe:
        found["moe_layers"] = [int(i >= first_moe) for i in range(numbers["n_layer"])]
    if numbers.get("n_expert_groups", 1) > 1:
        found |= {"router_scores": "sigmoid", "router_bias": True}
        found["norm_topk_prob"] = checked("norm_topk_prob", norm_topk_prob, bool)
    return found


def to_litgpt(config: Config, name: str) -> dict[str, Any]:
    """The fields of LitGPT's `model_config.yaml`. On the name two switches depend; see `from_litgpt`. Raises
    `UserError` with the names of the fields if LitGPT cannot express some of the model's math."""
    c, numbers = config, litgpt_fields(config, name)
    lost = [] if c.rope_type in ("default", "linear", "llama3") else ["rope_type"]
    lost += ["rotary_percentage"] if c.rope_n_elem % 2 else []  # LitGPT does not rotate the odd dimension
    lost += ["norm_qk_type"] if numbers["norm_qk_type"] not in ("default", "olmo2") else []
    lost += ["latent_attention"] if c.latent_attention and c.latent_attention["q_lora_rank"] is None else []
    lost = lost or differences(c, from_litgpt(numbers))
    if lost and set(lost) <= {"norm_unit_offset", "norm_affine"}:
        raise UserError(
            f"LitGPT derives {', '.join(lost)} from the name of a model, and {name!r} does not fit this one. "
            "With 'Gemma' in the name norms scale by 1 + weight, with 'OLMo' LayerNorms have no weights."
        )
    if lost:
        raise UserError(f"LitGPT has no model with the same {', '.join(lost)}.")
    return numbers


def litgpt_fields(config: Config, name: str) -> dict[str, Any]:
    """The fields of LitGPT's config, without the math that it cannot express."""
    c = config
    same = [f.name for f in fields(Config) if f.name in LITGPT_FIELDS]
    rope = c.rope_adjustments
    if c.rope_type == "llama3":
        rope = {theirs: rope.get(ours) for theirs, ours in LITGPT_LLAMA3.items()}
    org, _, repository = c.repo_id.rpartition("/")
    if c.router_bias and c.n_expert_groups > 1:
        same += ["n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "norm_topk_prob"]
    same += [name for name in ("latent_attention", "n_shared_expert") if getattr(c, name)]
    same += ["routed_scaling_factor"] if c.routed_scaling_factor != 1 else []
    dense = [i for i in range(c.n_layer) if c.mlp_class(i) != "LLaMAMoE"] if c.n_expert else []
    return {k: getattr(c, k) for k in same} | {
        "name": name,
        "hf_config": {"org": org, "name": repository} if org else {},
        "vocab_size": c.padded_vocab_size,
        "bias": bool(c.mlp_bias),
        "attn_bias": bool(c.attn_bias),
        "rope_base": int(c.rope_base) if c.rope_base == int(c.rope_base) else c.rope_base,
        "rope_adjustments": rope or None,
        "rope_condense_ratio": 1,
        "norm_qk_type": c.norm_qk_type if c.norm_qk else "default",
        **({"first_k_dense_replace": len(dense)} if dense else {}),
    }


LITGPT_FIELDS = """
    block_size padded_vocab_size n_layer n_embd n_head n_query_groups head_size intermediate_size norm_class_name
    norm_eps norm_1 norm_2 post_attention_norm post_mlp_norm parallel_residual shared_attention_norm
    attention_scores_scalar attention_logit_softcapping norm_qk sliding_window_size sliding_window_indices
    rotary_percentage rope_local_base_freq rope_indices rope_interleave mlp_class_name gelu_approximate n_expert
    n_expert_per_token moe_intermediate_size scale_embeddings lm_head_bias final_logit_softcapping
""".split()  # with the same meaning in both


def meaning(config: Config) -> dict[str, Any]:
    """What a config says about the math of a model. It is equal for two configs that express the same math. It skips
    names, the length, and whether the head is the embedding."""
    c, layers = config, range(config.n_layer)
    mlps = [c.mlp_class(i) for i in layers]
    found: dict[str, Any] = {
        f.name: getattr(c, f.name)
        for f in fields(Config)
        if f.name not in ("model_type", "name", "repo_id", "block_size", "tie_embeddings", "bias")
    }
    found["sliding_window_size"] = [c.window(i) for i in layers]
    found["rope_layers"] = [c.rope_kind(i) for i in layers]
    found["mlp_class_name"] = mlps
    found["rotary_percentage"] = c.rope_n_elem
    found["attention_scores_scalar"] = c.attention_scores_scalar or c.head_size
    found["latent_norm_eps"] = c.latent_norm_eps or c.norm_eps
    found["moe_intermediate_size"] = c.moe_intermediate_size or c.intermediate_size
    found["shared_intermediate_size"] = c.shared_size
    unused = set() if c.query_scale else {"query_scale_length"}
    unused |= set() if c.kv_shared_layers else {"wide_shared_layers"}
    unused |= set() if c.per_layer_embedding else {"per_layer_vocab_size"}
    for name, size in (("global_head_size", c.head_size), ("global_query_groups", c.n_query_groups)):
        if None not in found["sliding_window_size"] or getattr(c, name) in (None, size):
            unused |= {name}
    unused |= {"sliding_window_indices", "rope_indices", "moe_layers", "n_shared_expert"}
    if "LLaMAMoE" not in mlps:
        unused |= {"n_expert", "n_expert_per_token", "norm_topk_prob", "moe_intermediate_size"}
        unused |= {"shared_intermediate_size", "shared_expert_gate", "router_scores", "router_bias"}
        unused |= {"routed_scaling_factor", "expert_activation", "expert_norms"}
    if "LLaMAMoE" not in mlps or c.n_topk_groups == c.n_expert_groups:
        unused |= {"n_expert_groups", "n_topk_groups", "n_topk_scores_per_group"}
    if c.latent_attention is None:
        unused |= {"latent_norm_eps"}
    if set(mlps) == {"LLaMAMoE"}:
        unused |= {"intermediate_size"}
    if "GptNeoxMLP" not in mlps:
        unused |= {"activation"}
    if not c.gelu_gates and ("GptNeoxMLP" not in mlps or c.activation != "gelu"):
        unused |= {"gelu_approximate"}
    if not c.norm_qk:
        unused |= {"norm_qk_type", "norm_qk_after_rope"}
    if c.norm_class_name != "LayerNorm":
        unused |= {"norm_affine"}
    if c.norm_class_name != "LayerNorm" or not c.norm_affine:
        unused |= {"norm_bias"}
    if c.shared_attention_norm:
        unused |= {"norm_2"}
    if 0 not in found["rope_layers"]:
        unused |= {"rope_base", "rope_type", "rope_adjustments"}
    if 1 not in found["rope_layers"]:
        unused |= {"rope_local_base_freq"}
    if not {0, 1} & set(found["rope_layers"]):
        unused |= {"rope_interleave"}
    return {k: rounded(v) for k, v in found.items() if k not in unused}


def rounded(value: Any) -> Any:
    """Numbers to twelve digits, which survive a root and a square."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


def differences(a: Config, b: Config) -> list[str]:
    ours, theirs = meaning(a), meaning(b)
    return sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))


def is_fields(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def checked(name: str, value: Any, declared: Any) -> Any:
    """The value of a field. Raises `UserError` if it is not of its type; 1e-05, text in YAML, becomes a number."""
    inner = get_args(declared)[0] if type(None) in get_args(declared) else declared
    kind = get_origin(inner) or inner
    if kind is float and type(value) in (int, str):
        with suppress(ValueError):
            value = float(value)
    of_kind = type(value) is kind and (kind is not float or is_number(value))
    of_kind = of_kind and (kind is not int or value in range(2**31))
    if not of_kind or (kind is list and not all(type(v) is int for v in value)):
        raise UserError(f"{name} {brief(value)} has the wrong type.")
    return value


def family_of(numbers: dict[str, Any]) -> str:
    """The family that has these switches, under LitGPT's names."""
    mlp, layer_norm = numbers["mlp_class_name"], numbers["norm_class_name"] == "LayerNorm"
    if mlp == "GptNeoxMLP":
        return "phi" if numbers.get("lm_head_bias") else "gpt_neox" if numbers["bias"] else "falcon"
    if numbers.get("rope_interleave"):
        return "glm4" if numbers.get("post_mlp_norm") else "ernie4_5"
    if mlp == "GemmaMLP" and (numbers["norm_unit_offset"] or numbers.get("post_mlp_norm")):
        if numbers.get("norm_qk"):
            return "gemma3_text"
        return "gemma2" if numbers.get("post_mlp_norm") else "gemma"
    if numbers.get("latent_attention"):
        return "deepseek_v3"
    if numbers.get("router_bias"):
        return "glm4_moe"
    if mlp == "LLaMAMoE":
        return "qwen3_moe" if numbers.get("norm_qk") else "mixtral"
    if layer_norm:
        return "stablelm" if numbers["norm_affine"] else "olmo"
    if numbers.get("norm_qk"):
        return "olmo2" if numbers.get("norm_qk_type") == "olmo2" else "qwen3"
    if numbers.get("sliding_window_size") is not None:
        return "phi3" if numbers.get("n_query_groups") in (None, numbers["n_head"]) else "mistral"
    return "qwen2" if numbers.get("attn_bias") else "llama"
