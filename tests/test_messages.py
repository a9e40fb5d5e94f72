"""The wording of messages changes on purpose only, and has none of the phrases that readers stumble over."""

import re

import pytest

from tests.messages import FILE, messages, texts

STUMBLING = (  # what no message says, and what to say instead is in CONTRIBUTING.md
    r"\b(is|are|was|were) wanted\b",
    r"\bwants\b",
    r"\bso many\b",
    r"(?<!there )\b(is|are) no [a-z]+\b(?! longer)",
    r"\bleave (it|them|the option)? ?away\b",
    r"\bmend\b",
    r"\bwould do\b",
    r"\bspoil\b",
    r"\bharm\b",
)


def test_wording():
    assert messages() == FILE.read_text(encoding="utf-8"), (
        "Messages changed. If that is intended, run: python -m tests.messages"
    )


@pytest.mark.parametrize("phrase", STUMBLING)
def test_phrases(phrase):
    found = [line.strip() for line in messages().splitlines() if re.search(phrase, line, re.IGNORECASE)]
    assert not found


def test_texts():
    source = '"""A docstring here."""\nraise Wrong(f"--x {x:.2f} must be "\n  "above 0", "one two")\nprint("a b c")'
    assert list(texts(source)) == ["--x {x:.2f} must be above 0", "a b c"]
