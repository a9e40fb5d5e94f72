"""`litgpt download`, by the real client of huggingface_hub, from a small hub on this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
from safetensors.torch import save_file

from litgpt.__main__ import main
from litgpt.checkpoint import download as module
from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.hub import repository_named
from litgpt.errors import UserError
from litgpt.model.config import Config, known_models
from litgpt.storage.outputs import SINGLE, marked
from litgpt.text.prompts import chat_templates
from tests.hub_server import Answer, Fault, Hub, Repo, changed, cut, held, refused, serve, slowly

NAME = "some/model"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the library asks; commands run in an empty folder."""
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of processes that are started
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
        for place in ("file_download", "utils._http"):
            monkeypatch.setattr(f"huggingface_hub.{place}.time", quick)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield hub


@pytest.fixture
def files(llama: Path) -> dict[str, bytes]:
    """What a repository has: a model that runs, and more than is needed."""
    files = {p.name: p.read_bytes() for p in llama.iterdir() if p.is_file()}
    more = ("README.md", "pytorch_model.bin", "model.gguf", "consolidated.00.pth", "original/params.json", "LICENSE")
    files |= {
        name: b"more of " + name.encode() for name in (*more, "onnx/model.onnx", "modeling_own.py", "tf_model.h5")
    }
    return files | {"chat_template.jinja": b"{{ messages[0].content }}", "training_args.bin": b"pickled"}


WANTED = [
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
]
WANTED += ["tokenizer_config.json"]


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SINGLE)


def sharded(files: dict[str, bytes], size: int = 300_000) -> dict[str, bytes]:
    """The files with two shards in the place of `model.safetensors`, and some more large ones."""
    files = {name: data for name, data in files.items() if name != "model.safetensors"}
    files[INDEX] = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode()
    return files | {name: bytes([i + 1]) * size for i, name in enumerate(SHARDS)}


@pytest.fixture
def fails(hub: Hub, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a download that must fail in one line, with exit code 2, and leave nothing half-made."""

    def run(*argv: object, keeps: tuple[str, ...] = ()) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["download", *map(str, argv)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("litgpt: error: ") and err.count("litgpt: error") == 1
        assert set(listing(Path())) <= {f"checkpoints/{NAME}.partial/{name}" for name in keeps}
        assert keeps or not list(Path().iterdir())
        return last

    return run


def test_what_is_fetched(hub, files, capsys):
    hub.repos[NAME] = Repo(files)
    main(["download", NAME])
    folder = Path("checkpoints") / NAME
    assert listing(Path()) == [str(folder / name) for name in WANTED]
    assert all((folder / name).read_bytes() == files[name] for name in WANTED)
    assert hub.fetched() == WANTED
    assert all("telemetry" not in path for _, path, _ in hub.seen)
    main(["download", NAME])
    assert hub.fetched() == [] and "already" in capsys.readouterr().err
    assert listing(Path()) == [str(folder / name) for name in WANTED]
    main(["validate", NAME])
    assert "complete and usable" in capsys.readouterr().out


def test_shards(hub, files):
    hub.repos[NAME] = Repo({**sharded(files), "model.fp32.safetensors": b"not in the index"})
    main(["download", NAME, "--checkpoint_dir", "elsewhere"])
    names = {name for name in WANTED if name != "model.safetensors"} | {INDEX, *SHARDS}
    assert set(listing(Path("elsewhere") / NAME)) == names == set(hub.fetched())


def test_pickled_weights_where_there_are_no_others(hub, files):
    hub.repos[NAME] = Repo({name: data for name, data in files.items() if name != "model.safetensors"})
    main(["download", NAME])
    names = listing(Path("checkpoints") / NAME)
    assert "pytorch_model.bin" in names and "training_args.bin" not in names


@pytest.mark.parametrize("others", [["adapter_model.safetensors", "adapter_model.bin"], ["adapter_model.bin"]])
def test_an_adapter(hub, others):
    adapter = {"adapter_config.json": b"{}", "README.md": b"..."} | dict.fromkeys(others, b"weights")
    hub.repos[NAME] = Repo(adapter)
    main(["download", NAME])
    assert listing(Path("checkpoints") / NAME) == ["README.md", "adapter_config.json", others[0]]


def test_tokenizer_only_and_the_rest_later(hub, files):
    hub.repos[NAME] = Repo(files)
    main(["download", NAME, "--tokenizer_only", "true"])
    folder = Path("checkpoints") / NAME
    assert listing(folder) == [name for name in WANTED if name != "model.safetensors"]
    hub.fetched()
    (folder / "notes.txt").write_text("mine")
    main(["download", NAME])
    assert hub.fetched() == ["model.safetensors"]
    assert listing(folder) == sorted([*WANTED, "notes.txt"])
    main(["download", NAME, "--tokenizer_only"])
    assert hub.fetched() == [] and listing(folder) == sorted([*WANTED, "notes.txt"])


def test_weights_that_a_plan_left_out(hub, files, monkeypatch):
    """The command that follows a plan downloads them."""
    hub.repos[NAME] = Repo(files)
    assert "model.safetensors" not in listing(find_folder(Path(NAME), weights=False))
    hub.fetched()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "model.safetensors" not in listing(find_folder(Path(NAME))), "another error says what is missing"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = find_folder(Path("checkpoints") / NAME)
    assert hub.fetched() == ["model.safetensors"] and listing(folder) == WANTED
    assert find_folder(Path(NAME)) == folder and hub.fetched() == []


def test_another_revision(hub, files, fails):
    hub.repos[NAME] = Repo(files, commit="b" * 40)
    assert "has no revision 'v2'" in fails(NAME, "--revision", "v2")
    main(["download", NAME, "--revision", "b" * 40])
    hub.fetched()
    hub.repos[NAME] = Repo({**sharded(files), "tokenizer.json": b"{}"}, commit="c" * 40)
    main(["download", NAME])
    assert hub.fetched() == sorted([INDEX, *SHARDS, "tokenizer.json"])
    assert "model.safetensors" not in listing(Path("checkpoints") / NAME)  # not both kinds


def test_damaged_files_are_found(hub, files):
    hub.repos[NAME] = Repo(files)
    main(["download", NAME])
    hub.fetched()
    damaged = Path("checkpoints") / NAME / "model.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.raises(SystemExit) as stop:
        main(["download", NAME])
    assert stop.value.code == 2 and set(damaged.read_bytes()) == {0}
    main(["download", NAME, "--overwrite", "true"])
    assert hub.fetched() == ["model.safetensors"] and damaged.read_bytes() == files["model.safetensors"]


def test_files_that_were_changed_by_hand_stay(hub, files, capsys):
    """A new revision takes the place of what was downloaded, and of nothing else."""
    hub.repos[NAME] = Repo(files)
    main(["download", NAME])
    folder = Path("checkpoints") / NAME
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    hub.repos[NAME] = Repo(files | {"tokenizer_config.json": b'{"new": 1}', "config.json": b'{"new": 2}'})
    with pytest.raises(SystemExit) as stop:
        main(["download", NAME])
    assert stop.value.code == 2 and f"{folder / 'config.json'}:" in capsys.readouterr().err
    assert (folder / "config.json").read_text() == "{}"
    (folder / "config.json").write_bytes(files["config.json"])
    with pytest.raises(SystemExit):
        main(["download", NAME])  # a copy is not what was downloaded
    main(["download", NAME, "--overwrite", "true"])
    assert (folder / "tokenizer_config.json").read_text() == '{"new": 1}'
    assert (folder / "notes.txt").read_text() == "mine"
    hub.repos[NAME] = Repo(files)
    main(["download", NAME])
    assert (folder / "config.json").read_bytes() == files["config.json"], "unchanged since it was downloaded"
    (folder / SHARDS[0]).write_text("mine")
    hub.repos[NAME] = Repo(files | {"config.json": b'{"new": 3}'})
    with pytest.raises(SystemExit):
        main(["download", NAME])
    assert (folder / SHARDS[0]).read_text() == "mine"


def test_the_templates_in_a_folder_of_their_own(hub, files, tmp_path):
    more = {f"additional_chat_templates/{name}.jinja": name.encode() for name in ("tool_use", "rag")}
    hub.repos[NAME] = Repo(files | more | {"additional_chat_templates/x/y.jinja": b"z"})
    main(["download", NAME])
    folder = Path("checkpoints") / NAME
    assert chat_templates(folder) == {
        "default": files["chat_template.jinja"].decode(),
        "tool_use": "tool_use",
        "rag": "rag",
    }
    assert not (folder / "additional_chat_templates" / "x").exists()
    hub.fetched()
    main(["download", NAME])
    assert hub.fetched() == []
    hub.repos[NAME] = Repo(files | {"additional_chat_templates/tool_use.jinja": b"new"})
    main(["download", NAME])
    assert chat_templates(folder)["tool_use"] == "new"


# what goes wrong


def test_no_such_repository(hub, fails):
    assert f"{hub.endpoint} has no model meta-llama/Llama-3.2-1C. Did you mean 'meta-llama/Llama-3.2-1B'?" in fails(
        "meta-llama/Llama-3.2-1C"
    )
    assert "your token has no access" in fails("some/thing", "--access_token", "hf_x")
    assert "'a b/c' is not a model name" in fails("a b/c")
    assert "No known model has nonesuch" in fails("nonesuch")


def test_private_and_gated(hub, files, fails, monkeypatch):
    hub.repos[NAME] = Repo(files, token="hf_mine")
    assert "has no model some/model" in fails(NAME)
    assert "rejects the token" in fails(NAME, "--access_token", "wrong")
    hub.repos[NAME] = Repo(files, gated="hf_mine")
    error = fails(NAME)
    assert f"{hub.endpoint}/{NAME}" in error and "--access_token or in HF_TOKEN" in error
    assert "your token has no access yet" in fails(NAME, "--access_token", "hf_other")
    hub.seen.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    main(["download", NAME])
    assert listing(Path("checkpoints") / NAME) == WANTED
    assert not any(token for _, path, token in hub.seen if "/store/" in path)  # the token is for the hub alone
    assert any(token for _, path, token in hub.seen)


def test_nothing_to_read(hub, files, fails):
    hub.repos[NAME] = Repo({"model.gguf": b"x", "config.json": b"{}", "weights.h5": b"x"})
    assert ".gguf, .h5" in fails(NAME)
    assert "has no tokenizer files" in fails(NAME, "--tokenizer_only")
    hub.repos[NAME] = Repo({INDEX: b'{"weight_map": {"a": "../../outside"}}'})
    assert "files that the repository does not have" in fails(NAME, keeps=(INDEX,))


def test_too_many_requests(hub, files, fails, capsys):
    hub.repos[NAME] = Repo(files)
    hub.faults["api"] = [refused(429, Retry_After="0"), refused(503, Retry_After="0")]
    hub.faults["model.safetensors"] = [refused(429, Retry_After="0")]
    main(["download", NAME])
    assert "asks to wait" in capsys.readouterr().err
    assert listing(Path("checkpoints") / NAME) == WANTED


def test_too_many_requests_for_too_long(hub, files, fails):
    hub.repos[NAME] = Repo(files)
    hub.faults["api"] = [refused(429, Retry_After="0") for _ in range(20)]
    assert "too many requests" in fails(NAME)
    hub.faults["api"] = [refused(500, Retry_After="0") for _ in range(20)]
    assert "error 500" in fails(NAME)


def test_no_network(hub, fails, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "some/model from http://127.0.0.1:9" in fails(NAME)


def test_offline(hub, fails, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in fails(NAME)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        find_folder(Path(NAME))
    folder = Path("checkpoints") / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert module.download(NAME) == folder
    assert hub.seen == []


def test_a_folder_on_another_disk(hub, files, tmp_path):
    """A link in the place of the folder stays one."""
    hub.repos[NAME] = Repo(files)
    Path("checkpoints/some").mkdir(parents=True)
    (tmp_path / "disk" / "model").mkdir(parents=True)
    Path("checkpoints", NAME).symlink_to(tmp_path / "disk" / "model")
    main(["download", NAME])
    assert Path("checkpoints", NAME).is_symlink() and listing(tmp_path / "disk" / "model") == WANTED


def test_a_connection_that_is_cut(hub, files):
    hub.repos[NAME] = Repo(files)
    hub.faults["model.safetensors"] = [cut(1000), cut(0), cut(2000)]
    hub.faults["tokenizer.json"] = [cut(10)]
    main(["download", NAME])
    assert (Path("checkpoints") / NAME / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert hub.fetched().count("model.safetensors") == 4


def test_a_connection_that_is_always_cut(hub, files, fails):
    hub.repos[NAME] = Repo(files)
    hub.faults["model.safetensors"] = [cut(0) for _ in range(100)]
    kept = tuple(name for name in WANTED if name != "model.safetensors")
    error = fails(NAME, keeps=kept)
    assert "model.safetensors of some/model" in error and "Check the network" in error
    assert len(hub.faults["model.safetensors"]) > 50  # it gave up
    hub.faults.clear()
    hub.fetched()
    main(["download", NAME])
    assert hub.fetched() == ["model.safetensors"] and listing(Path("checkpoints") / NAME) == WANTED


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])  # checked by sha256, and by git's name
def test_another_hash(hub, files, fails, name):
    hub.repos[NAME] = Repo(files)
    hub.faults[name] = [changed, changed]
    kept = tuple(n for n in WANTED if n != name)
    assert f"{name} of some/model arrived twice with another hash" in fails(NAME, keeps=kept)
    hub.faults[name] = [changed]
    main(["download", NAME])
    assert (Path("checkpoints") / NAME / name).read_bytes() == files[name]


def test_no_room(hub, files, fails, monkeypatch):
    hub.repos[NAME] = Repo(files)
    with monkeypatch.context() as m:
        m.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        error = fails(NAME)
    assert "only 1.0 kB" in error and "--checkpoint_dir" in error
    Path("file").write_text("")
    with pytest.raises(UserError, match="Cannot write to"):
        module.download(NAME, Path("file"))


# kills and company


def start(hub: Hub, *argv: str, **options: Any) -> subprocess.Popen:
    """The command in a process of its own."""
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "litgpt", *argv], env=env, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_in_the_middle(hub, files):
    hub.repos[NAME] = Repo(sharded(files))
    folder, partial = Path("checkpoints") / NAME, Path(f"checkpoints/{NAME}.partial")
    release = threading.Event()
    hub.faults[SHARDS[1]] = [held(release, 1000)]
    others = {*WANTED, INDEX, SHARDS[0]} - {"model.safetensors"}
    process = start(hub, "download", NAME)
    wait_for(lambda: {*map(str, others)} <= set(listing(partial)) and bool(list(partial.rglob("*.incomplete"))))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    release.set()
    assert not folder.exists() and list(partial.rglob("*.incomplete"))  # an orphan
    (partial / "tokenizer.json").write_bytes(b"half")
    (partial / "orphan.txt").write_text("of an earlier revision")
    hub.fetched()
    process = start(hub, "download", NAME)
    assert process.wait() == 0
    assert hub.fetched() == sorted([SHARDS[1], "tokenizer.json"])
    assert set(listing(Path())) == {str(folder / name) for name in {*others, SHARDS[1]}}


def test_killed_before_folders_are_exchanged(hub, files):
    """All of a new revision is there, and the folder has the old one; what failed before that keeps what is whole."""
    hub.repos[NAME] = Repo(files)
    main(["download", NAME, "--tokenizer_only"])
    folder, partial = Path("checkpoints") / NAME, Path(f"checkpoints/{NAME}.partial")
    hub.repos[NAME] = Repo(sharded(files))
    hub.faults[SHARDS[0]] = [refused(403)]
    with pytest.raises(UserError, match="without a token"):
        module.download(NAME)
    partial.mkdir(exist_ok=True)
    for name in {*WANTED, INDEX, *SHARDS} - {"model.safetensors"}:
        (partial / name).write_bytes(hub.repos[NAME].files[name])
    hub.fetched()
    main(["download", NAME])
    assert hub.fetched() == [] and {INDEX, *SHARDS} < set(listing(folder)) and not partial.exists()


def test_killed_while_folders_are_exchanged(hub, files):
    hub.repos[NAME] = Repo(files)
    main(["download", NAME])
    folder = Path("checkpoints") / NAME
    (folder.parent / f"{marked(folder, 'old')}x").mkdir()
    folder.rename(folder.parent / f"{marked(folder, 'old')}x" / "model")
    hub.fetched()
    main(["download", NAME])
    assert hub.fetched() == [] and listing(Path()) == [str(folder / name) for name in WANTED]


def test_ctrl_c(hub, files):
    hub.repos[NAME] = Repo(files)
    hub.faults["model.safetensors"] = [held(threading.Event(), 1000)]
    process = start(hub, "download", NAME)
    partial = Path(f"checkpoints/{NAME}.partial")
    wait_for(lambda: "tokenizer.json" in listing(partial) and bool(list(partial.rglob("*.incomplete"))))
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in err and time.monotonic() - began < 20
    assert not (Path("checkpoints") / NAME).exists() and not list(Path().rglob("*.incomplete"))


def test_two_at_once(hub, files):
    hub.repos[NAME] = Repo(sharded(files))
    release = threading.Event()
    hub.faults[SHARDS[0]] = [held(release, 1000)]
    first = start(hub, "download", NAME)
    wait_for(lambda: bool(list(Path().rglob("*.incomplete"))))
    second = start(hub, "download", NAME)
    assert second.stderr is not None
    line = second.stderr.readline()
    assert "another process that is downloading" in line
    release.set()
    assert first.wait() == 0 == second.wait()
    names = hub.fetched()
    assert len(names) == len(set(names))
    assert set(listing(Path("checkpoints") / NAME)) == {*WANTED, INDEX, *SHARDS} - {"model.safetensors"}
    assert listing(Path()) == [str(Path("checkpoints") / NAME / name) for name in listing(Path("checkpoints") / NAME)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of the shell")
def test_a_disk_that_fills_up(hub, files):
    hub.repos[NAME] = Repo(sharded(files, 3_000_000))
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
    code = limit + f"from litgpt.__main__ import main; main(['download', '{NAME}'])"
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "litgpt: error: The disk is full" in last and "Traceback" not in done.stderr
    assert not list(Path().rglob("*.incomplete")) and not (Path("checkpoints") / NAME).exists()


# names


def test_a_name_given_to_a_command_is_downloaded(hub, files, capsys, monkeypatch):
    hub.repos["EleutherAI/pythia-14m"] = hub.repos[NAME] = Repo(files)
    main(["generate", "pythia-14m", "--prompt", "the", "--max_new_tokens", "2"])
    assert "Downloading EleutherAI/pythia-14m to" in capsys.readouterr().err
    assert find_folder(Path("eleutherai/Pythia-14M")) == Path("checkpoints/EleutherAI/pythia-14m")
    hub.fetched()
    assert find_folder(Path(NAME), weights=False) == Path("checkpoints") / NAME
    assert "model.safetensors" not in hub.fetched()
    for path in ("out/final", "checkpoints/model", "a/b/c", "/nowhere/model", "nowhere", "work/x"):
        Path("work").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="No model folder"):
            find_folder(Path(path))
    with pytest.raises(UserError, match="litgpt download some/other"):
        find_folder(Path("checkpoints/some/other"))
    with pytest.raises(UserError, match="Did you mean 'pythia-14m'"):
        find_folder(Path("pythia-14n"))
    assert hub.seen == []
    with pytest.raises(UserError, match="has no model some/other"):
        find_folder(Path("some/other"))


def test_the_base_of_an_adapter(hub, files, capsys):
    fields = {
        "base_model_name_or_path": NAME,
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(fields))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, "adapter/adapter_model.safetensors")
    with pytest.raises(SystemExit):
        main(["generate", "adapter"])
    err = capsys.readouterr().err
    assert "The base model of adapter is not at 'some/model'" in err and "has no model" in err


def test_other_ranks_wait(hub, files, monkeypatch):
    hub.repos[NAME] = Repo(files)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(find_folder(Path(NAME))))
    waiting.start()
    time.sleep(0.2)
    assert hub.seen == []
    module.download(NAME)
    waiting.join(20)
    assert found == [Path("checkpoints") / NAME]
    monkeypatch.setattr("litgpt.checkpoint.find.WAIT", 0)
    with pytest.raises(UserError, match="first process did not download"):
        find_folder(Path("some/other"))


def test_lists(hub, capsys):
    main(["download", "list"])
    out = capsys.readouterr().out
    assert out.count("\n") == len({row["repo_id"] for row in known_models().values()})
    main(["download", "list", "llama", "3.2", "1b"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"]
    assert "1.24 B" in lines[0] and "131,072 tokens" in lines[0]
    main(["download", "tinyllama"])
    out, err = capsys.readouterr()
    assert out.count("TinyLlama/") == out.count("\n") > 1 and "several models match" in err
    assert hub.seen == []


def test_a_word_with_one_match(hub, files):
    hub.repos["EleutherAI/pythia-14m"] = Repo(files)
    main(["download", "PYTHIA", "14m"])
    assert (Path("checkpoints") / "EleutherAI/pythia-14m" / "config.json").is_file()
    assert repository_named("pythia-14M") == "EleutherAI/pythia-14m"


def test_flags_of_a_conversion(hub, files, capsys):
    hub.repos[NAME] = Repo(files)
    main(["download", "--repo_id", NAME, "--convert_checkpoint", "false", "--dtype", "float16", "--model_name", "x"])
    err = capsys.readouterr().err
    assert "convert_checkpoint" not in err
    assert listing(Path("checkpoints") / NAME) == WANTED


SIZES = {  # of the published weights, in billions
    "pythia-1b": 1.01, "falcon-7b": 6.92, "Llama-2-7b-hf": 6.74, "Llama-3.2-1B": 1.24, "Mistral-7B-v0.1": 7.24,
    "Mixtral-8x7B-v0.1": 46.7, "Gemma-2b": 2.51, "Gemma-2-9b": 9.24, "OLMo-1B-hf": 1.18,
    "Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "phi-2": 2.78,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    from litgpt.commands.download import parameters

    assert parameters(Config.from_name(name)) / 1e9 == pytest.approx(SIZES[name], rel=0.015)


# a hub that is not one

WHOLE = {"rfilename": "config.json", "size": 2, "blobId": "a" * 40}
LFS = {"sha256": "a" * 64, "size": 2, "pointerSize": 1}
ODD: list[Any] = [
    *({"siblings": [WHOLE | change]} for change in ({"rfilename": 5}, {"rfilename": None}, {"rfilename": ["a"]})),
    *({"siblings": [WHOLE | change]} for change in ({"size": "2"}, {"size": -1}, {"size": [2]}, {"size": 1.5})),
    *({"siblings": [WHOLE | change]} for change in ({"blobId": 5}, {"lfs": [1]}, {"lfs": {}}, {"lfs": "a"})),
    {"siblings": [WHOLE | {"lfs": LFS | {"sha256": 5}}]},
    *({"siblings": value} for value in ({}, "a", 5, [5], ["a"], [None], [{}])),
    *({"sha": value, "siblings": []} for value in (5, ["a"], {})),
    *([], "a", 5, None, [5], {"id": 5, "tags": 5, "siblings": [{}]}),
]


def odd(body: bytes) -> Fault:
    def fault(answer: Answer, data: bytes, start: int) -> bool:
        answer.send_start(len(body), 0, {"Content-Type": "application/json"})
        answer.wfile.write(body)
        return True

    return fault


@pytest.mark.parametrize("number", range(len(ODD) + 3))
def test_a_hub_that_answers_oddly(number, hub, tmp_path):
    whole = {"id": NAME, "modelId": NAME, "sha": "a" * 40, "siblings": [WHOLE]}
    answers = [whole | value if isinstance(value, dict) else value for value in ODD]
    bodies = [*(json.dumps(value).encode() for value in answers), b"", b"<html>", b"[" * 100_000]
    hub.faults["api"] = [odd(bodies[number])] * 9
    with pytest.raises(UserError, match=NAME):
        module.download(NAME, tmp_path / "c")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("names", [[".."], ["."], ["/etc/passwd"], ["a/../b"], [5], [["a"]], {}, "a", None])
def test_an_index_of_the_hub_with_odd_names(names, hub, tmp_path):
    index = json.dumps({"weight_map": dict(enumerate(names)) if isinstance(names, list) else names}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index}
    hub.repos[NAME] = Repo(files | {n: b"a" for n in names or () if isinstance(n, str)})
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        module.download(NAME, tmp_path / "c")


def test_a_hub_that_is_silent(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.3)
    monkeypatch.setattr(module, "WAITS", 0)
    hub.faults["api"] = [slowly(5)] * 9
    began = time.monotonic()
    with pytest.raises(UserError, match=NAME):
        module.download(NAME, tmp_path / "c")
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("wait", ["\u00b2", "9" * 5000, "-1", "soon", ""])
def test_a_hub_that_asks_to_wait_oddly(wait, hub, tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": waited.append}))
    hub.faults["api"] = [refused(503, Retry_After=wait)] * 9
    with pytest.raises(UserError):
        module.download(NAME, tmp_path / "c")
    assert max(waited) <= 300


@pytest.mark.parametrize("token", ["s3cr3t x", "s3cr3t\u00e9", "a\r\nB: s3cr3t"])
def test_a_token_that_no_header_can_hold(token, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    for given in (token, None):
        with pytest.raises(UserError) as e:
            module.download(NAME, tmp_path / "c", access_token=given)
        assert "s3cr3t" not in str(e.value) and not hub.seen


def test_an_endpoint_with_a_password(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("//", "//me:s3cr3t@"))
    with pytest.raises(UserError) as e:
        module.download(NAME, tmp_path / "c")
    assert "s3cr3t" not in str(e.value) + capsys.readouterr().err
