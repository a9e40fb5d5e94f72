"""SmolLM3: Llama with layers that have no rope."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families.common import epsilon, flag, read_gate, read_rope, read_sizes, read_windows, require_value, whole
from litgpt.families.llama import name_table as name_table
from litgpt.families.writing import write_activation, write_layer_types, write_rope, write_sizes
from litgpt.model.config import Config


def read_config(fields: dict[str, Any]) -> Config:
    n_layer, every = whole(fields, "num_hidden_layers"), whole(fields, "no_rope_layer_interval", 4)
    roped = fields.get("no_rope_layers")  # 1 for layers that have rope, despite its name
    if roped is None:
        roped = [int((i + 1) % every != 0) for i in range(n_layer)]
    if not isinstance(roped, list) or len(roped) < n_layer or not all(r in (0, 1) for r in roped):
        raise UserError(f"config.json has no_rope_layers {roped!r}; a list of 0 and 1 for {n_layer} layers is wanted.")
    windows = {}
    if flag(fields, "use_sliding_window") and fields.get("sliding_window") is not None:
        windows = read_windows(fields, ["full_attention" if r else "sliding_attention" for r in roped[:n_layer]])
    else:
        require_value(fields, "layer_types", None, ["full_attention"] * n_layer)
    attention_bias = flag(fields, "attention_bias")
    return Config(
        **read_sizes(fields, kv_heads=4),
        **read_gate(fields),
        **read_rope(fields, base=2000000.0),
        **windows,
        rope_layers=[int(r) for r in roped[:n_layer]],
        norm_eps=epsilon(fields, "rms_norm_eps", 1e-6),
        attn_bias=attention_bias,
        attn_proj_bias=attention_bias,
        mlp_bias=flag(fields, "mlp_bias"),
        tie_embeddings=flag(fields, "tie_word_embeddings", True),
    )


def write_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        **write_sizes(config, head_dim=config.head_size != config.n_embd // config.n_head),
        **write_rope(config),
        **write_layer_types(config),
        "use_sliding_window": any(config.window(i) for i in range(config.n_layer)),
        "no_rope_layers": [int(config.rope_kind(i) is not None) for i in range(config.n_layer)],
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attn_bias,
        "mlp_bias": config.mlp_bias,
    }
