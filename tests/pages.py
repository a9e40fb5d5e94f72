"""The pages for people, taken apart: their shell commands, their files and their links.

What a page shows in a ```bash block is a command that a reader types. A line whose comment says `not run by the tests:
REASON` is left out; before the first command of a block, such a comment leaves out the block. A ```yaml or
```python block whose first line is `# NAME` is a file of that name, which the commands after it may read.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").rglob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
LINKED = [*PAGES, *OTHERS, *sorted((ROOT / "config_hub").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?)\)|\bsrc=\"([^\"]+)\"")
LEFT_OUT = "not run by the tests: "


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is in, the line of the page where it begins, and its text."""

    language: str
    line: int
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that it shows, if it shows one."""
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return match[1] if match and self.language in ("yaml", "python") else None


@dataclass(frozen=True)
class Command:
    """One command: its words, the variables set before it, and the line of the page."""

    line: int
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        body = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        found.append(Block(match[2], text[: match.start()].count("\n") + 1, body))
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block that are to be run."""
    lines = block.text.replace("\\\n", " \\\n").splitlines()
    if any(LEFT_OUT in line for line in takewhile(lambda line: line.startswith("#"), lines)):
        return
    start = 0
    while start < len(lines):
        end = start
        while lines[end].endswith("\\"):
            end += 1
        text = " ".join(line.removesuffix("\\") for line in lines[start : end + 1])
        if LEFT_OUT not in text and (words := shlex.split(text, comments=True)):
            variables = []
            while re.match(r"[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                variables.append((name, value))
            yield Command(block.line + 1 + start, tuple(words), tuple(variables))
        start = end + 1


def prose(page: Path) -> str:
    """A page without its fenced blocks and its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Where the page points to within the project."""
    found = (a or b for a, b in LINK.findall(prose(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The names of the headings of a page, as hosts of Markdown make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head.lower())).replace(" ", "-")
        for head in heads
    }
