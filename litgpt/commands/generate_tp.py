"""`litgpt generate_tp`"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

import torch
from torch import distributed

from litgpt.commands.generate import LLAMAS, check_numbers, from_stdin, show
from litgpt.errors import UserError
from litgpt.generate.answers import decode, in_order, stop_strings
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel, natural_precision
from litgpt.generate.sampling import Sampling
from litgpt.generate.sequentially import usable_devices
from litgpt.generate.tensor_parallel import check_parts, keep_part
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.methods.quantize import QuantizeName
from litgpt.model import GPT
from litgpt.model.blocks import check_compiler
from litgpt.model.devices import Accelerator, PrecisionName, peak_memory, pick_device
from litgpt.train.progress import gigabytes


@dataclass
class Job:
    """What every process is told."""

    folder: Path
    precision: str
    device: str
    compile: bool
    rendered: str
    ids: list[int]
    num_samples: int
    max_new_tokens: int
    sampling: Sampling
    stop: list[str]
    seed: int
    meeting: str  # a file by which the processes find each other
    world: int


def main(
    checkpoint_dir: Path,
    prompt: str = LLAMAS,
    input: str = "",
    sys_prompt: Optional[str] = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Optional[Union[str, list[str]]] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    compile: bool = False,
    accelerator: Accelerator = "auto",
    devices: Union[int, Literal["auto"]] = "auto",
    seed: int = 1234,
) -> None:
    """Continue a prompt with a process for each device, each with a part of every layer (tensor parallelism).

    The prompt, as the model reads it, and what follows go to stdout, figures to stderr.

    Args:
        checkpoint_dir: A base folder, or the name of one under checkpoints/; an adapter is to be merged first.
        prompt: What to continue or to answer; - reads it from stdin, and so does a pipe where no prompt is given.
        input: What an instruction is about, as the input of Alpaca's rows; - reads it from stdin.
        sys_prompt: A system message before the prompt.
        num_samples: How many answers.
        max_new_tokens: The length of an answer, at most.
        top_k: Draw from so many of the most likely tokens; null for all.
        top_p: Draw from the most likely tokens whose probabilities sum up to this.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
        min_p: Draw from tokens that are at least this likely, as a share of the most likely one.
        repetition_penalty: Above 1 tokens that the text has already become less likely.
        stop: A text that ends the answer, or a JSON list of several; it is left out.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        quantize: Refused: quantized layers are not cut.
        compile: Compile the blocks of the model: a slower start, and then faster steps.
        accelerator: The kind of device.
        devices: How many, which the heads of the model must be divisible by; on CPUs so many processes. auto for all.
        seed: The same seed draws the same answers.
    """
    check_numbers(num_samples=num_samples, max_new_tokens=max_new_tokens)
    if quantize is not None:
        raise UserError(f"--quantize {quantize}: quantized layers are not cut; use litgpt generate.")
    device = pick_device(accelerator)
    if device.type == "cpu" and devices != "auto":
        check_numbers(devices=devices)
        world = int(devices)
    else:
        world = len(usable_devices(accelerator, devices))
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    words, (prompt, input) = stop_strings(stop), from_stdin(prompt, input)
    source = ModelSource.open(checkpoint_dir)
    if source.adapter is not None:
        lora = isinstance(source.adapter, LoRAFolder)
        instead = f"merge it first (litgpt merge_lora {source.folder})" if lora else "use litgpt generate"
        raise UserError(f"{source.folder} holds a {source.adapter.description}, which is not cut: {instead}.")
    check_parts(source.checkpoint.config, world)
    if compile:
        check_compiler(device)
    with torch.device("meta"):
        empty = GPT(source.checkpoint.config)
    messages = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
    messages.append({"role": "user", "content": prompt, "input": input})
    rendered, ids = InferenceModel(source, empty, source.tokenizer(), source.style()).render(messages)
    Request(ids, max_new_tokens).check(empty)
    dtype = precision or natural_precision(source, device)
    with tempfile.TemporaryDirectory(prefix="litgpt-tp-") as folder:
        meeting = Path(folder, "meeting").as_uri()
        requested = num_samples, max_new_tokens, sampling, words, seed
        job = Job(source.folder, dtype, device.type, compile, rendered, ids, *requested, meeting, world)
        torch.multiprocessing.spawn(work, (job,), nprocs=world)  # type: ignore[no-untyped-call]


def work(rank: int, job: Job) -> None:
    """What one process does; all draw the same tokens, and the first one shows them."""
    backend = "nccl" if job.device == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=job.meeting, rank=rank, world_size=job.world)
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    loaded = InferenceModel.open(job.folder, None, job.precision, None, "cpu")  # type: ignore[arg-type]
    keep_part(loaded.model, rank, job.world, distributed.all_reduce)  # type: ignore[arg-type]
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded.model.to(device)
    loaded.model.tie_weights()
    loaded.prepare(job.compile, job.world)
    texts = [
        Request(job.ids, job.max_new_tokens, job.sampling, loaded.stop_ids, job.seed + i)
        for i in range(job.num_samples)
    ]
    engine, began = Engine(loaded.model, min(job.num_samples, 16)), time.perf_counter()
    pieces = in_order(decode(engine, loaded.tokenizer, texts, job.stop))
    n_new = show(pieces, job.rendered, loaded.model.config.block_size)
    seconds, memory = time.perf_counter() - began, gigabytes(peak_memory(device))
    speed = f"{n_new} tokens in {seconds:.2f} s, {n_new / seconds:.1f} tokens/s"
    print(f"{speed}, {job.world} processes, peak memory {memory} in the first", file=sys.stderr)
    distributed.destroy_process_group()
