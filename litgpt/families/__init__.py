"""The model families: reading a `config.json`, and the names of the weights.

A family is the `FAMILY` of one module, chosen by `model_type`, never by a model's name.
"""

import importlib
from typing import Any, Optional

from litgpt.errors import UserError, nearest
from litgpt.families.family import Family, MissingField, without_nulls
from litgpt.families.mxfp4 import is_mxfp4
from litgpt.families.table import Aliases, WeightMap
from litgpt.model.config import Config, differences
from litgpt.model.rope import make_ropes

FAMILIES = (  # the names of the modules, each of which is a model_type
    "llama mistral mixtral gpt_neox falcon stablelm phi phi3 gemma gemma2 gemma3_text gemma3 qwen2 qwen3 qwen3_moe "
    "olmo olmo2 olmo3 gpt2 smollm3 granite apertus arcee cohere2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 glm4 "
    "glm4_moe glm4_moe_lite gpt_oss granitemoehybrid hunyuan_v1_dense lfm2 minimax_m2 ministral3 mistral3 nemotron "
    "olmoe qwen2_5_vl qwen2_moe qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_vl seed_oss starcoder2 "
    "gemma4 gemma4_text gemma4_unified gemma4_unified_text"
).split()
MAX_WIDTH, MAX_EXPERTS = 2**24, 2**16  # numbers in a row of a weight; experts of all layers
POSITIVE = ("attention_scores_scalar", "attention_logit_softcapping", "final_logit_softcapping")
MAPS: dict[str, WeightMap] = {}  # the last ones, by their configs


def family(model_type: str) -> Family:
    return importlib.import_module(f"litgpt.families.{model_type}").FAMILY


def read_config(fields: dict[str, Any], name: str = "") -> Config:
    """The `Config` that a parsed `config.json` describes. Raises `UserError` if the family is unknown, a field is
    missing, or one asks for math that is not implemented."""
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type {model_type!r}, which is not supported.{nearest(str(model_type), FAMILIES)} "
            f"Supported: {', '.join(FAMILIES)}."
        )
    fields = without_nulls(fields)
    if "quantization_config" in fields and not is_mxfp4(fields):
        raise UserError("config.json has quantization_config. Use the folder with the original weights instead.")
    try:
        config = Config(**family(model_type).read(fields) | {"model_type": model_type, "name": name})
    except MissingField as e:
        raise UserError(f"config.json lacks the field {e.key!r}, which {model_type!r} needs.") from e
    except ArithmeticError as e:
        raise UserError(f"config.json has a number that is too small or too large: {e}.") from e
    check(config)
    if (last := config.of_layer(config.n_layer - 1)) is not config:
        check(last)
    return config


def write_config(config: Config) -> dict[str, Any]:
    """The `config.json` of a `Config`, for its family or, if that cannot express it, for another. It is read again and
    compared, so that what is written means the same model. Raises `UserError` if no family can express the math of this
    model; the fields are named."""
    lost: dict[str, list[str]] = {}
    for model_type in dict.fromkeys((config.model_type, *FAMILIES)):
        written = {"model_type": model_type, **family(model_type).write(config)}
        try:
            lost[model_type] = differences(config, read_config(written))
        except UserError as e:
            lost[model_type] = [str(e)]
        if not lost[model_type]:
            return written
    what = ", ".join(lost[config.model_type])
    raise UserError(f"No config.json of {config.model_type} or another family can express this model: {what}.")


def check(config: Config) -> None:
    """Raise `UserError` if the sizes do not fit together."""
    widths: tuple[Optional[int], ...] = (
        config.n_embd,
        sum(config.qkv_sizes),
        config.intermediate_size,
        config.moe_intermediate_size,
    )
    wrong = ""
    n_expert, rotating, latent = config.n_expert, config.rope_n_elem, config.latent_attention or {}
    widths += tuple(latent.values())
    if config.recurrent_layers and config.recurrent_class_name != "ShortConv":
        keys, heads = config.linear_key_heads, config.linear_value_heads
        widths += (keys * config.linear_key_size, heads * config.linear_value_size)
        wrong = f"has {heads} recurrent heads, which is not a multiple of {keys} heads of keys" if heads % keys else ""
    if max(config.padded_vocab_size, *(width or 0 for width in widths)) > MAX_WIDTH:
        wrong = f"describes a model with rows of more than {MAX_WIDTH} numbers"
    elif config.n_layer * n_expert > MAX_EXPERTS:
        wrong = f"describes a model with more than {MAX_EXPERTS} experts"
    elif config.head_size < 1:
        wrong = f"has {config.n_head} heads for rows of {config.n_embd} numbers"
    elif names := [name for name in POSITIVE if (value := getattr(config, name)) is not None and value <= 0]:
        wrong = f"has a number for {', '.join(names)} that is not above 0"
    elif config.logits_scaling == 0:
        wrong = "has logits_scaling 0, which divides the logits"
    elif config.n_head % config.n_query_groups:
        wrong = f"has {config.n_head} heads, which is not a multiple of {config.n_query_groups} key-value heads"
    elif latent and config.n_head != config.n_query_groups:
        wrong = f"has latent attention with {config.n_query_groups} key-value heads for {config.n_head} heads"
    elif rotating + rotating % 2 > (rotating if latent else config.head_size):
        size = rotating if latent else config.head_size
        wrong = f"has heads of {size} dimensions. All of them rotate, so it must be even"
    elif config.n_expert_per_token > n_expert:
        wrong = f"has {config.n_expert_per_token} experts per token, but only {n_expert} experts"
    elif config.n_topk_groups < config.n_expert_groups:
        size, odd = divmod(n_expert, config.n_expert_groups)
        few = config.n_topk_groups * size < config.n_expert_per_token or size < config.n_topk_scores_per_group
        wrong = f"has {config.n_expert_groups} groups for {n_expert} experts" if odd or few else ""
    elif config.n_topk_groups > config.n_expert_groups:
        wrong = f"has {config.n_topk_groups} groups per token, but only {config.n_expert_groups} groups"
    for name in ("short_factor", "long_factor"):
        factors, pairs = config.rope_adjustments.get(name), (rotating + 1) // 2
        if not wrong and factors is not None and len(factors) != pairs:
            wrong = f"has {len(factors)} numbers in {name} for {pairs} pairs of dimensions"
    if wrong:
        raise UserError(f"config.json {wrong}.")
    try:
        finite = all(bool(rope.inverse.isfinite().all()) for rope in make_ropes(config))
    except (ArithmeticError, TypeError, ValueError):
        finite = False
    if not finite:
        raise UserError("config.json has rope_theta or other numbers of its rope that do not give finite angles.")


def weight_map(config: Config) -> WeightMap:
    """Which Hugging Face tensors hold the weights of a model; built once for each model."""
    key = repr(config)
    if key not in MAPS:
        while len(MAPS) >= 4:
            MAPS.pop(next(iter(MAPS)), None)
        MAPS[key] = family(config.model_type).weight_map(config)
    return MAPS[key]


def aliases(model_type: Any) -> Aliases:
    """The names that a family's weights have elsewhere; none for an unknown family."""
    return family(model_type).aliases if model_type in FAMILIES else Aliases()
