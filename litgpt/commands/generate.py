"""`litgpt generate`, and under other names `generate_full`, `generate_adapter`, `generate_adapter_v2` and
`generate_sequentially`"""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Optional, Union

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litgpt.errors import UserError
from litgpt.generate.answers import Answer, decode, in_order, stop_strings
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.prompt_file import already_answered, kept, open_prompts, to_line, to_messages
from litgpt.generate.sampling import Sampling
from litgpt.generate.sequentially import open_spread
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName, peak_memory
from litgpt.storage.outputs import exclusive
from litgpt.train.progress import SECONDS, gigabytes

LLAMAS = "What food do llamas eat?"


def main(
    checkpoint_dir: Path,
    prompt: str = LLAMAS,
    input: str = "",
    sys_prompt: Optional[str] = None,
    prompts: Optional[Path] = None,
    out: Optional[Path] = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Optional[Union[str, list[str]]] = None,
    batch_size: int = 16,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    compile: bool = False,
    accelerator: Accelerator = "auto",
    devices: Union[int, Literal["auto"]] = 1,
    base: Optional[Path] = None,
    seed: int = 1234,
    finetuned_path: Optional[Path] = None,
    adapter_path: Optional[Path] = None,
) -> None:
    """Continue a prompt, or answer a file of them. Answers go to stdout or to a file, figures to stderr.

    A prompt is rendered with the style that was saved at training, else with the checkpoint's chat template, else left
    as it is. A single one is shown as the model reads it.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        prompt: What to continue or to answer; - reads it from stdin, and so does a pipe where no prompt is given.
        input: What an instruction is about, as the input of Alpaca's rows; - reads it from stdin.
        sys_prompt: A system message before the prompt.
        prompts: A file of prompts instead of one (JSONL, JSON, CSV, TSV or Parquet), with prompt, messages, or
            instruction and input in each row. Broken rows are reported, and become rows with an error.
        out: The JSONL file for the answers to --prompts, row for row: the fields of the prompt, answer and
            finish_reason. Rows that it has already are not answered again. By default the rows go to stdout.
        num_samples: How many answers to each prompt; above 1 a file's rows have lists, answers and finish_reasons.
        max_new_tokens: The length of an answer, at most.
        top_k: Draw from so many of the most likely tokens; null for all.
        top_p: Draw from the most likely tokens whose probabilities sum up to this.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
        min_p: Draw from tokens that are at least this likely, as a share of the most likely one.
        repetition_penalty: Above 1 tokens that the text has already become less likely.
        stop: A text that ends the answer, or a JSON list of several; it is left out.
        batch_size: How many answers are decoded at once.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        quantize: Keep the weights of the blocks in 4 or 8 bits, by bitsandbytes.
        compile: Compile the blocks of the model: a slower start, and then faster steps.
        accelerator: The kind of device.
        devices: Spread the layers over so many devices, one after the other; auto for all.
        base: The base model of an adapter, instead of the recorded one.
        seed: The same seed draws the same answers.
        finetuned_path: Older recipes only: the finetuned folder is the checkpoint_dir now.
        adapter_path: Older recipes only: the adapter's folder is the checkpoint_dir now, and its model the base.
    """
    check_numbers(num_samples=num_samples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    words = stop_strings(stop)
    checkpoint_dir, base = older_paths(checkpoint_dir, base, finetuned_path, adapter_path)
    if prompts is None:
        if out is not None:
            raise UserError(f"--out {out} is for the answers to --prompts; a single answer goes to stdout.")
        prompt, input = from_stdin(prompt, input)
    elif input or prompt != LLAMAS:
        raise UserError("--prompts takes the place of --prompt and --input: give one of them.")
    with exclusive(out, "--out") if out is not None else nullcontext():
        file = PromptFile(prompts, out, num_samples) if prompts is not None else None
        if file is not None and file.n_done == file.total:
            print(f"{out} has all {file.total:,} answers.", file=sys.stderr)
            return
        loaded = open_spread(checkpoint_dir, base, precision, quantize, accelerator, devices).prepare(compile)

        def text(ids: list[int], number: int) -> Request:
            return Request(ids, max_new_tokens, sampling, loaded.stop_ids, seed + number)

        began = time.perf_counter()
        if file is not None:
            n_new = file.answer(loaded, Engine(loaded.model, batch_size), text, words, sys_prompt)
        else:
            messages = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
            rendered, ids = loaded.render([*messages, {"role": "user", "content": prompt, "input": input}])
            texts = [text(ids, i) for i in range(num_samples)]
            engine = Engine(loaded.model, min(num_samples, batch_size))
            n_new = show(
                in_order(decode(engine, loaded.tokenizer, texts, words)), rendered, loaded.model.config.block_size
            )
        seconds = time.perf_counter() - began
        memory = gigabytes(peak_memory(loaded.device))
        print(
            f"{n_new} tokens in {seconds:.2f} s, {n_new / seconds:.1f} tokens/s, peak memory {memory}", file=sys.stderr
        )


def with_100(checkpoint_dir: Path, max_new_tokens: int = 100, **kwargs: Any) -> None:
    """The same as `litgpt generate`, with LitGPT's default for the length of an answer.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        max_new_tokens: The length of an answer, at most.
    """
    main(checkpoint_dir, max_new_tokens=max_new_tokens, **kwargs)


def sequentially(checkpoint_dir: Path, devices: Union[int, Literal["auto"]] = "auto", **kwargs: Any) -> None:
    """The same as `litgpt generate`, with the layers of the model spread over all devices.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        devices: Spread the layers over so many devices, one after the other; auto for all.
    """
    main(checkpoint_dir, devices=devices, **kwargs)


def check_numbers(**numbers: int) -> None:
    wrong = [f"--{name} {value}" for name, value in numbers.items() if value < 1]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: a number above 0 is wanted.")


def older_paths(
    checkpoint_dir: Path, base: Optional[Path], finetuned_path: Optional[Path], adapter_path: Optional[Path]
) -> tuple[Path, Optional[Path]]:
    """The folder and the base model that LitGPT's options mean, with a word about the new spelling."""
    if finetuned_path is not None and adapter_path is not None:
        raise UserError("--finetuned_path and --adapter_path are two folders: give one of them.")
    given = finetuned_path or adapter_path
    if given is None:
        return checkpoint_dir, base
    folder = given.parent if given.is_file() else given
    if adapter_path is not None:
        base = base or checkpoint_dir
    option = "--finetuned_path" if adapter_path is None else "--adapter_path"
    new = f"litgpt generate {folder}" + (f" --base {base}" if base else "")
    print(f"litgpt: {option} is an older spelling of: {new}", file=sys.stderr)
    return folder, base


def from_stdin(prompt: str, input: str) -> tuple[str, str]:
    """Prompt and input, one of which may be on stdin: where it is `-`, and the prompt also where none was given and
    something was piped in.

    Raises:
        UserError: both are on stdin, or it has no text where it must have one.
    """
    if prompt == input == "-":
        raise UserError("--prompt - and --input - both read stdin. Give one of them as text.")
    if input == "-":
        return prompt, read_stdin("--input -", needed=True)
    if prompt == "-":
        return read_stdin("--prompt -", needed=True), input
    if prompt == LLAMAS and is_piped(sys.stdin):
        return read_stdin("--prompt", needed=False) or prompt, input
    return prompt, input


def read_stdin(option: str, needed: bool) -> str:
    """The text on stdin. Raises `UserError` where it has only whitespace, or nothing although it is needed."""
    text = sys.stdin.read()
    if not text and not needed:
        print("litgpt: stdin is empty, so the default prompt is used.", file=sys.stderr)
    elif not text.strip():
        has = "has only whitespace" if text else "is empty"
        raise UserError(f"{option}: stdin {has}. Pipe a text into the command, or give it as {option.split()[0]} TEXT.")
    return text.removesuffix("\n")


def is_piped(stream: Any) -> bool:
    """Whether a stream is a pipe or a file, not a terminal, and not the nothing that a job in the background has."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def show(pieces: Iterator[tuple[Answer, str]], rendered: str, context: int) -> int:
    """Print answers as they grow, each behind its prompt. Returns the number of tokens."""
    n_new, begun = 0, False
    for answer, piece in pieces:
        sys.stdout.write(piece if begun else rendered + piece)
        begun = answer.finish is None
        if answer.finish:
            sys.stdout.write("\n")
            n_new += len(answer.text.ids)
            if answer.finish == "length" and len(answer.text.ids) < answer.text.max_new_tokens:
                print(f"The answer ends where the model's context is full ({context} tokens).", file=sys.stderr)
        sys.stdout.flush()
    return n_new


# files of prompts


@dataclass(eq=False)
class Asked:
    """A row of the file until it is written.

    Args:
        fields: What its line has beside the answers.
        wanted: How many answers there will be.
    """

    fields: dict[str, Any]
    wanted: int
    answers: dict[int, Answer] = field(default_factory=dict)

    def line(self) -> str:
        texts = [answer.stream.text for _, answer in sorted(self.answers.items())]
        ends = [answer.finish for _, answer in sorted(self.answers.items())]
        if not texts:
            return to_line(self.fields)
        if self.wanted == 1:
            return to_line({**self.fields, "answer": texts[0], "finish_reason": ends[0]})
        return to_line({**self.fields, "answers": texts, "finish_reasons": ends})


class PromptFile:
    """The prompts of a file and the answers that are written for them.

    Args:
        prompts: The file.
        out: Where the answers go; None for stdout.
        num_samples: How many answers to each prompt.

    Raises:
        UserError: the prompts cannot be read at all, or the answers are those to others.
    """

    SHOWN = 10  # broken rows that are reported one by one

    def __init__(self, prompts: Path, out: Optional[Path], num_samples: int) -> None:
        self.prompts, self.out, self.num_samples = prompts, out, num_samples
        self.total = sum(1 for _ in open_prompts(prompts))
        if out is not None and out.exists() and os.path.samefile(out, prompts):
            raise UserError(f"--out {out} is the file of the prompts itself.")
        self.n_done = already_answered(out, prompts, num_samples) if out is not None else 0
        if 0 < self.n_done < self.total:
            print(f"{out} has {self.n_done:,} of {self.total:,} answers; the others follow.", file=sys.stderr)
        self.n_broken, self.n_tokens = 0, 0

    def answer(
        self,
        loaded: InferenceModel,
        engine: Engine,
        text: Callable[[list[int], int], Request],
        stop: list[str],
        sys_prompt: Optional[str],
    ) -> int:
        """Answer what is not answered yet. Returns the number of tokens."""
        waiting: deque[Asked] = deque()  # rows that were read and not written: a few more than are decoded

        def texts() -> Iterator[Request]:
            for number, (where, fields) in enumerate(open_prompts(self.prompts)):
                if number < self.n_done:
                    continue
                try:
                    messages, tools = to_messages(fields, where, sys_prompt)
                    ids = self.render(loaded, messages, tools, where)
                except UserError as e:
                    self.report(str(e))
                    waiting.append(Asked({**kept(fields), "error": str(e)}, 0))
                    continue
                asked = Asked(kept(fields), self.num_samples)
                waiting.append(asked)
                for i in range(self.num_samples):
                    new = text(ids, number * self.num_samples + i)
                    new.tag = asked, i
                    yield new

        with self.writer() as file, progress(self.total, self.n_done) as shown:
            n_written = self.n_done

            def write() -> None:
                nonlocal n_written
                while waiting and len(waiting[0].answers) == waiting[0].wanted:
                    file.write(waiting.popleft().line())
                    n_written += 1
                file.flush()
                shown(n_written, self.n_tokens)

            try:
                for answer, _ in decode(engine, loaded.tokenizer, texts(), stop):
                    if answer.finish:
                        asked, i = answer.text.tag
                        asked.answers[i] = answer
                        self.n_tokens += len(answer.text.ids)
                        write()
            except KeyboardInterrupt:
                if self.out:
                    done = f"{self.out} has {n_written:,} of {self.total:,} answers"
                    print(f"Stopped: {done}; the same command goes on.", file=sys.stderr)
                raise
            write()
        if self.n_broken:
            place = f"{self.out}: see error there" if self.out else "stdout: see error there"
            print(f"{self.n_broken:,} of {self.total:,} rows have no answer in {place}.", file=sys.stderr)
        return self.n_tokens

    @staticmethod
    def render(loaded: InferenceModel, messages: list[dict[str, Any]], tools: Optional[list], where: str) -> list[int]:
        try:
            _, ids = loaded.render(messages, tools)
            Request(ids, 1).check(loaded.model)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        return ids

    def report(self, problem: str) -> None:
        self.n_broken += 1
        if self.n_broken <= self.SHOWN:
            print(problem, file=sys.stderr)

    def writer(self) -> AbstractContextManager[IO[str]]:
        if self.out is None:
            return nullcontext(sys.stdout)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return open(self.out, "a", encoding="utf-8", newline="\n")


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Show how many answers there are, on stderr: a bar on a terminal, elsewhere a line every few seconds."""
    console, began, then, first = Console(stderr=True), time.perf_counter(), time.perf_counter(), done
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(done: int, tokens: int) -> None:
            nonlocal then
            now = time.perf_counter()
            speed = f"{tokens / (now - began):,.0f} tokens/s"
            bar.update(task, completed=done, description=speed)
            if not console.is_terminal and now - then >= SECONDS:
                left = (now - began) / max(done - first, 1) * (total - done)
                print(f"{done:,} of {total:,} answers, {speed}, {left:,.0f} s left", file=sys.stderr, flush=True)
                then = now

        yield show
