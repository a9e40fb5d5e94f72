"""A Modelfile for Ollama (https://github.com/ollama/ollama/blob/main/docs/modelfile.md), with the chat template in Go's
form."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import jinja2

from litgpt.errors import UserError
from litgpt.storage.files import read_text
from litgpt.text.prompt_style import Message, PromptStyle, clock_at
from litgpt.text.token_fields import optional_json
from litgpt.text.tokenizer import Tokenizer

ROLES = ("user", "assistant")
WORDS = ("Wone", "Wtwo", "Wthree")  # messages that no template contains
SYSTEM = "Wsystem"
TRIED = ("Hello", " two\nlines \n", "a {{ b }} and \"c\" and '''d'''")
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md")
PARAMETERS = {  # of generation_config.json, and Ollama's names of them
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
GO = """\
START{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if eq $m.Role "user" }}USER{{ else if eq $m.Role "assistant" }}ASSISTANT{{ end }}{{ end }}"""


@dataclass
class Turns:
    """The texts around the messages of a conversation, in which user and assistant take turns.

    Args:
        start: Before the first question if there is no system message.
        end: After the last question. The answer follows.
        answer: Before an answer that another question follows. None if the template shows the last question alone.
        question: Between such an answer and the question.
        system: Before a system message. None if the template shows none.
        after_system: Between that and the first question.
    """

    start: str
    end: str
    answer: Optional[str] = None
    question: str = ""
    system: Optional[str] = None
    after_system: str = ""

    @property
    def default_system(self) -> str:
        """The system message that the template adds where there is none. Empty if there is none, or if Ollama may not
        keep the white space around it."""
        if self.system is None:
            return ""
        found = re.fullmatch(f"{re.escape(self.system)}(.*){re.escape(self.after_system)}", self.start, re.DOTALL)
        return found[1] if found and found[1] == found[1].strip() else ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that `go` makes."""
        system, turns = "", [m["content"] for m in messages]
        if messages[0]["role"] == "system":
            system, *turns = turns
        shown = system and self.system is not None
        text = f"{self.system}{system}{self.after_system}" if shown else self.start
        if self.answer is None:
            return text + turns[-1] + self.end
        for question, answer in zip(turns[::2], turns[1::2]):
            text += question + self.answer + answer + self.question
        return text + turns[-1] + self.end

    def go(self) -> str:
        """The template in Go's form. Ollama passes all messages, and the system message once more as `.System`."""
        start = literal(self.start)
        if self.system is not None:
            with_system = f"{literal(self.system)}{{{{ .System }}}}{literal(self.after_system)}"
            start = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{start}{{{{ end }}}}"
        content, end = "{{ $m.Content }}", f"{literal(self.end)}"
        if self.answer is None:
            parts = {"USER": f"{{{{ if $last }}}}{content}{end}{{{{ end }}}}", "ASSISTANT": ""}
        else:
            question = f"{{{{ if not $last }}}}{literal(self.question)}{{{{ end }}}}"
            parts = {
                "USER": f"{content}{{{{ if $last }}}}{end}{{{{ end }}}}",
                "ASSISTANT": f"{literal(self.answer)}{content}{question}",
            }
        parts["START"] = start
        return re.sub("START|USER|ASSISTANT", lambda found: parts[found[0]], GO)


def literal(text: str) -> str:
    """A text in a template, as an action, beside which no white space is removed. JSON's escapes are Go's too."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


@clock_at()
def turns_of(style: PromptStyle, bos: str) -> Optional[Turns]:
    """The texts of a style, without the BOS that llama.cpp adds. None if they depend on the messages."""
    words = WORDS[:1] if style.single_turn else WORDS
    plain, full = (split(style, names) for names in (words, (SYSTEM, *words)))
    if plain is None:
        return None
    found = Turns(plain[0].removeprefix(bos), plain[-1], *plain[1:-1])
    if full is not None and full[2:] == plain[1:]:
        found.system, found.after_system = full[0].removeprefix(bos), full[1]
    return found


def split(style: PromptStyle, words: Sequence[str]) -> Optional[list[str]]:
    """The texts around the messages of a conversation. None if the style cannot render it, or changes its order."""
    text = render(style, conversation(words)) or ""
    found = re.fullmatch("(.*)".join(["", *words, ""]), text, re.DOTALL)
    return list(found.groups()) if found and all(text.count(word) == 1 for word in words) else None


def conversation(texts: Sequence[str]) -> list[Message]:
    """Questions and answers, after a system message if the number of texts is even."""
    opening = len(texts) % 2 == 0
    roles = ("system",) * opening + ROLES * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def render(style: PromptStyle, messages: Sequence[Message]) -> Optional[str]:
    try:
        return style.prompt(messages)
    except (UserError, jinja2.TemplateError):
        return None


@clock_at()
def template_notes(style: PromptStyle, turns: Turns, bos: str) -> Iterator[str]:
    """What the template in Go's form renders in another way than the style."""
    if style.printed_times():
        yield "the date in Ollama's template stays that of today"
    for text in TRIED:
        for n in (1, 2) if style.single_turn else (1, 2, 3, 4):
            messages = conversation([text] * n)
            ours = render(style, messages)
            if ours is not None and ours.removeprefix(bos) != turns.render(messages):
                yield f"Ollama's template differs from the chat template for {n} messages {text!r}"
                return


def modelfile(
    model: str, adapter: Optional[str], folders: Sequence[Path], tokenizer: Tokenizer, style: PromptStyle
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and notes about what it does not say.

    Args:
        model: The name of the GGUF file.
        adapter: That of an adapter over it.
        folders: Those of the model and of its base, for licenses and parameters.
    """
    bos = tokenizer.bos_token or ""
    turns, notes = turns_of(style, bos), []
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    if turns is None:
        notes.append("the chat template cannot be written in Go's form, so Ollama chooses one by itself")
    else:
        lines.append(f"TEMPLATE {quoted(turns.go())}")
        if turns.default_system:
            lines.append(f"SYSTEM {quoted(turns.default_system)}")
        notes += template_notes(style, turns, bos)
        if "tools" in getattr(style, "template", ""):
            notes.append("Ollama's template does not show tools")
    stops = [tokenizer.decode([i], skip_special=False) for i in sorted(tokenizer.stops(style))]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop]
    fields = next((found for folder in folders if (found := optional_json(folder / "generation_config.json"))), {})
    lines += [f"PARAMETER {name} {fields[key]}" for key, name in PARAMETERS.items() if fields.get(key) is not None]
    files = [folder / name for folder in dict.fromkeys(folders) for name in LICENSES]
    lines += [f"LICENSE {quoted(read_text(file))}" for file in files if file.is_file()]
    return "\n".join(lines) + "\n", notes


def quoted(text: str) -> str:
    return '"""' + text.replace('"""', "'''") + '"""'
