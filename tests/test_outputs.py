"""No command removes or replaces a file of the user's, and one that is killed leaves nothing that the next one trips
over."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.storage.outputs import (
    SINGLE,
    SUMS,
    check_place,
    discard,
    exclusive,
    is_ours,
    new_folder,
    split,
    write_single,
    write_sums,
)
from tests.conftest import some
from tests.eval_tasks import made_rows, write_tasks
from tests.runs import Processes, go, words

FINAL = "adapter_config.json adapter_model.safetensors parity.json tokenizer.json config.json model.safetensors".split()
NAMES = [  # where people keep files of their own: beside and inside names that commands use
    *(f"final/{name}" for name in ("thesis.tex", "thesis-2.tex", *FINAL)),
    *("best/photo.jpg", "best/sub/photo.jpg", "crash/report.txt", "crash/step-000001.json", "logs/apache.log"),
    *("step-1-plan/notes.txt", "step-2.txt", "step-000001/notes.txt", "step-3/notes.txt", "metrics.csv", "loss.png"),
    *("hyperparameters.yaml", "index.js", ".git/config", "evaluate/results.json", "samples_choice.jsonl"),
    *("results.json", "lit_model.pth", "model_config.yaml", "tokenizer.json", "config.json", "notes"),
]


def fill(folder: Path, names: list[str]) -> dict[str, str]:
    """Write 200 files, and return what they hold, by hash."""
    for number, name in enumerate(itertools.islice(itertools.cycle(names), 200)):
        path = folder / (name if number < len(names) else f"{name}.{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} is mine")
    return hashes(folder)


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(*argv: object) -> int:
    try:
        main([str(word) for word in argv])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(base, rows_file, tmp_path_factory) -> Path:
    """The folder of a run of one step with a checkpoint. Read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert go("lora", base, rows_file, out, "--train.max_steps", 1, "--train.save_interval", 1) == 0
    return out


def commands(base: Path, rows: Path, finished: Path, text: Path) -> dict[str, list[object]]:
    """Everything that writes to a folder, up to the name of that folder."""
    finetune = ["--data", "JSON", "--data.json_path", rows, "--accelerator", "cpu", "--train.max_steps", 1]
    return {
        "finetune": ["finetune", "lora", base, *finetune, "--out_dir"],
        "full": ["finetune", "full", base, *finetune, "--out_dir"],
        "pretrain": ["pretrain", "--initial_checkpoint_dir", base, *finetune, "--out_dir"],
        "merge_lora": ["merge_lora", finished / "final", "--out_dir"],
        "tokenizer train": ["tokenizer", "train", text, "--vocab_size", 300, "--out_dir"],
        "convert_from_litgpt": ["convert_from_litgpt", base, "--output_dir"],
        "convert_pretrained_checkpoint": ["convert_pretrained_checkpoint", base, "--output_dir"],
    }


@pytest.mark.parametrize("spelled", ["absolute", ".", "relative", "link", ".."])
def test_a_folder_of_the_users_stays_as_it_is(spelled, base, rows_file, finished, tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    before = fill(project, NAMES)
    (tmp_path / "text.txt").write_text("some text " * 100)
    (tmp_path / "link").symlink_to(project)
    monkeypatch.chdir(tmp_path if spelled in ("relative", "link") else project)
    (project / "sub").mkdir()
    if spelled == "..":
        monkeypatch.chdir(project / "sub")
    out = {"absolute": project, "relative": Path("project")}.get(spelled, Path(spelled))
    for name, command in commands(base, rows_file, finished, tmp_path / "text.txt").items():
        flags: list[tuple] = [(), ("--overwrite", "true")]
        flags += [("--resume", "true"), ("--resume", "auto")] if name in ("finetune", "full", "pretrain") else []
        for more in flags:
            if more and name.startswith("convert"):
                continue
            code, (_, err) = run(*command, out, *more), capsys.readouterr()
            assert code == 2 and err.splitlines()[-1].startswith("litgpt: error: "), (name, more, err)
            assert "--out" in err, (name, more, err)
    assert hashes(project) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "project", "text.txt"]


def test_files_beside_those_of_a_run_stay(base, rows_file, tmp_path):
    """Where no name of ours is taken, a run writes beside them, is started over, and goes on."""
    out = tmp_path / "out"
    names = [name for name in NAMES if name.split("/")[0] not in ("final", "best", ".git", "metrics.csv", "loss.png")]
    names = [name for name in names if name not in ("hyperparameters.yaml", "step-000001/notes.txt")]
    before = fill(out, names)
    steps = ("--train.max_steps", 2, "--train.save_interval", 1, "--train.save_best", "true", "--eval.interval", 1)
    for more in ((), ("--overwrite", "true"), ("--resume", "true"), ("--overwrite", "true")):
        assert go("lora", base, rows_file, out, *steps, *more) == 0
        assert {name: value for name, value in hashes(out).items() if name in before} == before


@pytest.mark.parametrize(
    ("name", "resumes"),
    [("final/notes.txt", False), ("best/notes.txt", True), ("step-000001/notes.txt", True), ("final/sub/n", False)],
)
def test_a_file_that_was_put_into_a_run(name, resumes, base, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    steps = ("--train.max_steps", 2, "--train.save_interval", 1, "--train.save_best", "true", "--eval.interval", 1)
    assert go("lora", base, rows_file, out, *steps) == 0
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    before = hashes(out)
    capsys.readouterr()
    assert go("lora", base, rows_file, out, *steps, "--overwrite", "true") == 2
    assert str(out / name) in capsys.readouterr().err
    assert hashes(out) == before
    (out / name).unlink()
    assert go("lora", base, rows_file, out, *steps, "--overwrite", "true") == 0


@pytest.mark.parametrize("name", ["final/parity.json", "hyperparameters.yaml", "loss.png", "metrics.csv"])
def test_a_file_of_a_run_that_was_changed(name, finished, base, rows_file, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "out", copy_function=shutil.copyfile)  # with other times
    (out / name).write_text("mine")
    before = hashes(out)
    for flag in ("--overwrite", "--resume"):
        assert go("lora", base, rows_file, out, "--seed", 2, flag, "true") == 2
        assert flag == "--resume" or str(out / name) in capsys.readouterr().err
    assert hashes(out) == before


def test_a_changed_file_in_the_result_of_a_run_that_is_extended(finished, base, rows_file, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "final" / "notes.txt").write_text("mine")
    assert go("lora", base, rows_file, out, "--train.max_steps", 2, "--resume", "true") == 0
    assert (out / "final-kept" / "notes.txt").read_text() == "mine" and not (out / "final" / "notes.txt").exists()


def test_a_copy_of_a_run_may_be_replaced(finished, base, rows_file, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out", copy_function=shutil.copyfile)
    assert go("lora", base, rows_file, out, "--train.max_steps", 1, "--overwrite", "true") == 0


def test_what_is_put_into_a_folder_while_a_run_replaces_it(tmp_path, capsys):
    """It is kept beside the new one."""
    for text in ("old", "new"):
        with new_folder(tmp_path / "best") as folder:
            (folder / "weights").write_text(text)
            if text == "new":
                (tmp_path / "best" / "mine").write_text("mine")
    assert (tmp_path / "best" / "weights").read_text() == "new"
    assert (tmp_path / "best-kept" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "best-kept"]
    assert str(tmp_path / "best-kept") in capsys.readouterr().err


def test_old_checkpoints_lose_only_what_is_ours(tmp_path):
    (tmp_path / "step" / "sub").mkdir(parents=True)
    (tmp_path / "step" / "a").write_text("ours")
    (tmp_path / "step" / "sub" / "b").write_text("ours")
    write_sums(tmp_path / "step")
    (tmp_path / "step" / "sub" / "c").write_text("mine")
    (tmp_path / "step" / "link").symlink_to(tmp_path)
    assert not discard(tmp_path / "step")
    assert {p.name for p in (tmp_path / "step").rglob("*")} == {"sub", "c", "link"}


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": [1, "x"]}}', "no"]
)
def test_a_list_that_is_not_ours(text, tmp_path):
    (tmp_path / "a").write_text("mine")
    for name in (SUMS, SINGLE):
        (tmp_path / name).write_text(text)
    assert split(tmp_path) == ([], sorted(tmp_path.iterdir())) and not is_ours(tmp_path / "a")


def test_single_files(tmp_path):
    write_single(tmp_path / "a", "1")
    assert is_ours(tmp_path / "a")
    write_single(tmp_path / "a", "22")
    (tmp_path / "a").write_text("1")
    assert is_ours(tmp_path / "a"), "a kill may have come before the new one was in its place"
    (tmp_path / "a").write_text("2")
    assert not is_ours(tmp_path / "a")


def test_places_that_no_result_goes_to(tmp_path, monkeypatch):
    home, project, data = (tmp_path / name for name in ("home", "project", "data"))
    for folder in (home, project, data, project / ".git", tmp_path / "work"):
        folder.mkdir(exist_ok=True)
    (data / "rows.json").write_text("[]")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "work")
    for out in (home, tmp_path, Path("/"), Path("."), Path(".."), project, data):
        with pytest.raises(UserError, match="--out_dir"):
            check_place(out, [data / "rows.json"])
    for out in (home / "out", project / "out", data / "out", Path("out")):
        check_place(out, [data / "rows.json"])


def test_results_of_an_evaluation(llama, tmp_path, capsys):
    tasks = write_tasks(tmp_path / "tasks", made_rows(4))
    command = ["evaluate", llama, "--tasks", "choice", "--include_path", tasks, "--limit", 2, "--log_samples"]
    place = tmp_path / "o"
    place.mkdir()
    for name in ("results.json", "samples_choice.jsonl"):
        (place / name).write_text("mine")
        assert run(*command, "--out_dir", place) == 2 and (place / name).read_text() == "mine"
        assert str(place / name) in capsys.readouterr().err
        (place / name).unlink()
    for _ in range(2):
        assert run(*command, "--out_dir", place) == 0
    (place / "results.json").write_text("mine")
    assert run(*command, "--out_dir", place) == 2
    assert run(*command, "--out_dir", place, "--overwrite", "true") == 0
    assert "results" in json.loads((place / "results.json").read_text())


def test_files_in_litgpts_form(llama, tmp_path, capsys):
    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "model_config.yaml").write_text("mine")
    assert run("convert_to_litgpt", folder) == 2 and (folder / "model_config.yaml").read_text() == "mine"
    assert "model_config.yaml" in capsys.readouterr().err and not (folder / "lit_model.pth").exists()
    assert run("convert_to_litgpt", folder, "--overwrite", "true") == 0
    assert run("convert_to_litgpt", folder) == 0, "its own files"


# answers to a file of prompts


@pytest.mark.parametrize("text", ["my notes", '{"mine": 1}', '{"prompt": "other"'])
def test_a_file_of_the_users_is_not_taken_for_answers(text, llama, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "out.jsonl").write_text(text)
    command = ["generate", llama, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl"]
    assert run(*command, "--max_new_tokens", 1) == 2
    assert (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize("torn", ["", "{", '{"prompt": "b', '{"prompt": "b", "answer": "x'])
def test_a_torn_answer_is_given_again(torn, llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    out = tmp_path / "out.jsonl"
    command = ["generate", llama, "--prompts", tmp_path / "prompts.jsonl", "--out", out, "--max_new_tokens", 1]
    assert run(*command) == 0
    whole = out.read_text()
    out.write_text(whole.splitlines(True)[0] + torn)
    assert run(*command) == 0 and out.read_text() == whole


def test_two_writers_of_one_file(llama, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    out = tmp_path / "out.jsonl"
    with exclusive(out, "--out"):
        assert run("generate", llama, "--prompts", tmp_path / "prompts.jsonl", "--out", out) == 2
    assert f"--out {out}: another process" in capsys.readouterr().err and not out.exists()
    assert not list(tmp_path.glob(".*"))


# runs from Python


def test_a_finished_run_from_python_is_not_repeated(base, rows_file, tmp_path, capsys):
    from litgpt.data.json_file import JSON
    from litgpt.finetune.lora import setup
    from litgpt.train.args import EvalArgs, TrainArgs

    def call() -> None:
        data = JSON(str(rows_file), val_split_fraction=0.1)
        train = TrainArgs(max_steps=1, lr_warmup_steps=0)
        setup(base, tmp_path / "out", data=data, train=train, eval=EvalArgs(max_new_tokens=None), resume=True,
              accelerator="cpu")  # fmt: skip

    call()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "final").iterdir()}
    call()
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "final").iterdir()} == before


# kills


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.close()


def killed(processes: Processes, argv: list[str], log: Path, seconds: float) -> int:
    """The exit code of a command that is killed after some time, unless it ended before."""
    number = processes.start(argv, log)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return processes.wait()


def killable(folder: Path, llama: Path, finished: Path) -> dict[str, tuple[list[object], Path]]:
    """Commands, and what each of them writes."""
    (folder / "text.txt").write_text("some text " * 1000)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(40)))
    tasks = write_tasks(folder / "tasks", made_rows(4))
    lit = shutil.copytree(llama, folder / "lit")
    assert run("convert_to_litgpt", lit) == 0
    for name in ("config.json", "model.safetensors"):
        (lit / name).unlink()
    made = {
        "merge": (["merge_lora", finished / "final", "--overwrite", "true", "--out_dir"], folder / "merged"),
        "tokenizer": (
            ["tokenizer", "train", folder / "text.txt", "--vocab_size", 300, "--overwrite", "true", "--out_dir"],
            folder / "tokenizer",
        ),
        "export": (["convert_from_litgpt", lit, "--output_dir"], folder / "exported"),
        "generate": (
            ["generate", llama, "--prompts", folder / "prompts.jsonl", "--max_new_tokens", 4, "--out"],
            folder / "answers.jsonl",
        ),
        "evaluate": (
            ["evaluate", llama, "--tasks", "choice", "--include_path", tasks, "--limit", 2, "--out_dir"],
            folder / "evaluated",
        ),
    }
    return made


@pytest.mark.parametrize("n", [1, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", some(["merge", "tokenizer", "export", "generate", "evaluate"], "merge", "export"))
def test_killed_at_any_moment(name, n, llama, finished, processes, tmp_path):
    """The next command ends well, with what an undisturbed one writes, and nothing hidden is left."""
    if name == "evaluate":
        pytest.importorskip("lm_eval")
    made = killable(tmp_path, llama, finished)
    command, out = made[name]
    argv = [*map(str, command), str(out)]
    began = time.perf_counter()
    assert processes_run(processes, argv, tmp_path) == 0, (tmp_path / "log").read_text()
    took = time.perf_counter() - began
    whole = contents(out)
    draw = random.Random(name)
    for _ in range(n):
        if name == "export":
            shutil.rmtree(out, ignore_errors=True)
        if name == "generate":
            out.unlink(missing_ok=True)
        code = killed(processes, argv, tmp_path / "log", draw.random() * took)
        assert code in (0, -9), (tmp_path / "log").read_text()
        if name == "export" and out.exists():  # the next command would refuse to overwrite it
            assert contents(out) == whole
            continue
        assert processes_run(processes, argv, tmp_path) == 0, (tmp_path / "log").read_text()
        assert contents(out) == whole
        hidden = [p for p in tmp_path.rglob(".*") if p.name != SINGLE]
        assert not hidden, "what a killed command left is still there"


def processes_run(processes: Processes, argv: list[str], folder: Path) -> int:
    processes.start(argv, folder / "log")
    return processes.wait()


def contents(out: Path) -> dict[str, int]:
    """The names of what a command wrote, and their sizes, but for what has times in it."""
    files = [out] if out.is_file() else [p for p in out.rglob("*") if p.is_file()]
    return {p.name: p.stat().st_size for p in files if p.name not in (SUMS, SINGLE, "results.json")}


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path, monkeypatch):
    """Killed between the two renames, at every place where commands replace folders."""
    with new_folder(tmp_path / "m") as folder:
        (folder / "a").write_text("old")
    (tmp_path / ".m.litgpt-old-x").mkdir()
    (tmp_path / "m").rename(tmp_path / ".m.litgpt-old-x" / "m")
    (tmp_path / ".m.litgpt-new-y").mkdir()
    (tmp_path / ".m.backup").mkdir()
    with exclusive(tmp_path / "m"):
        assert (tmp_path / "m" / "a").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.backup", "m"]


def test_a_cache_that_cannot_be_written_leaves_nothing(base, rows_file, tmp_path, monkeypatch):
    """Neither in the temporary folder, nor for each of several devices."""
    import subprocess
    import sys

    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "LITGPT_CACHE": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    argv = [sys.executable, "-m", "litgpt", *words("lora", base, rows_file, tmp_path / "out", "--train.max_steps", 1)]
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert not [p.name for p in (tmp_path / "tmp").iterdir() if p.name.startswith("litgpt")]
