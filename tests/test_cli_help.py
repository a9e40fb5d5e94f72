"""The two layers of help, and completion in a shell."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from litgpt.__main__ import COMMANDS, main
from litgpt.cli.commands import COMPLETE, GROUPS, HANDS_ON, prefix_help, spoken, usage
from litgpt.cli.completion import FILES, candidates
from litgpt.cli.help import LINES, MOST, SWEEPS, WIDTH, brief_help, class_sections, first_clause, full_help, options_of
from litgpt.cli.help_texts import EXAMPLES, IMPORTANT, PAGES, PLACEHOLDERS
from litgpt.data import inner_classes
from tests.test_cli import ROOT, parsers

PYTHON_WORDS = (
    r"\b(Union|Optional|Literal|Sequence|Namespace|True|False|None|NoneType|str|int|float|bool)\b|<class|typing"
)


def shown(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What a command line prints."""
    try:
        main(list(words))
    except SystemExit as e:
        assert not e.code, capsys.readouterr().err
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  --(\S+)", text, re.MULTILINE)


# -h


@pytest.mark.parametrize("command", COMMANDS)
def test_brief_help_fits_a_screen(command):
    text = brief_help(parsers()[command])
    lines = text.splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(f"usage: litgpt {spoken(command)} ") and lines[0].endswith("[options]")
    assert len(re.findall(r"^  litgpt ", text, re.MULTILINE)) == 2
    assert len(flags_in(text)) <= MOST and f"litgpt {spoken(command)} -h all" in text
    assert (ROOT / lines[-1].split()[-1]).is_file()


def test_brief_help_has_the_options_that_most_people_need():
    """In the order of the table, followed by others if there is room."""
    for command in ("finetune_lora", "generate", "serve", "evaluate"):
        names = flags_in(brief_help(parsers()[command]))
        known = [name for name in IMPORTANT if name in names]
        assert len(names) == MOST and names[: len(known)] == known
    assert {"data", "optimizer.lr", "train.epochs", "lora_r"} < set(flags_in(brief_help(parsers()["finetune_lora"])))


@inner_classes()
def test_tables_name_what_there_is():
    options = {name for p in parsers().values() if hasattr(p, "positionals") for name in names_of(p)}
    assert not set(IMPORTANT) - options and not set(PLACEHOLDERS) - options
    assert [*EXAMPLES] and set(EXAMPLES) == set(COMMANDS)
    assert all((ROOT / "tutorials" / page).is_file() for page in PAGES.values())


def names_of(parser) -> list[str]:
    sections = [options_of(parser), *class_sections(parser, {}).values()]
    return [*parser.positionals, *(option.name for section in sections for option in section)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in HANDS_ON])
def test_examples_are_understood(command, settings):
    for example in EXAMPLES[command]:
        words = shlex.split(example.partition(" >")[0])
        if "list" not in words:
            settings(*words)


def test_the_first_clause():
    assert first_clause("Rank (small) of it; or not. More.", 80) == "Rank of it."
    assert (
        first_clause("One thing that is said at some length, and another.", 45)
        == "One thing that is said at some length."
    )
    assert first_clause("By e.g. this. That.", 80) == "By e.g. this."


# -h all


@pytest.mark.parametrize("command", COMMANDS)
@inner_classes()
def test_full_help_has_every_option(command):
    parser = parsers()[command]
    text = full_help(parser, {})
    expected = [name for name in names_of(parser) if name not in parser.positionals]
    expected += [option.name for option in SWEEPS] if command.startswith("finetune_") else []
    assert sorted(flags_in(text)) == sorted(expected) and len(expected) == len(set(expected))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert not re.findall(PYTHON_WORDS, text)


def test_full_help_has_groups_and_choices(capsys):
    text = shown(capsys, "finetune", "lora", "-h", "all")
    for heading in ("Options:", "Training options:", "Which layers get an update, and of what kind:"):
        assert f"\n{heading}\n" in text
    assert "--train.lr_schedule cosine|linear|constant\n" in text and "[default: cosine]" in text
    assert "--lora_r number" in text and "--overwrite true|false" in text and "--out_dir folder" in text
    assert "teamspace" not in text  # has no effect


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("-h all", "data.json_path"),
        ("-h all --data LIMA", "data.include_multiturn_conversations"),
        ("--data=LIMA --help all", "data.include_multiturn_conversations"),
        ("pico texts/*.txt -h all", "data.train_data_path"),
        ("--config DATA -h all", "data.include_multiturn_conversations"),
        ("-h all --optimizer SGD", "optimizer.momentum"),
    ],
)
def test_full_help_of_the_chosen_data_set(words, option, config, capsys):
    file = str(config("c.yaml", data="LIMA"))
    text = shown(capsys, "finetune", "lora", *(file if word == "DATA" else word for word in words.split()))
    found = flags_in(text)
    assert option in found and ("data.json_path" in found) == (option.startswith(("data.json", "optimizer")))


def test_help_comes_before_everything_else(capsys):
    """Whatever else is wrong with the command line."""
    assert shown(capsys, "finetune", "lora", "A", "B", "--frobnicate", "x", "-h").startswith(
        "usage: litgpt finetune lora"
    )
    assert shown(capsys, "plan", "finetune", "lora", "--gpu", "24 GB", "-h", "all").startswith("usage: litgpt plan")
    assert shown(capsys, "finetune", "lora", "--data", "-h") == shown(capsys, "finetune", "lora", "-h")
    assert shown(capsys, "chat", "--help=all") == shown(capsys, "chat", "-h", "all")
    assert shown(capsys, "help", "chat") == shown(capsys, "chat", "--help")
    assert "--data.download_dir" in shown(capsys, "finetune", "--data.help", "Alpaca")


# litgpt -h


def test_commands_are_grouped(capsys):
    text = shown(capsys, "-h")
    assert list(GROUPS) == ["Train", "Use", "Share", "Data", "Look", "LitGPT's other names"]
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == list(GROUPS) and text == usage() + "\n"
    assert max(map(len, text.splitlines())) <= WIDTH


def test_commands_of_two_words_are_listed(capsys):
    for words in (["finetune", "-h"], ["train", "--help"]):
        text = shown(capsys, *words)
        assert text == prefix_help("finetune") + "\n" and "finetune adapter_v2" in text
    assert "data check" in shown(capsys, "data", "-h") and "data cache" in shown(capsys, "data", "-h", "all")
    assert "tokenizer train" in shown(capsys, "tokenizer", "-h")
    assert shown(capsys, "finetune", "-h", "all") == shown(capsys, "finetune", "lora", "-h", "all")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data", "'data' is not a command by itself. Choose from: data check, data cache."),
        ("data frob", "'data frob' is not a command. Choose from: data check, data cache."),
        ("finetune lroa", "Did you mean 'finetune lora'? See: litgpt finetune -h"),
        ("data check_", "Did you mean 'data check'? See: litgpt data -h"),
        ("evalaute", "Did you mean 'evaluate'? See: litgpt -h"),
    ],
)
def test_unknown_commands(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


# completion


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for file in ("checkpoints/Org/Model-1B/config.json", "out/finetune/lora/final/config.json", "rows 1.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODELS = ["Org/Model-1B", "out/finetune/lora/final", "pico"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("finet", ["finetune"]),
        (
            "finetune ",
            [FILES, *sorted([*MODELS, "lora", "full", "adapter", "adapter_v2", "dpo", "kto", "orpo", "simpo", "cpo"])],
        ),
        ("train l", [FILES, "lora"]),
        ("finetune lora ", [FILES, *MODELS]),
        ("finetune lora --train.ep", ["--train.epochs"]),
        ("finetune lora pico --optimizer.l", ["--optimizer.lr"]),
        ("finetune lora pico --quantize bnb.i", ["bnb.int8", "bnb.int8-training"]),
        ("finetune lora pico --quantize=bnb.i", ["bnb.int8", "bnb.int8-training"]),
        ("finetune lora pico --quantize = bnb.i", ["bnb.int8", "bnb.int8-training"]),  # as bash has it
        ("finetune lora pico --strategy =", ["auto", "ddp", "fsdp"]),
        ("finetune lora pico --data Alpaca2", [FILES, "Alpaca2k"]),
        ("finetune lora --data LIMA --data.inc", ["--data.include_multiturn_conversations"]),
        ("finetune lora --data a.csv --data.js", ["--data.json_path"]),
        ("finetune lora --config qwen3-0", [FILES, "qwen3-0.6b/lora", "qwen3-0.6b/qlora"]),
        ("finetune full --config llama-3.2-1", [FILES, "llama-3.2-1B/full"]),
        ("finetune lora --overwrite f", [FILES, "false"]),
        ("finetune lora --train.epochs ", []),
        ("finetune lora --log.teams", []),  # has no effect
        ("chat pico ", [FILES]),
        ("chat --base O", [FILES, "Org/Model-1B"]),
        ("serve pico --adapters sql = out/", [FILES]),
        ("data c", ["cache", "check"]),
        ("data cache ", ["clear", "list"]),
        ("completion ", ["bash", "fish", "zsh"]),
        ("plan ", ["chat", "finetune", "generate", "pretrain", "serve"]),
        ("plan --gpu x finetune lora O", [FILES, "Org/Model-1B"]),
        ("plan finetune lora pico --pri", ["--price"]),
        ("plan finetune lora pico --num_n", ["--num_nodes"]),
        ("verify-resume lora pico --ste", ["--steps"]),
        ("lroa ", []),
        ("-", ["--help", "--version", "-h"]),
    ],
)
def test_candidates(words, expected, folder):
    assert candidates(words.split(" ")) == expected


def test_bash_completes(folder):
    """In a bash that has read the script: what it offers for the last word."""
    program = folder / "litgpt"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m litgpt "$@"\n')
    program.chmod(0o755)
    lines = [f"source {ROOT}/litgpt/cli/complete.bash", "complete -p litgpt"]
    cases = {
        ("litgpt", "finet"): ["finetune"],
        ("litgpt", "chat", ""): ["Org/Model-1B", "out/finetune/lora/final", "pico", "rows 1.csv"],
        ("litgpt", "finetune", "lora", "--data", "=", "ro"): ["rows 1.csv"],
        ("litgpt", "finetune", "lora", "--train.epo"): ["--train.epochs"],
    }
    for words in cases:
        lines.append(f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}")
        lines.append('_litgpt ./litgpt; printf "%s\\n" "${COMPREPLY[@]}" --')
    run = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    first, *answers = run.stdout.split("--\n")[:-1]
    found = [first.splitlines()[1:], *map(str.splitlines, answers)]
    assert first.startswith("complete -F _litgpt litgpt") and len(found) == len(cases), run.stderr
    for (words, expected), got in zip(cases.items(), found):
        assert set(expected) <= set(got), words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_valid(shell, capsys, tmp_path):
    text = shown(capsys, "completion", shell)
    assert text.count(f" {COMPLETE} ") == text.count(f'"{FILES}"') == 1
    (tmp_path / "script").write_text(text)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert not subprocess.run([shell, "-n", tmp_path / "script"]).returncode
