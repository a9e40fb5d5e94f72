"""`litgpt export --to gguf-lora` and `--to ollama`: an adapter over a file of its base, and templates in Go's form."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.commands.generate import main as generate
from litgpt.export.llama_cpp import llama_cpp
from litgpt.export.ollama import turns_of
from litgpt.methods.lora import LoRA
from litgpt.methods.model_source import ModelSource
from litgpt.text.prompts import choose_style, make_template
from litgpt.text.styles import STYLES
from tests.conftest import save_llama
from tests.families import FAMILIES
from tests.test_export import (
    BOUNDS,
    GELU,
    QWEN3_5,
    SMOLLM3,
    export,
    field,
    in_llama_cpp,
    largest_difference,
    random_model,
    tensors,
)
from tests.test_lora import save, with_lora
from tests.test_template_matrix import NAMES, TEMPLATES

gguf = pytest.importorskip("gguf", reason="the extra `export` is not installed")
ALL = {"query": True, "key": True, "value": True, "projection": True, "mlp": True}
CHANGES: dict[str, dict[str, Any]] = {  # to what GGUF can express
    "dots1": {"sliding_window": None, "num_key_value_heads": 4},
    "gpt_neox": {"hidden_size": 64},
    "ernie4_5": {"use_bias": False},
    "falcon": {"bias": False},
    "phi": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12},
    "olmo": {"attention_bias": False},
    "olmoe": {"clip_qkv": None, "norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "smollm3": SMOLLM3,
}
VARIANTS = {"exaone4": "no windows", "olmo": "clipped", "qwen3": "windows", "phi3": "window"}
WITHOUT = (
    "gemma3",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "olmo3",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe_lite",
)  # as others; OLMo 3 is OLMo 2 with windows


def adapter_over(base: Path, folder: Path, **options: Any) -> Path:
    lora = LoRA(**{"r": 3, "alpha": 5, **ALL, **options})
    return save(with_lora(base, lora), lora, base, folder)


@in_llama_cpp
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.long] * (f != "llama")) for f in FAMILIES if f not in WITHOUT],
)
def test_families(family, tokenizer_file, tmp_path):
    """llama.cpp with the adapter over its base answers as the adapter does here."""
    variant = VARIANTS.get(family, next(iter(FAMILIES[family])))
    base = random_model(tmp_path / "base", tokenizer_file, family, variant, CHANGES.get(family, {}))
    folder = adapter_over(base, tmp_path / "adapter", targets="all-linear")
    assert export(base, tmp_path / "base.gguf", "--type", "f32", "--parity", "tensors") == 0
    assert export(folder, tmp_path / "lora.gguf", "--to", "gguf-lora") == 0
    bound = 3e-2 if family in GELU else BOUNDS.get(family, 1e-4)
    assert largest_difference(folder, tmp_path / "base.gguf", lora=tmp_path / "lora.gguf") < bound
    assert largest_difference(base, tmp_path / "base.gguf") < bound


@in_llama_cpp
@pytest.mark.long
@pytest.mark.parametrize("options", [{"variant": "rslora"}, {"r": 8, "alpha": 3}, {"head": True}, {"mlp": False}])
def test_scales_and_places(options, tokenizer_file, tmp_path):
    base = save_llama(tmp_path / "base", tokenizer_file, tie_word_embeddings=False)
    folder = adapter_over(base, tmp_path / "adapter", **options)
    assert export(base, tmp_path / "base.gguf", "--type", "f32", "--parity", "tensors") == 0
    assert export(folder, tmp_path / "lora.gguf", "--to", "gguf-lora") == 0
    assert largest_difference(folder, tmp_path / "base.gguf", lora=tmp_path / "lora.gguf") < 1e-4


def test_patterns_of_peft(tokenizer_file, tmp_path):
    """Modules with a rank and an alpha of their own: llama.cpp's alpha / r times B A is the update that is merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_llama(tmp_path / "base", tokenizer_file)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["o_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"o_proj": 1},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "lora.gguf", "--to", "gguf-lora", "--parity", "tensors") == 0
    found, alpha = tensors(tmp_path / "lora.gguf"), field(tmp_path / "lora.gguf", "adapter.lora.alpha")
    for name, ours in {"attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj"}.items():
        a, b = (torch.tensor(found[f"blk.1.{name}.weight.lora_{end}"].data) for end in "ab")
        module = model.get_submodule(f"base_model.model.model.layers.1.{ours}")
        torch.testing.assert_close(b @ a * alpha / len(a), module.get_delta_weight("default"))
    assert len(found) == 2 * 2 * 2 and field(tmp_path / "lora.gguf", "general.type") == "adapter"


@pytest.mark.parametrize(
    ("tied", "options", "named"),
    [(False, {"variant": "dora"}, "DoRA"), (True, {"head": True}, "head"), (False, None, "lm_head")],
)
def test_what_llama_cpp_cannot_apply(tied, options, named, tokenizer_file, tmp_path, capsys):
    base = save_llama(tmp_path / "base", tokenizer_file, tie_word_embeddings=tied)
    folder = adapter_over(base, tmp_path / "adapter", **options or {})
    if options is None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": ["lm_head"]}))
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "adapter_model.safetensors")
        weights["base_model.model.lm_head.weight"] = torch.ones(300, 32)
        save_file(weights, folder / "adapter_model.safetensors")
    assert export(folder, tmp_path / "lora.gguf", "--to", "gguf-lora") == 2
    err = capsys.readouterr().err
    assert named in err and "--to gguf" in err and not (tmp_path / "lora.gguf").exists()
    assert export(folder, tmp_path / "folder", "--to", "ollama", "--merge", "false") == 2
    assert export(base, tmp_path / "lora.gguf", "--to", "gguf-lora") == 2
    assert "not an adapter folder" in capsys.readouterr().err


@in_llama_cpp
@pytest.mark.long
def test_over_a_quantized_base(tmp_path, capsys):
    """The answers of a trained adapter."""
    words = "cat dog sun moon tree red blue fish bird car".split()
    rows = [{"instruction": f"Say {word} twice.", "output": f"{word} {word}!"} for word in words * 12]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--train.epochs", 20, "--optimizer.lr", 3e-3, "--lora_r", 16, "--out_dir", tmp_path / "out"]
    flags += ["--lora_mlp", "true", "--lora_key", "true", "--lora_projection", "true"]
    main(["finetune", "lora", str(PICO), str(tmp_path / "rows.json"), *map(str, flags)])
    folder = tmp_path / "out" / "final"
    assert export(folder, tmp_path / "m", "--to", "ollama", "--merge", "false", "--type", "q8_0") == 0
    capsys.readouterr()
    for word in words[:4]:
        generate(folder, prompt=f"Say {word} twice.", temperature=0.0)
        answer = capsys.readouterr().out.strip()
        with llama_cpp(tmp_path / "m" / "out-q8_0.gguf", 256, lora=tmp_path / "m" / "out-lora.gguf") as there:
            prompt = there.render(f"Say {word} twice.")
            assert there.ask("/completion", prompt=prompt, n_predict=50, temperature=0.0)["content"].strip() == answer


# templates in Go's form


def go(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Render the subset of Go's text/template that `Turns.go` uses, as Ollama does."""
    parts = re.split(r'(\{\{(?:"(?:[^"\\]|\\.)*"|[^"])*?\}\})', template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def value(action: str, i: int) -> str:
        if action == ".System":
            return system
        return messages[i]["content"] if action == "$m.Content" else json.loads(action)

    def holds(condition: str, i: int) -> bool:
        if condition == ".System":
            return bool(system)
        if match := re.fullmatch(r'eq \$m\.Role "(\w+)"', condition):
            return messages[i]["role"] == match[1]
        last = i == len(messages) - 1
        return {"$last": last, "not $last": not last}[condition]

    def run(i: int, at: int, on: bool) -> tuple[str, int, str]:
        """From a place to the end of its block: the text, the place after it, and the action that ends the block."""
        text = ""
        while at < len(parts):
            part, at = parts[at], at + 1
            if not part.startswith("{{"):
                assert not part
                continue
            action = part[2:-2].strip()
            if action == "end" or action.startswith("else"):
                return text, at, action
            if action.startswith("range"):
                start = at
                for j in range(len(messages)):
                    more, at, _ = run(j, start, on)
                    text += more
            elif action.startswith("if "):
                is_done, action = False, f"else {action}"
                while action != "end":
                    chosen = not is_done and (action == "else" or holds(action.removeprefix("else if "), i))
                    is_done = is_done or chosen
                    more, at, action = run(i, at, on and chosen)
                    text += more if chosen else ""
            elif not action.startswith("$last :="):
                text += value(action, i) if on else ""
        return text, at, "end"

    return run(0, 0, True)[0]


def conversations(with_system: bool) -> Iterator[list[dict[str, str]]]:
    turns = [
        ("user", "Hi {{ there }}"),
        ("assistant", 'A "b"'),
        ("user", "Why?\nSay."),
        ("assistant", "So"),
        ("user", "!"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    for n in (1, 3, 5):
        yield [*([{"role": "system", "content": "Be brief."}] if with_system else []), *messages[:n]]


def styles() -> Iterator[Any]:
    yield from STYLES
    yield "chatml"
    for name in NAMES:
        yield pytest.param(f"trl {name}", marks=pytest.mark.long)


@pytest.mark.parametrize("name", styles())
def test_templates_in_go(name, llama):
    """Go's form renders what the style renders, or there is none."""
    if name.startswith("trl "):
        text = (TEMPLATES / f"{name[4:]}.jinja").read_text(encoding="utf-8")
        style = make_template({"default": text}, {"bos_token": "<s>", "eos_token": "</s>"}, name)
    else:
        style = choose_style(name, llama)
    found, n = turns_of(style, "<s>"), 0
    for with_system in (False, True):
        for messages in conversations(with_system):
            if found is None or (with_system and found.system is None) or (found.answer is None and len(messages) > 2):
                continue
            assert go(found.go(), messages) == found.render(messages)
            ours = style.prompt(messages).removeprefix("<s>")
            assert found.render(messages) == ours or "think" in ours, name
            n += 1
    assert n or name.startswith("trl ")


def test_modelfile(tmp_path, capsys):
    shutil.copytree(PICO, tmp_path / "m")
    (tmp_path / "m" / "LICENSE").write_text("Do what you like.\n")
    fields = {"eos_token_id": [2, 5], "temperature": 0.3, "repetition_penalty": 1.1}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(fields))
    assert export(tmp_path / "m", tmp_path / "ollama", "--to", "ollama", "--type", "q8_0", "--parity", "tensors") == 0
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert text.startswith("FROM ./m-q8_0.gguf\n") and (tmp_path / "ollama" / "m-q8_0.gguf").is_file()
    expected = ['stop "<|end|>"', 'stop "</s>"', "temperature 0.3", "repeat_penalty 1.1"]
    assert all(f"PARAMETER {line}\n" in text for line in expected)
    assert 'LICENSE """Do what you like.\n"""' in text and "ADAPTER" not in text
    template = re.search('TEMPLATE """(.*?)"""\n', text, re.DOTALL)
    assert template and go(template[1], [{"role": "user", "content": "Hi"}]) == "<|user|>Hi<|end|><|assistant|>"
    out = capsys.readouterr().out
    assert "ollama create m -f" in out and str(tmp_path / "ollama" / "Modelfile") in out
    (tmp_path / "ollama" / "mine.txt").write_text("mine")
    assert export(tmp_path / "m", tmp_path / "ollama", "--to", "ollama") == 2  # it would be lost


def test_a_default_system_message(llama):
    """Qwen 2.5 says who it is; the Modelfile says it too, so that it can be changed."""
    text = (
        "{% if messages[0]['role'] != 'system' %}S:You are kind.\n{% endif %}{% for m in messages %}"
        "{{ {'system': 'S:', 'user': 'U:', 'assistant': 'A:'}[m['role']] + m['content'] + '\n' }}{% endfor %}A:"
    )
    found = turns_of(make_template({"default": text}, {}, "x"), "")
    assert found is not None and found.default_system == "You are kind."
    assert go(found.go(), [{"role": "user", "content": "Hi"}]) == "S:You are kind.\nU:Hi\nA:"


def test_a_template_that_needs_more_than_go(llama):
    sums = make_template(
        {"default": "{{ messages | length }}{{ messages[-1].content }}{{ messages[0].content }}"}, {}, "x"
    )
    assert turns_of(sums, "") is None
    assert ModelSource.open(llama).style() is not None
