"""A file of prompts, and the file of their answers: row by row, in the same order, and resumable."""

import os
import re
from pathlib import Path
from typing import Any, Optional

from litgpt.data.columns import as_option, same_names, usual_columns
from litgpt.data.forms import SHARED, rename, variables_of, with_shared
from litgpt.data.json_file import Entries, entries_of, expand
from litgpt.data.messages import as_messages, check_object, key_names
from litgpt.data.row_files import Rows
from litgpt.errors import UserError, remark
from litgpt.generate.answer_format import OUTPUT_KEYS, AnswerFormat

CONVERSATIONS = ("messages", "conversations")
PROMPT_KEYS = ("prompt", "instruction", "question")
TRAINING_HINT = re.compile(r" [^.]*--data\.on_bad_row skip[^.]*\.$")  # the last sentence of errors in training data


class Prompts:
    """Rows to answer, from files of any kind that data sets may have.

    Args:
        entries: A file, a pattern, a folder, a data set on the hub, or a list of these, each alone or as a mapping with
            options, as for `--data`.

    Raises:
        UserError: A file does not exist, or its options are not valid.
    """

    def __init__(self, entries: Entries) -> None:
        train, val = expand(entries_of(entries, "--prompts"), "--prompts")
        self.sources = [*train, *val]
        self.name = ", ".join(str(source.path) for source in self.sources)
        self.guessed: set[str] = set()  # the sources whose columns were recognized by similar names

    def rows(self) -> Rows:
        """Position and value of each row. Raises `UserError` as `read_rows`."""
        for source in self.sources:
            yield from source.rows()

    def messages(
        self, fields: Any, where: str, sys_prompt: Optional[str]
    ) -> tuple[list[dict[str, Any]], Optional[list], Optional[dict[str, Any]]]:
        """As `to_messages`, with the columns of the row's file."""
        source = next(s for s in self.sources if where.startswith(f"{s.path}, "))
        if isinstance(fields, dict):
            fields = rename(fields, source.columns, where, strict=True) if source.columns else fields
            if guessed := prompt_columns(fields):
                fields = rename(fields, guessed, where)
                if str(source.path) not in self.guessed:
                    self.guessed.add(str(source.path))
                    option = as_option({**(source.columns or {}), **guessed}, source.path, "--prompts")
                    remark(f"{source.path}: columns recognized by similar names. To set them, pass {option}")
        return to_messages(fields, where, sys_prompt)


def prompt_columns(fields: Any) -> dict[str, str]:
    """Columns whose names are similar to those that a prompt has."""
    found = {k: v for k, v in same_names(fields).items() if k in (*CONVERSATIONS, *PROMPT_KEYS, *SHARED)}
    if any(fields.get(key) is not None for key in (*CONVERSATIONS, *PROMPT_KEYS)) or found.keys() - set(SHARED):
        return found
    usual = usual_columns(fields)
    if not usual or "text" in usual:  # a row to answer may have no answer yet
        usual = usual_columns({**fields, "answer": ""})
    return {("prompt" if ours == "instruction" else ours): theirs for ours, theirs in usual.items() if ours != "output"}


def to_messages(
    fields: Any, where: str, sys_prompt: Optional[str]
) -> tuple[list[dict[str, Any]], Optional[list], Optional[dict[str, Any]]]:
    """The messages of a row that is to be answered, the tools that it offers, and its variables of the chat template.

    A row has `messages` (or `conversations`), without the assistant's messages at the end; or `prompt` (or
    `instruction`, or `question`) with an optional `input` or `context`. It may have `system`.

    Args:
        fields: The row, or the error of a row that could not be read.
        where: Where it is. Errors begin with it.
        sys_prompt: The system message of a row that has none.

    Raises:
        UserError: the row has neither, or cannot be used.
    """
    if isinstance(fields, UserError):
        raise fields
    try:
        check_object(fields, where, "prompt or messages")
        present = [key for key, value in fields.items() if value is not None]
        key = next((k for k in (*CONVERSATIONS, *PROMPT_KEYS) if k in present), None)
        if key is None:
            names = key_names(fields)
            raise UserError(f"{where}, has no prompt, messages, instruction, or question. Found: {names}.")
        messages = as_messages(fields[key], key, "user", where)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or all(m["role"] == "system" for m in messages):
            raise UserError(f"{where}, has no user message in {key}.")
        if sys_prompt and not fields.get("system") and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": sys_prompt}, *messages]
        return *with_shared(messages, fields, where), variables_of(fields, where)
    except UserError as e:
        raise UserError(TRAINING_HINT.sub("", str(e))) from e


def output_fields(fields: Any) -> dict[str, Any]:
    """The fields of a row as its answer has them. Those that have one of our names get the prefix `given_`."""
    if not isinstance(fields, dict):
        return {}
    return {f"given_{key}" if key in OUTPUT_KEYS else str(key): value for key, value in fields.items()}


def n_answered(out: Path, format: AnswerFormat, prompts: Prompts, num_samples: int) -> tuple[int, int]:
    """How many rows of the prompts an earlier run has written, and how many of them have an answer. An incomplete last
    record is removed.

    Raises:
        UserError: `out` has something other than answers to these prompts, or another number to each.
    """
    remedy = "Remove the file, or choose another name."
    if not out.exists():
        return 0, 0
    if not out.is_file():
        raise UserError(f"--out {out} is not a file.")
    rows, n, n_errors, incomplete, end = prompts.rows(), 0, 0, b"", 0
    header = format.header.encode()
    with open(out, "rb") as f:
        records = format.records(f)
        first, complete = next(records, (b"", False)) if header else (b"", True)
        if not header.startswith(first) or (complete and first != header):
            columns = format.header.strip()
            raise UserError(f"--out {out} has other columns than these prompts and options give: {columns}. {remedy}")
        for record, complete in records:
            if not complete:
                incomplete = record
                break
            n, end = n + 1, end + len(record)
            row, saved = next(rows, None), format.parse(record)
            if row is None or saved is None or not format.same_row(saved, output_fields(row[1])):
                raise UserError(f"--out {out}: its answer {n} does not belong to row {n} of {prompts.name}. {remedy}")
            n_saved = len(saved["answers"]) if isinstance(saved.get("answers"), list) else 1
            n_errors += "error" in saved
            if "error" not in saved and n_saved != num_samples:
                was = f"an earlier run wrote --out {out} with --num_samples {n_saved}"
                raise UserError(f"--num_samples {num_samples}: {was}. {remedy}")
    if incomplete:
        row = next(rows, None)
        expected = format.beginning(output_fields(row[1])).encode() if row is not None else b""
        if row is None or not (incomplete.startswith(expected) or expected.startswith(incomplete)):
            raise UserError(f"--out {out}: its end does not belong to row {n + 1} of {prompts.name}. {remedy}")
    if incomplete or first != header:
        os.truncate(out, end + len(header) if first == header else 0)
    return n, n - n_errors
