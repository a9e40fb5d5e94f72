"""Chat templates that print the date: what was rendered on one day is compared with what is rendered on another."""

import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.data.json_file import JSON
from litgpt.errors import UserError
from litgpt.text import prompt_style
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import save_llama
from tests.runs import go, same, start, words
from tests.test_evaluate import made_rows, write_tasks

TEMPLATE = (
    "{{ bos_token }}{% if strftime_now is defined %}DATE{% endif %}\n"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DATES = {  # how templates print it
    "llama 3.2": "{%- set date = strftime_now('%d %b %Y') %}Today Date: {{ date }}",
    "smollm3": 'Today Date: {{ strftime_now("%d %B %Y") }}',
    "granite": "Today's Date: {{ strftime_now('%B %d, %Y') }}.",
    "iso": "{{ strftime_now( '%Y-%m-%d' ) }}",
    "weekday and hour": "{{ strftime_now('%A, %-d %B') }} at {{ strftime_now('%H:%M') }}",
    "a name": "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
}
DATED = TEMPLATE.replace("DATE", DATES["llama 3.2"])
TODAY = datetime.datetime(2026, 1, 31, 23, 58, 30)


class Clock:
    """The clock of this process and of `transformers`, to be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.utils import chat_template_utils

        self.time, self.step = TODAY, datetime.timedelta()
        clock = self

        class Time(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                clock.time += clock.step
                return clock.time

        monkeypatch.delenv("LITGPT_NOW", raising=False)
        monkeypatch.setattr(prompt_style, "datetime", SimpleNamespace(datetime=Time))
        monkeypatch.setattr(chat_template_utils, "datetime", Time)

    def tomorrow(self, days: int = 1) -> str:
        """Let a day pass. Returns the date as `DATED` prints it."""
        self.time += datetime.timedelta(days=days)
        return self.time.strftime("%d %b %Y")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def dated(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template prints the date. Read only."""
    folder = save_llama(tmp_path_factory.mktemp("dated") / "base", tokenizer_file)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "cache"))


def style(date: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATE.replace("DATE", date), {"bos_token": "<s>", "eos_token": "</s>"})


USER = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("date", DATES.values(), ids=DATES)
def test_text_is_that_of_transformers(clock, llama, date):
    from transformers import AutoTokenizer

    theirs, ours, texts = AutoTokenizer.from_pretrained(llama), style(date), set()
    for _ in range(2):
        options = {"chat_template": ours.template, "tokenize": False, "add_generation_prompt": True}
        texts.add(ours.prompt(USER))
        assert ours.prompt(USER) == theirs.apply_chat_template(USER, **options)
        clock.tomorrow()
    assert len(texts) == 2


def test_setting_the_clock(clock, monkeypatch):
    ours = style(DATES["iso"])
    with prompt_style.clock_at():
        clock.tomorrow()
        assert "2026-01-31" in ours.prompt(USER)
        with prompt_style.clock_at("2020-02-02T10:00:00"):
            assert "2020-02-02" in ours.prompt(USER)
            code = "from litgpt.text.prompt_style import now; print(now())"
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            assert said == "2020-02-02 10:00:00\n", "processes inherit the clock"
    assert "2026-02-01" in ours.prompt(USER)
    monkeypatch.setenv("LITGPT_NOW", "yesterday")
    with pytest.raises(UserError, match="LITGPT_NOW=yesterday"):
        ours.prompt(USER)


# tokens


@pytest.mark.parametrize("date", [*DATES.values(), ""], ids=[*DATES, "no date"])
def test_tokens_of_another_day_are_not_taken_for_those_of_today(clock, llama, rows_file, tmp_path, date):
    (tmp_path / "t.jinja").write_text(TEMPLATE.replace("DATE", date))
    tokenizer = Tokenizer(llama)
    texts = []
    for cached in (False, True):
        for day in (0, 1):
            clock.time = TODAY + datetime.timedelta(days=day)
            loaded = JSON(str(rows_file), prompt_style=str(tmp_path / "t.jinja")).load(tokenizer, llama, 256)
            assert loaded.cached is (cached or (not date and day == 1))
            texts.append(tokenizer.decode(loaded.train.row(0)[0].tolist()))
    assert texts[:2] == texts[2:] and (texts[0] != texts[1]) is bool(date)


def test_rows_around_midnight_have_one_date(clock, dated, rows_file):
    clock.step = datetime.timedelta(seconds=10)
    tokenizer = Tokenizer(dated)
    loaded = JSON(str(rows_file)).load(tokenizer, dated, 256)
    texts = [tokenizer.decode(loaded.train.row(i)[0].tolist()) for i in range(len(loaded.train))]
    assert all("Today Date: 31 Jan 2026" in text for text in texts)


# the seal

FOLDERS = ("lora", "full", "merged")


@pytest.fixture(scope="module")
def sealed(dated: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders that were sealed on the last day of January. Read only."""
    out = tmp_path_factory.mktemp("sealed")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        method = "full" if kind == "full" else "lora"
        if method not in made:
            short = ["--train.max_steps", 1, "--train.lr_warmup_steps", 0]
            with pytest.MonkeyPatch.context() as patch:
                Clock(patch)
                assert go(method, dated, rows_file, out / method, *short) == 0
                made[method] = out / method / "final"
                if method == "lora":
                    main(["merge_lora", str(made["lora"])])
                    made["merged"] = out / "lora" / "final-merged"
        return made[kind]

    return make


def validate(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What `litgpt validate` says has moved."""
    capsys.readouterr()
    try:
        main(["validate", str(folder), "--accelerator", "cpu"])
    except SystemExit:
        return ", ".join(
            line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("changed ")
        )
    return ""


@pytest.mark.parametrize("age", ["new", "older"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_valid_on_the_next_day(clock, sealed, tmp_path, capsys, kind, age):
    folder = shutil.copytree(sealed(kind), tmp_path / kind)
    seal = json.loads((folder / "parity.json").read_text())
    assert "Today Date: 31 Jan 2026" in seal["prompts"][0]["text"]
    if age == "older":
        del seal["time"]
        (folder / "parity.json").write_text(json.dumps(seal))
    clock.tomorrow(100)
    assert validate(folder, capsys) == ""
    for name in ("prompt_style.yaml", "chat_template.jinja"):
        if (folder / name).is_file():
            (folder / name).write_text((folder / name).read_text().replace("Today Date", "The date"))
    assert validate(folder, capsys) == "template:", "a template that changed is still noticed"


@pytest.mark.parametrize("date", DATES.values(), ids=DATES)
def test_the_time_of_an_older_seal(clock, date):
    """It is read from the text, where that tells it."""
    from litgpt.generate.reference_outputs import time_of

    ours = style(date)
    then = {"prompt": "Hello", "text": ours.prompt(USER)}
    clock.tomorrow(3)
    if date in (DATES["weekday and hour"], DATES["a name"]):
        assert time_of(then, ours) is None, "a weekday without its year does not tell the day"
        return
    with prompt_style.clock_at(time_of(then, ours)):
        assert ours.prompt(USER) == then["text"]
    assert time_of({**then, "text": then["text"] + "!"}, ours) is None


@pytest.mark.parametrize("time", [5, "noon"])
def test_a_damaged_time(sealed, tmp_path, capsys, time):
    folder = shutil.copytree(sealed("lora"), tmp_path / "lora")
    seal = json.loads((folder / "parity.json").read_text())
    (folder / "parity.json").write_text(json.dumps({**seal, "time": time}))
    with pytest.raises(SystemExit):
        main(["validate", str(folder), "--accelerator", "cpu"])
    assert "parity.json" in capsys.readouterr().err


def test_a_folder_that_was_sealed_around_midnight(clock, dated, rows_file, sealed, tmp_path, capsys):
    clock.step = datetime.timedelta(seconds=7)  # the merged folder is sealed as midnight comes
    folder = tmp_path / "merged"
    main(["merge_lora", str(sealed("lora")), "--out_dir", str(folder)])
    texts = [p["text"] for p in json.loads((folder / "parity.json").read_text())["prompts"]]
    assert len({text.partition("[user]")[0] for text in texts}) == 1
    assert validate(folder, capsys) == ""


# runs that go on


@pytest.mark.parametrize("kept", [True, False], ids=["tokens kept", "tokens gone"])
def test_a_run_goes_on_with_the_date_of_its_start(clock, dated, rows_file, tmp_path, monkeypatch, kept, capsys):
    options = ["--eval.max_new_tokens", 5, "--eval.exact_match", 2]
    assert go("lora", dated, rows_file, tmp_path / "whole", *options) == 0
    assert go("lora", dated, rows_file, tmp_path / "out", "--train.pause_after", 5, *options) == 75
    clock.tomorrow()
    if not kept:
        monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "new"))
    assert go("lora", dated, rows_file, tmp_path / "out", "--resume", "true", *options) == 0
    assert "31 Jan 2026" in capsys.readouterr().out.rpartition("example, after")[2]
    same(tmp_path / "out", tmp_path / "whole")
    assert validate(tmp_path / "out" / "final", capsys) == ""
    clock.tomorrow()
    assert go("lora", dated, rows_file, tmp_path / "out", "--resume", "true", *options) == 0  # finished


@pytest.mark.long
def test_two_devices_go_on_with_the_date_of_their_start(dated, rows_file, tmp_path, monkeypatch):
    """The second process is started by the first one."""
    two = ["--devices", 2]
    for out, time, flags, code in (
        ("whole", "2026-01-31", [], 0),
        ("out", "2026-01-31", ["--train.pause_after", 5], 75),
        ("out", "2026-02-01", ["--resume", "true"], 0),
    ):
        monkeypatch.setenv("LITGPT_NOW", time)
        process = start("lora", dated, rows_file, tmp_path / out, *two, *flags)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == code, said
    same(tmp_path / "out", tmp_path / "whole")


def test_verify_resume_around_midnight(clock, dated, rows_file, monkeypatch, capsys):
    from litgpt.commands import verify_resume

    def run(command: list[str], **more: Any) -> SimpleNamespace:
        clock.tomorrow()
        try:
            main(command[3:])
        except SystemExit as e:
            return SimpleNamespace(returncode=e.code, stderr=capsys.readouterr().err)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify_resume.subprocess, "run", run)
    options = words("lora", dated, rows_file, Path("none"))[2:]
    without = [w for i, w in enumerate(options) if "--out_dir" not in options[max(0, i - 1) : i + 1]]
    main(["verify-resume", "--steps", "1", *without])
    assert "No difference" in capsys.readouterr().out


# what is answered


def test_adapter_and_base_are_asked_the_same(clock, sealed, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from litgpt.evaluation import run

    tasks, evaluate = write_tasks(tmp_path / "tasks", made_rows(3)), run.evaluate

    def slow(*args: Any, **options: Any) -> Any:
        clock.tomorrow()
        return evaluate(*args, **options)

    monkeypatch.setattr(run, "evaluate", slow)
    flags = ["--apply_chat_template", "--log_samples", "--vs", "base", "--out_dir", tmp_path / "out", "--device", "cpu"]
    command = ["evaluate", sealed("lora"), "--tasks", "generation", "--include_path", tasks, *flags]
    main([str(word) for word in command])
    ours, base = (
        [json.loads(line)["arguments"] for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("samples_generation.jsonl", "samples_generation_base.jsonl")
    )
    assert ours == base and "Today Date: 31 Jan 2026" in str(ours)


def test_a_file_of_prompts_goes_on_the_next_day(clock, dated, tmp_path):
    """The file of answers has nothing of the prompts' texts."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(3)))
    command = ["generate", dated, "--prompts", prompts, "--out", out, "--max_new_tokens", 2, "--accelerator", "cpu"]
    main([str(word) for word in command])
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:1]))
    clock.tomorrow()
    main([str(word) for word in command])
    assert len(out.read_text().splitlines()) == 3
