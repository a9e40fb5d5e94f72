"""A small file that is damaged, hostile or of another kind ends in one line that names the file, and the field."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.data.row_files import read_rows
from litgpt.errors import UserError
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.storage.files import read_json, read_yaml
from litgpt.text.chat_template import ChatTemplate
from litgpt.train.metrics import FIELDS as METRICS
from litgpt.train.metrics import lines_until
from tests.mutations import Scene, edit, run

FILES = [  # the scene, the file, and which of the scene's commands reads it
    *[("base", name, 0) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")],
    *[("base", name, 0) for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")],
    ("base", "additional_chat_templates/tool_use.jinja", 1),
    *[("old", name, 0) for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")],
    *[("lora", name, 1) for name in ("adapter_config.json", "prompt_style.yaml", "parity.json")],
    ("prefix", "adapter_config.json", 2),
    *[("lit", name, 1) for name in ("model_config.yaml", "config.json", "prompt_style.yaml")],
    ("lit_lora", "hyperparameters.yaml", 0),
    *[("config", name, i) for i, name in enumerate(("recipe.yaml", "other.yaml"))],
    *[("data", name, i) for i, name in enumerate(("rows.json", "rows.jsonl", "chats.jsonl", "rows.csv"))],
]


def put(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def instead(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


FORMS: dict[str, Callable[[Path], Any]] = {
    "nested lists": put(b"[" * 100_000 + b"]" * 100_000),
    "nested objects": put(b'{"a":' * 100_000),
    "nested YAML": put(b"a: " + b"{a: " * 1000 + b"1" + b"}" * 1000),
    "101 levels": put(b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}"),
    "digits": put(b'{"a": ' + b"9" * 5000 + b"}"),
    "empty": put(b""),
    "blank": put(b" \n"),
    "binary": put(b"\x80\0\xff" * 50),
    "UTF-16": put('{"a": 1}'.encode("utf-16")),
    "half a surrogate pair": put(b'{"a": "\\ud800"}'),
    "not an object": put(b"[1]"),
    "text": put(b'"a"'),
    "2 GB": lambda path: os.truncate(path, 2**31),
    "folder": instead(Path.mkdir),
    "pipe": instead(lambda path: os.mkfifo(path)),
    "link to nothing": instead(lambda path: path.symlink_to("nothing")),
    "endless": instead(lambda path: path.symlink_to("/dev/zero")),
}
REPLACED = {"folder", "pipe", "link to nothing", "endless"}
NO_HARM = {  # what a file may well hold
    "merges.txt": {*FORMS} - {"binary", "UTF-16", "2 GB", *REPLACED},
    ".jinja": {*FORMS} - {"binary", "UTF-16", "2 GB", *REPLACED},
    "rows.csv": {*FORMS} - {"empty", "blank", "UTF-16", *REPLACED},
}


def check(scene: Scene, name: str, command: int, form: str, tmp_path: Path, capsys: Any) -> None:
    if form == "2 GB" and scene.folder.name == "data":  # rows may be as many
        return
    if os.name == "nt" and form in REPLACED - {"folder"}:
        return
    copy = Path(shutil.copytree(scene.folder, tmp_path / scene.folder.name))
    FORMS[form](copy / name)
    code, err = run(scene.commands(copy, tmp_path / "out")[command], capsys)
    shutil.rmtree(copy)
    allowed = next((NO_HARM[end] for end in NO_HARM if name.endswith(end)), ())
    last = err.splitlines()[-1] if code else ""
    is_named = Path(name).name in (last if code == 2 else err)
    assert form in allowed or is_named, err
    assert code in (0, 1) or (code == 2 and last.startswith("litgpt: error: ") and "Traceback" not in err), err


@pytest.mark.parametrize(("scene", "name", "command"), FILES, ids=lambda value: str(value))
def test_forms(scene, name, command, scenes, tmp_path, capsys):
    some = list(FORMS)[FILES.index((scene, name, command)) % 5 :: 5]
    for form in some:
        check(scenes[scene], name, command, form, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scene", "name", "command"), FILES, ids=lambda value: str(value))
def test_all_forms(scene, name, command, form, scenes, tmp_path, capsys):
    check(scenes[scene], name, command, form, tmp_path, capsys)


# the fields

TEXT, NUMBER, LIST, OBJECT = "a", 5, [5], {"a": 5}
NOT_TEXT, NOT_OBJECT = [NUMBER, True, LIST, OBJECT], [NUMBER, TEXT, True, LIST]
NOT_TOKEN = [NUMBER, True, LIST, OBJECT, {"content": None}, {"content": [TEXT]}, {"content": TEXT, "special": 1}]
NOT_ID = [TEXT, "5", 1.5, -2, 2**31, True, OBJECT]
NOT_NUMBER = ["5", True, LIST, OBJECT, math.nan, math.inf, -math.inf, 1e999, 10**60]
NOT_COUNT = ["5", True, LIST, OBJECT, 0, -1, 1.5, 2**31, math.nan]
FIELDS: list[tuple[str, str, list, list]] = [  # file, field, values that are refused, values that are not
    *(
        (file, field, [*NOT_ID, [TEXT], [[NUMBER]], [-1]], [0, NUMBER, LIST, [], None, -1])
        for file in ("config.json", "generation_config.json")
        for field in ("bos_token_id", "eos_token_id")
    ),
    *(
        (file, f"{name}_token", NOT_TOKEN, [TEXT, None, {"content": TEXT, "lstrip": False, "__type": "AddedToken"}])
        for file in ("tokenizer_config.json", "special_tokens_map.json")
        for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    ),
    *(
        ("tokenizer_config.json", field, [NUMBER, TEXT, True, [NUMBER], OBJECT], [[], {}, [TEXT], {"a": TEXT}, None])
        for field in ("additional_special_tokens", "extra_special_tokens")
    ),
    (
        "tokenizer_config.json",
        "added_tokens_decoder",
        [*NOT_OBJECT, {"x": {"content": TEXT}}, {"-1": {"content": TEXT}}, {"1" * 20: {"content": TEXT}}]
        + [{"5": token} for token in (*NOT_TOKEN, TEXT, None)],
        [{}, None, {"5": {"content": TEXT}}],
    ),
    (
        "tokenizer_config.json",
        "chat_template",
        [NUMBER, True, LIST, OBJECT, [{}], [{"name": TEXT}], [{"name": TEXT, "template": NUMBER}]],
        [TEXT, None, {"default": TEXT}, [{"name": TEXT, "template": TEXT}]],
    ),
    ("tokenizer_config.json", "tokenizer_class", NOT_TEXT, [TEXT, None]),
    *(
        ("tokenizer_config.json", field, [NUMBER, TEXT, LIST, OBJECT], [True, None])
        for field in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
    ),
    ("added_tokens.json", "a", [TEXT, "5", 1.5, -1, 2**31, True, LIST, OBJECT, None], [0, NUMBER]),
    *(
        (
            f"{kind}.index.json",
            "weight_map",
            [*NOT_OBJECT, None, {"a": NUMBER}, {"a": [TEXT]}, {"a": None}],
            [{"a": "b"}],
        )
        for kind in ("model.safetensors", "pytorch_model.bin")
    ),
    *(("adapter_config.json", field, NOT_TEXT, [TEXT, None]) for field in ("peft_type", "base_model_name_or_path")),
    ("adapter_config.json", "r", NOT_COUNT, [1, None]),
    ("adapter_config.json", "lora_alpha", NOT_NUMBER, [0, 16, 0.5, None]),
    ("adapter_config.json", "rank_pattern", [*NOT_OBJECT, *({"a": n} for n in NOT_COUNT)], [{}, None, {"a": 8}]),
    ("adapter_config.json", "alpha_pattern", [*NOT_OBJECT, *({"a": n} for n in NOT_NUMBER)], [{}, None, {"a": 0.5}]),
    ("adapter_config.json", "target_modules", [NUMBER, True, LIST, OBJECT], [TEXT, [TEXT], None]),
    ("adapter_config.json", "use_dora", [NUMBER, TEXT, LIST, OBJECT], [False, None]),
    ("adapter_config.json", "adapter_prompt_length", NOT_COUNT, [10, None]),
    ("adapter_config.json", "adapter_start_layer", NOT_ID, [0, None]),
    ("parity.json", "computed", [*NOT_TEXT, TEXT, None], ["F32", "BF16"]),
    ("parity.json", "quantize", NOT_TEXT, ["bnb.nf4", None]),
    ("parity.json", "special", [NUMBER, TEXT, None], [True]),
    ("parity.json", "time", NOT_TEXT, ["2026-01-01", None]),
    *(("parity.json", f"prompts.0.{f}", [NUMBER, TEXT, [TEXT], [-1], [1.5], None], [[1]]) for f in ("ids", "greedy")),
    ("parity.json", "prompts.0.top_logits", [NUMBER, TEXT, [TEXT], [math.nan], [math.inf], None], [[1.5, -2]]),
    *(
        (file, "files", [*NOT_OBJECT, None, {"a": NUMBER}, {"a": [TEXT]}, {"a": [1.5]}], [{}, {"a": [1, 2]}])
        for file in ("checksums.json", ".litgpt.json")
    ),
    ("checksums.json", "step", NOT_ID, [0, None]),
    ("hyperparameters.yaml", "lora_r", NOT_COUNT, [1, None]),
    ("hyperparameters.yaml", "lora_alpha", NOT_NUMBER, [16, 0.5, None]),
    ("hyperparameters.yaml", "checkpoint_dir", NOT_TEXT, [TEXT, None]),
    *(("prompt_style.yaml", field, NOT_TEXT, [TEXT, None]) for field in ("prompt_style", "template", "tool_use")),
    ("prompt_style.yaml", "variables", [*NOT_OBJECT, {"a": NUMBER}, {5: TEXT}], [{}, None, {"a": TEXT}]),
]
WHOLE: dict[str, Any] = {  # what files must have beside the field
    "parity.json": {
        **{"computed": "F32", "stored": ["F32"], "special": True},
        "prompts": [{"prompt": "", "text": "", "ids": [1], "top_ids": [1], "top_logits": [1.0], "greedy": []}],
    },
    **{name: {"files": {}} for name in ("checksums.json", ".litgpt.json")},
}


def written(file: Path, field: str, value: Any) -> None:
    fields = json.loads(json.dumps(WHOLE.get(file.name, {})))
    target, (*above, leaf) = fields, field.split(".")
    for key in above:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[leaf] = value
    file.write_text(yaml.safe_dump(fields) if file.suffix == ".yaml" else json.dumps(fields))


@pytest.mark.parametrize(("file", "field", "bad", "good"), FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_fields(file, field, bad, good, tmp_path):
    path = tmp_path / file
    read: Callable[[Path], Any] = read_yaml if path.suffix == ".yaml" else read_json
    for value in good:
        written(path, field, value)
        read(path)
    for value in bad:
        written(path, field, value)
        with pytest.raises(UserError) as e:
            read(path)
        assert str(path) in str(e.value) and field.rpartition(".")[2] in str(e.value), value


def test_a_sentence_names_the_field_within(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {"7": {"content": "a", "lstrip": "yes"}}}))
    with pytest.raises(UserError, match=r'added_tokens_decoder\."7"\.lstrip: expected .* got "yes"'):
        read_json(path)
    path.write_text(json.dumps({"eos_token": {"content": "x" * 10**6, "special": "x" * 10**6}}))
    with pytest.raises(UserError) as e:
        read_json(path)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize("name", ["tokenizers", "models"])
def test_published_files_are_read(name, real_data):
    files = [p for p in (real_data / name).rglob("*.json") if p.name not in ("tokenizer.json", "vocab.json")]
    assert files
    for file in files:
        read_json(file)


# YAML

LAUGHS = "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a [x]\n" + LAUGHS, None),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}\n", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &a\n  b: *a\n", None),
        ("a: &a 1\nb: *a\n", {"a": 1, "b": 1}),
        ("a: *b\n", None),
        ("".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 [1]\n" for i in range(200)), None),
        ("a: !!python/object/apply:os.getcwd []\n", None),
        ("a: !!binary aGVsbG8=\n", None),
        ("a: !mine 1\n", None),
        ("a: 2024-01-01\n2024-13-45: 1\n", {"a": "2024-01-01", "2024-13-45": 1}),
        ("[1]: 1\n", None),
        ("a: 0x" + "f" * 200, None),
        ("a: 1" + ":59" * 200, None),
        ("a: 0b_\n", None),
        ("a: " + "9" * 101, None),
        ("a: '" + "9" * 101 + "'", {"a": "9" * 101}),
        ('a: "\\ud800"\n', None),
        ("a: [" + "1, " * 100_000 + "1]", None),
        ("a: 1\n---\nb: 1\n", None),
        ("a: \x01\n", None),
    ],
    ids=range(20),
)
def test_yaml(text, value, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    if value is not None:
        assert read_yaml(path) == value
        return
    with pytest.raises(UserError, match=str(path)):
        read_yaml(path)


@pytest.mark.parametrize("option", ["--seed", "--lora_layers", "--data", "--optimizer", "--train", "--train.max_norm"])
@pytest.mark.parametrize("text", ["[" * 1000, "!!timestamp x", "9" * 5000, "[&a [x], " + "&b [*a, *a], " * 50 + "1]"])
def test_texts_that_are_read_as_yaml(option, text, tmp_path, capsys):
    """By jsonargparse, on the command line and within a config file."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({option[2:].partition(".")[0]: text}))
    for words in ([option, text], ["--config", str(tmp_path / "c.yaml")]):
        code, err = run(["finetune", "lora", "pico", *words, "--print_config"], capsys)
        assert code == 2 and err.count("\n") == 1, err


@pytest.mark.parametrize("prompt", ["9" * 101, "!!timestamp x", "- " * 101, "{a: b}", "&a [*a]"])
def test_a_prompt_may_look_like_anything(prompt, capsys):
    main(["generate", "pico", "--prompt", prompt, "--max_new_tokens", "1"])
    assert prompt in capsys.readouterr().err


# numbers that would take all memory or time, and expressions


def with_field(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda found: found | fields)


ROPE = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LARGE: list[tuple[str, Callable[[Path], None]]] = [  # the scene, and what is done to it
    *(
        ("base", with_field("config.json", **{name: number}))
        for name in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        for number in (9_999, 10**9, 2**31 - 1, 2**31, 10**90)
    ),
    ("base", with_field("config.json", head_dim=2**23)),
    ("base", with_field("config.json", max_position_embeddings=10**90)),
    *(("base", with_field("config.json", rms_norm_eps=value)) for value in (math.nan, math.inf, 1e39, "1")),
    *(
        ("base", with_field("config.json", rope_parameters=ROPE | {name: value}))
        for name in ROPE.keys() - {"rope_type"}
        for value in (0, -1, math.nan, math.inf, 10**90, "1", [1])
    ),
    ("base", with_field("config.json", rope_parameters=ROPE | {"rope_theta": 1.0})),
    ("base", with_field("config.json", rope_parameters=ROPE | {"beta_fast": -1.0})),
    ("base", with_field("config.json", rope_parameters=ROPE | {"attention_factor": math.inf})),
    ("prefix", with_field("adapter_config.json", adapter_prompt_length=2**31 - 1)),
    ("prefix", with_field("adapter_config.json", adapter_start_layer=2**31 - 1)),
    *(
        ("lora", with_field("adapter_config.json", alpha_pattern={pattern: 8}))
        for pattern in ("(", "(a|_|.)*" * 6 + "!", ".*" * 20 + "!", "a{9999999999}", "(?i)a)(b")
    ),
    *(("lora", with_field("adapter_config.json", base_model_name_or_path=text)) for text in ("a" * 10**5, "a\0b", "")),
    ("lit", lambda folder: (folder / "model_config.yaml").write_text(lit_config(folder, n_layer=10**9))),
    ("lit", lambda folder: (folder / "model_config.yaml").write_text(lit_config(folder, n_layer=9_999))),
    ("lit", lambda folder: (folder / "model_config.yaml").write_text(lit_config(folder, n_embd=2**31 - 1))),
]


def lit_config(folder: Path, **changes: int) -> str:
    return yaml.safe_dump(yaml.safe_load((folder / "model_config.yaml").read_text()) | changes)


@pytest.mark.parametrize("number", range(len(LARGE)))
def test_large_numbers_and_slow_expressions(number, scenes, tmp_path, capsys):
    scene, change = LARGE[number]
    copy = Path(shutil.copytree(scenes[scene].folder, tmp_path / "copy"))
    change(copy)
    began = time.monotonic()
    code, err = run(scenes[scene].commands(copy, tmp_path / "out")[number % 2], capsys)
    assert code == 2 and err.splitlines()[-1].startswith("litgpt: error: ") and time.monotonic() - began < 5, err
    assert str(copy) in err


def test_an_alpha_of_zero_and_patterns_as_in_peft(scenes, tmp_path):
    """Of both, `peft` makes alpha / r."""
    copy = Path(shutil.copytree(scenes["lora"].folder, tmp_path / "copy"))
    edit(copy / "adapter_config.json", lambda f: f | {"r": 4, "lora_alpha": 0, "alpha_pattern": {r"\d+\..*q_proj": 8}})
    adapter = open_adapter(copy)
    assert adapter.scale("model.layers.1.self_attn.q_proj", 4) == 2
    assert adapter.scale("model.layers.1.self_attn.v_proj", 4) == 0
    model = ModelSource.open(copy).model(torch.float32, torch.device("cpu"))
    assert model(torch.zeros(1, 2, dtype=torch.long)).isfinite().all()


# chat templates

SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]
TEMPLATES = [
    *("{{ " + a * 5000 + "1" + b * 5000 + " }}" for a, b in ("()", "[]", ("-", ""), ("not ", ""), ("1 +", ""))),
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    *("{{ 'a' * 10**10 }}", "{{ [1] * 10**10 }}", "{{ 10**(10**9) }}", "{{ 2**100000 }}", "{{ 'a' | center(10**10) }}"),
    *("{{ 'a'.ljust(10**10) }}", "{{ lipsum(n=10**9) }}", "{{ messages | tojson(indent=10**10) }}"),
    *(
        "{% set ns = namespace(s=" + start + ") %}{% for i in range(60) %}{% set ns.s = " + grow + " %}{% endfor %}"
        for start, grow in (
            *(("'aa'", "ns.s + ns.s"), ("'aa'", "ns.s ~ ns.s"), ("'aa'", "ns.s | replace('a', 'aa')")),
            *(("3", "ns.s * ns.s"), ("[1]", "ns.s + ns.s"), ("'aa'", "[ns.s, ns.s] | join")),
        )
    ),
    "{% set s = 'a' * 9999999 %}{% for i in range(99) %}{{ s }}{% endfor %}",
    *(
        "{{ cycler() }}",
        "{% break %}",
        "{{ '1' | int // 0 }}",
        "{{ strftime_now(5) }}",
        "{{ messages[0].items }}{{ 1/0 }}",
    ),
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_would_take_all_time_or_memory(template):
    with pytest.raises(UserError, match="template"):
        ChatTemplate(template, {}).render([{"role": "user", "content": "a"}], True)


@pytest.mark.parametrize("template", SLOW)
def test_templates_that_do_not_end(template, monkeypatch):
    monkeypatch.setattr("litgpt.text.sandbox.SECONDS", 0.1)
    with pytest.raises(UserError, match="template"):
        ChatTemplate(template, {}).render([{"role": "user", "content": "a"}], True)


# tokenizers


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: found | fields


def steps(*some: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(some)}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


BOS = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}
ALONE = {"single": [], "special_tokens": {}}
TOKENIZERS: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    changed(normalizer=steps(*[replace("a", "a" * 10)] * 12)),
    changed(normalizer=steps(*[{"type": "Prepend", "prepend": "a" * 1000}] * 3)),
    changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "//////////8="}),
    changed(decoder={"type": "Sequence", "decoders": [replace("", "a" * 10)] * 8}),
    changed(post_processor=BOS | ALONE),
    changed(post_processor=BOS | ALONE | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000}),
    lambda found: found | {"model": found["model"] | {"continuing_subword_prefix": "##"}},
    lambda found: found | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
    lambda found: found | {"model": found["model"] | {"vocab": {}}},
]


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
def test_tokenizers(number, scenes, tmp_path, capfd):
    copy = Path(shutil.copytree(scenes["base"].folder, tmp_path / "copy"))
    edit(copy / "tokenizer.json", TOKENIZERS[number])
    code, err = run(["validate", str(copy), "--accelerator", "cpu"], capfd)
    assert code == 2 and err.splitlines()[-1].startswith("litgpt: error: "), err


@pytest.mark.parametrize("command", ["data_check", "finetune"])
@pytest.mark.parametrize("number", [300, 2**31])
def test_tokens_that_the_model_does_not_know(number, command, scenes, tmp_path, capsys):
    copy = Path(shutil.copytree(scenes["base"].folder, tmp_path / "copy"))
    edit(copy / "tokenizer.json", lambda f: f | {"model": f["model"] | {"vocab": f["model"]["vocab"] | {"z": number}}})
    rows = tmp_path / "a.json"
    rows.write_text(json.dumps([{"instruction": "a zz", "output": "b"}] * 4))
    words = [command, str(copy), "--data", "JSON", "--data.json_path", str(rows), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    said = err.splitlines()[-1] if command == "finetune" else out
    assert stop.value.code == (2 if command == "finetune" else 1) and str(number) in said, out + err


# metrics, rows


def test_metrics_of_a_run_that_goes_on(tmp_path):
    path, line = tmp_path / "metrics.csv", "1,0.5,1.5,0.001,,100,1.5,200.0,0.1,1000\n"
    bad = [
        "\u00b2" + line[1:],
        "9" * 5000 + line[1:],
        '"1' + line[1:],
        "1,\0" + line[4:],
        "a" * 10**6 + "\n",
        "-" + line,
    ]
    path.write_text(",".join(METRICS) + "\n" + "".join(f"{text}\n" for text in bad) + line)
    assert lines_until(path, 1, 1) == [dict(zip(METRICS, line[:-1].split(",")))]


def test_a_line_of_rows_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("litgpt.data.row_files.LINE", 20)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "b" * 100 + '"}\n{"a": 2}\n' + "c" * 100)
    one, long, two, last = (value for _, value in read_rows(tmp_path / "a.jsonl"))
    assert (one, two) == ({"a": 1}, {"a": 2}) and "line 2" in str(long) and "line 4" in str(last)


def test_nested_rows(tmp_path):
    rows = [{"a": 1}, json.loads('{"a":' + "[" * 101 + "]" * 101 + "}"), {"a": 2}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "a.jsonl"):
        one, deep, two = (value for _, value in read_rows(tmp_path / name))
        assert (one, two) == (rows[0], rows[2]) and isinstance(deep, UserError) and "nested" in str(deep)


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, "[]", '{"answer": ' + "[" * 100_000])
def test_answers_that_are_none(line, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "a.jsonl").write_text(line + "\n")
    words = ["generate", "pico", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "a.jsonl"]
    code, err = run([*map(str, words)], capsys)
    assert code == 2 and str(tmp_path / "a.jsonl") in err.splitlines()[-1]
