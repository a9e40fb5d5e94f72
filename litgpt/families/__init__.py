"""The model families: reading a `config.json`, and the names of the weights.

A family is one module with two functions: `read_config` from a parsed `config.json` to a `Config`, and `name_table`
from a `Config` to a `NameTable`. It is chosen by `model_type`, never by a model's name.
"""

import importlib
from types import ModuleType
from typing import Any

from litgpt.config import Config
from litgpt.errors import UserError, nearest
from litgpt.families.table import NameTable

FAMILIES = {"llama": "litgpt.families.llama"}  # model_type: module


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
    if "quantization_config" in fields:
        raise UserError("config.json has quantization_config: take the folder with the original weights instead.")
    try:
        config = family(model_type).read_config(fields)
    except KeyError as e:
        raise UserError(f"config.json lacks the field {e.args[0]!r}, which {model_type!r} needs.") from e
    except (TypeError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"config.json has a field of the wrong type: {e}.") from e
    assert config.n_query_groups is not None
    if config.n_head % config.n_query_groups:
        raise UserError(
            f"config.json has {config.n_head} heads for {config.n_query_groups} key-value heads: no multiple."
        )
    config.model_type = model_type
    config.name = name
    return config


def name_table(config: Config) -> NameTable:
    """The names of the weights of this config's family."""
    return family(config.model_type).name_table(config)
