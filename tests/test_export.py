"""`litgpt export`: GGUF files, compared with the models that they are made from, in llama.cpp where it is installed."""

import itertools
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from safetensors.torch import save_file

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.export.architectures import ARCHITECTURES, architecture, context_length
from litgpt.export.gguf import make_vocabulary
from litgpt.export.gguf_tensors import TYPES
from litgpt.export.llama_cpp import llama_cpp
from litgpt.export.parity import compare_tensors, context_to_open
from litgpt.families import FAMILIES as MODEL_TYPES
from litgpt.generate.engine import generate
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import save_llama
from tests.families import FAMILIES, YARN, save_random
from tests.nasty import nasty_texts
from tests.runs import exit_code
from tests.test_lora import save, with_lora
from tests.test_tokenizer import sentencepiece

gguf = pytest.importorskip("gguf", reason="the extra `export` is not installed")
in_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
needs_libgguf = pytest.mark.skipif(find_spec("libgguf") is None, reason="libgguf is not installed")
CPU = torch.device("cpu")
IDS = [0, *torch.randint(2, 299, (60,), generator=torch.Generator().manual_seed(1)).tolist()]
GELU = (
    "gpt_neox",
    "falcon",
    "phi",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gpt2",
    "starcoder2",
)  # a kernel of 16 bits there
QWEN3_5 = {"linear_value_head_dim": 8, "rms_norm_eps": 1e-6, "vocab_size": 300}
BOUNDS = dict.fromkeys(("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text"), 3e-4)  # short queries and keys are longer there
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": False}
GEMMA3 = FAMILIES["gemma3_text"]["plain"] | {"query_pre_attn_scalar": 12, "vocab_size": 300}
MISTRAL3 = FAMILIES["ministral3"]["plain"] | {"vocab_size": 300}
SMOLLM3 = {"num_hidden_layers": 5, "no_rope_layer_interval": 4, "no_rope_layers": None}
SAME_BASE = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": YARN["rope_theta"]}}
CASES: list[tuple[str, str, dict[str, Any]]] = [  # family, variant, changes
    ("llama", "plain", {}),
    *(("llama", variant, {}) for variant in ("llama3", "yarn", "linear")),
    ("llama", "plain", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_slow": 2}}),
    *(("mistral", variant, {}) for variant in ("window", "no window", "window of 300")),
    *(("mixtral", variant, {}) for variant in FAMILIES["mixtral"]),
    ("gpt_neox", "plain", {"hidden_size": 64}),
    ("gpt_neox", "full rope", {"tie_word_embeddings": True}),
    ("gpt_neox", "gelu_new", {}),
    *(("falcon", variant, {"bias": False}) for variant in ("7b", "40b", "180B", "11b")),
    *(("stablelm", variant, {}) for variant in FAMILIES["stablelm"]),
    ("phi", "plain", {"tie_word_embeddings": True}),
    ("phi", "groups", {}),
    *(("phi3", variant, {}) for variant in ("longrope", "window")),  # with the factors for long texts, and without
    ("phi3", "partial", {"original_max_position_embeddings": 256}),
    ("gemma", "plain", {}),
    ("gemma2", "plain", {"query_pre_attn_scalar": 12}),
    ("gemma2", "small caps", {"query_pre_attn_scalar": 8}),
    ("gemma3_text", "plain", {"query_pre_attn_scalar": 12}),
    ("gemma3_text", "scaled", {"query_pre_attn_scalar": 12}),
    *(
        ("gemma3", variant, {"text_config": GEMMA3 | {"tie_word_embeddings": variant == "plain"}})
        for variant in FAMILIES["gemma3"]
    ),
    *(("qwen2", variant, {}) for variant in FAMILIES["qwen2"]),
    ("qwen3", "windows", {}),
    *(
        (family, variant, {"text_config": fields["text_config"] | {"vocab_size": 300, "attention_bias": False}})
        for family in ("qwen2_5_vl", "qwen3_vl")
        for variant, fields in FAMILIES[family].items()
    ),
    ("qwen3_moe", "plain", {}),
    ("qwen3_moe", "plain", {"tie_word_embeddings": True}),
    ("olmo", "clipped", {"attention_bias": False}),
    ("olmo", "tied", {}),
    ("olmo2", "plain", {}),
    ("olmo2", "plain", {"tie_word_embeddings": True}),
    ("olmo3", "yarn", {"rope_parameters": SAME_BASE}),
    ("olmo3", "plain", {}),
    ("dots1", "plain", {"sliding_window": None, "num_key_value_heads": 4}),
    ("dots1", "groups", {"attention_bias": False, "num_key_value_heads": 4}),
    *(("ernie4_5_moe", "plain", {"moe_num_shared_experts": n}) for n in (3, 0)),
    ("glm4_moe", "plain", {}),
    ("glm4_moe", "groups", {"attention_bias": True}),
    *(("minimax_m2", variant, {}) for variant in FAMILIES["minimax_m2"]),
    ("gpt2", "plain", {}),
    ("gpt2", "untied", {}),
    ("smollm3", "plain", SMOLLM3),
    ("smollm3", "plain", SMOLLM3 | {"tie_word_embeddings": False}),
    ("cohere2", "windows", {}),
    ("ernie4_5", "plain", {"use_bias": False}),
    *(("glm4", variant, {}) for variant in FAMILIES["glm4"]),
    *(("granite", variant, {}) for variant in FAMILIES["granite"]),
    ("seed_oss", "plain", {}),
    ("seed_oss", "other biases", {"attention_out_bias": False, "mlp_bias": False}),
    ("apertus", "plain", {}),
    ("apertus", "biases", {"attention_bias": False}),
    ("arcee", "plain", {}),
    ("arcee", "plain", {"tie_word_embeddings": True, "head_dim": 12}),
    ("exaone4", "windows", {"num_hidden_layers": 64}),
    ("exaone4", "no windows", {}),
    ("granitemoehybrid", "rope", {}),
    ("granitemoehybrid", "no rope", {"position_embedding_type": "rope", "hidden_act": "silu"}),
    ("hunyuan_v1_dense", "plain", {}),
    ("hunyuan_v1_dense", "biases", {"attention_bias": False}),
    ("lfm2", "plain", {}),
    ("lfm2", "plain", {"tie_word_embeddings": True, "conv_L_cache": 3}),
    ("ministral3", "plain", {}),
    ("mistral3", "ministral", {"text_config": MISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": False}}),
    ("mistral3", "mistral", {"text_config": FAMILIES["mistral3"]["mistral"]["text_config"] | {"vocab_size": 300}}),
    ("nemotron", "plain", {}),
    ("nemotron", "biases", {"head_dim": 8}),
    ("olmoe", "clipped", {"clip_qkv": None, "norm_topk_prob": False, "num_key_value_heads": 4}),
    ("olmoe", "tied", {"attention_bias": False}),
    ("qwen2_moe", "plain", {}),
    ("qwen3_5_text", "plain", QWEN3_5),
    ("qwen3_5_text", "plain", QWEN3_5 | {"linear_num_value_heads": 6, "full_attention_interval": 3}),
    ("qwen3_5_text", "plain", QWEN3_5 | {"linear_num_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3_5_moe_text", "plain", QWEN3_5 | {"num_experts_per_tok": 3}),
    ("qwen3_5", "plain", {"text_config": FAMILIES["qwen3_5"]["plain"]["text_config"] | QWEN3_5}),
    ("qwen3_5_moe", "plain", {"text_config": FAMILIES["qwen3_5_moe"]["plain"]["text_config"] | QWEN3_5}),
    ("starcoder2", "plain", {}),
    ("starcoder2", "window", {"use_bias": True, "head_dim": 8}),
    *(
        (family, "plain" if family == "mixtral" else next(iter(FAMILIES[family])), {**more, "rope_parameters": rope})
        for family, more in {
            "mistral": {},
            "mixtral": {},
            "gpt_neox": {"hidden_size": 64},
            "stablelm": {},
            "phi": {},
            "gemma": {},
            "qwen3": {},
            "qwen3_moe": {},
            "olmo": {"attention_bias": False},
            "olmo2": {},
            "smollm3": SMOLLM3,
            "granite": {},
            "cohere2": {},
            "ernie4_5": {"use_bias": False, "tie_word_embeddings": False},
            "glm4": {},
            "seed_oss": {},
            "arcee": {},
            "nemotron": {},
        }.items()
        for rope in (LINEAR, YARN)
    ),
]
LAYERS = ["full_attention", "sliding_attention", "full_attention"]
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [  # and the field that the message names
    ("llama", "gelu", {}, "hidden_act"),
    ("llama", "longrope", {}, "longrope"),
    ("llama", "yarn untruncated", {}, "truncate"),
    ("gpt_neox", "sequential", {}, "attention_bias"),
    ("gpt_neox", "plain", {}, "rotary"),  # an odd number of dimensions
    ("falcon", "no groups", {"bias": False}, "parallel_residual"),
    ("falcon", "40b biases", {}, "bias"),
    ("phi", "norms", {}, "qk_layernorm"),
    ("gemma", "biases", {}, "attention_bias"),
    ("gemma2", "plain", {}, "query_pre_attn_scalar"),
    ("gemma2", "no caps", {"query_pre_attn_scalar": 8}, "lm_head"),
    ("gemma2", "plain", {"query_pre_attn_scalar": 12, "layer_types": LAYERS}, "layer_types"),
    ("gemma3_text", "caps", {"query_pre_attn_scalar": 12}, "final_logit_softcapping"),
    ("qwen3", "biases", {}, "attention_bias"),
    ("cohere2", "untied", {"tie_word_embeddings": True}, "attention_bias"),
    ("cohere2", "windows", {"tie_word_embeddings": False}, "lm_head"),
    ("cohere2", "windows", {"num_hidden_layers": 3, "layer_types": LAYERS}, "express this model: layer_types. Use"),
    ("ernie4_5", "plain", {}, "use_bias"),
    ("ernie4_5", "untied", {}, "llama3"),
    ("seed_oss", "other biases", {}, "attention_out_bias"),
    ("qwen3_moe", "plain", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", "some dense", {"attention_bias": False, "norm_topk_prob": True}, "layers with experts"),
    ("olmo3", "yarn", {}, "rope_local_base_freq"),
    ("dots1", "plain", {"sliding_window": None}, "num_key_value_heads"),
    ("ernie4_5_moe", "some dense", {}, "layers with experts"),
    ("gpt2", "unscaled", {}, "scale_attn_weights"),
    ("smollm3", "plain", {}, "no_rope_layers"),
    ("smollm3", "plain", SMOLLM3 | {"mlp_bias": True}, "mlp_bias"),
    ("arcee", "biases", {"attention_bias": False, "mlp_bias": False}, "hidden_act"),
    ("arcee", "biases", {"hidden_act": "relu2", "attention_bias": False}, "mlp_bias"),
    ("exaone4", "windows", {}, "layer_types"),
    ("exaone4", "no windows", {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64}, "layer_types"),
    ("nemotron", "biases", {}, "head_dim"),
    ("granitemoehybrid", "no rope", {"hidden_act": "silu"}, "position_embedding_type"),
    ("granitemoehybrid", "mamba", {}, "express this model: layer_types. Use"),
    ("lfm2", "biases", {}, "conv_bias"),
    ("qwen2_moe", "some dense", {"norm_topk_prob": False, "qkv_bias": True}, "mlp_only_layers"),
    ("qwen3_5_text", "plain", {"rms_norm_eps": 1e-6}, "linear_value_head_dim"),
    ("qwen3_5_text", "plain", {"linear_value_head_dim": 8}, "rms_norm_eps"),
    ("qwen3_5_text", "tied", QWEN3_5 | {"attention_bias": False}, "layer_types"),
    ("qwen3_5_text", "plain", QWEN3_5 | {"layer_types": ["linear_attention"] * 4}, "layer_types"),
    ("olmoe", "clipped", {"norm_topk_prob": False, "num_key_value_heads": 4}, "clip_qkv"),
    ("olmoe", "clipped", {"norm_topk_prob": False, "clip_qkv": None}, "num_key_value_heads"),
]


def with_tokenizer(folder: Path, tokenizer_file: Path) -> Path:
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def random_model(folder: Path, tokenizer_file: Path, family: str, variant: str, changes: Mapping[str, Any]) -> Path:
    vocabulary = {} if "text_config" in changes else {"vocab_size": 300}
    return with_tokenizer(
        save_random(folder, family, variant, changes=deepcopy({**vocabulary, **changes})), tokenizer_file
    )


def export(folder: Path, file: Path, *flags: object) -> int:
    """The exit code."""
    return exit_code("export", folder, "--out", file, *flags)


@torch.no_grad()
def largest_difference(folder: Path, file: Path, margin: float = 3e-2, lora: Optional[Path] = None) -> float:
    """Of the log-probabilities in llama.cpp and here, at some of the positions. Tokens that are closer than `margin`
    may change places. `lora` is the file of an adapter over the other."""
    source = ModelSource.open(folder, merged=False)
    config = source.config
    ids = IDS[: context_length(config, architecture(config)) - 1]
    is_long = config.rope_adjustments.get("original_max_position_embeddings", 512) < len(ids)
    n_context = 512 if is_long else context_to_open(config)
    ours = source.model(torch.float32, CPU)(torch.tensor([ids]))[0].log_softmax(-1)
    worst = 0.0
    with llama_cpp(file, n_context, lora=lora) as there:
        for i in (0, 1, 5, 12, 22, 39, 60):
            if i < len(ids):
                theirs = there.log_probabilities(ids[: i + 1], len(ours[i]))
                worst = max(worst, (theirs - ours[i]).abs().max().item())
                first, second = ours[i].topk(2).values
                assert theirs.argmax() == ours[i].argmax() or first - second < margin
    return worst


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


def without_spaces(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@in_llama_cpp
def test_pico(tmp_path, capsys):
    assert export(PICO, tmp_path / "pico.gguf", "--type", "f32") == 0
    out = without_spaces(capsys.readouterr().out)
    assert "same token ids for 2 of 2 texts and the same prompt for 2" in out
    assert largest_difference(PICO, tmp_path / "pico.gguf") < 1e-4
    assert field(tmp_path / "pico.gguf", "tokenizer.ggml.eot_token_id") == 5  # ends an answer, beside EOS


@in_llama_cpp
def test_an_answer_ends_where_ours_does(tmp_path):
    assert export(PICO, tmp_path / "pico.gguf", "--type", "f32", "--parity", "tensors") == 0
    source = ModelSource.open(PICO)
    model, tokenizer, style = source.model(torch.float32, CPU), source.tokenizer(), source.style()
    text = style.prompt([{"role": "user", "content": "What does Anna have?"}])
    ids = tokenizer.encode(text, not style.own_special_tokens)
    answer = list(itertools.takewhile(lambda i: i not in tokenizer.stops(style), generate(model, ids, 100)))
    assert len(answer) < 100
    with llama_cpp(tmp_path / "pico.gguf", 256) as there:
        found = there.ask("/completion", prompt=ids, n_predict=100, temperature=0.0)
    assert found["stop_type"] == "eos" and found["content"] == tokenizer.decode(answer)


@in_llama_cpp
@pytest.mark.long
def test_a_real_model(real_data, tmp_path):
    folder = real_data / "models" / "stories260k"
    assert export(folder, tmp_path / "stories.gguf") == 0
    with llama_cpp(tmp_path / "stories.gguf", 64) as there:
        ids = [1]
        model = ModelSource.open(folder).model(torch.float32, CPU)
        for _ in range(20):
            ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            theirs = there.log_probabilities(ids, 512)
            assert (ours - theirs).abs().max() < 1e-4 and ours.argmax() == theirs.argmax()
            ids.append(int(ours.argmax()))


@in_llama_cpp
@pytest.mark.parametrize(
    ("family", "variant", "changes"),
    [pytest.param(*case, marks=[pytest.mark.long] * (i > 0)) for i, case in enumerate(CASES)],
)
def test_families(family, variant, changes, tokenizer_file, tmp_path):
    folder = random_model(tmp_path / "m", tokenizer_file, family, variant, changes)
    assert export(folder, tmp_path / "m.gguf", "--type", "f32", "--parity", "tensors") == 0
    assert largest_difference(folder, tmp_path / "m.gguf") < (3e-2 if family in GELU else BOUNDS.get(family, 1e-4))


def test_every_family_has_an_architecture():
    without = {
        "deepseek_v3",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "glm4_moe_lite",
        "gpt_oss",
    }  # which llama.cpp stores in another form
    assert ARCHITECTURES.keys() == set(MODEL_TYPES) - without == {family for family, *_ in CASES}


@pytest.mark.long
@pytest.mark.parametrize(("family", "variant", "changes", "named"), REFUSED)
def test_what_gguf_cannot_say(family, variant, changes, named, tokenizer_file, tmp_path, capsys):
    folder = random_model(tmp_path / "m", tokenizer_file, family, variant, changes)
    assert export(folder, tmp_path / "m.gguf") == 2
    assert named in without_spaces(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


@pytest.mark.parametrize("named", [n for n in TYPES if n != "f32"])
def test_types(named, tokenizer_file, tmp_path, capsys):
    """All weights are of the type but those that llama.cpp keeps wider; the numbers are near ours."""
    if TYPES[named].endswith("_K"):
        pytest.importorskip("libgguf")
    folder = save_llama(tmp_path / "m", tokenizer_file, **WIDE)
    assert export(folder, tmp_path / "m.gguf", "--type", named, "--parity", "tensors") == 0
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == TYPES[named]
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    head = {"Q4_0": "Q8_0", "Q4_K": "Q6_K", "Q5_K": "Q6_K"}
    assert kinds["output.weight"] == head.get(TYPES[named], TYPES[named])
    assert kinds["blk.1.ffn_down.weight"] == ("Q6_K" if named.endswith("_m") else TYPES[named])
    differs = float(re.search(r"by at most ([\d.e+-]+)", without_spaces(capsys.readouterr().out))[1])  # type: ignore[index]
    bounds = {"f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2, "q6_k": 4e-2, "q5_k_m": 8e-2}
    assert differs < bounds.get(named, 0.15)


@in_llama_cpp
@needs_libgguf
@pytest.mark.long
@pytest.mark.parametrize("named", [n for n in TYPES if n != "f32"])
def test_types_in_llama_cpp(named, tokenizer_file, tmp_path):
    """Other numbers move the answer no further than numbers that were rounded in the same way."""
    folder = save_llama(tmp_path / "m", tokenizer_file, **WIDE, initializer_range=0.05)
    assert export(folder, tmp_path / "m.gguf", "--type", named) == 0
    assert largest_difference(folder, tmp_path / "m.gguf", margin=1.0) < {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}.get(
        named, 2.0
    )


def test_rows_that_do_not_fit(tokenizer_file, tmp_path, capsys):
    pytest.importorskip("libgguf")
    folder = save_llama(tmp_path / "m", tokenizer_file)  # rows of 32 and of 44 numbers
    assert export(folder, tmp_path / "m.gguf", "--type", "q4_k_m", "--parity", "tensors") == 0
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.attn_q.weight"] == "Q5_0" and kinds["blk.0.ffn_down.weight"] == "F16"
    out = without_spaces(capsys.readouterr().out)
    assert "q5_0 instead of q4_k" in out and "f16 instead of q4_k" in out


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_merged(tied, tokenizer_file, tmp_path):
    base = save_llama(tmp_path / "base", tokenizer_file, tie_word_embeddings=tied)
    lora = LoRA(r=3, alpha=5, query=True, key=True, value=True, projection=True, mlp=True, head=True)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    assert export(folder, tmp_path / "a.gguf", "--type", "f32", "--parity", "tensors") == 0
    main(["merge_lora", str(folder)])
    assert export(tmp_path / "adapter-merged", tmp_path / "b.gguf", "--type", "f32", "--parity", "tensors") == 0
    ours, merged = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    assert ours.keys() == merged.keys() and "output.weight" in ours
    assert all((ours[name].data == merged[name].data).all() for name in ours)
    if find_spec("xllamacpp"):
        assert largest_difference(folder, tmp_path / "a.gguf") < 1e-4


@in_llama_cpp
@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "gpt2", "phi3", "mixtral"])
def test_adapters_over_fused_weights(family, tokenizer_file, tmp_path):
    changes = {"gpt_neox": {"hidden_size": 64}, "falcon": {"bias": False}}.get(family, {})
    base = random_model(tmp_path / "base", tokenizer_file, family, next(iter(FAMILIES[family])), changes)
    lora = LoRA(r=3, alpha=5, query=True, key=True, value=True, projection=True, mlp=True)
    folder = save(with_lora(base, lora), lora, base, tmp_path / "adapter")
    assert export(folder, tmp_path / "a.gguf", "--type", "f32", "--parity", "tensors") == 0
    assert largest_difference(folder, tmp_path / "a.gguf") < 3e-2


def test_only_lora_can_be_merged(llama, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    flags = ["--data", rows, "--train.max_steps", 1, "--out_dir", tmp_path / "out", "--adapter_start_layer", 1]
    main(["finetune_adapter", str(llama), *map(str, flags)])
    assert export(tmp_path / "out" / "final", tmp_path / "m.gguf") == 2
    assert "cannot be merged" in without_spaces(capsys.readouterr().err)


def test_a_damaged_file_shows(llama, tmp_path):
    """The numbers of the file are compared, not only its names."""
    from litgpt.export.gguf_tensors import gguf_tensors

    file = tmp_path / "m.gguf"
    assert export(llama, file, "--type", "f32", "--parity", "tensors") == 0
    weights = ModelSource.open(llama).weights()
    found = architecture(weights.config)
    assert compare_tensors(file, weights, gguf_tensors(weights, found, "f32"), found)[0] == 0
    data = bytearray(file.read_bytes())
    data[-6] ^= 127
    file.write_bytes(data)
    worst, where = compare_tensors(file, weights, gguf_tensors(weights, found, "f32"), found)
    assert worst > 0 and where == next(reversed(tensors(file)))


def test_outputs(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["export", str(llama), "--parity", "tensors"])
    assert [p.name for p in Path("out/export").glob("*.gguf")] == ["llama-f32.gguf"]
    main(["export", str(llama), "--parity", "tensors"])  # litgpt wrote it
    Path("mine.gguf").write_text("mine")
    assert export(llama, Path("mine.gguf")) == 2 and Path("mine.gguf").read_text() == "mine"
    assert export(llama, Path("mine.gguf"), "--overwrite", "true", "--parity", "tensors") == 0
    assert export(llama, Path("mine.bin")) == 2
    assert "--out mine.bin" in capsys.readouterr().err


def test_missing_packages(llama, tmp_path, monkeypatch, capsys):
    for module, flags in {"xllamacpp": ["--parity", "answers"], "libgguf": ["--type", "q4_k_m"], "gguf": []}.items():
        monkeypatch.setattr("litgpt.export.llama_cpp.find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, module, None)
        assert export(llama, tmp_path / "m.gguf", *flags) == 2
        assert module in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def empty_model(folder: Path) -> Path:
    """A model with any numbers for the tokenizer in a folder."""
    n = Tokenizer(folder).vocab_size
    fields = {"vocab_size": n, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 1, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    layer = "model.layers.0."
    names = [f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"]
    names += [f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    weights = {name: torch.ones(8, 8) for name in names} | {"model.embed_tokens.weight": torch.ones(n, 8)}
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    save_file(weights | {f"{name}.weight": torch.ones(8) for name in norms}, folder / "model.safetensors")
    return folder


def our_own(folder: Path, real: Path) -> None:
    (folder / "texts.txt").write_text("the quick brown fox, 1234 lazy dogs. Don't! été 東京\n" * 20, encoding="utf-8")
    main(["tokenizer", "train", str(folder / "texts.txt"), "--vocab_size", "320", "--out_dir", str(folder / "t")])
    shutil.copytree(folder / "t", folder, dirs_exist_ok=True)


def own_with(pattern: str, ignore_merges: bool) -> Any:
    """A tokenizer with the words of a regular expression. Its tokens were learned across words, so other words would
    give other ids."""

    def make(folder: Path, real: Path) -> None:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        made.pre_tokenizer = as_bytes
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, special_tokens=["</s>"])
        made.train_from_iterator([f"{text} aB {text}'LL 1234//\n" for text in nasty_texts(500, special=())], trainer)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), as_bytes])
        made.decoder = decoders.ByteLevel()
        made.save(str(folder / "tokenizer.json"))
        fields = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))

    return make


def real_one(name: str) -> Any:
    """The tokenizer of a folder, or one of its files."""

    def copy(folder: Path, real: Path) -> None:
        source = real / "tokenizers" / name
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, folder / "tokenizer.model")

    return copy


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_RULE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O_RULE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZERS = {
    "of sentencepiece": lambda folder, real: sentencepiece(folder),
    "our own": our_own,
    "words of Llama 3": own_with(LLAMA_3, True),
    "words of OLMo 2": own_with(LLAMA_3, False),
    "words of Mistral Nemo": own_with(TEKKEN_RULE, True),
    "words of gpt-oss": own_with(GPT_4O_RULE, False),
    **{
        name: real_one(name)
        for name in "falcon llama-2 llama-3-8b-instruct minimind phi-3 pythia qwen2.5 smollm2".split()
    },
    "mistral v1": real_one("mistral/tokenizer.model.v1"),
    "mistral v3": real_one("mistral/tokenizer.model.v3"),
}


@in_llama_cpp
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (i > 1)) for i, n in enumerate(TOKENIZERS)]
)
def test_tokenizers(name, request, tmp_path):
    """The same ids as here, but for what the export says: Unicode forms, and blanks beside special tokens."""
    folder = tmp_path / "m"
    folder.mkdir()
    TOKENIZERS[name](
        folder, request.getfixturevalue("real_data") if not name.startswith(("our own", "of ", "words ")) else tmp_path
    )
    assert export(empty_model(folder), tmp_path / "m.gguf", "--type", "f32", "--parity", "tensors") == 0
    source = ModelSource.open(folder)
    tokenizer, notes = source.tokenizer(), " ".join(make_vocabulary(source, source.config.padded_vocab_size).notes)
    n = 0
    with llama_cpp(tmp_path / "m.gguf", 64) as there:
        for text in nasty_texts(500, special=()):
            if "NFC" in notes and unicodedata.normalize("NFC", text) != text:
                continue
            if "alphabets" in notes and any(unicodedata.category(c)[0] in "LM" for c in text if c > "\x7f"):
                continue
            if "begins with one" in notes and text.startswith((" ", "▁")):
                continue
            if "follows a special token" in notes and any(t in text for t in tokenizer.special_tokens):
                continue
            assert there.encode(text, special=False) == tokenizer.encode(text, special=False), text
            n += 1
        ids = tokenizer.encode("Hello")
        assert there.encode("Hello") == ids
    assert n > (200 if "alphabets" in notes else 400)


def test_a_model_without_eos(llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    (tmp_path / "m" / "generation_config.json").unlink()
    file = tmp_path / "m" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("bos_token_id", "eos_token_id")}))
    assert export(tmp_path / "m", tmp_path / "m.gguf", "--parity", "tensors") == 0
    assert "names no token that ends an answer" in without_spaces(capsys.readouterr().out)


def test_rules_that_llama_cpp_does_not_have(llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    fields = json.loads(file.read_text())
    steps = {
        "pre_tokenizer": {"type": "Whitespace"},
        "normalizer": {"type": "Lowercase"},
        "model": fields["model"] | {"dropout": 0.1},
    }
    for key, value in steps.items():
        file.write_text(json.dumps(fields | {key: value}))
        assert export(tmp_path / "m", tmp_path / "m.gguf") == 2
        err = capsys.readouterr().err
        assert "dropout" in err if key == "model" else value["type"] in err
