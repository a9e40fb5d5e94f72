"""The model families: reading a `config.json`, and the names of the weights.

A family is one module with three functions: `read_config` from a parsed `config.json` to a `Config`, `write_config` for
the way back, and `name_table` from a `Config` to a `NameTable`. It may have `ALIASES`, the names that its weights have
elsewhere. It is chosen by `model_type`, never by a model's name.
"""

import importlib
from types import ModuleType
from typing import Any

from litgpt.errors import UserError, nearest
from litgpt.families.common import MissingField, without_nulls
from litgpt.families.table import Aliases, NameTable
from litgpt.model.config import Config, differences
from litgpt.model.rope import make_ropes

FAMILIES = {  # model_type: module
    name: f"litgpt.families.{name}"
    for name in (
        "llama mistral mixtral gpt_neox falcon stablelm phi phi3 gemma gemma2 gemma3_text gemma3 qwen2 qwen3 qwen3_moe "
        "olmo olmo2 olmo3 gpt2 smollm3 granite"
    ).split()
}


WIDEST, MANY = 2**24, 2**16  # numbers in a row of a weight; experts of all layers


def family(model_type: str) -> ModuleType:
    return importlib.import_module(FAMILIES[model_type])


def read_config(fields: dict[str, Any], name: str = "") -> Config:
    """The `Config` that a parsed `config.json` describes.

    Raises:
        UserError: no such family, a field is missing, or one asks for math that is not implemented.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type {model_type!r}, which is not supported.{nearest(str(model_type), FAMILIES)} "
            f"Supported: {', '.join(FAMILIES)}."
        )
    fields = without_nulls(fields)
    if "quantization_config" in fields:
        raise UserError("config.json has quantization_config: take the folder with the original weights instead.")
    try:
        config = family(model_type).read_config(fields)
    except MissingField as e:
        raise UserError(f"config.json lacks the field {e.key!r}, which {model_type!r} needs.") from e
    except ArithmeticError as e:
        raise UserError(f"config.json has a number that is too small or too large: {e}.") from e
    config.model_type = model_type
    config.name = name
    check(config)
    return config


def write_config(config: Config) -> dict[str, Any]:
    """The `config.json` of a `Config`, in the words of its family or, where these cannot say it, of another.

    It is read again and compared, so that what is written means the same model.

    Raises:
        UserError: no family has a model with this math; the fields that are in the way are named.
    """
    lost: dict[str, list[str]] = {}
    for model_type in dict.fromkeys((config.model_type, *FAMILIES)):
        written = {"model_type": model_type, **family(model_type).write_config(config)}
        try:
            lost[model_type] = differences(config, read_config(written))
        except UserError as e:
            lost[model_type] = [str(e)]
        if not lost[model_type]:
            return written
    what = ", ".join(lost[config.model_type])
    raise UserError(f"No config.json of {config.model_type} or another family can say this: {what}.")


def check(config: Config) -> None:
    """Raise `UserError` if the sizes do not go together."""
    assert config.n_query_groups is not None and config.head_size is not None
    sizes = (config.n_embd, sum(config.qkv_sizes), config.intermediate_size, config.moe_intermediate_size)
    if (
        max(*(size or 0 for size in sizes), config.padded_vocab_size) > WIDEST
        or config.n_layer * config.n_expert > MANY
    ):
        raise UserError(f"config.json describes a model with rows of more than {WIDEST} numbers or {MANY} experts.")
    if config.head_size < 1:
        raise UserError(f"config.json has {config.n_head} heads for rows of {config.n_embd} numbers.")
    positive = ("attention_scores_scalar", "attention_logit_softcapping", "final_logit_softcapping")
    if wrong := [name for name in positive if (value := getattr(config, name)) is not None and value <= 0]:
        raise UserError(f"config.json has a number for {', '.join(wrong)} that is not above 0.")
    if config.n_head % config.n_query_groups:
        raise UserError(
            f"config.json has {config.n_head} heads for {config.n_query_groups} key-value heads: no multiple."
        )
    rotating = config.rope_n_elem
    if rotating + rotating % 2 > config.head_size:
        raise UserError(f"config.json has heads of {config.head_size} dimensions: all rotate, so it must be even.")
    for name in ("short_factor", "long_factor"):
        factors, pairs = config.rope_adjustments.get(name), (rotating + 1) // 2
        if factors is not None and len(factors) != pairs:
            raise UserError(f"config.json has {name} of {len(factors)} numbers for {pairs} pairs of dimensions.")
    if config.n_expert_per_token > config.n_expert:
        raise UserError(f"config.json has {config.n_expert_per_token} experts per token of {config.n_expert} experts.")
    try:
        finite = all(bool(rope.inverse.isfinite().all()) for rope in make_ropes(config))
    except (ArithmeticError, TypeError, ValueError):
        finite = False
    if not finite:
        raise UserError("config.json has rope_theta or other numbers of its rope that do not give finite angles.")


def name_table(config: Config) -> NameTable:
    """The names of the weights of this config's family."""
    return family(config.model_type).name_table(config)


def aliases(model_type: Any) -> Aliases:
    """The names that the weights of this family have elsewhere; none for a family that is not known."""
    known = isinstance(model_type, str) and model_type in FAMILIES
    return getattr(family(model_type), "ALIASES", Aliases()) if known else Aliases()
