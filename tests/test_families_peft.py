"""Adapters of every family: what we export gives our logits in `peft`, what `peft` makes gives its own in ours."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM

from litgpt.__main__ import main
from litgpt.adapter import LLaMAAdapter
from litgpt.adapter_v2 import LLaMAAdapterV2
from litgpt.checkpoint import Checkpoint
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.loading import Source
from litgpt.lora import TARGETS, LoRA, lora_layers
from litgpt.model import GPT
from litgpt.peft_export import write_lora
from tests.families import ALL, FAMILIES, save_random
from tests.test_families import CPU, assert_close, ids
from tests.test_lora import flags, with_lora

EVERYTHING = flags(set(TARGETS))
# one for each way to store: plain, fused and interleaved, fused and transposed, stacked, under another prefix
KINDS = ("phi3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "gemma3")
QUICK = [(family, next(iter(FAMILIES[family]))) for family in KINDS] + [("qwen3_moe", "some dense")]
CASES = [pytest.param(case, marks=() if case in QUICK else pytest.mark.long, id=" ".join(case)) for case in ALL]
LEAVES = {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
IDS = ids(40, rows=2)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out|.*tie_word_embeddings|.*ensure_weight_tying")
        yield


@pytest.fixture(scope="module", params=CASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("m") / "base", *request.param)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Of words, as the vocabularies are small."""
    words = {word: i for i, word in enumerate(["<unk>", "the", "of", "a", "def", "café", "x"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def theirs(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits(folder: Path, base: Path | None = None) -> torch.Tensor:
    return Source.open(folder, base).model(torch.float32, CPU)(IDS)


def trained(base: Path, lora: LoRA) -> GPT:
    """A model whose trained weights have all moved."""
    model = with_lora(base, lora)
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=draw)
    return model


def in_peft(base: Path, adapter: Path) -> torch.nn.Module:
    """With nothing left over on either side."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|no module|no parameter).*")
        model = PeftModel.from_pretrained(theirs(base), adapter).eval()
    written = {n.partition(".lora_")[0] for n in load_file(adapter / "adapter_model.safetensors") if ".lora_" in n}
    assert {n.partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n} == written
    return model


@torch.no_grad()
def check_export(base: Path, lora: LoRA, folder: Path, merge: bool = True) -> dict[str, Any]:
    """Our logits, those in `peft`, those of the folder that we read again, and the merged ones, are the same."""
    model = trained(base, lora)
    expected = model(IDS)
    assert (expected - logits(base)).abs().max() > 0.01 * expected.abs().max()
    folder.mkdir()
    write_lora(lora, model, str(base), folder)
    save_tokenizer(folder)
    assert_close(in_peft(base, folder)(IDS).logits, expected, 1e-4)
    assert_close(logits(folder), expected, 1e-4)
    if merge:
        main(["merge_lora", str(folder)])
        merged = folder.with_name(folder.name + "-merged")
        assert_close(theirs(merged)(IDS).logits, expected, 1e-4)
        assert_close(logits(merged), expected, 1e-4)
    return json.loads((folder / "adapter_config.json").read_text())


def test_export_and_merge(base, tmp_path):
    fields = check_export(base, LoRA(r=2, alpha=5, **EVERYTHING), tmp_path / "adapter")
    assert fields["lora_alpha"] / fields["r"] == 2.5 and not fields.get("rank_pattern")
    assert (fields["lora_dropout"] == 0) == bool(fields["target_parameters"])
    before = Checkpoint(base)
    after = Checkpoint(tmp_path / "adapter-merged")
    assert before.config.tie_embeddings or before.files.keys() == after.files.keys()
    kept = [n for n in before.files if "vision" in n or "projector" in n]
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in kept)


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=3, alpha=5),
        LoRA(r=3, alpha=5, value=False, variant="dora"),
        LoRA(r=2, alpha=5, variant="rslora", init="pissa", **EVERYTHING | {"head": False}),
        LoRA(r=2, alpha=5, targets=r"\.[12]\..*(proj|c_|dense|w[12])", layers=[0, 2]),
        LoRA(r=2, alpha=5, query=False, value=False, mlp=True, layers=[1], train_embeddings=True),
    ],
    ids=["query and value", "dora of query", "pissa", "regex", "a layer and the embedding"],
)
def test_parts(base, lora, tmp_path):
    check_export(base, lora, tmp_path / "adapter")


def given(base: Path, folder: Path, **changes: Any) -> torch.nn.Module:
    """An adapter that `peft` made, saved in `folder`."""
    config = Checkpoint(base).config
    torch.manual_seed(1)
    targets: dict[str, Any] = {"target_modules": LEAVES.get(config.model_type, LLAMA)}
    if config.n_expert:
        targets["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
        targets["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **targets, **changes}
    model = get_peft_model(theirs(base), LoraConfig(**options)).eval()
    draw = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            p.data *= 1 + 0.1 * torch.randn(p.shape, generator=draw)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def check_import(base: Path, model: torch.nn.Module, folder: Path) -> None:
    with torch.no_grad():
        expected = model(IDS).logits
        assert (expected - logits(base)).abs().max() > 0.01 * expected.abs().max()
        assert_close(logits(folder, base), expected, 1e-4)
        main(["merge_lora", str(folder), "--base", str(base)])
        assert_close(theirs(folder.with_name(folder.name + "-merged"))(IDS).logits, expected, 1e-4)


def test_adapters_of_peft(base, tmp_path):
    pattern = r"(q_proj|qkv_proj|query_key_value|c_attn|layers\.1\..*gate_up_proj)"
    changes = {"rank_pattern": {pattern: 6, r".*1\..*(down_proj|fc2|4h_to_h)": 3}, "alpha_pattern": {pattern: 13}}
    check_import(base, given(base, tmp_path / "adapter", **changes), tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear", "target_parameters": None},
        {"target_modules": r".*\.[02]\..*(q_proj|qkv_proj|query_key_value|c_attn|down_proj|c_proj)", "use_rslora": True},
        {"layers_to_transform": [1], "target_parameters": None, "exclude_modules": ["k_proj", "dense"]},
    ],
    ids=["all-linear", "regex", "a layer"],
)
def test_selections_of_peft(base, changes, tmp_path):
    model_type = Checkpoint(base).config.model_type
    if "layers_to_transform" in changes:
        changes = {**changes, "target_modules": [m for m in LEAVES.get(model_type, LLAMA[:4]) if m != "lm_head"]}
    check_import(base, given(base, tmp_path / "adapter", **changes), tmp_path / "adapter")


def test_dora_of_peft(base, tmp_path):
    config = Checkpoint(base).config
    targets = [m for m in LEAVES.get(config.model_type, LLAMA) if m != "lm_head"]
    targets = LLAMA[:4] if config.n_expert else targets
    changes = {"use_dora": True, "target_modules": targets, "target_parameters": None}
    check_import(base, given(base, tmp_path / "adapter", **changes), tmp_path / "adapter")


@pytest.mark.parametrize("method", [LLaMAAdapter(start_layer=1), LLaMAAdapterV2(start_layer=1)], ids=["v1", "v2"])
def test_prefixes(base, method):
    """They start as the base, and all that they train gets a gradient; what is trained are the norms of the stream."""
    from litgpt.checkpoint import load_weights

    with torch.device("meta"):
        model = GPT(Checkpoint(base).config)
    method.apply(model)
    load_weights(model, Checkpoint(base), torch.float32, CPU)
    text = ids(30)
    assert_close(model(text), Source.open(base).model(torch.float32, CPU)(text), 1e-5)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in named.values():
        p.data += 0.1
    torch.nn.functional.cross_entropy(model(text)[0, :-1], text[0, 1:]).backward()
    assert not [n for n, p in named.items() if p.grad is None or not p.grad.any()]
    pretrained = {n.rpartition(".")[0].rpartition(".")[2] for n in named if "adapter_" not in n and "prefix" not in n}
    norms = {"norm_1", "norm_2", "post_attention_norm", "post_mlp_norm", "ln_f"} & {
        n.rpartition(".")[0].rpartition(".")[2] for n, _ in model.named_parameters()
    }
    assert pretrained == (norms if isinstance(method, LLaMAAdapterV2) else set())
