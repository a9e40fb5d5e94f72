"""Which columns of a file litgpt reads, where their names differ from its own."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from litgpt.data.forms import FORMS, KEYS, SHARED, recognize, rename
from litgpt.errors import UserError

PROMPTS = "instruction question query prompt user human request problem userprompt usermessage".split()
ANSWERS = """output answer response completion assistant reply target solution chosenresponse assistantmessage
    gpt bot model""".split()
INPUTS = ("input", "inputtext")  # a prompt only if no other column is one
CONVERSATIONS = "messages conversations conversation dialog dialogue chat turns".split()
TEXTS = "text content document body story".split()


def match(fields: Any, where: str, form: str | None = None) -> tuple[str, dict[str, str]]:
    """The form of a row, and the columns to rename first, as litgpt's names to those of the file.

    Names match without regard to case and punctuation. If no form is found so, a column that is usually a prompt and
    one that is usually an answer make a pair, a list of messages is a conversation, and a single text is a document.

    Args:
        fields: The row, with its columns renamed as the user said.
        where: The position of the row. Errors start with it.
        form: The form, if the user said so.

    Raises:
        UserError: The row has no known form.
    """
    if not isinstance(fields, dict):
        return form or recognize(fields, where), {}
    same = same_names(fields)
    if form in FORMS:
        return form, {ours: theirs for ours, theirs in same.items() if ours in FORMS[form].used}
    try:
        found = recognize(fields, where)
        return found, {ours: theirs for ours, theirs in same.items() if ours in SHARED and ours in FORMS[found].used}
    except UserError:
        for columns in (same, usual_columns(fields)):
            if not columns:
                continue
            renamed = rename(fields, columns, where)
            try:
                found = recognize(renamed, where)
            except UserError:
                continue
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


def as_option(columns: Mapping[str, str], path: Any = None, flag: str = "--data") -> str:
    """A mapping as the flag that sets it, for all files or for the one at `path`."""
    value = dict(columns) if path is None else {"path": str(path), "columns": dict(columns)}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    text = json.dumps(value, ensure_ascii=False) if "'" in text else text.strip()  # which is YAML, too
    return f"{flag if path is not None else '--data.columns'} {shlex.quote(text)}"
