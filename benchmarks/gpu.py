"""Measure training on a GPU: seconds per micro-step, real tokens per second, MFU and peak memory of the device.

    python benchmarks/gpu.py                                       # all cases, with the shape of Llama-3.1-8B
    python benchmarks/gpu.py --case packed --method qlora --model Llama-3.2-1B
    python benchmarks/gpu.py --case smoke                          # a tiny shape, on a CPU too

The weights are random and drawn on the device, one tensor at a time, as a checkpoint would be read: nothing is
downloaded or written, and QLoRA never holds more than one tensor that is not quantized. The cases:

    packed  2 rows of 8,192 random tokens, all of them trained, with activation checkpointing
    packs   2 packs of 4,096 tokens, each of many short rows of random tokens
    alpaca  8 Alpaca rows of at most 512 tokens
    smoke   2 rows of 64 random tokens, two narrow layers, with activation checkpointing

`--compile` compiles the blocks, as in a run; the first micro-steps, which are not timed, wait for the compiler.

A micro-step is one forward and one backward pass; the optimizer's step, which follows each here, is timed apart, and
its memory counts. MFU is that of litgpt/train/flops.py: operations that are done twice count once.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from common import choose_rows, gigabytes, machine, publish, write_json

import litgpt
from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.data.json_file import JSON
from litgpt.families import weight_map
from litgpt.methods.lora import LoRA
from litgpt.methods.quantize import bitsandbytes, quantize
from litgpt.model.blocks import check_compiler, compile_blocks, recompute
from litgpt.model.config import Config
from litgpt.model.devices import DTYPES, peak_memory, pick_device
from litgpt.model.gpt import GPT
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.devices.launch import make_fabric, seed_everything
from litgpt.train.flops import FlopCounter
from litgpt.train.loss import LossModel
from litgpt.train.optimizers import AdamW, finished, parameter_groups
from litgpt.train.progress import percent

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("AdamW", "AdamW8bit")
SMOKE = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 128,
    "padded_vocab_size": 640,
}


@dataclass
class Case:
    """A shape of micro-batches.

    Args:
        rows: Rows or packs of a micro-batch.
        length: Tokens of a row or pack, at most.
        random: Whether rows are random tokens that fill the length, instead of Alpaca rows.
        checkpointing: Whether blocks are computed again in the backward pass.
        pack: Whether `rows` counts packs of many short rows.
    """

    rows: int
    length: int
    random: bool
    checkpointing: bool
    pack: bool = False


CASES = {
    "packed": Case(rows=2, length=8192, random=True, checkpointing=True),
    "packs": Case(rows=2, length=4096, random=True, checkpointing=False, pack=True),
    "alpaca": Case(rows=8, length=512, random=False, checkpointing=False),
    "smoke": Case(rows=2, length=64, random=True, checkpointing=True),
}


class DrawnCheckpoint(Checkpoint):
    """A checkpoint that is nowhere: each of its weights is drawn when it is asked for, on the device."""

    def __init__(self, model: GPT, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.dtype, self.device = Path("random weights"), dtype, device
        names = weight_map(model.config)
        self.shapes = {
            tensor.name: parameter.shape(tensor)
            for parameter in names.parameters(model).values()
            for tensor in parameter.tensors
            if tensor.name != names.tied_head
        }
        self.dtypes = dict.fromkeys(self.shapes, "BF16")
        self.files = dict.fromkeys(self.shapes, self.folder)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            empty = torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)
            if empty.ndim == 1:
                yield name, empty.fill_(name.endswith("weight"))  # norms are 1, biases 0
            else:
                yield name, empty.normal_(std=0.02)


def build(config: Config, method: str, precision: str, device: torch.device) -> GPT:
    """A model as `litgpt finetune` makes it, of random weights on the device. The methods "base" and "nf4" are models
    that only answer."""
    with torch.device("meta"):
        model = GPT(config)
    if method in ("qlora", "nf4"):
        quantize(model, "bnb.nf4", device)
    if method in ("full", "base", "nf4"):
        model.requires_grad_(method == "full")
    else:
        LoRA(r=8, alpha=16, dropout=0.05, query=True, value=True).apply(model)
    load_weights(model, DrawnCheckpoint(model, DTYPES[precision], device), DTYPES[precision], device)
    return model


def make_batches(case: Case, n: int, vocabulary: int, data: Optional[Path], tokenizer: Path) -> list[Batch]:
    """`n` micro-batches."""
    if case.random:
        generator = torch.Generator().manual_seed(0)
        return [random_batch(case, vocabulary, generator) for _ in range(n)]
    with tempfile.TemporaryDirectory(prefix="litgpt-benchmark-") as name:
        file = write_json(Path(name) / "rows.json", choose_rows(data, n * case.rows))
        rows = JSON(str(file), val_split_fraction=0.0, prompt_style="alpaca", mask_prompt=False)
        loaded = rows.load(Tokenizer(tokenizer), tokenizer, case.length)
        return [loaded.train.batch(range(i, i + case.rows)) for i in range(0, n * case.rows, case.rows)]


def random_batch(case: Case, vocabulary: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(vocabulary, (1, case.rows * case.length), generator=generator)
    seqlens = [n for _ in range(case.rows) for n in row_lengths(case, generator)]
    targets = ids.roll(-1, 1)
    targets[0, torch.tensor(seqlens).cumsum(0) - 1] = UNTRAINED
    return Batch(ids, targets, seqlens, ids.numel() - len(seqlens))


def row_lengths(case: Case, generator: torch.Generator) -> list[int]:
    """The lengths of the rows that fill the length of a case: one, or in a pack many."""
    lengths: list[int] = []
    while (room := case.length - sum(lengths)) > 0:
        lengths.append(min(room, int(torch.randint(32, 512, (), generator=generator))) if case.pack else room)
    return lengths


def timed(device: torch.device, work: Callable[[], None]) -> float:
    """Seconds that the device needs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def make_optimizer(gpt: GPT, name: str) -> Any:
    if name == "AdamW8bit":
        return bitsandbytes().optim.AdamW8bit(parameter_groups(gpt))
    return finished(AdamW(parameter_groups(gpt)), seed=0)


def measure(case: Case, method: str, config: Config, batches: list[Batch], args: argparse.Namespace) -> dict:
    """One row of the table. The first of the batches are not timed, but their memory counts."""
    device, precision = pick_device("auto"), args.precision
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(0)
    fabric = make_fabric(device, 1, 1, precision, "ddp")
    gpt = build(config, method, precision, device)
    optimizer = make_optimizer(gpt, args.optimizer)
    if args.compile:
        check_compiler(device)
        compile_blocks(gpt)
    if case.checkpointing:
        recompute(gpt)
    work = FlopCounter.of(gpt, device, torch.bfloat16 if precision == "bf16-mixed" else DTYPES[precision])
    model, optimizer = fabric.setup(LossModel(gpt), optimizer)
    model.train()
    micro_steps, optimizer_steps, tokens, targets = [], [], 0, 0
    for i, batch in enumerate(batches):
        batch = batch.to(device)
        micro_step = timed(device, lambda batch=batch: fabric.backward(model(batch) / batch.n_target_tokens))
        optimizer_step = timed(device, optimizer.step)
        optimizer.zero_grad()
        if i >= args.first:
            micro_steps.append(micro_step)
            optimizer_steps.append(optimizer_step)
            tokens, targets = tokens + batch.ids.numel(), targets + batch.n_target_tokens
    mfu = work.share(tokens, targets, sum(micro_steps), 1)
    return {
        "micro_step_s": round(statistics.median(micro_steps), 4),
        "micro_steps_s": [round(seconds, 4) for seconds in micro_steps],
        "optimizer_step_s": round(statistics.median(optimizer_steps), 4),
        "tokens": tokens,
        "tokens_per_s": round(tokens / sum(micro_steps), 1),
        "mfu": None if mfu is None else round(mfu, 4),
        "peak_memory": peak_memory(device),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type}
    return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=["packed", "alpaca"])
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--model", default="Llama-3.1-8B", help="The name of a known model, for its shape.")
    parser.add_argument("--precision", choices=[p for p in DTYPES if not p.startswith("16")], default="bf16-true")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW", help="AdamW, by default, or with 8 bits.")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks.")
    parser.add_argument("--micro_steps", type=int, default=5, help="Micro-steps that are timed (5).")
    parser.add_argument("--first", type=int, default=2, help="Micro-steps before them, which are not timed (2).")
    parser.add_argument("--data", type=Path, help="An Alpaca file for the case alpaca; by default random words.")
    parser.add_argument("--tokenizer", type=Path, default=Path("pico"), help="For the case alpaca (the built-in pico).")
    parser.add_argument("--json", type=Path, help="A file that the lines of JSON are added to.")
    args = parser.parse_args(argv)
    device = pick_device("auto")
    if device.type != "cuda" and args.case != ["smoke"]:
        sys.exit("There is no GPU here: not measured. --case smoke runs on a CPU.")
    tokenizer = find_folder(args.tokenizer)
    lines = ["| case | method | s per micro-step | s per optimizer step | real tokens/s | MFU | peak memory |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for name in args.case:
        case = CASES[name]
        config = Config(**SMOKE) if name == "smoke" else Config.from_name(args.model)
        n = args.first + args.micro_steps
        batches = make_batches(case, n, config.padded_vocab_size, args.data, tokenizer)
        for method in args.method:
            model = "smoke" if name == "smoke" else args.model
            about = {"case": name, "method": method, "model": model, "precision": args.precision}
            about |= {"optimizer": args.optimizer, "compile": args.compile}
            facts = {"version": litgpt.__version__, **machine(), **device_facts(device), **about}
            try:
                found = measure(case, method, config, batches, args)
            except torch.OutOfMemoryError:
                publish({**facts, "error": "out of memory"}, args.json)
                lines.append(f"| {name} | {method} | out of memory | | | | |")
                continue
            publish({**facts, "micro_steps": args.micro_steps, **found}, args.json)
            lines.append(
                f"| {name} | {method} | {found['micro_step_s']:.3f} | {found['optimizer_step_s']:.3f} | "
                f"{found['tokens_per_s']:,.0f} | {percent(found['mfu'], 1)} | {gigabytes(found['peak_memory'])} |"
            )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
