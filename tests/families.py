"""Random tiny models of every family, as `transformers` makes them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rms_norm_eps": 0.03,
    "layer_norm_eps": 0.02,
}
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GPT2 = {
    "vocab_size": 199,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "layer_norm_epsilon": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FALCON = NEOX | {"ffn_hidden_size": 52, "activation": "gelu", "layer_norm_epsilon": 0.02}
FALCON.pop("intermediate_size")
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def longrope(pairs: int) -> dict[str, Any]:
    short, long = ([float(f) for f in torch.linspace(1, end, pairs)] for end in (1.5, 9.0))
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}


VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA3 = SIZES | {"num_hidden_layers": 7, "head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 20}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 12}
LOCAL = {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}
TWO_ROPES = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0}}

# model_type: {variant: fields}. The first of each family is in the quick selection.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": SIZES | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
        "llama3": SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "yarn": SIZES | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 20}},
        "yarn untruncated": SIZES | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}},
        "linear": SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        "gelu": SIZES | {"hidden_act": "gelu", "num_key_value_heads": 4, "vocab_size": 257},
        "longrope": SIZES | {"rope_parameters": longrope(4) | {"factor": 4.0, "original_max_position_embeddings": 8}},
    },
    "mistral": {
        "window": SIZES | {"sliding_window": 13, "head_dim": 20},
        "no window": SIZES | {"sliding_window": None, "tie_word_embeddings": True},
        "window of two": SIZES | {"sliding_window": 2},
        "window of 300": SIZES | {"sliding_window": 300, "max_position_embeddings": 1024},
    },
    "mixtral": {
        "window": SIZES | MOE | {"sliding_window": 15},
        "plain": SIZES | MOE | {"num_experts_per_tok": 5, "tie_word_embeddings": True, "head_dim": 12},
    },
    "gpt_neox": {
        "plain": NEOX | {"hidden_size": 80},
        "sequential": NEOX | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        "full rope": NEOX
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1}},
        "gelu_new": NEOX | {"hidden_act": "gelu_new", "vocab_size": 211},
    },
    "falcon": {
        "7b": FALCON | {"multi_query": True, "tie_word_embeddings": True},
        "40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
        "40b biases": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "180B": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1, "hidden_size": 96},
        "11b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "no groups": FALCON | {"multi_query": False, "parallel_attn": False, "bias": True},
    },
    "stablelm": {
        "plain": SIZES | {"use_qkv_bias": True},
        "each head": SIZES | {"qk_layernorm": True, "use_parallel_residual": True, "tie_word_embeddings": True},
        "no groups": SIZES | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "hidden_size": 48},
    },
    "phi": {
        "plain": SIZES | {"num_key_value_heads": 4},
        "norms": SIZES | {"qk_layernorm": True, "partial_rotary_factor": 0.25, "tie_word_embeddings": True},
        "groups": SIZES | {"hidden_act": "gelu", "vocab_size": 203, "hidden_size": 40, "partial_rotary_factor": 0.4},
    },
    "phi3": {
        "longrope": SIZES
        | {"rope_parameters": longrope(4), "original_max_position_embeddings": 40, "tie_word_embeddings": True},
        "partial": SIZES
        | {
            "hidden_size": 64,
            "rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 128,
        },
        "window": SIZES | {"sliding_window": 21, "num_key_value_heads": 4},
    },
    "gemma": {
        "plain": SIZES | {"head_dim": 12},
        "biases": SIZES | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False},
    },
    "gemma2": {
        "plain": SIZES | {"head_dim": 12, "sliding_window": 19, "query_pre_attn_scalar": 20},
        "small caps": SIZES
        | {
            "max_position_embeddings": 1024,
            "head_dim": 8,
            "sliding_window": 300,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        "no caps": SIZES
        | {
            "head_dim": 8,
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    },
    "gemma3_text": {
        "plain": GEMMA3,
        "caps": GEMMA3 | {"final_logit_softcapping": 5.0, "tie_word_embeddings": False},
        "scaled": GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    },
    "gemma3": {
        "plain": {"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4},
        "untied": {
            "text_config": GEMMA3 | {"tie_word_embeddings": False},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
        },
    },
    "qwen2": {
        "plain": SIZES,
        "windows": SIZES | LOCAL | {"tie_word_embeddings": True},
        "yarn": SIZES | {"rope_parameters": YARN},
    },
    "qwen3": {
        "windows": SIZES | LOCAL | {"head_dim": 12, "tie_word_embeddings": True},
        "biases": SIZES | {"head_dim": 8, "attention_bias": True},
    },
    "qwen3_moe": {
        "plain": SIZES | QWEN_MOE | {"norm_topk_prob": True},
        "some dense": SIZES | QWEN_MOE | {"mlp_only_layers": [1], "attention_bias": True, "tie_word_embeddings": True},
        "windows": SIZES | QWEN_MOE | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 11},
    },
    "olmo": {
        "clipped": SIZES | {"clip_qkv": 1.5, "attention_bias": True},
        "tied": SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    },
    "olmo2": {"plain": SIZES, "biases": SIZES | {"attention_bias": True, "tie_word_embeddings": True}},
    "olmo3": {
        "yarn": SIZES | {"num_hidden_layers": 5, "sliding_window": 14, "rope_parameters": TWO_ROPES},
        "plain": SIZES | {"num_hidden_layers": 4, "sliding_window": 40, "tie_word_embeddings": True},
    },
    "gpt2": {
        "plain": GPT2,
        "untied": GPT2 | {"n_inner": 50, "tie_word_embeddings": False, "activation_function": "gelu"},
        "unscaled": GPT2 | {"scale_attn_weights": False},
    },
    "smollm3": {
        "plain": SIZES | {"no_rope_layer_interval": 2},
        "windows": SIZES
        | {
            "no_rope_layers": [1, 0, 0],
            "use_sliding_window": True,
            "sliding_window": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
    "gpt_oss": {
        "plain": SIZES
        | {
            "hidden_size": 40,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 13,
            "swiglu_limit": 0.6,
            "swiglu_alpha": 1.3,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 20.0},
        },
        "no biases": SIZES
        | {
            "head_dim": 8,
            "num_local_experts": 6,
            "num_experts_per_tok": 5,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
    "granite": {
        "plain": SIZES
        | {
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "attention_bias": True,
        },
        "tied": SIZES | {"tie_word_embeddings": True, "mlp_bias": True, "attention_multiplier": 0.1},
    },
}
ALL = [(family, variant) for family, variants in FAMILIES.items() for variant in variants]
QUICK = [(family, next(iter(variants))) for family, variants in FAMILIES.items()]


def save_random(
    folder: Path,
    model_type: str,
    variant: str,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Path:
    """A random model as `transformers` writes it; every weight is drawn, so that none that starts as 0 or 1 hides.

    Args:
        changes: Fields that differ from those of the variant.
        options: For `save_pretrained`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(FAMILIES[model_type][variant] | dict(changes)))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        ones = "norm" in name or "ln_" in name
        std = 0.2 if parameter.dim() == 1 else 1.2 / parameter.shape[-1] ** 0.5
        torch.nn.init.normal_(parameter, mean=float(ones and not model_type.startswith("gemma")), std=std)
    model.save_pretrained(folder, **options)
    return folder


@contextmanager
def warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers says while a model is loaded."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
