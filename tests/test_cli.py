"""The command line: what stands before what, recipes by name, older spellings, and options that do not change unseen.

`python -m tests.test_cli` writes `cli_flags.txt` anew.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import litgpt
import litgpt.data
from litgpt.__main__ import COMMANDS, main, spoken
from litgpt.cli import HANDS_ON, find_recipe, make_parser
from litgpt.loading import Source
from litgpt.quantize import bitsandbytes

ROOT = Path(__file__).parent.parent
FLAGS = Path(__file__).with_name("cli_flags.txt")
RECIPE = ROOT / "config_hub" / "finetune" / "llama-3.2-1B" / "lora.yaml"
LORA = ["finetune", "lora"]


@pytest.fixture
def settings(capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """What a command line comes to, as `--print_config` has it."""

    def run(*words: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), "--print_config"])
        run.out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        assert not stop.value.code, run.err  # type: ignore[attr-defined]
        return yaml.safe_load(run.out)  # type: ignore[attr-defined]

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Write a config file."""

    def write(name: str, **fields: object) -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(fields))
        return tmp_path / name

    return write


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


@pytest.mark.parametrize("words", [None, ["-h"], ["--version"], []], ids=["import", "-h", "--version", "nothing"])
def test_starts_light(words, tmp_path):
    call = "" if words is None else f"from litgpt.__main__ import main; main({words})"
    code = f"import sys, litgpt; {call}\nprint(sorted({{'torch', 'jsonargparse', 'lightning'}} & {{*sys.modules}}))"
    assert python(code, tmp_path).endswith("[]\n")


def test_help_lists_every_command(capsys):
    main(["-h"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert COMMANDS and all(f"{spoken(name)} {about}" in lines for name, (_, about) in COMMANDS.items())


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{litgpt.__version__}\n"


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
    monkeypatch.setattr("litgpt.commands.generate.default_precision", lambda device: "bf16-true")
    used = []
    original = Source.model
    monkeypatch.setattr(Source, "model", lambda self, dtype, *more: used.append(dtype) or original(self, dtype, *more))
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
    printed = settings(command, "X", *TYPICAL.get(command, []))
    text = settings.out
    assert settings(command, "--config", write(tmp_path / "c.yaml", text)) == printed
    assert settings.out == text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


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
    assert find_recipe(name).read_bytes() == RECIPE.read_bytes()
    got = settings("finetune", "lora", "X", "--config", name, "--train.epochs", 1)
    expected = yaml.safe_load(RECIPE.read_text())
    assert got["lora_r"] == expected["lora_r"] == 32 and got["checkpoint_dir"] == "X"
    assert got["train"] | expected["train"] | {"epochs": 1} == got["train"] and got["train"]["epochs"] == 1
    assert got["optimizer"]["init_args"]["betas"] == expected["optimizer"]["init_args"]["betas"]


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
    assert stop.value.code == 2 and f"{server}/d.yaml cannot be fetched" in error and "404" in error


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


# the optimizer, the learning rate, the size of a step


ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0002, "weight_decay": 0.1, "betas": [0.9, 0.95]}}


@pytest.mark.parametrize("name", ["SGD", "torch.optim.SGD", '{"class_path": "SGD"}', "{class_path: torch.optim.SGD}"])
def test_optimizer_by_name(settings, config, name):
    expected = settings(*LORA, "X", "--optimizer", "SGD")["optimizer"]
    assert (
        expected["class_path"] == "torch.optim.SGD" and expected["init_args"]["weight_decay"] == 0.0
    )  # AdamW's is 0.01
    assert settings(*LORA, "X", "--optimizer", name)["optimizer"] == expected
    assert (
        settings(*LORA, "X", "--optimizer.class_path", name.strip('{}"').split()[-1].strip('"'))["optimizer"]
        == expected
    )
    file = config("c.yaml", optimizer=yaml.safe_load(name))
    assert settings(*LORA, "X", "--config", file)["optimizer"] == expected and not settings.err


def test_an_argument_alone_keeps_the_class(settings, config):
    for words in (
        ["--optimizer.lr", "1e-3"],
        ["--optimizer.init_args.lr", "1e-3"],
        ["--optimizer.init_args", "{lr: 1e-3}"],
    ):
        assert settings(*LORA, "X", *words)["optimizer"]["init_args"]["lr"] == 0.001
    for given in ({"lr": 0.5}, {"init_args": {"lr": "5e-1"}}):
        got = settings(*LORA, "X", "--config", config("c.yaml", optimizer=given))["optimizer"]
        assert got["class_path"] == "torch.optim.AdamW" and got["init_args"]["lr"] == 0.5


def test_another_class_takes_what_was_given_and_it_knows(settings, config):
    file = config("c.yaml", optimizer=ADAMW)
    got = settings(*LORA, "X", "--config", file, "--optimizer", "SGD", "--optimizer.momentum", 0.9)["optimizer"]
    arguments = got["init_args"]
    assert (arguments["lr"], arguments["weight_decay"], arguments["momentum"]) == (0.0002, 0.1, 0.9)
    assert "betas" not in arguments
    assert settings.err.count("\n") == 1
    assert "SGD keeps lr 0.0002, weight_decay 0.1 and does not know betas." in settings.err
    again = settings(*LORA, "X", "--config", file, "--optimizer", "AdamW")["optimizer"]["init_args"]
    assert again["betas"] == [0.9, 0.95] and not settings.err


def test_a_second_file_with_another_class(settings, config):
    files = ["--config", config("1.yaml", optimizer=ADAMW), "--config", config("2.yaml", optimizer="Muon")]
    got = settings(*LORA, "X", *files)["optimizer"]
    assert got["class_path"] == "litgpt.train.optimizers.Muon"
    assert got["init_args"]["betas"] == [0.9, 0.95] and got["init_args"]["momentum"] == 0.95
    assert f"litgpt: {files[3]}: of the config's options" in settings.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "AdanW"], "--optimizer AdanW: no such optimizer. Did you mean 'AdamW'?"),
        (["--optimizer", "torch.optim.Adamw"], "Did you mean 'AdamW'?"),
        (["--optimizer", "xyz"], "Choose from Adadelta, Adafactor"),
        (["--optimizer", "json.JSONDecoder"], "no such optimizer"),
        (["--optimizer", "torch.optim.LBFGS"], "does not fit this training loop"),
        (["--optimizer", "SGD", "--optimizer.betas", "[0.9, 0.95]"], "Unknown option --optimizer.betas"),
        (["--optimizer.lr", "fast"], "--optimizer.lr fast: a number is wanted"),
        (["--train.learning_rate", "fast"], "--train.learning_rate fast: a number is wanted"),
        (["--train.learning_rate", "fast", "--optimizer.lr", "1"], "disagree"),
        (["--optimizer", "{class_path: SGD, init_args: 3}"], "init_args of the optimizer is 3; a mapping is wanted"),
        (["--optimizer", "{class_path: ["], "a mapping is wanted"),
        (["--optimizer.init_args", "0.1"], "--optimizer.init_args 0.1: a mapping is wanted"),
        (["--train.lr_schedule", "cosin"], "choose from cosine, linear, constant. Did you mean 'cosine'?"),
    ],
)
def test_what_is_no_optimizer(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([*LORA, "X", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bitsandbytes_is_an_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bitsandbytes.cache_clear()  # another test may have imported it
    with pytest.raises(SystemExit):
        main([*LORA, "X", "--optimizer", "PagedAdamW8bit"])
    assert "pip install 'litgpt[quantize]'" in capsys.readouterr().err


@pytest.mark.parametrize("case", range(16))
def test_learning_rate_from_everywhere(settings, config, capsys, case):
    """All combinations of where `learning_rate` and the optimizer's `lr` stand."""
    flag_rate, flag_lr, file_rate, file_lr = (bool(case & bit) for bit in (1, 2, 4, 8))
    fields: dict[str, Any] = {"train": {"learning_rate": 0.3}} if file_rate else {}
    fields |= {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.4}}} if file_lr else {}
    words = ["--train.learning_rate", 0.1] * flag_rate + ["--optimizer.lr", 0.2] * flag_lr
    words += ["--config", config("c.yaml", lora_r=4, **fields)]
    if flag_rate and flag_lr:
        with pytest.raises(SystemExit) as stop:
            main([*LORA, "X", *map(str, words)])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "--train.learning_rate 0.1 and --optimizer.lr 0.2 disagree: give one of them." in error
        return
    order = ((flag_rate, 0.1), (flag_lr, 0.2), (file_rate, 0.3), (file_lr, 0.4))
    expected = next((value for given, value in order if given), 0.001)
    got = settings(*LORA, "X", *words)
    assert got["optimizer"]["init_args"]["lr"] == expected
    assert got["train"]["learning_rate"] in ((expected,) if flag_rate or file_rate else (None,))
    said = "train.learning_rate 0.3 wins over the optimizer's lr 0.4" in settings.err
    assert said == (file_rate and file_lr)


def test_learning_rate_more(settings, config):
    def rate(*words: object) -> tuple[Any, Any]:
        got = settings(*LORA, "X", *words)
        return got["train"]["learning_rate"], got["optimizer"]["init_args"]["lr"]

    assert rate("--train.learning_rate", "1e-4", "--optimizer.lr", 0.0001) == (1e-4, 1e-4)  # they agree
    assert rate("--learning_rate", "1e-4") == (1e-4, 1e-4)  # its old place
    assert rate("--train.learning_rate", 0.1, "--optimizer", "SGD") == (0.1, 0.1)
    one, two = config("1.yaml", train={"learning_rate": 0.1}), config("2.yaml", optimizer=ADAMW)
    assert rate("--config", one, "--config", two) == (2e-4, 2e-4)
    assert rate("--config", two, "--config", one) == (0.1, 0.1)
    assert rate("--config", one, "--train.learning_rate", "null") == (None, 0.001)
    flat = config("3.yaml", learning_rate="5e-5", min_lr="1e-6")
    assert rate("--config", flat) == (5e-5, 5e-5)


def test_size_of_a_step(settings, config, capsys):
    def size(*words: object) -> tuple[Any, Any]:
        got = settings(*LORA, "X", *words)["train"]
        return got["gradient_accumulation_iters"], got["global_batch_size"]

    times = config("1.yaml", train={"gradient_accumulation_iters": 4})
    rows = config("2.yaml", train={"global_batch_size": 8})
    both = config("3.yaml", train={"gradient_accumulation_iters": 4, "global_batch_size": 8})
    assert size("--train.gradient_accumulation_iters", 4)[0] == size("--config", times)[0] == 4
    assert size("--config", times, "--train.global_batch_size", 8) == (None, 8)
    assert size("--config", rows, "--train.gradient_accumulation_iters", 4)[0] == 4
    assert size("--config", times, "--config", rows) == (None, 8)
    assert size("--config", both)[0] == 4 and "gradient_accumulation_iters 4 wins over" in settings.err
    flags = ["--train.gradient_accumulation_iters", 4, "--train.global_batch_size"]
    assert size(*flags, 16, "--train.micro_batch_size", 2, "--devices", 2)[0] == 4
    for words in ([*flags, 16], [*flags, 4, "--devices", "auto"], [*flags, 4, "--devices", 2]):
        with pytest.raises(SystemExit) as stop:
            main([*LORA, "X", *map(str, words)])
        assert stop.value.code == 2 and "disagree" in capsys.readouterr().err


# the options


def parsers() -> dict[str, ArgumentParser]:
    """A parser for every command, and one for the options of every data set."""
    made: dict[str, ArgumentParser] = {name: make_parser(where, name) for name, (where, _) in COMMANDS.items()}
    for name in sorted({*litgpt.data.__all__} - {"DataModule"}):
        made[f"--data {name}"] = ArgumentParser()
        made[f"--data {name}"].add_class_arguments(getattr(litgpt.data, name), "data")
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
        for name, action in options(parser):
            default = "required" if action.required else json.dumps(action.default, default=plain)
            lines.append(f"{command} {name} {default}\n")
    return "".join(lines)


def plain(default: Any) -> Any:
    return str(default) if isinstance(default, Path) else vars(default)


def test_options_are_those_that_were_agreed_on():
    text = FLAGS.read_text(encoding="utf-8")
    assert flags_text().splitlines() == text.splitlines(), (
        "Options or defaults changed. If that is meant, write tests/cli_flags.txt anew: python -m tests.test_cli"
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
    code = "import litgpt.cli; print(litgpt.__file__); print(litgpt.cli.find_recipe('llama-3.2-1b/lora'))"
    package, recipe = map(Path, python(code, tmp_path, installed).split())
    assert package == installed / "litgpt" / "__init__.py"
    assert recipe.is_relative_to(package.parent) and recipe.read_bytes() == RECIPE.read_bytes()
    shipped = {p.relative_to(package.parent / "config_hub") for p in (package.parent / "config_hub").rglob("*.yaml")}
    assert shipped == {p.relative_to(ROOT / "config_hub") for p in (ROOT / "config_hub").rglob("*.yaml")}
    code = "import runpy, sys; sys.argv[1:] = ['-h']; runpy.run_module('litgpt', run_name='__main__')"
    assert "finetune lora" in python(code, tmp_path, installed)


if __name__ == "__main__":
    FLAGS.write_text(flags_text(), encoding="utf-8", newline="\n")
