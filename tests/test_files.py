"""What is written is there whole or not at all, and is for everybody whom the umask allows."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.storage.files import read_json, read_text, read_yaml, write_text
from litgpt.storage.outputs import SUMS, new_folder
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import load_style, save_style, style_fields
from litgpt.text.tokenizer import Tokenizer


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, with its text; but for the lists of files."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != SUMS}


@pytest.fixture
def umask() -> Callable[[int], int]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_new_folder(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "y").write_text("2")
        assert not (tmp_path / "a" / "b").exists() and folder.parent == tmp_path / "a"
    assert tree(tmp_path) == {"a/b/x": "1", "a/b/sub/y": "2"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there_before", [False, True])
def test_new_folder_that_fails(tmp_path, error, there_before):
    if there_before:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "old").write_text("0")
    with pytest.raises(error), new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("1")
        raise error
    assert tree(tmp_path) == ({"b/old": "0"} if there_before else {})
    assert [p.name for p in tmp_path.iterdir()] == (["b"] if there_before else [])


def test_new_folder_replaces_all_of_the_old_one(tmp_path):
    for text, names in (("1", "abc"), ("2", "bcd")):
        with new_folder(tmp_path / "f") as folder:
            for name in names:
                (folder / name).write_text(text)
    assert tree(tmp_path) == {"f/b": "2", "f/c": "2", "f/d": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions(tmp_path, umask, mask):
    umask(mask)
    with new_folder(tmp_path / "f") as folder:
        (folder / "sub").mkdir(mode=0o700)
        for name in ("a", "sub/b"):
            (folder / name).write_text("")
            (folder / name).chmod(0o600)
    write_text(tmp_path / "t", "")

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert {mode(name) for name in ("f", "f/sub")} == {0o777 & ~mask}
    assert {mode(name) for name in ("f/a", "f/sub/b", "t")} == {0o666 & ~mask}
    assert umask(mask) == mask, "the umask itself is left as it was"


def test_write_text(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    write_text(path, "ä\nb\r\n😀")
    assert path.read_bytes() == "ä\nb\r\n😀".encode()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "something else, and longer")
    assert path.read_bytes() == "ä\nb\r\n😀".encode()
    monkeypatch.undo()
    write_text(path, "new")
    assert tree(tmp_path) == {"t.txt": "new"}, "nothing beside it is left"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b'{"a": 1,\n "b": }', "is not JSON: .* at line 2, column 7"),
        (b'{"a": "b\n"}', "is not JSON: Invalid control character at line 1, column 9"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 7\)"),
        (b"[1] 2", "Extra data at line 1, column 5"),
        (None, "Cannot read .*No such file"),
    ],
)
def test_read_json_says_what_is_wrong(tmp_path, data, message):
    path = tmp_path / "x.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as e:
        read_json(path)
    assert str(path) in str(e.value)


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_bytes('\ufeff{"ä": [1, "😀"]}'.encode())
    assert read_json(tmp_path / "x.json") == {"ä": [1, "😀"]}
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)


@pytest.mark.parametrize(("name", "read"), [("a.json", read_json), ("a.yaml", read_yaml), ("a.jinja", read_text)])
def test_a_file_that_must_not_be_read(name, read, tmp_path, monkeypatch):
    (tmp_path / name).write_text("{}")

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read everything
    with pytest.raises(UserError, match=f"{name}: Permission denied"):
        read(tmp_path / name)


def test_the_longest_template_of_a_result_can_be_read_again(llama, tmp_path):
    template = "é\n\t'\x07" * (2**18 // 5)
    (tmp_path / "chat_template.jinja").write_text(template[: 2**18 // 6])
    style = ChatTemplate(template, {}, "chat", ChatTemplate(template, {}))
    save_style(style, tmp_path, Tokenizer(llama))
    assert style_fields(load_style(tmp_path)) == style_fields(style)
