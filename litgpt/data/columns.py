"""Which columns of a file litgpt reads, where their names differ from its own."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from litgpt.data.forms import FORMS, KEYS, SHARED, recognize, rename
from litgpt.data.forms import PROMPTS as PROMPT_KEYS
from litgpt.errors import UserError

PROMPTS = "instruction question query prompt user human request problem userprompt usermessage".split()
ANSWERS = """output answer response completion assistant reply target solution chosenresponse assistantmessage
    gpt bot model""".split()
INPUTS = ("input", "inputtext")  # a prompt only if no other column is one
CONVERSATIONS = "messages conversations conversation dialog dialogue chat turns".split()
TEXTS = "text content document body story".split()
PREFERRED = {  # words for a better answer, and those for a worse one beside it
    "chosen": ("rejected",),
    "accepted": ("rejected",),
    "preferred": ("dispreferred", "nonpreferred", "rejected"),
    "winner": ("loser",),
    "winning": ("losing",),
    "good": ("bad",),
    "better": ("worse",),
}
NOUNS = "answer response completion output reply message messages text".split()  # before or after such a word


def match(fields: Any, where: str, form: str | None = None, labels: bool = False) -> tuple[str, dict[str, str]]:
    """The form of a row, and the columns to rename first, as litgpt's names to those of the file.

    Names match without regard to case and punctuation. If no form is found so, a column that is usually a prompt and
    one that is usually an answer make a pair, a list of messages is a conversation, and a single text is a document.

    Args:
        fields: The row, with its columns renamed as the user said.
        where: The position of the row. Errors start with it.
        form: The form, if the user said so.
        labels: As for `recognize`.

    Raises:
        UserError: The row has no known form.
    """
    if not isinstance(fields, dict):
        return form or recognize(fields, where, labels), {}
    same = same_names(fields)
    if form in FORMS:
        return form, {ours: theirs for ours, theirs in same.items() if ours in FORMS[form].used}
    named = {ours: theirs for ours, theirs in same.items() if labels and ours in ("label", "kto_tag")}
    try:
        found = recognize(rename(fields, named, where), where, labels)
        shared = {ours: theirs for ours, theirs in same.items() if ours in SHARED}
        also = {**named, **prompt_column(fields, found), **shared}
        return found, {ours: theirs for ours, theirs in also.items() if ours in FORMS[found].used}
    except UserError:
        for columns in (same, pair_columns(fields), usual_columns(fields)):
            if not columns:
                continue
            columns = {**named, **columns}
            renamed = rename(fields, columns, where)
            try:
                found = recognize(renamed, where, labels)
            except UserError:
                continue
            columns |= prompt_column(renamed, found)
            return found, {ours: theirs for ours, theirs in columns.items() if ours in FORMS[found].used}
        raise


def letters(name: Any) -> str:
    """A name without case and punctuation."""
    return "".join(c for c in str(name).casefold() if c.isalnum())


def same_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Columns whose names are those of litgpt but for case and punctuation."""
    known = {letters(key): key for key in KEYS}
    found: dict[str, list[str]] = {}
    for name, value in fields.items():
        ours = known.get(letters(name))
        if ours is not None and fields.get(ours) is None and value is not None:
            found.setdefault(ours, []).append(name)
    return {ours: names[0] for ours, names in found.items() if len(names) == 1}


def usual_columns(fields: Mapping[str, Any]) -> dict[str, str]:
    """The columns that are usually a prompt and its answer, a conversation, or a text; empty if that is not clear."""
    names = {name: letters(name) for name, value in fields.items() if value is not None}
    texts = [name for name in names if isinstance(fields[name], str)]
    lists = [name for name in names if isinstance(fields[name], list) and names[name] in CONVERSATIONS]
    prompts = [name for name in texts if names[name] in PROMPTS]
    prompts = prompts or [name for name in texts if names[name] in INPUTS]
    answers = [name for name in texts if names[name] in ANSWERS]
    documents = [name for name in texts if names[name] in TEXTS]
    shared = {ours: theirs for ours, theirs in same_names(fields).items() if ours in SHARED and theirs not in prompts}
    if len(prompts) == len(answers) == 1:
        return {"instruction": prompts[0], "output": answers[0], **shared}
    if not prompts and not answers and len(lists) == 1:
        return {"messages": lists[0], **shared}
    if not prompts and not answers and not lists and len(documents) == 1:
        return {"text": documents[0]}
    return {}


def pair_columns(fields: Mapping[str, Any]) -> dict[str, str]:
    """The columns that are usually a better and a worse answer, with those of litgpt's names; empty if that is not
    clear."""
    pairs = []
    names = {letters(name): name for name, value in fields.items() if value is not None}
    for good, bad in ((good, bad) for good, words in PREFERRED.items() for bad in words):
        for before, after in (("", ""), *((noun, "") for noun in NOUNS), *(("", noun) for noun in NOUNS)):
            found = [names[name] for word in (good, bad) if (name := f"{before}{word}{after}") in names]
            pairs += [found] if len(found) == 2 else []
    if len(pairs) != 1:
        return {}
    chosen, rejected = pairs[0]
    columns = {ours: theirs for ours, theirs in {"chosen": chosen, "rejected": rejected}.items() if ours != theirs}
    return {**same_names(fields), **columns}


def prompt_column(fields: Mapping[str, Any], form: str) -> dict[str, str]:
    """The column that is usually a prompt, for answers whose row has no other prompt; empty if that is not clear."""
    has_prompt = any(fields.get(key) is not None for key in PROMPT_KEYS)
    if form not in ("preference", "label", "ranked") or has_prompt or isinstance(fields.get("chosen"), (list, dict)):
        return {}
    names = [name for name, value in fields.items() if isinstance(value, str)]
    found = [n for n in names if letters(n) in PROMPTS] or [n for n in names if letters(n) in INPUTS]
    return {"prompt": found[0]} if len(found) == 1 else {}


def as_option(columns: Mapping[str, str], path: Any = None, flag: str = "--data") -> str:
    """A mapping as the flag that sets it, for all files or for the one at `path`."""
    value = dict(columns) if path is None else {"path": str(path), "columns": dict(columns)}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    text = json.dumps(value, ensure_ascii=False) if "'" in text else text.strip()  # which is YAML, too
    return f"{flag if path is not None else '--data.columns'} {shlex.quote(text)}"
