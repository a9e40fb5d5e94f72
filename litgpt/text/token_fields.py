"""What the JSON files of a folder say about its tokenizer: its class and its special tokens."""

from pathlib import Path
from typing import Any, Optional

from litgpt.storage.fields import SPECIAL_TOKENS
from litgpt.storage.files import is_there, read_json

KEPT_FILES = (  # families that use tokenizer.json unchanged
    "mistral mixtral stablelm phi3 olmo2 olmo3 granite ernie4_5 ernie4_5_moe glm4 glm4_moe glm4_moe_lite "
    "granitemoehybrid minimax_m2 ministral3 mistral3 nemotron"
).split()
CLASSES = {  # the tokenizer class of a family, for folders that name none
    **dict.fromkeys(("gpt2", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_5_vl", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_vl"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
}
CLASS_TOKENS: dict[str, dict[str, Optional[str]]] = {  # what a class names, for folders that do not name it
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": "<|padding|>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}


def tokenizer_class(fields: dict[str, Any], model_type: Optional[str]) -> str:
    """The class that `transformers` uses for a folder, without `Fast`; empty for the generic class."""
    if model_type in KEPT_FILES:
        return ""
    return str(fields.get("tokenizer_class") or CLASSES.get(str(model_type), "")).removesuffix("Fast")


def token_fields(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the special tokens and the added tokens that older folders keep in separate files.
    As in `transformers`, those files are read only if it lists no added tokens itself."""
    fields = optional_json(folder / "tokenizer_config.json")
    if fields.get("added_tokens_decoder") is None:
        fields = fields | optional_json(folder / "special_tokens_map.json")
        named = named_tokens(fields)
        added = optional_json(folder / "added_tokens.json")
        fields["added_tokens_decoder"] = {
            i: {"content": text, "normalized": text not in named, "special": text in named} for text, i in added.items()
        }
    return fields


def named_tokens(fields: dict[str, Any]) -> list[str]:
    """The special tokens that `tokenizer_config.json` names or lists."""
    named = [fields.get(key) for key in SPECIAL_TOKENS]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = fields.get(key) or []
        named += listed.values() if isinstance(listed, dict) else listed
    return [text for token in named if (text := token_text(token))]


def special_token(fields: dict[str, Any], kind: str, name: str) -> Optional[str]:
    """The text of a special token, such as `bos_token`: that of the files, else that of the tokenizer's class. A null
    in the files means that there is none."""
    return token_text(fields[name]) if name in fields else CLASS_TOKENS.get(kind, {}).get(name)


def token_text(token: Any) -> Optional[str]:
    """The text of a token in `tokenizer_config.json`, which may be a string or an object."""
    return token["content"] if isinstance(token, dict) else token


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}
