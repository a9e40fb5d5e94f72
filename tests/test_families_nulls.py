"""A field of `config.json` that is null means what it means in `transformers`."""

import ast
import copy
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import litgpt.families
from litgpt.checkpoint.folder import Checkpoint
from litgpt.errors import UserError
from litgpt.families import read_config
from litgpt.methods.model_source import ModelSource
from tests.families import ALL, FAMILIES, GEMMA3, LLAMA3, SIZES, YARN, longrope, warnings_of_transformers
from tests.test_families import CPU, assert_close, ids

IDS = ids(60)
FOLDER = Path(litgpt.families.__file__).parent
ROPE = "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
ROPE += "mscale_all_dim truncate low_freq_factor high_freq_factor short_factor long_factor partial_rotary_factor"
Where = tuple[str, ...]


def words_in(module: str) -> set[str]:
    """Every text in a module: the names of all fields that it reads are among them."""
    nodes = ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8")))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.islower()}


def fields_of(model_type: str) -> list[str]:
    """The fields that a family may read, and all that `transformers` has for it."""
    written = set(AutoConfig.for_model(model_type, **next(iter(FAMILIES[model_type].values()))).to_dict())
    words = words_in(model_type) | words_in("common") | words_in("family")
    read = {word for word in words if word.replace("_", "").isidentifier()}
    return sorted((written | read) - {"model_type", "transformers_version"})


def set_to_null(fields: dict[str, Any], where: Where) -> dict[str, Any]:
    fields = copy.deepcopy(fields)
    target = fields
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = None
    return fields


@torch.no_grad()
def compare(fields: dict[str, Any], folder: Path) -> None:
    """The same logits where `transformers` takes the fields; if it refuses them, we may too, in a line of our own."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # a default may be large
            n_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if n_weights < 10**7:
            with warnings_of_transformers():
                theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            for name, p in theirs.named_parameters():
                norm = p.dim() == 1 and "norm" in name and not re.match("gemma($|[23])", fields["model_type"])
                torch.nn.init.normal_(p, float(norm), 0.2 if p.dim() == 1 else 1.2 / p.shape[-1] ** 0.5)
            expected = theirs(IDS).logits
    except Exception:
        with suppress(UserError):
            read_config(fields)
        return
    if n_weights >= 10**7:
        ours, known = read_config(fields), config.to_dict()
        ours.name = ""
        assert ours == read_config(known)
        return
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    assert_close(ModelSource.open(folder).model(torch.float32, CPU)(IDS), expected, 1e-3)


@pytest.mark.long
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field(model_type, tmp_path):
    base = next(iter(FAMILIES[model_type].values())) | {"model_type": model_type}
    for name in fields_of(model_type):
        compare(base | {name: None}, tmp_path / name)


def objects(fields: dict[str, Any], where: Where = ()) -> Iterator[Where]:
    """The fields of the objects in a `config.json`."""
    for key, value in fields.items():
        if isinstance(value, dict) and (key.startswith("rope") or key.endswith("_attention") or key == "text_config"):
            names = ROPE.split() if key != "text_config" else fields_of("gemma3_text")
            yield from (
                (*where, key, name) for name in sorted({*value, *names}) if not isinstance(value.get(name), dict)
            )
            yield from objects(value, (*where, key))


def in_old_words(fields: dict[str, Any]) -> dict[str, Any]:
    """With `rope_scaling` and `rope_theta` instead of `rope_parameters`."""
    rope = fields["rope_parameters"]
    rest = {name: value for name, value in fields.items() if name != "rope_parameters"}
    return rest | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"},
    }


WITH_OBJECTS = [
    case
    for case in ALL
    if any(isinstance(v, dict) and k != "vision_config" for k, v in FAMILIES[case[0]][case[1]].items())
]


@pytest.mark.long
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", WITH_OBJECTS, ids=" ".join)
def test_every_field_of_an_object(case, old, tmp_path):
    fields = FAMILIES[case[0]][case[1]] | {"model_type": case[0]}
    if old:
        if "rope_theta" not in fields.get("rope_parameters", {}):
            pytest.skip("it has no older form")
        fields = in_old_words(fields)
    for i, where in enumerate(objects(fields)):
        if where[-1] == "alpha":  # without which Hunyuan's rope depends on the length, and is refused
            continue
        compare(set_to_null(fields, where), tmp_path / str(i))


LLAMA_YARN = SIZES | {"model_type": "llama", "rope_parameters": YARN}
SAMPLE = {
    "default": (SIZES | {"model_type": "llama"}, ("head_dim",)),
    "refused": (SIZES | {"model_type": "llama"}, ("rms_norm_eps",)),
    "refused size": (SIZES | {"model_type": "olmo3"}, ("num_hidden_layers",)),
    "no window": (SIZES | {"model_type": "mistral", "sliding_window": 9}, ("sliding_window",)),
    "no cap": (FAMILIES["gemma2"]["plain"] | {"model_type": "gemma2"}, ("final_logit_softcapping",)),
    "as many as heads": (SIZES | {"model_type": "qwen2"}, ("num_key_value_heads",)),
    "false": (FAMILIES["falcon"]["7b"] | {"model_type": "falcon"}, ("parallel_attn",)),
    "untied": (FAMILIES["gemma3"]["untied"] | {"model_type": "gemma3"}, ("tie_word_embeddings",)),
    "ratio of YaRN": (LLAMA_YARN, ("rope_parameters", "factor")),
    "truncate of YaRN": (LLAMA_YARN, ("rope_parameters", "truncate")),
    "another rope's number": (
        SIZES | {"model_type": "llama", "rope_parameters": LLAMA3},
        ("rope_parameters", "mscale"),
    ),
    "longrope": (
        SIZES | {"model_type": "llama", "rope_parameters": longrope(4) | {"factor": 4.0}},
        ("rope_parameters", "truncate"),
    ),
    "beside two ropes": (FAMILIES["olmo3"]["yarn"] | {"model_type": "olmo3"}, ("rope_parameters", "rope_theta")),
    "one of two ropes": (
        FAMILIES["olmo3"]["yarn"] | {"model_type": "olmo3"},
        ("rope_parameters", "full_attention", "truncate"),
    ),
    "text part": ({"model_type": "gemma3", **FAMILIES["gemma3"]["plain"]}, ("text_config", "model_type")),
    "eps of the text part": (
        {"model_type": "gemma3", **FAMILIES["gemma3"]["plain"]},
        ("text_config", "rms_norm_eps"),
    ),
    "whole text part": ({"model_type": "gemma3", "text_config": GEMMA3}, ("text_config",)),
    "quantization": (SIZES | {"model_type": "llama"}, ("quantization_config",)),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_some_fields(name, tmp_path):
    fields, where = SAMPLE[name]
    compare(set_to_null(fields, where), tmp_path / "model")


def test_quantization_that_is_null(llama, tmp_path):
    """`transformers` reads the folder of a model that is not quantized, and so do we."""
    fields = json.loads((llama / "config.json").read_text()) | {"quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Checkpoint(tmp_path).config.n_layer == 2
