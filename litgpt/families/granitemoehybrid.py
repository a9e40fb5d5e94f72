"""Granite 4 without Mamba layers and experts, such as Granite 4.0 Micro: Granite with a fused gate and up projection,
and with or without a rope. Models with Mamba layers or experts are refused."""

from typing import Any

from litgpt.errors import UserError
from litgpt.families import granite
from litgpt.families.common import only
from litgpt.families.family import LAYER, Family, Part, integer
from litgpt.model.config import Config


def read_layers(fields: dict[str, Any]) -> dict[str, Any]:
    n_layer = integer(fields, "num_hidden_layers")
    types = fields.get("layer_types", fields.get("layers_block_type", ["linear_attention"] * n_layer))
    if types not in (["full_attention"] * n_layer, ["attention"] * n_layer):
        kinds = ", ".join(sorted(set(map(str, types)))) if isinstance(types, list) else types
        raise UserError(
            f"config.json has layer_types {kinds} for {n_layer} layers. Mamba layers are not implemented. "
            "Expected full_attention for each layer."
        )
    return {} if fields.get("position_embedding_type") == "rope" else {"rope_layers": [0] * n_layer}


def write_layers(config: Config) -> dict[str, Any]:
    roped = any(config.rope_kind(i) == 0 for i in range(config.n_layer))
    return {"layer_types": ["full_attention"] * config.n_layer, "position_embedding_type": "rope" if roped else "nope"}


FAMILY = Family(
    "GraniteMoeHybridForCausalLM",
    [
        *(row for row in granite.FAMILY.rows if row[0] != "mlp_bias"),
        only("num_local_experts", 0, written=0),
        ("shared_intermediate_size", "intermediate_size", 1024),
        Part(read_layers, write_layers),
    ],
    defaults={"num_local_experts": 8},
    layer={**LAYER, "mlp.fc": "shared_mlp.input_linear", "mlp.proj": "shared_mlp.output_linear"},
)
