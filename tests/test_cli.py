"""The command line: what stands before what, recipes by name, older spellings, and options that do not change unseen.

`python -m tests.test_cli` writes `litgpt/cli/flags.txt` anew, which completes command lines too.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import litgpt
import litgpt.data
from litgpt.__main__ import COMMANDS, main
from litgpt.cli.commands import spoken
from litgpt.cli.completion import FLAGS
from litgpt.cli.help import HIDDEN, choices_of
from litgpt.cli.help_texts import PLACEHOLDERS
from litgpt.cli.parser import HANDS_ON, make_parser
from litgpt.cli.recipes import find_recipe
from litgpt.errors import UserError
from litgpt.methods.model_source import ModelSource
from litgpt.train.optimizers import SHORT_NAMES

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "config_hub" / "finetune" / "llama-3.2-1B" / "lora.yaml"
LORA = ["finetune", "lora"]


# starting


def python(code: str, cwd: Path, path: Path = ROOT) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


LIGHT = [None, ["-h"], ["--version"], [], ["finetune", "-h"], ["__complete", "finetune", "lora", "--"]]


@pytest.mark.parametrize("words", LIGHT, ids=str)
def test_starts_light(words, tmp_path):
    call = "" if words is None else f"from litgpt.__main__ import main; main({words})"
    code = f"import sys, litgpt; {call}\nprint(sorted({{'torch', 'jsonargparse', 'lightning'}} & {{*sys.modules}}))"
    assert python(code, tmp_path).endswith("[]\n")


def test_training_starts_light(rows_file, tmp_path):
    """A run on one device imports nothing that it does not use and that takes long: each of these would be a tenth to a
    third of the time to the first step."""
    words = ["finetune", "lora", "pico", "--out_dir", str(tmp_path / "out"), "--data", "JSON", "--data.json_path",
             str(rows_file), "--train.max_steps", "1", "--train.lr_warmup_steps", "0", "--train.max_seq_length", "64",
             "--accelerator", "cpu", "--data.val_split_fraction", "0.1", "--eval.max_new_tokens", "4"]  # fmt: skip
    code = f"""import sys; from litgpt.__main__ import main; main({words})
print(sorted({{"lightning", "sympy", "torch._dynamo", "torch._inductor", "transformers"}} & {{*sys.modules}}))"""
    assert python(code, tmp_path).endswith("[]\n")


def test_help_lists_every_command(capsys):
    main(["-h"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert COMMANDS and all(f"{spoken(name)} {about}" in lines for name, (_, about) in COMMANDS.items())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{litgpt.__version__}\n"


def test_a_program_that_has_read_its_stdin(monkeypatch, capsys, tmp_path):
    (tmp_path / "lines").write_text("one\ntwo\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert lines.readline() == "one\n"
        main(["--version"])
        assert capsys.readouterr().out and lines.readline() == "two\n"


# what beats what


def test_spellings_of_one_command(settings):
    expected = settings("finetune", "lora", "X")
    assert expected["checkpoint_dir"] == "X" and expected["lora_r"] == 8
    for words in (
        ["finetune_lora", "X"],
        ["finetune", "X"],
        ["finetune", "lora", "--checkpoint_dir", "X"],
        ["finetune_lora", "--checkpoint_dir=X"],
        ["finetune", "--checkpoint_dir", "X"],
    ):
        assert settings(*words) == expected, words


def test_every_place_of_the_model_and_the_flags(settings, config):
    file = config("c.yaml", checkpoint_dir="Z", lora_r=5, lora_alpha=6, train={"epochs": 2, "max_steps": 9})
    model, flags, from_file = ["X"], ["--lora_r", "4", "--train.epochs=3", "--lora_key", "true"], ["--config", file]
    expected = settings(*LORA, "X", *flags, *from_file)
    assert expected["checkpoint_dir"] == "X" and expected["lora_r"] == 4 and expected["lora_key"] is True
    assert expected["lora_alpha"] == 6.0 and expected["lora_dropout"] == 0.05
    assert {k: expected["train"][k] for k in ("epochs", "max_steps", "min_lr")} == dict(epochs=3, max_steps=9, min_lr=0)
    for words in (
        [*from_file, *model, *flags],
        [*flags, *from_file, *model],
        [*model, *from_file, *flags],
        [*from_file, *flags, *model],
        [*flags, *model, *from_file],
        [*flags, f"--config={file}", "--checkpoint_dir", "X"],
        ["--checkpoint_dir", "X", f"--config={file}", *flags],
    ):
        assert settings(*LORA, *words) == expected, words


def test_a_flag_of_the_chosen_class_beats_its_file(settings, config):
    data = {"class_path": "JSON", "init_args": {"json_path": "a.json", "mask_prompt": True}}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}
    file = config("c.yaml", data=data, optimizer=optimizer)
    got = settings(*LORA, "X", "--data.json_path", "b.json", "--optimizer.lr", "0.25", "--config", file)
    assert got["data"]["init_args"]["json_path"] == "b.json" and got["data"]["init_args"]["mask_prompt"] is True
    assert got["optimizer"]["init_args"]["lr"] == 0.25 and got["optimizer"]["init_args"]["momentum"] == 0.9


def test_the_class_may_stand_behind_its_options(settings):
    words = ["--data", "JSON", "--data.json_path", "a.json", "--optimizer", "SGD", "--optimizer.lr", "0.25"]
    got = settings(*LORA, "X", *words[2:4], *words[:2], *words[6:], *words[4:6])
    assert got == settings(*LORA, "X", *words) and got["optimizer"]["init_args"]["lr"] == 0.25


def test_generate_computes_float32_weights_in_float32(llama, capsys, monkeypatch):
    monkeypatch.setattr("litgpt.generate.inference_model.default_precision", lambda device: "bf16-true")
    used = []
    original = ModelSource.model
    monkeypatch.setattr(
        ModelSource, "model", lambda self, dtype, *more: used.append(dtype) or original(self, dtype, *more)
    )
    for more in ([], ["--precision", "bf16-true"]):
        main(["generate", str(llama), "--max_new_tokens", "1", "--accelerator", "cpu", *more])
    assert used == [torch.float32, torch.bfloat16]


def test_switches_may_stand_without_a_value(settings):
    got = settings(*LORA, "--overwrite", "X", "--lora_key", "--lora_query", "false", "--lora_mlp=false", "--lora_head")
    assert got["checkpoint_dir"] == "X"
    switches = ("overwrite", "lora_key", "lora_query", "lora_mlp", "lora_head")
    assert [got[name] for name in switches] == [True, True, False, False, True]


def test_the_later_of_two_files_wins(settings, config):
    one = config("1.yaml", checkpoint_dir="A", lora_r=1, lora_alpha=10, train={"epochs": 1, "max_steps": 10})
    two = config("2.yaml", checkpoint_dir="B", lora_r=2, train={"epochs": 2})
    for first, second, r, epochs in ((one, two, 2, 2), (two, one, 1, 1)):
        got = settings(*LORA, "--config", first, f"--config={second}")
        assert (got["lora_r"], got["train"]["epochs"]) == (r, epochs)
        assert (got["lora_alpha"], got["train"]["max_steps"]) == (10, 10)
        assert got["checkpoint_dir"] == ("B" if r == 2 else "A")


TYPICAL = {
    "finetune_lora": "--data JSON --data.json_path rows.json --optimizer.lr 2e-5 --precision bf16-true".split(),
    "generate": ["--prompt", "null: 'ä' # 1\nand [2]", "--top_k", "null"],
}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in HANDS_ON])
def test_a_printed_config_is_a_config(settings, tmp_path, command):
    word = {"data_cache": "clear", "completion": "zsh"}.get(command, "X")
    printed = settings(command, word, *TYPICAL.get(command, []))
    text = settings.out
    assert settings(command, "--config", write(tmp_path / "c.yaml", text)) == printed
    assert settings.out == text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "JSON", "--data.json_path", "a", "--data.columns.output", "b"], {"columns": {"output": "b"}}),
        (["--config", "DATA", "--data", "JSON", "--data.seed", "3"], {"json_path": "q", "seed": 3}),
        (["--config", "DATA", "--data", "Alpaca"], {"seed": 9, "mask_prompt": False}),
        (["--config", "DATA", "--data.init_args", "{json_path: r}"], {"json_path": "r", "seed": 9}),
        (["--data.json_path", "z", "--data.class_path", "JSON"], {"json_path": "z"}),
    ],
)
def test_arguments_of_a_class(settings, config, words, expected):
    file = config("data.yaml", data={"class_path": "JSON", "init_args": {"json_path": "q", "seed": 9}})
    got = settings(*LORA, "X", *(str(file) if word == "DATA" else word for word in words))["data"]["init_args"]
    assert got | expected == got
    assert settings.err.count("does not take json_path") == ("Alpaca" in words)


def test_groups_entries_and_lists(settings, config):
    train, layers = config("train.yaml", epochs=7, max_steps=8), config("layers.yaml", lora_layers=[1])
    got = settings(*LORA, "X", "--train", train, "--train.epochs", 9, "--config", layers, "--lora_layers+", 3,
                   "--log.metadata.team", "a", "--log.metadata.place", "b")  # fmt: skip
    assert (got["train"]["epochs"], got["train"]["max_steps"], got["lora_layers"]) == (9, 8, [1, 3])
    assert got["log"]["metadata"] == {"team": "a", "place": "b"}


# recipes and URLs


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.2-1B/lora",
        "LLAMA-3.2-1b/LORA",
        "llama-3.2-1b/lora.yaml",
        "finetune/llama-3.2-1B/lora",
        "config_hub/finetune/llama-3.2-1B/lora.yaml",
        "config_hub/finetune/llama-3.2-1b/lora",
        str(RECIPE),
    ],
)
def test_recipe_from_anywhere(settings, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).file.read_bytes() == RECIPE.read_bytes()
    got = settings("finetune", "lora", "X", "--config", name, "--train.epochs", 1)
    expected = yaml.safe_load(RECIPE.read_text())
    assert got["lora_r"] == expected["lora_r"] == 32 and got["checkpoint_dir"] == "X"
    assert got["train"] | expected["train"] | {"epochs": 1} == got["train"] and got["train"]["epochs"] == 1
    assert got["optimizer"]["init_args"]["betas"] == expected["optimizer"]["betas"]


def test_a_file_here_comes_before_a_recipe(settings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-3.2-1B").mkdir()
    write(tmp_path / "llama-3.2-1B" / "lora", "lora_r: 3\n")
    assert settings(*LORA, "X", "--config", "llama-3.2-1B/lora")["lora_r"] == 3


@pytest.fixture
def server() -> Iterator[str]:
    """Answers /c.yaml with a config, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/c.yaml"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(b"lora_r: 5\ntrain:\n  epochs: 2\n" if found else b"lora_r: 6\n")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_config_at_a_url(settings, server, capsys):
    got = settings(*LORA, "X", "--train.epochs", 3, "--config", f"{server}/c.yaml")
    assert (got["lora_r"], got["train"]["epochs"]) == (5, 3)
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", "X", "--config", f"{server}/d.yaml"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{server}/d.yaml" in error and "404" in error


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://example.org/main/config_hub/finetune/phi-2/lora.yaml", "--config phi-2/lora"),
        ("https://example.org/main/config_hub/finetune/my-model/lora.yaml", ""),
        ("https://example.org/phi-2/lora.yaml", ""),
    ],
)
def test_a_recipe_whose_address_cannot_be_reached(url, hint, capsys, monkeypatch):
    def fetch_text(url: str) -> str:
        raise UserError(f"Cannot fetch {url}.")

    monkeypatch.setattr("litgpt.storage.http.fetch_text", fetch_text)
    with pytest.raises(SystemExit):
        main(["finetune", "lora", "X", "--config", url])
    error = capsys.readouterr().err
    assert url in error and ("--config" in error) == bool(hint) and hint in error


def test_two_models(capsys):
    """A word that looks like a model is not dropped because of the option of the same meaning."""
    for words in (["chat", "A"], ["generate", "lora"], ["finetune", "lora", "A"], ["merge_lora", "A"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--checkpoint_dir", "B"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"got 2: B, {words[-1]}." in error


# what older recipes say


def test_flat_keys_go_to_their_group(settings, config):
    file = config("c.yaml", global_batch_size=8, train={"epochs": 2}, max_seq_length=64, lr_warmup_steps=3)
    got = settings(*LORA, "X", "--config", file)
    names = ("global_batch_size", "max_seq_length", "lr_warmup_steps", "epochs")
    assert [got["train"][k] for k in names] == [8, 64, 3, 2]
    for old in names[:3]:
        assert f"litgpt: {file}: {old} is called train.{old}.\n" in settings.err
    assert settings.err.count("\n") == 3


def test_flat_flags_go_to_their_group(settings, config):
    file = config("c.yaml", max_seq_length=32)
    got = settings(*LORA, "X", "--max_seq_length", 64, "--global_batch_size=8", "--config", file)
    assert (got["train"]["max_seq_length"], got["train"]["global_batch_size"]) == (64, 8)
    assert "litgpt: --max_seq_length is called --train.max_seq_length.\n" in settings.err
    assert "litgpt: --global_batch_size is called --train.global_batch_size.\n" in settings.err


def test_the_grouped_key_wins_over_the_flat_one(settings, config):
    one = config("1.yaml", epochs=7, train={"epochs": 2})  # yaml.safe_dump sorts: the flat key stands first
    two = write(one.with_name("2.yaml"), "train:\n  epochs: 2\nepochs: 7\n")
    assert [settings(*LORA, "X", "--config", f)["train"]["epochs"] for f in (one, two)] == [2, 2]


def test_another_name(settings):
    got = settings("merge_lora", "X", "--pretrained_checkpoint_dir", "Y")
    assert got["base"] == "Y" and "--pretrained_checkpoint_dir is called --base" in settings.err


# the options


@cache
@litgpt.data.inner_classes()
def parsers() -> dict[str, ArgumentParser]:
    """A parser for every command, and one for the options of every data set."""
    made: dict[str, ArgumentParser] = {name: make_parser(where, name) for name, (where, _) in COMMANDS.items()}
    for name in sorted(litgpt.data.MODULES):
        made[f"--data {name}"] = ArgumentParser()
        made[f"--data {name}"].add_class_arguments(litgpt.data.inner_class(name), "data")
    return made


def options(parser: ArgumentParser) -> Iterator[tuple[str, Any]]:
    """Names and actions, those of the library excepted."""
    for action in parser._actions:
        name = max(action.option_strings, key=len, default="")
        library = name in ("", "--help", "--print_config") or name.endswith(".help")
        if not library and type(action).__name__ != "_ActionConfigLoad":  # `--train FILE`, a whole group
            yield name, action


def flags_text() -> str:
    lines = []
    for command, parser in parsers().items():
        places = [f"--{name}" for name in getattr(parser, "positionals", [])]
        for name, action in options(parser):
            default = "required" if action.required else json.dumps(action.default, default=plain)
            flag = name.removesuffix("+")
            choices = "|".join(help_choices(flag.removeprefix("--"), action))
            choices = f"<{PLACEHOLDERS.get(action.dest, choices)}>" if flag in places else choices
            lines.append("\t".join([command, flag, default, choices]) + "\n")
    return "".join(lines)


def help_choices(name: str, action: Any) -> list[str]:
    if str(action.help).startswith(HIDDEN):
        return ["hidden"]
    return list(SHORT_NAMES) if name == "optimizer" else choices_of(name, getattr(action, "_typehint", None))


def plain(default: Any) -> Any:
    return str(default) if isinstance(default, Path) else vars(default)


def test_options_are_those_that_were_agreed_on():
    text = FLAGS.read_text(encoding="utf-8")
    assert sorted(flags_text().splitlines()) == sorted(text.splitlines()), (
        "Options or defaults changed. If that is meant, write litgpt/cli/flags.txt anew: python -m tests.test_cli"
    )


def test_every_option_is_explained():
    found = [(command, name, action.help) for command, p in parsers().items() for name, action in options(p)]
    assert len(found) > 40
    assert not [(command, name) for command, name, text in found if not text or len(text) < 10]


# the installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as a wheel brings it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], capture_output=True, text=True)
    if build.returncode and "No matching distribution found for hatchling" in build.stderr:
        pytest.skip("building the wheel needs hatchling, which cannot be fetched: there is no network")
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "lib", wheel], check=True)
    return folder / "lib"


def test_wheel_brings_the_recipes(installed, tmp_path):
    code = (
        "import litgpt, litgpt.cli.recipes as r; print(litgpt.__file__); print(r.find_recipe('llama-3.2-1b/lora').file)"
    )
    package, recipe = map(Path, python(code, tmp_path, installed).split())
    assert package == installed / "litgpt" / "__init__.py"
    assert recipe.is_relative_to(package.parent) and recipe.read_bytes() == RECIPE.read_bytes()
    shipped = {p.relative_to(package.parent / "config_hub") for p in (package.parent / "config_hub").rglob("*.yaml")}
    assert shipped == {p.relative_to(ROOT / "config_hub") for p in (ROOT / "config_hub").rglob("*.yaml")}
    assert all(
        (package.parent / name).is_file()
        for name in ("serve/page/main.js", "serve/page/vendor/marked.LICENSE", "cli/flags.txt", "cli/complete.bash")
    )
    code = "import runpy, sys; sys.argv[1:] = ['-h']; runpy.run_module('litgpt', run_name='__main__')"
    assert "finetune lora" in python(code, tmp_path, installed)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--lr 0.1", {"optimizer.init_args.lr": 0.1}),
        ("--epochs 2", {"train.epochs": 2}),
        ("--num_train_epochs=3", {"train.epochs": 3}),
        ("--batch_size 4", {"train.global_batch_size": 4}),
        ("--per_device_train_batch_size 2", {"train.micro_batch_size": 2}),
        ("--load_in_4bit", {"quantize": "bnb.nf4"}),
        ("--load_in_4bit true --seed 3", {"quantize": "bnb.nf4", "seed": 3}),
        ("--load_in_4bit=false", {"quantize": None}),
        ("--bf16 --gradient_checkpointing", {"precision": "bf16-true", "train.activation_checkpointing": True}),
        ("--quantize nf4", {"quantize": "bnb.nf4"}),
        ("--quantize=int8 --accelerator gpu", {"quantize": "bnb.int8", "accelerator": "cuda"}),
        ("--lora_rank 4 --output_dir elsewhere", {"lora_r": 4, "out_dir": "elsewhere"}),
        ("--lr 0.1 --lr 0.2 --seed 3", {"optimizer.init_args.lr": 0.2, "seed": 3}),
        ("--load-in-4bit --max-grad-norm 0.5", {"quantize": "bnb.nf4", "train.max_norm": 0.5}),
        ("--out-dir here --train.global-batch-size=4", {"out_dir": "here", "train.global_batch_size": 4}),
        ("--max-seq-length 64 --learning-rate 1e-3", {"train.max_seq_length": 64, "train.learning_rate": 1e-3}),
    ],
)
def test_words_of_other_tools(words, options, settings):
    """They mean the same, and the settings have litgpt's names."""
    found = settings("finetune", "lora", "pico", *words.split())
    for name, value in options.items():
        at = found
        for key in name.split("."):
            at = at[key]
        assert at == value, name


def test_words_of_other_tools_in_a_file(settings, config):
    """An option under litgpt's own name wins over the same under another."""
    fields = {"lr": 0.1, "num_train_epochs": 3, "batch_size": 4, "bf16": True, "load_in_4bit": True}
    got = settings(*LORA, "X", "--config", config("c.yaml", accelerator="gpu", **fields))
    assert (got["optimizer"]["init_args"]["lr"], got["train"]["epochs"], got["train"]["global_batch_size"]) == (
        0.1,
        3,
        4,
    )
    assert (got["precision"], got["quantize"]) == ("bf16-true", "bnb.nf4") and got["accelerator"] in ("cuda", "mps")
    got = settings(
        *LORA, "X", "--config", config("d.yaml", train={"epochs": 2}, num_train_epochs=9, load_in_4bit=False)
    )
    assert got["train"]["epochs"] == 2 and got["quantize"] is None


def test_bf16_keeps_trained_weights_in_float32(settings):
    for command, precision in (("full", "bf16-mixed"), ("lora", "bf16-true"), ("adapter", "bf16-true")):
        assert settings("finetune", command, "pico", "--bf16")["precision"] == precision
    assert settings("pretrain", "pico", "--bf16")["precision"] == "bf16-mixed"
    assert settings("generate", "pico", "--bf16")["precision"] == "bf16-true"


@pytest.mark.parametrize(
    ("words", "option", "ours"),
    [
        ("finetune lora pico --fp16", "--fp16", "--precision"),
        ("finetune lora pico --dataset a.json", "--dataset", "--data"),
        ("finetune lora pico --report_to wandb", "--report_to", "--logger_name"),
        ("finetune lora pico --model_name_or_path X", "--model_name_or_path", "--checkpoint_dir"),
        ("finetune lora pico --lr", "--lr", "--optimizer.lr"),
        ("finetune lora pico --lr --seed 3", "--lr", "--optimizer.lr"),
        ("finetune full pico --lora_rank 4", "--lora_rank", ""),
        ("chat pico --gradient_checkpointing", "--gradient_checkpointing", ""),
        ("chat pico --epochs 3", "--epochs", ""),
        ("chat pico --system_prompt Hi", "--system_prompt", "--sys_prompt"),
    ],
)
def test_other_words_are_answered_with_ours(words, option, ours, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    error = capsys.readouterr().err
    assert f"Unknown option {option}." in error and (f"'{ours}'" in error or not ours)


@pytest.mark.parametrize("word", ["train", "sft"])
def test_commands_of_other_tools(word, settings):
    assert settings(word, "pico") == settings("finetune", "pico")
    assert settings(word, "full", "pico") == settings("finetune", "full", "pico")


def test_an_unknown_option_without_a_value_is_unknown(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "pico", "--frobnicate"])
    assert "Unknown option --frobnicate" in capsys.readouterr().err


if __name__ == "__main__":
    FLAGS.write_text(flags_text(), encoding="utf-8", newline="\n")
