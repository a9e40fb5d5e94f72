"""`litgpt generate`, and its other ways to decode: `generate_sequentially`, `generate_speculatively`, `generate_tp`.

`generate_full`, `generate_adapter` and `generate_adapter_v2` are LitGPT's names for the same command.
"""

import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import distributed

from litgpt.checkpoint.find import find_folder
from litgpt.cli.groups import option_group
from litgpt.cli.legacy import result_folder
from litgpt.commands.answer_file import PromptFile
from litgpt.data.json_file import Entries
from litgpt.errors import UserError
from litgpt.generate.answers import Answer, decode, in_order
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import (
    DEFAULT_PROMPT,
    InferenceModel,
    ModelOptions,
    PromptOptions,
    check_positive,
    natural_precision,
)
from litgpt.generate.prompt_file import Prompts
from litgpt.generate.sampling import Sampling
from litgpt.generate.several_devices import check_divisible, load_part, usable_devices
from litgpt.generate.speculative import Speculation, check_same_tokens
from litgpt.methods.adapter_folder import is_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.blocks import check_compiler
from litgpt.model.devices import DTYPES, peak_memory, pick_device
from litgpt.model.gpt import GPT
from litgpt.storage.outputs import exclusive
from litgpt.train.progress import gigabytes

MAX_BATCH = 16  # answers that are decoded at once by default


@option_group("options", PromptOptions)
@option_group("sampling", Sampling)
@option_group("model", ModelOptions)
def main(
    checkpoint_dir: Path,
    options: PromptOptions,
    sampling: Sampling,
    model: ModelOptions,
    prompts: Optional[Entries] = None,
    out: Optional[Path] = None,
    batch_size: int = MAX_BATCH,
    finetuned_path: Optional[Path] = None,
    adapter_path: Optional[Path] = None,
) -> None:
    """Continue a prompt, or answer a file of prompts. Answers go to stdout or to a file, everything else to stderr.

    A prompt is rendered with the style that was saved at training, else with the checkpoint's chat template, else it is
    not changed. A single prompt is shown as the model reads it: on a terminal before the answer, else on stderr. The
    exit code is 1 if no row of a file could be answered.

    Args:
        checkpoint_dir: Model folder or adapter folder, or the name of one under checkpoints/.
        prompts: File of prompts (JSONL, JSON, CSV, TSV, or Parquet) whose rows have prompt, messages, or instruction
            and input; also a pattern, a folder, hf:ORG/NAME, or a list, each alone or with options as for --data.
            Replaces --prompt. Broken rows are reported, and get an error instead of an answer.
        out: File for the answers to --prompts, row by row: .csv and .tsv for a table, .jsonl or .json for a JSON
            object per line. A row has the fields of the prompt, answer, and finish_reason (answers and finish_reasons
            if --num_samples is above 1). Rows that the file already has are not answered again. By default the rows
            go to stdout as JSONL.
        batch_size: Number of answers to decode at once.
        finetuned_path: Legacy option. Give the finetuned folder as the checkpoint_dir.
        adapter_path: Legacy option. Give the adapter's folder as the checkpoint_dir, and its model as --base.
    """
    check_positive(batch_size=batch_size)
    checkpoint_dir, base = legacy_paths(checkpoint_dir, model.base, finetuned_path, adapter_path)
    model = replace(model, base=base)
    if prompts is not None:
        if options.input or options.prompt != DEFAULT_PROMPT:
            raise UserError("--prompts replaces --prompt and --input. Give only one of them.")
    elif out is not None:
        raise UserError(f"--out {out} is for the answers to --prompts. A single answer goes to stdout.")
    else:
        options = read_stdin_options(options)
    with exclusive(out, "--out") if out is not None else nullcontext():
        file = PromptFile(Prompts(prompts), out, options) if prompts is not None else None
        if file is not None and file.n_done == file.total:
            print(f"{out} already has all {file.total:,} answers.", file=sys.stderr)
        else:
            loaded = model.open(checkpoint_dir).prepare(model.compile)
            began = time.perf_counter()
            if file is not None:
                n_new = file.answer(loaded, Engine(loaded.model, batch_size), sampling)
            else:
                rendered, ids = options.render(loaded)
                n_new = print_answers(engine_answers(loaded, options, sampling, ids, batch_size), rendered, loaded)
            print_metrics(n_new, began, loaded.device)
        if file is not None and not file.n_answered:
            sys.exit(1)


def adapter(checkpoint_dir: Path, adapter_path: Optional[Path] = None, **kwargs: Any) -> None:
    """The same as `litgpt generate`.

    Args:
        checkpoint_dir: Adapter folder, or the name of one under checkpoints/. For a model folder, the adapter is
            in adapter_path.
        adapter_path: Folder of the adapter, if checkpoint_dir is its model. Default: out/finetune/adapter/final.
    """
    adapter_path = adapter_path or default_adapter(checkpoint_dir, Path("out/finetune/adapter/final"))
    main(checkpoint_dir, adapter_path=adapter_path, **kwargs)


def adapter_v2(checkpoint_dir: Path, adapter_path: Optional[Path] = None, **kwargs: Any) -> None:
    """The same as `litgpt generate`.

    Args:
        checkpoint_dir: Adapter folder, or the name of one under checkpoints/. For a model folder, the adapter is
            in adapter_path.
        adapter_path: Folder of the adapter, if checkpoint_dir is its model. Default: out/finetune/adapter-v2/final.
    """
    adapter_path = adapter_path or default_adapter(checkpoint_dir, Path("out/finetune/adapter-v2/final"))
    main(checkpoint_dir, adapter_path=adapter_path, **kwargs)


def sequentially(checkpoint_dir: Path, devices: Union[int, Literal["auto"]] = "auto", **kwargs: Any) -> None:
    """The same as `litgpt generate`, with the layers of the model spread over all devices.

    Args:
        checkpoint_dir: Model folder or adapter folder, or the name of one under checkpoints/.
        devices: Number of devices to spread the layers over, one after the other; auto for all.
    """
    main(checkpoint_dir, devices=devices, **kwargs)


@option_group("options", PromptOptions)
@option_group("sampling", Sampling)
@option_group("model", ModelOptions, skip=("devices", "base"))
def speculatively(
    draft_model_checkpoint_dir: Path,
    target_model_checkpoint_dir: Path,
    options: PromptOptions,
    sampling: Sampling,
    model: ModelOptions,
    speculative_k: int = 3,
) -> None:
    """Continue a prompt with a large model, for which a small model with the same tokenizer drafts tokens.

    The text is the large model's: identical at temperature 0, else drawn from the same distribution. The answers go to
    stdout, everything else to stderr.

    Args:
        draft_model_checkpoint_dir: Small model: a model folder or an adapter folder, or the name of one.
        target_model_checkpoint_dir: Large model. Its prompt style and tokenizer are used.
        speculative_k: Number of tokens to draft at a time.
    """
    check_positive(speculative_k=speculative_k)
    options = read_stdin_options(options)
    draft = replace(model, template_kwargs=None).open(draft_model_checkpoint_dir)
    target = model.open(target_model_checkpoint_dir)
    check_same_tokens(target.tokenizer, draft.tokenizer)
    draft.prepare(model.compile)
    target.prepare(model.compile)  # last, since it sets the number of threads
    rendered, ids = options.render(target)
    requests = options.requests(ids, sampling, target.stop_ids)
    speculation = Speculation(target.model, draft.model, speculative_k)
    began = time.perf_counter()
    answers = decode(speculation, target.tokenizer, requests, options.stop_strings)
    n_new = print_answers(answers, rendered, target)
    share = speculation.n_accepted / max(speculation.n_drafted, 1)
    print_metrics(n_new, began, target.device, f"{share:.0%} of {speculation.n_drafted} drafted tokens accepted")


# tensor parallelism


@dataclass
class TensorParallelJob:
    """What the command tells each of its processes."""

    folder: Path
    model: ModelOptions
    device_type: str
    options: PromptOptions
    sampling: Sampling
    rendered: str
    ids: list[int]
    rendezvous: str  # a file through which the processes find each other
    world_size: int


@option_group("options", PromptOptions)
@option_group("sampling", Sampling)
@option_group("model", ModelOptions, defaults={"devices": "auto"}, skip=("base",))
def tensor_parallel(checkpoint_dir: Path, options: PromptOptions, sampling: Sampling, model: ModelOptions) -> None:
    """Continue a prompt with a model whose layers are split over several devices, with a process for each device.

    The answers go to stdout, everything else to stderr.

    Args:
        checkpoint_dir: Model folder, or the name of one under checkpoints/. Merge an adapter first.
        quantize: Not supported: quantized layers cannot be split.
        devices: Number of devices, on a CPU of processes. Must divide the number of the model's heads; auto for all.
    """
    if model.quantize is not None:
        raise UserError(f"--quantize {model.quantize}: quantized layers cannot be split. Use litgpt generate.")
    device = pick_device(model.accelerator)
    if device.type == "cpu" and model.devices != "auto":
        check_positive(devices=model.devices)
        world_size = int(model.devices)
    else:
        world_size = len(usable_devices(model.accelerator, model.devices))
    options = read_stdin_options(options)
    source = ModelSource.open(checkpoint_dir)
    if source.adapter is not None:
        is_lora = isinstance(source.adapter, LoRAFolder)
        instead = f"Merge it first: litgpt merge_lora {source.folder}" if is_lora else "Use litgpt generate."
        raise UserError(f"{source.folder} holds a {source.adapter.description}, which cannot be split. {instead}")
    check_divisible(source.checkpoint.config, world_size)
    if model.compile:
        check_compiler(device)
    with torch.device("meta"):
        empty = GPT(source.checkpoint.config)
    style = (
        source.style().with_variables(model.template_kwargs, strict=True) if model.template_kwargs else source.style()
    )
    rendered, ids = options.render(InferenceModel(source, empty, source.tokenizer(), style))
    Request(ids, options.max_new_tokens).check(empty)
    precision: Any = model.precision or natural_precision(source, device)
    with tempfile.TemporaryDirectory(prefix="litgpt-tp-") as folder:
        job = TensorParallelJob(
            folder=source.folder,
            model=replace(model, precision=precision, accelerator="cpu", devices=1),
            device_type=device.type,
            options=options,
            sampling=sampling,
            rendered=rendered,
            ids=ids,
            rendezvous=Path(folder, "rendezvous").as_uri(),
            world_size=world_size,
        )
        torch.multiprocessing.spawn(tensor_parallel_process, (job,), nprocs=world_size)  # type: ignore[no-untyped-call]


def tensor_parallel_process(rank: int, job: TensorParallelJob) -> None:
    """All processes generate the same tokens. The first one prints them."""
    backend = "nccl" if job.device_type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=job.rendezvous, rank=rank, world_size=job.world_size)
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    device = torch.device(job.device_type, rank) if job.device_type == "cuda" else torch.device(job.device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    source, dtype = ModelSource.open(job.folder), DTYPES[job.model.precision]  # type: ignore[index]
    model = load_part(source.checkpoint, dtype, device, rank, job.world_size, distributed.all_reduce)  # type: ignore
    style, variables = source.style(), job.model.template_kwargs
    style = style.with_variables(variables, strict=True) if variables else style
    loaded = InferenceModel(source, model, source.tokenizer(), style)
    loaded.prepare(job.model.compile, job.world_size)
    began = time.perf_counter()
    n_new = print_answers(engine_answers(loaded, job.options, job.sampling, job.ids), job.rendered, loaded)
    print_metrics(n_new, began, device, f"{job.world_size} process{'es' * (job.world_size > 1)}")
    distributed.destroy_process_group()


# what all ways share


def engine_answers(
    model: InferenceModel, options: PromptOptions, sampling: Sampling, ids: list[int], batch_size: int = MAX_BATCH
) -> Iterator[tuple[Answer, str]]:
    """Answers to one prompt in order, with the text by which each has grown."""
    requests = options.requests(ids, sampling, model.stop_ids)
    engine = Engine(model.model, min(len(requests), batch_size))
    return in_order(decode(engine, model.tokenizer, requests, options.stop_strings))


def print_answers(answers: Iterator[tuple[Answer, str]], rendered: str, model: InferenceModel) -> int:
    """Print answers while they grow, on a terminal each behind its prompt, and why they are not complete. Returns the
    number of generated tokens."""
    n_new, terminal, prompt_shown = 0, sys.stdout.isatty(), False
    for answer, text in answers:
        if not prompt_shown:
            print(rendered, end="" if terminal else "\n", file=sys.stdout if terminal else sys.stderr, flush=True)
            prompt_shown = True
        sys.stdout.write(text)
        if answer.finish:
            sys.stdout.write("\n")
            n_new += len(answer.request.ids)
            prompt_shown = not terminal
        sys.stdout.flush()
        if answer.context_full:
            n_context = model.model.config.block_size
            print(f"The answer ends here because the context is full ({n_context} tokens).", file=sys.stderr)
        elif answer.finish == "length":
            print(f"The answer was truncated at --max_new_tokens {answer.request.max_new_tokens}.", file=sys.stderr)
    return n_new


def print_metrics(n_new: int, began: float, device: torch.device, note: str = "") -> None:
    seconds = time.perf_counter() - began
    speed = f"{n_new} tokens in {seconds:.2f} s, {n_new / seconds:.1f} tokens/s"
    memory = f"peak memory {gigabytes(peak_memory(device))}"
    print(", ".join(filter(None, (speed, note, memory))), file=sys.stderr)


def default_adapter(checkpoint_dir: Path, folder: Path) -> Optional[Path]:
    """The adapter folder that LitGPT uses by default, unless `checkpoint_dir` is an adapter itself. Raises `UserError`
    if there is none."""
    if is_adapter(find_folder(checkpoint_dir)):
        return None
    if not is_adapter(folder):
        raise UserError(
            f"{checkpoint_dir} is a model, and {folder} is not an adapter. Pass the folder of the adapter instead, or "
            "pass it as --adapter_path."
        )
    return folder


def legacy_paths(
    checkpoint_dir: Path, base: Optional[Path], finetuned_path: Optional[Path], adapter_path: Optional[Path]
) -> tuple[Path, Optional[Path]]:
    """The folder and the base model that LitGPT's options mean. Prints today's spelling."""
    if finetuned_path is not None and adapter_path is not None:
        raise UserError("--finetuned_path and --adapter_path name two folders. Give only one of them.")
    path = finetuned_path or adapter_path
    if path is None:
        return checkpoint_dir, base
    folder = path.parent if path.is_file() else Path(result_folder(str(path)))
    if adapter_path is not None:
        base = base or checkpoint_dir
    option = "--finetuned_path" if adapter_path is None else "--adapter_path"
    command = f"litgpt generate {folder}" + (f" --base {base}" if base else "")
    print(f"litgpt: {option} {path} is called: {command}", file=sys.stderr)
    return folder, base


def read_stdin_options(options: PromptOptions) -> PromptOptions:
    """The options with the text on stdin in place of a `-`, or of the default prompt if something was piped in. Raises
    `UserError` if prompt and input are both on stdin, or it has no text and the default prompt was not meant."""
    if options.prompt == options.input == "-":
        raise UserError("--prompt - and --input - both read stdin. Give one of them as text.")
    if options.input == "-":
        return replace(options, input=read_stdin("--input -", required=True))
    if options.prompt == "-":
        return replace(options, prompt=read_stdin("--prompt -", required=True))
    if options.prompt == DEFAULT_PROMPT and is_piped(sys.stdin):
        return replace(options, prompt=read_stdin("--prompt", required=False) or options.prompt)
    return options


def read_stdin(option: str, required: bool) -> str:
    """Raises `UserError` if stdin has only whitespace, or is empty although a text is required."""
    text = sys.stdin.read()
    if not text and not required:
        print("litgpt: stdin is empty. Using the default prompt.", file=sys.stderr)
    elif not text.strip():
        has = "has only whitespace" if text else "is empty"
        raise UserError(f"{option}: stdin {has}. Pipe text into the command, or pass {option.split()[0]} TEXT.")
    return text.removesuffix("\n")


def is_piped(stream: Any) -> bool:
    """Whether a stream is a pipe or a file: not a terminal, and not /dev/null, which a background job has."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
