"""Gemma 4 without vision: keys that are also values and heads of another size in global layers, whose rope is
proportional, norms of values (https://ai.google.dev/gemma/docs/core)."""

from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import (
    as_object,
    gate,
    only,
    read_two_ropes,
    read_windows,
    sizes,
    whole_rope,
    write_layer_types,
)
from litgpt.families.family import QK_NORMS, Family, Part, count, flag, integer
from litgpt.families.gemma import NORMS
from litgpt.families.gemma2 import FOUR_NORMS
from litgpt.families.table import Aliases, Rules
from litgpt.model.config import Config

ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LAST, LOCAL = "full_attention", "sliding_attention"  # the last layer is always global
GATE = gate("hidden_activation", "gelu_pytorch_tanh")
PER_LAYER = {
    "per_layer.gate": "per_layer_input_gate",
    "per_layer.proj": "per_layer_projection",
    "per_layer.norm": "post_per_layer_input_norm",
}
OVERRIDES = {"head_dim", "num_key_value_heads"}


def read_ropes(fields: dict[str, Any]) -> dict[str, Any]:
    given = fields.get("rope_parameters") or ROPES
    types = ("default", "proportional")
    return read_two_ropes({"rope_parameters": given}, 1000000.0, 10000.0, types=types)


def write_ropes(config: Config) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    return {"rope_parameters": {LAST: whole_rope(config), LOCAL: local}}


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    n_layer = integer(fields, "num_hidden_layers")
    types = fields.get("layer_types") or [LAST if i % 6 == 5 else LOCAL for i in range(n_layer)]
    if isinstance(types, list):
        types = [*types[:-1], LAST]
    found = read_windows(fields | {"layer_types": types}, [])
    local = found.get("sliding_window_indices", [0] * n_layer)
    return found | {"rope_indices": local} | read_global(fields, local)


def read_global(fields: dict[str, Any], local: list[int]) -> dict[str, Any]:
    """The sizes of the heads in global layers; in newer files `per_layer_config` has them."""
    shared = flag(fields, "attention_k_eq_v")
    if "per_layer_config" not in fields:
        sizes = {"head_dim": integer(fields, "global_head_dim", 512)}
        if shared and (groups := integer(fields, "num_global_key_value_heads", None)):
            sizes["num_key_value_heads"] = groups
    else:
        given = as_object(fields["per_layer_config"], "per_layer_config")
        given = {str(i).lstrip("0") or "0": sizes for i, sizes in given.items()}  # transformers writes 05, 11
        layers = [as_object(given.get(str(i)), "per_layer_config") for i in range(len(local))]
        sizes = layers[-1]
        uneven = any(one != ({} if is_local else sizes) for one, is_local in zip(layers, local))
        if uneven or sizes.keys() - OVERRIDES or given.keys() - {str(i) for i in range(len(local))}:
            raise UserError(
                "config.json has a per_layer_config that is not implemented. Expected the same "
                f"{' and '.join(sorted(OVERRIDES))} for all full_attention layers, and no others."
            )
    return {
        "global_keys_as_values": shared,
        "global_head_size": integer(sizes, "head_dim", None),
        "global_query_groups": integer(sizes, "num_key_value_heads", None),
    }


def write_layers(config: Config) -> dict[str, Any]:
    last = config.of_layer(config.n_layer - 1)
    return write_layer_types(config) | {
        "attention_k_eq_v": config.global_keys_as_values,
        "global_head_dim": last.head_size,
        "num_global_key_value_heads": last.n_query_groups,
    }


def read_experts(fields: dict[str, Any]) -> dict[str, Any]:
    """The experts, which are beside an MLP that all tokens go through."""
    found = GATE.read(fields)
    if not flag(fields, "enable_moe_block"):
        return found
    return found | {
        "mlp_class_name": "LLaMAMoE",
        "expert_activation": "gelu" if found["mlp_class_name"] == "GemmaMLP" else "silu",
        "expert_norms": True,
        "norm_2": False,
        "n_expert": integer(fields, "num_experts"),
        "n_expert_per_token": integer(fields, "top_k_experts"),
        "moe_intermediate_size": integer(fields, "moe_intermediate_size"),
        "shared_intermediate_size": integer(fields, "intermediate_size"),
    }


def write_experts(config: Config) -> dict[str, Any]:
    if config.mlp_class_name != "LLaMAMoE":
        return GATE.write(config)
    return GATE.write(config) | {
        "enable_moe_block": True,
        "num_experts": config.n_expert,
        "top_k_experts": config.n_expert_per_token,
        "moe_intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "intermediate_size": config.shared_size,
    }


def read_shared(fields: dict[str, Any]) -> dict[str, Any]:
    """The last layers, which use the keys and values of an earlier one. Their MLPs may be twice as wide."""
    n_layer, n_shared = integer(fields, "num_hidden_layers"), count(fields, "num_kv_shared_layers", 0)
    wide = n_shared > 0 and flag(fields, "use_double_wide_mlp")
    local = read_layers(fields)["rope_indices"]
    if n_shared and set(local[: max(n_layer - n_shared, 0)]) != set(local):
        raise UserError(
            f"config.json has num_kv_shared_layers {n_shared}, but before these there is not one layer of each type."
        )
    if wide and flag(fields, "enable_moe_block"):
        raise UserError("config.json has use_double_wide_mlp beside enable_moe_block, which is not implemented.")
    return {"kv_shared_layers": n_shared, "wide_shared_layers": wide}


def write_shared(config: Config) -> dict[str, Any]:
    return {"num_kv_shared_layers": config.kv_shared_layers, "use_double_wide_mlp": config.wide_shared_layers}


def read_per_layer(fields: dict[str, Any]) -> dict[str, Any]:
    size = count(fields, "hidden_size_per_layer_input", 256)
    rows = integer(fields, "vocab_size_per_layer_input", 262144)
    if size and rows < integer(fields, "vocab_size"):
        raise UserError(f"config.json has vocab_size_per_layer_input {rows} below vocab_size {fields['vocab_size']}.")
    return {"per_layer_embedding": size, "per_layer_vocab_size": rows}


def write_per_layer(config: Config) -> dict[str, Any]:
    rows = {"vocab_size_per_layer_input": config.per_layer_vocab_size} if config.per_layer_embedding else {}
    return {"hidden_size_per_layer_input": config.per_layer_embedding, **rows}


def layer(config: Config) -> Rules:
    """`config` is that of one layer."""
    qkv = [f"self_attn.{name}_proj" for name, _ in zip("qkv", config.projection_sizes)]
    rules = {**FOUR_NORMS, **QK_NORMS, **PER_LAYER, "attn.qkv": qkv, "scale.layer_scalar": "layer_scalar"}
    if config.mlp_class_name == "LLaMAMoE":
        shared = {f"mlp.shared_experts.{leaf}": rules.pop(f"mlp.{leaf}") for leaf in ("fc", "proj")}
        rules |= shared | {
            "mlp.shared_norm_in": rules.pop("norm_2"),
            "mlp.shared_norm_out": "post_feedforward_layernorm_1",
            "mlp.norm_in": "pre_feedforward_layernorm_2",
            "mlp.norm_out": "post_feedforward_layernorm_2",
            "mlp.gate": "router.proj",
            "mlp.gate.scale": "router.scale",
            "mlp.gate.per_expert_scale": "router.per_expert_scale",
        }
    for expert in range(config.n_expert):
        rules[f"mlp.experts.{expert}.fc"] = f"experts.{expert}.gate_up_proj"
        rules[f"mlp.experts.{expert}.proj"] = f"experts.{expert}.down_proj"
    return rules


def unused(config: Config) -> str:
    """Matches the keys and values that files may have of layers which use those of another."""
    shared = [str(i) for i in range(config.n_layer) if config.kv_source(i) != i]
    return rf"rotary_emb\.inv_freq$|\.layers\.({'|'.join(shared)})\.self_attn\.[kv]_(proj|norm)\."


def ends(prefix: str) -> Rules:
    return {
        "transformer.wte": f"{prefix}.embed_tokens",
        "transformer.ln_f": f"{prefix}.norm",
        "lm_head": "lm_head",
        "transformer.per_layer.wte": f"{prefix}.embed_tokens_per_layer",
        "transformer.per_layer.down": f"{prefix}.per_layer_model_projection",
        "transformer.per_layer.norm": f"{prefix}.per_layer_projection_norm",
    }


UNIFIED = Family(
    "Gemma4UnifiedForCausalLM",
    [
        *sizes(kv_heads=4, head_dim=256, tied=True),
        Part(read_ropes, write_ropes),
        Part(read_layers, write_layers),
        GATE,
        *NORMS,
        only("use_bidirectional_attention", None, False, "vision"),  # of the tokens of images
        ("final_logit_softcapping", "final_logit_softcapping", None),
        Part(read_shared, write_shared),
        only("partial_rotary_factor", None),
    ],
    {
        "scale_embeddings": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "norm_qk": True,
        "norm_v": True,
        "attention_scores_scalar": 1.0,
        "layer_scalar": True,
    },
    defaults={  # of transformers
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "max_position_embeddings": 262144,
        "sliding_window": 1024,
    },
    layer=layer,
    unused=unused,
)
FAMILY = replace(
    UNIFIED,
    architecture="Gemma4ForCausalLM",
    rows=[
        *UNIFIED.rows,
        Part(read_experts, write_experts),
        Part(read_per_layer, write_per_layer),
    ],
    defaults={
        **UNIFIED.defaults,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
    },
    ends=ends("model"),
    aliases=Aliases(
        stacks={
            ".experts.gate_up_proj": (".experts.{}.gate_up_proj.weight",),
            ".experts.down_proj": (".experts.{}.down_proj.weight",),
        },
        in_files=True,
    ),
)
