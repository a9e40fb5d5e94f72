"""Granite 4 without experts, such as Granite 4.0 Micro and H Micro: Granite with a fused gate and up projection, with
or without a rope, and with Mamba 2 in some of its layers. Models with experts are refused."""

import math
from typing import Any

from litgpt.errors import UserError
from litgpt.families import granite
from litgpt.families.common import hybrid_layers, only
from litgpt.families.family import LAYER, Family, Field, Part, integer, require_value
from litgpt.model.config import Config
from litgpt.storage.fields import is_number

OLDER = {"mamba": "linear_attention", "attention": "full_attention"}  # names of layers
INFINITY = {"__float__": "Infinity"}  # as transformers writes it
LAYERS = hybrid_layers("linear_attention", lambda fields, n_layer: ["linear_attention"] * n_layer)
MAMBA = [
    Field("mamba_d_conv", "conv_size", 4),
    Field("mamba_conv_bias", "conv_bias", True),
    Field("mamba_proj_bias", "recurrent_bias", False),
    Field("mamba_n_groups", "linear_key_heads", 1),
    Field("mamba_d_state", "linear_key_size", 256),
    Field("mamba_n_heads", "linear_value_heads", 128),
]


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    types = fields.get("layer_types", fields.get("layers_block_type"))
    if isinstance(types, list):
        types = [OLDER.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
    found = LAYERS.read(fields | {"layer_types": types})
    if found:
        require_value(fields, "hidden_act", "silu", "swish")  # which the convolutions use, too
        for row in MAMBA:
            found |= row.read(fields)
        found |= {**read_size(fields), **read_limit(fields), "recurrent_class_name": "Mamba2"}
    roped = fields.get("position_embedding_type") == "rope"
    return found | ({} if roped else {"rope_layers": [0] * integer(fields, "num_hidden_layers")})


def read_size(fields: dict[str, Any]) -> dict[str, Any]:
    """The size of a head."""
    width, heads = (
        integer(fields, "mamba_expand", 2) * integer(fields, "hidden_size"),
        integer(fields, "mamba_n_heads", 128),
    )
    size = width // heads if fields.get("mamba_d_head") == "auto" else integer(fields, "mamba_d_head", width // heads)
    if size * heads != width:
        raise UserError(f"config.json has {heads} mamba_n_heads of {size} numbers for {width} (mamba_expand).")
    return {"linear_value_size": size}


def read_limit(fields: dict[str, Any]) -> dict[str, Any]:
    limit = fields.get("time_step_limit", [0.0, INFINITY])
    limit = [math.inf if x == INFINITY else x for x in limit] if isinstance(limit, list) else [limit]
    if len(limit) != 2 or not all(is_number(x) or x == math.inf for x in limit) or not 0 <= limit[0] <= limit[1]:
        raise UserError(f"config.json has time_step_limit {fields['time_step_limit']!r}. Expected two numbers.")
    return {} if limit == [0, math.inf] else {"time_step_limit": [float(x) for x in limit]}


def write_layers(config: Config) -> dict[str, Any]:
    attends = [i for i in range(config.n_layer) if not config.is_recurrent(i)]
    roped = config.rope_layers is None or any(config.rope_kind(i) == 0 for i in attends)
    written = {**LAYERS.write(config), "position_embedding_type": "rope" if roped else "nope"}
    if len(attends) == config.n_layer:
        return written
    for row in MAMBA:
        written |= row.write(config)
    width = config.linear_value_heads * config.linear_value_size
    limit = [INFINITY if x == math.inf else x for x in config.time_step_limit or [0.0, math.inf]]
    sizes = {"mamba_d_head": config.linear_value_size, "mamba_expand": width // config.n_embd}
    return written | sizes | {"time_step_limit": limit}


FAMILY = Family(
    "GraniteMoeHybridForCausalLM",
    [
        *(row for row in granite.FAMILY.rows if row[0] != "mlp_bias"),
        only("num_local_experts", 0, written=0),
        ("shared_intermediate_size", "intermediate_size", 1024),
        Part(read_layers, write_layers),
    ],
    defaults={"num_local_experts": 8},
    layer={
        **LAYER,
        **{f"attn.{leaf}": f"mamba.{leaf}" for leaf in ("in_proj", "A_log", "D", "dt_bias", "norm")},
        "attn.conv": "mamba.conv1d",
        "attn.out": "mamba.out_proj",
        "mlp.fc": "shared_mlp.input_linear",
        "mlp.proj": "shared_mlp.output_linear",
    },
)
