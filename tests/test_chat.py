"""`litgpt chat`: what is said, what is remembered, and what the terminal can do."""

import io
import json
import os
import select
import subprocess
import sys
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.commands.chat import chat as answer_all
from litgpt.commands.chat import inform, line_reader, prompts
from litgpt.errors import UserError
from litgpt.generate.conversation import Conversation
from litgpt.generate.engine import Engine, generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling

GREEDY = ["--temperature", "0", "--precision", "32-true", "--accelerator", "cpu"]
TURNS = ["Hello", "Who are you?", "What is ten plus one?", "A story", "Why?", "And", "Fox?", "Bye", "No", "Yes"]


@pytest.fixture(scope="module")
def pico() -> InferenceModel:
    return InferenceModel.open(PICO, precision="32-true", accelerator="cpu")


def start(loaded: InferenceModel, n: int = 8, **more: object) -> Conversation:
    return Conversation(loaded, Sampling(0.0), n, **more)  # type: ignore[arg-type]


def test_ten_turns_are_one_rendering(pico, monkeypatch):
    conversation, read, forward = start(pico), list[int](), Engine.forward

    def counted(self: Engine, n_tokens: dict[int, int]) -> list:
        if self is conversation.engine:
            read.append(sum(n_tokens.values()))
        return forward(self, n_tokens)

    monkeypatch.setattr(Engine, "forward", counted)
    for turn in TURNS:
        before = [*conversation.messages, {"role": "user", "content": turn}]
        said = "".join(conversation.ask(turn))
        _, ids = pico.render(before)
        expected = list(generate(pico.model, ids, 8, stop_ids=pico.stop_ids))
        assert said == pico.tokenizer.decode(expected)
        assert conversation.messages == [*before, {"role": "assistant", "content": said}]
        assert conversation.n_new == len(expected)
    assert len(ids) > 90
    assert sum(read) < 1.5 * len(ids), "what the cache has is not read again"


def test_system_and_reset(pico):
    conversation = start(pico, system="Be kind.")
    one = "".join(conversation.ask("Hello"))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    assert "".join(conversation.ask("Hello")) == one
    conversation.set_system("Be short.")
    conversation.set_system(None)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_a_full_context_is_refused_and_nothing_is_lost(pico):
    conversation, n = start(pico, 40), 0
    with pytest.raises(UserError, match=r"The context is full: .* at most 256\..*/clear"):
        while True:
            "".join(conversation.ask("Tell me about the fox and the boat"))
            n += 1
    assert n > 3 and len(conversation.messages) == 2 * n
    with pytest.raises(UserError, match=r"The prompt has \d+ tokens; the model reads at most 256. It was not sent"):
        conversation.ask("x " * 400)
    conversation.reset()
    assert "".join(conversation.ask("Hello"))


def test_an_answer_at_the_end_of_the_context(llama):
    loaded = InferenceModel.open(llama, precision="32-true", accelerator="cpu")
    conversation = start(loaded, 200)
    "".join(conversation.ask("é" * 110))
    assert conversation.context_full and conversation.finish == "length" and conversation.n_new < 40
    "".join(conversation.ask("a"))
    assert not conversation.context_full, "the style is for one prompt: what came before is not sent"
    assert conversation.single_turn and len(conversation.messages) == 4


def test_an_answer_that_is_stopped(pico):
    conversation = start(pico, 20)
    pieces = conversation.ask("Hello")
    said = next(pieces)
    while not said:
        said = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": said} and conversation.finish == "cancelled"
    again = "".join(conversation.ask("Who are you?"))
    other = start(pico, 20)
    other.messages = conversation.messages[:2]
    assert "".join(other.ask("Who are you?")) == again, "the cache has what the conversation has"


def test_seeds(pico):
    def draw(seed: int) -> list[str]:
        conversation = Conversation(pico, Sampling(1.5), 10, seed=seed)
        return ["".join(conversation.ask("Tell me a story")) for _ in range(2)]

    assert draw(1) == draw(1) and draw(1) != draw(2)


# the command


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """What a chat prints to stdout and to stderr when this is typed."""

    def run(typed: str, *flags: str, folder: object = "pico") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        main(["chat", str(folder), *GREEDY, *flags])
        return capsys.readouterr()

    return run


def test_what_can_be_typed(chat, pico, tmp_path):
    new, old = tmp_path / "new.jsonl", tmp_path / "old.txt"
    old.write_text("mine")
    typed = f"Hello\n\n  \nWhy?\n/save {new}\n/reset\n/system Be kind.\nHello\n/save {new}\n/save {old}\n/save\n"
    out, err = chat(typed + "/system\n/rest\n/help\n /quit is said\n/quit\nnot sent\n", "--max_new_tokens", "9")
    one, two, three = start(pico, 9), start(pico, 9, system="Be kind."), start(pico, 9)
    said = ["".join(one.ask("Hello")), "".join(one.ask("Why?")), "".join(two.ask("Hello"))]
    three.messages = two.messages[1:]
    said.append("".join(three.ask(" /quit is said")))
    assert out == "".join(text + "\n" for text in said)
    assert json.loads(new.read_text()) == {"messages": two.messages} and old.read_text() == "mine"
    said_of_commands = (
        "a new conversation",
        "4 messages",
        "3 messages",
        "already exists",
        "Usage: /save",
    )
    for words in (
        *said_of_commands,
        "Removed the system message",
        "Did you mean '/reset'?",
        "/clear  ",
        "Set the system message",
    ):
        assert words in err, words
    assert "empty prompt" not in err, "blank lines of a pipe mean nothing"


def test_settings_and_another_answer(chat, pico):
    typed = [
        "/set temperature 1.5",
        "/set max_new_tokens 5",
        "Hello",
        "/retry",
        "/show",
        "/clear",
        "/retry",
        "/bye",
        "no",
    ]
    out, err = chat("\n".join(typed))
    one, two = (Conversation(pico, Sampling(1.5), 5) for _ in range(2))
    two.retries = 1
    first, second = "".join(one.ask("Hello")), "".join(two.ask("Hello"))
    assert out == f"{first}\n{second}\n" and first != second
    for words in ("temperature: 1.5", "max_new_tokens: 5", "no prompt to answer again", "new conversation"):
        assert words in err, words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set", "Usage"),
        ("/set heat 1", "Usage"),
        ("/set temperature", "Usage"),
        ("/set top_k many", "/set top_k many: expected a whole number, or null"),
        ("/set top_k 1.5", "expected a whole number"),
        ("/set temperature -1", "/set temperature -1.0 must be at least 0"),
        ("/set temperature 0,2", "expected a number such as 0.2"),
        ("/set temperature nan", "expected a number"),
        ("/set temperature null", "expected a number"),
        ("/set top_p 2", "between 0 and 1"),
        ("/set max_new_tokens 0", "above 0"),
        ("/set max_new_tokens ٣", "expected a whole number"),
        ("/set temperature 0.2 0.3", "expected a number"),
    ],
)
def test_settings_that_are_not_possible(chat, line, words):
    out, err = chat(f"{line}\n/show\n", "--max_new_tokens", "3")
    assert not out and "max_new_tokens: 3" in err and "temperature: 0" in err and "top_k: 50" in err
    assert words in err


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/SET Temperature = 1e-1", "temperature: 0.1"),
        ("/set top_k=7", "top_k: 7"),
        ("/set\tmax_new_tokens\tNONE", "max_new_tokens: null"),
        ("/set top_k null", "top_k: null"),
    ],
)
def test_ways_to_set(chat, line, shown):
    _, err = chat(f"{line}\n/Show\n", "--max_new_tokens", "3")
    assert shown in err and "model: pico" in err


def test_an_answer_goes_on_until_the_model_stops(chat, pico):
    _, ids = pico.render([{"role": "user", "content": "Tell me a story"}])
    whole = pico.tokenizer.decode(generate(pico.model, ids, 250, stop_ids=pico.stop_ids))
    out, err = chat("Tell me a story\n")
    assert out == f"{whole}\n" and len(out) > 100 and not err
    out, err = chat("Tell me a story\n/set max_new_tokens null\n/retry\n", "--max_new_tokens", "3")
    assert out.splitlines()[1:] == whole.splitlines() and "truncated at max_new_tokens 3" in err


def test_another_answer_loses_nothing(pico, monkeypatch):
    """If the answer is stopped at once, or the prompt no longer fits, the prompt can still be answered again."""
    conversation = start(pico, 5)
    with pytest.raises(UserError, match="no prompt"):
        conversation.retry()
    "".join(conversation.ask("Hello"))

    def interrupted(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    for retry in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("litgpt.generate.conversation.decode", interrupted)
            list(conversation.retry() if retry else conversation.ask("Who are you?"))
        assert [m["content"] for m in conversation.messages[::2]] == ["Hello"]
    "".join(conversation.retry())
    assert [m["content"] for m in conversation.messages[::2]] == ["Hello", "Who are you?"]
    conversation.set_system("long " * 400)
    before = list(conversation.messages)
    with pytest.raises(UserError, match="was not sent"):
        conversation.retry()
    assert conversation.messages == before


def test_words_for_a_person_are_dim(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    inform("plain", dim=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    inform("dim", dim=True)
    monkeypatch.setenv("NO_COLOR", "1")
    inform("gray", dim=True)
    assert capsys.readouterr().err == "plain\n\033[2mdim\033[0m\ngray\n"


def test_the_name_of_a_run(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/show\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    run = whole("adapter")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    main(["chat", str(run / "final"), *GREEDY])
    err = capsys.readouterr().err
    assert f"Chatting with {run.name}:" in err and f"model: {run.name}\n" in err


def test_what_is_mistyped(chat, tmp_path):
    out, err = chat(f"/save {tmp_path / 'new'}\nHello\n/Rsets\n/save ~nobody-of-this-name/x\n", "--max_new_tokens", "3")
    assert out.count("\n") == 1 and not (tmp_path / "new").exists()
    for words in ("Nothing was saved", "/rsets. Did you mean '/reset'?", "Cannot write"):
        assert words in err, words


def test_an_interrupt_beside_the_answer_ends_nothing(pico, monkeypatch, capsys):
    asked: list[str] = []

    def ask(self: Conversation, text: str) -> Iterator[str]:
        asked.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", ask)
    answer_all(start(pico, 5), iter(["one", "two"]), terminal=True)
    assert asked == ["one", "two"]
    with pytest.raises(KeyboardInterrupt):
        answer_all(start(pico, 5), iter(["one"]), terminal=False)


def test_a_closed_stdin_ends_the_chat(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    main(["chat", "pico"])
    assert capsys.readouterr() == ("", "")


def test_bytes_that_are_no_text_are_said(monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nHello\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    main(["chat", "pico", *GREEDY, "--max_new_tokens", "3"])
    out, err = capsys.readouterr()
    assert out.strip() and "is not UTF-8 (byte 0xff)" in err


def test_several_lines(chat, pico):
    out, _ = chat("Hello\n/quit\n\nyou\n/send\n/reset\nWhy\n!submit\nlast", "--multiline", "--max_new_tokens", "9")
    one, two = start(pico, 9), start(pico, 9)
    said = ["".join(one.ask("Hello\n/quit\n\nyou")), "".join(two.ask("Why")), "".join(two.ask("last"))]
    assert out == "".join(text + "\n" for text in said)


@pytest.mark.parametrize("word", ["!quit", "!EXIT ", "/exit", "/Bye", "exit", "Quit "])
def test_words_that_end_a_chat(chat, pico, word):
    expected = "".join(start(pico, 9).ask("Why"))
    assert chat(f"Why\n{word}\nnot sent\n", "--max_new_tokens", "9")[0] == f"{expected}\n"
    typed = f"Why\n/send\n{word}\nnot sent\n"
    assert chat(typed, "--multiline", "--max_new_tokens", "9")[0] == f"{expected}\n"


def test_words_about_the_end(chat, llama):
    _, err = chat("é\n" + "é" * 110 + "\n" + "é" * 300 + "\n", "--max_new_tokens", "50", folder=llama)
    assert "prompt style 'none'" in err
    assert "truncated at max_new_tokens 50" in err
    assert "context is full (256 tokens)" in err and "It was not sent" in err


def test_what_is_refused(capsys):
    for flags, words in ((["--top_p", "3"], "--top_p 3"), (["--max_new_tokens", "0"], "above 0")):
        with pytest.raises(SystemExit) as stop:
            main(["chat", "pico", *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_token_of_the_hub(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "old")
    with pytest.raises(SystemExit):
        main(["chat", "no/such/folder", "--access_token", "new"])
    assert os.environ["HF_TOKEN"] == "new"


def test_stop_and_system_flags(chat, pico):
    out, _ = chat("Hello\n", "--stop", "o", "--sys_prompt", "Be kind.")
    whole = "".join(start(pico, 250, system="Be kind.").ask("Hello"))
    assert "o" in whole and out == whole.partition("o")[0] + "\n"


# a terminal


def test_marks_stay_out_of_a_file(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert list(prompts(line_reader(True), multiline=False, terminal=True)) == ["Hello"]
    assert capsys.readouterr() == ("", ">> >> \n")


def test_an_interrupt_while_a_line_is_drawn(monkeypatch):
    """asyncio, on which prompt_toolkit runs, has an error of its own for that."""
    typed = iter([CancelledError(), "Hello", EOFError()])

    def prompt(mark: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    toolkit, output = ModuleType("prompt_toolkit"), ModuleType("prompt_toolkit.output")
    toolkit.PromptSession = lambda **_: SimpleNamespace(prompt=prompt)  # type: ignore[attr-defined]
    output.create_output = lambda **_: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prompt_toolkit", toolkit)
    monkeypatch.setitem(sys.modules, "prompt_toolkit.output", output)
    assert list(prompts(line_reader(True), multiline=False, terminal=True)) == ["Hello"]


# a real terminal


@pytest.fixture
def terminal(real_data: Path) -> Iterator[Callable[[bytes, bytes], str]]:
    """Types into a chat in a terminal of its own and returns what appears, up to some words."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    model = str(real_data / "models" / "stories260k")
    words = ["chat", model, *GREEDY, "--max_new_tokens", "500", "--repetition_penalty", "1.3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "litgpt", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: make_terminal(),
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )
    os.close(theirs)

    seen = b""  # and not waited for yet

    def type_(keys: bytes, until: bytes) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        os.write(ours, keys)
        while until not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                try:
                    seen += os.read(ours, 4096)
                except OSError:  # the other side has ended
                    break
        found, mark, seen = seen.partition(until)
        return (found + mark).decode()

    type_.process = process  # type: ignore[attr-defined]
    yield type_
    process.kill()
    process.wait()
    os.close(ours)


def make_terminal() -> None:
    """Of the standard input, the terminal that Ctrl-C goes through."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.long  # a race with the terminal on a busy machine
def test_keys_of_a_terminal(terminal):
    assert "Ctrl-D exits" in terminal(b"", b">> ")
    terminal(b"Once upon\r", b"time")
    assert "Stopped the answer." in terminal(b"\x03", b">> ")
    terminal(b"half a wo", b"wo")
    time.sleep(0.5)  # a Ctrl-C that comes before readline waits for a key is only seen with the next key
    assert "Ctrl-D exits." in terminal(b"\x03", b">> ")
    assert "Empty prompts are not sent" in terminal(b"\r", b">> ")
    terminal(b"/reset\r", b"new conversation")
    terminal(b"", b">> ")  # before that, Ctrl-D would be taken out of the line by the terminal itself
    terminal(b"\x04", b"never")
    assert terminal.process.wait(30) == 0
