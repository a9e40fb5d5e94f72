"""The shipped recipes: each is what its comment says, differs from the defaults, and runs."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.cli.recipes import Recipe, find_recipe, shipped_recipes
from litgpt.commands.recipes import lora_parameters, model_of, repository
from litgpt.errors import UserError
from litgpt.families import read_config
from litgpt.methods.lora import TARGETS, LoRA
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.train.base_model import model_fields
from tests.conftest import make_rows
from tests.families import GRANITE4, SIZES
from tests.runs import lines
from tests.test_cli import ROOT, python
from tests.test_older import LITGPTS, kept

RECIPES = list(shipped_recipes())
NAMES = [recipe.name for recipe in RECIPES]
SAMPLE = ("llama-3.2-1B/lora", "tiny-llama/full", "falcon-7b/qlora", "gemma3-1b/lora", "debug")
LONG_OR_SHORT = [r if r.name in SAMPLE else pytest.param(r, marks=pytest.mark.long) for r in RECIPES]


def words(recipe: Recipe) -> list[str]:
    """`litgpt finetune lora`, as `main` takes it."""
    return recipe.command.split()[1:-2]


def leaves(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict) and key not in ("model_config", "init_args"):
            yield from leaves(value, f"{prefix}{key}.")
        elif key == "init_args":
            yield from leaves(value, prefix)
        else:
            yield prefix + key, value


def test_what_is_shipped():
    assert len(NAMES) == len(set(map(str.lower, NAMES))) == 104
    assert {r.method for r in RECIPES} == {"lora", "qlora", "full", "dpo", "pretrain"}
    for recipe in RECIPES:
        four_bits = recipe.method == "qlora" or recipe.name == "llama-3.1-8b/dpo"
        assert ("quantize" in recipe.fields()) == four_bits, recipe.name


# what is in a file


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_only_what_differs_from_the_defaults(recipe, settings):
    fields = recipe.fields()
    data = fields["data"]["class_path"]
    assert data.startswith("litgpt.data.")
    model = [] if recipe.method == "pretrain" else ["X"]
    default = dict(leaves(settings(*words(recipe), *model, "--data", data, "--optimizer", "AdamW")))
    got = dict(leaves(settings(*words(recipe), "--config", recipe.name)))
    given = dict(leaves(fields))
    assert given.pop("data.class_path") == got["data.class_path"]
    for key, value in given.items():
        assert key in default or key == "optimizer.lr", key  # which the run picks by default
        assert got[key] == value or str(got[key]) == value, key
        assert default.get(key) != value, f"{key}: {value} is the default"
    unused = {k for k in got if got[k] != default.get(k)} - set(given)
    assert unused <= {"train.global_batch_size"}, unused


@pytest.mark.parametrize("name", LITGPTS)
def test_the_numbers_are_those_of_litgpts_recipe(name, settings):
    recipe = find_recipe(name)
    assert recipe.name == name and len(LITGPTS) == 42
    kept(LITGPTS[name], settings(*words(recipe), "--config", name))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name not in LITGPTS], ids=lambda r: r.name)
def test_our_own_recipes_train_all_linear_layers(recipe):
    fields = recipe.fields()
    switches = ("lora_key", "lora_projection", "lora_mlp")
    is_lora = recipe.method in ("lora", "qlora", "dpo")
    assert not is_lora or fields.get("lora_targets") == "all-linear" or all(fields.get(name) for name in switches)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_comment_on_top(recipe):
    comment, _, body = recipe.file.read_text(encoding="utf-8").partition("\n#\n")
    assert all(line.startswith("# ") for line in comment.splitlines()) and recipe.machine()
    commands = re.findall(r"^#   (.*)", body, re.M)
    assert commands[-1] == recipe.command
    fields = recipe.fields()
    source = fields.get("tokenizer_dir") or fields.get("checkpoint_dir") or fields["model_name"]
    if source != "pico":
        assert commands[0].startswith(f"litgpt download {source.removeprefix('checkpoints/')}")
    assert fields["out_dir"].startswith("out/")


# the model


def weights(config: Config) -> int:
    """All numbers of a model, from its sizes."""
    width, inner = config.n_embd, config.intermediate_size
    q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
    norm = width * (2 if config.norm_class_name == "LayerNorm" else 1)
    norms = 1 if config.shared_attention_norm else 2
    block = width * (q + 2 * kv) + q * width + (norms + config.post_attention_norm + config.post_mlp_norm) * norm
    block += (q + 2 * kv) * config.attn_bias + width * config.attn_proj_bias
    if config.mlp_class_name == "GptNeoxMLP":
        block += 2 * width * inner + (width + inner) * config.mlp_bias
    else:
        block += 3 * width * inner
    vocab = config.padded_vocab_size
    return (
        vocab * width * (1 if config.tie_embeddings else 2)
        + vocab * config.lm_head_bias
        + config.n_layer * block
        + norm
    )


def updates(config: Config, lora: LoRA) -> int:
    """LitGPT's rule: each product that is updated has an A of r x inputs and a B of outputs x r."""
    everywhere = lora.targets is not None
    if everywhere:
        assert lora.targets == "all-linear"
        lora = replace(lora, targets=None, **{name: name != "head" for name in TARGETS})
    width, inner = config.n_embd, config.intermediate_size
    q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
    products = (
        [(width, q * (1 + config.attention_gate))] * lora.query + [(width, kv)] * lora.key + [(width, kv)] * lora.value
    )
    products += [(q, width)] * lora.projection
    recurrent = sum(config.recurrent_layers or [])
    products *= config.n_layer - recurrent
    keys, values = (
        config.linear_key_heads * config.linear_key_size,
        config.linear_value_heads * config.linear_value_size,
    )
    net = [(width, keys)] * lora.query + [(width, keys)] * lora.key + [(width, values)] * lora.value
    net += [(width, values), (values, width)] * lora.projection
    products += (net + [(width, config.linear_value_heads)] * 2 * everywhere) * recurrent
    products += [(width, 1)] * lora.mlp * config.shared_expert_gate * config.n_layer
    for layer in range(config.n_layer) if lora.mlp else ():
        ups, sizes = 1 if config.mlp_class_name == "GptNeoxMLP" else 2, [inner]
        if config.n_expert and (config.moe_layers is None or config.moe_layers[layer]):
            one = config.moe_intermediate_size or inner
            sizes = [one] * config.n_expert + ([config.n_shared_expert * one] if config.n_shared_expert else [])
        products += [product for size in sizes for product in [(width, size)] * ups + [(size, width)]]
    products += [(width, config.padded_vocab_size)] * lora.head
    return sum(lora.r * (inputs + outputs) for inputs, outputs in products)


def config_of(fields: dict[str, Any]) -> Config:
    name = repository(fields)
    if name not in ("", "pico"):
        return Config.from_name(name)
    llama = model_fields(PICO if name else None, fields.get("model_config"))
    return read_config({"vocab_size": 32000, **llama}, name)


def empty(config: Config) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def lora_of(fields: dict[str, Any]) -> LoRA:
    return LoRA(**{k.removeprefix("lora_"): v for k, v in fields.items() if k.startswith("lora_")})


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_trained_parameters(recipe):
    fields = recipe.fields()
    config = config_of(fields)
    model = empty(config)
    if recipe.method in ("lora", "qlora", "dpo"):
        lora = lora_of(fields)
        lora.apply(model)
        expected = updates(config, lora)
        assert expected == lora_parameters(model_of(fields)[0], fields)  # as the list of recipes has it
    else:
        expected = weights(config)
        listed = model_of(fields)[1]  # with the head as it is published, without norms and biases
        published = expected - (0 if config.tie_embeddings else config.padded_vocab_size * config.n_embd)
        assert min(abs(listed / n - 1) for n in (expected, published)) < 0.002
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected > 0


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("phi-1_5", 1_572_864),
        ("stablelm-base-alpha-3b", 2_097_152),
        ("Llama-2-7b-hf", 4_194_304),
        ("Llama-2-13b-hf", 6_553_600),
        ("falcon-40b", 12_042_240),
    ],
)
def test_the_rule_gives_the_published_numbers(name, published):
    assert updates(Config.from_name(name), LoRA()) == published


def test_every_switch_counts():
    config = Config.from_name("Qwen3-0.6B")
    for target in TARGETS:
        fields = {f"lora_{t}": t == target for t in TARGETS} | {"lora_r": 3}
        assert lora_parameters(config, fields) == updates(config, lora_of(fields)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_asks_for_more_than_the_model_reads(name):
    fields = find_recipe(name).fields()
    theirs = LITGPTS.get(name, {}).get("train.max_seq_length", 1)
    assert max(theirs, fields["train"].get("max_seq_length", 1)) <= config_of(fields).block_size


# two steps


TINY = SIZES | {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 8192}
NET = {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "full_attention_interval": 2}
NET |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
QWEN3_5_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
QWEN3_5_EXPERTS |= {"shared_expert_intermediate_size": 32}
OTHER: dict[str, dict[str, Any]] = {
    "falcon": {"ffn_hidden_size": 128, "multi_query": True, "activation": "gelu"},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": NET,
    "qwen3_5_moe_text": NET | QWEN3_5_EXPERTS,
    "seed_oss": {"head_dim": 16},
    "granitemoehybrid": GRANITE4 | TINY | {"shared_intermediate_size": 128, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral3": {"head_dim": 16},
}
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "ministral3"}
TEXT_PARTS |= {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Callable[[str], Path]:
    """A folder with a random model of a family, the small tokenizer and a chat template. Read only."""

    @cache
    def make(model_type: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp("tiny") / model_type
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY | OTHER.get(model_type, {})))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' }}\n{% endfor %}"
        )
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
        return folder

    return make


def place_rows(recipe: Recipe, folder: Path) -> list[str]:
    """Few rows where the data set of a recipe would be downloaded to; the flags that say so."""
    kind = recipe.fields()["data"]["class_path"].rpartition(".")[2]
    if kind == "PicoText":
        return ["--data.n_rows", "300"]
    if kind == "PicoSums":
        return ["--data.n_val", "4", "--eval.exact_match", "2"]
    if kind == "PicoPairs":
        return ["--data.n_rows", "40", "--data.n_val", "4", "--eval.exact_match", "2"]
    rows = make_rows(80)
    if kind == "JSON":
        pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "No."} for r in rows]
        Path("pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        return []
    if kind == "TinyStories":
        stories = folder / "TinyStories_all_data"
        stories.mkdir(parents=True)
        for i in range(2):
            (stories / f"data{i}.json").write_text(json.dumps([{"story": f"{i} {r['output']} " * 30} for r in rows]))
    else:
        folder.mkdir(parents=True)
        (folder / "alpaca2k.json").write_text(json.dumps(rows))
    return ["--data.download_dir", str(folder)]


@pytest.mark.parametrize("recipe", LONG_OR_SHORT, ids=NAMES)
def test_two_steps(recipe, tiny, tmp_path, monkeypatch):
    """With the model and the place of the rows exchanged, on one processor; everything else is the recipe's."""
    monkeypatch.chdir(tmp_path)
    fields = recipe.fields()
    model_type = config_of(fields).model_type
    model = [str(tiny(TEXT_PARTS.get(model_type, model_type)))]  # without the part for pictures
    if recipe.method == "pretrain":
        model = ["--tokenizer_dir", *model] if "tokenizer_dir" in fields else ["--model_name", *model]
    flags = [
        "--train.max_steps",
        "2",
        "--accelerator",
        "cpu",
        "--eval.max_iters",
        "1",
        *place_rows(recipe, tmp_path / "d"),
    ]
    if recipe.method == "pretrain":
        flags += ["--train.global_batch_size", "2", "--train.micro_batch_size", "1"]
    elif fields.get("eval", {}).get("max_new_tokens", 1):
        flags += ["--eval.max_new_tokens", "3"]
    flags += [
        w for name, alone in (("devices", 1), ("strategy", "auto")) if name in fields for w in (f"--{name}", str(alone))
    ]
    main([*words(recipe), *model, "--config", recipe.name, *flags])
    out = tmp_path / fields["out_dir"]
    losses = [float(row["loss"]) for row in lines(out) if row.get("loss")]
    assert losses and all(loss == loss for loss in losses)
    assert (out / "final" / "hyperparameters.yaml").is_file()
    written = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())
    assert written["train"]["max_steps"] == 2


# the command


def shown(capsys: pytest.CaptureFixture, *args: str) -> str:
    capsys.readouterr()
    main(["recipes", *args])
    return capsys.readouterr().out


def test_the_list(capsys):
    rows = [line.split()[:2] for line in shown(capsys).splitlines()[1:-2]]
    assert rows == [[r.model, r.method] for r in RECIPES]
    found = shown(capsys, "LLAMA-3.2", "qlora").splitlines()
    assert len(found) == 5 and found[1].split()[:6] == ["llama-3.2-1B", "qlora", "1.24", "B", "3.4", "M"]
    assert found[-1] == "To run one: litgpt finetune lora --config llama-3.2-1B/qlora"
    assert "llama-2-13b" in shown(capsys, "meta-llama", "80 GB", "full")  # words of the model and the machine too
    assert shown(capsys, "list", "phi-2") == shown(capsys, "phi-2")
    with pytest.raises(SystemExit):
        main(["recipes", "phi-2", "8x7b"])
    assert "No recipe matches phi-2 and 8x7b." in capsys.readouterr().err


def test_show_and_copy(capsys, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "config_hub" / "finetune" / "phi-2" / "lora.yaml").read_text()
    assert shown(capsys, "show", "Phi-2/LoRA") == text
    assert "finetune lora --config phi-2-lora.yaml" in shown(capsys, "copy", "phi-2/lora")
    shown(capsys, "copy", "phi-2/lora", "mine/my.yaml")
    shown(capsys, "copy", "phi-2/lora", "folder/")
    assert (tmp_path / "folder" / "phi-2-lora.yaml").read_text() == text
    assert (tmp_path / "phi-2-lora.yaml").read_text() == (tmp_path / "mine" / "my.yaml").read_text() == text
    (tmp_path / "phi-2-lora.yaml").write_text("lora_r: 3\n")
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "phi-2/lora"])
    assert (tmp_path / "phi-2-lora.yaml").read_text() == "lora_r: 3\n" and "exists" in capsys.readouterr().err
    shown(capsys, "copy", "phi-2/lora", "--overwrite", "true")
    assert settings("finetune", "lora", "X", "--config", "phi-2-lora.yaml")["lora_r"] == 8


def test_list_starts_light(tmp_path):
    code = "import sys; from litgpt.__main__ import main; main(['recipes'])\nprint({'torch'} & {*sys.modules})"
    assert python(code, tmp_path).endswith("set()\n")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama-3.2-1b/full.yaml", "llama-3.2-1B/full"),
        ("gemma2b/qlora.yaml", "gemma2-2b/qlora"),
        ("GEMMA2-9B/QLORA", "gemma2-9b/qlora"),
        ("config_hub/finetune/tiny-llama/lora.yaml", "tiny-llama/lora"),
        ("some/where/config_hub/pretrain/debug.yaml", "debug"),
    ],
)
def test_spellings(typed, meant):
    assert find_recipe(typed).name == meant


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("phi-2", "Available: phi-2/full, phi-2/lora, phi-2/qlora."),
        ("phi-2/lorra", "Did you mean 'phi-2/lora'?"),
        ("phi2", "Available: phi-2/full, phi-2/lora, phi-2/qlora."),
        ("fhi-2/lora", "Did you mean 'phi-2/lora'?"),
        ("", "See: litgpt recipes"),
    ],
)
def test_no_such_recipe(typed, hint):
    with pytest.raises(UserError, match=re.escape(hint)):
        find_recipe(typed)


def test_the_table_is_that_of_the_recipes():
    text = (ROOT / "config_hub" / "finetune" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(.*?)\]\((.*?)\) \| (\d+) \| (\d+) \| (\d+|auto) \| (.*)", text, re.M)
    assert {name for name, *_ in rows} == {r.name for r in RECIPES if r.method != "pretrain"} - {
        "pico/lora",
        "pico/dpo",
    }
    for name, file, epochs, length, micro, rest in rows:
        recipe = find_recipe(name)
        train = recipe.fields()["train"]
        assert file == f"{name}.yaml"
        assert [train.get("epochs", 1), train["max_seq_length"]] == [int(epochs), int(length)]
        assert str(train.get("micro_batch_size", "auto")) == micro
        assert recipe.machine() in rest or "A10G" in rest
