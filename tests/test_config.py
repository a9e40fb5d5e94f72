"""The known models, and LitGPT's `model_config.yaml`."""

import json
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.model.config import Config, known_models
from litgpt.model.gpt import GPT

PUBLISHED = {  # parameters, where the head has a weight of its own
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "LFM2-350M": 354_483_968 + 65536 * 1024,  # published without it
    "LFM2-700M": 742_489_344 + 65536 * 1536,
    "LFM2-1.2B": 1_170_340_608 + 65536 * 2048,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "pythia-1.4b": 1_414_647_808,
    "phi-2": 2_779_683_840,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "GLM-4-9B-0414": 9_400_279_040,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-30B-A3B": 30_532_122_624,
    "GLM-4.5-Air": 106_852_245_504,
    "OLMo-7B-hf": 6_888_095_744,
    "OLMo-2-1124-7B": 7_298_617_344,
    "stablelm-3b-4e1t": 2_795_443_200,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "starcoder2-3b": 3_030_371_328 + 49152 * 3072,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Qwen3.5-0.8B": 752_393_024 + 248320 * 1024,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-35B-A3B": 34_660_610_688,
}
# a model_config.yaml as LitGPT writes it
LITGPT = """
attention_logit_softcapping: null
attn_bias: false
bias: true
block_size: 512
gelu_approximate: none
head_size: 32
hf_config: {name: pythia-14m, org: EleutherAI}
intermediate_size: 512
lm_head_bias: false
mlp_class_name: GptNeoxMLP
n_embd: 128
n_expert: 0
n_head: 4
n_layer: 6
n_query_groups: 4
name: pythia-14m
norm_class_name: LayerNorm
norm_eps: 1.0e-05
norm_topk_prob: false
padded_vocab_size: 50304
padding_multiple: 128
parallel_residual: true
rope_base: 10000
rope_condense_ratio: 1
rotary_percentage: 0.25
routed_scaling_factor: 1.0
shared_attention_norm: false
vocab_size: 50254
"""


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert parameters(Config.from_name(name)) == PUBLISHED[name]


def count(c: Config) -> int:
    """The parameters that the numbers imply, by hand."""
    q, k, v = c.qkv_sizes
    width, hidden = c.n_embd, c.moe_intermediate_size or c.intermediate_size
    assert hidden is not None and c.head_size is not None and c.n_query_groups is not None
    norm = 0 if not c.norm_affine else width * (2 if c.norm_class_name == "LayerNorm" and c.norm_bias else 1)
    inner = c.n_head * c.head_size
    attention = (width + bool(c.attn_bias)) * (q + k + v) + (inner + bool(c.attn_proj_bias)) * width
    attention += c.n_head * c.attention_sinks
    if c.norm_qk:
        attention += q + k if c.norm_qk_type == "olmo2" else 2 * c.head_size
    up = hidden * (1 if c.mlp_class_name == "GptNeoxMLP" else 2)
    mlp = (width + bool(c.mlp_bias)) * up + (hidden + bool(c.mlp_bias)) * width
    mlp += 2 * (c.activation == "xielu")
    if c.n_expert:
        shared = width * (3 * c.shared_size + c.shared_expert_gate)
        mlp = c.n_expert * (mlp + width + c.gate_bias) + shared
    dense = [c.mlp_class(i) for i in range(c.n_layer)].count("LLaMAMLP") if c.n_expert else 0
    mlps = (c.n_layer - dense) * mlp + dense * 3 * width * c.intermediate_size
    norms = c.norm_1 + (c.norm_2 and not c.shared_attention_norm) + c.post_attention_norm + c.post_mlp_norm
    ends = (2 * width + c.lm_head_bias) * c.padded_vocab_size + norm
    recurrent = sum(map(c.is_recurrent, range(c.n_layer)))
    if c.recurrent_class_name == "ShortConv":
        net = (4 * width + c.conv_size) * width
    else:
        keys, values = c.linear_key_heads * c.linear_key_size, c.linear_value_heads * c.linear_value_size
        net = width * (2 * keys + 3 * values + 2 * c.linear_value_heads) + c.conv_size * (2 * keys + values)
        net += 2 * c.linear_value_heads + c.linear_value_size
    return ends + (c.n_layer - recurrent) * attention + recurrent * net + c.n_layer * norms * norm + mlps


@pytest.mark.parametrize("model_type", sorted({row["model_type"] for row in known_models().values()}))
def test_every_known_model_builds(model_type):
    """One layer of each on the meta device, or one period, is the model that all of its layers would be."""
    for name, row in known_models().items():
        if row["model_type"] != model_type:
            continue
        config = Config.from_name(name)
        whole = count(config)
        if config.recurrent_layers:  # of layers that differ
            assert parameters(config) == whole, name
        else:
            n_layer, config.n_layer = config.n_layer, 1
            one = parameters(config)
            config.n_layer = 2
            assert one + (n_layer - 1) * (parameters(config) - one) == whole, name
        with torch.device("meta"):
            model = GPT(config)
        names = weight_map(config)
        assert all(
            names.stored(path.rpartition(".")[0]) or names.stored(path) for path, _ in model.named_parameters()
        ), name


@pytest.mark.long
@pytest.mark.parametrize("name", known_models())
def test_every_known_model_builds_whole(name):
    config = Config.from_name(name)
    assert parameters(config) == count(config)


def test_names_and_repositories():
    assert len(known_models()) == 254
    repositories = {row["repo_id"]: name for name, row in known_models().items()}
    assert len(repositories) == 254
    assert Config.from_name("meta-llama/Llama-2-7b-hf") == Config.from_name("Llama-2-7b-hf")
    with pytest.raises(UserError, match=r"No known model is called 'pythia-14'. Did you mean 'pythia-14m'\?"):
        Config.from_name("pythia-14")
    with pytest.raises(UserError, match="Did you mean 'EleutherAI/pythia-14m'"):
        Config.from_name("EleutherAI/pythia-14")


def test_names_that_litgpt_knows_too():
    """Those of the models that its config can express."""
    from litgpt.config import name_to_config

    assert None not in name_to_config.values() and name_to_config.keys() < known_models().keys()
    assert "starcoder2-3b" in name_to_config and not {"Apertus-8B-2509", "granite-4.0-micro"} & name_to_config.keys()


def test_layers_of_a_pattern():
    config = Config.from_name("Gemma-3-4b-it")
    assert config.model_type == "gemma3" and config.n_layer == 34
    local = [config.window(layer) is not None for layer in range(34)]
    assert local == [layer % 6 != 5 for layer in range(34)]
    assert [config.rope_kind(layer) for layer in range(34)] == [int(x) for x in local]


def test_litgpt_file(tmp_path):
    path = tmp_path / "model_config.yaml"
    path.write_text(LITGPT)
    assert Config.from_file(path) == Config.from_name("pythia-14m")
    numbers = yaml.safe_load(LITGPT)
    path.write_text(json.dumps({k: v for k, v in numbers.items() if k not in ("hf_config", "bias", "name")}))
    config = Config.from_file(path)
    assert asdict(config) == asdict(Config.from_name("pythia-14m")) | {"name": "", "repo_id": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "model_config.yaml"),
        ("n_layer: 1", "n_layer, n_embd and n_head"),
        ("a: [", "is not YAML"),
        (LITGPT + "latent_attention: {q_lora_rank: 2}", "latent_attention.kv_lora_rank null has the wrong type"),
        (LITGPT + "spiral: 2", "spiral is not implemented"),
        (LITGPT.replace("n_embd: 128", "n_embd: wide"), "n_embd .* wrong type"),
    ],
)
def test_litgpt_files_that_are_refused(text, message, tmp_path):
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Config.from_file(path)
    with pytest.raises(UserError, match="Cannot read"):
        Config.from_file(Path(tmp_path / "missing.yaml"))


FOREIGN = ["x", "", [], {}, 0, -1, True, 1.5, [1], ["a"], {"a": 1}, {1: 2}, {"factor": "x"}, "nan", 1e999, None]


def test_nonsense_in_a_litgpt_file_is_an_error_of_the_user(tmp_path):
    """Every field in turn with values of other types: read, or refused, never a crash. What else goes wrong while the
    file is read is not put down to the file."""
    path, numbers = tmp_path / "model_config.yaml", yaml.safe_load(LITGPT)
    others = ("rope_adjustments", "rope_condense_ratio", "sliding_window_layer_placing", "n_shared_expert")
    for name in {*numbers, *others, *(f.name for f in fields(Config))}:
        for value in FOREIGN:
            path.write_text(yaml.safe_dump(numbers | {name: value}))
            with suppress(UserError):
                Config.from_file(path)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("x")])
def test_errors_of_the_code_are_not_put_down_to_a_file(error, tmp_path, monkeypatch):
    """While a `config.json` or a `model_config.yaml` is read."""
    from litgpt import families
    from litgpt.families import common
    from litgpt.model import config

    def fail(*args, **kwargs):
        raise error

    path = tmp_path / "model_config.yaml"
    path.write_text(LITGPT)
    monkeypatch.setattr(common, "read_rope", fail)
    monkeypatch.setattr(config, "family_of", fail)
    monkeypatch.setattr(config, "known_models", dict)
    with pytest.raises(type(error)) as caught:
        Config.from_file(path)
    assert caught.value is error
    sizes = {"vocab_size": 8, "max_position_embeddings": 8, "num_hidden_layers": 1, "hidden_size": 8}
    with pytest.raises(type(error)) as caught:
        families.read_config(sizes | {"model_type": "llama", "num_attention_heads": 1, "intermediate_size": 8})
    assert caught.value is error


def test_structure_names_the_family(tmp_path):
    """A file that does not say where its model is from: the family is one with the same math."""
    path = tmp_path / "model_config.yaml"
    fields = {"n_layer": 2, "n_embd": 32, "n_head": 4, "bias": False, "norm_class_name": "RMSNorm"}
    fields |= {"mlp_class_name": "LLaMAMLP", "parallel_residual": False, "rotary_percentage": 1.0}
    for more, family in [
        ({}, "llama"),
        ({"rope_condense_ratio": 4}, "llama"),
        ({"attn_bias": True}, "qwen2"),
        ({"norm_qk": True}, "qwen3"),
        ({"rope_interleave": True}, "ernie4_5"),
        ({"rope_interleave": True, "post_attention_norm": True, "post_mlp_norm": True, "attn_bias": True}, "glm4"),
        ({"sliding_window_size": 8, "n_query_groups": 2}, "mistral"),
        ({"mlp_class_name": "GemmaMLP", "name": "Gemma-tiny"}, "gemma"),
        ({"mlp_class_name": "GemmaMLP"}, "llama"),  # whose norms scale by the weight
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2}, "mixtral"),
        (
            {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "n_expert_groups": 2}
            | {"n_topk_groups": 1, "n_topk_scores_per_group": 1, "first_k_dense_replace": 1},
            "glm4_moe",
        ),
    ]:
        path.write_text(yaml.safe_dump(fields | more))
        config = Config.from_file(path)
        assert config.model_type == family
        assert config.rope_type == ("linear" if "rope_condense_ratio" in more else "default")
        GPT(config)
