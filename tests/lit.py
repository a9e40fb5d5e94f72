"""Folders in LitGPT's form, written from its documentation: names, the order of rows, the fields of its files.

None of the names of `litgpt.litgpt_format.folder` are used here, so that what is wrong there shows.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

SIZES = {
    "block_size": 512,
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 44,
    "padded_vocab_size": 199,
    "vocab_size": 199,
    "norm_class_name": "RMSNorm",
    "norm_eps": 0.03,
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "parallel_residual": False,
    "rotary_percentage": 1.0,
}
NEOX = {
    "n_query_groups": 4,
    "padded_vocab_size": 211,
    "vocab_size": 211,
    "gelu_approximate": "tanh",
    "norm_class_name": "LayerNorm",
    "norm_eps": 0.02,
    "mlp_class_name": "GptNeoxMLP",
    "bias": True,
    "parallel_residual": True,
    "rotary_percentage": 0.25,
}
FALCON = {"norm_class_name": "LayerNorm", "norm_eps": 0.02, "mlp_class_name": "GptNeoxMLP", "parallel_residual": True}
GEMMA = {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True, "name": "Gemma-tiny"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # the family and the variant of tests.families, and its fields
    "llama": ("llama", "linear", {"rope_condense_ratio": 4}),
    "gpt_neox": ("gpt_neox", "gelu_new", NEOX),
    "phi3": ("phi3", "window", {"n_query_groups": 4, "sliding_window_size": 21}),
    "falcon": ("falcon", "40b", FALCON | {"intermediate_size": 52}),
    "gemma": ("gemma", "plain", GEMMA | {"head_size": 12}),
    "mixtral": (
        "mixtral",
        "window",
        {"mlp_class_name": "LLaMAMoE", "n_expert": 5, "n_expert_per_token": 2, "sliding_window_size": 15}
        | {"rope_base": 1000000},
    ),
    "qwen2": ("qwen2", "plain", {"attn_bias": True}),
    "deepseek_v3": (
        "deepseek_v3",
        "of LitGPT",
        {"mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 3, "moe_intermediate_size": 20}
        | {"n_shared_expert": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 2, "norm_topk_prob": True}
        | {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "rope_interleave": True}
        | {"norm_eps": 1e-6, "n_query_groups": 4}
        | {
            "latent_attention": {
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 6,
                "qk_nope_head_dim": 10,
                "v_head_dim": 20,
            }
        },
    ),
}
NAMES = {  # patterns of Hugging Face's modules, and LitGPT's
    r"(model|gpt_neox|transformer)\.(embed_tokens|embed_in|word_embeddings)": "transformer.wte",
    r"(model|gpt_neox|transformer)\.(norm|final_layer_norm|ln_f)": "transformer.ln_f",
    "embed_out": "lm_head",
    r"(model\.layers|gpt_neox\.layers|transformer\.h)\.(\d+)": r"transformer.h.\2",
    r"\.(input_layernorm|ln_attn)": ".norm_1",
    r"\.(post_attention_layernorm|ln_mlp)": ".norm_2",
    r"\.(self_attn\.o_proj|attention\.dense|self_attention\.dense)\.": ".attn.proj.",
    r"\.self_attn\.(q|kv)_a_layernorm": r".attn.\1_a_norm",
    r"\.self_attn\.(q|kv)_(a|b)_proj": r".attn.\1_\2_proj",
    r"mlp\.dense_h_to_4h": "mlp.fc",
    r"mlp\.dense_4h_to_h": "mlp.proj",
    r"block_sparse_moe": "mlp",
    r"(w1|gate_proj)\.weight": "fc_1.weight",
    r"(w3|up_proj)\.weight": "fc_2.weight",
    r"(w2|down_proj)\.weight": "proj.weight",
}


def config_fields(model: str) -> dict[str, Any]:
    return SIZES | MODELS[model][2]


def by_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    """The order of `attn.attn`: for each group its queries, its key and its value."""
    groups = fields["n_query_groups"]
    return torch.cat([part for group in zip(q.chunk(groups), k.chunk(groups), v.chunk(groups)) for part in group])


def from_groups(tensor: torch.Tensor, fields: dict[str, Any]) -> list[torch.Tensor]:
    """Queries, keys and values of a tensor in the order of `attn.attn`."""
    groups, heads = fields["n_query_groups"], fields["n_head"]
    size = len(tensor) // (heads + 2 * groups)
    parts = [chunk.split([heads // groups * size, size, size]) for chunk in tensor.chunk(groups)]
    return [torch.cat(same) for same in zip(*parts)]


def lit_weights(folder: Path, fields: dict[str, Any], old: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face folder as LitGPT has them.

    Args:
        old: As it had them before `attn.qkv`.
    """
    hf = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in hf.items():
        qkv = re.search(r"\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
        whole = re.search(r"\.(\d+)\.(attention|self_attention)\.query_key_value\.(weight|bias)", name)
        if qkv or whole or "qkv_proj" in name:
            layer, leaf = re.findall(r"\.(\d+)\.", name)[0], name.rpartition(".")[2]
            if whole:
                parts = from_groups(tensor, fields)
            elif qkv:
                parts = [hf[name.replace("q_proj", x)] for x in ("q_proj", "k_proj", "v_proj")]
            else:
                size = fields["n_embd"] // fields["n_head"]
                parts = list(tensor.split([n * size for n in (fields["n_head"], *[fields["n_query_groups"]] * 2)]))
            start = f"transformer.h.{layer}.attn."
            if old:
                weights[f"{start}attn.{leaf}"] = by_group(*parts, fields)
            else:
                weights[f"{start}qkv.{leaf}"] = torch.cat(parts)
        elif "gate_up_proj" in name:
            layer = re.findall(r"\.(\d+)\.", name)[0]
            for i, part in enumerate(tensor.chunk(2)):
                weights[f"transformer.h.{layer}.mlp.fc_{i + 1}.weight"] = part.clone()
        elif not re.search(r"\.[kv]_proj\.|inv_freq", name):
            for pattern, theirs in NAMES.items():
                name = re.sub(pattern, theirs, name)
            weights[name] = tensor
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    return weights


def save_lit(folder: Path, fields: dict[str, Any], weights: dict[str, torch.Tensor], under_model: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(fields))
    torch.save({"model": weights} if under_model else weights, folder / "lit_model.pth")
    return folder
