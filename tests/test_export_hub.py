"""`litgpt export --to hub`, by the real client of huggingface_hub, to a small hub on this machine."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.checkpoint.model_card import Facts, write_card
from litgpt.export import hub as module
from litgpt.methods.lora import LoRA
from litgpt.methods.peft_export import write_lora
from litgpt.storage.outputs import write_sums
from tests.hub_server import Answer, Hub, Repo, refused, serve
from tests.test_lora import with_lora

NAME = "me/my-model"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
LOCAL = ("training_state.pt", "hyperparameters.yaml", "checksums.json", ".litgpt.json", ".env", "notes.txt")
LOCAL += (".cache/huggingface/x", "logs/events", "step-000002/model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        hub.writer = "secret"
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # this hub speaks LFS
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)
        monkeypatch.setattr(module, "SMALL", 10_000)
        yield hub


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A result in two shards, with files of the run."""
    folder = tmp_path / "run" / "final"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    weights = load_file(llama / "model.safetensors")
    names = sorted(weights)
    parts = [names[::2], names[1::2]]
    for shard, part in zip(SHARDS, parts):
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_card(folder, "run", Facts("some/base", ["| | |"], license={"license": "mit"}), None)
    (folder / "LICENSE").write_text("MIT")
    for name in LOCAL:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("/home/me/secret")
    write_sums(folder)
    return folder


WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, *SHARDS}
WANTED |= {"README.md", "LICENSE"}


def upload(folder: Path, *flags: object) -> int:
    try:
        main(["export", str(folder), "--to", "hub", *map(str, flags or (NAME,))])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_uploaded(hub, folder, capsys):
    before = listing(folder)
    assert upload(folder) == 0
    out = capsys.readouterr().out
    repo = hub.repos[NAME]
    assert set(repo.files) == WANTED and not repo.private
    assert listing(folder) == before
    for name in WANTED - {"README.md"}:
        assert repo.files[name] == before[name]
    assert not any(b"/home/me" in data for data in repo.files.values())
    card = repo.files["README.md"].decode()
    assert f"litgpt chat {NAME}" in card and f'name = "{NAME}"' in card and "litgpt chat ." not in card
    assert f"{hub.endpoint}/{NAME} (new, public)" in out and "not sent" in out and "hyperparameters.yaml" in out
    assert out.index("\nupload to") < out.index("\nuploaded")
    assert max(map(len, out.replace(str(folder), "").splitlines())) <= 80


def test_private(hub, folder, capsys):
    assert upload(folder, NAME, "--private") == 0
    assert hub.repos[NAME].private and "(new, private)" in capsys.readouterr().out
    assert upload(folder) == 0  # it stays private
    assert hub.repos[NAME].private and "(private)" in capsys.readouterr().out
    hub.repos[NAME].private = False
    hub.sent.clear()
    assert upload(folder, NAME, "--private") == 2
    assert "is public" in capsys.readouterr().err and not hub.sent


def died(answer: Answer, data: bytes, start: int) -> bool:
    """The connection ends while a file is sent."""
    answer.rfile.read(1000)
    answer.close_connection = True
    return True


@pytest.mark.parametrize("fault", [died, refused(403)])
def test_an_interrupted_upload(fault, hub, folder, capsys):
    """Goes on with the file that was interrupted. Nothing is in the repository before that."""
    before = listing(folder)
    hub.faults["upload"] = [None, *[fault] * 20]
    assert upload(folder) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err and "\ntotal " in shown.out and "\nuploaded" not in shown.out
    assert hub.repos[NAME].files == {} and hub.sent[0] == sha(folder / SHARDS[0])
    assert set(hub.sent[1:]) == {sha(folder / SHARDS[1])}
    hub.faults.clear()
    hub.sent.clear()
    assert upload(folder) == 0
    assert hub.sent == [sha(folder / SHARDS[1])] and set(hub.repos[NAME].files) == WANTED
    hub.sent.clear()
    assert upload(folder) == 0
    assert hub.sent == [] and listing(folder) == before


def test_an_interrupted_commit(hub, folder, capsys):
    hub.faults["commit"] = [refused(503)]
    assert upload(folder) == 2 and "again to continue" in capsys.readouterr().err
    hub.sent.clear()
    assert upload(folder) == 0 and hub.sent == []


@pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet is not installed")
def test_an_interrupted_upload_by_xet(hub, folder, capsys, monkeypatch, tmp_path):
    """The protocol that the library uses where it is installed. It keeps what the server has in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    before = listing(folder)
    hub.faults["commit"] = [refused(503)]
    assert upload(folder) == 2 and len(hub.sent) == 2
    assert upload(folder) == 0 and len(hub.sent) == 2, "sent again"
    assert set(hub.repos[NAME].files) == WANTED and listing(folder) == before


def test_weights_of_another_model_are_replaced(hub, folder, llama, capsys):
    assert upload(folder) == 0
    hub.repos[NAME].files["notes.md"] = b"written on the hub"
    assert upload(llama) == 0
    files = hub.repos[NAME].files
    assert "model.safetensors" in files and not {INDEX, *SHARDS} & set(files) and "notes.md" in files
    assert "There is no README.md" in capsys.readouterr().out


def test_a_card_that_people_wrote(hub, folder):
    text = "# Mine\n\nlitgpt chat .\n"
    (folder / "README.md").write_text(text)
    assert upload(folder) == 0 and hub.repos[NAME].files["README.md"].decode() == text


@pytest.mark.parametrize("base", ["some/base", "path"])
def test_an_adapter(base, hub, llama, tmp_path, capsys, monkeypatch):
    """Its base need not be here."""
    monkeypatch.chdir(tmp_path)
    named = str(llama) if base == "path" else base
    (tmp_path / "adapter").mkdir()
    write_lora(LoRA(r=2), with_lora(llama, LoRA(r=2)), named, tmp_path / "adapter")
    assert upload(tmp_path / "adapter") == 0
    assert set(hub.repos[NAME].files) >= {"adapter_config.json", "adapter_model.safetensors"}
    out = capsys.readouterr().out
    assert f"base       {named}" in out and ("path on this machine" in out) == (base == "path")


@pytest.fixture
def fails(hub: Hub, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def run(*words: object) -> str:
        assert upload(*words) == 2
        err = capsys.readouterr().err
        last = err.splitlines()[-1]
        assert "Traceback" not in err and last.startswith("litgpt: error: ") and "secret" not in last
        return last

    return run


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "/b", "a/", "a/..", "a/b.git", "a/b--c", "a/ü", "a/b c", "a/" + "b" * 96]
)
def test_names(name, fails, hub, folder):
    assert "ORG/NAME" in fails(folder, name) and not hub.seen


def test_no_token(fails, hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "--access_token" in fails(folder, NAME) and not hub.seen
    assert upload(folder, NAME, "--access_token", "secret") == 0


@pytest.mark.parametrize("token, expected", [("wrong", "rejects the access token"), ("readonly", "may not write")])
def test_refused_tokens(token, expected, fails, hub, folder):
    assert expected in fails(folder, NAME, "--access_token", token) and NAME not in hub.repos
    hub.repos[NAME] = Repo({})
    assert expected in fails(folder, NAME, "--access_token", token) and not hub.repos[NAME].files


def test_no_server(fails, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "Check the network" in fails(folder, NAME)


def test_offline(fails, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in fails(folder, NAME)


def test_other_folders(fails, hub, folder, tmp_path):
    assert f"Did you mean '{folder}'?" in fails(folder.parent, NAME)
    (folder / SHARDS[0]).write_bytes(b"cut")
    assert "damaged" in fails(folder, NAME)
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit" / "lit_model.pth").touch()
    assert "--to hf" in fails(tmp_path / "lit", NAME)
    assert not hub.seen


def test_options(fails, hub, folder):
    assert "repository" in fails(folder, "--private")
    assert "--type" in fails(folder, NAME, "--type", "f32")
    with pytest.raises(SystemExit):
        main(["export", str(folder), NAME])
    assert not hub.seen
