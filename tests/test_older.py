"""What people typed for LitGPT works, and names what it is called today."""

import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.__main__ import COMMANDS, main
from litgpt.cli.legacy import refused_options, result_folder, translate
from litgpt.cli.parser import make_parser
from litgpt.cli.schema import current_name, option_names
from litgpt.methods.lora import LoRA
from litgpt.methods.peft_export import write_lora
from tests.conftest import make_rows, save_llama
from tests.pages import ROOT
from tests.ranks import alike, ended, start
from tests.test_lora import with_lora

TRAIN = (
    "save_interval log_interval global_batch_size micro_batch_size lr_warmup_steps lr_warmup_fraction epochs "
    "max_tokens max_steps max_time max_seq_length tie_embeddings max_norm min_lr"
)
EVAL = "interval max_new_tokens max_iters initial_validation final_validation evaluate_example"
LOG = "project run group teamspace metadata log_model save_logs checkpoint_name"
GROUPS = [f"{g}.{n}" for g, names in (("train", TRAIN), ("eval", EVAL), ("log", LOG)) for n in names.split()]
FINETUNE = "checkpoint_dir out_dir precision devices num_nodes data optimizer logger_name seed access_token".split()
LORA = "lora_r lora_alpha lora_dropout lora_query lora_key lora_value lora_projection lora_mlp lora_head".split()
GENERATE = "prompt sys_prompt max_new_tokens top_k top_p temperature quantize precision".split()
# LitGPT 0.5.13's options
FLAGS: dict[str, list[str]] = {
    "finetune_lora": [*FINETUNE, *GROUPS, *LORA, "quantize"],
    "finetune_full": [*FINETUNE, *GROUPS, "resume"],
    "finetune_adapter": [*FINETUNE, *GROUPS, "quantize"],
    "finetune_adapter_v2": [*FINETUNE, *GROUPS, "quantize", "resume"],
    "pretrain": [
        *GROUPS,
        *"model_name model_config out_dir precision initial_checkpoint_dir resume data optimizer devices".split(),
        *"num_nodes tokenizer_dir logger_name seed".split(),
    ],
    "generate": [*GENERATE, *"checkpoint_dir num_samples compile".split()],
    "generate_full": [*GENERATE, *"checkpoint_dir input finetuned_path".split()],
    "generate_adapter": [*GENERATE, *"checkpoint_dir input adapter_path".split()],
    "generate_sequentially": [*GENERATE, *"checkpoint_dir num_samples compile".split()],
    "generate_tp": [*GENERATE, *"checkpoint_dir num_samples compile".split()],
    "generate_speculatively": [
        *GENERATE,
        *"draft_model_checkpoint_dir target_model_checkpoint_dir num_samples speculative_k compile".split(),
    ],
    "chat": "checkpoint_dir max_new_tokens top_k top_p temperature quantize precision compile multiline "
    "access_token".split(),
    "serve": "checkpoint_dir quantize precision temperature top_k top_p max_new_tokens devices accelerator port stream "
    "openai_spec access_token api_path timeout generate_strategy".split(),
    "evaluate": "checkpoint_dir tasks out_dir force_conversion num_fewshot batch_size device dtype limit seed "
    "save_filepath access_token".split(),
    "download": "repo_id access_token tokenizer_only convert_checkpoint dtype checkpoint_dir model_name".split(),
    "merge_lora": "checkpoint_dir pretrained_checkpoint_dir precision".split(),
    "convert_to_litgpt": "checkpoint_dir model_name dtype debug_mode".split(),
    "convert_from_litgpt": "checkpoint_dir output_dir".split(),
    "convert_pretrained_checkpoint": "checkpoint_dir output_dir".split(),
    "validate": "checkpoint_dir model_filename dtype training".split(),
}
TRANSLATED = {"validate": ["dtype"]}


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_is_known_or_refused_with_the_reason(command, capsys):
    parser = make_parser(COMMANDS[command][0], command)
    known = option_names(parser)
    for name in FLAGS[command]:
        if name not in refused_options(command):
            assert current_name(name, parser) in known or name in TRANSLATED.get(command, []), name
            continue
        for words in (["X", f"--{name}", "a"], [f"--{name}=a", "X"]):
            with pytest.raises(SystemExit) as stop:
                main([command, *words])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and f"--{name} is not needed: {refused_options(command)[name]}" in error


def test_a_refused_key_that_is_off_may_stand_in_a_config(settings, config, capsys):
    got = settings("finetune_full", "X", "--config", config("c.yaml", access_token=None, seed=3))
    assert got["seed"] == 3
    with pytest.raises(SystemExit):
        main(["finetune_full", "X", "--config", str(config("d.yaml", access_token="hf_secret"))])
    error = capsys.readouterr().err
    assert "access_token is not needed" in error and "hf_secret" not in error


# LitGPT's recipe files say everything, defaults included
RECIPE: dict[str, Any] = {
    "checkpoint_dir": "checkpoints/tiiuae/falcon-7b",
    "out_dir": "out/finetune/qlora-falcon-7b",
    "precision": "bf16-true",
    "quantize": "bnb.nf4",
    "devices": 1,
    "num_nodes": 1,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_query": True,
    "lora_key": False,
    "lora_value": True,
    "lora_projection": False,
    "lora_mlp": False,
    "lora_head": False,
    "data": {
        "class_path": "litgpt.data.Alpaca2k",
        "init_args": {
            "mask_prompt": False,
            "val_split_fraction": 0.03847,
            "prompt_style": "alpaca",
            "ignore_index": -100,
            "seed": 42,
            "num_workers": 4,
            "download_dir": "data/alpaca2k",
        },
    },
    "train": {
        "save_interval": 200,
        "log_interval": 1,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "lr_warmup_steps": 10,
        "epochs": 4,
        "max_tokens": None,
        "max_steps": None,
        "max_seq_length": 512,
        "tie_embeddings": None,
        "max_norm": None,
        "min_lr": 6.0e-5,
    },
    "eval": {
        "interval": 100,
        "max_new_tokens": 100,
        "max_iters": 100,
        "initial_validation": False,
        "final_validation": True,
        "evaluate_example": "first",
    },
    "optimizer": {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 0.0002, "weight_decay": 0.0, "betas": [0.9, 0.95]},
    },
    "logger_name": "csv",
    "seed": 1337,
}


def kept(given: Any, got: Any, where: str = "") -> None:
    if isinstance(given, dict):
        for key, value in given.items():
            kept(value, got[key], f"{where}.{key}")
    else:
        assert got == given, where


@pytest.mark.parametrize("command", ["finetune_lora", "finetune_full"])
def test_a_recipe_of_litgpt_keeps_every_value(settings, config, command):
    fields = {k: v for k, v in RECIPE.items() if command == "finetune_lora" or ("lora" not in k and k != "quantize")}
    kept(fields, settings(command, "--config", config("c.yaml", **fields)))
    assert not settings.err


def nested(row: dict[str, Any]) -> dict[str, Any]:
    """The values of one of LitGPT's recipes as its file has them."""
    fields: dict[str, Any] = {}
    for key, value in row.items():
        group, _, name = key.partition(".")
        if group in ("data", "optimizer"):
            place = fields.setdefault(group, {"init_args": {}})
            (place["init_args"] if name else place)[name or "class_path"] = value
        elif name:
            fields.setdefault(group, {})[name] = value
        elif key != "recipe":
            fields[key] = value
    return fields


FACTS = Path(__file__).with_name("recipes_litgpt.jsonl").read_text(encoding="utf-8").splitlines()
LITGPTS = {row["recipe"].removesuffix(".yaml"): nested(row) for row in map(json.loads, FACTS)}  # all that it ships


@pytest.mark.parametrize("name", LITGPTS)
def test_each_recipe_of_litgpt_keeps_every_value(settings, config, name):
    command = "finetune_full" if name.endswith("/full") else "finetune_lora"
    fields = LITGPTS[name]
    kept(fields, settings(command, "--config", config("c.yaml", **fields)))
    assert not settings.err


SHARED = {"mask_prompt": False, "prompt_style": "alpaca", "ignore_index": -100, "seed": 42, "num_workers": 4}
RAW = "https://raw.githubusercontent.com"
LITGPT_DATA: dict[str, dict[str, Any]] = {  # what LitGPT 0.5.13 writes for its data sets
    "Alpaca": {
        **SHARED,
        "val_split_fraction": 0.03865,
        "download_dir": "data/alpaca",
        "file_url": f"{RAW}/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json",
        "file_name": "alpaca_data_cleaned_archive.json",
    },
    "Alpaca2k": {
        **SHARED,
        "val_split_fraction": 0.05,
        "download_dir": "data/alpaca2k",
        "file_url": f"{RAW}/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json",
        "file_name": "alpaca2k_data_cleaned_archive.json",
        "repo_id": "mhenrichsen/alpaca_2k_test",
    },
    "AlpacaGPT4": {
        **SHARED,
        "val_split_fraction": 0.03847,
        "download_dir": "data/alpacagpt4",
        "file_url": f"{RAW}/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json",
        "file_name": "alpacagpt4_data_cleaned_archive.json",
    },
    "Deita": {
        **SHARED,
        "include_multiturn_conversations": False,
        "download_dir": "data/deita",
        "repo_id": "HuggingFaceH4/deita-10k-v0-sft",
    },
    "FLAN": {
        **SHARED,
        "prompt_style": "flan",
        "download_dir": "data/flan",
        "url": "https://huggingface.co/datasets/Muennighoff/flan/resolve/main",
        "subsets": None,
    },
    "JSON": {**SHARED, "json_path": "x.json", "val_split_fraction": None},
    "LIMA": {
        **SHARED,
        "val_split_fraction": 0.1,
        "include_multiturn_conversations": False,
        "repo_id": "GAIR/lima",
        "access_token": None,
    },
    "LongForm": {**SHARED, "prompt_style": "longform", "download_dir": "data/longform"},
    "TextFiles": {"train_data_path": "d", "val_data_path": None, "seed": 42, "num_workers": 4},
    "TinyStories": {"data_path": "data/tinystories", "seed": 42, "num_workers": 8},
}


@pytest.mark.parametrize("name", LITGPT_DATA)
def test_what_litgpt_writes_for_its_data_sets_is_a_config(name, settings, config):
    data = {"class_path": f"litgpt.data.{name}", "init_args": LITGPT_DATA[name]}
    for command in ("finetune_lora", "pretrain"):
        own = {"data": data, "logger_name": "csv"} | ({"checkpoint_dir": "X"} if command != "pretrain" else {})
        kept({"data": data}, settings(command, "--config", config("c.yaml", **own)))
    assert not settings.err


@pytest.mark.parametrize("name", ["LitData", "MicroLlama", "OpenWebText", "TinyLlama"])
def test_data_sets_that_litgpt_prepares_are_refused_by_name(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune_lora", "X", "--data", name])
    assert stop.value.code == 2 and f"--data {name} is not available" in capsys.readouterr().err


def test_configs_of_other_commands(settings, config, capsys):
    fields = {"checkpoint_dir": "x", "model_filename": "lit_model.pth", "dtype": "float32", "training": False}
    got = settings("validate", "--config", config("v.yaml", **fields))
    assert got["precision"] == "32-true" and got["checkpoint_dir"] == ["x"]
    fields = {"repo_id": "x/y", "access_token": None, "tokenizer_only": False, "convert_checkpoint": True}
    assert settings("download", "--config", config("d.yaml", **fields))["repo_id"] == ["x/y"]
    with pytest.raises(SystemExit):
        main(["validate", "--config", str(config("w.yaml", checkpoint_dir="x", model_filename="other.pth"))])
    assert "model_filename is not needed" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif("LITGPT_PEER" not in os.environ, reason="LITGPT_PEER does not name a python that has LitGPT")
@pytest.mark.parametrize("command", [*(f"finetune_lora --data {name}" for name in LITGPT_DATA), *FLAGS])
def test_every_config_that_litgpt_prints_is_valid(command, tmp_path, capsys):
    name, *words = command.split()
    n = {"convert_from_litgpt": 2, "convert_pretrained_checkpoint": 2, "generate_speculatively": 2}.get(name, 1)
    needs = {"JSON": ["--data.json_path", "x"], "TextFiles": ["--data.train_data_path", "x"]}.get(
        command.split()[-1], []
    )
    arguments = [os.environ["LITGPT_PEER"], "-m", "litgpt", name, *"xy"[:n], *words, *needs, "--print_config"]
    environment = {**os.environ, "PYTHONPATH": ""}
    printed = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (tmp_path / "c.yaml").write_text(printed.stdout)
    with pytest.raises(SystemExit) as stop:
        main([name, "--config", str(tmp_path / "c.yaml"), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


# whole commands, as guides to LitGPT print them


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model, in a folder `final`."""
    folder = tmp_path / "out" / "final"
    folder.mkdir(parents=True)
    write_lora(LoRA(r=2), with_lora(base, LoRA(r=2)), str(base), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    return folder


def test_merge_lora_with_the_path_of_a_file(base, adapter, capsys):
    for typed in (adapter / "final_lora.pth", adapter.parent / "final_lora.pth", adapter / "lit_model.pth.lora"):
        for words in (
            [typed],
            ["--checkpoint_dir", typed],
            [f"--checkpoint_dir={typed}"],
            ["--precision", "32-true", typed],
        ):
            main(["merge_lora", *map(str, words), "--overwrite", "true"])
            out, err = capsys.readouterr()
            assert f"merged     {adapter}-merged" in out and f"{typed} is a folder now, {adapter}" in err


def test_merge_lora_with_lora_path(base, adapter, tmp_path, capsys):
    file = adapter.parent / "lit_model_lora_finetuned.pth"
    for i, model in enumerate((["--checkpoint_dir", base], [base], [f"--checkpoint_dir={base}"])):
        out = tmp_path / f"merged-{i}"
        main(["merge_lora", *map(str, [*model, "--lora_path", file, "--out_dir", out])])
        assert (out / "config.json").is_file()
        assert (
            f"--lora_path {file} is called {adapter}, and its model, {base}, --base {base}" in capsys.readouterr().err
        )


def test_paths_that_are_folders_stay(tmp_path):
    (tmp_path / "odd.pth").mkdir()
    for path in (tmp_path / "odd.pth", tmp_path / "none", Path("org/name")):
        assert result_folder(str(path)) == str(path)


def test_rows_by_csv_dir(settings):
    got = settings("finetune_lora", "X", "--csv_dir", "MyDataset.csv")
    assert got["data"]["class_path"] == "litgpt.data.JSON" and got["data"]["init_args"]["json_path"] == "MyDataset.csv"
    assert "--csv_dir MyDataset.csv is called --data JSON --data.json_path MyDataset.csv." in settings.err
    got = settings("finetune_lora", "X", "--csv_dir=my.csv", "--data", "JSON", "--data.mask_prompt", "true")
    assert got["data"]["init_args"]["json_path"] == "my.csv" and got["data"]["init_args"]["mask_prompt"] is True


def test_mask_inputs(settings, config):
    words = ["finetune_lora", "X", "--data", "JSON", "--data.json_path", "my.json"]
    got = settings(*words, "--data.mask_inputs", "true")
    assert got["data"]["init_args"]["mask_prompt"] is True
    assert "--data.mask_inputs is called --data.mask_prompt." in settings.err
    file = config("c.yaml", data={"class_path": "litgpt.data.Alpaca", "init_args": {"mask_inputs": True}})
    assert settings("finetune_lora", "X", "--config", file)["data"]["init_args"]["mask_prompt"] is True


def test_generate_base(settings):
    assert settings("generate", "base", "--checkpoint_dir", "X") == settings("generate", "X")


def test_tasks_of_2023(capsys):
    for words in (["--eval_tasks", "[a_2ds, 'b', c]"], ["--eval_tasks=[a_2ds,b,c]"], ["--eval_tasks", "a_2ds,b,c"]):
        assert translate(["--checkpoint_dir", "D", *words], "evaluate", ["checkpoint_dir", "tasks"]) == [
            "--checkpoint_dir",
            "D",
            "--tasks",
            "a_2ds,b,c",
        ]
        assert "is called --tasks a_2ds,b,c." in capsys.readouterr().err


def test_dtype_of_validate(settings):
    assert settings("validate", "X", "--dtype", "bfloat16")["precision"] == "bf16-true"
    assert "--dtype bfloat16 is called --precision bf16-true." in settings.err


BATCH = "--train.global_batch_size 8 --train.micro_batch_size 2 --train.lr_warmup_steps 10"
ROWS = "--data JSON --data.json_path data/alpaca.json"
PRINTED = [
    f"finetune_lora MODEL {ROWS} {BATCH} --train.epochs 3 --train.max_seq_length 512 --lora_r 8 --lora_alpha 16",
    f"finetune_lora MODEL --quantize bnb.nf4 {ROWS} {BATCH} --train.epochs 4 --lora_r 8",
    f"finetune_full MODEL {ROWS} {BATCH} --train.epochs 3 --train.learning_rate 5e-5",
    f"finetune_adapter MODEL {ROWS} {BATCH}",
    f"finetune_adapter_v2 MODEL {ROWS} {BATCH}",
    "finetune_lora MODEL --train.learning_rate 3e-4 --train.lr_warmup_steps 100 --train.min_lr 3e-6 "
    "--train.lr_decay_iters 10000",
    "finetune_lora MODEL --train.global_batch_size 128 --train.micro_batch_size 2",
    "finetune_lora MODEL --precision bf16-mixed",
    "finetune_lora MODEL --train.max_seq_length 8192 --train.micro_batch_size 1",
    "finetune_lora MODEL --train.gradient_accumulation_iters 16",
    f"finetune_lora MODEL {ROWS} --data.val_split_fraction 0.1",
    "finetune lora MODEL --config config_hub/finetune/phi-2/lora.yaml --precision 16-mixed --data.download_dir data",
    "finetune lora MODEL --config config_hub/finetune/phi-2/lora.yaml --precision 16-true --data.download_dir data",
    "finetune lora MODEL --config config_hub/finetune/phi-2/lora.yaml --max_seq_length 4096 --data.download_dir data",
    "finetune --checkpoint_dir MODEL/ --precision bf16-true",
]
SHORT = (PRINTED[0], PRINTED[5])


@pytest.mark.parametrize("command", [c if c in SHORT else pytest.param(c, marks=pytest.mark.long) for c in PRINTED])
def test_commands_of_guides_start(command, tokenizer_file, tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 8192}
    base = save_llama(tmp_path / "base", tokenizer_file, **sizes)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("alpaca.json", "alpaca2k.json"):
        (tmp_path / "data" / name).write_text(json.dumps(make_rows(30)))
    short = (
        "--train.max_steps 1 --accelerator cpu --eval.max_new_tokens 2 --eval.initial_validation false --out_dir out"
    )
    rows = "" if "data" in command else ROWS  # what such a command leaves out
    words = [word.replace("MODEL", str(base)) for word in f"{command} {rows} {short}".split()]
    main(words)
    assert list((tmp_path / "out" / "final").glob("*.safetensors"))


@pytest.mark.parametrize(
    "command",
    [
        *PRINTED,
        "finetune lora MODEL --config phi-2/lora --devices 4 --precision 16-true",
        "finetune_lora MODEL --devices 4",
    ],
)
def test_commands_of_guides_are_understood(command, settings):
    got = settings(*command.replace("MODEL", "org/name").split())
    assert str(got["checkpoint_dir"]).startswith("org/name")
    words = command.split()
    for flag, value in pairwise(words):
        if flag.startswith("--") and flag not in ("--data", "--config", "--checkpoint_dir", "--data.json_path"):
            home = flag[2:] if flag != "--max_seq_length" else "train.max_seq_length"
            found: Any = got
            for name in home.split("."):
                found = found[name] if name in found else found["init_args"][name]
            assert found == yaml.safe_load(value) or float(found) == float(value), flag
    assert ("--max_seq_length is called --train.max_seq_length." in settings.err) == ("--max_seq_length" in words)


@pytest.mark.long
def test_a_recipe_on_several_devices(base, tmp_path):
    (tmp_path / "alpaca2k.json").write_text(json.dumps(make_rows(60)))
    command = f"finetune lora {base} --config config_hub/finetune/phi-2/lora.yaml --devices 4 --accelerator cpu"
    short = (
        f"--data.download_dir {tmp_path} --out_dir {tmp_path / 'out'} --train.max_steps 2 --eval.max_new_tokens 2 "
        "--train.max_seq_length 256"
    )
    text = ended(start(tmp_path, f"{command} {short}".split()))
    assert "4 x cpu (ddp), bf16-true" in text and "--train.micro_batch_size 2 instead of 4" in text
    alike(tmp_path, 4)
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_from_the_path_of_an_adapter_to_a_server(adapter, tmp_path, monkeypatch, capsys):
    httpx = pytest.importorskip("httpx")
    from tests.servers import in_process

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    folder = Path("checkpoints", "meta-llama", "Llama-2-7b-hf")
    shutil.copytree(adapter, folder)
    main(["merge_lora", f"{folder}/final_lora.pth"])
    capsys.readouterr()
    main(["generate", f"{folder}-merged/", "--prompt", "What is machine learning?", "--temperature", "0"])
    answer = capsys.readouterr().out
    with in_process(f"{folder}-merged/") as (url, _):
        asked = {"prompt": "What is machine learning?", "temperature": 0}
        assert httpx.post(f"{url}/predict", json=asked).json()["output"].strip() == answer.strip() != ""


def test_without_data_it_is_alpaca(monkeypatch, base, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps(make_rows(60)))
    monkeypatch.setattr("litgpt.data.named.fetch", lambda *args: tmp_path / "rows.json")
    main(["finetune_lora", str(base), "--out_dir", str(tmp_path / "out"), "--train.max_steps=1", *BATCH.split()])
    assert "no --data: using LitGPT's default, Alpaca's 52,000 rows" in capsys.readouterr().err
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()
