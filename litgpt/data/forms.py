"""The forms of a row, recognized by their keys, and how each becomes a conversation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Optional, Union

from litgpt.data.messages import (
    EXAMPLES,
    Fields,
    Messages,
    answer,
    as_context,
    as_messages,
    check_media,
    check_object,
    check_text,
    check_texts,
    has_messages,
    key_names,
    list_of,
    missing,
    parsed,
    shown,
    text_of,
    transcript,
    turn,
    up_to_answer,
)
from litgpt.errors import UserError, kind, nearest
from litgpt.text.chat_template import REASONING

VARIABLES = "chat_template_kwargs"  # what a row passes to the chat template
SHARED = ("system", "tools", "input", "context", *REASONING, VARIABLES)  # keys that a conversation of any form may have


@dataclass
class Row:
    """A conversation that ends with the assistant, or a text.

    Args:
        messages: Each has `role` (system, user, assistant, or tool) and `content`, a string. A user message may have
            `input`, a string. An assistant message may have `tool_calls` in OpenAI's format, with the arguments as an
            object, and `_context` if it is part of the prompt. Any message may have `train`, true or false, and
            further fields of the file.
        tools: The tools that the assistant may call, as in the file.
        text: A text in place of messages. All of it is trained on.
        variables: What the row passes to the chat template, such as {"enable_thinking": false}.
        goes_on: Whether the row has messages after the last answer, which are not used.
    """

    messages: Messages
    tools: Optional[list[Any]] = None
    text: Optional[str] = None
    variables: Optional[dict[str, Any]] = None
    goes_on: bool = False


@dataclass(frozen=True)
class Form:
    """How a form is recognized and read.

    Args:
        keys: The keys of a row of this form; `a|b` means either.
        read: Returns the messages of a row with these keys, its text, or None to skip the row.
        also: Further keys that `read` uses, besides those that every conversation may have.
    """

    keys: tuple[str, ...]
    read: Callable[[Fields, str], Union[Messages, str, None]]
    also: tuple[str, ...] = ()

    @cached_property
    def alternatives(self) -> list[list[str]]:
        return [key.split("|") for key in self.keys]

    @cached_property
    def used(self) -> frozenset[str]:
        """The keys that a row of this form is made from."""
        own = [key for keys in self.alternatives for key in keys]
        return frozenset([*own, *self.also, *(() if own == ["text"] else SHARED)])

    def lacking(self, present: Any) -> list[str]:
        return [keys[0] for keys in self.alternatives if present.keys().isdisjoint(keys)]


def recognize(fields: Any, where: str, labels: bool = False) -> str:
    """The name of a row's form. A key whose value is null counts only if no form is found without it.

    Args:
        fields: The row, with its keys renamed.
        where: The position of the row, as `read_rows` gives it. Errors start with it.
        labels: Whether `label` beside an instruction or a question says how good the answer is. Without labels, it
            may be anything, such as a class.

    Raises:
        UserError: The row has no known form. The message lists its keys and the known forms.
    """
    check_object(fields, where, "instruction and output")
    filled = {key: value for key, value in fields.items() if value is not None}
    for present in (filled, fields):
        for name, form in FORMS.items():
            if not form.lacking(present) and (name != "label" or labels or present.keys() & SURELY_LABELED):
                return name
    hint = next((h for k in fields if k not in KEYS and (h := nearest(str(k), KEYS))), "")
    known = "; ".join(f"{name} ({', '.join(form.keys)})" for name, form in FORMS.items())
    raise UserError(
        f"{where}, has no columns that litgpt recognizes. Found: {key_names(fields)}.{hint} Known formats: {known}. "
        "Map the columns of the file to these with --data.columns."
    )


def to_row(fields: Any, form: str, where: str, columns: Optional[Mapping[str, str]] = None) -> Optional[Row]:
    """A row of a file as a conversation or a text.

    Args:
        fields: The row as in the file.
        form: A name in `FORMS`.
        where: The position of the row, as `read_rows` gives it. Errors start with it.
        columns: As for `rename`.

    Returns:
        The row, or None if its `label` is false.

    Raises:
        UserError: The row does not have that form, or a text in it cannot be used.
    """
    if form not in FORMS:
        raise UserError(f"--data.format {form} is not known. Choose from {', '.join(FORMS)}.{nearest(form, FORMS)}")
    check_object(fields, where, " and ".join(key.split("|")[0] for key in FORMS[form].keys))
    if columns:
        fields = rename(fields, columns, where)
    check_keys(fields, form, where)
    check_mapped(fields, form, columns or {})
    made = FORMS[form].read(fields, where)
    if isinstance(made, str):
        return Row([], text=made)
    return None if made is None else conversation(made, fields, where)


def rename(fields: Any, columns: Mapping[str, str], where: str, strict: bool = False) -> dict[str, Any]:
    """The fields of a row under the keys of the forms. A row may lack a column that maps to an optional key.

    Args:
        fields: The row as in the file.
        columns: Maps keys of the forms to keys of the file, such as {"instruction": "question", "output": "answer"}.
        where: The position of the row.
        strict: Whether the row must have all of these columns.

    Raises:
        UserError: The row lacks another such key, or no form has a key of `columns`.
    """
    check_object(fields, where, " and ".join(columns.values()))
    renamed = {key: value for key, value in fields.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours not in KEYS:
            hint = nearest(ours, KEYS)
            raise UserError(f"--data.columns {ours}: no format has this column. Choose from {', '.join(KEYS)}.{hint}")
        if theirs not in fields and ours in SHARED and not strict:
            continue
        if theirs not in fields:
            raise UserError(
                f"{where}, is missing {theirs}, which --data.columns maps to {ours}. Found: {key_names(fields)}."
                f"{nearest(theirs, map(str, fields))}"
            )
        renamed[ours] = fields[theirs]
    return renamed


def check_mapped(fields: Fields, form: str, columns: Mapping[str, str]) -> None:
    """Raise `UserError` if the form does not use a column that `columns` maps."""
    for key in columns:
        if fields.get(key) is not None and key not in FORMS[form].used:
            raise UserError(f"--data.columns {key}: the {form} format has no such column. Remove it from the mapping.")


Side = tuple[Optional[Row], Optional[Row]]  # the chosen or desirable conversation, and the rejected or undesirable one


def to_sides(fields: Any, form: str, where: str, unit: str) -> list[Side]:
    """A row of a file as conversations for preference training: pairs, or single conversations whose label is their
    place. A pair gives two labels, ranked answers several pairs, or none if their scores are equal.

    Args:
        fields: The row, with its keys renamed.
        unit: `pair` or `label`.

    Raises:
        UserError: The row has another form, or cannot be used.
    """
    check_keys(fields, form, where)
    if form == "label" and unit == "label":
        messages, is_good = labeled(fields, where)
        row = conversation(messages, fields, where)
        return [(row, None) if is_good else (None, row)]
    if form not in ("preference", "ranked"):
        needed = "Pairs need chosen and rejected" if unit == "pair" else "KTO needs a prompt, an answer, and a label"
        command = "kto" if form == "label" else "lora"
        raise UserError(
            f"{where}, has the form {form}. {needed}. For rows like this one, use litgpt finetune {command}."
        )
    pairs = [sides(fields, where)] if form == "preference" else ranked(fields, where)
    without_thoughts = {key: value for key, value in fields.items() if key not in REASONING}
    rows = [(conversation(a, fields, where), conversation(b, without_thoughts, where)) for a, b in pairs]
    if unit == "pair":
        return list(rows)
    return [side for a, b in rows for side in ((a, None), (None, b))]


def pair(prompt: str, *answers: str) -> Callable[[Fields, str], Messages]:
    """A reader of one turn: the prompt, and the first of the answers that the row has."""

    def read(fields: Fields, where: str) -> Messages:
        answer = next(key for key in answers if key in fields)
        return turn(text_of(fields, prompt, where), text_of(fields, answer, where))

    return read


read_alpaca = pair("instruction", "output", "response")


def read_history(fields: Fields, where: str) -> Messages:
    return turns_of(fields, where) + read_alpaca(fields, where)


def turns_of(fields: Fields, where: str) -> Messages:
    """The messages of a history."""
    messages = []
    for i, texts in enumerate(list_of(fields, "history", where), 1):
        if not isinstance(texts, list) or len(texts) != 2:
            raise UserError(f"{where}, has history whose turn {i} is not a list of two strings, prompt and answer.")
        for content in texts:
            check_text(content, f"turn {i} of history", where)
        messages += turn(*texts)
    return messages


def read_prompt_completion(fields: Fields, where: str) -> Messages:
    return as_context(as_messages(fields["prompt"], "prompt", "user", where)) + answer(fields, "completion", where)


def read_messages(fields: Fields, where: str) -> Messages:
    key = "messages" if fields.get("messages") is not None else "conversations"
    if not (values := list_of(fields, key, where)):
        raise UserError(f"{where}, has no messages in {key}. Expected {EXAMPLES[key]}.")
    return as_messages(values, key, "user", where)


def read_preference(fields: Fields, where: str) -> Messages:
    return sides(fields, where)[0]


def sides(fields: Fields, where: str) -> tuple[Messages, Messages]:
    """The conversations that end with the chosen and with the rejected answer."""
    chosen, rejected = (answer(fields, key, where) for key in ("chosen", "rejected"))
    before = prompt_messages(fields, where)
    if before is None and chosen[0]["role"] == "assistant":
        raise missing(fields, "prompt, messages, or conversations", where)
    before = before or []
    if n := next((n for n in range(min(len(before), len(chosen)), 0, -1) if before[-n:] == chosen[:n]), 0):
        before = before[:-n]  # the answers repeat the end of the prompt
    elif chosen[0]["role"] == "user":  # the complete conversation
        before = [m for m in before[:1] if m["role"] == "system"]
    elif chosen[0]["role"] == "system":
        before = []
    n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))  # their common prompt
    n = min(n, len(up_to_answer(chosen, where)) - 1)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] == "assistant":  # only one of them has the prompt
        n = len(up_to_answer(chosen, where)) - 1
        rejected = [*chosen[:n], *rejected]
    n = min(n, len(up_to_answer(rejected, where)) - 1)
    prompt = as_context(before + chosen[:n])
    return prompt + chosen[n:], prompt + rejected[n:]


def prompt_messages(fields: Fields, where: str) -> Optional[Messages]:
    """The messages before the answers of a row, or None if it has none."""
    if fields.get("prompt") is not None:
        messages = as_messages(transcript(fields["prompt"]), "prompt", "user", where)
        is_open = messages[-1] == {"role": "assistant", "content": ""}  # a transcript that ends with "Assistant:"
        return messages[:-1] if is_open else messages
    if has_messages(fields):
        return read_messages(fields, where)
    key = next((key for key in ("instruction", "question") if fields.get(key) is not None), None)
    if key is None:
        return None
    history = turns_of(fields, where) if fields.get("history") else []
    return [*history, {"role": "user", "content": text_of(fields, key, where)}]


def read_ranked(fields: Fields, where: str) -> Messages:
    return by_score(fields, where)[0][1]


def ranked(fields: Fields, where: str) -> list[tuple[Messages, Messages]]:
    """The best answer of a row with each that is worse."""
    (best, chosen), *others = by_score(fields, where)
    return [(chosen, answer) for score, answer in others if score < best]


def by_score(fields: Fields, where: str) -> list[tuple[float, Messages]]:
    """The conversations that end with the answers of a row, and their scores, best first."""
    key = next(key for key in ANSWERS if fields.get(key) is not None)
    answers, scores = [], []
    values = list_of(fields, key, where)
    beside = next((k for k in SCORES if fields.get(k) is not None), None)
    numbers = [] if beside is None else list_of(fields, beside, where)
    for i, value in enumerate(values):
        place, name = f"{where}, answer {i + 1} of {key}", beside
        number = numbers[i] if i < len(numbers) else None
        if isinstance(value, dict):
            name = next((k for k in SCORES if value.get(k) is not None), beside)
            number = value.get(name, number)
            value = next((value[k] for k in ANSWER_TEXTS if value.get(k) is not None), value)
        score = math.nan if name is None else number_of(number)
        if not math.isfinite(score):
            raise UserError(f"{place}, has no score. Expected one of {', '.join(SCORES)} with a number.")
        answers.append(as_messages(value, "answer", "assistant", place))
        scores.append(-score if "rank" in str(name) else score)
    if not answers:
        raise UserError(f"{where}, has no answers in {key}.")
    before = as_context(prompt_messages(fields, where) or [])
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    return [(scores[i], before + answers[i]) for i in order]


def number_of(value: Any) -> float:
    """A number, also as text. NaN for other values."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_label(fields: Fields, where: str) -> Optional[Messages]:
    messages, is_good = labeled(fields, where)
    return messages if is_good else None


def labeled(fields: Fields, where: str) -> tuple[Messages, bool]:
    """A conversation, and whether its answer is a good one."""
    key = "label" if fields.get("label") is not None else "kto_tag"
    label = fields.get(key)
    if isinstance(label, str):  # from CSV
        label = LABELS.get(label.strip().lower(), label)
    if label not in (0, 1):
        raise UserError(f"{where}, has {key} {shown(label)}. Expected true (a good answer) or false.")
    if has_messages(fields):
        messages = up_to_answer(read_messages(fields, where), where)
        return as_context(messages[:-1]) + messages[-1:], bool(label)
    own = next(k for k in SINGLE_ANSWERS if k in fields)
    before = prompt_messages(fields, where)
    if before is None:
        raise missing(fields, "prompt", where)
    return as_context(before) + answer(fields, own, where), bool(label)


def read_text(fields: Fields, where: str) -> str:
    check_text(fields["text"], "text", where, at_most=None)
    return fields["text"]


PROMPTS = ("prompt", "messages", "conversations", "instruction", "question", "history")  # beside answers
ANSWERS = ("responses", "completions", "candidates", "answers")  # several, with scores
SCORES = ("score", "scores", "overall_score", "reward", "rewards", "rating", "ratings", "rank", "ranks")
ANSWER_TEXTS = ("answer", "response", "completion", "text", "content")  # of an answer with a score
SINGLE_ANSWERS = ("completion", "output", "response", "answer")  # beside a label
SURELY_LABELED = {"messages", "conversations", "completion", "kto_tag"}  # keys beside which a label is one of KTO
LABELS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
FORMS: dict[str, Form] = {  # a row has the first form that matches
    "preference": Form(("chosen", "rejected"), read_preference, PROMPTS),
    "label": Form(("|".join(("messages|conversations", *SINGLE_ANSWERS)), "label|kto_tag"), read_label, PROMPTS),
    "messages": Form(("messages",), read_messages),
    "sharegpt": Form(("conversations",), read_messages),
    "history": Form(("instruction", "output|response", "history"), read_history),
    "alpaca": Form(("instruction", "output|response"), read_alpaca),
    "prompt_completion": Form(("prompt", "completion"), read_prompt_completion),
    "question_answer": Form(("question", "answer"), pair("question", "answer")),
    "ranked": Form(("|".join(ANSWERS), "|".join(PROMPTS[:-1])), read_ranked, (*SCORES, "history")),
    "text": Form(("text",), read_text),
}
KEYS = list(dict.fromkeys(k for form in FORMS.values() for key in form.keys for k in key.split("|")))
KEYS += [*SCORES, *SHARED]


def conversation(messages: Messages, fields: Fields, where: str) -> Row:
    """The messages up to the last answer, with the shared keys of the row.

    Reasoning belongs to the last answer, unless that contains it already.
    """
    n_messages = len(messages)
    messages = up_to_answer(messages, where)
    goes_on = len(messages) < n_messages
    if not fields.keys().isdisjoint(REASONING):
        texts = {key: fields[key] for key in REASONING if isinstance(fields.get(key), str)}
        thoughts = {key: text for key, text in texts.items() if text.strip() not in messages[-1]["content"]}
        check_texts(thoughts, "reasoning", where)
        if not any(messages[-1].get(key) for key in REASONING):
            messages[-1] |= thoughts
    return Row(*with_shared(messages, fields, where), variables=variables_of(fields, where), goes_on=goes_on)


def variables_of(fields: Fields, where: str) -> Optional[dict[str, Any]]:
    """What a row passes to the chat template, also as JSON text."""
    value = parsed(fields.get(VARIABLES))
    if value in (None, "", {}):
        return None
    if not isinstance(value, dict):
        raise UserError(f"{where}, has {VARIABLES} {shown(value)}, which is {kind(value)}, not an object.")
    check_texts(value, VARIABLES, where)
    return value


def with_shared(messages: Messages, fields: Fields, where: str) -> tuple[Messages, Optional[list[Any]]]:
    """The messages with the `system`, `input`, and `context` of a row, and the row's tools.

    `input` and `context` belong to the last prompt. In a conversation they belong to the first one, unless a prompt
    contains their text already.
    """
    prompts = [m for m in messages if m["role"] == "user"]
    has_text = any(fields.get(key) is not None for key in ("prompt", "instruction", "question"))
    in_prompts = "" if has_text and not has_messages(fields) else "\n".join(m["content"] for m in prompts)
    beside = [key for key in ("input", "context") if fields.get(key) is not None]
    extra = [text for key in beside if (text := text_of(fields, key, where)).strip() and text.strip() not in in_prompts]
    if extra:
        if not prompts:
            raise UserError(f"{where}, has input or context, but no user message that it could belong to.")
        prompts[0 if has_messages(fields) else -1]["input"] = "\n\n".join(extra)
    if fields.get("system"):
        system = text_of(fields, "system", where)
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"] != system:
            raise UserError(f"{where}, has system and a different system message. Remove one of them.")
    tools = [parsed(tool) for tool in list_of(fields, "tools", where)]
    check_texts(tools, "tools", where)
    return messages, tools or None


def check_keys(fields: Fields, form: str, where: str) -> None:
    if lacking := FORMS[form].lacking(fields):
        raise missing(fields, " and ".join(lacking), where)
    check_media(fields, where)
