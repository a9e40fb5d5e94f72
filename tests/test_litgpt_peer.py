"""LitGPT itself, where it is installed: its folders give here what they give there, and ours there what they give here.

`LITGPT_PEER` is the path of a python that has LitGPT 0.5.13; without it these tests skip.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.methods.model_source import ModelSource
from tests.conftest import make_rows, save_llama
from tests.families import save_random
from tests.lit import MODELS, config_fields
from tests.litgpt_peer import IDS
from tests.test_lit_folder import assert_same, command

PEER = os.environ.get("LITGPT_PEER", "")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PEER, reason="LITGPT_PEER is not set: no LitGPT to compare with"),
]
SMALL = {"padded_vocab_size": 300, "vocab_size": 300, "block_size": 128}
GEMMA = {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True, "head_size": 12}
GEMMA |= {"post_attention_norm": True, "post_mlp_norm": True, "attention_scores_scalar": 20, "sliding_window_size": 9}
ROPE_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
TWO_ROPES = {"rope_base": 1000000, "rope_local_base_freq": 10000, "rope_adjustments": {"factor": 8.0}}
CASES: dict[str, dict[str, Any]] = {
    **{model: config_fields(model) for model in MODELS},
    "llama3": config_fields("llama")
    | {"rope_condense_ratio": 1, "rope_base": 500000}
    | {
        "rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
    },
    "phi": config_fields("gpt_neox") | {"shared_attention_norm": True, "lm_head_bias": True, "rotary_percentage": 0.5},
    "falcon 7b": config_fields("falcon") | {"n_query_groups": 1, "shared_attention_norm": True},
    "gemma2": config_fields("llama")
    | GEMMA
    | {"name": "Gemma-2-tiny", "attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
    | {"rope_condense_ratio": 1, "sliding_window_indices": [1, 0, 1]},
    "gemma3": config_fields("llama")
    | GEMMA
    | {"name": "Gemma-3-tiny", "norm_qk": True, "sliding_window_indices": [1, 1, 0], "rope_indices": [1, 1, 0]}
    | {
        "rope_condense_ratio": 1,
        "rope_base": 1000000,
        "rope_local_base_freq": 10000,
        "rope_adjustments": {"factor": 8.0},
    },
    "neighbors rotate": config_fields("llama") | {"rope_interleave": True, "head_size": 12},
    "qwen3": config_fields("llama") | {"norm_qk": True, "head_size": 12},
    "olmo": config_fields("llama") | {"name": "OLMo-tiny", "norm_class_name": "LayerNorm"},
    "olmo2": config_fields("llama")
    | {"name": "OLMo-2-tiny", "norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False}
    | {"post_attention_norm": True, "post_mlp_norm": True},
    "qwen3_moe": config_fields("mixtral") | {"norm_qk": True, "moe_intermediate_size": 20, "sliding_window_size": None},
}
LORA = {"lora_r": 3, "lora_alpha": 3, "lora_dropout": 0.0, "lora_query": True, "lora_key": False, "lora_value": True}
LORA |= {"lora_projection": True, "lora_mlp": True, "lora_head": True}


def run_peer(*words: object, cwd: Path | None = None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([PEER, *map(str, words)], env=environment, cwd=cwd or "/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def peer(*commands: list) -> None:
    run_peer(Path(__file__).with_name("litgpt_peer.py"), json.dumps(commands, default=str))


def there(kind: str, base: Path, folder: Path, tmp_path: Path, vocabulary: int = 290) -> torch.Tensor:
    peer(["logits", kind, base, folder, tmp_path / "logits.pt", vocabulary])
    return torch.load(tmp_path / "logits.pt")


def here(folder: Path, merged: bool = True, ids: torch.Tensor = IDS) -> torch.Tensor:
    return ModelSource.open(folder, merged=merged).model(torch.float32, torch.device("cpu"))(ids)


@pytest.mark.parametrize("model", CASES)
def test_its_folders(model, tmp_path):
    """Adapters too, since the rows that LitGPT takes for their prefixes are taken here."""
    base = tmp_path / "base"
    commands = [["make", base, CASES[model] | SMALL], ["logits", "base", base, base, tmp_path / "base.pt", 290]]
    for kind in ("lora", "adapter", "adapter_v2"):
        commands.append(["adapter", kind, base, tmp_path / kind, LORA if kind == "lora" else {}])
        commands.append(["logits", kind, base, tmp_path / kind, tmp_path / f"{kind}.pt", 290])
    peer(*commands)
    assert_same(here(base), torch.load(tmp_path / "base.pt"))
    for kind in ("lora", "adapter", "adapter_v2"):
        assert_same(here(tmp_path / kind), torch.load(tmp_path / f"{kind}.pt"), 2e-5)


@pytest.mark.parametrize("case", [tuple(MODELS[model][:2]) for model in MODELS], ids=" ".join)
def test_our_folders(case, tmp_path, capsys):
    folder = save_random(tmp_path / "model", *case)
    assert command(capsys, "convert_to_litgpt", folder)[0] == 0
    assert_same(there("base", folder, folder, tmp_path, 190), here(folder, ids=IDS.remainder(190)))


def test_our_merged_folder(tmp_path, tokenizer_file, rows_file, capsys):
    base = save_llama(tmp_path / "base", tokenizer_file)
    words = ["--data", "JSON", "--data.json_path", rows_file, "--train.max_steps", 3, "--optimizer.lr", 0.02]
    words += ["--out_dir", tmp_path / "out", "--accelerator", "cpu", "--precision", "32-true", "--lora_mlp", "true"]
    assert command(capsys, "finetune", "lora", base, *words, "--eval.max_new_tokens", "null")[0] == 0
    merged = tmp_path / "merged"
    assert command(capsys, "merge_lora", tmp_path / "out" / "final", "--out_dir", merged)[0] == 0
    assert command(capsys, "convert_to_litgpt", merged)[0] == 0
    assert_same(there("base", merged, merged, tmp_path), here(merged))


@pytest.mark.parametrize("model", ["llama", "gpt_neox", "phi3"])
def test_what_it_finetuned(model, tmp_path, tokenizer_file, capsys):
    """Four steps of each of its commands, started from a folder that it made, and merged here."""
    base = tmp_path / "base"
    peer(["make", base, CASES[model] | SMALL])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    shutil.copyfile(tokenizer_file, base / "tokenizer.json")
    (base / "tokenizer_config.json").write_text(json.dumps(tokens))
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(40)))
    for method in ("full", "lora", "adapter", "adapter_v2"):
        words = [
            "--data",
            "JSON",
            "--data.json_path",
            "rows.json",
            "--data.val_split_fraction",
            0.2,
            "--out_dir",
            method,
        ]
        words += ["--train.epochs", 1, "--train.max_steps", 4, "--train.global_batch_size", 4, "--precision", "32-true"]
        words += ["--train.micro_batch_size", 4, "--train.max_seq_length", 128, "--train.lr_warmup_steps", 1]
        words += ["--optimizer", '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}']
        if method == "lora":
            words += ["--lora_mlp", "true", "--lora_head", "true", "--lora_projection", "true"]
        run_peer("-m", "litgpt", f"finetune_{method}", base, *words, cwd=tmp_path)
        final = tmp_path / method / "final"
        kind, under = ("base", final) if method == "full" else (method, base)
        expected = there(kind, under, final, tmp_path)
        assert_same(here(final), expected)
        assert (here(base) - expected).abs().max() > 1e-3
        assert ModelSource.open(final).style().name == "alpaca"
    assert_same(here(tmp_path / "lora" / "final", merged=False), here(tmp_path / "lora" / "final"))
    words = ["merge_lora", tmp_path / "lora" / "final", "--out_dir", tmp_path / "merged"]
    code, _, err = command(capsys, *words, "--pretrained_checkpoint_dir", base)
    assert code == 0, err
    assert_same(here(tmp_path / "merged"), here(tmp_path / "lora" / "final"))
