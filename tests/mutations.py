"""Folders with every small file that the commands read, and seeded damage to these files."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from litgpt.__main__ import main
from tests.conftest import make_rows, save_llama
from tests.runs import go, words

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LORA = ("--train.max_steps", 2, "--train.save_interval", 1, "--eval.interval", 10, "--train.lr_warmup_steps", 0)


@dataclass(frozen=True)
class Scene:
    """A folder, and what reads it.

    Args:
        folder: Copied for each mutation.
        files: The names of its small files.
        commands: Makes the words of the commands from the copy and an empty folder for results.
    """

    folder: Path
    files: tuple[str, ...]
    commands: Callable[[Path, Path], list[list[str]]]


def run(command: list[str], capsys: Any) -> tuple[int, str]:
    """The exit code of a command in this process, and what it wrote to stderr, with the problems that a check found."""
    capsys.readouterr()
    try:
        main(command)
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, err + "".join(line for line in out.splitlines(keepends=True) if line.startswith("ERROR: "))


def make_scenes(folder: Path, tokenizer_file: Path) -> dict[str, Scene]:
    """One of each kind, made in `folder`."""
    base = save_llama(folder / "base", tokenizer_file, shards=True, max_position_embeddings=64)
    edit(base / "tokenizer_config.json", lambda f: f | tokens(base))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)

    old = save_llama(folder / "old", tokenizer_file)  # with the files of older tokenizers
    backend = json.loads((old / "tokenizer.json").read_text())
    (old / "vocab.json").write_text(json.dumps(backend["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in backend["model"]["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (old / "tokenizer.json").unlink()
    (old / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (old / "added_tokens.json").write_text(json.dumps({"<s>": 0, "</s>": 1}))
    chat = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TEMPLATE}]
    edit(old / "tokenizer_config.json", lambda f: f | {"chat_template": chat, "tokenizer_class": "GPT2Tokenizer"})

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    lora, prefix = folder / "lora", folder / "prefix"
    assert go("lora", base, rows, lora, *LORA, "--train.pause_after", 2) == 75
    paused = Path(shutil.copytree(lora, folder / "paused"))
    assert go("lora", base, rows, lora, *LORA, "--resume", "true") == 0
    assert go("adapter", base, rows, prefix, *LORA, "--adapter_start_layer", 1) == 0

    lit = Path(shutil.copytree(base, folder / "lit"))
    main(["convert_to_litgpt", str(lit)])
    for path in lit.glob("model*safetensors*"):
        path.unlink()
    shutil.copy(lora / "final" / "prompt_style.yaml", lit)
    lit_lora = folder / "lit_lora"
    lit_lora.mkdir()
    width = 32
    state = {
        f"transformer.h.{i}.attn.qkv.lora_{x}": torch.zeros(4, width) if x == "A" else torch.zeros(width + 16, 2)
        for i in range(2)
        for x in "AB"
    }
    torch.save({"model": state}, lit_lora / "lit_model.pth.lora")
    settings = {"checkpoint_dir": str(base), "lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_value": True}
    (lit_lora / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))

    config = folder / "config"
    config.mkdir()
    shutil.copy(lora / "hyperparameters.yaml", config / "recipe.yaml")
    (config / "other.yaml").write_text(
        "train: {max_steps: 2, micro_batch_size: 2}\nlora_r: 4\n"
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.001, betas: [0.9, 0.95]}}\n"
        f"data: {{class_path: JSON, init_args: {{json_path: {rows}, columns: {{output: a}}}}}}\nlora_layers: [0, 1]\n"
    )
    data = folder / "data"
    data.mkdir()
    some = make_rows(4)
    (data / "rows.json").write_text(json.dumps(some))
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []}] * 3
    (data / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (data / "rows.csv").write_text("instruction,output\n" + "a,b\n" * 4)
    (data / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 2)
    (data / "answers.jsonl").write_text('{"prompt": "a", "answer": "b", "finish_reason": "length"}\n')

    prompt = ["--prompt", "a", "--max_new_tokens", "1", "--accelerator", "cpu"]

    def of_model(copy: Path, out: Path) -> list[list[str]]:
        check = ["data_check", str(copy), "--data", "JSON", "--data.json_path", str(rows)]
        return [
            ["generate", str(copy), *prompt],
            ["validate", str(copy), "--accelerator", "cpu"],
            [*check, "--data.prompt_style", "chatml"],
        ]

    def of_adapter(copy: Path, out: Path) -> list[list[str]]:
        return [*of_model(copy, out)[:2], ["merge_lora", str(copy), "--out_dir", str(out / "merged")]]

    def of_run(copy: Path, out: Path) -> list[list[str]]:
        return [words("lora", base, rows, copy, *LORA, "--resume", "true")]

    def of_config(copy: Path, out: Path) -> list[list[str]]:
        return [
            ["finetune", "lora", str(base), "--config", str(copy / name), "--print_config"]
            for name in ("recipe.yaml", "other.yaml")
        ] + [["pretrain", "--config", str(copy / "other.yaml"), "--print_config"]]

    def of_data(copy: Path, out: Path) -> list[list[str]]:
        check = ["data_check", str(base), "--data", "JSON", "--data.json_path"]
        names = ("rows.json", "rows.jsonl", "chats.jsonl", "rows.csv")
        answer = ["generate", str(base), "--prompts", str(copy / "prompts.jsonl"), "--out", str(copy / "answers.jsonl")]
        return [*([*check, str(copy / name)] for name in names), [*answer, *prompt[2:]]]

    tokenizer = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    result = ("prompt_style.yaml", "hyperparameters.yaml", "parity.json", "checksums.json")
    more = "additional_chat_templates/tool_use.jinja"
    saved = [f"step-000002/{name}" for name in ("checksums.json", "adapter_config.json", "prompt_style.yaml")]
    return {
        "base": Scene(
            base,
            ("config.json", "tokenizer.json", "model.safetensors.index.json", *tokenizer, more),
            of_model,
        ),
        "old": Scene(
            old,
            ("config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", *tokenizer[:1]),
            of_model,
        ),
        "lora": Scene(lora / "final", ("adapter_config.json", "tokenizer.json", *tokenizer[:2], *result), of_adapter),
        "prefix": Scene(prefix / "final", ("adapter_config.json", *result), of_adapter),
        "lit": Scene(lit, ("model_config.yaml", "config.json", "prompt_style.yaml"), of_model),
        "lit_lora": Scene(lit_lora, ("hyperparameters.yaml",), of_adapter),
        "paused": Scene(
            paused,
            ("metrics.csv", ".litgpt.json", "hyperparameters.yaml", *saved),
            of_run,
        ),
        "config": Scene(config, ("recipe.yaml", "other.yaml"), of_config),
        "data": Scene(data, tuple(sorted(p.name for p in data.iterdir())), of_data),
    }


def tokens(base: Path) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    listed = {str(i): {"content": text, **flags} for i, text in enumerate(("<s>", "</s>"))}
    more = {"eos_token": {"content": "</s>", **flags}, "additional_special_tokens": ["<s>"], "extra_special_tokens": {}}
    return {"added_tokens_decoder": listed, "add_bos_token": True, "chat_template": TEMPLATE, **more}


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


# damage

HUGE = "\ue000 5,000 digits \ue000"  # replaced in the text
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31 - 1, 10**6, 2**31, 2**63, 10**30, 10**99, HUGE, 1.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "\0", "\ud800", "\ufeff", "😀" * 50, "a" * 100_000),
    *("../../etc/passwd", "/dev/zero", "1", "nan", "1e999", "-1", "on", "null", "[[[[", "{a: 1}", "{{ 1 / 0 }}"),
    *("2024-01-01", "!!int 3", "*a", "%", "<s>", "a\nb", "https://user:pass@127.0.0.1:1/x"),
    *([], [[]], {}, {"a": 1}, [None], [1, "a"], [1] * 1000, {"content": 5}, {"class_path": "os.system"}, [{}]),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object with every key or index in it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            yield from ((value, key) for key in keys)
            waiting += [value[key] for key in keys]


def damaged(data: bytes, name: str, draw: random.Random) -> Optional[bytes]:
    """The content of a file after one mutation; None for a folder in its place."""
    kind = draw.random()
    if kind < 0.02:
        return draw.choice((b"", b"\n", b"\xff\xfe{\0}\0", b"\0" * 100, b"null", b"[" * 100_000, b'{"a":' * 100_000))
    if kind < 0.03:
        return None
    if kind < 0.35:
        return bytewise(data, draw)
    structured = structural(data, name, draw)
    return bytewise(data, draw) if structured is None else structured


def bytewise(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data or b" ")
    at = draw.randrange(len(found))
    match draw.randrange(6):
        case 0:
            for _ in range(draw.randint(1, 4)):
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + draw.randint(1, 40)]
        case 3:
            found[at:at] = draw.choice((b"\0", b"\xff", b'"', b"}", b"[", b"\\ud800", b": ", b"9" * 5000, b"&a [*a]"))
        case 4:
            found[at:at] = found[at : at + draw.randint(1, 200)]
        case 5:
            found[at:at] = draw.choice((b"[", b"{", b"(", b"- ", b"{% if 1 %}", b"{{ (")) * 10 ** draw.randint(1, 5)
    return bytes(found)


def structural(data: bytes, name: str, draw: random.Random) -> Optional[bytes]:
    """A change to one value of a JSON or YAML file; None for another file."""
    lines = data.decode().splitlines()
    line = draw.randrange(len(lines)) if name.endswith(".jsonl") else None
    try:
        if name.endswith((".json", ".jsonl")):
            value = [json.loads(data.decode() if line is None else lines[line])]
        elif name.endswith(".yaml"):
            value = [yaml.safe_load(data)]
        else:
            return None
    except ValueError:
        return None
    found = list(places(value))
    holder, key = draw.choice(found)
    match draw.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            names = [v for v in VALUES if isinstance(v, str)]
            holder[draw.choice(names) if draw.random() < 0.5 else str(key).upper()] = holder.pop(key)
        case 2:
            other, where = draw.choice(found)
            holder[key] = other[where] if not isinstance(other[where], (dict, list)) else str(other[where])[:100]
        case 3:
            for _ in range(draw.choice((1, 3, 50, 95, 105, 400))):
                holder[key] = [holder[key]] if draw.random() < 0.5 else {"a": holder[key]}
        case _:
            holder[key] = draw.choice(VALUES)
    text = json.dumps(value[0], default=str, skipkeys=True).replace(json.dumps(HUGE), "9" * 5000)
    if line is not None:
        lines[line] = text
        text = "\n".join(lines)
    return text.encode()


@contextmanager
def put(scene: Scene, name: str, data: Optional[bytes], folder: Path) -> Iterator[Path]:
    """A copy of the scene's folder in which one file is replaced."""
    copy = Path(shutil.copytree(scene.folder, folder / scene.folder.name))
    try:
        file = copy / name
        file.unlink()
        file.mkdir() if data is None else file.write_bytes(data)
        yield copy
    finally:
        shutil.rmtree(copy)
