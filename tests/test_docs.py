"""What the pages tell a reader to type works, and what they link to is there.

All commands are parsed; those of the pages in `QUICK` are run too, those of the others in the long tests. They run one
after the other in a folder where tiny models stand under the names of the real ones.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest

from litgpt.__main__ import COMMANDS, main
from litgpt.cli.commands import spoken
from litgpt.model.config import known_models
from tests.conftest import make_rows, save_llama
from tests.hub_server import Repo, serve
from tests.pages import LINKED, OTHERS, PAGES, ROOT, Command, anchors, blocks, commands, links, name_of
from tools import make

QUICK = ("tutorials/your_data.md",)
TRAINING = ("finetune", "pretrain", *(name for name in COMMANDS if name.startswith("finetune_")))
LIMITS = {"--train.max_steps": "2", "--eval.max_iters": "2", "--eval.max_new_tokens": "4", "--eval.exact_match": "2"}
SMALLER = {"--devices": "1", "--num_nodes": "1", "--accelerator": "cpu", "--max_new_tokens": "4", "--steps": "2"}
STANDS_FOR = {  # what a page leaves to the reader, or has from elsewhere
    "--data ...": "--data JSON --data.json_path my.json --overwrite true",  # several ways of one run
    "--resume true --train.epochs 8": "--resume true",  # the limit below would not extend the run
    "pretrain ...": "pretrain --initial_checkpoint_dir MODEL --data TextFiles --data.train_data_path my-texts/",
    ".venv/bin/python": sys.executable,
    "out/lit/lora/final": "out/finetune/lora/final",
}
AFTER_A_FINETUNE = ("inference.md", "deploy.md")  # pages that begin with its result
SERVER = "http://127.0.0.1:8000"
PROGRAMS = ("make", "cat", "ls", "head", sys.executable)  # besides litgpt


def as_run(command: Command) -> list[str]:
    """The words of a command with tiny things in the place of what it names."""
    line = "\n".join(command.words)
    for shown, stands_in in STANDS_FOR.items():
        line = line.replace(shown.replace(" ", "\n"), stands_in.replace(" ", "\n"))
    line = re.sub(r"^(torchrun\n.*?-m\nlitgpt|srun\nlitgpt)\n", "litgpt\n", line, flags=re.DOTALL)
    return line.split("\n") if "\n" in line else [line]


def limited(words: list[str]) -> list[str]:
    """A `litgpt` command that takes seconds."""
    name = "_".join(words[:2]) if "_".join(words[:2]) in COMMANDS else words[0]
    words = list(words)
    for flag, value in {**SMALLER, **(LIMITS if name in TRAINING else {})}.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if name in TRAINING:
        longer = {"--train.max_steps": "4"} if {"--resume", "--train.epochs"} <= {*words} else {}  # a run to extend
        for flag in ("--train.max_steps", "--eval.max_iters", "--accelerator"):
            words += [flag, (LIMITS | SMALLER | longer)[flag]] if flag not in words else []
        if "--eval.max_new_tokens" not in words and name != "pretrain":
            words += ["--eval.max_new_tokens", "4"]
    elif name == "generate" and "--max_new_tokens" not in words:
        words += ["--max_new_tokens", "4"]
    return words


class Reader:
    """Somebody who types the commands of a page in one folder."""

    def __init__(self, folder: Path, page: Path, model: Path) -> None:
        self.folder, self.page, self.model = folder, page, model
        self.url = ""  # of the server that was started last
        text = page.read_text(encoding="utf-8")
        mentioned = [row["repo_id"] for row in known_models().values() if row["repo_id"] in text]
        self.models = ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", *mentioned]
        stand_ins = ("MODEL", "checkpoints/ORG/MODEL", "stories260k", "my-model", "small-model", "large-model")
        for name in (*(f"checkpoints/{m}" for m in self.models), *stand_ins):
            if not (folder / name).exists():
                shutil.copytree(model, folder / name)
        rows = make_rows(40)
        for name in ("my.json", "more.json", "train.json", "val.json", "data/alpaca2k/alpaca2k.json"):
            self.write(
                name,
                json.dumps(rows[:30] if name == "train.json" else make_rows(10, 1) if name == "val.json" else rows),
            )
        self.write("data/alpaca/alpaca_data_cleaned_archive.json", json.dumps(rows))
        if page.name == "convert_lit_models.md":  # which is about folders of LitGPT's
            for name in self.models:
                main(["convert_to_litgpt", str(folder / "checkpoints" / name)])
        if page.name in AFTER_A_FINETUNE:
            for out in ("finetune/lora", "sql", "poems"):
                words = ["finetune", "lora", "checkpoints/ORG/MODEL", "--data", "JSON", "--data.json_path", "my.json"]
                main(limited([*words, "--out_dir", f"out/{out}"]))
        self.write("my.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if page.name == "README.md":
            parts = [make_rows(40, seed) for seed in (2, 3, 4, 5)]
            self.write("faq.jsonl", "".join(json.dumps(row) + "\n" for row in parts[0]))
            self.write("more.jsonl", "".join(json.dumps(row) + "\n" for row in parts[1]))
            pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "?"} for r in parts[1]]
            self.write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
            self.write("chats.json", json.dumps(parts[2]))
            cells = "".join(f"{row['instruction']},{row['output']}\n" for row in parts[3])
            self.write("support.csv", f"question,answer\n{cells}")
        self.write("questions.jsonl", "".join(json.dumps({"prompt": row["instruction"]}) + "\n" for row in rows[:5]))
        self.write("questions.csv", "prompt\n" + "".join(f"{row['instruction']}\n" for row in rows[:5]))
        self.write("text.txt", rows[0]["output"])
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.write("my-config.json", json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
        text = "\n".join(f"{row['instruction']}. {row['output']}." for row in make_rows(300))
        for name in ("my-texts/one.txt", "my-texts/two.txt", "tinyshakespeare.txt"):
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def follow(self) -> int:
        """Type everything; servers answer until the page ends. Returns the number of commands."""
        n = 0
        with ExitStack() as self.servers:
            for block in blocks(self.page):
                where = f"{name_of(self.page)}:{block.line}"
                if block.file:
                    self.write(block.file, block.text)
                if block.language == "python" and (not block.file or SERVER in block.text):
                    self.python(block.text.replace(SERVER, self.url), where)
                elif block.language == "bash":
                    for command in commands(block):
                        self.type(command)
                        n += 1
        return n

    def type(self, command: Command) -> None:
        words, where = as_run(command), f"{name_of(self.page)}:{command.line}: {' '.join(command.words)}"
        if words[0] == "make":
            assert words[1] in make.TARGETS, where
            if words[1] != "demo":
                return
            words = make.DEMO.split()
        piped = ""
        if words[0] != "litgpt":
            first, words = (words[: words.index("|")], words[words.index("|") + 1 :]) if "|" in words else (words, [])
            done = subprocess.run(first, cwd=self.folder, capture_output=True, text=True, encoding="utf-8")
            assert done.returncode == 0, f"{where}\n{done.stderr}"
            piped = done.stdout
        if not words:
            return
        if words[1] == "serve":
            self.serve(words[2:])
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(piped))
            for name, value in command.variables:
                patch.setenv(name, value)
                if name == "PYTHONPATH":
                    patch.syspath_prepend(str(self.folder / value))
            try:
                main(limited(words[1:]))
            except SystemExit as e:
                assert not e.code, f"{where} ended with {e.code}"

    def serve(self, words: list[str]) -> None:
        import httpx

        from tests.servers import in_process

        self.url, _ = self.servers.enter_context(in_process(*words))
        assert httpx.get(self.url + "/health").status_code == 200

    def python(self, text: str, where: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=self.folder, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, f"{where}\n{done.stderr}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A model that can stand for any: three layers for adapters, a long context, whole blocks of 64 for 4 bits."""
    folder = tmp_path_factory.mktemp("docs") / "tiny"
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 2048}
    return save_llama(folder, tokenizer_file, **sizes)


@pytest.fixture
def reader(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Makes the reader of a page, in a folder with a hub that has the models it mentions."""
    with serve() as hub:
        paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
        for name, value in ours.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")

        def read(page: Path) -> Reader:
            made = Reader(tmp_path / "work", page, tiny)
            files = {p.name: p.read_bytes() for p in tiny.iterdir() if p.is_file()}
            hub.repos.update({name: Repo(files) for name in made.models})
            return made

        yield read


def shell(page: Path) -> list[Command]:
    return [command for block in blocks(page) if block.language == "bash" for command in commands(block)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        assert block.language, f"{name_of(page)}:{block.line}: say what the block is: bash, text, yaml, python"
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for command in shell(page):
        words = as_run(command)
        where = f"{name_of(page)}:{command.line}: {' '.join(command.words)}"
        if words[0] != "litgpt":
            assert words[0] in PROGRAMS, f"{where}: why is it not run? # not run by the tests: ..."
        if "|" in words:
            words = words[words.index("|") + 1 :]
        if (
            words[0] == "litgpt"
            and not any(word in ("-h", "--help", "--version", "list", "--sweep") for word in words)
            and not made_by_a_run(words)
        ):
            with pytest.raises(SystemExit) as stop:
                main([*words[1:], "--print_config"])
            assert not stop.value.code, f"{where}\n{capsys.readouterr().err}"


def made_by_a_run(words: list[str]) -> bool:
    """Whether a config is one that an earlier command writes."""
    return "--config" in words and words[words.index("--config") + 1].startswith("out/")


@pytest.mark.parametrize("page", [p for p in PAGES if name_of(p) in QUICK], ids=name_of)
def test_some_pages_work(page, reader):
    assert reader(page).follow()


@pytest.mark.long
@pytest.mark.parametrize("page", [p for p in PAGES if name_of(p) not in QUICK], ids=name_of)
def test_the_other_pages_work(page, reader):
    reader(page).follow()


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_resolve(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)} links to {link}; {path} has no such heading"


def test_every_command_has_a_row():
    shown = re.findall(r"`([^`]+)`", (ROOT / "tutorials" / "commands.md").read_text(encoding="utf-8"))
    missing = [c for c in COMMANDS if not any(re.search(rf"(^|litgpt ){spoken(c)}( |$)", text) for text in shown)]
    assert not missing, f"tutorials/commands.md lacks {', '.join(missing)}"


def test_litgpt_is_installed_from_its_clone():
    """The name belongs to another project on the public index."""
    texts = [*PAGES, *OTHERS, ROOT / "Makefile", ROOT / "tools" / "make.py", *sorted((ROOT / "litgpt").rglob("*.py"))]
    for path in texts:
        for line in path.read_text(encoding="utf-8").splitlines():
            named = re.search(r"(pip3?|pipx|uv|tool) (install|add) (-\S+ )*['\"]?litgpt\b", line)
            assert not named, f"{name_of(path)} installs another project: {line.strip()}"


def test_the_address_of_the_repository_is_in_one_place():
    clones = [name_of(page) for page in (*PAGES, *OTHERS) if "git clone URL" in page.read_text(encoding="utf-8")]
    assert clones == ["tutorials/install.md"]


def test_make_and_its_script_have_the_same_targets(capsys, monkeypatch):
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony and phony[1].split() == list(make.TARGETS)
    ran = []
    monkeypatch.setattr(make, "run", lambda *words: ran.append(" ".join(words)))
    monkeypatch.setattr(make, "up_to_date", lambda stamp: True)
    make.TARGETS["test"]()
    assert ran == [*make.LINT, "python -m pytest -n auto -m not long"]


def test_every_page_is_in_the_index():
    index = ROOT / "tutorials" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    missing = {page for page in PAGES if page.parent != ROOT and page != index} - linked
    assert not missing, f"tutorials/README.md does not list {', '.join(map(name_of, sorted(missing)))}"


def test_left_out_blocks_say_why():
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if "not run by the tests" in line:
                assert re.search(r"# .*not run by the tests: \w.{4,}", line), f"{name_of(page)}: {line}"
