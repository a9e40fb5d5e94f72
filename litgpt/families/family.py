"""What a model family is: the fields of its `config.json` and the names of its weights, read in both directions.

A wrong type is an error that names the field. A null means what it means in `transformers`. `without_nulls` first
removes those that mean the same as a missing field.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Optional, Union, get_args

from litgpt.errors import UserError
from litgpt.families.table import Aliases, Rules, WeightMap, in_layers
from litgpt.model.config import MOST_LAYERS, Config
from litgpt.storage.fields import is_number

REQUIRED: Any = object()
TYPES = {f.name: f.type for f in fields(Config)}
NULLS = {  # null has a meaning of its own here; elsewhere it means the same as a missing field
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),  # none
    "num_key_value_heads",  # as many as heads
    "head_dim",  # the width divided by the number of heads
    "factor",  # of YaRN: the ratio of the lengths
    "partial_rotary_factor",  # the whole head rotates
    # false, although true is the default
    *("tie_word_embeddings", "attention_bias", "use_parallel_residual", "multi_query", "parallel_attn"),
    *("scale_attn_weights", "truncate", "rope_interleave", "norm_topk_prob"),
    "q_lora_rank",  # queries without latents
    "per_layer_config",  # layers do not differ
}
LARGEST = 2**31 - 1  # integer
MOST = {"num_hidden_layers": MOST_LAYERS, "n_layer": MOST_LAYERS}

# the names that Llama's weights have; most families begin from here
ENDS: Rules = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER: Rules = {
    "norm_1": "input_layernorm",
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "mlp.fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.proj": "mlp.down_proj",
}
QK_NORMS: Rules = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}
MTP = r"^(model\.)?mtp(_layers)?\."  # layers for multi-token prediction, which transformers does not read either


def mtp_layers(config: Config) -> str:
    """Matches `MTP` where such layers also follow the last one, under the same names."""
    return rf"{MTP}|^model\.layers\.({'|'.join(str(config.n_layer + i) for i in range(8))})\."


class Field(NamedTuple):
    """A field of `config.json` that is a field of `Config`. Its type is that of the `Config` field."""

    key: str  # its name in `config.json`
    name: str  # its name in `Config`; several, separated by spaces, if it sets all of them
    default: Any = REQUIRED  # its value where it is missing
    written: Optional[Callable[[Config], Any]] = None  # the value to write; by default that of the (first) `name`

    def read(self, fields: dict[str, Any]) -> dict[str, Any]:
        names = self.name.split()
        if self.default is not REQUIRED:
            fields = {self.key: self.default} | fields
        declared = TYPES[names[0]]
        if bool in (declared, *get_args(declared)):  # or Optional[bool]
            value: Any = flag(fields, self.key)
        elif int in (declared, *get_args(declared)):
            value = integer(fields, self.key, *(() if self.default is REQUIRED else (None,)))
        else:
            value = number(fields, self.key, None)
            value = float(value) if declared is float else value
        return dict.fromkeys(names, value)

    def write(self, config: Config) -> dict[str, Any]:
        return {self.key: self.written(config) if self.written else getattr(config, self.name.split()[0])}


class Part(NamedTuple):
    """Fields of `config.json` that no row can describe. `read` raises `UserError` for what is not implemented."""

    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: {}
    write: Callable[[Config], dict[str, Any]] = lambda config: {}


Row = Union[Part, Field, tuple[str, str], tuple[str, str, Any], tuple[str, str, Any, Callable[[Config], Any]]]


@dataclass(frozen=True)
class Family:
    """A model family, the `FAMILY` of its module. The rows are the fields of `config.json`, in the order in which they
    are written: the arguments of a `Field`, or a `Part`. Later ones override the values that earlier ones read."""

    architecture: str  # the class in `transformers`
    rows: Sequence[Row]
    switches: Mapping[str, Any] = field(default_factory=dict)  # values of `Config` that no field describes
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of missing fields that differ from the rows'
    layer: Union[Rules, Callable[[Config], Rules]] = field(default_factory=lambda: LAYER)  # a layer's weights
    ends: Rules = field(default_factory=lambda: ENDS)  # the weights outside the layers
    prefix: str = "model.layers.{}."  # of the Hugging Face names of a layer; `{}` is its index
    unused: Union[str, Callable[[Config], str]] = r"rotary_emb\.inv_freq$"  # see `WeightMap`
    kept: Union[str, Callable[[Config], str]] = MTP
    aliases: Aliases = field(default_factory=Aliases)

    @property
    def parts(self) -> list[Union[Field, Part]]:
        return [row if isinstance(row, (Field, Part)) else Field(*row) for row in self.rows]

    def read(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields, values = {**self.defaults, **fields}, dict(self.switches)
        for part in self.parts:
            values |= part.read(fields)
        return values

    def write(self, config: Config) -> dict[str, Any]:
        """The `config.json` of a model, without its `model_type`. Reading it again shows whether it means the same."""
        written: dict[str, Any] = {"architectures": [self.architecture]}
        for part in self.parts:
            written |= part.write(config)
        return written

    def weight_map(self, config: Config) -> WeightMap:
        rules = {**self.ends}
        for i, one in enumerate(map(config.of_layer, range(config.n_layer))):
            if i == 0 or one is not config:
                layer = self.layer(one) if callable(self.layer) else self.layer
            rules |= in_layers(range(i, i + 1), layer, self.prefix)
        unused, kept = (names if isinstance(names, str) else names(config) for names in (self.unused, self.kept))
        return WeightMap(rules, unused, kept, config.tie_embeddings)


class MissingField(UserError):
    def __init__(self, key: str) -> None:
        super().__init__(f"config.json lacks the field {key!r}.")
        self.key = key


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` and of the objects in it, without the nulls that mean a missing field."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if value is not None or key in NULLS
    }


def integer(fields: dict[str, Any], key: str, *default: Any) -> Any:
    """A positive integer; the default, if there is one, for a missing field or null. Raises `UserError` otherwise."""
    value = fields.get(key)
    if value is None and default:
        return default[0]
    if key not in fields:
        raise MissingField(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key} {value!r}. Expected an integer above 0.")
    if value > MOST.get(key, LARGEST):
        raise UserError(f"config.json has {key} {value}. The largest supported value is {MOST.get(key, LARGEST)}.")
    return value


def count(fields: dict[str, Any], key: str, *default: Any) -> Any:
    """As `integer`, but it may be 0."""
    value = fields.get(key)
    return (
        0 if isinstance(value, int) and not isinstance(value, bool) and value == 0 else integer(fields, key, *default)
    )


def number(fields: dict[str, Any], key: str, default: Any) -> Any:
    """A number; the default if it is missing or null. Raises `UserError` if it is something else."""
    value = fields.get(key)
    if value is None:
        return default
    if not is_number(value):
        raise UserError(f"config.json has {key} {value!r}. Expected a number.")
    return float(value) if abs(value) >= 2**63 else value


def flag(fields: dict[str, Any], key: str, default: bool = False) -> bool:
    """True or false; the default if it is missing, false if it is null. Raises `UserError` if it is something else."""
    value = fields.get(key, default) or False
    if not isinstance(value, bool):
        raise UserError(f"config.json has {key} {value!r}. Expected true or false.")
    return value


def require_value(fields: dict[str, Any], key: str, *allowed: Any) -> None:
    """Raise `UserError` if a field is there with a value that asks for math that is not implemented."""
    if key in fields and fields[key] not in allowed:
        choices = " or ".join(repr(a) for a in allowed)
        raise UserError(f"config.json has {key} {fields[key]!r}. Only {choices} is implemented.")
