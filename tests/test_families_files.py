"""Files of other ages and forms: older fields, other names, stacked experts; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt.checkpoint.folder import Checkpoint, load_weights, write_model
from litgpt.errors import UserError
from litgpt.families import read_config, weight_map
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizedLinear, quantize
from litgpt.model.gpt import GPT
from tests.conftest import some
from tests.families import FAMILIES, MAMBA, SIZES, YARN, save_random
from tests.test_families import CPU, assert_close, ids, ours, tensors, theirs

NESTED = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}}


def fields_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """A whole `config.json` of the first variant of a family."""
    config = AutoConfig.for_model(model_type, **next(iter(FAMILIES[model_type].values())))
    return json.loads(config.to_json_string(use_diff=False)) | changes


FACTORS = {"short_factor": [1.0, 1.1, 1.2, 2.0], "long_factor": [4.0, 5, 6, 7]}
DEEPSEEK = {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
LFM2_OLD = {
    **{"rope_theta": 5000.0, "layer_types": None, "full_attn_idxs": [1], "tie_embedding": False},
    **{"block_ff_dim": 44, "intermediate_size": 99, "tie_word_embeddings": True},
}
# fields as files from before transformers 5 have them
OLD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 5000.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    ("gpt_neox", {}),
    ("stablelm", {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ("stablelm", {}),
    ("phi", {}),
    ("phi", {"partial_rotary_factor": 0.25}),
    ("mixtral", {}),
    ("smollm3", {}),
    ("falcon", {"rope_theta": 500.0}),
    ("phi3", {"rope_scaling": {"type": "longrope"} | FACTORS}),
    ("phi3", {"rope_scaling": {"type": "su", "original_max_position_embeddings": 40} | FACTORS}),
    ("phi3", {"rope_scaling": None, "original_max_position_embeddings": None}),
    (
        "gemma3_text",
        {"rope_theta": 5000.0, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8}},
    ),
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gemma4_text", {"per_layer_config": None, "global_head_dim": 20, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"rope_parameters": None, "layer_types": None}),
    (
        "gemma4_text",
        {"per_layer_config": {i: {"head_dim": 20, "num_key_value_heads": 1} for i in ("05", "06")}},
    ),
    ("gemma4_text", {"layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}),
    ("cohere2", {"rope_theta": 500.0, "sliding_window_pattern": 3}),
    ("gemma2", {"layer_types": None}),
    ("glm4", {"rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ("glm4", {}),
    ("deepseek_v3", {"rope_theta": 5000.0, "rope_scaling": DEEPSEEK}),
    ("glm4_moe", {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    ("glm4_moe_lite", {"mlp_layer_types": None}),
    ("minimax_m2", {"rope_theta": 5000.0, "rotary_dim": 6}),
    ("gpt_oss", {"layer_types": None}),
    ("gpt_oss", {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gpt_oss", {"rope_theta": 5000.0, "rope_scaling": None}),  # YaRN, with another base
    ("olmo3", {"rope_theta": 3000.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    ("olmo3", {"layer_types": None}),
    ("smollm3", {"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 3}),
    ("granitemoehybrid", MAMBA | {"layer_types": ["mamba", "attention", "mamba"], "mamba_d_head": "auto"}),
    ("granitemoehybrid", MAMBA | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
    ("lfm2", LFM2_OLD),
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
]


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "changes"), OLD, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_older_fields(model_type, changes, tmp_path):
    folder = save_random(tmp_path / "m", model_type, next(iter(FAMILIES[model_type])))
    fields = json.loads((folder / "config.json").read_text()) | changes
    for gone in ("rope_parameters", *(k for k, v in changes.items() if v is None and k != "rope_scaling")):
        fields.pop(gone, None)
    if "sliding_window_pattern" in changes:
        fields.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(fields))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert_close(ours(folder)(ids(90)), reference(ids(90)).logits, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_text_model_without_an_object_of_its_own(variant, tmp_path):
    """The form of Qwen2.5-VL's released files: the fields of the text model beside `vision_config`."""
    folder = save_random(tmp_path / "m", "qwen2_5_vl", variant)
    fields = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in fields.pop("text_config").items() if k not in ("model_type", "rope_parameters")}
    rope = {"type": "mrope", "mrope_section": [2, 1, 1]}
    (folder / "config.json").write_text(json.dumps({**text, **fields, "rope_theta": 300.0, "rope_scaling": rope}))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert reference.model.language_model.config.rope_parameters["rope_theta"] == 300
    assert_close(ours(folder)(ids(90)), reference(ids(90)).logits, 1e-4)


def rewritten(folder: Path, rename: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    items = [item for n, t in weights.items() for item in rename(n, t)]
    save_file({n: t.clone() for n, t in items}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("model_type", "rename"),
    [
        ("gpt2", lambda n, t: [(n.removeprefix("transformer."), t)]),
        ("gpt2", lambda n, t: [(n, t)] + ([(n.replace("c_attn.", ""), t)] if n.endswith("attn.c_attn.bias") else [])),
        ("gpt_neox", lambda n, t: [(n.replace("embed_out", "lm_head"), t)]),
        ("gemma3", lambda n, t: [(n.replace("language_model.model.", "model.language_model."), t)]),
        ("gemma3", lambda n, t: [(n if n.startswith("language") else "model." + n, t)]),
        ("mixtral", lambda n, t: [(n.replace("block_sparse_moe.gate", "mlp.gate"), t)]),
        (
            "llama",
            lambda n, t: (
                [(n, t)] + ([("model.layers.0.self_attn.rotary_emb.inv_freq", t[:1])] if "o_proj" in n else [])
            ),
        ),
    ],
)
def test_other_names(model_type, rename, tmp_path):
    variant = next(iter(FAMILIES[model_type]))
    before = save_random(tmp_path / "before", model_type, variant)
    after = rewritten(save_random(tmp_path / "after", model_type, variant), rename)
    assert load_file(before / "model.safetensors").keys() != load_file(after / "model.safetensors").keys()
    assert torch.equal(ours(after)(ids(20)), ours(before)(ids(20)))
    (tmp_path / "out").mkdir()
    write_model(ours(after), Checkpoint(after).fields, tmp_path / "out", Checkpoint(after))
    assert tensors(tmp_path / "out").keys() == tensors(before).keys()


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", some(("mixtral", "qwen3_moe", "ernie4_5_moe", "glm4_moe", "minimax_m2"), "mixtral", "qwen3_moe")
)
def test_stacked_experts(model_type, tmp_path):
    """Experts as one tensor, as transformers 5 has them in memory and may write them."""
    variant = next(iter(FAMILIES[model_type]))
    single = save_random(tmp_path / "single", model_type, variant)
    stacked = save_random(tmp_path / "stacked", model_type, variant, save_original_format=False)
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in tensors(stacked))
    assert torch.equal(ours(stacked)(ids(20)), ours(single)(ids(20)))
    (tmp_path / "out").mkdir()
    write_model(ours(stacked), Checkpoint(stacked).fields, tmp_path / "out", Checkpoint(stacked))
    assert all(torch.equal(t, tensors(single)[n]) for n, t in tensors(tmp_path / "out").items())


def test_defaults_of_a_nested_config():
    """A released Gemma 3 says little about its text part."""
    config = read_config(NESTED)
    assert (config.n_head, config.n_query_groups, config.head_size, config.padded_vocab_size) == (8, 4, 256, 262208)
    assert [config.window(i) for i in range(6)] == [1024] * 5 + [None] and config.tie_embeddings


@torch.no_grad()
@pytest.mark.parametrize("model_type", some(("deepseek_v3", "glm4_moe"), "glm4_moe"))
def test_layers_after_the_last_one_are_copied(model_type, tmp_path):
    """They predict further tokens, and belong to the model."""
    plain = save_random(tmp_path / "plain", model_type, next(iter(FAMILIES[model_type])))
    more = save_random(tmp_path / "more", model_type, next(iter(FAMILIES[model_type])))
    rewritten(more, lambda n, t: [(n, t), *([(n.replace(".2.", ".3."), t.bfloat16())] if "layers.2." in n else [])])
    (tmp_path / "out").mkdir()
    write_model(ours(more), Checkpoint(more).fields, tmp_path / "out", Checkpoint(more))
    before, after = tensors(more), tensors(tmp_path / "out")
    assert torch.equal(ours(more)(ids(20)), ours(plain)(ids(20)))
    assert before.keys() == after.keys() and sum("layers.3." in n for n in after) > 10
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())


def test_the_bias_of_a_router_is_not_trained(tmp_path):
    """Nor rounded: a choice of experts would change."""
    folder = save_random(tmp_path / "m", "glm4_moe", "plain")
    model = ours(folder, torch.bfloat16).requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(ids(20)).square().mean().backward()
    optimizer.step()
    assert torch.equal(
        model.bfloat16().state_dict()[BIAS], load_file(folder / "model.safetensors")[BIAS.replace(*NAMES)]
    )
    with torch.device("meta"):
        empty = GPT(model.config).bfloat16()
    assert empty.to_empty(device="cpu").state_dict()[BIAS].dtype == torch.float32


BIAS, NAMES = "transformer.h.2.mlp.gate.e_score_correction_bias", ("transformer.h", "model.layers")


def test_vision_keeps_its_bytes(tmp_path):
    """In a folder that is written in another precision, and in shards."""
    folder = save_random(tmp_path / "m", "gemma3", "plain", dtype=torch.bfloat16, max_shard_size="20KB")
    (tmp_path / "out").mkdir()
    base = Checkpoint(folder)
    write_model(ours(folder, torch.float32), base.fields, tmp_path / "out", base)
    after = tensors(tmp_path / "out")
    vision = [n for n in base.files if n.startswith(("vision_tower.", "multi_modal_projector."))]
    assert len(vision) > 20
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(after[n], base.tensor(n)) for n in vision)
    assert all(t.dtype == torch.float32 for n, t in after.items() if n not in vision)


def test_a_head_of_its_own_where_the_file_does_not_say_so(tmp_path):
    """Published Mistral Small 3.1 has one, although tied is the default."""
    folder = save_random(tmp_path / "m", "mistral3", "ministral")
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(fields))
    assert not Checkpoint(folder).config.tie_embeddings and read_config(fields).tie_embeddings
    assert_close(ours(folder)(ids(20)), theirs(folder)(ids(20)).logits, 1e-4)
    write_model(ours(folder), fields, tmp_path, Checkpoint(folder))
    assert torch.equal(ours(tmp_path)(ids(20)), ours(folder)(ids(20)))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral", "gpt_neox", "gpt2"])
def test_a_quantization_state_for_each_stored_tensor(model_type, tmp_path):
    """Also where one tensor holds all blocks of our layer, and where its rows have another order."""
    functional = pytest.importorskip("bitsandbytes").functional
    folder = save_random(tmp_path / "m", model_type, next(iter(FAMILIES[model_type])))
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    quantize(model, "bnb.nf4", CPU)
    load_weights(model, checkpoint, torch.float32, CPU)
    names = weight_map(model.config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) >= 4 * model.config.n_layer
    for name, layer in layers.items():
        expected = []
        for stored in names.stored(name):
            weight = stored.to_ours(checkpoint.tensor(f"{stored.module}.weight")).contiguous()
            expected.append(functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4")))
        assert torch.equal(layer.dequantized(), torch.cat(expected)), name
    assert bool(model.eval()(ids(20)).isfinite().all())


def test_keys_that_no_layer_uses(tmp_path):
    """Released files of Gemma 4 have keys and values in layers that use those of another."""
    folder = save_random(tmp_path / "m", "gemma4_text", "per layer")
    weights = load_file(folder / "model.safetensors")
    for leaf in ("k_proj", "v_proj", "k_norm"):
        weights[f"model.layers.6.self_attn.{leaf}.weight"] = torch.ones(3, 2)
    expected = ModelSource.open(folder).model(torch.float32, CPU)(ids(30))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(ModelSource.open(folder).model(torch.float32, CPU)(ids(30)), expected)
    weights["model.layers.3.self_attn.x_proj.weight"] = torch.ones(3, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unknown: model\.layers\.3\.self_attn\.x_proj\.weight"):
        ModelSource.open(folder).model(torch.float32, CPU)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("llama", {"head_dim": 7}, "it must be even"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "without usable factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section in rope_parameters"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention in rope_parameters"),
    ("llama", {"rope_theta": "big", "rope_parameters": None}, "rope_theta 'big'"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0"),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"]},
        "1 layer_types for 3 layers",
    ),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("gemma2", {"sliding_window": None}, "sliding_window None"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta beside"),
    (
        "gemma4_text",
        {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 5},
        "vocab_size_per_layer_input 5 below",
    ),
    ("gemma4_text", {"num_kv_shared_layers": 6}, "num_kv_shared_layers 6, but"),
    ("gemma4_text", {"num_kv_shared_layers": 7}, "num_kv_shared_layers 7, but"),
    ("gemma4_text", {"enable_moe_block": True}, "num_experts"),
    (
        "gemma4_text",
        {"enable_moe_block": True, "num_kv_shared_layers": 1, "use_double_wide_mlp": True, "layer_types": None},
        "use_double_wide_mlp beside",
    ),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
    ("gemma4_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2}}}, "of type 'yarn'"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
    ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config that is not"),
    ("gemma4_text", {"per_layer_config": {i: {"head_dim": 7} for i in "56"}}, "it must be even"),
    (
        "gemma4_text",
        {"per_layer_config": {i: {"num_key_value_heads": 3} for i in "56"}},
        "multiple of 3 key-value heads",
    ),
    (
        "olmo3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
        "rope_parameters.sliding_attention",
    ),
    ("falcon", {"alibi": True}, "alibi True"),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn false"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2"),
    ("falcon", {"num_attention_heads": 5}, "hidden_size 32"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"n_head": 5}, "n_embd 36"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("cohere2", {"logit_scale": 0}, "too small or too large"),
    ("cohere2", {"use_qk_norm": True}, "use_qk_norm True"),
    ("cohere2", {"use_parallel_block": False}, "use_parallel_block False"),
    ("cohere2", {"use_gated_activation": False}, "use_gated_activation False"),
    ("cohere2", {"rotary_pct": 0.5}, "rotary_pct 0.5"),
    ("cohere2", {"position_embedding_type": "none"}, "position_embedding_type 'none'"),
    ("cohere2", {"sliding_window": None}, "sliding_window None"),
    ("ernie4_5", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("glm4", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 2.0}}, "partial_rotary_factor 2"),
    ("granite", {"attention_multiplier": 0}, "attention_multiplier 0"),
    ("granite", {"logits_scaling": 0}, "logits_scaling 0"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "of type 'linear'"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "without usable long_factor"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "for 4 pairs",
    ),
    ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers 1"),
    ("qwen2_5_vl", {"text_config": SIZES | {"head_dim": 12}}, "head_dim 12"),
    ("qwen2_5_vl", {"text_config": SIZES | {"model_type": "qwen2"}}, "not of model_type 'qwen2_5_vl_text'"),
    ("qwen2_5_vl", {"text_config": SIZES | {"hidden_size": 34}}, "hidden_size 34"),
    ("qwen3_vl", {"text_config": SIZES | {"tie_word_embeddings": True}}, "tie_word_embeddings False, and the opposite"),
    ("qwen3_vl", {"text_config": SIZES | {"use_sliding_window": True}}, "use_sliding_window True"),
    ("qwen3_vl", {"text_config": [1]}, "text_config [1]"),
    ("seed_oss", {"attention_out_bias": "yes"}, "attention_out_bias 'yes'"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("gpt_oss", {"num_experts_per_tok": 9}, "9 experts per token"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("gpt_oss", {"quantization_config": "mxfp4"}, "quantization_config"),
    ("stablelm", {"head_dim": 12}, "head_dim 12"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "2 key-value heads for 4 heads"),
    ("deepseek_v3", {"head_dim": 16}, "head_dim 16"),
    ("deepseek_v3", {"head_dim": 5, "qk_rope_head_dim": 5}, "it must be even"),
    ("deepseek_v3", {"n_group": 3}, "3 groups for 8 experts"),
    ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "8 groups for 8 experts"),
    ("deepseek_v3", {"topk_group": 5}, "5 groups per token"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace -1"),
    ("dots1", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias True"),
    ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min 0.1"),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types"),
    ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
    ("arcee", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("starcoder2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("exaone4", {"sliding_window": None}, "sliding_window None"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern 'LLLG'"),
    ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
    ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "alpha": -1}}, "alpha -1"),
    ("hunyuan_v1_dense", {"use_qk_norm": False}, "use_qk_norm False"),
    ("hunyuan_v1_dense", {"use_cla": True}, "use_cla True"),
    ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
    ("ministral3", {"layer_types": ["full_attention"]}, "layer_types"),
    ("mistral3", {"text_config": {"model_type": "llama"}}, "text_config of model_type 'mistral'"),
    ("olmoe", {"head_dim": 12}, "head_dim 12"),
    ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("granitemoehybrid", {"layer_types": ["full_attention", "mamba"]}, "or linear_attention for each layer"),
    ("granitemoehybrid", MAMBA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("granitemoehybrid", MAMBA | {"mamba_d_head": 8}, "8 mamba_n_heads of 8 numbers for 128"),
    ("granitemoehybrid", MAMBA | {"mamba_n_groups": 3}, "8 recurrent heads, which is not a multiple of 3"),
    ("granitemoehybrid", MAMBA | {"mamba_d_state": 2**25}, "rows of more than"),
    ("granitemoehybrid", MAMBA | {"time_step_limit": [0.5, 0.1]}, "time_step_limit [0.5, 0.1]"),
    ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts 4"),
    ("lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "Expected full_attention or conv for each layer"),
    ("lfm2", {"layer_types": None, "full_attn_idxs": 2}, "full_attn_idxs 2"),
    ("lfm2", {"block_ffn_dim_multiplier": 0.001, "intermediate_size": 3}, "without width"),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"), REFUSED, ids=[f"{m} {','.join(c)}" for m, c, _ in REFUSED]
)
def test_refused(model_type, changes, message):
    read_config(fields_of(model_type))
    with pytest.raises(UserError) as e:
        read_config(fields_of(model_type, **changes))
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nonsense_is_an_error_of_the_user(model_type):
    """Every field in turn with a value of a wrong type: read as if it were not there, or refused, never a crash."""
    whole = fields_of(model_type)
    for key in whole:
        for value in ("x", [], {}, -1, [1], None, 1.5):
            try:
                config = read_config(whole | {key: value})
            except UserError as e:
                assert "\n" not in str(e)
            else:
                with torch.device("meta"):
                    GPT(config)


def test_a_config_that_lacks_fields_says_which():
    with pytest.raises(UserError, match="lacks the field 'hidden_size', which 'qwen2' needs"):
        read_config({"model_type": "qwen2", "vocab_size": 3})
    with pytest.raises(UserError, match="lacks the field 'num_hidden_layers'"):
        read_config({k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | {"model_type": "olmo3"})
