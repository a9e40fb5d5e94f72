"""The walks on the design page name functions that exist, in at most so many hops."""

import ast
import re
from pathlib import Path

import pytest

import litgpt

ROOT = Path(litgpt.__file__).parent
PAGE = ROOT.parent / "tutorials" / "developer-docs" / "design.md"
MOST = {"litgpt finetune lora": 10, "JSON row": 12, "checkpoint_dir": 12, "chat request": 12}
HOP = re.compile(r"^\d+\. `([\w/]+\.py)`: `([\w.]+)`", re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="an installed package has no pages")


def walks() -> dict[str, list[tuple[str, str]]]:
    section = PAGE.read_text(encoding="utf-8").split("\n## Walks\n")[1].split("\n## ")[0]
    parts = re.split(r"^\*\*(.+?)\*\*", section, flags=re.MULTILINE)[1:]
    return {title: HOP.findall(text) for title, text in zip(parts[::2], parts[1::2])}


def defined(path: Path) -> set[str]:
    """The functions, classes, and methods (`Class.method`) of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
            found |= {f"{node.name}.{n.name}" for n in inner}
    return found


@pytest.mark.parametrize("words", MOST)
def test_walk(words):
    hops = next(hops for title, hops in walks().items() if words in title)
    assert 3 <= len(hops) <= MOST[words]
    for file, name in hops:
        assert name in defined(ROOT / file), f"{file} has no {name}"


def test_loading_does_not_go_back_up():
    """From the folder to the weights, the walk goes down the floors only."""
    from tests.test_floors import FLOOR

    hops = next(hops for title, hops in walks().items() if "checkpoint_dir" in title)
    floors = [FLOOR[file.split("/")[0].removesuffix(".py")] for file, _ in hops]
    assert floors == sorted(floors, reverse=True)
