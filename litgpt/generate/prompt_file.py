"""A file of prompts, and the file of their answers: row for row, in the same order, and resumable."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from litgpt.data.forms import as_messages, check_object, key_names, with_shared
from litgpt.data.row_files import Rows, no_file, read_rows
from litgpt.errors import UserError
from litgpt.storage.files import whole_number

OURS = ("answer", "answers", "finish_reason", "finish_reasons", "error")  # what a row of answers has of us
PROMPTS = ("prompt", "instruction", "question")  # keys that a row's prompt may have
SKIP_ROW = re.compile(r", or skip such rows with --data\.on_bad_row skip")  # advice for training data


def open_prompts(path: Path) -> Rows:
    """The rows of a file of any kind that data sets may have. Raises `UserError` as `read_rows`."""
    if not path.is_file():
        raise no_file(path, "--prompts")
    return read_rows(path)


def to_messages(fields: Any, where: str, sys_prompt: Optional[str]) -> tuple[list[dict[str, Any]], Optional[list]]:
    """The messages of a row whose answer is wanted, and the tools that it offers.

    A row has `messages` (or `conversations`), of which what stands behind the last one that is not the assistant's is
    left out, or `prompt` (or `instruction`, or `question`) and maybe `input`, or `context`; and maybe `system`.

    Args:
        fields: The row, or the error of a row that could not be read.
        where: Where it stands; errors begin with it.
        sys_prompt: The system message of a row that has none.

    Raises:
        UserError: it is no such row.
    """
    if isinstance(fields, UserError):
        raise fields
    try:
        return read_messages(fields, where, sys_prompt)
    except UserError as e:
        raise UserError(SKIP_ROW.sub("", str(e))) from e


def read_messages(fields: Any, where: str, sys_prompt: Optional[str]) -> tuple[list[dict[str, Any]], Optional[list]]:
    check_object(fields, where, "prompt or messages")
    present = [key for key, value in fields.items() if value is not None]
    key = next((k for k in ("messages", "conversations", *PROMPTS) if k in present), None)
    if key is None:
        raise UserError(f"{where}, has no prompt, messages, instruction or question; it has {key_names(fields)}.")
    messages = as_messages(fields[key], key, "user", where)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or all(m["role"] == "system" for m in messages):
        raise UserError(f"{where}, has no message of the user in {key}.")
    if sys_prompt and not fields.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": sys_prompt}, *messages]
    return with_shared(messages, fields, where)


def kept(fields: Any) -> dict[str, Any]:
    """The fields of a row as its answer has them: all, those with a name of ours under `given_` and that name."""
    if not isinstance(fields, dict):
        return {}
    return {f"given_{key}" if key in OURS else str(key): value for key, value in fields.items()}


def to_line(fields: dict[str, Any]) -> str:
    line = json.dumps(fields, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        line = json.dumps(fields, default=str)
    return line + "\n"


def already_answered(out: Path, prompts: Path, num_samples: int) -> int:
    """How many rows of the prompts an earlier run has answered. A last line that was torn is cut off.

    Raises:
        UserError: what is in `out` are not answers to these prompts, or not so many to each.
    """
    if not out.exists():
        return 0
    if not out.is_file():
        raise UserError(f"--out {out} is no file.")
    rows, n, end = open_prompts(prompts), 0, 0
    for line in whole_lines(out):
        n, end = n + 1, end + len(line)
        row, saved = next(rows, None), read_answers(line)
        if row is None or saved is None or not answers_to(saved, row[1]):
            raise UserError(
                f"--out {out} has a line {n} that is no answer to row {n} of {prompts}: it is of other prompts. "
                "Remove it, or choose another name."
            )
        had = len(saved["answers"]) if isinstance(saved.get("answers"), list) else 1
        if "error" not in saved and had != num_samples:
            raise UserError(
                f"--num_samples {num_samples}: --out {out} has {had} to a prompt, of an earlier run. Remove it, or "
                "choose another name."
            )
    if end < out.stat().st_size:
        with open(out, "rb") as f:
            f.seek(end)
            torn = f.read()
        row = next(rows, None)
        begin = to_line(kept(row[1])).rstrip("}\n").encode() if row is not None else b""
        if row is None or not (torn.startswith(begin) or begin.startswith(torn)):
            raise UserError(
                f"--out {out} ends with something that is not an answer to row {n + 1} of {prompts}. Remove it, or "
                "choose another name."
            )
        os.truncate(out, end)
    return n


def whole_lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as f:
        for line in f:
            if line.endswith(b"\n"):
                yield line


def read_answers(line: bytes) -> Optional[dict[str, Any]]:
    """A row of answers, or None for a line that is none."""
    try:
        saved = json.loads(line, parse_constant=str, parse_int=whole_number)
    except (ValueError, RecursionError):
        return None
    return saved if isinstance(saved, dict) and not saved.keys().isdisjoint(OURS) else None


def answers_to(saved: dict[str, Any], fields: Any) -> bool:
    wanted = json.loads(to_line(kept(fields)), parse_constant=str)
    return {**saved, **wanted} == saved
