"""What llama.cpp's architectures can express, as one table.

An architecture runs fixed math, apart from what its file can say. A model that needs other math is refused, with the
names of the fields of `Config` that differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families import family
from litgpt.families.family import Field
from litgpt.families.olmo2 import SWITCHES as OLMO2
from litgpt.model.config import Config, differences
from litgpt.model.delta_rule import EPS

SCALED = ("default", "linear", "yarn")  # ropes that the numbers in a file describe
BIASES = ("attn_bias", "attn_proj_bias", "mlp_bias", "bias")
SIZES = (  # what every file says
    *("model_type", "n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size"),
    *("padded_vocab_size", "block_size", "norm_eps", "rope_base", "rope_type", "rope_adjustments", "tie_embeddings"),
)


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Args:
        name: Its name in GGUF files.
        switches: The values of `Config` that it always has, or a function of the config that returns them.
        says: The fields of `Config` that its file or its tensors say, besides `SIZES`.
        ropes: The types of ropes that it computes as we do.
        interleaved: Whether neighbors of a head rotate together, which needs another order of the rows of q and k.
        windows: Whether its layers with a sliding window are those of `switches`. Otherwise it has no windows, and a
            context that is not longer than the window gives the same result.
        tied: Whether it uses the embedding where there is no head.
        multiplies: Whether logits are multiplied by the scale in the file, instead of divided.
        splits: For modules that are several there, their names in `transformers` models that have several.
    """

    name: str
    switches: Any = field(default_factory=dict)
    says: tuple[str, ...] = ()
    ropes: tuple[str, ...] = SCALED
    interleaved: bool = False
    windows: bool = False
    tied: bool = True
    multiplies: bool = False
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def understood(self, config: Config) -> Config:
        """The model that this architecture computes from a file with what it can say about `config`."""
        switches = self.switches(config) if callable(self.switches) else self.switches
        said = {name: getattr(config, name) for name in (*SIZES, *self.says)}
        if self.windows:
            said |= {"sliding_window_size": config.sliding_window_size}
        return Config(**{**said, "rotary_percentage": config.rotary_percentage, **switches})


def every(period: int, first: int, n_layer: int) -> list[int]:
    """1 for all layers but those at `first`, `first + period`, ..."""
    return [int(i % period != first) for i in range(n_layer)]


def gemma(config: Config, **more: Any) -> dict[str, Any]:
    return {
        "norm_unit_offset": True,
        "scale_embeddings": True,
        "mlp_class_name": "GemmaMLP",
        "gelu_approximate": "tanh",
        **more,
    }


def gemma2(config: Config, largest: int = 46, **more: Any) -> dict[str, Any]:
    """The largest of Gemma 2 and 3, which llama.cpp tells by its number of layers, scale scores in their own way."""
    scalar = config.n_embd / config.n_head if config.n_layer == largest else None
    four_norms = {"post_attention_norm": True, "post_mlp_norm": True, "attention_scores_scalar": scalar}
    return gemma(config, **four_norms, sliding_window_indices=every(2, 1, config.n_layer)) | more


def gemma3(config: Config) -> dict[str, Any]:
    local = every(6, 5, config.n_layer)
    return gemma2(config, 62, norm_qk=True, sliding_window_indices=local, rope_indices=local)


def square(config: Config) -> dict[str, Any]:
    """All heads are as wide as the model."""
    return {"head_size": config.n_embd // config.n_head}


LLAMA = Architecture("llama", says=BIASES, ropes=(*SCALED, "llama3"), interleaved=True)
NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"}
RELU2 = {"mlp_class_name": "GptNeoxMLP", "activation": "relu2"}
GELU = "gelu_approximate"  # llama.cpp has one kernel for both, of 16 bits


def olmo3(config: Config) -> dict[str, Any]:
    local = every(4, 3, config.n_layer)
    return {**OLMO2, "sliding_window_indices": local, "rope_indices": local, "rope_local_base_freq": config.rope_base}


def cohere2(config: Config) -> dict[str, Any]:
    local = every(4, 3, config.n_layer)
    block = {"parallel_residual": True, "shared_attention_norm": True, "rope_interleave": True}
    norm = {"norm_class_name": "LayerNorm", "norm_bias": False}
    return {**block, **norm, "sliding_window_indices": local, "rope_layers": local}


def exaone4(config: Config) -> dict[str, Any]:
    """With 64 layers three of four have a window and the rope, else all have the rope and none a window."""
    if config.n_layer == 64:
        local = every(4, 3, config.n_layer)
        windows = {"sliding_window_indices": local, "rope_layers": local}
    else:
        windows = {"sliding_window_size": None}  # type: ignore[dict-item]
    return {**OLMO2, "norm_qk_type": "default", **windows}


def olmoe(config: Config) -> dict[str, Any]:
    norms = {"norm_qk": True, "norm_qk_type": "olmo2", "n_query_groups": config.n_head}
    return {**norms, "mlp_class_name": "LLaMAMoE", "norm_topk_prob": False}


def qwen3_5(config: Config) -> dict[str, Any]:
    """With a layer of attention after each period of recurrent ones. States are square, and the lengths of queries and
    keys have the epsilon of the norms."""
    last = attention_interval(config) - 1
    switches = {"norm_qk": True, "norm_unit_offset": True, "attention_gate": True, "attn_proj_bias": False}
    recurrent = {"recurrent_layers": every(last + 1, last, config.n_layer), "linear_value_size": config.linear_key_size}
    return {**switches, **recurrent, "norm_eps": EPS}


def attention_interval(config: Config) -> int:
    """The number of layers up to the first with attention, which is not the first."""
    return next((i for i in range(1, config.n_layer) if not config.is_recurrent(i)), config.n_layer - 1) + 1


STATES = ("conv_size", "linear_key_heads", "linear_value_heads", "linear_key_size")
EXPERTS = ("n_expert", "n_expert_per_token", "moe_intermediate_size")
ROUTED = (*EXPERTS, "n_shared_expert", "norm_topk_prob", "routed_scaling_factor", "n_expert_groups", "n_topk_groups")


def dense_first(config: Config) -> int:
    """The number of layers before the first one with experts."""
    return next((i for i in range(config.n_layer) if config.mlp_class(i) == "LLaMAMoE"), config.n_layer)


def router(config: Config, **more: Any) -> dict[str, Any]:
    layers = [int(i >= dense_first(config)) for i in range(config.n_layer)]
    return {"mlp_class_name": "LLaMAMoE", "router_bias": True, "moe_layers": layers, **more}


def sigmoid_router(config: Config, **more: Any) -> dict[str, Any]:
    return router(config, router_scores="sigmoid", **more)


PHI3 = Architecture("phi3", ropes=("default", "longrope"))
QWEN2 = Architecture("qwen2", {"attn_bias": True, "attn_proj_bias": False})
QWEN3 = Architecture("qwen3", {"norm_qk": True})
GEMMA3 = Architecture("gemma3", gemma3, ("rope_local_base_freq",), ("default", "linear"), windows=True)

GRANITE = replace(
    LLAMA,
    name="granite",
    says=(
        *BIASES,
        "attention_scores_scalar",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
    ),
)
QWEN3_5 = Architecture("qwen35", qwen3_5, STATES)
QWEN3_5_MOE = Architecture(
    "qwen35moe",
    lambda c: {**qwen3_5(c), "mlp_class_name": "LLaMAMoE"},
    (*STATES, *EXPERTS, "n_shared_expert", "shared_intermediate_size", "shared_expert_gate"),
)
MISTRAL3 = replace(LLAMA, name="mistral3", says=(*BIASES, "query_scale", "query_scale_length"))

ARCHITECTURES: Mapping[str, Architecture] = {  # by our families
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(LLAMA, switches={"mlp_class_name": "LLaMAMoE"}, says=EXPERTS),
    "gpt_neox": Architecture("gptneox", {**NEOX, "bias": True}, (GELU, "parallel_residual"), tied=False),
    "falcon": Architecture(
        "falcon", {**NEOX, "parallel_residual": True}, (GELU, "shared_attention_norm"), ropes=("default",)
    ),
    "stablelm": Architecture(
        "stablelm",
        {"norm_class_name": "LayerNorm", "norm_qk_type": "each_head"},
        ("attn_bias", "norm_qk", "parallel_residual", "shared_attention_norm"),
        tied=False,
    ),
    "phi": Architecture(
        "phi2",
        {
            **NEOX,
            "parallel_residual": True,
            "shared_attention_norm": True,
            "bias": True,
            "lm_head_bias": True,
        },
        (GELU,),
        tied=False,
    ),
    "phi3": PHI3,
    "gemma": Architecture("gemma", gemma),
    "gemma2": Architecture(
        "gemma2", gemma2, ("attention_logit_softcapping", "final_logit_softcapping"), ("default",), windows=True
    ),
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3,
    "qwen2": QWEN2,
    "qwen2_5_vl": QWEN2,  # the text part by itself
    "qwen3": QWEN3,
    "qwen3_vl": QWEN3,
    "qwen3_moe": Architecture(
        "qwen3moe", {"norm_qk": True, "mlp_class_name": "LLaMAMoE", "norm_topk_prob": True}, EXPERTS
    ),
    "qwen3_5": QWEN3_5,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "olmo": Architecture(
        "olmo", {"norm_class_name": "LayerNorm", "norm_affine": False}, ("clip_qkv",), interleaved=True
    ),
    "olmo2": Architecture("olmo2", OLMO2, tied=False),
    "olmo3": Architecture("olmo2", olmo3, windows=True, tied=False),
    "dots1": Architecture(
        "dots1", lambda c: sigmoid_router(c, norm_qk=True, n_query_groups=c.n_head), ROUTED, tied=False
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe", lambda c: router(c, rope_interleave=True), (*EXPERTS, "n_shared_expert")
    ),
    "glm4_moe": Architecture(
        "glm4moe", lambda c: sigmoid_router(c, attn_bias=True, attn_proj_bias=False), (*ROUTED, "norm_qk")
    ),
    "minimax_m2": Architecture(
        "minimax-m2", lambda c: sigmoid_router(c, norm_qk=True, norm_qk_type="olmo2"), EXPERTS, tied=False
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            **NEOX,
            "learned_positions": True,
            "rotary_percentage": 0.0,
            "bias": True,
        },
        (GELU,),
    ),
    "smollm3": Architecture("smollm3", lambda c: {"rope_layers": every(4, 3, c.n_layer)}, interleaved=True),
    "cohere2": Architecture("cohere2", cohere2, ("logits_scaling",), windows=True, multiplies=True),
    "ernie4_5": Architecture("ernie4_5", {"rope_interleave": True}),
    "glm4": Architecture(
        "glm4", {"rope_interleave": True, "post_attention_norm": True, "post_mlp_norm": True}, ("attn_bias",)
    ),
    "seed_oss": Architecture("seed_oss", says=("attn_bias",)),
    "granite": GRANITE,
    "apertus": Architecture(
        "apertus",
        {"mlp_class_name": "GptNeoxMLP", "activation": "xielu", "norm_qk": True},
        BIASES,
        ropes=(*SCALED, "llama3"),
        tied=False,
    ),
    "arcee": Architecture("arcee", RELU2, ropes=(*SCALED, "llama3"), interleaved=True),
    "exaone4": Architecture("exaone4", exaone4, ropes=(*SCALED, "llama3"), windows=True),
    "granitemoehybrid": replace(
        GRANITE,
        splits={
            "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
            "shared_mlp.output_linear": ("mlp.down_proj",),
        },
    ),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", {"norm_qk": True, "norm_qk_after_rope": True}, ("attn_bias",)),
    "lfm2": Architecture(
        "lfm2", {"norm_qk": True, "recurrent_class_name": "ShortConv"}, ("recurrent_layers", "conv_size")
    ),
    "ministral3": MISTRAL3,
    "mistral3": MISTRAL3,
    "nemotron": Architecture(
        "nemotron",
        lambda c: {**RELU2, "norm_class_name": "LayerNorm", "norm_unit_offset": True, **square(c)},
        BIASES,
        tied=False,
    ),
    "olmoe": Architecture("olmoe", olmoe, EXPERTS, tied=False),
    "qwen2_moe": Architecture(
        "qwen2moe",
        {"attn_bias": True, "attn_proj_bias": False, "mlp_class_name": "LLaMAMoE", "norm_topk_prob": False},
        (*EXPERTS, "n_shared_expert", "shared_intermediate_size", "shared_expert_gate"),
        tied=False,
    ),
    "starcoder2": Architecture("starcoder2", lambda c: {**NEOX, **square(c)}, (*BIASES, GELU)),
}


def architecture(config: Config) -> Architecture:
    """llama.cpp's architecture for a model. Raises `UserError` with the names of the fields that it cannot express."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"Models of the family {config.model_type!r} cannot be exported to GGUF. Supported: {known}.")
    lost = differences(without_windows(config, found), found.understood(config))
    lost = next(
        ([name] for name in ("recurrent_layers", "head_size", "rope_layers") if name in lost), lost
    )  # on which others depend
    if config.rope_n_elem % 2:
        lost.append("rotary_percentage")
    if config.rope_n_elem and config.rope_type not in found.ropes:
        lost.append(f"rope_scaling of type {config.rope_type!r}")
    if not config.rope_adjustments.get("truncate", True):
        lost.append("truncate")
    if lost:
        names = ", ".join(dict.fromkeys(hf_name(config, name) for name in sorted(lost)))
        raise UserError(
            f"GGUF's architecture {found.name!r} cannot express this model: {names}. "
            "Use the model in Hugging Face's format instead."
        )
    return found


ROPE_LAYERS = {"smollm3": "no_rope_layers", "granitemoehybrid": "position_embedding_type"}  # fields of config.json


def hf_name(config: Config, name: str) -> str:
    """The field of `config.json` for a field of `Config`, where one sets it."""
    rows = [row for row in family(config.model_type).parts if isinstance(row, Field)]
    keys = {ours: row.key for row in rows for ours in row.name.split()}
    return keys.get(name) or {
        "attention_scores_scalar": "scale_attn_weights" if config.model_type == "gpt2" else "query_pre_attn_scalar",
        "gelu_approximate": "hidden_act",
        "head_size": "head_dim",
        "mlp_class_name": "the layers with experts" if config.n_expert else "hidden_act",
        "recurrent_layers": "layer_types",
        "rope_layers": ROPE_LAYERS.get(config.model_type, "layer_types"),
        "sliding_window_size": "layer_types",
    }.get(name, name)


def without_windows(config: Config, found: Architecture) -> Config:
    """The same model for a context within its window, if the architecture has no windows."""
    if found.windows or context_length(config, found) < 1:
        return config
    return replace(config, sliding_window_size=None, sliding_window_indices=None)


def context_length(config: Config, found: Architecture) -> int:
    """The length of a context for which the architecture computes this model."""
    own = config.sliding_window_size if any(config.window(i) for i in range(config.n_layer)) else None
    return config.block_size if found.windows or own is None else min(config.block_size, own)
