"""Random tiny models of every family, as `transformers` makes them."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

# `AutoModelForCausalLM` does not find them, unlike Gemma 3
CAUSAL["qwen2_5_vl"], CAUSAL["qwen3_vl"] = "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
CAUSAL["qwen3_5"], CAUSAL["qwen3_5_moe"] = "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"

CAUSAL["mistral3"] = "Mistral3ForConditionalGeneration"
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
ALPHA = {"rope_type": "dynamic", "rope_theta": 5000.0, "alpha": 30.0, "factor": 1.0}
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
GEMMA4 = SIZES | {
    "num_hidden_layers": 7,
    "head_dim": 12,
    "global_head_dim": 20,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 20,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": 0,
}
GEMMA4_MOE = GEMMA4 | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
}
GEMMA4_E = GEMMA4 | {
    "attention_k_eq_v": False,
    "layer_types": [*["sliding_attention", "full_attention"] * 2, *["sliding_attention"] * 2, "full_attention"],
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 203,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}
GEMMA4_PARTS = {  # which are not read
    "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 4, "position_embedding_size": 16},
    "audio_config": None,
}
UNIFIED_PARTS = {
    "vision_config": {"mm_embed_dim": 8, "mm_posemb_size": 4, "patch_size": 2, "output_proj_dims": 32},
    "audio_config": {"audio_embed_dim": 8},
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 12}
QWEN2_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
GRANITE4 = SIZES | {
    "layer_types": ["full_attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 52,
    "hidden_size": 64,  # twice of which is a multiple of the heads that Mamba layers would have
    "time_step_limit": [0.0, 1.0],  # its default, infinity, is no JSON
}
MAMBA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_d_conv": 3,
    "time_step_limit": [0.0, 90.0],  # above all steps, since transformers ignores it where it decodes
}
OLMOE = {"num_experts": 5, "num_experts_per_tok": 4}
LONG = {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 25, "rope_theta": 3000.0}
MINISTRAL3 = SIZES | {"head_dim": 12, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.7, "mscale": 0.8}}
LOCAL = {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}
TWO_ROPES = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 9000.0}}

ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 12,
}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "first_k_dense_replace": 0}
ERNIE_MOE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 20}

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
    "gemma4_text": {
        "plain": GEMMA4,
        "own values": GEMMA4
        | {
            "attention_k_eq_v": False,
            "global_head_dim": 8,
            "sliding_window": 11,
            "layer_types": ["full_attention", *["sliding_attention"] * 2] * 2 + ["full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 5.0,
            "hidden_activation": "gelu",
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 5e4,
                    "partial_rotary_factor": 0.6,
                    "factor": 3.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
        "experts": GEMMA4_MOE,
        "per layer": GEMMA4_E,
        "per layer keys": GEMMA4_E
        | {
            "hidden_activation": "silu",
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": False,
            "attention_bias": True,
        },
        "silu experts": GEMMA4_MOE
        | {"hidden_activation": "silu", "num_experts": 4, "top_k_experts": 3, "num_global_key_value_heads": 2},
    },
    "gemma4_unified_text": {
        "plain": GEMMA4 | {"use_bidirectional_attention": "vision"},
        "shared": GEMMA4_E,
        "no windows": GEMMA4
        | {
            "num_global_key_value_heads": None,
            "layer_types": ["full_attention"] * 7,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e3}},
        },
    },
    "gemma4": {
        "plain": {"text_config": GEMMA4, **GEMMA4_PARTS},
        "untied": {
            "text_config": GEMMA4 | {"tie_word_embeddings": False, "final_logit_softcapping": 5.0},
            "tie_word_embeddings": False,
            **GEMMA4_PARTS,
        },
        "experts": {"text_config": GEMMA4_MOE | {"moe_intermediate_size": 24}, **GEMMA4_PARTS},  # of 16 bytes each
        "per layer": {"text_config": GEMMA4_E, **GEMMA4_PARTS},
    },
    "gemma4_unified": {
        "plain": {"text_config": GEMMA4, **UNIFIED_PARTS},
        "untied": {
            "text_config": GEMMA4 | {"tie_word_embeddings": False, "final_logit_softcapping": 5.0},
            "tie_word_embeddings": False,
            **UNIFIED_PARTS,
        },
    },
    "qwen2": {
        "plain": SIZES,
        "windows": SIZES | LOCAL | {"tie_word_embeddings": True},
        "yarn": SIZES | {"rope_parameters": YARN},
    },
    "qwen2_5_vl": {
        "plain": {
            "text_config": SIZES | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]},
        },
        "tied": {
            "text_config": SIZES | LOCAL | {"rope_parameters": YARN | {"mrope_section": [1, 2, 1]}},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]},
            "tie_word_embeddings": True,
        },
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
    "qwen3_vl": {
        "plain": {
            "text_config": SIZES | {"head_dim": 12, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
        "tied": {
            "text_config": SIZES | {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN},
            "vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "tie_word_embeddings": True,
        },
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
    "seed_oss": {
        "plain": SIZES | {"head_dim": 12, "residual_dropout": 0.0, "attention_dropout": 0.0},
        "other biases": SIZES
        | {
            "head_dim": 8,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
            "residual_dropout": 0.0,
            "attention_dropout": 0.0,
        },
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
    "cohere2": {
        "windows": SIZES | {"num_hidden_layers": 5, "sliding_window": 14, "logit_scale": 0.3},
        "untied": SIZES
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 19,
            "attention_bias": True,
            "logit_scale": 0.7,
            "rope_parameters": YARN,
            "tie_word_embeddings": False,
        },
        "no windows": SIZES | {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 4},
    },
    "ernie4_5": {
        "plain": SIZES | {"head_dim": 12, "use_bias": True},
        "untied": SIZES | {"head_dim": 8, "rope_parameters": LLAMA3, "tie_word_embeddings": False},
    },
    "glm4": {
        "plain": SIZES | {"head_dim": 12},
        "no bias": SIZES
        | {
            "head_dim": 20,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.3},
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
    "apertus": {
        "plain": SIZES | {"rope_parameters": LLAMA3},
        "biases": SIZES
        | {
            "head_dim": 12,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
        },
        "relu2": SIZES | {"hidden_act": "relu2", "num_key_value_heads": 4, "rope_parameters": YARN},
    },
    "arcee": {
        "plain": SIZES | {"rope_parameters": LLAMA3},
        "biases": SIZES
        | {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
    },
    "exaone4": {
        "windows": SIZES | {"num_hidden_layers": 5, "sliding_window": 12, "rope_parameters": LLAMA3},
        "no windows": SIZES
        | {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        "no rope": SIZES | {"head_dim": 12, "layer_types": ["full_attention"] * 3},
        "pattern": SIZES
        | {
            "hidden_act": "gelu",
            "sliding_window": 40,
            "sliding_window_pattern": "LG",
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    },
    "granitemoehybrid": {
        "mamba": GRANITE4 | MAMBA | {"tie_word_embeddings": True, "residual_multiplier": 0.3},
        "rope": GRANITE4
        | {
            "position_embedding_type": "rope",
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.4,
            "tie_word_embeddings": True,
        },
        "no rope": GRANITE4 | {"attention_bias": True, "head_dim": 12, "hidden_act": "gelu", "num_key_value_heads": 4},
        "mamba biases": GRANITE4
        | MAMBA
        | {
            "mamba_n_groups": 3,
            "mamba_n_heads": 6,
            "mamba_d_head": 32,
            "mamba_expand": 3,
            "mamba_d_conv": 2,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "position_embedding_type": "rope",
        },
    },
    "hunyuan_v1_dense": {
        "plain": SIZES | {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": ALPHA},
        "biases": SIZES | {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 4},
    },
    "ministral3": {
        "plain": MINISTRAL3,
        "window": SIZES | {"head_dim": 8, "sliding_window": 30, "rope_parameters": {**LONG, "rope_type": "default"}},
    },
    "mistral3": {
        "ministral": {
            "text_config": MINISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": False},
            "vision_config": VISION,
            "tie_word_embeddings": False,
        },
        "mistral": {
            "text_config": SIZES | {"model_type": "mistral", "sliding_window": 23, "head_dim": 12},
            "vision_config": VISION,
        },
    },
    "nemotron": {
        "plain": SIZES | {"norm_eps": 0.02},
        "biases": SIZES
        | {
            "norm_eps": 0.03,
            "head_dim": 16,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    },
    "olmoe": {
        "clipped": SIZES | OLMOE | {"clip_qkv": 1.5, "norm_topk_prob": True},
        "tied": SIZES
        | OLMOE
        | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4, "rope_parameters": YARN},
    },
    "qwen2_moe": {
        "plain": SIZES | QWEN2_MOE | {"tie_word_embeddings": True},
        "some dense": SIZES
        | QWEN2_MOE
        | {
            "mlp_only_layers": [1],
            "head_dim": 12,
            "qkv_bias": False,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 36,
        },
        "windows": SIZES
        | QWEN2_MOE
        | {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 11,
            "max_window_layers": 3,
            "rope_parameters": LLAMA3,
        },
    },
    "starcoder2": {
        "plain": SIZES | {"norm_epsilon": 0.02, "num_key_value_heads": 4},
        "window": SIZES
        | {
            "norm_epsilon": 0.03,
            "use_bias": False,
            "sliding_window": 18,
            "head_dim": 12,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "rope_parameters": YARN,
        },
    },
}
FAMILIES |= {
    "deepseek_v3": {
        "yarn": SIZES
        | LATENT
        | ROUTED
        | GROUPS
        | {"attention_bias": True, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        "plain": SIZES
        | LATENT
        | ROUTED
        | {
            "n_routed_experts": 5,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_interleave": False,
            "tie_word_embeddings": True,
        },
        "of LitGPT": SIZES | LATENT | ROUTED | {"n_group": 2, "topk_group": 1, "v_head_dim": 20, "rms_norm_eps": 1e-6},
    },
    "dots1": {
        "plain": SIZES
        | ROUTED
        | {"head_dim": 12, "norm_topk_prob": True, "sliding_window": 17, "max_window_layers": 1},
        "groups": SIZES
        | ROUTED
        | GROUPS
        | {"attention_bias": True, "sliding_window": None, "tie_word_embeddings": True},
    },
    "ernie4_5_moe": {
        "plain": SIZES | ERNIE_MOE | {"moe_num_shared_experts": 3, "head_dim": 12},
        "some dense": SIZES
        | ERNIE_MOE
        | {
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 2,
            "tie_word_embeddings": False,
        },
        "to a layer": SIZES | ERNIE_MOE | {"moe_layer_end_index": 1},
    },
    "glm4_moe": {
        "plain": SIZES | ROUTED | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True},
        "groups": SIZES | ROUTED | GROUPS | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    },
    "glm4_moe_lite": {
        "plain": {k: v for k, v in (SIZES | LATENT | ROUTED).items() if k != "first_k_dense_replace"},
        "some dense": SIZES
        | LATENT
        | ROUTED
        | GROUPS
        | {"mlp_layer_types": ["sparse", "dense", "sparse"], "attention_bias": True, "tie_word_embeddings": True},
    },
    "minimax_m2": {
        "plain": SIZES | MOE | {"rotary_dim": 6, "head_dim": 12},
        "tied": SIZES | MOE | {"num_experts_per_tok": 3, "tie_word_embeddings": True, "head_dim": 20},
    },
}
QWEN3_5 = SIZES | {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
}
FAMILIES |= {
    "qwen3_5_text": {
        "plain": QWEN3_5 | {"full_attention_interval": 2},
        "tied": QWEN3_5
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "full_attention", "linear_attention", "linear_attention"],
            "linear_conv_kernel_dim": 5,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 1.0},
        },
    },
    "qwen3_5": {
        "plain": {
            "text_config": QWEN3_5
            | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4},
            "vision_config": QWEN_VISION,
            "tie_word_embeddings": False,
        },
    },
}
QWEN3_5_MOE = {k: v for k, v in QWEN3_5.items() if k != "intermediate_size"} | {
    "num_experts": 5,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
FAMILIES |= {
    "qwen3_5_moe_text": {
        "plain": QWEN3_5_MOE,
        "tied": QWEN3_5_MOE | {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 3},
    },
    "qwen3_5_moe": {
        "plain": {"text_config": QWEN3_5_MOE, "vision_config": QWEN_VISION, "tie_word_embeddings": False},
    },
}
LFM2 = SIZES | {"norm_eps": 0.03, "block_multiple_of": 12, "layer_types": ["conv", "full_attention", "conv"]}
FAMILIES |= {
    "lfm2": {
        "plain": LFM2 | {"block_ffn_dim_multiplier": 1.3, "conv_L_cache": 4, "tie_word_embeddings": False},
        "biases": LFM2
        | {
            "conv_bias": True,
            "conv_L_cache": 2,
            "block_auto_adjust_ff_dim": False,
            "layer_types": None,
            "full_attn_idxs": [2],
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
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
        ones = "norm" in name or "ln_" in name or name.endswith("scale")
        zeros = re.match("gemma($|[23])", model_type)  # which scale by 1 + weight
        std = 0.2 if parameter.dim() == 1 else 1.2 / parameter.shape[-1] ** 0.5
        torch.nn.init.normal_(parameter, mean=float(ones and not zeros), std=std)
    for name, bias in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(bias, std=0.05)
    for name, buffer in model.named_buffers():
        if name.endswith("act_fn.beta"):
            buffer.fill_(0.7)
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8 + 0.1 * int(name.split(".")[-2]))
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
