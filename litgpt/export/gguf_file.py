"""Writing a GGUF file: what it says about the model, and its tensors one after the other."""

import math
from pathlib import Path
from typing import Any

from litgpt.errors import require
from litgpt.export.architectures import Architecture, attention_interval, context_length, dense_first
from litgpt.export.gguf_tensors import TYPES, Tensor, contents, n_bytes
from litgpt.export.gguf_tokenizer import Vocabulary
from litgpt.families import weight_map
from litgpt.families.weights import Weights
from litgpt.model.config import Config
from litgpt.model.rope import make_ropes

FILE_TYPES = {  # llama.cpp's numbers
    "f32": "ALL_F32",
    **{name: f"MOSTLY_{name.upper()}" for name in TYPES if name != "f32"},
}
LENGTH = "original_max_position_embeddings"


def write_gguf(
    path: Path,
    weights: Weights,
    tensors: list[Tensor],
    vocabulary: Vocabulary,
    found: Architecture,
    named: str,
    name: str,
) -> None:
    """Write a GGUF file. One tensor is in memory at a time.

    Args:
        tensors: As `gguf_tensors` returns them.
        named: The type of most weights, a key of `TYPES`.
        name: That of the model.
    """
    gguf = require("gguf", "export")
    writer = gguf.GGUFWriter(path, found.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[named]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_model(writer, weights.config, found)
    for leaf in ("alpha_p", "alpha_n", "beta", "eps") if weights.config.activation == "xielu" else ():
        layers = (f"transformer.h.{i}.mlp.act.{leaf}" for i in range(weights.config.n_layer))
        numbers = [float(weights.tensor(weight_map(weights.config).stored(name)[0].module)) for name in layers]
        getattr(writer, f"add_xielu_{leaf}")(numbers)
    vocabulary.add_to(writer)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, None, n_bytes(tensor.shape, tensor.kind), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            start = file.tell()
            for part in contents(tensor, weights, found):
                file.write(part)
            assert file.tell() - start == n_bytes(tensor.shape, tensor.kind), tensor.name
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def add_model(writer: Any, config: Config, found: Architecture) -> None:
    """Add the sizes and the switches of the model."""
    c = config
    ff = c.moe_intermediate_size or c.intermediate_size if c.model_type == "mixtral" else c.intermediate_size
    writer.add_vocab_size(c.padded_vocab_size)
    writer.add_context_length(context_length(c, found))
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(c.n_head)
    groups = [0 if c.is_recurrent(layer) else c.n_query_groups for layer in range(c.n_layer)]
    writer.add_head_count_kv(groups if c.recurrent_layers else c.n_query_groups)
    if c.recurrent_layers and c.recurrent_class_name == "ShortConv":
        writer.add_shortconv_l_cache(c.conv_size)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    if c.norm_class_name == "RMSNorm":
        writer.add_layer_norm_rms_eps(c.norm_eps)
    else:
        writer.add_layer_norm_eps(c.norm_eps)
    if "parallel_residual" in found.says:
        writer.add_parallel_residual(c.parallel_residual)
    if c.query_scale:
        writer.add_attn_temperature_scale(c.query_scale)
    if c.clip_qkv is not None:
        writer.add_clamp_kqv(c.clip_qkv)
    if "LLaMAMoE" in map(c.mlp_class, range(c.n_layer)):
        writer.add_expert_count(c.n_expert)
        writer.add_expert_used_count(c.n_expert_per_token)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size or c.intermediate_size)
        if c.shared_size:
            writer.add_expert_shared_feed_forward_length(c.shared_size)
    if c.router_bias:
        add_router(writer, c)
    if c.attention_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(c.attention_logit_softcapping)
    if c.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if found.windows and c.sliding_window_size is not None:
        writer.add_sliding_window(c.sliding_window_size)
    if "embedding_multiplier" in found.says:
        writer.add_attention_scale((c.attention_scores_scalar or c.head_size) ** -0.5)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
    if "logits_scaling" in found.says:
        writer.add_logit_scale(1 / c.logits_scaling if found.multiplies else c.logits_scaling)
    if c.recurrent_layers:
        add_states(writer, c)
    if c.rope_n_elem:
        add_rope(writer, c)


def add_states(writer: Any, config: Config) -> None:
    c, rotated = config, config.rope_n_elem // 2
    writer.add_full_attention_interval(attention_interval(c))
    writer.add_ssm_conv_kernel(c.conv_size)
    writer.add_ssm_state_size(c.linear_key_size)
    writer.add_ssm_group_count(c.linear_key_heads)
    writer.add_ssm_time_step_rank(c.linear_value_heads)
    writer.add_ssm_inner_size(c.linear_value_heads * c.linear_value_size)
    writer.add_rope_dimension_sections([*((rotated + i) // 3 for i in (2, 1, 0)), 0])  # all the same for text


def add_router(writer: Any, config: Config) -> None:
    gguf, c = require("gguf", "export"), config
    writer.add_leading_dense_block_count(dense_first(c))
    writer.add_interleave_moe_layer_step(1)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[c.router_scores.upper()])
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    if c.n_shared_expert:
        writer.add_expert_shared_count(c.n_shared_expert)
    if c.n_expert_groups > 1:
        writer.add_expert_group_count(c.n_expert_groups)
        writer.add_expert_group_used_count(c.n_topk_groups)


def add_rope(writer: Any, config: Config) -> None:
    gguf = require("gguf", "export")
    numbers = config.rope_adjustments
    writer.add_rope_dimension_count(config.rope_n_elem)
    writer.add_rope_freq_base(config.rope_base)
    if config.rope_local_base_freq is not None:
        writer.add_rope_freq_base_swa(config.rope_local_base_freq)
    temperature = make_ropes(config)[0].factor
    if config.rope_type in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(numbers[LENGTH]))
    if config.rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(temperature)
    if config.rope_type not in ("linear", "yarn"):
        return
    factor = float(numbers["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_type))
    writer.add_rope_scaling_factor(factor)
    if config.rope_type == "yarn":
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # which llama.cpp multiplies by the number here
        writer.add_rope_scaling_attn_factors(temperature / own)
        writer.add_rope_scaling_yarn_beta_fast(float(numbers.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(numbers.get("beta_slow") or 1))
