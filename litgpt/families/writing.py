"""What the `config.json` of several families has in common, written from a `Config`: the way back of `common.py`.

A family writes what its `read_config` reads. What it cannot say is found by reading it again: see `write_config` in
`litgpt.families`.
"""

from typing import Any

from litgpt.model.config import Config

GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


def write_sizes(config: Config, head_dim: bool = True) -> dict[str, Any]:
    """The sizes, under the names that most families give them.

    Args:
        head_dim: Whether the family has this field.
    """
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        **({"head_dim": config.head_size} if head_dim else {}),
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_activation(config: Config) -> str:
    return "silu" if config.mlp_class_name in ("LLaMAMLP", "LLaMAMoE") else GELUS[config.gelu_approximate]


def write_rope(config: Config, partial: bool = False) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which older programs know too.

    Args:
        partial: Whether the family has `partial_rotary_factor`.
    """
    fields: dict[str, Any] = {"rope_theta": config.rope_base, "rope_scaling": write_scaling(config)}
    return fields | ({"partial_rotary_factor": config.rotary_percentage} if partial else {})


def write_scaling(config: Config) -> dict[str, Any] | None:
    return None if config.rope_type == "default" else {"rope_type": config.rope_type, **config.rope_adjustments}


def write_layer_types(config: Config) -> dict[str, Any]:
    """`layer_types` and `sliding_window`, where some layer has a window."""
    local = [config.window(i) is not None for i in range(config.n_layer)]
    if not any(local):
        return {"layer_types": ["full_attention"] * config.n_layer}
    types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    return {"sliding_window": config.sliding_window_size, "layer_types": types}


def write_late_windows(config: Config) -> dict[str, Any]:
    """The windows of Qwen."""
    fields = write_layer_types(config)
    if "sliding_window" not in fields:
        return {"use_sliding_window": False}
    return fields | {"use_sliding_window": True, "max_window_layers": fields["layer_types"].count("full_attention")}
