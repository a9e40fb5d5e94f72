"""`litgpt generate --prompts FILE`: answer the prompts of a file."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litgpt.errors import UserError
from litgpt.generate.answer_format import answer_format
from litgpt.generate.answers import Answer, decode
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel, PromptOptions
from litgpt.generate.prompt_file import Prompts, n_answered, output_fields
from litgpt.generate.sampling import Sampling
from litgpt.train.faults import is_out_of_memory
from litgpt.train.progress import SECONDS

N_REPORTED = 10  # broken rows that are reported one by one


@dataclass(eq=False)
class PendingRow:
    """A row of the file that is not written yet."""

    fields: dict[str, Any]  # of its record, without the answers
    n_answers: int  # how many it gets: none if the row is broken
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.answers) == self.n_answers

    def record(self) -> dict[str, Any]:
        answers = [self.answers[i] for i in sorted(self.answers)]
        texts, reasons = [a.stream.text for a in answers], [a.finish for a in answers]
        if self.n_answers == 1:
            return {**self.fields, "answer": texts[0], "finish_reason": reasons[0]}
        return {**self.fields, **({"answers": texts, "finish_reasons": reasons} if texts else {})}


class PromptFile:
    """The prompts of a file, and the answers that are written for them to `out`, or to stdout. Raises `UserError` if
    the prompts cannot be read, or `out` holds answers to others."""

    def __init__(self, prompts: Prompts, out: Optional[Path], options: PromptOptions) -> None:
        self.prompts, self.out, self.options = prompts, out, options
        columns, self.total = dict[str, None](), 0
        for _, fields in prompts.rows():
            self.total += 1
            columns |= dict.fromkeys(output_fields(fields))
        self.format = answer_format(out, list(columns), options.num_samples > 1)
        files = [source.path for source in prompts.sources if Path(source.path).exists()]
        if out is not None and out.exists() and any(os.path.samefile(out, file) for file in files):
            raise UserError(f"--out {out} is the file of the prompts itself. Choose another name.")
        self.n_done, self.n_answered = 0, 0  # rows that are written, and those of them with an answer
        if out is not None:
            self.n_done, self.n_answered = n_answered(out, self.format, prompts, options.num_samples)
        if 0 < self.n_done < self.total:
            print(f"Continuing {out}, which has {self.n_done:,} of {self.total:,} answers.", file=sys.stderr)
        self.n_broken, self.n_tokens = 0, 0
        self.n_truncated, self.n_context_full = 0, 0
        self.pending: deque[PendingRow] = deque()  # a few rows more than are decoded at once

    def answer(self, model: InferenceModel, engine: Engine, sampling: Sampling) -> int:
        """Answer the remaining prompts. Returns the number of generated tokens."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            output: AbstractContextManager[IO[str]] = open(self.out, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        else:
            output = nullcontext(sys.stdout)
        requests, stop = self.requests(model, sampling), self.options.stop_strings
        with output as file, progress(self.total, self.n_done) as show_progress:
            if self.out and file.tell() == 0:
                file.write(self.format.header)
            try:
                for answer, _ in decode(engine, model.tokenizer, requests, stop):
                    if answer.finish:
                        row, number = answer.request.tag
                        row.answers[number] = answer
                        self.count(answer)
                        self.write(file)
                        show_progress(self.n_done, self.n_tokens)
            except KeyboardInterrupt:
                if self.out:
                    print(f"Stopped: {self.state}. To continue, run the same command again.", file=sys.stderr)
                raise
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                remedy = "Set a smaller --batch_size or a lower --max_new_tokens, and run the command again."
                raise UserError(f"Out of memory: {self.state}. {remedy}") from e
            self.write(file)
            show_progress(self.n_done, self.n_tokens)
        for line in self.summary(model.model.config.block_size):
            print(line, file=sys.stderr)
        return self.n_tokens

    @property
    def state(self) -> str:
        return f"{self.out or 'stdout'} has {self.n_done:,} of {self.total:,} answers"

    def count(self, answer: Answer) -> None:
        self.n_tokens += len(answer.request.ids)
        self.n_context_full += answer.context_full
        self.n_truncated += answer.finish == "length" and not answer.context_full

    def summary(self, context: int) -> Iterator[str]:
        """What was not answered, or not completely."""
        if self.n_truncated:
            yield f"{plural(self.n_truncated, 'answer')} truncated at --max_new_tokens {self.options.max_new_tokens}."
        if self.n_context_full:
            yield f"{plural(self.n_context_full, 'answer')} ended by a full context ({context:,} tokens)."
        if self.n_broken:
            where = f"in {self.out}" if self.out else "on stdout"
            yield f"{self.n_broken:,} of {self.total:,} rows have no answer. See the error fields {where}."

    def requests(self, model: InferenceModel, sampling: Sampling) -> Iterator[Request]:
        """The requests of the remaining rows, each tagged with its row and its number in it."""
        options, n_before = self.options, self.n_done
        for number, (where, fields) in enumerate(self.prompts.rows()):
            if number < n_before:
                continue
            try:
                ids = self.render(model, where, *self.prompts.messages(fields, where, options.sys_prompt))
            except UserError as e:
                self.n_broken += 1
                if self.n_broken <= N_REPORTED:
                    print(e, file=sys.stderr)
                self.pending.append(PendingRow({**output_fields(fields), "error": str(e)}, 0))
                continue
            row = PendingRow(output_fields(fields), options.num_samples)
            self.pending.append(row)
            for i, request in enumerate(options.requests(ids, sampling, model.stop_ids, number)):
                request.tag = row, i
                yield request

    @staticmethod
    def render(
        model: InferenceModel,
        where: str,
        messages: list[dict[str, Any]],
        tools: Optional[list],
        variables: Optional[dict[str, Any]],
    ) -> list[int]:
        try:
            _, ids = model.render(messages, tools, variables=variables)
            Request(ids, 1).check(model.model)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        return ids

    def write(self, file: IO[str]) -> None:
        while self.pending and self.pending[0].complete:
            row = self.pending.popleft()
            file.write(self.format.record(row.record()))
            self.n_done += 1
            self.n_answered += row.n_answers > 0
        file.flush()


def plural(n: int, noun: str) -> str:
    """A number with a noun and its verb: `1 answer was`, `2 answers were`."""
    return f"{n:,} {noun}{'s were' if n > 1 else ' was'}"


@contextmanager
def progress(total: int, n_before: int) -> Iterator[Callable[[int, int], None]]:
    """Show the number of answers on stderr: as a bar on a terminal, elsewhere as a line every few seconds."""
    console = Console(stderr=True)
    began = last = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=n_before)

        def show(n_done: int, n_tokens: int) -> None:
            nonlocal last
            now = time.perf_counter()
            speed = f"{n_tokens / (now - began):,.0f} tokens/s"
            bar.update(task, completed=n_done, description=speed)
            if not console.is_terminal and now - last >= SECONDS:
                left = (now - began) / max(n_done - n_before, 1) * (total - n_done)
                print(f"{n_done:,} of {total:,} answers, {speed}, {left:,.0f} s left", file=sys.stderr, flush=True)
                last = now

        yield show
