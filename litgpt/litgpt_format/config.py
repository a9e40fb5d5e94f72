"""LitGPT's `Config`, with its fields, defaults and lookups. `to_model` gives the `litgpt.model.config.Config` that
everything inside litgpt uses."""

import dataclasses
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union

from torch import nn

from litgpt.errors import UserError, nearest
from litgpt.families import read_config
from litgpt.model import config as inner
from litgpt.model.mlp import MLPS
from litgpt.model.norm import RMSNorm, UnitOffsetRMSNorm
from litgpt.storage.files import read_json, read_yaml

MODEL_CONFIG = "model_config.yaml"
VOCABULARY = {  # the tokens of known models by the rows of their embedding, where the two differ
    50304: 50254,
    50432: 50254,
    50688: 50254,
    51200: 50257,
    32064: 32000,
    128256: 128000,
    151936: 151643,
    152064: 151643,
    200064: 200019,
}
OTHER_VOCABULARY = {  # ... of models whose names begin so
    "OLMo-1B-": 50280,
    "OLMo-7B-": 50280,
    "OLMo-2-": 100278,
    "CodeLlama-70b-Instruct-": 32015,
}
MULTIPLES = {  # the embedding has a multiple of as many rows; models that are not listed name their number of rows
    r"stablelm-(base|tuned)-alpha-7b|pythia-6\.9b.*": 256,
    r"stablelm-(base|tuned)-alpha-3b|pythia-12b.*|stablecode-.*|Gemma-[23]-.*": 512,
    r"pythia-.*|dolly-.*|RedPajama-.*": 128,
    r"open_llama_.*|Llama-2-.*|Gemma-.*|CodeGemma-.*|FreeWilly2|LLaMA-2-.*|(tiny|micro)-llama-.*": 64,
    r"CodeLlama-(7b|13b|70b)-(Instruct-)?hf|CodeLlama-70b-Python-hf": 16,
}
C = TypeVar("C", bound="Config")


class NoConfig(UserError, FileNotFoundError):
    """The folder does not say which model it holds."""


@dataclass
class Config:
    """Sizes and switches of a `GPT`, as in LitGPT. `litgpt.config.name_to_config` has those of the known models."""

    name: str = ""
    hf_config: dict = field(default_factory=dict)  # `org` and `name` of the repository
    block_size: int = 4096
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512  # the embedding has a multiple of as many rows, ...
    padded_vocab_size: Optional[int] = None  # ... unless this says how many
    norm_class_name: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    norm_eps: float = 1e-5
    norm_qk: bool = False
    norm_qk_type: Literal["default", "olmo2"] = "default"
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    n_head: int = 32
    head_size: Optional[int] = None  # the width divided by the number of heads
    n_query_groups: Optional[int] = None  # heads of keys and values; as many as queries
    attn_bias: bool = False  # in q, k and v even without `bias`
    attention_scores_scalar: Optional[int] = None
    sliding_window_size: Optional[int] = None
    sliding_window_indices: Optional[list[int]] = None  # 1 for each local layer; all are
    attention_logit_softcapping: Optional[float] = None
    rope_base: int = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: int = 1
    rope_adjustments: Optional[dict] = None
    rope_interleave: bool = False
    intermediate_size: Optional[int] = None  # four times the width
    moe_intermediate_size: Optional[int] = None
    bias: bool = True
    mlp_class_name: Literal["GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"] = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_shared_expert: Optional[int] = None
    n_expert_groups: Optional[int] = None
    n_topk_groups: Optional[int] = None
    n_topk_scores_per_group: Optional[int] = None
    n_expert_per_token: int = 0
    first_k_dense_replace: Optional[int] = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scale_embeddings: bool = False
    lm_head_bias: bool = False
    final_logit_softcapping: Optional[float] = None
    norm_1: bool = True
    norm_2: bool = True
    latent_attention: Optional[dict] = None
    rope_local_base_freq: Optional[float] = None
    rope_indices: Optional[list[int]] = None  # 1 for each layer with the local rope

    def __post_init__(self) -> None:
        self.name = self.name or self.hf_config.get("name", "")
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}. Set head_size.")
            self.head_size = self.n_embd // self.n_head
        self.n_query_groups = self.n_query_groups or self.n_head
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_query_groups {self.n_query_groups}.")
        if self.padded_vocab_size is None:
            self.padded_vocab_size = find_multiple(self.vocab_size, self.padding_multiple)
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.intermediate_size is None:
            if self.mlp_class_name == "LLaMAMLP":
                raise UserError(f"The config {self.name!r} needs an intermediate_size.")
            self.intermediate_size = 4 * self.n_embd
        for key, of in (("sliding_window", "sliding_window_size"), ("rope", "rope_local_base_freq")):
            if getattr(self, of) is not None:
                indices = getattr(self, f"{key}_indices")
                setattr(self, f"{key}_indices", indicators(indices, f"{key}_indices", self.n_layer))

    @classmethod
    def from_name(cls: type[C], name: str, **kwargs: Any) -> C:
        """The config of a known model, by its name or that of its repository, with or without the organization.
        Keyword arguments replace fields. Raises `UserError`, a `ValueError`, if there is no such model."""
        found = known_fields(str(name))
        if found is None:
            raise UserError(f"{name!r} is not a supported config name.{nearest(str(name), inner.known_models())}")
        return cls(**found | kwargs)

    @classmethod
    def from_file(cls: type[C], path: Union[str, Path], **kwargs: Any) -> C:
        """The config in a `model_config.yaml`. Keyword arguments replace fields."""
        if not Path(path).is_file():
            raise NoConfig(f"{path} does not exist.")
        fields = read_yaml(Path(path))
        if not isinstance(fields, dict):
            raise UserError(f"{path} is not a {MODEL_CONFIG}.")
        return cls(**fields | kwargs)

    @classmethod
    def from_checkpoint(cls: type[C], path: Path, **kwargs: Any) -> C:
        """The config of a checkpoint folder: that of its `model_config.yaml`, of its `config.json`, or of the known
        model with the folder's name. Keyword arguments replace fields."""
        folder = Path(path)
        if (folder / MODEL_CONFIG).is_file():
            return cls.from_file(folder / MODEL_CONFIG, **kwargs)
        if (folder / "config.json").is_file():
            config = read_config(read_json(folder / "config.json"), folder.name)
            return cls(**short(inner.to_litgpt(config, lit_name(config, folder.name))) | kwargs)
        if folder.name in inner.known_models():
            return cls.from_name(folder.name, **kwargs)
        raise NoConfig(f"{folder} has no {MODEL_CONFIG} and no config.json, and no known model has its name.")

    @classmethod
    def of(cls: type[C], config: inner.Config, folder: Optional[Path] = None) -> C:
        """The config of a model that was loaded from a folder, or initialized: that of the `model_config.yaml` or of
        the known model with its name, if they describe this model. Math that LitGPT does not have is left out."""
        fields = []
        with suppress(UserError):  # math that LitGPT does not have
            fields.append(known_fields(config.name))
        if folder is not None and (folder / MODEL_CONFIG).is_file():
            fields.insert(0, read_yaml(folder / MODEL_CONFIG))
        for known in fields:
            with suppress(UserError, TypeError):  # a file that does not belong to the weights
                if known and not inner.differences((made := cls(**known)).to_model(), config):
                    return made
        return cls(**short(inner.litgpt_fields(config, lit_name(config, config.name))))

    @property
    def rope_n_elem(self) -> int:
        """How many dimensions of a head rotate."""
        assert self.head_size is not None
        return int(self.rotary_percentage * self.head_size)

    @property
    def mlp_class(self) -> type[nn.Module]:
        return MLPS[self.mlp_class_name]

    @property
    def norm_class(self) -> Any:
        """Called with a size and `eps`."""
        if self.norm_class_name == "RMSNorm":
            return UnitOffsetRMSNorm if "Gemma" in self.name else RMSNorm
        return partial(nn.LayerNorm, elementwise_affine=False) if "OLMo" in self.name else nn.LayerNorm

    def to_model(self) -> inner.Config:
        """The same model for `litgpt.model.gpt.GPT`. Raises `UserError` for math that is not implemented."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
        config = inner.from_litgpt(fields)
        config.name, config.block_size = self.name, self.block_size
        return config


def lit_name(config: inner.Config, name: str) -> str:
    """The name of a model, with the word by which LitGPT knows its norms."""
    word = "Gemma" if config.norm_unit_offset else "" if config.norm_affine else "OLMo"
    return name if word in name else f"{word}-{name}"


def indicators(indices: Optional[list[int]], name: str, n_layer: int) -> list[int]:
    """A 0 or 1 for each layer, all 1 by default."""
    if indices is None:
        return [1] * n_layer
    if len(indices) < n_layer:
        raise UserError(f"{name} {indices} must have length {n_layer}, one number for each layer.")
    if set(indices) - {0, 1}:
        raise UserError(f"{name} {indices} must only contain 0 and 1.")
    return list(indices[:n_layer])


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of `k` that is at least `n`."""
    return -(-n // k) * k


def short(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of LitGPT's form without those that follow from others, so that they follow when others are replaced."""
    fields = dict(fields)
    if fields["head_size"] * fields["n_head"] == fields["n_embd"]:
        del fields["head_size"]
    if fields["n_query_groups"] == fields["n_head"]:
        del fields["n_query_groups"]
    if fields["mlp_class_name"] == "GptNeoxMLP" and fields["intermediate_size"] == 4 * fields["n_embd"]:
        del fields["intermediate_size"]
    if fields["bias"]:
        del fields["attn_bias"]
    if fields["sliding_window_size"] is None or 0 not in (fields["sliding_window_indices"] or [1]):
        del fields["sliding_window_indices"]
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    return {k: v for k, v in fields.items() if k == "vocab_size" or v != defaults[k]}


@cache
def converted(name: str) -> dict[str, Any]:
    """The fields of a known model under LitGPT's names."""
    row = inner.known_models()[name]
    fields = short(inner.to_litgpt(inner.Config(**row), name))
    rows = fields.pop("padded_vocab_size", 0)
    if fields.get("rope_adjustments", {}).keys() == {"factor"} and "rope_local_base_freq" not in fields:
        fields["rope_condense_ratio"] = fields.pop("rope_adjustments")["factor"]
    vocabulary = next(
        (n for start, n in OTHER_VOCABULARY.items() if name.startswith(start)), VOCABULARY.get(rows, rows)
    )
    multiple = next((n for pattern, n in MULTIPLES.items() if re.fullmatch(pattern, name)), None)
    padded = {"padded_vocab_size": rows} if multiple is None else {"padding_multiple": multiple}
    return fields | {"vocab_size": vocabulary} | padded


def known_fields(name: str) -> Optional[dict[str, Any]]:
    """A copy of the fields of the model with this name, or with this repository; None if there is none. Raises
    `UserError` if LitGPT cannot express it."""
    rows = inner.known_models()
    if name not in rows:
        ids = {row["repo_id"]: key for key, row in reversed(rows.items())}
        ends = {repo_id.rpartition("/")[2]: key for repo_id, key in ids.items()}
        name = ids.get(name) or ends.get(name, "")
    return {k: copied(v) for k, v in converted(name).items()} if name else None


def copied(value: Any) -> Any:
    return type(value)(value) if isinstance(value, (dict, list)) else value


def __getattr__(name: str) -> Any:
    if name not in ("configs", "name_to_config"):
        raise AttributeError(f"module 'litgpt.config' has no attribute {name!r}")
    globals()["name_to_config"] = found = {}
    for key in inner.known_models():
        with suppress(UserError):
            found[key] = known_fields(key)
    globals()["configs"] = list(globals()["name_to_config"].values())
    return globals()[name]
