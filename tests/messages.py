"""The wording of all messages: every text of three words or more in the code of the package, docstrings excepted.

`python -m tests.messages` writes `messages.txt` anew. A change of wording shows there as one diff; other tests assert
the kind of an error, and the option, file or row that it names.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import litgpt

ROOT = Path(litgpt.__file__).parent
FILE = Path(__file__).with_name("messages.txt")
WORDS = 3


def template(node: ast.expr) -> str:
    """A text as its template: what is filled in stands in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        format = f":{template(node.format_spec)}" if node.format_spec else ""
        return "{" + ast.unparse(node.value) + format + "}"
    return ""


def texts(source: str) -> Iterator[str]:
    """The texts in a module, in their order. A text within an f-string's braces belongs to that f-string."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            text = " ".join(template(node).split())
            if len(text.split()) >= WORDS:
                yield text
            return
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):  # a docstring
                yield from walk(child)

    yield from walk(ast.parse(source))


def messages() -> str:
    blocks = []
    for path in sorted(ROOT.rglob("*.py")):
        lines = dict.fromkeys(texts(path.read_text(encoding="utf-8")))
        if lines:
            blocks.append("\n".join([path.relative_to(ROOT).as_posix(), *(f"    {line}" for line in lines)]))
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    FILE.write_text(messages(), encoding="utf-8")
